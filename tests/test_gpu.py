"""What must hold on a GPU, as far as a machine without one can tell.

A pretended GPU takes the script where CUDA would, and fake tensors on "cuda:0" have a GPU's
dtypes, devices and choices of kernels. Speed, memory, NCCL and rounding are for a real one.
"""
import json
import os
import shutil
import signal
import subprocess
import sys
from unittest.mock import Mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import ROOT
from pretend import PretendedGPU
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

import train_tst
from model import GPT, Config, MoE
from tools import sample

H100, T4, B200 = "NVIDIA H100 80GB HBM3", "Tesla T4", "NVIDIA B200"


@pytest.fixture(scope="module")
def flags(corpus):
    """Of a run that says nothing of the device, with blocks above DDP's first bucket of 1 MB."""
    return ("--model tiny --n-layer 2 --n-embd 256 --n-head 4 --n-kv-head 2 --n-hidden 512 "
            "--seq-len 16 --batch-size 16 --micro-batch-size 4 --steps 12 --s 3 --r 0.5 "
            f"--eval-every 6 --data {corpus}").split()


@pytest.fixture(scope="module")
def on_cpu(flags, tmp_path_factory):
    out = tmp_path_factory.mktemp("on_cpu") / "run"
    train_tst.main([*flags, "--device", "cpu", "--out", str(out)])
    return losses(out)


def losses(out):
    return [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]


def start(card, words, monkeypatch):
    """Three steps of a run on one card, and SIGTERM in the third."""
    real, steps = torch.nn.utils.clip_grad_norm_, iter("123")

    def clip(*args, **kwargs):
        if next(steps) == "3":
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*args, **kwargs)

    with monkeypatch.context() as patch, PretendedGPU(card):
        patch.setattr(torch.nn.utils, "clip_grad_norm_", clip)
        train_tst.main(words)


# The whole script

@pytest.mark.parametrize("card, dtype", [(H100, "bfloat16"), (T4, "float16")])
def test_one_gpu_needs_no_flag(flags, on_cpu, card, dtype, tmp_path, capsys, monkeypatch):
    words = [*flags, "--out", str(tmp_path / "run")]
    start(card, words, monkeypatch)
    assert f"1 x {card}, {dtype}, compiled" in capsys.readouterr().out
    assert len(losses(tmp_path / "run")) == 3
    with PretendedGPU(card):
        train_tst.main([*words, "--resume"])
        assert losses(tmp_path / "run") == pytest.approx(on_cpu, abs=1e-4)
        sample.main([str(tmp_path / "run"), "--prompt", "ab", "--tokens", "3"])
    assert capsys.readouterr().out.splitlines()[-1].startswith("ab")
    assert bool(train_tst.load_checkpoint(tmp_path / "run")["scaler"]) == (dtype == "float16")


@pytest.mark.parametrize("card, more", [(T4, []), (H100, ["--fsdp"])], ids=["ddp", "fsdp"])
def test_two_gpus_go_on_where_one_stopped_and_a_cpu_where_they_did(
        flags, on_cpu, tmp_path, card, more, monkeypatch):
    out, branch = tmp_path / "run", tmp_path / "branch"
    start(card, [*flags, "--out", str(out)], monkeypatch)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--",
         str(ROOT / "tests/pretend.py"), card, *flags, *more, "--out", str(out), "--resume"],
        capture_output=True, text=True, cwd=ROOT, timeout=200)
    assert done.returncode == 0, done.stderr
    assert f"2 x {card}, " in done.stdout and ", compiled" in done.stdout
    # FSDP's own bfloat16 is of any device
    assert losses(out) == pytest.approx(on_cpu, abs=2e-2 if more else 1e-4)

    branch.mkdir()                      # no CUDA here: device, dtype and compile are this machine's
    shutil.copy(out / "ckpt_switch.pt", branch / "ckpt.pt")
    train_tst.main([*flags, "--out", str(branch), "--resume"])
    assert losses(branch) == pytest.approx(on_cpu[6:], abs=2e-2 if more else 1e-4)

    # To train, one graph for all blocks, and one for each s of the two parts that see it
    for rank in (0, 1):
        graphs = json.loads((out / f"graphs{rank}.json").read_text())
        assert [graphs.count([part, True]) for part in ("embed", "block", "loss")] == [2, 1, 2]


def test_a_gpu_without_memory_does_not_wait_for_the_others(flags, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_",
                        Mock(side_effect=torch.OutOfMemoryError("CUDA out of memory")))
    monkeypatch.setattr(dist, "is_initialized", lambda: True)       # the others are pretended too
    monkeypatch.setattr(dist, "destroy_process_group",
                        Mock(side_effect=AssertionError("NCCL would wait for them")))
    monkeypatch.setenv("LOCAL_RANK", "1")                           # whichever it is says so
    with pytest.raises(SystemExit), PretendedGPU(H100):
        train_tst.main([*flags, "--no-compile", "--out", str(tmp_path / "run")])
    assert "--micro-batch-size 4 needs more memory" in capsys.readouterr().err


def test_a_gpu_is_taken_by_its_index_and_one_that_is_not_there_is_named(flags, tmp_path, capsys):
    words = [*flags, "--steps", "2", "--no-compile", "--out", str(tmp_path / "run"), "--device"]
    with PretendedGPU(H100) as gpu:
        with pytest.raises(SystemExit):
            train_tst.main([*words, "cuda:2"])
        assert "--device cuda:2 does not work here" in capsys.readouterr().err
        train_tst.main([*words, "cuda:1"])
        assert gpu.current == 1


@pytest.mark.skipif(not hasattr(F, "grouped_mm"), reason="PyTorch before 2.10")
@pytest.mark.parametrize("card, grouped", [(H100, True), (B200, False)])
def test_experts_have_one_product_but_on_blackwell_where_its_gradient_is_wrong(card, grouped):
    with PretendedGPU(card):
        assert MoE(Config(1, 32, 4, 2, 24, n_expert=5)).grouped == grouped


# Fake tensors

class Calls(TorchFunctionMode):
    """`attention` has q's dtype, the heads of q and k, and enable_gqa, of each call of it."""

    def __init__(self):
        super().__init__()
        self.attention = set()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.scaled_dot_product_attention:
            q, k, v = args
            assert q.dtype == k.dtype == v.dtype
            self.attention.add((q.dtype, q.size(1), k.size(1), kwargs["enable_gqa"]))
        if function is torch.Tensor.__getitem__:    # a build for the CPU would ask for the driver
            rope, i = args                          # rope[0], rope[:, :l]
            return rope.select(0, i) if isinstance(i, int) else rope.narrow(1, 0, i[1].stop)
        return function(*args, **(kwargs or {}))


@pytest.fixture
def fake(monkeypatch):
    """A tensor on "cuda" is a shape, a dtype and a device. Gradients would ask for the driver."""
    for draw in ("uniform_", "normal_"):            # initial weights, which autograd would see
        monkeypatch.setattr(torch.Tensor, draw, lambda tensor, *args, **kwargs: tensor)
    with FakeTensorMode(), torch.no_grad(), Calls() as calls:
        yield calls
    torch.set_autocast_enabled("cuda", False)


@pytest.mark.parametrize("dtype, kv_heads", [       # all fused kernels know GQA in bfloat16 alone
    (torch.float32, 4), (torch.float16, 4), (torch.bfloat16, 2)])
def test_stream_and_products_are_in_autocasts_dtype_and_attention_is_fused(fake, dtype, kv_heads):
    stream = set()
    with torch.device("cuda:0"):
        model = GPT(Config(2, 32, 4, 2, 48, vocab_size=300, seq_len=16)).requires_grad_(False)
        bags = torch.zeros(2, 16, 3, dtype=torch.int64)
    for part in (*model.blocks, model.norm):
        part.register_forward_pre_hook(lambda part, given: stream.add(given[0].dtype))
    if dtype != torch.float32:          # torch.autocast turns itself off where no GPU is
        torch.set_autocast_dtype("cuda", dtype)
        torch.set_autocast_enabled("cuda", True)
    logits, loss = model(bags), model(bags, bags)
    assert (logits.dtype, loss.dtype) == (dtype, torch.float32)
    assert logits.is_cuda and loss.is_cuda and stream == {dtype}
    assert fake.attention == {(dtype, 4, kv_heads, kv_heads < 4)}
