"""The claims of the method, one for each test. Run them with `python -m pytest test_tst.py`.

The tests of everything else, such as resuming and bad input, are in tests/.
"""
import json
import math
import signal

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint.state_dict as state_dicts
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import data
import train_tst
from model import GPT, Config, bag_average, multi_hot_cross_entropy
from tools.corpus import write_shard

VOCAB = 250                             # the model pads it to 256
SMALL = Config(n_layer=2, n_embd=32, n_head=4, n_kv_head=2, n_hidden=48, vocab_size=VOCAB,
               seq_len=16)


@pytest.fixture(autouse=True)
def same_everywhere(monkeypatch):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    monkeypatch.setattr(signal, "signal", lambda *_: None)      # pytest keeps its signal handlers


def bags_of(rows, s):
    """Cut rows (B, (l + 1) * s) into inputs and targets, both (B, l, s), as training does."""
    bags = rows.view(len(rows), -1, s)
    return bags[:, :-1], bags[:, 1:]


# The input is the mean of the embeddings of a bag

def test_the_bag_average_is_the_mean_of_the_embeddings():
    table, bags = torch.randn(50, 8), torch.randint(0, 50, (2, 5, 4))
    one_by_one = torch.stack([sum(table[token] for token in bag) / 4 for bag in bags.view(10, 4)])
    torch.testing.assert_close(bag_average(table, bags), one_by_one.view(2, 5, 8))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_bag_of_one_is_the_plain_embedding_bit_for_bit(dtype):
    table, tokens = torch.randn(50, 8).to(dtype), torch.randint(0, 50, (2, 5))
    assert torch.equal(bag_average(table, tokens.unsqueeze(2)), F.embedding(tokens, table))


def test_the_average_of_bfloat16_embeddings_is_taken_in_float32():
    table = torch.tensor([[256.0], [1.0], [0.0]], dtype=torch.bfloat16)     # 256 + 1 rounds to 256
    average = bag_average(table, torch.tensor([[[0, 1, 2, 2, 2]]]))
    assert average.dtype == torch.bfloat16
    assert average.item() == torch.tensor(257 / 5).bfloat16().item() != 256 / 5


# The targets are all tokens of the next bag

@pytest.mark.parametrize("s", [1, 5])
def test_the_multi_hot_loss_is_the_mean_of_s_cross_entropies(s):
    """For s = 1 it is the ordinary loss. A token that occurs twice in a bag counts twice."""
    logits = torch.randn(3, 7, 40, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, 9, (3, 7, s))
    loss = multi_hot_cross_entropy(logits, targets)
    slow = sum(F.cross_entropy(logits.flatten(0, 1), targets[..., i].flatten())
               for i in range(s)) / s
    torch.testing.assert_close(loss, slow)
    torch.testing.assert_close(*(torch.autograd.grad(value, logits)[0] for value in (loss, slow)))


def test_the_loss_is_the_divergence_from_the_bag_plus_log_s_if_its_tokens_differ():
    """The lowest loss of such a bag is log s and not 0. If tokens repeat, the lowest loss is lower.

    Therefore a bag loss cannot be compared with a next-token loss.
    """
    logits, bag = torch.randn(40, dtype=torch.float64), torch.tensor([3, 1, 4, 5])
    bag_distribution = F.one_hot(bag, 40).double().mean(0)
    divergence = F.kl_div(logits.log_softmax(0), bag_distribution, reduction="sum")
    torch.testing.assert_close(multi_hot_cross_entropy(logits, bag), divergence + math.log(4))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_loss_is_taken_in_float32_under_autocast(dtype):
    logits, bag = torch.zeros(256), torch.tensor([7, 101, 102, 103, 104, 105])
    logits[:100] = -16
    with torch.autocast("cpu", dtype):
        loss = multi_hot_cross_entropy(logits.to(dtype), bag)
    expected = 16 / 6 + math.log(156 + 100 * math.exp(-16))     # in bfloat16, 16 / 6 is 2.672
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("s", [1, 2, 6])
def test_the_loss_of_an_untrained_model_is_log_v_for_every_s(s):
    loss = GPT(SMALL)(*bags_of(torch.randint(0, VOCAB, (8, 17 * s)), s))
    assert loss.item() == pytest.approx(math.log(256), abs=0.02)


# The bags of a row

def test_the_order_of_tokens_in_a_bag_changes_nothing():
    model, (inputs, targets) = GPT(SMALL), bags_of(torch.randint(0, VOCAB, (2, 17 * 4)), 4)
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(model(inputs[..., order], targets), model(inputs, targets))
    torch.testing.assert_close(model(inputs, targets[..., order]), model(inputs, targets))


def test_the_logits_at_position_j_depend_only_on_bags_0_to_j():
    model, bags = GPT(SMALL), torch.randint(0, VOCAB, (1, 16, 4))
    before = model(bags)
    for j in range(15):
        changed = bags.clone()
        changed[0, j + 1] = (changed[0, j + 1] + 1) % VOCAB
        after = model(changed)
        assert torch.equal(after[0, :j + 1], before[0, :j + 1])
        assert not torch.equal(after[0, j + 1], before[0, j + 1])


# A superposed step costs as much as a step of the baseline

@pytest.mark.parametrize("s", [1, 6])
def test_a_superposed_step_costs_the_flops_of_a_baseline_step(s):
    model, rows = GPT(SMALL), torch.randint(0, VOCAB, (3, 17 * s))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(*bags_of(rows, s)).backward()
    assert counter.get_total_flops() == model.flops_per_position() * 3 * 16


# Batches read each token once per epoch

class Counting(data.Stream):
    """A stream in which token i is i, so that a batch shows from where it was read."""
    def __init__(self, length): self.length = length
    def __len__(self): return self.length
    def rows(self, starts, n): return torch.tensor(starts).unsqueeze(1) + torch.arange(n)


def test_batches_follow_the_example_in_their_docstring():
    def batches(seed):
        return data.Batches(Counting(15), 4, switch=1, s=3, batch_size=1, seq_len=2, seed=seed)

    def shuffled(seed):                 # whether block 1 comes before block 0
        return batches(seed).rows(0, 0, 1)[0, 0] == 6

    example = batches(next(seed for seed in range(99) if shuffled(seed)))
    assert [example.rows(step, 0, 1).tolist() for step in range(4)] == [
        [[6, 7, 8, 9, 10, 11, 12, 13, 14]], [[0, 1, 2]], [[2, 3, 4]], [[4, 5, 6]]]


def test_in_an_epoch_no_token_is_twice_an_input_or_twice_a_target_of_one_phase():
    batches = data.Batches(Counting(10_007), 62, 14, 4, batch_size=7, seq_len=13, seed=3)
    assert 0.9 < batches.epochs < 1
    inputs = []
    for steps, s in ((range(14), 4), (range(14, 62), 1)):
        rows = torch.cat([batches.rows(step, 0, 7) for step in steps])
        assert rows.shape == (7 * len(steps), 14 * s) and rows.max() < 10_007
        assert torch.equal(rows, rows[:, :1] + torch.arange(14 * s))    # consecutive tokens
        targets = rows[:, s:].flatten()
        assert len(targets) == len(targets.unique())
        inputs.append(rows[:, :-s].flatten())
    inputs = torch.cat(inputs)
    assert len(inputs) == len(inputs.unique()) == 7 * 13 * (14 * 4 + 48)


def test_an_epoch_reads_every_row_once_before_the_next_epoch_begins():
    batches = data.Batches(Counting(10_007), 2000, 0, 6, batch_size=1, seq_len=13, seed=3)
    first = [batches.rows(step, 0, 1)[0, 0].item() for step in range(769)]
    assert sorted(first) == list(range(0, 769 * 13, 13))
    assert torch.equal(batches.rows(769, 0, 1), batches.rows(0, 0, 1))
    assert batches.epochs == 2000 / 769


def test_any_number_of_processes_and_micro_batches_reads_the_same_rows():
    batches = data.Batches(Counting(10_007), 18, 9, 2, 12, 10, seed=1)
    for step in (0, 8, 9, 17):
        whole = batches.rows(step, 0, 12)
        assert torch.equal(torch.cat([batches.rows(step, k, 3) for k in (0, 3, 6, 9)]), whole)
    other = data.Batches(Counting(10_007), 18, 9, 2, 12, 10, seed=2)
    assert not torch.equal(other.rows(17, 0, 12), whole)


# Runs on a toy language, in which a token is random or is determined by the token before it

RANDOM_TOKENS = 20                      # a random token is one of 20, and each has its own follower
BEST_LOSS = math.log(RANDOM_TOKENS) / 2         # nats per token: every second token is random
BEST_BAG_LOSS = math.log(2 * RANDOM_TOKENS)     # in a bag, each of the 40 tokens is equally likely


@pytest.fixture(scope="module")
def language(tmp_path_factory):
    """A folder with 100,000 training tokens of the toy language."""
    folder = tmp_path_factory.mktemp("language")
    tokens = np.random.default_rng(0).integers(0, RANDOM_TOKENS, 110_000).astype(np.uint16)
    tokens[1::2] = tokens[::2] * 7 + RANDOM_TOKENS
    write_shard(folder / "train.bin", tokens[:100_000])
    write_shard(folder / "val.bin", tokens[100_000:])
    (folder / "meta.json").write_text(json.dumps({"tokenizer": "none", "vocab_size": VOCAB}))
    return folder


def train(language, out, *flags):
    """Train for 120 steps, which takes about two seconds -> the log, one entry per step."""
    train_tst.main([
        "--data", str(language), "--out", str(out), "--model", "tiny", "--device", "cpu",
        "--n-layer", "2", "--n-embd", "32", "--n-head", "4", "--n-kv-head", "2",
        "--n-hidden", "48", "--seq-len", "16", "--batch-size", "16", "--lr", "0.02",
        "--steps", "120", "--warmup-steps", "4", "--decay-frac", "0.25", *flags])
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def train_by_hand(model, optimizer, batches, steps, lr):
    """Train with an ordinary loop, on next tokens and with PyTorch's own loss -> the losses."""
    losses = []
    for step in steps:
        for group in optimizer.param_groups:
            group["lr"] = lr[step]
        rows = batches.rows(step, 0, 16)
        logits = model(rows[:, :-1].unsqueeze(2))               # bags of one
        loss = F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


def adamw(model):
    """The optimizer with weight decay for the matrices, and without it for the gains of norms."""
    return torch.optim.AdamW([{"params": [p for p in model.parameters() if p.ndim == 1],
                               "weight_decay": 0.0},
                              {"params": [p for p in model.parameters() if p.ndim > 1]}],
                             betas=(0.9, 0.95), weight_decay=0.1)


@pytest.fixture(scope="module")
def tst(language, tmp_path_factory):
    """A TST run of 60 steps on bags of 2 and then 60 steps on single tokens: (folder, log)."""
    out = tmp_path_factory.mktemp("runs") / "tst"
    return out, train(language, out, "--s", "2", "--r", "0.5")


def test_both_phases_lower_the_loss_and_the_bag_loss_comes_close_to_the_best_loss(tst):
    log = tst[1]
    assert log[0]["loss"] == pytest.approx(math.log(256), abs=0.1)
    assert [(entry["phase"], entry["s"]) for entry in log] == (
        60 * [("superposition", 2)] + 60 * [("recovery", 1)])
    assert BEST_BAG_LOSS - 0.05 < log[59]["loss"] < BEST_BAG_LOSS + 0.1
    frequencies = math.log(2 * RANDOM_TOKENS)                   # the loss of the token frequencies
    assert BEST_LOSS - 0.05 < log[-1]["val_loss"] < frequencies - 1
    assert log[-1]["tokens"] == 16 * 16 * (60 * 2 + 60)


def test_a_superposed_step_predicts_every_token_of_the_next_bag(language, tst):
    torch.manual_seed(0)
    model = GPT(Config(**train_tst.load_checkpoint(tst[0])["config"]))
    rows = data.Batches(data.load(language)[0], 120, 60, 2, 16, 16, seed=0).rows(0, 0, 16)
    logits = model(rows[:, :32].view(16, 16, 2))
    losses = [F.cross_entropy(logits[:, j], rows[:, 2 * j + 2 + i]).item()
              for j in range(16) for i in range(2)]
    assert tst[1][0]["loss"] == pytest.approx(np.mean(losses), rel=1e-6)


def test_the_switch_changes_s_and_nothing_else(language, tst):
    """An ordinary loop that starts from ckpt_switch.pt has the same losses as the TST run."""
    folder, log = tst
    checkpoint = train_tst.load_checkpoint(folder / "ckpt_switch.pt")
    assert checkpoint["step"] == 60
    model = GPT(Config(**checkpoint["config"]))
    optimizer = adamw(model)
    state_dicts.set_state_dict(model, optimizer, options=train_tst.FULL_STATE,
                               model_state_dict=checkpoint["model"],
                               optim_state_dict=checkpoint["optimizer"])
    assert all(optimizer.state[p]["step"] == 60 for p in model.parameters())
    batches = data.Batches(data.load(language)[0], 120, 60, 2, 16, 16, seed=0)
    rates = [entry["lr"] for entry in log]
    by_hand = train_by_hand(model, optimizer, batches, range(60, 66), rates)
    assert by_hand == pytest.approx([entry["loss"] for entry in log[60:66]], rel=1e-4)


def test_the_learning_rate_does_not_depend_on_the_switch(tst):
    up, down = [0.25, 0.5, 0.75], [(30 - k) / 30 for k in range(30)]    # warmup and decay
    expected = [0.02 * factor for factor in (*up, *(87 * [1.0]), *down)]
    assert [entry["lr"] for entry in tst[1]] == pytest.approx(expected)


def test_s_1_is_the_baseline(language, tmp_path):
    """With s = 1 for every r, and with r = 0 for every s, the losses are an ordinary loop's."""
    log = train(language, tmp_path / "s1", "--s", "1", "--r", "0.7", "--steps", "40")
    same = train(language, tmp_path / "r0", "--s", "6", "--r", "0", "--steps", "40")
    assert {(entry["phase"], entry["s"]) for entry in log} == {("recovery", 1)}
    losses = [entry["loss"] for entry in log]
    assert losses == [entry["loss"] for entry in same]
    assert not (tmp_path / "s1" / "ckpt_switch.pt").exists()

    torch.manual_seed(0)
    model = GPT(Config(**{**vars(SMALL), "init_std": 0.05, "rope_theta": 10_000.0}))
    batches = data.Batches(data.load(language)[0], 40, 0, 1, 16, 16, seed=0)
    by_hand = train_by_hand(model, adamw(model), batches, range(6), [entry["lr"] for entry in log])
    assert by_hand == pytest.approx(losses[:6], rel=1e-4)
