"""What users of train_tst.py meet: the run's folder, resuming, several processes, bad input."""
import fcntl
import functools
import io
import os
import runpy
import shutil
import signal
import sys
import threading
from datetime import timedelta
from unittest.mock import Mock

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, log, losses, message_of, run_script

import data
import train_tst
from tools import corpus as corpora


def signal_in_step(step, monkeypatch, *signals):
    """Send the signals to this process in that step of the next run."""
    real, steps = torch.nn.utils.clip_grad_norm_, iter(range(1, step + 1))

    def clip(*args, **kwargs):
        if next(steps, None) == step:
            for number in signals:
                os.kill(os.getpid(), number)
        return real(*args, **kwargs)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip)


# The folder of a run

def test_a_run_leaves_its_log_its_checkpoints_and_what_sampling_needs(run, corpus):
    assert [len(split) for split in data.load(corpus)[:2]] == [60_000, 3_000]   # "retrieval_..."
    entries = log(run)
    assert [entry["step"] for entry in entries] == list(range(1, 13))
    assert set(entries[0]) == {"step", "phase", "s", "loss", "lr", "val_loss", "val_bpb", "tokens",
                               "s_tokens", "seconds"}
    validated = [entry["step"] for entry in entries if entry["val_loss"]]
    assert validated == [4, 6, 8, 12]           # every 4 steps, and at the switch
    assert entries[-1]["tokens"] == 8 * 16 * (6 * 3 + 6) and entries[-1]["s_tokens"] == 8 * 16 * 12
    assert {path.name for path in run.iterdir()} == {
        "args.json", "meta.json", "encoding.json", "metrics.jsonl", "ckpt.pt", "ckpt_switch.pt"}
    for name, step in (("ckpt.pt", 12), ("ckpt_switch.pt", 6)):
        assert train_tst.load_checkpoint(run / name)["step"] == step


# Stopping and resuming

@pytest.mark.parametrize("step, number", [
    (3, signal.SIGTERM), (6, signal.SIGHUP), (9, signal.SIGUSR1)])
def test_a_stopped_and_resumed_run_equals_an_unbroken_run(
        run, flags, tmp_path, step, number, monkeypatch):
    out = tmp_path / "again"
    with monkeypatch.context() as patch:
        signal_in_step(step, patch, number)
        train_tst.main([*flags, "--out", str(out)])
    assert log(out)[-1]["step"] == train_tst.load_checkpoint(out)["step"] == step
    with open(out / "metrics.jsonl", "ab") as file:
        file.write(b"\0" * 99 + b'"step": 4}\n')                # what a power cut can leave
    train_tst.main([*flags, "--out", str(out), "--resume"])
    assert losses(out) == losses(run) and log(out)[-1]["val_loss"] == log(run)[-1]["val_loss"]
    ours, theirs = (train_tst.load_checkpoint(folder)["model"] for folder in (out, run))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_second_ctrl_c_ends_a_run_at_once(flags, tmp_path, monkeypatch):
    signal_in_step(3, monkeypatch, signal.SIGINT, signal.SIGINT)
    with pytest.raises(SystemExit) as end:
        train_tst.main([*flags, "--out", str(tmp_path / "run")])
    assert end.value.code == 130 and len(log(tmp_path / "run")) == 2


def test_a_run_that_failed_leaves_no_lock_and_no_signal_handler(flags, tmp_path, monkeypatch):
    handler = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_: 1 / 0)
        train_tst.main([*flags, "--out", str(tmp_path / "run")])
    assert signal.getsignal(signal.SIGTERM) is handler
    thread = threading.Thread(target=train_tst.main, args=([*flags, "--out", f"{tmp_path}/run"],))
    thread.start()                      # in a notebook; only the main thread can set handlers
    thread.join()
    assert len(log(tmp_path / "run")) == 12


def test_a_folder_is_refused_to_another_run_to_other_flags_and_to_a_second_process(
        run, flags, capsys):
    words = [*flags, "--out", str(run)]
    assert "Add --resume" in message_of(capsys, train_tst.main, *words)
    message = message_of(capsys, train_tst.main, *words, "--resume", "--lr", "0.5")
    assert "--lr is 0.5, but was 0.003" in message
    shutil.copy(run / "ckpt_switch.pt", run / "ckpt.pt")
    before = (run / "metrics.jsonl").read_bytes()
    with open(run / "metrics.jsonl") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        message = message_of(capsys, train_tst.main, *words, "--resume")
        assert "is in use by another process" in message
    assert (run / "metrics.jsonl").read_bytes() == before


def test_a_branch_continues_from_the_switch_after_the_data_have_moved(
        run, flags, corpus, tmp_path):
    (tmp_path / "branch").mkdir()
    moved = shutil.copytree(corpus, tmp_path / "moved")
    (moved / ".retrieval_train_0.bin").write_bytes(b"from macOS")       # hidden files are no shards
    for _ in range(2):                  # the second time as after a kill before the first save
        shutil.copy(run / "ckpt_switch.pt", tmp_path / "branch/ckpt.pt")
        train_tst.main([*flags, "--data", f"{moved}", "--out", f"{tmp_path}/branch", "--resume"])
        assert losses(tmp_path / "branch") == losses(run)[6:]


@pytest.mark.parametrize("add", [True, False])
def test_a_run_resumes_only_with_the_shards_that_it_began_with(
        flags, corpus, tmp_path, capsys, add):
    folder, out = shutil.copytree(corpus, tmp_path / "shards"), tmp_path / "run"
    (folder / "meta.json").write_text('{"tokenizer": "mine", "vocab_size": 300, "hash": "same"}')
    words = [*flags, "--data", str(folder), "--out", str(out)]
    train_tst.main(words)
    shutil.copy(out / "ckpt_switch.pt", out / "ckpt.pt")        # as if the run had stopped there
    first, second, new = (folder / f"retrieval_train_{k}.bin" for k in (1, 2, 9))
    if add:
        corpora.write_shard(new, data.read_shard(first)[:99])
    else:                               # the names and the sizes stay, but the order changes
        first.rename(new), second.rename(first), new.rename(second)
    assert "other shards than the run" in message_of(capsys, train_tst.main, *words, "--resume")


def test_a_run_from_before_shards_were_identified_still_resumes(run, flags, capsys):
    words = [*flags, "--out", str(run), "--resume"]
    checkpoint = torch.load(run / "ckpt_switch.pt", weights_only=True)
    del checkpoint["data"]["shards"]
    torch.save(checkpoint, run / "ckpt.pt")
    train_tst.main(words)
    checkpoint["data"]["hash"] = "other"
    torch.save(checkpoint, run / "ckpt.pt")
    assert "other shards than the run" in message_of(capsys, train_tst.main, *words)


# Several processes, and float16

@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-5), ("float16", 2e-3)])
@pytest.mark.parametrize("more", [[], ["--fsdp"]], ids=["ddp", "fsdp"])
def test_two_processes_train_as_one_does_and_one_can_continue(
        run, flags, tmp_path, monkeypatch, dtype, tolerance, more):
    monkeypatch.setenv("PYTHONWARNINGS", "error::FutureWarning")        # DDP warns of old arguments
    two, one = tmp_path / "two", tmp_path / "one"
    run_script(ROOT / "train_tst.py", *flags, "--dtype", dtype, *more, "--out", two, processes=2)
    assert losses(two) == pytest.approx(losses(run), abs=tolerance)
    one.mkdir()
    shutil.copy(two / "ckpt_switch.pt", one / "ckpt.pt")
    train_tst.main([*flags, "--out", str(one), "--resume"])             # always in float32
    assert losses(one) == pytest.approx(losses(run)[6:], abs=tolerance)


def test_at_the_start_a_process_waits_some_minutes_for_the_others(flags, monkeypatch):
    """torchrun cannot restart a process that waits for a process that has died."""
    monkeypatch.setattr(train_tst, "WORLD", 2)
    monkeypatch.setattr(dist, "init_process_group", join := Mock())
    train_tst.set_up_device(train_tst.parse(flags))
    assert timedelta(minutes=1) <= join.call_args.kwargs["timeout"] <= timedelta(minutes=15)


def test_micro_batches_do_not_change_the_run(run, flags, tmp_path):
    args = train_tst.parse([*flags, "--batch-size", "12", "--micro-batch-size", "5"])
    assert args.micro_batch_size == 4                           # the largest that divides 12
    train_tst.main([*flags, "--out", str(tmp_path / "small"), "--micro-batch-size", "2"])
    assert losses(tmp_path / "small") == pytest.approx(losses(run), abs=1e-5)


def test_float16_skips_steps_that_overflow_and_resumes_with_its_scale(
        flags, tmp_path, monkeypatch):
    scaler = functools.partial(torch.amp.GradScaler, init_scale=2.0 ** 22)
    monkeypatch.setattr(torch.amp, "GradScaler", scaler)
    words = [*flags, "--dtype", "float16", "--out"]
    train_tst.main([*words, str(tmp_path / "whole")])
    skipped = train_tst.load_checkpoint(tmp_path / "whole")
    assert skipped["scaler"]["scale"] < 2.0 ** 20               # halved at every overflow
    assert 3 < next(iter(skipped["optimizer"]["state"].values()))["step"] < 10
    signal_in_step(3, monkeypatch, signal.SIGTERM)
    train_tst.main([*words, str(tmp_path / "again")])
    train_tst.main([*words, str(tmp_path / "again"), "--resume"])
    assert losses(tmp_path / "again") == losses(tmp_path / "whole")


# Bad input

@pytest.mark.parametrize("words, message", [
    (["--s", "0"], "--s: 0"), (["--lr", "nan"], "--lr: nan"), (["--n-head", "3"], "--n-head 3"),
    (["--device", "cuda"], "--device"), (["--data", "nowhere"], "--data nowhere"),
    (["--seq-len", "4000"], "too few"), (["--n-expert", "5", "--n-active", "1"], "--n-active 1"),
    (["--warmup-steps", "13"], "--warmup-steps 13")])
def test_a_bad_flag_gives_one_line(flags, tmp_path, capsys, words, message):
    out = tmp_path / "run"
    assert message in message_of(capsys, train_tst.main, *flags, *words, "--out", out)
    assert not out.exists()


@pytest.mark.parametrize("name, change, message", [
    ("retrieval_train_1.bin", lambda old: old[:-10], "truncated"),
    ("retrieval_train_1.bin", lambda old: old[1024:], "not in llm.c's format"),
    ("retrieval_train_1.bin", lambda old: old[:1024] + b"\xff" * 40_000, "one tokenizer"),
    ("retrieval_val_0.bin", lambda old: old[:8] + b"\1\0\0\0" + old[12:1026], "a *_val_*.bin"),
    ("retrieval_train_0 (1).bin", lambda old: old, "copy of retrieval_train_0 (1).bin"),
    ("meta.json", lambda old: b'{"vocab_size": 300}', "is damaged"),
    ("encoding.json", lambda old: old[:200], "is damaged")])
def test_damaged_data_are_named(flags, corpus, tmp_path, capsys, name, change, message):
    folder = shutil.copytree(corpus, tmp_path / "retrieval")
    original = folder / name.replace(" (1)", "")
    (folder / name).write_bytes(change(original.read_bytes()))
    words = [*flags, "--data", folder, "--out", tmp_path / "run"]
    assert message in message_of(capsys, train_tst.main, *words)


def test_a_full_disk_keeps_the_last_checkpoint(flags, tmp_path, capsys, monkeypatch):
    real = torch.save

    def save(state, path):
        if state["step"] > 4:
            path.write_bytes(b"half")
            raise RuntimeError("unexpected pos 64 vs 0")        # PyTorch's message for a full disk
        real(state, path)

    monkeypatch.setattr(torch, "save", save)
    message = message_of(capsys, train_tst.main, *flags, "--out", tmp_path / "run")
    assert "ckpt.tmp cannot be written" in message
    assert train_tst.load_checkpoint(tmp_path / "run")["step"] == 4
    assert not (tmp_path / "run/ckpt.tmp").exists()


@pytest.mark.parametrize("allocate", [lambda: torch.empty(1 << 60), lambda: data.np.ones(1 << 55)])
def test_a_lack_of_memory_on_a_cpu_gives_one_line(flags, tmp_path, capsys, monkeypatch, allocate):
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_: allocate())
    message = message_of(capsys, train_tst.main, *flags, "--out", tmp_path / "run")
    assert "--micro-batch-size 8 needs more memory" in message


def test_names_that_a_terminal_cannot_print_are_escaped(flags, corpus, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONIOENCODING", "cp1252")            # the encoding of the output
    name = "日本" + os.fsdecode(b"caf\xe9")                      # the second name is in Latin-1
    folder = shutil.copytree(corpus, tmp_path / name)
    printed = run_script(ROOT / "train_tst.py", *flags, "--steps", "1", "--data", folder,
                         "--out", tmp_path / "run")
    assert r"\u65e5\u672ccaf\udce9, 60,000 training tokens" in printed


def test_an_output_stream_can_lack_the_methods_of_a_terminal(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.StringIO())           # Jupyter's streams are similar
    runpy.run_path(str(ROOT / "data.py"))


def test_a_loss_that_is_not_finite_ends_the_run(flags, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        train_tst.main([*flags, "--out", str(tmp_path / "run"), "--lr", "1e11",
                        "--warmup-steps", "1"])
    assert end.value.code == 1 and "with a --lr below 1e+11" in capsys.readouterr().err


def test_without_a_compiler_the_run_is_not_compiled(flags, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch, "compile", Mock(side_effect=RuntimeError("no compiler")))
    train_tst.main([*flags, "--out", str(tmp_path / "run"), "--compile"])
    assert "is not compiled (RuntimeError('no compiler'))" in capsys.readouterr().out
