"""The method's claims, one a test, for a reader. Run with: python -m pytest test_tst.py

What a user meets beside the method (runs, resuming, several processes, bad input) is in tests/.
"""
import json
import math
import signal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounter
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_state_dict
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import data
import model as models
import train_tst
from model import GPT, Config, bag_average, bag_weights, multi_hot_cross_entropy

VOCAB = 250                             # the model pads it to 256
SMALL = Config(n_layer=2, n_embd=32, n_head=4, n_kv_head=2, n_hidden=48, vocab_size=VOCAB,
               seq_len=16)


@pytest.fixture(autouse=True)
def same_everywhere():
    torch.set_num_threads(1)
    torch.manual_seed(0)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():    # a run takes them over
        signal.signal(number, handler)


# The input: the mean of a bag's embeddings

def test_the_bag_average_is_the_mean_of_the_embeddings():
    table, bags = torch.randn(50, 8), torch.randint(0, 50, (2, 5, 4))
    average = bag_average(table, bags)
    assert average.shape == (2, 5, 8)
    for b in range(2):
        for j in range(5):
            one_by_one = sum(table[token] for token in bags[b, j]) / 4
            torch.testing.assert_close(average[b, j], one_by_one)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_bag_of_one_is_the_plain_embedding_bit_for_bit(dtype):
    table, tokens = torch.randn(50, 8).to(dtype), torch.randint(0, 50, (2, 5))
    assert torch.equal(bag_average(table, tokens.unsqueeze(2)), F.embedding(tokens, table))


def test_the_average_is_taken_in_float32_where_the_table_is_bfloat16():
    table = torch.tensor([[256.0], [1.0], [0.0]], dtype=torch.bfloat16)     # 256 + 1 rounds to 256
    average = bag_average(table, torch.tensor([[[0, 1, 2, 2, 2]]]))
    assert average.dtype == torch.bfloat16
    assert average.item() == torch.tensor(257 / 5).bfloat16().item() != 256 / 5


# The target: every token of the next bag

def test_the_multi_hot_loss_is_the_mean_of_s_cross_entropies():
    logits = torch.randn(3, 7, 40, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, 40, (3, 7, 5))
    loss = multi_hot_cross_entropy(logits, targets)
    slow = sum(F.cross_entropy(logits.flatten(0, 1), targets[..., i].flatten())
               for i in range(5)) / 5
    torch.testing.assert_close(loss, slow)
    torch.testing.assert_close(*(torch.autograd.grad(value, logits)[0] for value in (loss, slow)))


def test_a_token_that_occurs_twice_counts_twice():
    log_p = torch.randn(40, dtype=torch.float64).log_softmax(0)
    loss = multi_hot_cross_entropy(log_p, torch.tensor([7, 9, 7]))
    torch.testing.assert_close(loss, -(2 * log_p[7] + log_p[9]) / 3)


def test_with_one_token_a_bag_the_loss_is_cross_entropy():
    logits, targets = torch.randn(6, 40, dtype=torch.float64), torch.randint(0, 40, (6,))
    torch.testing.assert_close(multi_hot_cross_entropy(logits, targets.unsqueeze(1)),
                               F.cross_entropy(logits, targets))


def test_the_loss_is_the_divergence_from_the_bag_plus_log_s():
    """So its floor is log s, not 0: why a superposed loss does not compare with an ordinary one."""
    logits, bag = torch.randn(40, dtype=torch.float64), torch.tensor([3, 1, 4, 5])
    bag_distribution = F.one_hot(bag, 40).double().mean(0)
    divergence = F.kl_div(logits.log_softmax(0), bag_distribution, reduction="sum")
    torch.testing.assert_close(multi_hot_cross_entropy(logits, bag), divergence + math.log(4))


@pytest.mark.parametrize("kind, ratios", [
    ("uniform", [1, 1, 1]), ("power", [1, 1 / 2, 1 / 3]), ("first", [1, 0, 0]),
    ("exp", [math.exp(-1), math.exp(-2), math.exp(-3)])])
def test_the_four_weightings(kind, ratios):
    logits, bag = torch.randn(40), torch.tensor([2, 8, 5])
    weights = bag_weights(kind, 3)
    torch.testing.assert_close(weights, torch.tensor(ratios) / sum(ratios))
    slow = sum(w * F.cross_entropy(logits, token) for w, token in zip(weights, bag))
    torch.testing.assert_close(multi_hot_cross_entropy(logits, bag, weights), slow)


# Training computes head and loss a chunk of positions at a time

@pytest.mark.parametrize("dtype, tolerance", [
    (torch.float64, 1e-10), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("weights", [None, bag_weights("power", 3)])
def test_the_chunked_loss_has_the_value_and_gradients_of_the_plain_one(dtype, tolerance, weights):
    low = dtype == torch.bfloat16       # then of the products alone, by autocast
    model = GPT(Config(1, 32, 2, 1, 48, vocab_size=VOCAB, seq_len=700))
    model.to(torch.float32 if low else dtype)
    inputs, targets = torch.randint(0, VOCAB, (2, 2, 700, 3))   # 1,400 positions: three chunks
    with torch.autocast("cpu", dtype, enabled=low):
        plain = multi_hot_cross_entropy(model(inputs), targets, weights)
        chunked = model(inputs, targets, weights)
        with torch.no_grad():
            evaluated = model(inputs, targets, weights)
    torch.testing.assert_close(chunked, plain, rtol=tolerance, atol=0)
    assert torch.equal(evaluated, chunked.detach())
    parameters = list(model.parameters())
    for fast, slow in zip(torch.autograd.grad(3 * chunked, parameters),
                          torch.autograd.grad(3 * plain, parameters)):
        torch.testing.assert_close(fast, slow, rtol=tolerance,
                                   atol=tolerance * slow.abs().max().item())


def test_the_loss_is_right_where_a_targets_probability_underflows():
    x, head = torch.ones(16, 32), torch.zeros(256, 32, requires_grad=True)
    with torch.no_grad():
        head[:100] = -50                                        # logits of -1600 and 0
    targets = torch.tensor([7, 101]).expand(16, 2)
    loss = models.ChunkedHeadLoss.apply(x, head, targets, torch.tensor([0.5, 0.5]), True,
                                        models.normalise)
    assert loss.item() == pytest.approx(800 + math.log(156), rel=1e-6)
    assert torch.autograd.grad(loss, head)[0].isfinite().all()


def test_the_weights_of_the_targets_stay_in_float32_under_autocast():
    x, head, bag = torch.ones(16, 32), torch.zeros(256, 32), [7, 101, 102, 103, 104, 105]
    head[:100] = -0.5                                           # logits of -16 and 0
    targets, weights = torch.tensor(bag).expand(16, 6), bag_weights("uniform", 6)
    expected = 16 / 6 + math.log(156 + 100 * math.exp(-16))     # in bfloat16, 16 / 6 is 2.672
    with torch.autocast("cpu", torch.bfloat16):
        chunked = models.ChunkedHeadLoss.apply(x, head, targets, weights, False, models.normalise)
        plain = multi_hot_cross_entropy(F.linear(x, head), targets, weights)
    assert chunked.item() == pytest.approx(expected, abs=1e-4)
    assert plain.item() == pytest.approx(expected, abs=1e-4)


def test_nothing_is_compiled_again_for_another_bag_size_or_number_of_rows():
    graphs, eager = CompileCounter(), GPT(SMALL)
    model = GPT(SMALL)
    model.load_state_dict(eager.state_dict())
    model.normalise = torch.compile(model.normalise, backend=graphs)
    for rows, s in ((40, 6), (3, 6), (40, 1), (33, 1), (7, 2)):     # 640 positions: two chunks
        batch = data.bags(torch.randint(0, VOCAB, (rows, 17 * s)), s, s)
        torch.testing.assert_close(model(*batch), eager(*batch))
    assert graphs.frame_count == 1


# Bags in a row

def test_a_target_is_exactly_the_next_bag():
    row = torch.randint(0, VOCAB, (1, 6 * 4))
    inputs, targets = data.bags(row, 4, 4)
    assert inputs.shape == targets.shape == (1, 5, 4)
    for j in range(5):
        assert torch.equal(inputs[0, j], row[0, 4 * j:4 * j + 4])
        assert torch.equal(targets[0, j], row[0, 4 * j + 4:4 * j + 8])


def test_bag_j_is_predicted_from_the_bags_up_to_it_alone():
    model, bags = GPT(SMALL), torch.randint(0, VOCAB, (1, 16, 4))
    before = model(bags)
    for j in range(15):
        changed = bags.clone()
        changed[0, j + 1] = (changed[0, j + 1] + 1) % VOCAB
        after = model(changed)
        assert torch.equal(after[0, :j + 1], before[0, :j + 1])
        assert not torch.equal(after[0, j + 1], before[0, j + 1])


@pytest.mark.parametrize("s_in, s_out", [(4, 1), (1, 4), (2, 3), (3, 2), (1, 1)])
def test_input_only_and_output_only_bags(s_in, s_out):
    l = 5
    rows = torch.arange(2 * (l * s_in + s_out)).view(2, -1)
    inputs, targets = data.bags(rows, s_in, s_out)
    assert inputs.shape == (2, l, s_in) and targets.shape == (2, l, s_out)
    for j in range(l):
        after = (j + 1) * s_in
        assert torch.equal(inputs[:, j], rows[:, after - s_in:after])
        assert torch.equal(targets[:, j], rows[:, after:after + s_out])


# What superposition costs: nothing

@pytest.mark.parametrize("s", [1, 6])
def test_a_superposed_step_costs_the_flops_of_a_baseline_step(s):
    model, rows = GPT(SMALL), torch.randint(0, VOCAB, (3, 17 * s))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(*data.bags(rows, s, s)).backward()
    assert counter.get_total_flops() == model.flops_per_position() * 3 * 16


def test_superposition_adds_no_parameter_and_no_buffer():
    def names():
        return [name for name, _ in (*model.named_parameters(), *model.named_buffers())]

    model = GPT(SMALL)
    before = names()
    model(*data.bags(torch.randint(0, VOCAB, (1, 17 * 6)), 6, 6)).backward()
    assert names() == before and not any("bag" in name for name in before)


# Batches read each token once

class Counting:
    """A stream whose token i is i, so that a batch shows where it was read."""
    def __init__(self, length): self.length = length
    def __len__(self): return self.length
    def read(self, start, n): return np.arange(start, start + n)


def test_the_worked_example_of_the_docstring():
    def batches(seed):
        return data.Batches(Counting(15), [(1, 3, 3), (3, 1, 1)], 1, 2, seed)

    def shuffled(seed):                 # whether the second block came first
        return batches(seed).rows(0, 0, 1)[0, 0] == 6

    example = batches(next(seed for seed in range(99) if shuffled(seed)))
    assert [example.rows(step, 0, 1).tolist() for step in range(4)] == [
        [[6, 7, 8, 9, 10, 11, 12, 13, 14]], [[0, 1, 2]], [[2, 3, 4]], [[4, 5, 6]]]


@pytest.mark.parametrize("phases", [
    [(14, 4, 4), (48, 1, 1)], [(9, 4, 2), (0, 5, 5), (7, 6, 6), (25, 1, 3)]])
def test_in_an_epoch_no_token_is_an_input_twice(phases):
    batches = data.Batches(Counting(10_007), phases, batch_size=7, seq_len=13, seed=3)
    assert 0.8 < batches.epochs < 1
    sizes = [s_in for steps, s_in, _ in phases for _ in range(steps)]
    rows = [batches.rows(step, 0, 7) for step in range(len(sizes))]
    inputs = torch.cat([row[:, :13 * s_in].flatten() for row, s_in in zip(rows, sizes)])
    assert len(inputs) == len(inputs.unique()) == 7 * 13 * sum(sizes)
    assert max(row.max() for row in rows) < 10_007


def test_with_bags_of_one_size_no_token_is_a_target_twice_in_a_phase():
    batches = data.Batches(Counting(10_007), [(14, 4, 4), (48, 1, 1)], 7, 13, seed=3)
    for steps, s in ((range(14), 4), (range(14, 62), 1)):
        targets = torch.cat([batches.rows(step, 0, 7)[:, s:].flatten() for step in steps])
        assert len(targets) == len(targets.unique())


def test_an_epoch_reads_every_row_and_the_next_begins_where_they_are_used_up():
    batches = data.Batches(Counting(10_007), [(2000, 1, 1)], batch_size=1, seq_len=13, seed=3)
    first = [batches.rows(step, 0, 1)[0, 0].item() for step in range(769)]
    assert sorted(first) == list(range(0, 769 * 13, 13))
    assert torch.equal(batches.rows(769, 0, 1), batches.rows(0, 0, 1))
    assert batches.epochs == 2000 / 769


def test_both_phases_read_from_all_parts_of_the_stream():
    batches = data.Batches(Counting(1_000_003), [(1400, 4, 4), (4800, 1, 1)], 7, 13, seed=3)
    assert 0.9 < batches.epochs < 1
    for steps in (range(1400), range(1400, 6200)):
        starts = torch.cat([batches.rows(step, 0, 7)[:, 0] for step in steps])
        tenths = np.bincount(starts // 100_001) / len(starts)
        assert tenths == pytest.approx(0.1, abs=0.01)


def test_any_split_into_processes_and_micro_batches_reads_the_same_rows():
    batches = data.Batches(Counting(10_007), [(9, 2, 2), (9, 1, 1)], 12, 10, seed=1)
    for step in (0, 8, 9, 17):
        parts = [batches.rows(step, first, 3) for first in (9, 3, 0, 6)]
        assert torch.equal(torch.cat(parts).sort(0)[0], batches.rows(step, 0, 12).sort(0)[0])
        assert torch.equal(parts[1], batches.rows(step, 0, 12)[3:6])


def test_seeds_differ_in_data_order():
    one, again, other = (data.Batches(Counting(10_007), [(9, 2, 2), (9, 1, 1)], 4, 10, seed)
                         for seed in (0, 0, 1))
    assert torch.equal(one.rows(0, 0, 4), again.rows(0, 0, 4))
    assert not torch.equal(one.rows(0, 0, 4), other.rows(0, 0, 4))


# Runs, on a toy language: every other token is one of 20 at random, the next follows from it

RANDOM_TOKENS = 20
BEST_LOSS = math.log(RANDOM_TOKENS) / 2                         # nats per token that one can reach
BEST_BAG_LOSS = math.log(2 * RANDOM_TOKENS)     # of bags of 2: one of 20, or one of its followers


@pytest.fixture(scope="module")
def language(tmp_path_factory):
    """A folder with 100,000 training tokens of the toy language."""
    folder = tmp_path_factory.mktemp("language")
    tokens = np.random.default_rng(0).integers(0, RANDOM_TOKENS, 110_000)
    tokens[1::2] = tokens[::2] * 7 + RANDOM_TOKENS
    for name, part in (("train.bin", tokens[:100_000]), ("val.bin", tokens[100_000:])):
        header = np.array([20240520, 1, len(part)] + 253 * [0], "<i4")
        (folder / name).write_bytes(header.tobytes() + part.astype("<u2").tobytes())
    (folder / "meta.json").write_text(json.dumps({"tokenizer": "none", "vocab_size": VOCAB}))
    return folder


def train(language, out, *flags):
    """A run of 120 steps in about two seconds: its log, an entry a step."""
    train_tst.main([
        "--data", str(language), "--out", str(out), "--model", "tiny", "--device", "cpu",
        "--n-layer", "2", "--n-embd", "32", "--n-head", "4", "--n-kv-head", "2",
        "--n-hidden", "48", "--seq-len", "16", "--batch-size", "16", "--lr", "0.02",
        "--steps", "120", "--warmup-steps", "4", "--decay-frac", "0.25", *flags])
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def train_by_hand(model, optimizer, batches, steps, lr):
    """The ordinary training loop: next tokens, cross-entropy, nothing of ours. -> losses"""
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


@pytest.fixture(scope="module")
def tst(language, tmp_path_factory):
    """A TST run of 60 steps on bags of 2, then 60 on tokens: (folder, log)."""
    folder = tmp_path_factory.mktemp("runs") / "tst"
    return folder, train(language, folder, "--s", "2", "--r", "0.5")


def test_tst_learns_what_there_is_to_learn_in_both_phases(tst):
    _, log = tst
    assert log[0]["loss"] == pytest.approx(math.log(256), abs=0.1)
    assert [(entry["phase"], entry["s"]) for entry in log] == (
        60 * [("superposition", 2)] + 60 * [("recovery", 1)])
    assert BEST_BAG_LOSS - 0.05 < log[59]["loss"] < BEST_BAG_LOSS + 0.1
    assert BEST_LOSS - 0.05 < log[-1]["val_loss"] < math.log(2 * RANDOM_TOKENS) - 1   # unigrams
    assert log[-1]["tokens"] == 16 * 16 * (60 * 2 + 60)


def test_the_switch_changes_s_and_nothing_else(language, tst):
    """From ckpt_switch.pt on, an ordinary loop with the same optimizer state gives the run."""
    folder, log = tst
    checkpoint = models.load_checkpoint(folder / "ckpt_switch.pt")
    assert checkpoint["step"] == 60
    model = GPT(Config(**checkpoint["config"]))
    optimizer = train_tst.make_optimizer(model, lr=0.0)
    set_state_dict(model, optimizer, model_state_dict=checkpoint["model"],
                   optim_state_dict=checkpoint["optimizer"],
                   options=StateDictOptions(full_state_dict=True))
    assert all(optimizer.state[p]["step"] == 60 for p in model.parameters())
    tokens, *_ = data.load(language)
    batches = data.Batches(tokens, [(60, 2, 2), (60, 1, 1)], 16, 16, seed=0)
    rates = [entry["lr"] for entry in log]
    by_hand = train_by_hand(model, optimizer, batches, range(60, 66), rates)
    assert by_hand == pytest.approx([entry["loss"] for entry in log[60:66]], rel=1e-4)


def test_the_learning_rate_does_not_notice_the_switch(tst):
    up, down = [0.25, 0.5, 0.75], [(30 - k) / 30 for k in range(30)]    # of 4 and 30 steps
    expected = [0.02 * part for part in (*up, *(87 * [1.0]), *down)]
    assert [entry["lr"] for entry in tst[1]] == pytest.approx(expected)


def test_s_1_is_the_baseline_by_the_same_code(language, tmp_path):
    """It is the ordinary loop; r says nothing there; and r = 0 is the same run."""
    log = train(language, tmp_path / "s1", "--s", "1", "--r", "0.7", "--steps", "40")
    same = train(language, tmp_path / "r0", "--s", "6", "--r", "0", "--steps", "40")
    assert {(entry["phase"], entry["s"]) for entry in log} == {("recovery", 1)}
    losses = [entry["loss"] for entry in log]
    assert losses == [entry["loss"] for entry in same]
    assert not (tmp_path / "s1" / "ckpt_switch.pt").exists()

    torch.manual_seed(0)
    model = GPT(Config(**{**vars(SMALL), "init_std": 0.05, "rope_theta": 10_000.0}))
    tokens, *_ = data.load(language)
    batches = data.Batches(tokens, [(40, 1, 1)], 16, 16, seed=0)
    optimizer = train_tst.make_optimizer(model, lr=0.0)
    by_hand = train_by_hand(model, optimizer, batches, range(6), [entry["lr"] for entry in log])
    assert by_hand == pytest.approx(losses[:6], rel=1e-4)
