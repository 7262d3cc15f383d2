"""What must hold on a GPU, as far as a machine without one can tell.

A pretended GPU (pretend.py) takes the script where CUDA would, and fake tensors on "cuda:0" have
a GPU's dtypes and devices, and its choices of kernels, but no numbers. Speed, memory, NCCL and
bfloat16's rounding are for a real one.
"""
import ast
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from pretend import PretendedGPU
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

import train_tst
from model import GPT, ChunkedHeadLoss, Config, bag_weights
from tools import sample


@pytest.fixture
def gpu():
    with PretendedGPU() as pretended:
        yield pretended


@pytest.fixture(scope="module")
def flags(corpus):
    """Of a run that says nothing of the device, with blocks above DDP's first bucket of 1 MB."""
    return ("--model tiny --n-layer 2 --n-embd 256 --n-head 4 --n-kv-head 2 --n-hidden 512 "
            "--seq-len 16 --batch-size 16 --micro-batch-size 4 --steps 12 --s 3 --r 0.5 "
            f"--eval-every 6 --data {corpus}").split()


@pytest.fixture(scope="module")
def on_cpu(flags, tmp_path_factory):
    """Losses of the same run on the CPU."""
    out = tmp_path_factory.mktemp("on_cpu") / "run"
    train_tst.main([*flags, "--device", "cpu", "--out", str(out)])
    return losses(out)


def losses(out):
    return [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]


def stop_at(step, monkeypatch):
    """Ctrl-C in that step of the run to come."""
    real, steps = torch.nn.utils.clip_grad_norm_, iter(range(1, step + 1))

    def clip(*args, **kwargs):
        if next(steps, None) == step:
            os.kill(os.getpid(), signal.SIGINT)
        return real(*args, **kwargs)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip)


def torchrun(*words, **environment):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
               "--", str(ROOT / "tests/pretend.py"), *words]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=200,
                          env={**os.environ, **environment})


# The whole script

def test_one_gpu_needs_no_flag(flags, on_cpu, gpu, tmp_path, capsys, monkeypatch):
    words = [*flags, "--out", str(tmp_path / "run")]
    with monkeypatch.context() as patch:
        stop_at(3, patch)
        train_tst.main(words)
    assert "1 x NVIDIA H100 80GB HBM3, bfloat16, compiled" in capsys.readouterr().out
    assert len(losses(tmp_path / "run")) == 3
    train_tst.main([*words, "--resume"])
    assert losses(tmp_path / "run") == pytest.approx(on_cpu, abs=1e-4)
    sample.main([str(tmp_path / "run"), "--prompt", "ab", "--tokens", "3"])
    assert capsys.readouterr().out.splitlines()[-1].startswith("ab")


@pytest.mark.parametrize("more", [[], ["--fsdp"]], ids=["ddp", "fsdp"])
def test_two_gpus_go_on_where_one_stopped_and_a_cpu_where_they_did(
        flags, on_cpu, tmp_path, more, monkeypatch):
    out, branch = tmp_path / "run", tmp_path / "branch"
    with monkeypatch.context() as patch, PretendedGPU():
        stop_at(3, patch)
        train_tst.main([*flags, "--out", str(out)])
    done = torchrun(*flags, *more, "--out", str(out), "--resume")
    assert done.returncode == 0, done.stderr
    assert "2 x NVIDIA H100 80GB HBM3, bfloat16, compiled" in done.stdout
    # FSDP's own bfloat16 is of any device
    assert losses(out) == pytest.approx(on_cpu, abs=2e-2 if more else 1e-4)

    branch.mkdir()                      # no CUDA here: device, dtype and compile are this machine's
    shutil.copy(out / "ckpt_switch.pt", branch / "ckpt.pt")
    train_tst.main([*flags, "--out", str(branch), "--resume"])
    assert losses(branch) == pytest.approx(on_cpu[6:], abs=2e-2 if more else 1e-4)

    # One training graph for all blocks, one for the loss, none more at the switch; the others are
    # of evaluation
    for line in done.stdout.splitlines():
        if line.startswith("graphs"):
            graphs = ast.literal_eval(line.removeprefix("graphs "))
            assert graphs.count(("block", True)) == 1
            assert sum(kind == "loss" for kind, _ in graphs) == 1
    assert done.stdout.count("graphs") == 2


def test_the_others_do_not_wait_for_a_gpu_that_ran_out_of_memory(flags, tmp_path):
    done = torchrun(*flags, "--no-compile", "--out", str(tmp_path / "run"),
                    RANK_WITHOUT_MEMORY="1")
    assert done.returncode != 0 and "NCCL would wait" not in done.stderr
    assert "size 4 does not fit on the device: try --micro-batch-size 2" in done.stderr


def test_a_gpu_is_taken_by_its_index_and_one_that_is_not_there_is_named(
        flags, gpu, tmp_path, capsys):
    words = [*flags, "--steps", "2", "--no-compile", "--out", str(tmp_path / "run")]
    with pytest.raises(SystemExit) as end:
        train_tst.main([*words, "--device", "cuda:2"])
    assert end.value.code == 2 and "--device cuda:2 is not on this" in capsys.readouterr().err
    train_tst.main([*words, "--device", "cuda:1"])
    assert gpu.current == 1


def test_the_benchmark_counts_a_kernel_once_and_goes_on_without_what_does_not_fit(
        monkeypatch, capsys):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "what the import says")
    from study import bench
    cpu, cuda = torch.autograd.DeviceType.CPU, torch.autograd.DeviceType.CUDA
    events = [SimpleNamespace(key=key, device_type=device, self_device_time_total=5.0,
                              is_user_annotation=key == "step")
              for key, device in (("aten::mm", cpu), ("gemm", cuda), ("step", cuda))]
    assert bench.spent_by(events, "cuda") == {"gemm": 5.0}

    monkeypatch.setattr(bench, "SECONDS", 0)
    args = SimpleNamespace(device="cpu", clock=time.perf_counter)
    times = bench.race(args, {"listing": Mock(side_effect=torch.OutOfMemoryError("CUDA")),
                              "ours": lambda: time.sleep(0.01)})
    assert "listing does not fit" in capsys.readouterr().out
    assert len(times["ours"]) == 5 and "does not fit" in bench.ratio(times, "listing", "ours")


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
        # In these two a build of PyTorch for the CPU asks for the driver
        if function is torch.Tensor.__getitem__ and isinstance(args[1], slice):
            return torch.ops.aten.slice(args[0], 0, args[1].start, args[1].stop)
        if function is torch.Tensor.copy_:
            return args[0]
        return function(*args, **(kwargs or {}))


@pytest.fixture
def fake(monkeypatch):
    """Modes in which a tensor on "cuda" is a shape, a dtype and a device, without gradients.

    Autograd would ask the driver for the device, in a build for CUDA too. So what the head's loss
    gives its backward is caught where it is stored.
    """
    for draw in ("uniform_", "normal_"):            # initial weights, which autograd would see
        monkeypatch.setattr(torch.Tensor, draw, lambda tensor, *args, **kwargs: tensor)
    with FakeTensorMode(), torch.no_grad(), Calls() as calls:
        yield calls
    torch.set_autocast_enabled("cuda", False)


def bfloat16_products():
    """torch.autocast("cuda", torch.bfloat16), which turns itself off where no GPU is."""
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    torch.set_autocast_enabled("cuda", True)


def small_gpt():
    with torch.device("cuda:0"):
        return GPT(Config(2, 32, 4, 2, 48, vocab_size=300, seq_len=16)).requires_grad_(False)


def test_products_and_stream_are_bfloat16_and_losses_and_gradients_float32(fake):
    model, stream = small_gpt(), set()
    model.blocks[1].register_forward_pre_hook(lambda block, given: stream.add(given[0].dtype))
    bags = torch.zeros(2, 16, 3, dtype=torch.int64, device="cuda:0")
    weights = bag_weights("uniform", 3).to("cuda:0")
    bfloat16_products()
    logits, loss = model(bags), model(bags, bags, weights)
    assert (logits.dtype, loss.dtype) == (torch.bfloat16, torch.float32)
    assert logits.is_cuda and loss.is_cuda and model(bags, bags).is_cuda
    assert stream == {torch.bfloat16}

    for dtype in (torch.bfloat16, torch.float32):           # of the trunk's output
        kept = SimpleNamespace()
        kept.save_for_backward = lambda *tensors: setattr(kept, "saved_tensors", tensors)
        x = torch.zeros(32, 32, dtype=dtype, device="cuda:0")
        loss = ChunkedHeadLoss.forward(kept, x, model.head.weight, bags.flatten(0, 1), weights,
                                       True, model.normalise)
        grad_x, grad_head, *_ = ChunkedHeadLoss.backward(kept, torch.ones((), device="cuda:0"))
        assert loss.dtype == grad_head.dtype == torch.float32
        assert grad_x.dtype == torch.bfloat16 and grad_x.is_cuda and grad_head.is_cuda


def test_attention_has_a_fused_kernel(fake):
    """Flash attention knows GQA, in bfloat16; in float32 there is one that does not."""
    model, bags = small_gpt(), torch.zeros(2, 16, 1, dtype=torch.int64, device="cuda:0")
    model(bags)
    bfloat16_products()
    model(bags)
    assert fake.attention == {(torch.float32, 4, 4, False), (torch.bfloat16, 4, 2, True)}
