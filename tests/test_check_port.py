"""examples/check_port.py finds wrong ports and wrong trainers, and right ones pass.

A port cuts rows into inputs and targets, averages the embeddings of each bag, lets the model score
the vocabulary, and compares the scores with the targets. A wrong port changes one of these steps.
In shapes: B rows, l positions, s tokens in a bag, V token ids, width d.
"""
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from examples.check_port import Spy, check_port

V, D = 98, 32


class GPT(nn.Module):
    """A small GPT with learned positions. Its tables have weights as large as after training."""

    def __init__(self, tied=False, norm=False):
        super().__init__()
        self.embedding, self.positions = nn.Embedding(V, D), nn.Embedding(64, D)
        self.embedding.weight.data *= torch.linspace(0.2, 2, V).unsqueeze(1)    # different norms
        self.norm = nn.RMSNorm(D) if norm else nn.Identity()
        self.block = nn.TransformerEncoderLayer(D, 4, 2 * D, 0.0, batch_first=True)
        self.head = nn.Linear(D, V, bias=False)
        self.head.weight = self.embedding.weight if tied else nn.Parameter(torch.randn(V, D) / 2)

    def forward(self, x, positions, mask):      # (B, l, d), (l, k), (l, l) -> (B, l, V)
        return self.head(self.block(self.norm(x) + self.positions(positions).mean(1), mask))


@pytest.fixture
def model():
    return GPT().eval()


def cut(rows, s):                       # (B, (l + 1) s) -> inputs and targets, (B, l s) each
    return rows[:, :-s], rows[:, s:]


RIGHT = {
    "cut": cut,
    "average": lambda e, bags: e.mean(2),                       # (B, l, s, d) -> (B, l, d)
    "positions": lambda l, s: torch.arange(l).view(l, 1),       # averaged over the second axis
    "mask": nn.Transformer.generate_square_subsequent_mask,     # hides later positions
    "loss": lambda p, z, y: -p.mean()}  # targets y (B, l, s), their log-probabilities p, logits z


def port(model, at_s_1_too=False, **changes):
    """The function loss_of(rows, s) of a port. Changes of its steps apply where s > 1."""
    def loss_of(rows, s):
        step = {**RIGHT, **(changes if s > 1 or at_s_1_too else {})}
        inputs, targets = (tokens.unflatten(1, (-1, s)) for tokens in step["cut"](rows, s))
        x, l = step["average"](model.embedding(inputs), inputs), inputs.size(1)
        z = model(x, step["positions"](l, s), step["mask"](l))          # (B, l, V)
        p = z.log_softmax(2).gather(2, targets.clamp(min=0))            # y < 0 is ignored
        return step["loss"](p, z, targets)
    return loss_of


def failed(model, loss_of, **arguments):
    """The names of the checks that a port of the model fails, in one string."""
    return " ".join(check_port(loss_of, V, lambda rows: port(model)(rows, 1),
                               [model.embedding.weight], **arguments))


@pytest.mark.parametrize("s", [2, 3, 6])
def test_right_ports_pass_and_the_check_restores_their_tables(s):
    for model in (GPT().eval(), GPT(tied=True).eval(), GPT(norm=True).eval()):
        table = model.embedding.weight.clone()
        assert failed(model, port(model), s=s) == "" and model.embedding.weight.equal(table)


def copies(bags):                       # how often each token is in its bag, (B, l, s)
    return (bags.unsqueeze(3) == bags.unsqueeze(2)).sum(3)


def in_set(bags):                       # weights (B, l, s), equal for the different tokens of a bag
    return F.normalize(1 / copies(bags), p=1, dim=2)


# {mistake: (the checks that find the mistake, the changed step)}
ALL = "copies order chain target mean"
CUT = {
    "labels shifted by one token": (ALL, lambda rows, s: (rows[:, :-s], rows[:, 1:1 - s])),
    "inputs one token late": (ALL, lambda rows, s: (rows[:, 1:1 - s], rows[:, s:])),
    "strided bags": (ALL, lambda rows, s: cut(rows.unflatten(1, (s, -1)).mT.flatten(1), s)),
    "target = input": ("copies chain mean", lambda rows, s: 2 * [rows[:, :-s]]),
    "target = input, at s = 1 too": ("own chain mean", lambda rows, s: 2 * [rows[:, :-s]]),
    "bag j + 2 as target": ("copies chain", lambda rows, s: (rows[:, :-2 * s], rows[:, 2 * s:])),
    "l / s positions": (
        "copies chain", lambda rows, s: cut(rows[:, :rows.size(1) // s // s * s], s))}
AVERAGE = {
    "sum": ("copies", lambda e, bags: e.sum(2)),
    "sum / root of s": ("copies", lambda e, bags: e.sum(2) / bags.size(2) ** 0.5),
    "max-pool": ("mean", lambda e, bags: e.amax(2)),
    "input as a set": ("mean", lambda e, bags: (e * in_set(bags).unsqueeze(3)).sum(2)),
    "first input token only": ("order mean", lambda e, bags: e[:, :, 0]),
    "dropout, at s = 1 too": ("repeat own " + ALL, lambda e, bags: F.dropout(e.mean(2)))}
POSITIONS = {
    "positions 0, s, 2s": ("copies", lambda l, s: s * torch.arange(l).view(l, 1)),
    "mean of position embeddings": ("copies", lambda l, s: torch.arange(l * s).view(l, s))}
LOSS = {
    "loss / s": ("copies chain", lambda p, z, y: -p.mean() / y.size(2)),
    "loss x s": ("copies chain", lambda p, z, y: -p.mean() * y.size(2)),
    "targets flattened and truncated": (
        "copies order chain", lambda p, z, y: F.cross_entropy(z.mT, y.flatten(1)[:, :z.size(1)])),
    "first target token only": ("order target", lambda p, z, y: -p[:, :, 0].mean()),
    "first target token only, loss / s": (
        "copies order chain target", lambda p, z, y: -p[:, :, 0].mean() / y.size(2)),
    "target set, mean over the set": ("target", lambda p, z, y: -(p * in_set(y)).sum(2).mean()),
    "target set, divided by s": ("copies chain target", lambda p, z, y: -(p / copies(y)).mean()),
    "binary cross-entropy": ("copies chain target", lambda p, z, y: (
        F.binary_cross_entropy_with_logits(z, torch.zeros_like(z).scatter(2, y, 1)))),
    "-log of the mean probability": ("target", lambda p, z, y: -p.exp().mean(2).log().mean()),
    "-log of the summed probability": (
        "copies chain target", lambda p, z, y: -p.exp().sum(2).log().mean()),
    "no logsumexp": ("copies chain", lambda p, z, y: -z.gather(2, y).mean()),
    "not a number": ("repeat " + ALL, lambda p, z, y: p.mean() * float("nan"))}
MASK = {"full attention": ("copies chain", lambda l: None)}
WRONG = {"cut": CUT, "average": AVERAGE, "positions": POSITIONS, "mask": MASK, "loss": LOSS}


@pytest.mark.parametrize("step, mistake", [(step, name) for step in WRONG for name in WRONG[step]])
def test_a_wrong_port_fails_the_checks_that_it_breaks(step, mistake, model):
    checks, change = WRONG[step][mistake]
    assert failed(model, port(model, "at s = 1" in mistake, **{step: change})) == checks


def test_a_mean_of_normed_embeddings_fails_in_a_model_that_norms_its_embeddings():
    model = GPT(norm=True).eval()
    assert failed(model, port(model, average=lambda e, bags: model.norm(e).mean(2))) == "mean"


def test_sums_and_logits_in_bfloat16_fail_but_torch_mean_of_bfloat16_embeddings_passes(model):
    model.embedding.weight.data = model.embedding.weight.data.bfloat16().float()
    mean = port(model, average=lambda e, bags: e.bfloat16().mean(2).float())
    total = port(model, average=lambda e, bags: (sum(e.bfloat16().unbind(2)) / 4).float())
    logits = port(model, True, loss=lambda p, z, y: (
        -z.bfloat16().log_softmax(2).gather(2, y).mean().float()))
    assert failed(model, mean) == "" != failed(model, total) and "own" in failed(model, logits)


@pytest.mark.parametrize("padding", [27, V - 1])
def test_padding_in_the_mean_fails(padding, model):
    def without_padding(e, bags):
        kept = (bags != padding).unsqueeze(3)                           # (B, l, s, 1)
        return (e * kept).sum(2) / kept.sum(2)
    assert failed(model, port(model, average=without_padding), padding=padding) == ""
    assert failed(model, port(model), padding=padding) == "padding"


@pytest.mark.parametrize("check, loss", [       # a correct loss fails no check
    ("", lambda p, z, y: -((p * (y >= 0)).sum(2) / (y >= 0).sum(2)).nanmean()), # leaves out 0 / 0
    ("", lambda p, z, y: -p[y >= 0].mean()),
    ("ignore", lambda p, z, y: -p.mean()),              # trains ignored labels as token 0
    ("ignore", lambda p, z, y: -(p * (y >= 0)).mean(2)[(y >= 0).any(2)].mean()),    # divides by s
    ("ignore", lambda p, z, y: -((p * (y >= 0)).sum(2) / (y >= 0).sum(2).clamp(min=1)).mean())])
def test_ignored_labels_have_no_loss_and_count_in_no_divisor(check, loss, model):
    def labelled(rows, s, labels):
        return port(model, cut=lambda rows, s: (rows[:, :-s], labels[:, s:]), loss=loss)(rows, s)
    assert failed(model, port(model), labelled=labelled) == check


TRAINERS = {    # mistake: (checks that find the mistake, what the trainer does)
    "none": ([], {}),
    "none, and SGD, which does not count its steps": ([], {"optimizer": torch.optim.SGD}),
    "rows not longer": (["row length"], {"n": dict.fromkeys(range(10), 8)}),
    "a batch cut with the next s": (["row length"], {"n": {10: 9 * 4 - 1}}),
    "the loader shifts by one token": (["target shift"], {"shift": 1}),
    "target = input": (["target shift"], {"shift": 0}),
    "a late switch": (["row length", "target shift"], {"switch": 11}),
    "an early switch": (["row length", "target shift"], {"switch": 8}),
    "the phase never runs": (["row length", "target shift"], {"switch": 0}),
    "validation in bags": (["validation shift"], {"validation": 4}),
    "a new optimizer": (["optimizer steps"], {"new optimizer": 10}),
    "a schedule that starts again": (["learning rate"], {"new schedule": 10})}


@pytest.mark.parametrize("checks, trainer", TRAINERS.values(), ids=TRAINERS)
def test_the_spy_finds_what_a_trainer_does_wrong(checks, trainer):
    stream, weight, spy = torch.randint(V, (2000,)), torch.ones(1, requires_grad=True), Spy()
    for step in range(20):
        if step in (0, trainer.get("new optimizer")):
            optimizer = trainer.get("optimizer", torch.optim.AdamW)([weight])
        time = step % trainer.get("new schedule", 20)
        optimizer.param_groups[0]["lr"] = min(1, (time + 1) / 5) - time / 40    # warmup and decay
        s = 4 if step < trainer.get("switch", 10) else 1
        n, shift = trainer.get("n", {}).get(step, 8 * s), trainer.get("shift", s)
        passes = [(True, n, shift), (True, n, shift), (False, 8, trainer.get("validation", 1))]
        for training, n, shift in passes:
            i = torch.randint(1900, (3, 1)) + torch.arange(n)           # (B, n)
            spy.record(step, stream[i], stream[i + shift], training, optimizer)
        weight.square().backward()
        optimizer.step()
    assert spy.check(s=4, l=8, switch=10) == checks
