"""The paper's claims and the scripts' promises, one a test. Run with: python -m pytest"""
import argparse
import base64
import http.server
import importlib.util
import io
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
import types
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiktoken
import torch
import torch.nn.functional as F
import urllib3
from torch.utils.flop_counter import FlopCounterMode

import data
import model as models
import train_tst
from model import GPT, Config, bag_average, bag_weights, multi_hot_cross_entropy

HERE = Path(__file__).parent
SMALL = Config(n_layer=2, n_embd=32, n_head=4, n_kv_head=2, n_hidden=48, vocab_size=250, seq_len=16)
VOCAB = 250
os.environ.pop("LOCAL_RANK", None)


@pytest.fixture(autouse=True)
def few_threads():
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A folder of shards over a byte tokenizer: 60,000 training tokens in two shards, easily learnt."""
    folder = tmp_path_factory.mktemp("corpus")
    tokens = np.random.default_rng(0).integers(0, 20, 70_000)
    tokens[1::2] = tokens[::2] * 7 + 20                                 # every other token follows from the one before
    for name, part in {"a_train_0": tokens[:25_000], "a_train_1": tokens[25_000:60_000], "a_val_0": tokens[60_000:]}.items():
        data.write_shard(folder / f"{name}.bin", part)
    encoding = tiktoken.Encoding("bytes", pat_str=".", special_tokens={data.END_OF_TEXT: VOCAB - 1},
                                 mergeable_ranks={bytes([i]): i for i in range(VOCAB - 1)})
    data.save_encoding(encoding, folder)
    (folder / "meta.json").write_text(json.dumps({"tokenizer": "bytes", "vocab_size": VOCAB, "hash": "1"}))
    return folder


def flags(corpus, out, *more):
    """A run of 12 steps with the switch after 6, in about a second; later flags win."""
    return ["--data", str(corpus), "--out", str(out), "--model", "tiny", "--s", "3", "--r", "0.5", "--steps", "12",
            "--batch-size", "8", "--seq-len", "16", "--n-embd", "32", "--n-head", "4", "--n-kv-head", "2", "--n-hidden", "48",
            "--init-std", "0.02", "--device", "cpu", "--warmup-steps", "2", "--decay-frac", "0.5", "--eval-every", "6", *more]


def lines(out):
    return [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]


def losses(out):
    return [line["loss"] for line in lines(out)]


def script(*words, processes=None, **environment):
    """Run one of the scripts as a user would: (exit status, stdout, stderr)."""
    start = [sys.executable] if processes is None else [
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", "--"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run([*start, *map(str, words)], cwd=HERE, env=environment, capture_output=True, text=True, timeout=240)
    return done.returncode, done.stdout, done.stderr


# The method

def test_the_bag_average_is_the_mean_of_the_embeddings():
    table, bags = torch.randn(50, 8), torch.randint(0, 50, (2, 5, 4))
    for b in range(2):
        for j in range(5):
            slow = sum(table[token] for token in bags[b, j]) / 4
            torch.testing.assert_close(bag_average(table, bags)[b, j], slow)


def test_a_bag_of_one_is_the_plain_embedding_bit_for_bit():
    bags = torch.randint(0, 50, (2, 5, 1))
    for dtype in (torch.float32, torch.bfloat16):
        table = torch.randn(50, 8).to(dtype)
        assert torch.equal(bag_average(table, bags), table[bags[..., 0]])


def test_the_bag_average_is_taken_in_float32():
    table = torch.tensor([[256.0], [1.0], [0.0]], dtype=torch.bfloat16)         # whose sum bfloat16 rounds to 256
    average = bag_average(table, torch.tensor([[[0, 1, 2, 2, 2]]]))
    assert average.dtype == torch.bfloat16 and average.item() == torch.tensor(257 / 5).bfloat16().item() != 256 / 5


def test_multi_hot_cross_entropy_is_the_mean_of_s_cross_entropies_in_value_and_gradient():
    logits = torch.randn(3, 7, 40, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, 40, (3, 7, 5))
    fast = multi_hot_cross_entropy(logits, targets)
    slow = sum(F.cross_entropy(logits.flatten(0, 1), targets[..., i].flatten()) for i in range(5)) / 5
    torch.testing.assert_close(fast, slow)
    gradients = [torch.autograd.grad(loss, logits)[0] for loss in (fast, slow)]
    torch.testing.assert_close(*gradients)


def test_multi_hot_cross_entropy_is_the_divergence_from_the_bag_plus_the_bags_entropy():
    logits = torch.randn(2, 40, dtype=torch.float64)
    distinct, repeated = torch.tensor([3, 1, 4, 5]), torch.tensor([3, 1, 3, 3])
    for row, bag, entropy in ((0, distinct, math.log(4)), (1, repeated, -0.75 * math.log(0.75) - 0.25 * math.log(0.25))):
        target = torch.bincount(bag, minlength=40) / 4
        divergence = (torch.special.xlogy(target, target) - target * logits[row].log_softmax(0)).sum()
        torch.testing.assert_close(multi_hot_cross_entropy(logits[row], bag), divergence + entropy)


def test_a_token_that_occurs_twice_counts_twice():
    logits = torch.randn(40, dtype=torch.float64)
    loss = -(2 * logits.log_softmax(0)[7] + logits.log_softmax(0)[9]) / 3
    torch.testing.assert_close(multi_hot_cross_entropy(logits, torch.tensor([7, 9, 7])), loss)


def test_with_one_token_a_bag_the_loss_is_cross_entropy():
    logits, targets = torch.randn(6, 40, dtype=torch.float64), torch.randint(0, 40, (6, 1))
    torch.testing.assert_close(multi_hot_cross_entropy(logits, targets), F.cross_entropy(logits, targets[:, 0]))


def test_the_four_weightings():
    e = math.exp(-1)
    expected = {"uniform": [1 / 3] * 3, "power": [6 / 11, 3 / 11, 2 / 11], "first": [1, 0, 0],
                "exp": [1 / (1 + e + e * e), e / (1 + e + e * e), e * e / (1 + e + e * e)]}
    logits, bag = torch.randn(40), torch.tensor([2, 8, 5])
    for kind, weights in expected.items():
        torch.testing.assert_close(bag_weights(kind, 3), torch.tensor(weights, dtype=torch.float32))
        slow = sum(w * F.cross_entropy(logits, token) for w, token in zip(weights, bag))
        torch.testing.assert_close(multi_hot_cross_entropy(logits, bag, bag_weights(kind, 3)), slow)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_the_chunked_loss_has_the_value_and_gradients_of_the_plain_one(dtype, tolerance):
    model = GPT(Config(1, 32, 2, 1, 48, vocab_size=VOCAB, seq_len=700))        # 1,400 positions are three chunks
    inputs, targets = torch.randint(0, VOCAB, (2, 2, 700, 3))
    weights = bag_weights("power", 3)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        plain = multi_hot_cross_entropy(model(inputs), targets, weights)
        chunked = model(inputs, targets, weights)
    torch.testing.assert_close(chunked, plain, rtol=tolerance, atol=0)
    with torch.no_grad(), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        torch.testing.assert_close(model(inputs, targets, weights), chunked.detach())
    for fast, slow in zip(*(torch.autograd.grad(3 * loss, list(model.parameters())) for loss in (chunked, plain))):
        torch.testing.assert_close(fast, slow, rtol=tolerance, atol=tolerance * slow.abs().max().item())


def test_the_chunked_loss_is_right_where_the_targets_probability_underflows():
    model = GPT(SMALL)
    with torch.no_grad():
        model.head.weight[:] = 0
        model.head.weight[:100] = -50                                           # logits of -1600 and 0
    x, targets = torch.ones(1, 16, 32), torch.tensor([7, 101]).expand(1, 16, 2)
    loss = model.loss(x, targets)
    assert loss.item() == pytest.approx(800 + math.log(156), rel=1e-6)
    assert all(torch.isfinite(g).all() for g in torch.autograd.grad(loss, [model.head.weight]))


def test_the_weights_of_the_targets_stay_in_float32_under_autocast():
    model = GPT(SMALL)
    with torch.no_grad():
        model.head.weight[:] = 0
        model.head.weight[:100] = -0.5                                          # logits of -16 and 0
    x, targets = torch.ones(1, 16, 32), torch.tensor([7, 101, 102, 103, 104, 105]).expand(1, 16, 6)
    expected = 16 / 6 + math.log(156 + 100 * math.exp(-16))
    with torch.autocast("cpu", torch.bfloat16):                                 # where 16 / 6 is 2.672
        assert model.loss(x, targets).item() == pytest.approx(expected, abs=1e-4)
        weights = bag_weights("uniform", 6)
        assert multi_hot_cross_entropy(model.head(x), targets, weights).item() == pytest.approx(expected, abs=1e-4)


def test_bag_j_is_predicted_from_the_bags_before_it_and_its_target_is_the_next_bag():
    model = GPT(SMALL)
    rows = torch.randint(0, VOCAB, (1, 6 * 4))
    inputs, targets = data.bags(rows, 4, 4)
    assert inputs.shape == targets.shape == (1, 5, 4)
    for j in range(5):
        assert torch.equal(inputs[0, j], rows[0, 4 * j:4 * j + 4])
        assert torch.equal(targets[0, j], rows[0, 4 * j + 4:4 * j + 8])
    before = model(inputs)
    for j in range(4):
        changed = inputs.clone()
        changed[0, j + 1] = (changed[0, j + 1] + 1) % VOCAB
        after = model(changed)
        torch.testing.assert_close(after[0, :j + 1], before[0, :j + 1], rtol=0, atol=0)
        assert (after[0, j + 1] != before[0, j + 1]).any()


@pytest.mark.parametrize("s_in, s_out", [(4, 1), (1, 4), (2, 3), (3, 2), (1, 1)])
def test_input_only_and_output_only_bags(s_in, s_out):
    l = 5
    rows = torch.arange(2 * (l * s_in + s_out)).view(2, -1)
    inputs, targets = data.bags(rows, s_in, s_out)
    assert inputs.shape == (2, l, s_in) and targets.shape == (2, l, s_out)
    for b in range(2):
        for j in range(l):
            assert inputs[b, j].tolist() == [rows[b, j * s_in + i] for i in range(s_in)]
            assert targets[b, j].tolist() == [rows[b, (j + 1) * s_in + i] for i in range(s_out)]


def test_a_superposed_step_costs_the_flops_of_a_baseline_step():
    counted = {}
    for s in (1, 6):
        model, rows = GPT(SMALL), torch.randint(0, VOCAB, (3, 17 * s))
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model(*data.bags(rows, s, s)).backward()
        counted[s] = counter.get_total_flops()
    assert counted[6] == counted[1] == model.flops_per_token() * 3 * 16


def test_superposition_adds_no_parameter_and_no_buffer():
    model = GPT(SMALL)
    before = {name: value.shape for name, value in model.state_dict().items()}
    model(*data.bags(torch.randint(0, VOCAB, (1, 17 * 6)), 6, 6)).backward()
    assert {name: value.shape for name, value in model.state_dict().items()} == before


# The model

def test_attention_is_causal_grouped_and_rotary():
    attention = models.Attention(SMALL)
    x = torch.randn(2, 16, 32)
    cos, sin = models.rope_table(16, 8, 10_000.0)
    q, k, v = attention.qkv(x).view(2, 16, 8, 8).split((4, 2, 2), dim=2)       # (B, l, heads, head_dim)

    def rotate(vector, position):
        out = torch.empty(8)
        for i in range(4):
            angle = position * 10_000.0 ** (-2 * i / 8)
            a, b = vector[i], vector[i + 4]
            out[i] = a * math.cos(angle) - b * math.sin(angle)
            out[i + 4] = b * math.cos(angle) + a * math.sin(angle)
        return out

    slow = torch.empty(2, 16, 4, 8)
    for b in range(2):
        for t in range(16):
            for head in range(4):
                query = rotate(q[b, t, head], t)
                scores = torch.stack([query @ rotate(k[b, u, head // 2], u) for u in range(t + 1)]) / math.sqrt(8)
                slow[b, t, head] = scores.softmax(0) @ v[b, :t + 1, head // 2]
    torch.testing.assert_close(attention(x, cos, sin), attention.out(slow.flatten(2)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("preset, millions", [("270m", 266.06), ("600m", 568.96), ("3b", 3018.5)])
def test_presets_have_the_size_that_the_table_says(preset, millions):
    with torch.device("meta"):
        model = GPT(models.PRESETS[preset])
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.05 if preset == "3b" else 0.005)
    assert train_tst.RECIPES[preset]["batch_size"] % 8 == 0


def test_the_vocabulary_is_padded_to_a_multiple_of_64():
    for vocab_size, rows in ((1, 64), (64, 64), (130, 192)):
        model = GPT(Config(1, 8, 1, 1, 8, vocab_size=vocab_size))
        assert model.embedding.weight.shape == model.head.weight.shape == (rows, 8)


@pytest.mark.parametrize("init_std", [0.02, 0.05])
def test_initial_weights(init_std):
    model = GPT(Config(8, 64, 4, 2, 192, vocab_size=1000, init_std=init_std))
    for name, p in model.named_parameters():
        if p.ndim == 2:
            std = init_std / 4 if name.endswith(("out.weight", "down.weight")) else init_std if "blocks" in name else 0.02
            assert p.std().item() == pytest.approx(std, rel=0.1), name
        else:
            assert torch.equal(p, torch.ones_like(p)), name


def test_sampling_never_gives_a_padded_row_and_greedy_is_deterministic():
    model = GPT(SMALL)
    with torch.no_grad():
        model.head.weight[VOCAB:] = 100 * model.head.weight[:6].sign()        # the padding would win if it could
    sampled = list(model.generate([1], 200, temperature=5.0, top_k=1000, generator=torch.Generator().manual_seed(0)))
    assert max(sampled) < VOCAB and len(set(sampled)) > 20
    assert list(model.generate([1, 2], 20, temperature=0)) == list(model.generate([1, 2], 20, temperature=0))


# The data


class Counting:
    """A stream whose token i is i, so that a batch shows where it was read."""
    def __init__(self, length=10_007): self.length = length
    def __len__(self): return self.length
    def read(self, start, n): return np.arange(start, start + n)


def test_the_worked_example_of_the_docstring():
    example = [data.Batches(Counting(15), [(1, 3, 3), (3, 1, 1)], 1, 2, seed) for seed in range(9)]
    batches = next(batches for batches in example if batches.phases[0][1].tolist() == [1])     # block 1 came first
    assert [batches.rows(step, 0, 1).tolist() for step in range(4)] == [
        [[6, 7, 8, 9, 10, 11, 12, 13, 14]], [[0, 1, 2]], [[2, 3, 4]], [[4, 5, 6]]]


@pytest.mark.parametrize("phases", [[(14, 4, 4), (48, 1, 1)], [(9, 4, 2), (0, 5, 5), (7, 6, 6), (25, 1, 3)]])
def test_in_an_epoch_no_token_is_an_input_twice(phases):
    batches = data.Batches(Counting(), phases, batch_size=7, seq_len=13, seed=3)
    assert 0.8 < batches.epochs < 1
    sizes = [s_in for steps, s_in, _ in phases for _ in range(steps)]
    seen = np.concatenate([batches.rows(step, 0, 7)[:, :13 * s_in].flatten() for step, s_in in enumerate(sizes)])
    assert len(seen) == len(set(seen.tolist())) == 7 * 13 * sum(sizes)
    assert all(batches.epoch(step) == 0 for step in range(len(sizes)))
    assert all(batches.rows(step, 0, 7).max() < 10_007 for step in range(len(sizes)))


def test_with_bags_of_one_size_no_token_is_a_target_twice_in_a_phase():
    batches = data.Batches(Counting(), [(14, 4, 4), (48, 1, 1)], batch_size=7, seq_len=13, seed=3)
    for steps, s in ((range(14), 4), (range(14, 62), 1)):
        targets = np.concatenate([batches.rows(step, 0, 7)[:, s:].flatten() for step in steps])
        assert len(targets) == len(set(targets.tolist()))


def test_an_epoch_reads_every_block_and_the_next_begins_when_they_are_used_up():
    batches = data.Batches(Counting(), [(2000, 1, 1)], batch_size=1, seq_len=13, seed=3)
    assert [batches.epoch(step) for step in (768, 769, 1537, 1538)] == [0, 1, 1, 2]     # there are 769 rows
    assert len({int(batches.rows(step, 0, 1)[0, 0]) for step in range(769)}) == 769
    assert torch.equal(batches.rows(769, 0, 1), batches.rows(0, 0, 1))


def test_all_phases_read_from_all_parts_of_the_stream():
    batches = data.Batches(Counting(1_000_003), [(1400, 4, 4), (4800, 1, 1)], batch_size=7, seq_len=13, seed=3)
    assert 0.9 < batches.epochs < 1
    for s, steps in ((4, range(1400)), (1, range(1400, 6200))):         # in each tenth of the stream a tenth of the phase's
        starts = np.concatenate([batches.rows(step, 0, 7)[:, 0] for step in steps])
        assert np.bincount(starts // 100_001) / len(starts) == pytest.approx(0.1, abs=0.01)


def test_any_split_into_processes_and_micro_batches_reads_the_same_rows():
    batches = data.Batches(Counting(), [(9, 2, 2), (9, 1, 1)], batch_size=12, seq_len=10, seed=1)
    for step in (0, 8, 9, 17):
        parts = torch.cat([batches.rows(step, first, 3) for first in (0, 3, 6, 9)])
        assert torch.equal(parts, batches.rows(step, 0, 12))


def test_seeds_differ_in_data_order():
    first = [data.Batches(Counting(), [(9, 2, 2), (9, 1, 1)], 4, 10, seed).rows(0, 0, 4) for seed in (0, 0, 1)]
    assert torch.equal(first[0], first[1]) and not torch.equal(first[0], first[2])


def test_validation_is_the_next_token_loss_in_nats_per_token_and_bits_per_byte(corpus):
    args, _ = train_tst.parse(flags(corpus, "unused", "--n-layer", "1"))
    _, val, _, encoding = data.load(corpus)
    model = GPT(SMALL)
    nats, bits = train_tst.validation(val, args, encoding, torch.device("cpu"))(model, torch.autocast("cpu", enabled=False))
    starts = [i * (9_999 - 16) // 623 for i in range(624)]                      # 624 rows of 16 in 10,000 tokens
    rows = torch.stack([torch.from_numpy(val.read(start, 17)) for start in starts])
    assert starts[0] == 0 and starts[-1] + 17 == 10_000 and len(rows[:, 1:].unique()) == len(np.unique(val.read(1, 9_999)))
    logits = model(rows[:, :-1].unsqueeze(2)).flatten(0, 1)
    assert nats == pytest.approx(F.cross_entropy(logits, rows[:, 1:].flatten()).item(), rel=1e-5)
    bytes_ = (rows[:, 1:] != VOCAB - 1).sum().item()                            # one a token, none for end-of-text
    assert bits == pytest.approx(nats * 9_984 / bytes_ / math.log(2), rel=1e-5)


def test_the_vocabulary_is_deterministic_and_compresses():
    texts = [path.read_text(encoding="utf-8") for path in sorted(HERE.glob("*.py"))]
    ranks = data.train_bpe(texts, 1000)
    assert ranks == data.train_bpe(texts, 1000) and sorted(ranks.values()) == list(range(1000))
    encoding = tiktoken.Encoding("t", pat_str=data.PATTERN, mergeable_ranks=ranks, special_tokens={})
    ids = encoding.encode_ordinary(texts[0])
    assert encoding.decode(ids) == texts[0] and len(texts[0].encode()) / len(ids) > 2.4
    assert len(data.train_bpe(["abab"], 1000)) == 256 + 2                      # ab, abab, and then no pair is left


def test_the_most_frequent_pair_is_merged_first():
    ranks = data.train_bpe(["aaab aab ab xyxyxy"], 259)
    counts = {b"xy": 3, b"aa": 3, b"ab": 3, b"yx": 2}                           # "aa" overlaps: aaa holds it twice
    assert [token for token, rank in ranks.items() if rank >= 256][0] == min(counts, key=lambda t: (-counts[t], t))


def small_corpus(folder, monkeypatch, files):
    """Build the built-in corpus from `files` {name: text} instead of this machine's, in seconds."""
    source = folder.parent / "source"
    source.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (source / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    monkeypatch.setattr(data, "VOCAB_SIZE", 300)
    monkeypatch.setattr(data, "python_files", lambda: sorted((path.name, path) for path in source.iterdir()))
    data.build_python_corpus(folder)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_built_in_corpus(tmp_path, monkeypatch):
    files = {f"{i}.py": f"def function_{i}(x):\n    return x + {i}\n" for i in range(300)}
    files.update({"copy.py": files["7.py"], "latin.py": b"caf\xe9 = 1\n"})
    built = small_corpus(tmp_path / "python", monkeypatch, files)
    assert set(built) == {f"python_{split}_000000.bin" for split in data.SPLITS} | {"meta.json", "encoding.json"}
    train, val, meta, encoding = data.load(tmp_path / "python")
    test = data.Stream([tmp_path / "python" / "python_test_000000.bin"], 300)
    documents = [encoding.decode(stream.read(0, len(stream)).tolist()).split(data.END_OF_TEXT)[1:] for stream in (train, val, test)]
    for split, found in zip(data.SPLITS, documents):
        assert set(found) == {text for name, text in files.items() if data.split_of(name) == split
                              and name not in ("copy.py", "latin.py")}
    assert sum(map(len, documents)) == 300                                      # the copy and the Latin-1 file are gone
    assert encoding.n_vocab == meta["vocab_size"] == 300

    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "python").iterdir()}
    assert small_corpus(tmp_path / "python", monkeypatch, {}) == built          # unchanged sources: left alone
    assert stamps == {path: path.stat().st_mtime_ns for path in (tmp_path / "python").iterdir()}
    changed = small_corpus(tmp_path / "python", monkeypatch, {"0.py": "changed = True\n"})
    assert changed["meta.json"] != built["meta.json"]
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("python")] == ["python"]   # nothing left over


def test_about_three_percent_of_the_files_go_to_validation_and_to_test():
    splits = [data.split_of(f"package/file_{i}.py") for i in range(20_000)]
    assert 0.027 < splits.count("val") / 20_000 < 0.033 and 0.027 < splits.count("test") / 20_000 < 0.033


def test_two_builders_at_once_do_not_corrupt_the_corpus(tmp_path):
    (tmp_path / "source").mkdir()
    for i in range(400):
        (tmp_path / "source" / f"{i}.py").write_text(f"value_{i} = {list(range(i))}\n")
    code = ("import sys, data; from pathlib import Path; data.VOCAB_SIZE = 300; "
            f"data.python_files = lambda: sorted((p.name, p) for p in Path({str(tmp_path / 'source')!r}).iterdir()); "
            f"f = Path({str(tmp_path / 'python')!r}); data.build_python_corpus(f); print(len(data.load(f)[0]))")
    builders = [subprocess.Popen([sys.executable, "-c", code], cwd=HERE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
                for _ in range(3)]
    printed = [builder.communicate(timeout=120) for builder in builders]
    assert [builder.returncode for builder in builders] == [0, 0, 0], printed
    assert len({out.split()[-1] for out, _ in printed}) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["python", "source"]


# The run

@pytest.fixture(scope="session")
def run(corpus, tmp_path_factory):
    """A finished run: its folder."""
    out = tmp_path_factory.mktemp("runs") / "run"
    train_tst.main(flags(corpus, out, "--steps", "60", "--eval-every", "20", "--lr", "0.01"))
    return out


def test_a_short_run_lowers_the_loss_and_writes_what_it_promises(run):
    log = lines(run)
    assert [set(line) for line in log] == 60 * [{"step", "phase", "s", "loss", "lr", "val_loss", "val_bpb", "tokens",
                                                "s_tokens", "seconds"}]
    assert [line["step"] for line in log] == list(range(1, 61))
    assert [(line["phase"], line["s"]) for line in log] == 30 * [("superposition", 3)] + 30 * [("recovery", 1)]
    assert [line["tokens"] for line in log] == [128 * (3 * min(n, 30) + max(0, n - 30)) for n in range(1, 61)]
    assert [line["s_tokens"] for line in log] == [128 * n for n in range(1, 61)]
    assert [line["step"] for line in log if line["val_loss"] is not None] == [20, 40, 60]
    assert all((line["val_loss"] is None) == (line["val_bpb"] is None) for line in log)
    assert all(a["seconds"] < b["seconds"] for a, b in zip(log, log[1:]))
    assert log[0]["loss"] == pytest.approx(math.log(256), abs=0.1)              # 250 tokens in a padded head of 256
    assert log[-1]["val_loss"] < log[19]["val_loss"] - 0.2
    assert {path.name for path in run.iterdir()} == {"args.json", "meta.json", "encoding.json", "metrics.jsonl", "ckpt.pt",
                                                     "ckpt_switch.pt"}


def test_the_learning_rate_warms_up_stays_and_decays_across_the_switch(run):
    rates = [line["lr"] for line in lines(run)]                                 # warmup 2, decay over the last 30
    assert rates[:31] == pytest.approx([0.005] + 30 * [0.01])
    assert rates[30:] == pytest.approx([0.01 * (30 - k) / 30 for k in range(30)])


def test_the_switch_changes_s_and_nothing_else(corpus, tmp_path, run):
    """The first recovery step, taken by hand from ckpt_switch.pt, is the run's."""
    checkpoint = models.load_checkpoint(run / "ckpt_switch.pt")
    assert checkpoint["step"] == 30 and checkpoint["optimizer"]["state"]["head.weight"]["step"] == 30
    model = GPT(Config(**checkpoint["config"]))
    model.load_state_dict(checkpoint["model"])
    tokens, *_ = data.load(corpus)
    batches = data.Batches(tokens, [(30, 3, 3), (30, 1, 1)], 8, 16, 0)
    with torch.no_grad():
        loss = model(*data.bags(batches.rows(30, 0, 8), 1, 1))
    assert loss.item() == pytest.approx(lines(run)[30]["loss"], rel=1e-6)


def test_the_superposition_phase_may_have_several_bag_sizes(corpus, tmp_path):
    """Each has its own fraction of the steps, a size of 1 too, and a run that goes on at the switch counts on."""
    words = flags(corpus, tmp_path / "a", "--s", "4,1,2", "--r", "0.25,0.1,0.15", "--steps", "10")
    train_tst.main(words)
    log = lines(tmp_path / "a")
    assert [line["s"] for line in log] == [4, 4, 1, 1, 2] + 5 * [1]             # the ends of r are rounded: 2.5, 3.5, 5
    assert [line["phase"] for line in log] == 5 * ["superposition"] + 5 * ["recovery"]
    assert np.diff([0] + [line["tokens"] for line in log]).tolist() == [line["s"] * 8 * 16 for line in log]
    assert models.load_checkpoint(tmp_path / "a" / "ckpt_switch.pt")["step"] == 5
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    shutil.copy(tmp_path / "b" / "ckpt_switch.pt", tmp_path / "b" / "ckpt.pt")
    train_tst.main(["--resume", str(tmp_path / "b")])
    assert losses(tmp_path / "b") == losses(tmp_path / "a") and lines(tmp_path / "b")[-1]["tokens"] == log[-1]["tokens"]


def test_the_baseline_is_the_same_code_path(corpus, tmp_path):
    train_tst.main(flags(corpus, tmp_path / "s1", "--s", "1"))
    train_tst.main(flags(corpus, tmp_path / "r0", "--r", "0"))
    assert losses(tmp_path / "s1") == losses(tmp_path / "r0")
    assert {(line["phase"], line["s"]) for line in lines(tmp_path / "s1")} == {("recovery", 1)}


def test_gradient_accumulation_changes_nothing_but_rounding(corpus, tmp_path):
    for micro in ("8", "2"):
        train_tst.main(flags(corpus, tmp_path / micro, "--micro-batch-size", micro))
    assert losses(tmp_path / "8") == pytest.approx(losses(tmp_path / "2"), rel=1e-5)


def test_halves_and_weightings_train(corpus, tmp_path):
    train_tst.main(flags(corpus, tmp_path / "in", "--s-out", "1"))
    train_tst.main(flags(corpus, tmp_path / "out", "--s-in", "1", "--weighting", "power"))
    assert lines(tmp_path / "in")[5]["tokens"] == 6 * 128 * 3 and lines(tmp_path / "out")[5]["tokens"] == 6 * 128
    assert losses(tmp_path / "in")[:6] != losses(tmp_path / "out")[:6]


@pytest.mark.parametrize("stop", [2, 6, 9])
def test_stopped_and_resumed_equals_uninterrupted(corpus, tmp_path, monkeypatch, stop):
    train_tst.main(flags(corpus, tmp_path / "whole"))
    learning_rate = train_tst.learning_rate

    def interrupted(args, step):
        if step == stop - 1:
            for _ in range(2):                                                  # as some launchers send it
                os.kill(os.getpid(), signal.SIGTERM)
        return learning_rate(args, step)

    monkeypatch.setattr(train_tst, "learning_rate", interrupted)
    train_tst.main(flags(corpus, tmp_path / "parts"))
    monkeypatch.undo()
    assert len(lines(tmp_path / "parts")) == stop
    with open(tmp_path / "parts" / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"step": stop + 1}) + '\n{"torn')                 # written after the last checkpoint
    train_tst.main(["--resume", str(tmp_path / "parts")])
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    train_tst.main(["--resume", str(tmp_path / "again" / "ckpt_switch.pt")])
    assert losses(tmp_path / "again") == losses(tmp_path / "whole")
    assert [line["step"] for line in lines(tmp_path / "parts")] == list(range(1, 13))
    seconds = [line["seconds"] for line in lines(tmp_path / "parts")]
    assert seconds == sorted(seconds)
    weights = [models.load_checkpoint(tmp_path / name)["model"] for name in ("whole", "parts")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_resuming_keeps_the_corpus_although_its_sources_have_changed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / data.PYTHON_CORPUS
    files = {f"{i}.py": f"def function_{i}(x):\n    return x + {i}\n" for i in range(300)}
    built = small_corpus(folder, monkeypatch, files)
    words = flags(data.PYTHON_CORPUS, tmp_path / "run", "--steps", "4", "--warmup-steps", "1", "--eval-every", "4")
    train_tst.main(words)
    (folder.parent / "source" / "0.py").write_text("changed = True\n")
    train_tst.main(["--resume", str(tmp_path / "run" / "ckpt_switch.pt")])
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == built
    train_tst.main([*words, "--out", str(tmp_path / "new")])
    assert {path.name: path.read_bytes() for path in folder.iterdir()} != built


def test_a_taken_folder_is_never_overwritten(corpus, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    without_out = [word for word in flags(corpus, "OUT") if word not in ("--out", "OUT")]
    for _ in range(2):
        train_tst.main([*without_out, "--steps", "4", "--warmup-steps", "1"])
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["tiny-s3-r0.5-seed0", "tiny-s3-r0.5-seed0-2"]


def test_a_run_that_used_up_its_data_says_so(corpus, tmp_path, capsys):
    train_tst.main(flags(corpus, tmp_path / "run", "--steps", "400", "--s", "6", "--eval-every", "400"))
    printed = capsys.readouterr().out
    epochs = float(re.search(r"([\d.]+) epochs", printed)[1])
    assert 2.9 < epochs < 3.2 and 120 < int(re.search(r"--steps (\d+) stays within one", printed)[1]) < 136
    assert [int(epoch) for epoch in re.findall(r"its epoch (\d) begins", printed)] == [2, 3, 2, 3]


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(corpus, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        train_tst.main(flags(corpus, tmp_path / "run", "--lr", "1e30", "--warmup-steps", "9", "--decay-frac", "0",
                              "--save-every", "1"))
    message = capsys.readouterr().err
    assert stop.value.code == 1 and re.search(r"step \d+: the loss is", message)
    checkpoint = models.load_checkpoint(tmp_path / "run")
    assert f"of step {checkpoint['step']}" in message
    assert all(torch.isfinite(value).all() for value in checkpoint["model"].values())


def test_without_a_compiler_the_run_is_eager_and_says_so(corpus, tmp_path):
    status, out, err = script("train_tst.py", *flags(corpus, tmp_path / "run", "--compile"), CXX="/nowhere/c++",
                              TORCHINDUCTOR_CACHE_DIR=tmp_path / "cache", PATH="/nowhere")
    assert status == 0 and out.count("torch.compile does not work here, so this run is eager") == 1, (out, err)
    assert len(lines(tmp_path / "run")) == 12


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="torch.compile needs a C++ compiler")
def test_a_compiled_run_has_the_losses_and_the_parameter_names_of_an_eager_one(corpus, tmp_path):
    train_tst.main(flags(corpus, tmp_path / "eager"))
    status, out, err = script("train_tst.py", *flags(corpus, tmp_path / "compiled", "--compile"))
    assert status == 0 and "eager" not in out.replace(str(tmp_path), ""), err
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "eager"), rel=1e-4)
    names = [set(models.load_checkpoint(tmp_path / name)["model"]) for name in ("eager", "compiled")]
    assert names[0] == names[1] and not any("_orig_mod" in name for name in names[1])


def test_bfloat16_autocast_trains(corpus, tmp_path):
    train_tst.main(flags(corpus, tmp_path / "run", "--dtype", "bfloat16"))
    train_tst.main(flags(corpus, tmp_path / "float", "--dtype", "float32"))
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "float"), rel=1e-2)
    assert losses(tmp_path / "run") != losses(tmp_path / "float")


def test_sampling_needs_the_runs_folder_alone_and_puts_text_alone_on_standard_output(run, tmp_path):
    shutil.copytree(run, tmp_path / "moved")
    first, again, other = (script("model.py", tmp_path / "moved", "--prompt", "ab", "--tokens", "30", "--seed", seed)
                           for seed in (1, 1, 2))
    assert first[0] == 0 and first[1].startswith("ab") and first[1] == again[1] != other[1], first[2]
    status, out, err = script("model.py", tmp_path / "moved" / "ckpt_switch.pt", "--prompt", "x" * 40, "--tokens", "3")
    assert status == 0 and out.startswith("x" * 40) and "cut to its last 16" in err


# Bad input

@pytest.mark.parametrize("bad, names", [
    (["--s", "0"], "--s"), (["--s", "two"], "--s"), (["--s", "4,2", "--r", "0.5"], "--r"), (["--s", "4,"], "--s"),
    (["--s", "4,2", "--s-in", "1"], "--s-in 1 and --s-out 4,2"),
    (["--s", "4,2", "--r", "0.6,0.6"], "--r"), (["--s-in", "0"], "--s-in"), (["--r", "1.5"], "--r"),
    (["--r", "nan"], "--r"), (["--steps", "0"], "--steps"), (["--batch-size", "-1"], "--batch-size"),
    (["--micro-batch-size", "0"], "--micro-batch-size"), (["--micro-batch-size", "3"], "--micro-batch-size 3"),
    (["--seq-len", "0"], "--seq-len"), (["--lr", "0"], "--lr"), (["--lr", "inf"], "--lr"), (["--lr", "nan"], "--lr"),
    (["--warmup-steps", "9"], "--warmup-steps 9"), (["--decay-frac", "2"], "--decay-frac"), (["--model", "7t"], "--model"),
    (["--device", "cuda:99"], "--device cuda:99"), (["--device", "toaster"], "--device toaster"),
    (["--n-head", "5"], "--n-head 5"), (["--n-kv-head", "3"], "--n-kv-head 3"), (["--n-embd", "36"], "--n-head 4"),
    (["--data", "/nowhere"], "/nowhere"), (["--resume", "/nowhere"], "/nowhere"), (["--seed", "-1"], "--seed"), (["--seed", "9" * 30], "--seed"),
    (["--batch-size", "4000"], "--batch-size"), (["--seq-len", "20000"], "--seq-len"), (["--nonsense"], "--nonsense"),
])
def test_bad_flags_end_in_one_clear_line(corpus, tmp_path, monkeypatch, capsys, bad, names):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        train_tst.main([*flags(corpus, tmp_path / "run"), *bad])
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1 and names in err and list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_and_a_tokenizer_that_does_not_fit_end_in_one_clear_line(corpus, tmp_path, capsys):
    (tmp_path / "file").touch()
    other = shutil.copytree(corpus, tmp_path / "other")
    (other / "meta.json").write_text(json.dumps({"tokenizer": "bytes", "vocab_size": VOCAB + 6}))
    broken = shutil.copytree(corpus, tmp_path / "broken")
    (broken / "encoding.json").write_text((corpus / "encoding.json").read_text().replace('"pat_str": "."', '"pat_str": "("'))
    for words, says in ((flags(corpus, tmp_path / "file" / "run"), "file/run: Not a directory"),
                        (flags(corpus, tmp_path / "file"), "is a file"),
                        (flags(other, tmp_path / "run"), "vocab_size 256 is not the 250"),
                        (flags(broken, tmp_path / "run"), "encoding.json: not a tokenizer")):
        with pytest.raises(SystemExit) as stop:
            train_tst.main(words)
        err = capsys.readouterr().err
        assert stop.value.code == 2 and err.count("\n") == 1 and says in err and not (tmp_path / "run").exists()


def shard(path, tokens=range(1000), magic=20240520, version=1, count=None, cut=None):
    """A shard put together by hand from the format's description."""
    body = np.asarray(tokens, "<u2").tobytes()
    header = np.array([magic, version, len(body) // 2 if count is None else count] + 253 * [0], "<i4").tobytes()
    path.write_bytes((header + body)[:cut])


@pytest.mark.parametrize("broken, says", [
    (dict(cut=0), "not an llm.c shard"), (dict(cut=1500), "truncated"), (dict(count=1001), "truncated"),
    (dict(magic=7), "not an llm.c shard"), (dict(version=7), "not an llm.c shard"), (dict(tokens=[]), "promises 0 tokens"),
    (dict(count=-1), "truncated"), (dict(tokens=1000 * [0] + [60_000] + 3000 * [0]), "beyond the vocabulary")])
def test_bad_shards_end_in_one_clear_line(tmp_path, capsys, broken, says):
    shard(tmp_path / "x_train_0.bin", np.arange(20_000) % 50_000, **{k: v for k, v in broken.items() if k != "tokens"})
    if "tokens" in broken:
        shard(tmp_path / "x_train_0.bin", broken["tokens"])
    shard(tmp_path / "x_val_0.bin")
    with pytest.raises(SystemExit) as stop:
        train_tst.main(flags(tmp_path, tmp_path / "run"))
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1 and says in err and "x_train_0.bin" in err
    assert not (tmp_path / "run").exists()


def mutate(content, rng):
    """Flip up to 8 bits, cut the end, splice a piece elsewhere, or forge a number (of a shard, one in its header)."""
    kind, place, content = rng.randrange(4), rng.randrange(len(content)), bytearray(content)
    if kind == 0:
        for _ in range(rng.randrange(1, 9)):
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    elif kind == 1:
        del content[place:]
    elif kind == 2:
        piece = content[place:place + rng.randrange(1, 200)]
        content[rng.randrange(len(content)):rng.randrange(len(content))] = piece
    elif content[:1] == b"{":
        forged = rng.choice(["-1", "0", "1e99", "NaN", "null", "[]", '"7"', "9" * 5000, 2 ** 31, 10 ** 12])
        content[slice(*rng.choice(list(re.finditer(rb"\d+", content))).span())] = str(forged).encode()
    else:
        forged = rng.choice([-1, 0, 7, 10_001, 20240801, 2 ** 31 - 1, -2 ** 31])
        at = 4 * (place % 3)
        content[at:at + 4] = forged.to_bytes(4, "little", signed=True)
    return bytes(content)


def test_mutated_shards_and_json_load_or_end_in_one_line(tmp_path, capfd):
    encoding = data.byte_pair_encoding("t", data.PATTERN, data.train_bpe([Path(data.__file__).read_text()], 400))
    data.save_encoding(encoding, tmp_path)
    (tmp_path / "meta.json").write_text(json.dumps({"tokenizer": "t", "vocab_size": 401, "hash": "0"}))
    for split in ("train", "val"):
        data.write_shard(tmp_path / f"x_{split}_0.bin", np.random.default_rng(0).integers(0, 401, 100_000))
    whole, rng, refused, started = contents(tmp_path), random.Random(0), 0, time.monotonic()
    tracemalloc.start()
    for case in range(200):
        name = rng.choice(sorted(whole))
        (tmp_path / name).write_bytes(mutate(whole[name], rng))
        if name == "meta.json" and case % 2:                                    # as others' shards come
            (tmp_path / "encoding.json").unlink()
        tracemalloc.reset_peak()
        before, _ = tracemalloc.get_traced_memory()
        try:
            *streams, meta, encoding = data.load(tmp_path)
            assert 0 < meta["vocab_size"] <= data.MAX_VOCAB, case               # the model would have as many rows
            if encoding:
                encoding.decode([encoding.eot_token, *encoding.encode_ordinary("def f(x): return 'é'")])
            for stream in streams:
                stream.read(len(stream) // 2, len(stream) - len(stream) // 2)
        except SystemExit as stop:
            err = capfd.readouterr().err
            assert stop.code == 2 and err.count("\n") == 1 and str(tmp_path) in err, (case, name, err)
            refused += 1
        assert tracemalloc.get_traced_memory()[1] - before < 2 * sum(map(len, whole.values())), (case, name)
        for name in whole:
            (tmp_path / name).write_bytes(whole[name])
    tracemalloc.stop()
    assert capfd.readouterr().err == "" and 100 < refused < 200 and time.monotonic() - started < 60
    (tmp_path / "encoding.json").write_bytes(whole["encoding.json"].replace(b"|endoftext|", b"|end|"))
    with pytest.raises(SystemExit):
        data.load(tmp_path)


def test_resuming_with_other_flags_other_data_or_no_checkpoint_is_refused(corpus, run, tmp_path, capsys):
    def refused(*argv):
        with pytest.raises(SystemExit) as stop:
            train_tst.main([str(word) for word in argv])
        assert stop.value.code == 2
        return capsys.readouterr().err

    assert "--s 6 contradicts" in refused("--resume", run, "--s", "6")
    assert "leave --out out" in refused("--resume", run, "--out", tmp_path / "elsewhere")
    assert "holds a run" in refused(*flags(corpus, run))
    other = shutil.copytree(corpus, tmp_path / "other")
    (other / "meta.json").write_text(json.dumps({"tokenizer": "bytes", "vocab_size": VOCAB, "hash": "2"}))
    moved = shutil.copytree(run, tmp_path / "moved")
    assert "the run is complete" in refused("--resume", moved)
    checkpoint = torch.load(moved / "ckpt_switch.pt", weights_only=True)
    checkpoint["args"]["data"] = str(other)
    torch.save(checkpoint, moved / "ckpt.pt")
    assert "no longer holds the data" in refused("--resume", moved)
    (moved / "ckpt.pt").unlink()
    assert "no checkpoint there" in refused("--resume", moved)


class Hostile:
    def __reduce__(self):
        return os.mkdir, (Hostile.folder,)


def test_a_truncated_checkpoint_and_a_hostile_pickle_are_refused_and_run_nothing(run, tmp_path, capsys):
    Hostile.folder = str(tmp_path / "owned")
    whole = (run / "ckpt.pt").read_bytes()
    torch.save({"model": Hostile(), "step": 1}, tmp_path / "hostile.pt")
    torch.save({"model": {}}, tmp_path / "foreign.pt")
    for name, content in {"half.pt": whole[:len(whole) // 2], "empty.pt": b"", "text.pt": b"hello"}.items():
        (tmp_path / name).write_bytes(content)
    for name in ("hostile.pt", "foreign.pt", "half.pt", "empty.pt", "text.pt"):
        with pytest.raises(SystemExit) as stop:
            models.load_checkpoint(tmp_path / name)
        err = capsys.readouterr().err
        assert stop.value.code == 2 and err.count("\n") == 1 and name in err
    assert not (tmp_path / "owned").exists()


# Nothing is lost

STOPS = """
import os, signal, sys
sys.path.insert(0, os.getcwd())
import train_tst
learning_rate, fully_shard = train_tst.learning_rate, train_tst.fully_shard

def sharding(*args, **more):
    print("sharding", flush=True)
    fully_shard(*args, **more)

def interrupting(args, step):
    if step == int(os.environ["LAST"]) - 1 and train_tst.RANK == train_tst.WORLD - 1:
        os.kill(os.getpid(), signal.SIGTERM)
    return learning_rate(args, step)

train_tst.learning_rate, train_tst.fully_shard = interrupting, sharding
train_tst.main()
"""
KILLS = """
import os, random, signal, sys, time
from pathlib import Path
import torch, train_tst
torch.set_num_threads(1)
log, rng, kills = Path(sys.argv[1]) / "metrics.jsonl", random.Random(0), 0
lines = lambda: log.read_bytes().count(b"\\n") if log.exists() else 0
while True:
    child = os.fork()
    if child == 0:
        try:
            train_tst.main(sys.argv[2:])
        except SystemExit as stop:
            os._exit(stop.code)
        os._exit(0)
    enough, ended = lines() + rng.randrange(2, 25), (0, 0)
    while lines() < enough and not ended[0]:
        ended = os.waitpid(child, os.WNOHANG)
    time.sleep(rng.uniform(0, 0.01))
    if not ended[0]:
        os.kill(child, signal.SIGKILL)
        ended = os.waitpid(child, 0)
    if os.WIFEXITED(ended[1]):
        print(kills)
        sys.exit(os.WEXITSTATUS(ended[1]))
    kills += 1
"""


def same_checkpoints(*folders):
    first, *others = (models.load_checkpoint(folder)["model"] for folder in folders)
    return all(torch.equal(first[name], other[name]) for other in others for name in first)


def test_killed_at_random_moments_and_resumed_equals_uninterrupted(corpus, tmp_path):
    words = flags(corpus, tmp_path / "whole", "--steps", "400", "--eval-every", "400", "--save-every", "7")
    train_tst.main(words)
    words = [str(tmp_path / "parts") if word == str(tmp_path / "whole") else word for word in words]
    status, out, err = script("-c", KILLS, tmp_path / "parts", *words, "--resume", "auto")
    assert status == 0 and int(out.split()[-1]) >= 20, (out, err)
    assert [line["step"] for line in lines(tmp_path / "parts")] == list(range(1, 401))
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert same_checkpoints(tmp_path / "whole", tmp_path / "parts")
    assert same_checkpoints(tmp_path / "whole" / "ckpt_switch.pt", tmp_path / "parts" / "ckpt_switch.pt")


def test_resume_auto_starts_continues_and_leaves_alone_what_is_done(corpus, tmp_path, capsys):
    words = flags(corpus, tmp_path / "run", "--resume", "auto")
    train_tst.main(words)
    shutil.copy(tmp_path / "run" / "ckpt_switch.pt", tmp_path / "run" / "ckpt.pt")
    before = losses(tmp_path / "run")
    train_tst.main(words)
    assert losses(tmp_path / "run") == before
    for argv, status, says in ((words, 0, "the run is complete"), ([*words, "--s", "2"], 2, "--s 2 contradicts"),
                               (["--resume", "auto"], 2, "name that folder")):
        with pytest.raises(SystemExit) as stop:
            train_tst.main(argv)
        assert stop.value.code == status and says in capsys.readouterr().err


def test_a_full_disk_while_saving_keeps_the_checkpoint_before(corpus, tmp_path):
    train_tst.main(flags(corpus, tmp_path / "run"))
    before = losses(tmp_path / "run")
    shutil.copy(tmp_path / "run" / "ckpt_switch.pt", tmp_path / "run" / "ckpt.pt")
    whole = (tmp_path / "run" / "ckpt.pt").read_bytes()
    limit = f"import resource, sys, train_tst; resource.setrlimit(resource.RLIMIT_FSIZE, 2 * ({len(whole) // 2},))"
    status, out, err = script("-c", limit + "; train_tst.main(sys.argv[1:])", "--resume", tmp_path / "run")
    assert status == 2 and "ckpt.pt cannot be written" in err and "make room" in err and "Traceback" not in err, err
    assert (tmp_path / "run" / "ckpt.pt").read_bytes() == whole and not list(tmp_path.glob("run/*.tmp"))
    train_tst.main(["--resume", str(tmp_path / "run")])
    assert losses(tmp_path / "run") == before


def test_one_process_and_two_with_ddp_and_two_with_fsdp_agree(corpus, tmp_path):
    words = ("--steps", "30", "--micro-batch-size", "2", "--seq-len", "13")     # 769 rows to validate: 1 is left for 2 processes
    train_tst.main(flags(corpus, tmp_path / "one", *words))
    (tmp_path / "stops.py").write_text(STOPS)
    for name, parts, more in (("ddp", 0, []), ("fsdp", 3, ["--fsdp", "--checkpoint-activations"])):
        status, out, err = script(tmp_path / "stops.py", *flags(corpus, tmp_path / name, *words, *more), processes=2, LAST="-1")
        assert status == 0 and out.count("flags in force") == 1, err            # one rank speaks
        assert out.count("sharding") == 2 * parts
        assert losses(tmp_path / name) == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
        for one, two in zip(lines(tmp_path / "one"), lines(tmp_path / name), strict=True):
            assert two["val_loss"] == (None if one["val_loss"] is None else pytest.approx(one["val_loss"], rel=1e-5))


@pytest.mark.parametrize("legs", [((1, "--no-fsdp"), (2, "--no-fsdp"), (2, "--fsdp"), (1, "--no-fsdp")),
                                  ((2, "--fsdp"), (1, "--no-fsdp"), (2, "--no-fsdp"))])
def test_a_checkpoint_of_any_number_of_processes_resumes_on_any_other(corpus, tmp_path, legs):
    train_tst.main(flags(corpus, tmp_path / "one"))
    (tmp_path / "stops.py").write_text(STOPS)
    words = flags(corpus, tmp_path / "moved", "--resume", "auto")
    for (processes, fsdp), last in zip(legs, (3, 8, 10, 12)):                   # the switch is after step 6
        status, out, err = script(tmp_path / "stops.py", *words, fsdp, processes=processes if processes > 1 else None, LAST=str(last))
        assert status == 0 and len(lines(tmp_path / "moved")) == last, err
    assert losses(tmp_path / "moved") == pytest.approx(losses(tmp_path / "one")[:last], rel=1e-5)


def start_two(corpus, out):
    """torchrun with two processes, in the middle of a long run: (Popen, pids of the two)."""
    words = flags(corpus, out, "--steps", "100000", "--eval-every", "100000", "--save-every", "5")
    job = subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--",
                            "train_tst.py", *words], cwd=HERE, env={**os.environ, "OMP_NUM_THREADS": "1"},
                           stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.time() + 60
    while not (out / "ckpt.pt").exists() and time.time() < deadline:
        time.sleep(0.1)
    return job, [int(pid) for pid in subprocess.check_output(["ps", "-o", "pid=", "--ppid", str(job.pid)]).split()][:2]


def test_when_one_process_dies_the_job_ends_with_an_error(corpus, tmp_path):
    job, pids = start_two(corpus, tmp_path / "run")
    os.kill(pids[1], signal.SIGKILL)
    job.communicate(timeout=60)
    assert job.returncode != 0
    assert models.load_checkpoint(tmp_path / "run")["step"] % 5 == 0


def test_sigterm_to_torchrun_saves_at_one_step_on_all_processes(corpus, tmp_path):
    job, _ = start_two(corpus, tmp_path / "run")
    job.send_signal(signal.SIGTERM)
    out, _ = job.communicate(timeout=30)
    stopped = int(re.search(r"stopped after step ([\d,]+)", out)[1].replace(",", ""))
    assert models.load_checkpoint(tmp_path / "run")["step"] == len(lines(tmp_path / "run")) == stopped


def test_checkpointed_activations_are_the_same_and_fewer():
    model, bags = GPT(SMALL), torch.randint(0, VOCAB, (2, 17, 1))
    found = []
    for model.checkpoint_activations in (False, True):
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: (kept.append(x.numel()), x)[1], lambda x: x):
            loss = model(bags[:, :-1], bags[:, 1:])
        loss.backward()
        found.append((loss.item(), [p.grad.clone() for p in model.parameters()], sum(kept)))
        model.zero_grad()
    assert found[0][0] == found[1][0] and all(map(torch.equal, found[0][1], found[1][1]))
    assert found[1][2] < found[0][2] / 2


MUTATIONS = """
import resource, sys
from pathlib import Path
import numpy as np
import model
whole, rng = Path(sys.argv[1]).read_bytes(), np.random.default_rng(0)
for k in range(200):
    blob = bytearray(whole)
    at, to = sorted(rng.integers(0, len(blob), 2))
    if k % 4 == 0:
        blob[at] ^= 1 << rng.integers(8)
    elif k % 4 == 1:
        del blob[at:]
    elif k % 4 == 2:
        del blob[at:to]
    else:
        at = rng.choice([i for i in range(len(blob) - 8) if blob[i:i + 2] == b"PK"])        # a zip header: sizes, offsets
        blob[at + 4:at + 46] = rng.bytes(42)
    Path(sys.argv[2]).write_bytes(blob)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        model.load_checkpoint(sys.argv[2])
        print("loads", k % 4)
    except SystemExit as stop:
        print("refused", stop.code)
    if k > 20:
        assert 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) < 2 * len(whole) + 2 ** 20
"""


def test_a_mutated_checkpoint_loads_or_ends_in_one_line(run, tmp_path):
    status, out, err = script("-c", MUTATIONS, run / "ckpt.pt", tmp_path / "mutated.pt")
    assert status == 0 and "Traceback" not in err, err
    assert out.count("refused 2") == err.count("\n") >= 150 and out.count("\n") == 200


def test_a_checkpoint_with_forged_sizes_is_refused(run, tmp_path, capsys):
    checkpoint = models.load_checkpoint(run)
    for name, value in (("n_layer", 10 ** 9), ("n_embd", 10 ** 9), ("n_hidden", 10 ** 9), ("vocab_size", 10 ** 12),
                        ("seq_len", 10 ** 12), ("n_head", 10 ** 9), ("n_layer", "x"), ("nonsense", 1)):
        torch.save({**checkpoint, "config": {**checkpoint["config"], name: value}}, tmp_path / "forged.pt")
        with pytest.raises(SystemExit) as stop:
            models.load_model(tmp_path / "forged.pt")
        err = capsys.readouterr().err
        assert stop.value.code == 2 and err.count("\n") == 1 and "forged.pt" in err
    for name, value in (("steps", "many"), ("lr", -1.0), ("s", 0), ("model", "7t"), ("unknown", 1)):
        torch.save({**checkpoint, "args": {**checkpoint["args"], name: value}}, tmp_path / "forged.pt")
        with pytest.raises(SystemExit) as stop:
            train_tst.parse(["--resume", str(tmp_path / "forged.pt")])
        assert stop.value.code == 2 and f"--{name}" in capsys.readouterr().err

# The README

def test_the_example_for_your_own_training_loop_trains():
    example = re.search(r"```python\n(def superposed_loss.*?)```", (HERE / "README.md").read_text(encoding="utf-8"), re.S)[1]
    embed, head = torch.nn.Embedding(VOCAB, 16), torch.nn.Linear(16, VOCAB)
    rows = {s: torch.randint(0, VOCAB, (2, 6 * s)) for s in (1, 6)}
    read = []

    def model(inputs_embeds):                   # as a Hugging Face model answers
        return types.SimpleNamespace(logits=head(inputs_embeds))

    space = dict(model=model, embed=embed, steps=10, B=2, l=5, next_rows=lambda B, n: (read.append(n), rows[n // 6])[1],
                 optimizer=torch.optim.SGD([*embed.parameters(), *head.parameters()], lr=0.5))
    inputs, targets = data.bags(rows[6], 6, 6)
    ours = multi_hot_cross_entropy(head(bag_average(embed.weight, inputs)), targets)
    exec(example.split("for step")[0], space)
    torch.testing.assert_close(space["superposed_loss"](model, embed, rows[6], 6), ours)
    exec(example, space)
    assert read == 3 * [36] + 7 * [6] and space["loss"] < F.cross_entropy(torch.zeros(1, VOCAB), torch.tensor([0]))


def test_the_readme_gives_the_losses_that_the_table_prints(capsys, monkeypatch):
    monkeypatch.syspath_prepend(HERE / "study")
    importlib.import_module("table").main(["seeds", "steps", "r"])
    printed = capsys.readouterr().out
    rows = re.findall(r"^\| `(--s [^`]+)`[^|]*\|[^|]* M \|(.*)\|$", (HERE / "README.md").read_text(encoding="utf-8"), re.M)
    for flags, cells in rows:
        *seeds, mean, less = (cell.strip() for cell in cells.replace("*", "").split("|"))
        seeds = [seed for seed in seeds if seed]
        assert f"| `{flags}` | {len(seeds)} | {mean} ({', '.join(seeds)}) | {less} |\n" in printed
    assert len(rows) == 6


@pytest.mark.parametrize("name, changed, reset", [
    ("tables", {"embedding.weight", "head.weight"}, {"embedding.weight", "head.weight"}), ("moments", set(), "all"),
    ("scale", {"embedding.weight"}, set()), ("rewarm", set(), set())])
def test_an_edit_at_the_switch_changes_what_it_says_and_then_trains(name, changed, reset, run, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(HERE / "study")
    edit = importlib.import_module("edit")
    monkeypatch.setattr(edit, "folder", lambda flags: tmp_path / "out" if "--edit" in flags else run)
    monkeypatch.setattr(sys, "argv", ["edit.py", "--edit", name, "--s", "3"])
    monkeypatch.setattr(train_tst, "learning_rate", train_tst.learning_rate)             # which rewarm sets
    with monkeypatch.context() as patch:
        patch.setattr(train_tst, "main", lambda argv: None)
        edit.main()
    switch, old = models.load_checkpoint(run / "ckpt_switch.pt")["step"], lines(run)
    assert lines(tmp_path / "out") == old[:switch]
    before, after = (models.load_checkpoint(path) for path in (run / "ckpt_switch.pt", tmp_path / "out"))
    moments = before["optimizer"]["state"], after["optimizer"]["state"]
    assert {key for key, weight in after["model"].items() if not weight.equal(before["model"][key])} == changed
    assert {key for key in moments[1] if not moments[1][key]["exp_avg"].any()} == (set(moments[0]) if reset == "all" else reset)
    edit.main()
    new = lines(tmp_path / "out")
    assert new[:switch] == old[:switch] and len(new) == len(old) and new[-1]["val_loss"] != old[-1]["val_loss"]
    assert [line["lr"] for line in new] != [line["lr"] for line in old] or name != "rewarm"


# Export

def needs(*packages):
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    return pytest.mark.skipif(bool(missing), reason=f"without {', '.join(missing)}: pip install "
                              "transformers safetensors 'lm-eval[hf]'")


TRANSFORMERS = ("transformers", "safetensors")
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"   # as in tiktoken
os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")


@pytest.fixture(scope="session")
def texts():
    return [path.read_text(encoding="utf-8") for path in sorted(HERE.glob("*.py"))]


def make_encoding(texts, pattern, first=range(256), **special):
    """Ranks of 1,000 tokens from texts, the bytes in the order of `first`; end-of-text has the id 1,000."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "PATTERN", pattern)
        merged = [token for token in data.train_bpe(texts, 1000) if len(token) > 1]
    ranks = {token: rank for rank, token in enumerate([*(bytes([byte]) for byte in first), *merged])}
    return tiktoken.Encoding("test", pat_str=pattern, mergeable_ranks=ranks,
                             special_tokens={data.END_OF_TEXT: 1000, **special})


def save_run(folder, config, encoding=None):
    """A run's folder without a run: a GPT with random weights, large ones that make its logits spread."""
    torch.manual_seed(0)
    model = GPT(config)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(5) if p.ndim == 2 else p.mul_(1 + torch.rand_like(p))
    folder.mkdir()
    torch.save({"model": model.state_dict(), "optimizer": {}, "step": 1, "seconds": 0.0, "args": {},
                "config": vars(config), "data": {"tokenizer": "nobody's"}}, folder / "ckpt.pt")
    if encoding:
        data.save_encoding(encoding, folder)
    return folder


@pytest.fixture(scope="session")
def tiny(texts, tmp_path_factory):
    """A run of the tiny preset with a vocabulary like the built-in one, and its export."""
    folder = tmp_path_factory.mktemp("tiny")
    config = replace(models.PRESETS["tiny"], vocab_size=1001, seq_len=64)
    save_run(folder / "run", config, make_encoding(texts, data.PATTERN))
    models.main([str(folder / "run"), "--export", str(folder / "hf")])
    return folder


@needs(*TRANSFORMERS)
@pytest.mark.parametrize("preset", ["tiny", "270m"])
def test_the_export_is_a_llama_with_our_logits(preset, tiny, texts, tmp_path, capsys):
    from transformers import AutoModelForCausalLM
    folder = tiny
    if preset == "270m":
        folder = tmp_path
        save_run(folder / "run", replace(models.PRESETS["270m"], n_layer=2, vocab_size=1001))
        models.main([str(folder / "run"), "--export", str(folder / "hf")])
        assert "no tokenizer" in capsys.readouterr().err
    ours, _ = models.load_model(folder / "run")
    theirs = AutoModelForCausalLM.from_pretrained(folder / "hf")
    assert type(theirs).__name__ == "LlamaForCausalLM" and theirs.dtype == torch.float32
    assert sum(p.numel() for p in theirs.parameters()) == sum(p.numel() for p in ours.parameters()) - (
        2 * 23 * ours.config.n_embd)                                            # 1,001 rows were padded to 1,024
    real = torch.tensor(data.load_encoding(tiny / "run", None).encode_ordinary(texts[0])[:ours.config.seq_len])
    for length in (1, 2, 33, ours.config.seq_len):
        for ids in (torch.randint(0, 1001, (length,)), real[:length]):
            with torch.no_grad():
                difference = ours(ids.view(1, -1, 1))[..., :1001] - theirs(ids.view(1, -1)).logits
            assert difference.abs().max() < 1e-4, length


@needs(*TRANSFORMERS)
def test_the_exports_greedy_continuations_are_ours(tiny):
    from transformers import AutoModelForCausalLM
    ours, _ = models.load_model(tiny / "run")
    theirs = AutoModelForCausalLM.from_pretrained(tiny / "hf")
    assert theirs.generation_config.eos_token_id == 1000
    for ids in torch.randint(0, 1000, (5, 20)):
        expected = list(ours.generate(ids.tolist(), 40, temperature=0))
        continued = theirs.generate(ids[None], max_new_tokens=40, do_sample=False, eos_token_id=-1)[0, 20:].tolist()
        assert continued == expected and len(set(expected)) > 10


def random_text(texts, rng):
    """Unicode of every plane, whitespace runs, digits, code and special tokens in a row."""
    pick = lambda characters: "".join(rng.choices(characters, k=rng.randrange(20)))
    code = rng.choice(texts)[rng.randrange(9000):][:rng.randrange(300)]
    anything = "".join(chr(rng.choice([rng.randrange(0xD800), rng.randrange(0xE000, 0x20000)])) for _ in range(9))
    return "".join(rng.sample([code, anything, pick(" \t\n\r\v\f\x85\xa0\u2003\u2028"), pick("0123456789٣²Ⅷ"),
                               pick("aeinst'’LlVvRrSs "), pick("ßİſé́日本한🇩🇪👨\u200d👩"), data.END_OF_TEXT,
                               "<|endof", "<|a|>"], k=rng.randrange(1, 10)))


@needs(*TRANSFORMERS)
@pytest.mark.parametrize("kind", ["built-in", "gpt2"])
def test_the_exports_tokenizer_gives_the_same_ids(kind, tiny, texts, tmp_path):
    from transformers import AutoTokenizer
    folder, encoding = tiny / "hf", data.load_encoding(tiny / "run", None)
    if kind == "gpt2":              # its bytes stand in another order, and here its special tokens leave a gap
        folder, order = tmp_path / "hf", [*range(33, 127), *range(161, 173), *range(174, 256)]
        order += sorted({*range(256)} - {*order})
        encoding = make_encoding(texts, GPT2_PATTERN, order, **{"<|a|>": 1010})
        save_run(tmp_path / "run", replace(SMALL, vocab_size=1011), encoding)
        models.main([str(tmp_path / "run"), "--export", str(folder)])
    tokenizer, rng = AutoTokenizer.from_pretrained(folder), random.Random(0)
    assert tokenizer.eos_token_id == tokenizer.bos_token_id == 1000
    assert set(tokenizer("def")) == {"input_ids", "attention_mask"}             # what a Llama takes
    for text in [*texts, *(random_text(texts, rng) for _ in range(500))]:
        ids = encoding.encode(text, allowed_special="all")
        assert tokenizer(text)["input_ids"] == ids and tokenizer.decode(ids) == text


@needs(*TRANSFORMERS)
@pytest.mark.parametrize("pattern", [r"\p{N}{1,2}+|\P{N}+", r"(?P<a>.)"])      # a possessive {1,2} is tiktoken's alone
def test_a_tokenizer_that_has_no_exact_counterpart_is_left_out(pattern, tiny, tmp_path, capsys):
    from transformers import AutoModelForCausalLM
    save_run(tmp_path / "run", replace(SMALL, vocab_size=1001), tiktoken.Encoding(
        "odd", pat_str=pattern, special_tokens={data.END_OF_TEXT: 1000},
        mergeable_ranks=data.load_encoding(tiny / "run", None)._mergeable_ranks))
    models.main([str(tmp_path / "run"), "--export", str(tmp_path / "hf")])
    assert "no tokenizer" in capsys.readouterr().err
    assert not list((tmp_path / "hf").glob("tokenizer*"))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "hf").config.eos_token_id == 1000


@needs(*TRANSFORMERS)
def test_an_export_is_whole_or_absent(tiny, tmp_path, monkeypatch, capsys):
    def refused(folder):
        with pytest.raises(SystemExit) as stop:
            models.main([str(tiny / "run"), "--export", str(folder)])
        err = capsys.readouterr().err
        assert stop.value.code == 2 and err.count("\n") == 1
        return err

    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("mine")
    for taken in ("taken", "taken/file"):
        assert f"{taken} holds something already" in refused(tmp_path / taken)
    assert "cannot write there" in refused(tmp_path / "taken" / "file" / "hf")
    monkeypatch.setattr("safetensors.torch.save_file", lambda weights, path, metadata: fill_the_disk(path))
    assert "No space left" in refused(tmp_path / "hf")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    assert "pip install transformers safetensors" in refused(tmp_path / "hf")
    assert [path.name for path in tmp_path.rglob("*")] == ["taken", "file"]
    monkeypatch.undo()
    (tmp_path / "empty").mkdir()
    models.main([str(tiny / "run"), "--export", str(tmp_path / "empty")])
    assert (tmp_path / "empty" / "tokenizer.json").exists()


def fill_the_disk(path):
    path.write_bytes(b"half")
    raise OSError(28, "No space left on device")


@needs(*TRANSFORMERS, "lm_eval", "accelerate")
def test_the_lm_evaluation_harness_measures_our_log_likelihoods(tiny, tmp_path):
    questions = [{"question": f"def f{i}(x):\n    return", "choices": [" x", " self.model", " None"], "label": i % 3}
                 for i in range(4)]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(question) + "\n" for question in questions))
    (tmp_path / "local.yaml").write_text(json.dumps({                           # JSON is YAML
        "task": "local", "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "questions.jsonl")}},
        "test_split": "test", "output_type": "multiple_choice", "doc_to_text": "{{question}}", "doc_to_target": "label",
        "doc_to_choice": "{{choices}}", "target_delimiter": "", "metric_list": [{"metric": "acc"}]}))
    status, out, err = script(
        "-m", "lm_eval", "--model", "hf", "--model_args", f"pretrained={tiny / 'hf'},dtype=float32", "--device", "cpu",
        "--tasks", "local", "--include_path", tmp_path, "--output_path", tmp_path / "out", "--log_samples",
        HF_HOME=str(tmp_path / "cache"))
    assert status == 0, err
    model, encoding = models.load_model(tiny / "run")
    (samples,) = (tmp_path / "out").rglob("samples_local_*.jsonl")
    right = 0
    for sample in map(json.loads, samples.read_text().splitlines()):
        measured = [float(likelihood) for (likelihood, _), in sample["resps"]]
        context = encoding.encode_ordinary(sample["doc"]["question"])
        for choice, likelihood in zip(sample["doc"]["choices"], measured, strict=True):
            ids = encoding.encode_ordinary(sample["doc"]["question"] + choice)
            with torch.no_grad():
                steps = model(torch.tensor(ids[:-1]).view(1, -1, 1))[0, :, :1001].log_softmax(-1)
            ours = sum(steps[k - 1, ids[k]].item() for k in range(len(context), len(ids)))
            assert len(ids) > len(context) and likelihood == pytest.approx(ours, abs=1e-4)
        right += max(range(3), key=measured.__getitem__) == sample["doc"]["label"]
    (results,) = (tmp_path / "out").rglob("results_*.json")
    assert json.loads(results.read_text())["results"]["local"]["acc,none"] == right / 4


# Sampling

def sampled(capsys, run, *flags):
    """What model.py prints, .out and .err."""
    models.main([str(run), *flags])
    return capsys.readouterr()


def test_a_long_prompt_is_cut_at_the_left_with_a_line_that_says_so(tmp_path, capsys):
    run = save_run(tmp_path / "run", SMALL, data.byte_pair_encoding("bytes", ".", {bytes([i]): i for i in range(249)}))
    flags = ["--tokens", "12", "--temperature", "0"]
    long = sampled(capsys, run, "--prompt", "zyxwvutsrq" + "abcdefghijklmnop", *flags)
    exact = sampled(capsys, run, "--prompt", "abcdefghijklmnop", *flags)        # 16 tokens, the training length
    assert long.out == "zyxwvutsrq" + exact.out and exact.err == ""
    assert "26 tokens" in long.err and "last 16" in long.err and long.err.count("\n") == 1


def test_samples_come_one_after_another_with_a_line_between(run, capsys):
    flags = ["--prompt", "ab", "--tokens", "30", "--seed", "1", "--device", "cpu"]
    one, three = sampled(capsys, run, *flags).out, sampled(capsys, run, *flags, "--n", "3").out
    samples = three.removesuffix("\n").split("\n---\n")
    assert samples[0] + "\n" == one and len(samples) == len(set(samples)) == 3
    assert all(sample.startswith("ab") for sample in samples)


def test_temperature_0_is_greedy_whatever_the_seed(run, capsys):
    choices = (["--temperature", "0"], ["--temperature", "0", "--seed", "7"], ["--temperature", "1e-40"],
               ["--top-k", "1"])
    texts = {sampled(capsys, run, "--prompt", "ab", "--tokens", "30", *choice).out for choice in choices}
    model, encoding = models.load_model(run)
    ids = list(model.generate([VOCAB - 1, *encoding.encode_ordinary("ab")], 30, temperature=0))
    assert texts == {"ab" + encoding.decode(ids, errors="replace") + "\n"}


def test_text_streams_as_it_comes_and_stops_at_end_of_text(run, monkeypatch):
    streamed = []

    def generate(*args):            # a euro sign in three tokens, a byte that no text has, and half a letter
        for token in (0xE2, 0x82, 0xAC, 0xF8, 97, 0xC3, VOCAB - 1, 98):
            streamed.append(sys.stdout.buffer.getvalue().decode())
            yield token

    monkeypatch.setattr(GPT, "generate", generate)
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="utf-8"))
    models.main([str(run), "--prompt", "x"])
    assert streamed == ["x", "x", "x", "x€", "x€\ufffd", "x€\ufffda", "x€\ufffda"]
    assert sys.stdout.buffer.getvalue().decode() == "x€\ufffda\ufffd\n"


def test_no_byte_crashes_a_terminal_of_any_encoding(run, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9 \xc3\xa9\n"), encoding="ascii"))
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    models.main([str(run), "--prompt", "-", "--tokens", "100", "--temperature", "50", "--top-k", "1000", "--n", "9"])
    printed = sys.stdout.buffer.getvalue()
    assert printed.startswith(b"caf? ?\n") and max(printed) < 128 and printed.count(b"?") > 20


@pytest.mark.parametrize("bad, names", [
    (["--tokens", "-1"], "--tokens -1"), (["--tokens", "many"], "--tokens"), (["--top-k", "0"], "--top-k 0"),
    (["--n", "0"], "--n 0"), (["--temperature", "nan"], "--temperature nan"),
    (["--temperature", "-1"], "--temperature -1"), (["--seed", "-1"], "--seed -1"),
    (["--seed", str(10 ** 30)], "--seed"), (["--device", "cuda:99"], "--device cuda:99"), (["--device", "toaster"], "--device toaster"),
    (["--device", "meta"], "--device meta"), (["--nonsense"], "--nonsense")])
def test_bad_flags_of_sampling_end_in_one_clear_line(run, capsys, bad, names):
    with pytest.raises(SystemExit) as stop:
        models.main([str(run), *bad])
    printed = capsys.readouterr()
    assert stop.value.code == 2 and printed.out == "" and printed.err.count("\n") == 1 and names in printed.err


# Data preparation

@pytest.fixture
def hub(monkeypatch):
    """A real HTTP server in the place of Hugging Face: `files` by name, `faults` for the next requests, `asked`."""
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            name, start = self.path.split("/")[-1], int(re.fullmatch(r"bytes=(\d+)-", self.headers["Range"])[1])
            fault = hub.faults.pop(0) if hub.faults else None
            hub.asked.append((self.path, start))
            body = hub.files.get(name)
            if body is None or isinstance(fault, int) or start >= len(body):
                return self.send_error(404 if body is None else fault or 416)
            start = 0 if fault == "no ranges" else start
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", len(body) - start)
            self.end_headers()
            self.wfile.write(body[start:start + 2 ** 17 if fault == "drop" else None])

        def log_message(self, *args):
            pass

    hub = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.files, hub.faults, hub.asked = {}, [], []
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{hub.server_port}/")
    monkeypatch.setattr(data, "BACKOFF", 0)
    yield hub
    hub.shutdown()
    hub.server_close()


@pytest.fixture
def fineweb(hub, tmp_path):
    """The hub with a validation shard and three training shards."""
    for k, name in enumerate(["fineweb_val_000000", *(f"fineweb_train_{k:06d}" for k in (1, 2, 3))]):
        shard(tmp_path / "shard", np.arange(250_000) % 50_000 + k)
        hub.files[f"{name}.bin"] = (tmp_path / "shard").read_bytes()
    (tmp_path / "shard").unlink()
    return hub


def get(out, *more):
    data.main(["fineweb", "--shards", "3", "--out", str(out), *more])


def refused(capsys, *argv):
    """The one line that data.py ends in."""
    with pytest.raises(SystemExit) as stop:
        data.main([str(word) for word in argv])
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1, err
    return err


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("urllib3_major", [1, 2])                              # 1 takes a body that is cut short for whole
def test_fineweb_arrives_whole_through_dropped_connections_and_errors(fineweb, tmp_path, monkeypatch, urllib3_major):
    lenient = property(lambda response: urllib3_major == 2, lambda response, value: None)
    monkeypatch.setattr(urllib3.HTTPResponse, "enforce_content_length", lenient, raising=False)
    fineweb.faults = ["drop", 503, "drop", "drop", None, 429, "drop", 500, "no ranges"]
    get(tmp_path / "out")
    assert {**fineweb.files, "meta.json": (tmp_path / "out" / "meta.json").read_bytes()} == contents(tmp_path / "out")
    assert fineweb.asked[:5] == [("/datasets/kjj0/fineweb10B-gpt2/resolve/main/fineweb_val_000000.bin", start)
                                 for start in (0, 2 ** 17, 2 ** 17, 2 * 2 ** 17, 3 * 2 ** 17)]
    train, val, meta, _ = data.load(tmp_path / "out")
    assert len(train) == 750_000 and val.read(0, 3).tolist() == [0, 1, 2] and meta["vocab_size"] == 50_257

    asked = len(fineweb.asked)
    (tmp_path / "out" / "fineweb_train_000002.bin").rename(tmp_path / "out" / "fineweb_train_000002.bin.part")
    with open(tmp_path / "out" / "fineweb_train_000002.bin.part", "r+b") as file:
        file.truncate(100_000)                                                     # left by a run that was killed
    get(tmp_path / "out")
    assert [start for _, start in fineweb.asked[asked:]] == [100_000]              # and what is whole is not asked for
    get(tmp_path / "out")
    assert len(fineweb.asked) == asked + 1
    (tmp_path / "out" / "fineweb_val_000000.bin").rename(tmp_path / "out" / "fineweb_val_000000.bin.part")
    get(tmp_path / "out")                                                       # killed between the last byte and its rename
    assert {name: content for name, content in contents(tmp_path / "out").items() if name in fineweb.files} == fineweb.files


def test_the_number_of_shards_chooses_the_dataset(hub, tmp_path, capsys):
    for words, place in ((["103"], "kjj0/fineweb10B-gpt2/resolve/main/fineweb_val_000000.bin"),
                         (["104"], "kjj0/fineweb100B-gpt2/resolve/main/fineweb_val_000000.bin"),
                         (["99", "--edu"], "kjj0/finewebedu10B-gpt2/resolve/main/finewebedu_val_000000.bin")):
        assert " 404 " in refused(capsys, "fineweb", "--out", tmp_path / words[0], "--shards", *words)
        assert hub.asked.pop() == (f"/datasets/{place}", 0) and hub.asked == []
    for words in (["0"], ["1031"], ["100", "--edu"], ["many"]):
        assert words[0] in refused(capsys, "fineweb", "--out", tmp_path / "none", "--shards", *words)
    assert not (tmp_path / "none").exists() and hub.asked == []


def test_a_download_that_fails_leaves_no_shard_behind(fineweb, tmp_path, capsys):
    for fault, tries in ((403, 1), (503, data.RETRIES)):
        fineweb.faults, fineweb.asked[:] = data.RETRIES * [fault], []
        assert f" {fault} " in refused(capsys, "fineweb", "--shards", 1, "--out", tmp_path / "out")
        assert len(fineweb.asked) == tries
    fineweb.faults = []
    whole = fineweb.files["fineweb_val_000000.bin"]
    for body, says in ((whole[:-10], "truncated"), (whole + b"more", "damaged"), (b"<html>" * 500, "not an llm.c shard")):
        fineweb.files["fineweb_val_000000.bin"] = body
        assert says in refused(capsys, "fineweb", "--shards", 1, "--out", tmp_path / "out")
        assert list(contents(tmp_path / "out")) == ["meta.json"]
    fineweb.server_close()
    fineweb.shutdown()
    assert "Connection refused" in refused(capsys, "fineweb", "--shards", 1, "--out", tmp_path / "out")


def test_shards_of_different_datasets_are_never_mixed(fineweb, tmp_path, capsys):
    get(tmp_path / "out")
    assert "fineweb100B-gpt2" in refused(capsys, "fineweb", "--shards", 104, "--out", tmp_path / "out")
    assert "holds other data" in refused(capsys, "fineweb", "--edu", "--shards", 1, "--out", tmp_path / "out")
    (tmp_path / "out" / "meta.json").unlink()                                   # whatever else lies there
    assert "holds other data" in refused(capsys, "fineweb", "--shards", 3, "--out", tmp_path / "out")
    assert len(fineweb.asked) == 4


def test_a_run_says_how_many_shards_of_fineweb_it_needs():
    def said(name, shards, *more):
        class Tokens(Counting):
            files = shards * [Path(name)]
            def __len__(self): return 100_000_000 * shards

        args, _ = train_tst.parse(["--data", "data/fineweb", "--model", "270m", "--device", "cpu", *more])
        phases = train_tst.bag_phases(args)
        return train_tst.describe(args, phases, Tokens(), data.Batches(Tokens(), phases, 512, 1024, 0), None, meta)

    meta = {}
    name, other = "fineweb_train_000001.bin", " --out data/fineweb-100B\n"        # its first 103 shards are others
    assert "--steps 755 stays within one" in said(name, 10)
    assert "python data.py fineweb --shards 263" + other in said(name, 10)
    assert "python data.py fineweb --shards 105" + other in said(name, 10, "--s", "1")
    assert "python data.py fineweb --shards 27 --out data/fineweb\n" in said(name, 10, "--steps", "2000")
    assert "fineweb --shards 27 --edu --out data/fineweb\n" in said("finewebedu_train_1.bin", 1, "--steps", "2000")
    for enough in (said("finewebedu_train_1.bin", 10), said("other_train_1.bin", 10), said(name, 263)):
        assert "--shards" not in enough                                         # there are no more, no such, no need
    meta["repo"] = "kjj0/fineweb100B-gpt2"
    assert "python data.py fineweb --shards 263 --out data/fineweb\n" in said(name, 10)


@pytest.mark.parametrize("magic, version, dtype, top", [(20240520, 1, "<u2", 50_000), (20240801, 7, "<u4", 128_000)])
def test_both_formats_load_from_the_headers_description_and_round_trip(tmp_path, magic, version, dtype, top):
    tokens = np.random.default_rng(0).integers(0, top, 5000).astype(dtype)
    by_hand = np.array([magic, version, 5000] + 253 * [0], "<i4").tobytes() + tokens.tobytes()
    for split in ("train", "val"):
        (tmp_path / f"x_{split}_0.bin").write_bytes(by_hand)
    (tmp_path / "meta.json").write_text(json.dumps({"tokenizer": "mine", "vocab_size": top}))     # by hand, without a hash
    train, _, meta, encoding = data.load(tmp_path)
    assert np.array_equal(train.read(0, 5000), tokens) and len(meta["hash"]) == 64 and encoding is None
    data.write_shard(tmp_path / "ours.bin", tokens)
    assert (tmp_path / "ours.bin").read_bytes() == by_hand


def test_more_shards_can_be_read_than_files_be_open(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    for k in range(1100):
        data.write_shard(tmp_path / f"x_train_{k:06d}.bin", np.array([k]))
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (1024, limits[1]))           # many a system's default
        tokens = data.Stream(sorted(tmp_path.iterdir()), 1100)
        assert [int(tokens.read(k, 1)[0]) for k in range(1100)] == list(range(1100))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


@pytest.fixture(scope="session")
def bpe(tmp_path_factory):
    """A tiktoken-format BPE file of all bytes and a few pairs, and one of more than 65,536 tokens."""
    folder = tmp_path_factory.mktemp("bpe")
    single = [bytes([i]) for i in range(256)]
    for name, tokens in {"small": single + [b"ab", b"12", b"34", b"1234"],
                         "large": single + [a + b for a in single for b in single]}.items():
        (folder / name).write_bytes(b"".join(base64.b64encode(t) + b" %d\n" % i for i, t in enumerate(tokens)))
    return folder


def tokenize(out, *words):
    """The meta and {split: documents} of what `data.py text` makes of words."""
    data.main(["text", *map(str, words), "--out", str(out)])
    *_, meta, encoding = data.load(out)
    found = {}
    for split in data.SPLITS:
        paths = sorted(out.glob(f"text_{split}_*.bin"))
        tokens = data.Stream(paths, meta["vocab_size"]).read(0, sum(len(data.read_shard(p)) for p in paths)) if paths else []
        found[split] = [document for document in encoding.decode(list(tokens)).split(data.END_OF_TEXT) if document]
    return meta, found


@pytest.fixture
def notes(tmp_path):
    """A folder of 200 files with a hidden one, and a .jsonl of 200 lines: the folder that holds both."""
    (tmp_path / "in" / "notes" / "deep").mkdir(parents=True)
    for i in range(200):
        (tmp_path / "in" / "notes" / f"{'deep/' * (i % 2)}{i}.{'md' if i % 3 else 'py'}").write_text(f"note {i}:\r\n\u20ac caf\u00e9\n" * 5, encoding="utf-8", newline="")
    (tmp_path / "in" / "notes" / ".git").write_bytes(b"\xff\0")
    (tmp_path / "in" / "notes" / "empty.txt").touch()
    rows = [json.dumps({"text": f"row {i} " * 5, "body": f"body {i}"}) for i in range(200)]
    (tmp_path / "in" / "c.jsonl").write_text("\n\n".join(rows) + "\n")
    return tmp_path / "in"


def test_your_own_text_comes_out_document_by_document(notes, bpe, tmp_path, monkeypatch):
    expected = {f"note {i}:\r\n\u20ac caf\u00e9\n" * 5 for i in range(200)} | {f"row {i} " * 5 for i in range(200)}
    words = (notes / "notes", notes / "c.jsonl", "--tokenizer", bpe / "small", "--pattern", "gpt2")
    meta, found = tokenize(tmp_path / "one", *words)
    assert sorted(sum(found.values(), [])) == sorted(expected) and meta["vocab_size"] == 261
    assert all(4 < len(found[split]) < 30 for split in ("val", "test"))
    monkeypatch.chdir(notes)
    monkeypatch.setattr(data, "BATCH_DOCUMENTS", 7)                             # the same from elsewhere, in other batches
    tokenize(tmp_path / "two", "notes", "c.jsonl", *words[2:])
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    _, found = tokenize(tmp_path / "three", "c.jsonl", "--field", "body", "--tokenizer", "train", "--vocab-size", "300")
    assert sorted(sum(found.values(), [])) == sorted(f"body {i}" for i in range(200))
    _, found = tokenize(tmp_path / "four", ".", *words[2:])                     # what is hidden stays so, seen from the dot too
    assert len(sum(found.values(), [])) == 400


def test_shards_are_written_as_they_fill(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "SHARD_TOKENS", 1400)         # the last batch fills one and leaves a rest
    monkeypatch.setattr(data, "BATCH_DOCUMENTS", 5)
    written = []

    def documents():
        for i in range(100):
            written.append(len(list(tmp_path.glob("out.*/new/*.bin"))))
            yield f"{i:099d}", ("val" if i % 10 == 0 else "train")

    encoding = data.byte_pair_encoding("bytes", ".", {bytes([i]): i for i in range(256)})
    data.write_corpus(tmp_path / "out", "x", documents(), encoding)
    assert written[20] == 1 and written[99] == 6
    assert {name: (len(content) - 1024) // 2 for name, content in contents(tmp_path / "out").items() if "bin" in name} == {
        "x_val_000000.bin": 1000, **{f"x_train_{k:06d}.bin": 1400 for k in range(6)}, "x_train_000006.bin": 600}
    tokens = data.Stream(sorted((tmp_path / "out").glob("x_train*")), 257).read(0, 9000).tolist()
    assert encoding.decode(tokens).split(data.END_OF_TEXT)[1:] == [f"{i:099d}" for i in range(100) if i % 10]


def test_a_long_file_is_cut_at_line_ends_and_some_of_it_held_out(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "DOCUMENT_CHARS", 100)
    (tmp_path / "long.txt").write_text("".join(f"line {i}\n" for i in range(3000)))
    _, found = tokenize(tmp_path / "long", tmp_path / "long.txt", "--tokenizer", "train", "--vocab-size", "300")
    assert all(part.endswith("\n") and 100 < len(part) < 120 for part in sum(found.values(), []) if "line 2999" not in part)
    assert sorted("".join(sum(found.values(), [])).splitlines()) == sorted(f"line {i}" for i in range(3000))
    assert len(found["val"]) > 3
    (tmp_path / "short.txt").write_text("short\n" * 20)                         # two documents: the second validates
    _, found = tokenize(tmp_path / "short", tmp_path / "short.txt", "--tokenizer", "train", "--vocab-size", "300")
    assert found == {"train": ["short\n" * 17], "val": ["short\n" * 3], "test": []}


def test_a_tokenizer_from_a_file_splits_as_its_pattern_says_and_above_65536_tokens_shards_are_uint32(bpe, tmp_path):
    (tmp_path / "in").mkdir()
    for name in ("a.txt", "b.txt"):
        (tmp_path / "in" / name).write_text("ab1234 " * 100)
    for pattern, four in (("gpt2", [259]), ("llama3", [257, 51, 52])):          # llama3: three digits, and then one
        tokenize(tmp_path / pattern, tmp_path / "in", "--tokenizer", bpe / "small", "--pattern", pattern)
        train, *_ = data.load(tmp_path / pattern)
        assert train.read(0, 3 + len(four)).tolist() == [260, 256] + four + [32]
    meta, found = tokenize(tmp_path / "large", tmp_path / "in", "--tokenizer", bpe / "large", "--pattern", "gpt2")
    train, *_ = data.load(tmp_path / "large")
    assert meta["vocab_size"] == 65_793 and train.read(0, 1)[0] == 65_792 and "".join(sum(found.values(), [])) == "ab1234 " * 200
    assert np.fromfile(tmp_path / "large" / "text_train_000000.bin", "<i4", 2).tolist() == [20240801, 7]


def test_a_tokenizer_killed_midway_leaves_nothing_in_its_place_and_runs_again(tmp_path):
    (tmp_path / "big.txt").write_text("".join(f"{i} {i * i} {i ** 5}\n" for i in range(60_000)))
    words = ["data.py", "text", tmp_path / "big.txt", "--out", tmp_path / "out", "--tokenizer", "train", "--vocab-size", "257"]
    first = subprocess.Popen([sys.executable, *map(str, words)], cwd=HERE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while first.poll() is None and not list(tmp_path.glob("out.*")):
        time.sleep(0.01)
    first.kill()
    assert first.wait() == -signal.SIGKILL and not (tmp_path / "out").exists() and len(list(tmp_path.glob("out.*"))) == 1
    status, _, err = script(*words)
    assert status == 0, err
    assert len(data.load(tmp_path / "out")[0]) > 1_000_000


def test_a_full_disk_ends_in_one_clear_line_and_leaves_nothing(tmp_path):
    (tmp_path / "big.txt").write_text("".join(f"{i} {i * i}\n" for i in range(100_000)))
    code = ("import resource, data; resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000)); "     # as near as a test gets
            f"data.main(['text', {str(tmp_path / 'big.txt')!r}, '--out', {str(tmp_path / 'out')!r}, '--tokenizer', 'train'])")
    status, _, err = script("-c", code)
    assert status == 2 and err.count("\n") == 1 and "File too large" in err and str(tmp_path / "out") in err
    assert [path.name for path in tmp_path.iterdir()] == ["big.txt"]


def bad_text(content):
    return lambda folder: (folder / "bad.txt").write_bytes(content)


def bad_line(line):
    return lambda folder: (folder / "bad.jsonl").write_text('{"text": "good"}\n' + line + "\n")


@pytest.mark.parametrize("prepare, words, says", [
    (bad_text(b"caf\xe9"), [], "bad.txt: not UTF-8"), (bad_text(b"\x7fELF\0\0"), [], "bad.txt: not UTF-8"),
    (bad_line("{text"), [], "bad.jsonl:2: not a JSON"), (bad_line('{"body": "x"}'), [], "bad.jsonl:2: not a JSON"),
    (bad_line('{"text": 7}'), [], "bad.jsonl:2"), (bad_line('"text"'), [], "bad.jsonl:2"), (bad_line("[" * 10_000), [], "bad.jsonl:2"),
    (bad_line("{}"), ["--field", "body"], "bad.jsonl:1: not a JSON object with text in its field 'body'"),
    (bad_text(b"hi"), [], "too few"), (bad_text(b""), [], "too few"), (lambda folder: None, [], "too few"),
    (bad_text(b"x"), ["--tokenizer", "gpt9"], "gpt9: tiktoken cannot load it; it knows gpt2"),
    (bad_text(b"x"), ["--tokenizer", "gpt9", "--pattern", "gpt2"], "gpt9: No such file"),
    (bad_text(b"x"), ["--tokenizer", __file__, "--pattern", "gpt2"], "not a tiktoken BPE file"),
    (bad_text(b"x"), ["--tokenizer", __file__], "--pattern gpt2 or llama3"),
    (bad_text(b"x"), ["--vocab-size", "256"], "--vocab-size 256"), (bad_text(b"x"), ["--pattern", "gpt7"], "--pattern"),
    (lambda folder: (folder / "out").mkdir() or (folder / "out" / "thesis.doc").touch(), [], "holds other data"),
    (lambda folder: (folder / "out").touch(), [], "out: Not a directory"),
])
def test_bad_text_ends_in_one_clear_line_and_leaves_nothing(tmp_path, capsys, prepare, words, says):
    prepare(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert says in refused(capsys, "text", tmp_path, "--out", tmp_path / "out", "--tokenizer", "train", *words)
    assert sorted(tmp_path.rglob("*")) == before
    assert "/nowhere: No such file" in refused(capsys, "text", "/nowhere", "--out", tmp_path / "new", "--tokenizer", "train")


def test_without_a_network_the_way_out_is_named_and_shards_still_train(tmp_path, capsys, monkeypatch):
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")                          # where nothing listens
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})
    (tmp_path / "a.txt").write_text("hello " * 100)
    message = refused(capsys, "text", tmp_path / "a.txt", "--out", tmp_path / "out", "--tokenizer", "o200k_base")
    assert all(word in message for word in ("o200k_base", f"TIKTOKEN_CACHE_DIR ({tmp_path}/cache)", "--tokenizer train"))
    assert not (tmp_path / "out").exists()

    (tmp_path / "others").mkdir()
    for split, n in (("train", 20_000), ("val", 1000)):
        shard(tmp_path / "others" / f"fineweb_{split}_000001.bin", np.arange(n) % 50_257)
    train_tst.main(flags(tmp_path / "others", tmp_path / "run", "--steps", "2", "--warmup-steps", "0"))
    printed = capsys.readouterr().out
    assert "GPT-2's is assumed" in printed and "no bits per byte, no sample" in printed
    assert lines(tmp_path / "run")[-1]["val_bpb"] is None


@pytest.mark.parametrize("name, says", [("train.bin", "nanoGPT's, without a header"), ("edufineweb_train_000001.npy", "build-nanogpt's"),
                                        (None, "no *train*.bin there")])
def test_other_formats_are_recognised_and_refused_with_the_remedy(tmp_path, capsys, name, says):
    for split in ("train", "val"):
        if name:
            np.arange(5000, dtype=np.uint16).tofile(tmp_path / name.replace("train", split))
    with pytest.raises(SystemExit) as stop:
        data.load(tmp_path)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1 and says in err and "python data.py text FILES --out FOLDER" in err


# The plan

spec = importlib.util.spec_from_file_location("plan", HERE / "study" / "plan.py")
plan = importlib.util.module_from_spec(spec)
spec.loader.exec_module(plan)


@pytest.fixture
def planned(monkeypatch):
    """A function: words of a command line -> the plan's dict, in this process."""
    monkeypatch.setattr(train_tst, "WORLD", 1)                                       # which it sets, and this sets back
    return lambda *words: plan.plan(plan.parse(list(map(str, words))))


NARROW = ("--model", "270m", "--n-embd", 32, "--n-head", 4, "--n-kv-head", 2, "--n-hidden", 48, "--n-layer", 2, "--vocab-size", VOCAB,
          "--seq-len", 320, "--batch-size", 4, "--micro-batch-size", 2)                  # SMALL, in two chunks of the head's loss


@pytest.mark.parametrize("s", [3, 1])
@pytest.mark.parametrize("again", [False, True])
def test_the_planned_flops_are_those_that_torch_counts_in_both_phases(planned, s, again):
    model, rows = GPT(replace(SMALL, seq_len=320)), torch.randint(0, VOCAB, (4, 321 * s))
    model.checkpoint_activations = again
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(*data.bags(rows, s, s)).backward()
    found = planned(*NARROW, "--steps", 50, *["--checkpoint-activations"] * again)
    assert found["flops_per_step"] == counter.get_total_flops() and found["flops"] == 50 * found["flops_per_step"]
    assert found["model_flops_per_step"] == model.flops_per_token() * 4 * 320


def test_the_planned_memory_and_checkpoint_are_those_of_a_cpu_run_of_270ms_width(planned, tmp_path):
    (tmp_path / "data").mkdir()
    for split, size in (("train", 6000), ("val", 300)):
        shard(tmp_path / "data" / f"{split}_0.bin", np.arange(size) % 2048)
    (tmp_path / "data" / "meta.json").write_text('{"tokenizer": "none", "vocab_size": 2048}')
    words = ["--model", "270m", "--n-layer", "2", "--seq-len", "256", "--batch-size", "6", "--micro-batch-size", "3", "--steps", "2",
             "--s", "2", "--r", "0.5", "--device", "cpu", "--data", str(tmp_path / "data")]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        train_tst.main([*words, "--out", str(tmp_path / "run")])
    profiler.export_chrome_trace(str(tmp_path / "trace.json"))
    trace = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    peak = max(event["args"]["Total Allocated"] for event in trace if event["name"] == "[memory]")
    found = planned(*words)
    assert found["memory_per_device"]["total"] == pytest.approx(peak, rel=0.01)         # 10% are promised
    assert found["checkpoint_bytes"] == pytest.approx((tmp_path / "run" / "ckpt.pt").stat().st_size, rel=0.01)


def test_a_gpus_larger_chunks_of_the_heads_loss_are_counted(planned):
    for rows in (128, 512):                                                     # of 16 positions: one chunk of 4,096, and two
        with plan.LiveBytes() as live, torch.device("meta"):                    # takes a GPU's chunks
            model, batch = GPT(replace(SMALL, vocab_size=9000)), torch.zeros(rows, 17, dtype=torch.int64)
            for _ in range(2):
                model(*data.bags(batch, 1, 1)).backward()
        found = planned(*NARROW, "--seq-len", 16, "--vocab-size", 9000, "--batch-size", rows, "--micro-batch-size", rows, "--s", 1,
                        "--device", "cuda", "--dtype", "float32", "--no-compile")["memory_per_device"]
        assert found["total"] - found["optimizer"] == pytest.approx(live.peak, rel=0.02)


def test_a_layer_keeps_what_the_list_of_its_tensors_says_and_checkpointed_only_its_input(planned):
    q, k = torch.zeros(1, 4, 2, 8, requires_grad=True), torch.zeros(1, 2, 2, 8)
    if "Flash" not in F.scaled_dot_product_attention(q, k, k, enable_gqa=True).grad_fn.name():
        pytest.skip("the CPU's attention of this PyTorch keeps all scores")

    def kept_by_a_layer(*words):
        """What the third one adds, in bytes per position."""
        two, three = (planned(*NARROW, "--n-layer", n, *words)["memory_per_device"]["activations"] for n in (2, 3))
        return (three - two) / (2 * 320)

    d, kv, hidden, heads = 32, 16, 48, 4
    copies = 2 * (d * (d + 2 * kv) + d * d + 3 * d * hidden) / (2 * 320)        # of the weights, in bfloat16
    norm = 4 * d + 4 + 4 * d + 2 * d                                            # input, 1 / rms, output, its bfloat16
    attention = 2 * (d + 2 * kv) + 2 * (d + kv) + 4 * heads + 2 * d             # qkv, rotated qk, logsumexp, y
    swiglu = 2 * 2 * hidden + 2 * hidden + 2 * hidden                           # gate and up, silu(gate), their product
    eager = norm + attention + norm + swiglu + copies
    assert kept_by_a_layer("--no-compile") == eager
    assert 4 * d + attention - 4 * d + copies < kept_by_a_layer("--compile") < eager - 8 * d
    assert kept_by_a_layer("--checkpoint-activations") == 4 * d + copies
    assert kept_by_a_layer("--checkpoint-activations", "--fsdp") == 4 * d


def test_the_object_adds_up_and_fsdp_divides_what_is_stored(planned):
    words = ("--model", "3b", "--n-layer", 2, "--devices", 8, "--gpu", "h100", "--mfu", "0.4", "--no-compile")
    plain, sharded = planned(*words), json.loads(script("study/plan.py", *words, "--fsdp", "--json")[1])
    for found, shards in ((plain, 1), (sharded, 8)):
        memory = found["memory_per_device"]
        assert [memory[name] for name in ("weights", "gradients", "optimizer")] == [n * found["parameters"] // shards for n in (4, 4, 8)]
        assert memory.pop("total") == sum(memory.values())
        assert found["checkpoint_bytes"] == 12 * found["parameters"] and found["micro_batch_size"] == 4
        assert found["vocab_size"] == 50_257 and found["superposition_tokens"] == 6 * 6000 * 2 ** 19
        assert found["recovery_tokens"] == 14_000 * 2 ** 19 and found["shards"] == 263
        assert found["flops"] == 20_000 * found["flops_per_step"]
        assert found["gpu_hours"] == pytest.approx(8 * found["hours"]) == pytest.approx(found["flops"] / 989e12 / 0.4 / 3600)
    assert sharded["memory_per_device"]["gathered"] > 0 == plain["memory_per_device"]["gathered"]


def test_the_papers_hours_are_the_utilisations_counted_by_hand(capsys):
    plan.main(["--paper", "--json"])
    assert json.loads(capsys.readouterr().out) == pytest.approx({"270m": 0.23, "600m": 0.29, "3b": 0.43}, abs=0.006)


def test_the_planned_vocabulary_is_that_of_the_data_there_or_to_come(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(train_tst, "WORLD", 1)
    monkeypatch.chdir(tmp_path)                                                 # where there is no data/python
    for model, more, size in (("tiny", [], 1024), ("270m", [], 50_257), ("270m", ["--data", corpus], VOCAB),
                              ("270m", ["--data", corpus, "--vocab-size", 128_256], 128_256)):
        assert plan.parse(["--model", model, *map(str, more)]).vocab_size == size


@pytest.mark.parametrize("bad, names", [
    (["--gpu", "h1000"], "--gpu"), (["--mfu", "0"], "--mfu"), (["--mfu", "1.1"], "--mfu"), (["--devices", "0"], "--devices"),
    (["--devices", "3"], "--batch-size 32 does not divide by the 3"), (["--device", "tpu"], "--device tpu"), (["--sorcery"], "--sorcery"),
    (["--micro-batch-size", "5"], "--micro-batch-size 5"), (["--resume", "runs/x"], "--resume runs/x"), (["--vocab-size", "0"], "--vocab"),
])
def test_bad_flags_of_the_plan_end_in_one_clear_line(monkeypatch, capsys, bad, names):
    monkeypatch.setattr(train_tst, "WORLD", 1)
    with pytest.raises(SystemExit) as stop:
        plan.main(["--model", "tiny", *bad])
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and out == "" and err.count("\n") == 1 and names in err
