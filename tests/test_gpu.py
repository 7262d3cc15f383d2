"""What must hold on a GPU, as far as a machine without a GPU can tell.

The script trains on a simulated GPU (pretend.py). Fake tensors on "cuda:0" have no values, but they
have the dtypes and the choice of kernels of a GPU. Speed, memory, NCCL and rounding errors need a
real GPU.
"""
import shutil
from unittest.mock import Mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import ROOT, losses, message_of, run_script
from pretend import PretendedGPU
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode

import train_tst
from model import GPT, Config, MoE
from tools import sample

H100, T4, B200 = "NVIDIA H100 80GB HBM3", "Tesla T4", "NVIDIA B200"


@pytest.fixture(scope="module")
def flags(corpus):
    """A run on the default device. Its blocks are larger than DDP's first bucket of 1 MB."""
    return ("--model tiny --n-layer 2 --n-embd 256 --n-head 4 --n-kv-head 2 --n-hidden 512 "
            "--seq-len 16 --batch-size 16 --micro-batch-size 4 --steps 12 --s 3 --r 0.5 "
            f"--eval-every 6 --data {corpus}").split()


@pytest.fixture(scope="module")
def on_cpu(flags, tmp_path_factory):
    """The folder of this run on the CPU."""
    out = tmp_path_factory.mktemp("on_cpu") / "run"
    train_tst.main([*flags, "--out", str(out)])
    return out


# The whole script on simulated GPUs

@pytest.mark.parametrize("card, dtype", [(H100, "bfloat16"), (T4, "float16")])
def test_one_gpu_trains_without_any_flag_for_it(flags, on_cpu, card, dtype, tmp_path, capsys):
    torch._dynamo.reset()
    counters.clear()
    with PretendedGPU(card):
        train_tst.main([*flags, "--out", str(tmp_path)])
        assert f"1 x {card}, {dtype}, compiled" in capsys.readouterr().out
        sample.main([str(tmp_path), "--prompt", "ab", "--tokens", "3"])
        assert capsys.readouterr().out.startswith("ab")
    assert losses(tmp_path) == pytest.approx(losses(on_cpu), abs=1e-4)
    # One graph tries the compiler. In training the blocks share a graph, and the embedding and the
    # loss have a graph for each s. In evaluation each part has a graph for each number of rows
    assert counters["stats"]["unique_graphs"] == 1 + (1 + 2 + 2) + 3 * 2
    scaler = train_tst.load_checkpoint(tmp_path)["scaler"]
    assert bool(scaler) == (dtype == "float16")


@pytest.mark.parametrize("card, more, tolerance", [
    (T4, [], 1e-4), (H100, ["--fsdp"], 2e-2)], ids=["ddp", "fsdp"])     # FSDP uses bfloat16 itself
def test_two_gpus_continue_the_run_of_a_cpu(flags, on_cpu, tmp_path, card, more, tolerance):
    shutil.copy(on_cpu / "ckpt_switch.pt", tmp_path / "ckpt.pt")
    printed = run_script(ROOT / "tests/pretend.py", card, *flags, *more, "--out", tmp_path,
                         "--resume", processes=2)
    assert f"2 x {card}, " in printed and ", compiled" in printed
    assert losses(tmp_path) == pytest.approx(losses(on_cpu)[6:], abs=tolerance)


def test_a_gpu_without_memory_does_not_wait_for_the_others(flags, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_",
                        Mock(side_effect=torch.OutOfMemoryError("CUDA out of memory")))
    monkeypatch.setattr(dist, "is_initialized", lambda: True)   # as if there were other processes
    monkeypatch.setattr(dist, "destroy_process_group",
                        Mock(side_effect=AssertionError("NCCL would wait for them")))
    monkeypatch.setenv("LOCAL_RANK", "1")                       # every process prints this error
    message = message_of(capsys, train_tst.main, *flags, "--out", tmp_path)
    assert "--micro-batch-size 4 needs more memory" in message


@pytest.mark.skipif(not hasattr(F, "grouped_mm"), reason="PyTorch before 2.10")
def test_experts_use_the_grouped_product_except_on_blackwell_where_its_gradient_is_wrong():
    for card, grouped in ((H100, True), (B200, False)):
        with PretendedGPU(card):
            assert MoE(Config(1, 32, 4, 2, 24, n_expert=5)).grouped == grouped


# Fake tensors on "cuda:0"

@pytest.mark.parametrize("dtype, kv_heads", [
    (torch.float32, 4), (torch.float16, 4), (torch.bfloat16, 2)])   # only bfloat16 has fused GQA
def test_activations_have_the_dtype_of_autocast_and_attention_is_fused(
        dtype, kv_heads, monkeypatch):
    attention = Mock(wraps=F.scaled_dot_product_attention)
    monkeypatch.setattr(F, "scaled_dot_product_attention", attention)
    for name in ("uniform_", "normal_"):            # initialising weights needs CUDA's driver
        monkeypatch.setattr(torch.Tensor, name, lambda tensor, *args, **kwargs: tensor)
    with FakeTensorMode(), torch.device("cuda:0"):
        model = GPT(Config(2, 32, 4, 2, 48, qk_norm=True)).requires_grad_(False)
        bags, rope = torch.zeros(2, 16, 3, dtype=torch.int64), torch.zeros(16, 8)
        if dtype != torch.float32:                  # torch.autocast would look for a GPU
            torch.set_autocast_dtype("cuda", dtype)
            torch.set_autocast_enabled("cuda", True)
        stream = [model.embed(bags)]
        for block in model.blocks:
            stream.append(block(stream[-1], (rope, rope)))
        loss = model.loss(stream[-1], bags)
        torch.set_autocast_enabled("cuda", False)
    assert {x.dtype for x in stream} == {dtype} and loss.dtype == torch.float32 and loss.is_cuda
    for call in attention.call_args_list:
        q, k, v = call.args
        assert q.dtype == k.dtype == v.dtype == dtype
        assert (q.size(1), k.size(1), v.size(1)) == (4, kv_heads, kv_heads)
        assert call.kwargs == {"is_causal": True, "enable_gqa": kv_heads < 4}
