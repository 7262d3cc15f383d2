"""examples/check_port.py finds wrong ports and wrong trainers, and lets the right ones pass.

A port has four steps: it cuts rows into bags, averages the embeddings of a bag, scores the
vocabulary, and compares scores with targets. A wrong port changes one of these steps.
In shapes: B rows, l positions, s tokens in a bag, V token ids, width d.
"""
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import model as model_py
from examples.check_port import Spy, check_port

V, D = 98, 32


class GPT(nn.Module):
    def __init__(self, tied):
        super().__init__()
        self.embedding, self.positions = nn.Embedding(V, D), nn.Embedding(64, D)
        self.head = nn.Linear(D, V, bias=False)
        if tied:
            self.head.weight = self.embedding.weight
        for module in (self.embedding, self.positions, self.head):
            nn.init.normal_(module.weight, std=0.02)
        block = nn.TransformerEncoderLayer(D, 4, 2 * D, 0.0, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(block, 2, nn.LayerNorm(D), enable_nested_tensor=False)

    def forward(self, x, positions=None, causal=True):
        """x (B, l, d) -> logits (B, l, V). The embeddings of positions (l, k) are averaged."""
        positions = torch.arange(x.size(1)).unsqueeze(1) if positions is None else positions
        mask = nn.Transformer.generate_square_subsequent_mask(x.size(1)) if causal else None
        return self.head(self.blocks(x + self.positions(positions).mean(1), mask, is_causal=causal))


def cut(rows, s):                       # (B, (l + 1) s) -> inputs and targets, (B, l, s) each
    bags = rows.unflatten(1, (-1, s))
    return bags[:, :-1], bags[:, 1:]


def mce(z, y):                          # multi-hot cross-entropy: (B, l, V), (B, l, s) -> a scalar
    return (z.logsumexp(-1) - z.gather(-1, y).mean(-1)).mean()


def port(model, at_s_1_too=False, **changes):
    """The function loss_of(rows, s) of a port. Changes of its steps apply where s > 1."""
    def loss_of(rows, s):
        step = {"cut": cut, "average": lambda e, bags: e.mean(2),       # (B, l, s, d) -> (B, l, d)
                "score": lambda model, x, s: model(x), "loss": mce}     # (B, l, d) -> (B, l, V)
        step.update(changes if s > 1 or at_s_1_too else {})
        inputs, targets = step["cut"](rows, s)
        x = step["average"](model.embedding(inputs), inputs)
        return step["loss"](step["score"](model, x, s), targets)
    return loss_of


def trained(tied=False):
    """A GPT after 50 steps on one random batch: 25 in bags of 4, and 25 on single tokens."""
    torch.manual_seed(0)
    model, rows = GPT(tied), torch.randint(V, (8, 36))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(50):
        port(model)(rows, 4 if step < 25 else 1).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@pytest.fixture(scope="module")
def model():
    return trained()


def failed(model, loss_of, **arguments):
    """The names of the checks that a port of the model fails, in one string."""
    def own_loss(rows):
        return F.cross_entropy(model(model.embedding(rows[:, :-1])).mT, rows[:, 1:])
    return " ".join(check_port(loss_of, V, own_loss, [model.embedding.weight], **arguments))


@pytest.mark.parametrize("s", [2, 3, 6])
def test_right_ports_pass_and_the_check_restores_their_tables(s, model):
    for right in (model, trained(tied=True)):
        table = right.embedding.weight.clone()
        assert failed(right, port(right), s=s) == "" and right.embedding.weight.equal(table)
    with_rope = model_py.GPT(model_py.Config(2, D, 4, 2, 2 * D, vocab_size=V))
    for p in with_rope.parameters():
        nn.init.normal_(p, std=0.2)     # as large as weights after training
    assert check_port(lambda rows, s: with_rope(*cut(rows, s)), 128, s=s) == []


def average_of_the_set(e, bags):
    copies = (bags.unsqueeze(3) == bags.unsqueeze(2)).sum(3)            # (B, l, s)
    return (e * F.normalize(1 / copies, p=1, dim=2).unsqueeze(3)).sum(2)


def members(z, y):                      # (B, V, l): 1 for the tokens of the target bag, else 0
    return torch.zeros_like(z).scatter(-1, y, 1).mT


ALL = "copies order chain target mean"
WRONG = {       # step: {mistake: (checks that find the mistake, the changed step)}
    "cut": {
        "labels shifted by one token": (
            ALL, lambda rows, s: (cut(rows, s)[0], cut(rows.roll(-1, 1), s)[0])),
        "inputs one token late": (
            ALL, lambda rows, s: (cut(rows.roll(-1, 1), s)[0], cut(rows, s)[1])),
        "strided bags": (ALL, lambda rows, s: cut(rows.unflatten(1, (s, -1)).mT.flatten(1), s)),
        "target = input": ("copies chain mean", lambda rows, s: 2 * cut(rows, s)[:1]),
        "target = input, at s = 1 too": ("own chain mean", lambda rows, s: 2 * cut(rows, s)[:1]),
        "bag j + 2 as target": (
            "copies chain", lambda rows, s: (cut(rows[:, :-s], s)[0], cut(rows[:, s:], s)[1])),
        "l / s positions": (
            "copies chain", lambda rows, s: cut(rows[:, :rows.size(1) // s // s * s], s))},
    "average": {
        "sum": ("copies", lambda e, bags: e.sum(2)),
        "sum / root of s": ("copies", lambda e, bags: e.sum(2) / bags.size(2) ** 0.5),
        "max-pool": ("mean", lambda e, bags: e.amax(2)),
        "input as a set": ("mean", average_of_the_set),
        "first input token only": ("order mean", lambda e, bags: e[:, :, 0]),
        "dropout, at s = 1 too": ("repeat own " + ALL, lambda e, bags: F.dropout(e.mean(2)))},
    "score": {
        "full attention": ("copies chain", lambda model, x, s: model(x, causal=False)),
        "positions 0, s, 2s": (
            "copies", lambda model, x, s: model(x, s * torch.arange(x.size(1)).unsqueeze(1))),
        "mean of token and position embeddings": (
            "copies", lambda model, x, s: model(x, torch.arange(x.size(1) * s).view(-1, s)))},
    "loss": {
        "loss / s": ("copies chain", lambda z, y: mce(z, y) / y.size(2)),
        "loss x s": ("copies chain", lambda z, y: mce(z, y) * y.size(2)),
        "targets flattened and truncated": (
            "copies order chain", lambda z, y: mce(z, y.flatten(1)[:, :z.size(1), None])),
        "first target token only": ("order target", lambda z, y: mce(z, y[..., :1])),
        "first target token only, loss / s": (
            "copies order chain target", lambda z, y: mce(z, y[..., :1]) / y.size(2)),
        "target set, mean over the set": (
            "target", lambda z, y: F.cross_entropy(z.mT, F.normalize(members(z, y), p=1, dim=1))),
        "target set, divided by s": (
            "copies chain target", lambda z, y: F.cross_entropy(z.mT, members(z, y)) / y.size(2)),
        "binary cross-entropy": ("copies chain target", lambda z, y: (
            F.binary_cross_entropy_with_logits(z.mT, members(z, y)))),
        "-log of the mean probability": (
            "target", lambda z, y: -z.softmax(-1).gather(-1, y).mean(-1).log().mean()),
        "-log of the summed probability": (
            "copies chain target", lambda z, y: -z.softmax(-1).gather(-1, y).sum(-1).log().mean()),
        "no logsumexp": ("copies chain", lambda z, y: -z.gather(-1, y).mean()),
        "not a number": ("repeat " + ALL, lambda z, y: mce(z, y) * float("nan"))}}


@pytest.mark.parametrize("step, mistake", [(step, name) for step in WRONG for name in WRONG[step]])
def test_a_wrong_port_fails_the_checks_that_it_breaks(step, mistake, model):
    checks, change = WRONG[step][mistake]
    assert failed(model, port(model, "at s = 1" in mistake, **{step: change})) == checks


def test_a_mean_of_normed_embeddings_fails_in_a_model_that_norms_its_embeddings(model):
    norm = nn.RMSNorm(D)
    right = port(model, True, average=lambda e, bags: norm(e.mean(2)))
    wrong = port(model, True, average=lambda e, bags: norm(norm(e).mean(2)))
    assert check_port(right, V, tables=[model.embedding.weight]) == []
    assert check_port(wrong, V, tables=[model.embedding.weight]) == ["mean"]


def test_rounding_to_bfloat16_fails_but_torch_mean_of_bfloat16_embeddings_passes():
    model = trained()
    model.embedding.weight.data = model.embedding.weight.data.bfloat16().float()
    mean = port(model, average=lambda e, bags: e.bfloat16().mean(2).float())
    total = port(model, average=lambda e, bags: (sum(e.bfloat16().unbind(2)) / 4).float())
    logits = port(model, True, loss=lambda z, y: mce(z.bfloat16(), y).float())
    assert failed(model, mean) == "" != failed(model, total) and "own" in failed(model, logits)


@pytest.mark.parametrize("padding", [27, V - 1])
def test_padding_in_the_mean_fails(padding, model):
    def without_padding(e, bags):
        kept = (bags != padding).unsqueeze(3)                           # (B, l, s, 1)
        return (e * kept).sum(2) / kept.sum(2)
    assert failed(model, port(model, True, average=without_padding), padding=padding) == ""
    assert failed(model, port(model), padding=padding) == "padding"


@pytest.mark.parametrize("checks, loss", [      # p: log-probabilities (B, l, s) of labels y
    ("", lambda p, y: -((p * (y >= 0)).sum(-1) / (y >= 0).sum(-1)).nanmean()),  # 0 / 0 is left out
    ("", lambda p, y: -p[y >= 0].mean()),
    ("ignore", lambda p, y: -p.mean()),                                         # y < 0 is token 0
    ("ignore", lambda p, y: -(p * (y >= 0)).mean(-1)[(y >= 0).any(-1)].mean()),     # divided by s
    ("ignore", lambda p, y: -((p * (y >= 0)).sum(-1) / (y >= 0).sum(-1).clamp(min=1)).mean())])
def test_ignored_labels_have_no_loss_and_count_in_no_divisor(checks, loss, model):
    def labelled(rows, s, labels):
        return port(model, cut=lambda rows, s: (cut(rows, s)[0], cut(labels, s)[1]), loss=(
            lambda z, y: loss(z.log_softmax(-1).gather(-1, y.clamp(min=0)), y)))(rows, s)
    assert failed(model, port(model), labelled=labelled) == checks


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
    "a new optimizer": (["optimizer steps"], {"new optimizer": True}),
    "a schedule that starts again": (["learning rate"], {"new schedule": True})}


@pytest.mark.parametrize("checks, trainer", TRAINERS.values(), ids=TRAINERS)
def test_the_spy_finds_what_a_trainer_does_wrong(checks, trainer):
    stream, weight, spy = torch.randint(V, (2000,)), torch.ones(1, requires_grad=True), Spy()
    optimizer = trainer.get("optimizer", torch.optim.AdamW)([weight])
    for step in range(20):
        s = 4 if step < trainer.get("switch", 10) else 1
        n, shift = trainer.get("n", {}).get(step, 8 * s), trainer.get("shift", s)
        if step == 10 and "new optimizer" in trainer:
            optimizer = torch.optim.AdamW([weight])
        time = step - 10 if step >= 10 and "new schedule" in trainer else step
        optimizer.param_groups[0]["lr"] = min(1, (time + 1) / 5) - time / 40    # warmup and decay
        passes = [(True, n, shift), (True, n, shift), (False, 8, trainer.get("validation", 1))]
        for training, n, shift in passes:
            i = torch.randint(1900, (3, 1)) + torch.arange(n)           # (B, n)
            spy.record(step, stream[i], stream[i + shift], training, optimizer)
        weight.square().backward()
        optimizer.step()
    assert spy.check(s=4, l=8, switch=10) == checks
    with pytest.raises(ValueError, match="Record every training step from 18 to 21"):
        spy.check(s=4, l=8, switch=20)
