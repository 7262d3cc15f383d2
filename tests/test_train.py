"""What a user of train_tst.py meets: a run's folder, resuming, processes, float16, bad input."""
import contextlib
import fcntl
import functools
import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

import data
import train_tst


def log(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def numbers(out, *without):
    """The log without its times."""
    return [{name: entry[name] for name in entry if name not in ("seconds", *without)}
            for entry in log(out)]


def losses(out):
    return [entry["loss"] for entry in log(out)]


@contextlib.contextmanager
def stopped(capsys, *said):
    """What is inside ends with status 2 and one line on standard error, which has all of said."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        yield
    printed = capsys.readouterr().err
    assert end.value.code == 2 and printed.count("\n") == 1
    assert all(words in printed for words in said), printed


def stop_at(step, monkeypatch, *signals):
    """The signals to this process, in that step of the run to come."""
    real, steps = torch.nn.utils.clip_grad_norm_, iter(range(1, step + 1))

    def clip(*args, **kwargs):
        if next(steps, None) == step:
            for number in signals:
                os.kill(os.getpid(), number)
        return real(*args, **kwargs)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip)


@pytest.fixture
def run(flags, tmp_path):
    train_tst.main([*flags, "--out", str(tmp_path / "run")])
    return tmp_path / "run"


def torchrun(*words):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
               "--", str(ROOT / "train_tst.py"), *words]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=200)
    assert done.returncode == 0, done.stderr


# The run's folder

def test_a_run_leaves_its_log_its_checkpoints_and_what_sampling_needs(run, corpus):
    assert [len(split) for split in data.load(corpus)[:2]] == [60_000, 3_000]   # of "retrieval_..."
    entries = log(run)
    assert [entry["step"] for entry in entries] == list(range(1, 13))
    assert set(entries[0]) == {"step", "phase", "s", "loss", "lr", "val_loss", "val_bpb", "tokens",
                               "s_tokens", "seconds"}
    assert [(entry["phase"], entry["s"]) for entry in entries] == (
        6 * [("superposition", 3)] + 6 * [("recovery", 1)])
    assert [entry["step"] for entry in entries if entry["val_loss"]] == [4, 8, 12]
    assert entries[-1]["tokens"] == 8 * 16 * (6 * 3 + 6) and entries[-1]["s_tokens"] == 8 * 16 * 12
    assert {path.name for path in run.iterdir()} == {
        "args.json", "meta.json", "encoding.json", "metrics.jsonl", "ckpt.pt", "ckpt_switch.pt"}
    for name, step in (("ckpt.pt", 12), ("ckpt_switch.pt", 6)):
        assert train_tst.load_checkpoint(run / name)["step"] == step


def test_the_start_the_table_and_the_end_are_printed(flags, tmp_path, capsys):
    train_tst.main([*flags, "--out", str(tmp_path / "my run")])
    printed = capsys.readouterr().out
    assert "6 steps on bags of 3, then 6 on tokens" in printed
    rows = [line.split() for line in printed.splitlines()]
    rows = [row for row in rows if row[1:2] in (["superposition"], ["recovery"])]
    assert [row[2].endswith("*") for row in rows] == [True, False, False]   # a multi-hot loss
    assert f"python tools/sample.py '{tmp_path}/my run'" in printed


# Stopping and resuming

@pytest.mark.parametrize("step, number", [
    (3, signal.SIGTERM), (6, signal.SIGHUP), (9, signal.SIGUSR1)])
def test_a_stopped_run_goes_on_as_if_it_had_not(run, flags, tmp_path, step, number, monkeypatch):
    out = tmp_path / "again"
    with monkeypatch.context() as patch:
        stop_at(step, patch, number)
        train_tst.main([*flags, "--out", str(out)])
    assert log(out)[-1]["step"] == train_tst.load_checkpoint(out)["step"] == step
    with open(out / "metrics.jsonl", "ab") as file:
        file.write(b"\0" * 99 + b'"step": 4}\n')                # as a power cut may leave it
    train_tst.main([*flags, "--out", str(out), "--resume"])
    without = "val_loss", "val_bpb"                             # the stop evaluates nothing
    assert numbers(out, *without) == numbers(run, *without)
    ours, theirs = (train_tst.load_checkpoint(folder)["model"] for folder in (out, run))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_second_ctrl_c_ends_a_run_at_once(flags, tmp_path, monkeypatch):
    stop_at(3, monkeypatch, signal.SIGINT, signal.SIGINT)
    with pytest.raises(SystemExit) as end:
        train_tst.main([*flags, "--out", str(tmp_path / "run")])
    assert end.value.code == 130 and len(log(tmp_path / "run")) == 2


def test_a_run_under_nohup_outlives_its_terminal(flags, tmp_path, monkeypatch):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)                # as nohup does
    stop_at(3, monkeypatch, signal.SIGHUP)
    train_tst.main([*flags, "--out", str(tmp_path / "run")])
    assert len(log(tmp_path / "run")) == 12


def test_a_folder_is_refused_to_another_run_and_to_other_flags_data_and_writers(
        run, flags, corpus, tmp_path, capsys):
    words = [*flags, "--out", str(run)]
    with stopped(capsys, "add --resume", "another --out"):
        train_tst.main(words)
    with stopped(capsys, "--lr 0.5", "0.003"):
        train_tst.main([*words, "--resume", "--lr", "0.5"])
    shutil.copy(run / "ckpt_switch.pt", run / "ckpt.pt")
    other = shutil.copytree(corpus, tmp_path / "other")
    shutil.copy(other / "retrieval_train_0.bin", other / "retrieval_train_1.bin")
    with stopped(capsys, "is not what the run in"):
        train_tst.main([*words, "--resume", "--data", str(other)])
    before = (run / "metrics.jsonl").read_bytes()
    with open(run / "metrics.jsonl") as file, stopped(capsys, "another process trains there"):
        fcntl.flock(file, fcntl.LOCK_EX)
        train_tst.main([*words, "--resume"])
    assert (run / "metrics.jsonl").read_bytes() == before


def test_a_branch_goes_on_from_the_switch_where_the_data_moved(
        run, flags, corpus, tmp_path, capsys):
    (tmp_path / "branch").mkdir()
    moved = shutil.copytree(corpus, tmp_path / "moved")
    for _ in range(2):                  # the second time as if killed before a save
        shutil.copy(run / "ckpt_switch.pt", tmp_path / "branch/ckpt.pt")
        train_tst.main([*flags, "--data", f"{moved}", "--out", f"{tmp_path}/branch", "--resume"])
        assert numbers(tmp_path / "branch") == numbers(run)[6:]
        assert "has 0 of the 6 steps before this one" in capsys.readouterr().out


# Several processes, and float16

@pytest.mark.parametrize("more", [[], ["--fsdp"]], ids=["ddp", "fsdp"])
def test_two_processes_train_as_one_does_and_one_goes_on(run, flags, tmp_path, more):
    torchrun(*flags, *more, "--out", str(tmp_path / "two"))
    assert losses(tmp_path / "two") == pytest.approx(losses(run), abs=1e-5)
    (tmp_path / "one").mkdir()
    shutil.copy(tmp_path / "two/ckpt_switch.pt", tmp_path / "one/ckpt.pt")
    train_tst.main([*flags, "--out", str(tmp_path / "one"), "--resume"])
    assert losses(tmp_path / "one") == pytest.approx(losses(run)[6:], abs=1e-5)


@pytest.mark.parametrize("launch, more", [
    (train_tst.main, []), (torchrun, []), (torchrun, ["--fsdp"])], ids=["one", "ddp", "fsdp"])
def test_float16_trains_as_float32_does(run, flags, tmp_path, launch, more):
    words = [*flags, "--dtype", "float16", *more, "--out", str(tmp_path / "low")]
    launch(words) if launch is train_tst.main else launch(*words)
    assert losses(tmp_path / "low") == pytest.approx(losses(run), abs=2e-3)


def test_float16_skips_steps_that_overflow_and_resumes_with_its_scale(
        flags, tmp_path, monkeypatch):
    scaler = functools.partial(torch.amp.GradScaler, init_scale=2.0 ** 22)
    monkeypatch.setattr(torch.amp, "GradScaler", scaler)
    words = [*flags, "--dtype", "float16", "--out"]
    train_tst.main([*words, str(tmp_path / "whole")])
    skipped = train_tst.load_checkpoint(tmp_path / "whole")
    assert skipped["scaler"]["scale"] < 2.0 ** 20               # halved at every overflow
    assert 3 < next(iter(skipped["optimizer"]["state"].values()))["step"] < 10
    stop_at(3, monkeypatch, signal.SIGTERM)
    train_tst.main([*words, str(tmp_path / "again")])
    train_tst.main([*words, str(tmp_path / "again"), "--resume"])
    assert losses(tmp_path / "again") == losses(tmp_path / "whole")


def test_micro_batches_do_not_change_the_run(run, flags, tmp_path):
    args = train_tst.parse([*flags, "--batch-size", "12", "--micro-batch-size", "5"])
    assert args.micro_batch_size == 4                           # the largest that divides 12
    train_tst.main([*flags, "--out", str(tmp_path / "small"), "--micro-batch-size", "2"])
    assert losses(tmp_path / "small") == pytest.approx(losses(run), abs=1e-5)


# Bad input

@pytest.mark.parametrize("words, said", [
    (["--s", "0"], "--s: 0"), (["--s", "8,4"], "--s"), (["--r", "1.5"], "--r: 1.5"),
    (["--lr", "nan"], "--lr: nan"), (["--n-head", "3"], "--n-head 3"), (["--bogus"], "--bogus"),
    (["--n-kv-head", "3"], "--n-kv-head"), (["--model", "huge"], "--model"),
    (["--device", "cuda"], "--device"), (["--data", "nowhere"], "--data nowhere"),
    (["--seq-len", "4000"], "too few"), (["--n-expert", "5", "--n-active", "1"], "--n-active 1"),
])
def test_a_bad_flag_is_one_line(flags, tmp_path, capsys, words, said):
    with stopped(capsys, said):
        train_tst.main([*flags, *words, "--out", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name, change, said", [
    ("retrieval_train_1.bin", lambda old: old[:-10], "cut off"),
    ("retrieval_train_1.bin", lambda old: old[1024:], "not in llm.c's format"),
    ("retrieval_train_1.bin", lambda old: old[:1024] + b"\xff" * 40_000, "another tokenizer"),
    ("meta.json", lambda old: b"vocab_size: 300", "not JSON"),
    ("meta.json", lambda old: b'{"vocab_size": 300}', "not JSON with tokenizer"),
    ("meta.json", lambda old: b'{"vocab_size": null, "tokenizer": "mine"}', "not JSON with"),
    ("retrieval_val_0.bin", None, "no *_val_*.bin")])
def test_data_that_are_damaged_or_of_another_kind_are_named(
        flags, corpus, tmp_path, capsys, name, change, said):
    file = shutil.copytree(corpus, tmp_path / "retrieval") / name
    content = change(file.read_bytes()) if change else b""
    file.unlink()
    if change:
        file.write_bytes(content)
    with stopped(capsys, name if change else "retrieval", said):
        train_tst.main([*flags, "--data", str(file.parent), "--out", str(tmp_path / "run")])


@pytest.mark.parametrize("name", ["data/python", "data/python/", "./data/python"])
def test_the_built_in_corpus_has_its_path_by_any_name(flags, tmp_path, monkeypatch, name):
    from tools import corpus
    monkeypatch.setattr(corpus, "build_python_corpus", lambda: exit("made"))
    with pytest.raises(SystemExit, match="made"):
        train_tst.main([*flags, "--data", name, "--out", str(tmp_path / "run")])


def test_a_full_disk_keeps_the_last_checkpoint(flags, tmp_path, capsys, monkeypatch):
    real = torch.save

    def save(state, path):
        if state["step"] > 4:
            path.write_bytes(b"half")
            raise RuntimeError("unexpected pos 64 vs 0")        # torch's words for a full disk
        real(state, path)

    monkeypatch.setattr(torch, "save", save)
    with stopped(capsys, "ckpt.tmp cannot be written", "--resume"):
        train_tst.main([*flags, "--out", str(tmp_path / "run")])
    assert train_tst.load_checkpoint(tmp_path / "run")["step"] == 4
    assert not (tmp_path / "run/ckpt.tmp").exists()


def test_a_loss_that_is_not_finite_ends_the_run(flags, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        train_tst.main([*flags, "--out", str(tmp_path / "run"), "--lr", "1e11",
                        "--warmup-steps", "1"])
    assert end.value.code == 1 and "with a --lr below 1e+11" in capsys.readouterr().err


def test_a_broken_compiler_leaves_the_run_eager(run, flags, tmp_path, capsys, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch, "compile", broken)
    train_tst.main([*flags, "--out", str(tmp_path / "other"), "--compile"])
    assert "this run is eager (RuntimeError('no compiler'))" in capsys.readouterr().out
    assert numbers(tmp_path / "other") == numbers(run)
