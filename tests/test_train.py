"""What must hold of runs: resuming, several processes, the run's folder, bad input."""
import json
import os
import shutil
import signal
import subprocess
import sys
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import ROOT, VOCAB

import data
import model as models
import train_tst


def log(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def numbers(out):
    """The log without its times."""
    return [{name: entry[name] for name in entry if name != "seconds"} for entry in log(out)]


def stopped(capsys, status, *said):
    """A check to use as `with stopped(...)`: one line on standard error that says all of said."""
    class Check:
        def __enter__(self):
            capsys.readouterr()

        def __exit__(self, kind, error, trace):
            assert kind is SystemExit and error.code == status
            printed = capsys.readouterr().err
            assert len(printed.strip().splitlines()) == 1, printed
            for words in said:
                assert words in printed
            return True

    return Check()


@pytest.fixture
def run(flags, tmp_path):
    """A whole run's folder."""
    train_tst.main([*flags, "--out", str(tmp_path / "run")])
    return tmp_path / "run"


def torchrun(processes, *words):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
               f"--nproc_per_node={processes}", "--", str(ROOT / "train_tst.py"), *words]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=200,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})


# The run's folder

def test_a_run_leaves_its_log_its_checkpoints_and_what_sampling_needs(run):
    entries = log(run)
    assert [entry["step"] for entry in entries] == list(range(1, 13))
    assert set(entries[0]) == {"step", "phase", "s", "loss", "lr", "val_loss", "val_bpb", "tokens",
                               "s_tokens", "seconds"}
    assert [(entry["phase"], entry["s"]) for entry in entries] == (
        6 * [("superposition", 3)] + 6 * [("recovery", 1)])
    assert [entry["step"] for entry in entries if entry["val_loss"]] == [4, 8, 12]
    assert entries[-1]["tokens"] == 8 * 16 * (6 * 3 + 6) and entries[-1]["s_tokens"] == 8 * 16 * 12
    names = {path.name for path in run.iterdir()}
    assert names == {"args.json", "meta.json", "encoding.json", "metrics.jsonl", "ckpt.pt",
                     "ckpt_switch.pt"}
    for name, step in (("ckpt.pt", 12), ("ckpt_switch.pt", 6)):
        checkpoint = models.load_checkpoint(run / name)
        assert set(checkpoint) == {"model", "optimizer", "step", "seconds", "args", "config",
                                   "data"}
        assert checkpoint["step"] == step


@pytest.mark.parametrize("links", [True, False])
def test_the_switch_costs_one_checkpoint_of_two_names(flags, tmp_path, monkeypatch, links):
    real, saved = torch.save, []
    monkeypatch.setattr(torch, "save", lambda state, path: (
        saved.append(state["step"]), real(state, path)))
    if not links:
        monkeypatch.setattr(os, "link", Mock(side_effect=OSError("a disk without links")))
    out = tmp_path / "run"
    train_tst.main([*flags, "--eval-every", "12", "--out", str(out)])
    assert saved == [6, 12]             # 3B takes minutes to write
    assert models.load_checkpoint(out / "ckpt_switch.pt")["step"] == 6
    assert models.load_checkpoint(out)["step"] == 12


def test_the_start_the_table_and_the_end_are_printed(flags, tmp_path, capsys):
    train_tst.main([*flags, "--out", str(tmp_path / "run")])
    printed = capsys.readouterr().out
    assert "[(6, 3, 3), (6, 1, 1)]: steps, s_in, s_out" in printed
    rows = [line for line in printed.splitlines() if line.split()[1:2] in (["superposition"],
                                                                           ["recovery"])]
    assert ["*" in row for row in rows] == [True, False, False]         # a multi-hot loss is marked
    assert "train_tst.py --s 1 --model tiny" in printed
    assert "python tools/plot.py" in printed and "python tools/sample.py" in printed


@pytest.mark.parametrize("default, said", [("tiny", True), ("270m", False)])
def test_the_first_line_says_why_a_preset_was_taken(flags, tmp_path, capsys, monkeypatch, default,
                                                    said):
    monkeypatch.setattr(train_tst, "default_preset", lambda device: default)
    train_tst.main([*flags, "--steps", "2", "--out", str(tmp_path / "run")])
    first = capsys.readouterr().out.splitlines()[0]
    assert "tiny" in first and ("the default" in first) == said
    assert ("without CUDA and data/fineweb" in first) == said


def test_bits_per_byte_are_of_the_text_that_the_targets_are(run, corpus):
    last = log(run)[-1]
    _, tokens, _, encoding = data.load(corpus)
    rows = (len(tokens) - 1) // 16
    starts = [i * (len(tokens) - 17) // (rows - 1) for i in range(rows)]
    size = sum(len(encoding.decode_single_token_bytes(token)) for start in starts
               for token in tokens.read(start + 1, 16) if token < VOCAB - 1)
    expected = last["val_loss"] * rows * 16 / size / np.log(2)
    assert last["val_bpb"] == pytest.approx(expected, rel=1e-9)


# Resuming

@pytest.mark.parametrize("step", [3, 6, 9])
def test_a_stopped_run_goes_on_as_if_it_had_not(run, flags, tmp_path, step, monkeypatch):
    out, real = tmp_path / "again", train_tst.learning_rate

    def stop(args, now):                # a signal at that step, of its own process
        if now == step - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(args, now)

    monkeypatch.setattr(train_tst, "learning_rate", stop)
    train_tst.main([*flags, "--out", str(out)])
    assert log(out)[-1]["step"] == step
    monkeypatch.setattr(train_tst, "learning_rate", real)
    train_tst.main([*flags, "--out", str(out), "--resume"])
    ours, theirs = numbers(out), numbers(run)
    for entries in (ours, theirs):      # the stop evaluates nothing
        for entry in entries:
            entry.pop("val_loss"), entry.pop("val_bpb")
    assert ours == theirs
    for a, b in zip(*(models.load_checkpoint(folder)["model"].values() for folder in (out, run))):
        assert torch.equal(a, b)


def test_resume_starts_what_is_not_there_and_leaves_what_is_complete(flags, tmp_path, capsys):
    words = [*flags, "--out", str(tmp_path / "run"), "--resume"]
    train_tst.main(words)
    before = (tmp_path / "run/metrics.jsonl").read_bytes()
    train_tst.main(words)
    assert "is complete" in capsys.readouterr().out
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == before


def test_a_folder_with_a_run_is_refused_without_resume(run, flags, capsys):
    with stopped(capsys, 2, "add --resume", "another --out"):
        train_tst.main([*flags, "--out", str(run)])


def test_the_first_flag_that_differs_is_named(run, flags, capsys):
    with stopped(capsys, 2, "--lr 0.5", "0.003"):
        train_tst.main([*flags, "--out", str(run), "--resume", "--lr", "0.5"])


def test_a_branch_goes_on_from_the_switch_where_the_data_moved(run, flags, corpus, tmp_path):
    (tmp_path / "branch").mkdir()
    shutil.copy(run / "ckpt_switch.pt", tmp_path / "branch/ckpt.pt")
    moved = shutil.copytree(corpus, tmp_path / "moved")
    words = [*flags, "--data", str(moved), "--out", str(tmp_path / "branch"), "--resume"]
    train_tst.main(words)
    assert numbers(tmp_path / "branch") == numbers(run)[6:]
    shutil.copy(run / "ckpt_switch.pt", tmp_path / "branch/ckpt.pt")   # as if killed before a save
    train_tst.main(words)
    assert numbers(tmp_path / "branch") == numbers(run)[6:]


def test_other_data_are_refused(run, flags, corpus, tmp_path, capsys):
    other = shutil.copytree(corpus, tmp_path / "other")
    shutil.copy(other / "x_train_0.bin", other / "x_train_1.bin")
    shutil.copy(run / "ckpt_switch.pt", run / "ckpt.pt")
    with stopped(capsys, 2, "does not hold the data of the run"):
        train_tst.main([*flags, "--data", str(other), "--out", str(run), "--resume"])


# Several processes

@pytest.mark.parametrize("more", [[], ["--fsdp"]])
def test_two_processes_train_as_one_does_and_one_goes_on(run, flags, tmp_path, more):
    out = tmp_path / "two"
    done = torchrun(2, *flags, *more, "--out", str(out))
    assert done.returncode == 0, done.stderr
    for ours, theirs in zip(log(out), log(run)):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-4)
    (tmp_path / "one").mkdir()
    shutil.copy(out / "ckpt_switch.pt", tmp_path / "one/ckpt.pt")
    train_tst.main([*flags, "--out", str(tmp_path / "one"), "--resume"])
    for ours, theirs in zip(log(tmp_path / "one"), log(run)[6:]):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-4)


def test_ddp_keeps_one_copy_of_the_gradients(flags, tmp_path):
    """They stay views of its buckets, or those of the first micro-batches come beside them."""
    script = tmp_path / "script.py"
    script.write_text(f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import torch, data, train_tst
clip, bags, seen = torch.nn.utils.clip_grad_norm_, data.bags, []
def noting(parameters, most):
    seen[:] = parameters
    return clip(seen, most)
def checking(rows, s_in, s_out):
    assert all(p.grad is not None for p in seen), "the next ones would be new tensors"
    return bags(rows, s_in, s_out)
torch.nn.utils.clip_grad_norm_, data.bags = noting, checking
train_tst.main(sys.argv[1:])
""")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
               "--", str(script), *flags, "--micro-batch-size", "2", "--out", str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr


# Bad input

@pytest.mark.parametrize("words, said", [
    (["--s", "0"], "--s"), (["--s", "x"], "--s"), (["--r", "1.5"], "--r 1.5"),
    (["--steps", "0"], "--steps 0"), (["--lr", "nan"], "--lr nan"), (["--seed", "-1"], "--seed -1"),
    (["--n-head", "3"], "--n-head 3"), (["--n-kv-head", "3"], "--n-kv-head 3"),
    (["--s-in", "3,2"], "--s-in 3,2"), (["--decay-frac", "0.99"], "longer than --steps"),
    (["--model", "huge"], "--model"), (["--bogus"], "--bogus"), (["--device", "cuda"], "--device"),
    (["--data", "nowhere"], "--data nowhere"), (["--seq-len", "4000"], "too few"),
])
def test_a_bad_flag_is_one_line(flags, tmp_path, capsys, words, said):
    with stopped(capsys, 2, said):
        train_tst.main([*flags, *words, "--out", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


def test_all_processes_on_one_gpu_are_refused(flags, capsys, monkeypatch):
    monkeypatch.setattr(train_tst, "WORLD", 2)
    with stopped(capsys, 2, "--device cuda:0", "say --device cuda"):
        train_tst.parse([*flags, "--device", "cuda:0"])


def test_a_truncated_shard_and_one_of_another_tokenizer_are_named(flags, corpus, tmp_path, capsys):
    for name, damage, said in (
            ("cut", lambda shard: shard[:-10], "truncated"),
            ("other", lambda shard: shard[:1024] + b"\xff\xff" + shard[1026:], "beyond the voc")):
        folder = shutil.copytree(corpus, tmp_path / name)
        shard = folder / "x_train_1.bin"
        shard.write_bytes(damage(shard.read_bytes()))
        with stopped(capsys, 2, "x_train_1.bin", said):
            train_tst.main([*flags, "--data", str(folder), "--out", str(tmp_path / "run")])


def test_a_full_disk_keeps_the_last_checkpoint(flags, tmp_path, capsys, monkeypatch):
    real = torch.save

    def save(state, path):
        if state["step"] > 4:
            path.write_bytes(b"half")
            raise RuntimeError("No space left on device")
        real(state, path)

    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(SystemExit) as end:
        train_tst.main([*flags, "--out", str(tmp_path / "run")])
    assert end.value.code == 2 and "last checkpoint: step 4" in capsys.readouterr().err
    assert models.load_checkpoint(tmp_path / "run")["step"] == 4
    assert not (tmp_path / "run/ckpt.tmp").exists()


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"),
                                   RuntimeError("MPS backend out of memory")])
def test_no_memory_says_what_to_try(flags, tmp_path, capsys, monkeypatch, error):
    def clip(*_):
        raise error

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip)
    with pytest.raises(SystemExit) as end:
        train_tst.main([*flags, "--out", str(tmp_path / "run")])
    assert end.value.code == 2 and "try --micro-batch-size 4" in capsys.readouterr().err


def test_a_loss_that_is_not_finite_ends_the_run(flags, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        train_tst.main([*flags, "--out", str(tmp_path / "run"), "--lr", "1e30",
                        "--warmup-steps", "1"])
    assert end.value.code == 1 and "with a --lr below 1e+30" in capsys.readouterr().err


def test_a_broken_compiler_leaves_the_run_eager(run, flags, tmp_path, capsys, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch, "compile", broken)
    train_tst.main([*flags, "--out", str(tmp_path / "other"), "--compile"])
    assert "this run is eager (RuntimeError: no compiler)" in capsys.readouterr().out
    assert numbers(tmp_path / "other") == numbers(run)


# Flags and shapes

def test_r_is_shared_evenly_by_the_sizes_of_s(flags):
    args = train_tst.parse([*flags, "--s", "8,4,2", "--r", "0.75"])
    assert train_tst.bag_phases(args) == [(3, 8, 8), (3, 4, 4), (3, 2, 2), (3, 1, 1)]


def test_the_micro_batch_is_the_largest_divisor_within_the_limit(flags):
    args = train_tst.parse([*flags, "--batch-size", "12", "--micro-batch-size", "5"])
    assert train_tst.micro_batch_size(args) == 4


def test_micro_batches_do_not_change_the_run(run, flags, tmp_path):
    train_tst.main([*flags, "--out", str(tmp_path / "small"), "--micro-batch-size", "2"])
    for ours, theirs in zip(log(tmp_path / "small"), log(run)):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-4)


def test_the_learning_rate_is_warmup_stable_decay(flags):
    args = train_tst.parse([*flags, "--steps", "100", "--lr", "1", "--warmup-steps", "10",
                            "--decay-frac", "0.2"])
    rates = [train_tst.learning_rate(args, step) for step in range(100)]
    assert rates[0] == 0.1 and rates[9] == rates[50] == rates[80] == 1
    assert rates[90] == 0.5 and rates[99] == pytest.approx(0.05)


@pytest.mark.parametrize("dtype, top", [(np.uint16, 50_000), (np.uint32, 128_000)])
def test_both_shard_formats_round_trip(tmp_path, dtype, top):
    from tools.corpus import write_shard
    tokens = np.random.default_rng(0).integers(0, top, 5000).astype(dtype)
    write_shard(tmp_path / "x.bin", tokens)
    shard = data.read_shard(tmp_path / "x.bin")
    assert shard.dtype == dtype and np.array_equal(shard, tokens)
