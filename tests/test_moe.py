"""What must hold of a mixture of experts: its arithmetic, its balance, its training, its export."""
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, VOCAB
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import data
import model as models
import train_tst
from model import GPT, PRESETS, Config, MoE, SwiGLU
from tools import export, plan, sample

SMALL = Config(n_layer=2, n_embd=32, n_head=4, n_kv_head=2, n_hidden=24, n_expert=5, n_active=2,
               head_dim=16, qk_norm=True, vocab_size=VOCAB, seq_len=16)     # heads: twice the width


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def layer(dtype=torch.float64, **shape):
    """One layer's experts, with weights so large that the choice is clear-cut."""
    experts = MoE(replace(SMALL, **shape)).to(dtype)
    for p in experts.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return experts


@pytest.fixture
def moe_flags(flags):
    return [*flags, "--n-expert", "5", "--n-active", "2", "--qk-norm", "--n-hidden", "24"]


def numbers(out):
    """The log without its times."""
    entries = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{name: entry[name] for name in entry if name != "seconds"} for entry in entries]


# The arithmetic

def by_hand(experts, x):
    """The sum over a token's experts, and the balance loss, a token at a time."""
    n_expert, k, tokens = len(experts.gate_up), experts.n_active, x.flatten(0, 1)
    used, mean, rows = torch.zeros(n_expert, dtype=x.dtype), 0, []
    for token in tokens:
        p = (experts.router.weight @ token).softmax(0)
        chosen = p.argsort(descending=True)[:k].tolist()
        row = 0
        for e in chosen:
            gate, up = (experts.gate_up[e] @ token).chunk(2)
            row = row + p[e] / p[chosen].sum() * (experts.down[e] @ (F.silu(gate) * up))
            used[e] += 1 / (k * len(tokens))
        rows.append(row)
        mean = mean + p / len(tokens)
    return torch.stack(rows).view_as(x), n_expert * (used * mean).sum(), used.max()


@pytest.mark.parametrize("shape", [(3, 7), (1, 16), (1, 1)])
@pytest.mark.parametrize("n_expert, n_active", [(5, 2), (8, 3), (4, 4), (16, 1)])
def test_a_layer_is_the_loop_over_its_tokens(shape, n_expert, n_active):
    experts = layer(n_expert=n_expert, n_active=n_active)
    x = torch.randn(*shape, 32, dtype=torch.float64, requires_grad=True)
    y, load = experts(x)
    slow, balance, largest = by_hand(experts, x)
    torch.testing.assert_close(y, slow)
    torch.testing.assert_close(load, torch.stack((balance, largest)))
    inputs, direction = [x, *experts.parameters()], torch.randn_like(y)
    for fast, slow in zip(torch.autograd.grad((y * direction).sum() + 3 * load[0], inputs),
                          torch.autograd.grad((slow * direction).sum() + 3 * balance, inputs)):
        torch.testing.assert_close(fast, slow)


def test_one_expert_is_the_dense_layer():
    experts, dense = layer(n_expert=1, n_active=1), SwiGLU(SMALL).double()
    dense.gate_up.weight.data, dense.down.weight.data = experts.gate_up[0], experts.down[0]
    x = torch.randn(2, 7, 32, dtype=torch.float64)
    torch.testing.assert_close(experts(x)[0], dense(x)[0])
    assert experts(x)[1].tolist() == [1, 1]


def test_an_expert_without_a_token_gets_no_gradient_and_one_token_alone_is_served():
    experts = layer(n_active=1)
    with torch.no_grad():
        experts.router.weight.zero_()
        experts.router.weight[1] = 1                            # expert 1 likes positive tokens
        experts.router.weight[3] = -1                           # and 3 negative ones
    x = torch.rand(1, 9, 32, dtype=torch.float64)
    x[0, 4] *= -1
    y, load = experts(x)
    torch.testing.assert_close(y, by_hand(experts, x)[0])
    assert load[1] == 8 / 9
    (y.sum() + load[0]).backward()
    used = [bool(grad.any()) for grad in experts.down.grad]
    assert used == [False, True, False, True, False]
    assert all(p.grad.isfinite().all() for p in experts.parameters())


def test_balance_is_1_where_all_are_used_alike_and_grows_to_e_over_k():
    experts = layer(n_expert=4, n_active=1)
    experts.router.weight.data = 100 * torch.eye(4, 32, dtype=torch.float64)
    everyone = torch.eye(4, 32, dtype=torch.float64).unsqueeze(0)
    assert experts(everyone)[1].tolist() == pytest.approx([1, 1 / 4])
    assert experts(everyone[:, :1])[1].tolist() == pytest.approx([4, 1])


def test_one_product_for_all_experts_is_the_loop_over_them(monkeypatch):
    if not hasattr(F, "grouped_mm"):
        pytest.skip("PyTorch before 2.10")
    experts, x = layer(torch.float32, n_active=1), torch.randn(2, 7, 32, requires_grad=True)
    experts.router.weight.data[2] = 0                           # someone may go without

    def run():
        with torch.autocast("cpu", torch.bfloat16):
            y, load = experts(x)
        (y.float().square().sum() + load[0]).backward()
        grads = [p.grad for p in (x, *experts.parameters())]
        x.grad = None
        experts.zero_grad()
        return [y, load, *grads]

    calls, real = [], F.grouped_mm
    monkeypatch.setattr(F, "grouped_mm", lambda *a, **k: calls.append(1) or real(*a, **k))
    grouped = run()
    assert len(calls) == 2 and grouped[0].dtype == torch.bfloat16
    monkeypatch.delattr(F, "grouped_mm")
    for one, other in zip(grouped, run()):
        torch.testing.assert_close(one, other, rtol=0.02, atol=0.02 * other.abs().max().item())


def test_probabilities_are_in_float32_where_the_weights_are_bfloat16():
    y, load = layer(torch.bfloat16)(torch.randn(1, 9, 32).bfloat16())       # as under FSDP
    assert (y.dtype, load.dtype) == (torch.bfloat16, torch.float32)


@pytest.mark.skipif(not hasattr(F, "grouped_mm"), reason="PyTorch before 2.10")
def test_products_in_one_never_wait_to_hear_how_many_tokens_an_expert_has():
    """On fake tensors every read of a value on the host raises."""
    with FakeTensorMode():
        experts, x = MoE(SMALL), torch.randn(2, 7, 32, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16):
            y, load = experts(x)
        (y.sum() + load[0]).backward()
        assert experts.down.grad.shape == experts.down.shape
        with pytest.raises(DataDependentOutputException):
            experts(x)                  # in float32: the loop


def test_blocks_are_compiled_once_whatever_the_counts_are():
    for dtype, graphs in ((torch.bfloat16, 1), (torch.float32, None)):
        torch._dynamo.reset()
        counter, model = CompileCounter(), GPT(SMALL)
        whole = dtype == torch.bfloat16 and hasattr(F, "grouped_mm")
        for block in model.blocks:
            block.compile(backend=counter, dynamic=False, fullgraph=whole)
        for step, s in enumerate((6, 6, 1, 1)):
            with torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16):
                loss = model(*data.bags(torch.randint(0, VOCAB, (2, 17 * s)), s, s))
            (loss + model.load[0]).backward()
            first = counter.frame_count if step == 0 else first
        assert counter.frame_count == first and (first == 1 or not whole)


# Parameters and FLOPs

def test_the_papers_model_has_its_parameters():
    for vocabulary, total, active in ((151_936, 10_489_144_832, 1_429_448_192),
                                      (50_257, 10_176_931_328, 1_117_234_688)):
        with torch.device("meta"):
            model = GPT(replace(PRESETS["10b-a1b"], vocab_size=vocabulary))
        assert sum(p.numel() for p in model.parameters()) == total
        assert sum(model.active(p) for p in model.parameters()) == active
        assert active - 2 * model.embedding.weight.numel() == 962_700_800


def test_experts_are_initialised_and_decayed_like_any_matrix():
    model = GPT(replace(SMALL, n_embd=64, n_hidden=64, init_std=0.03))
    experts = model.blocks[1].mlp
    for p, std in ((experts.router.weight, 0.03), (experts.gate_up, 0.03), (experts.down, 0.015)):
        assert p.std().item() == pytest.approx(std, rel=0.2) and abs(p.mean()) < 0.1 * std
    decayed, gains = train_tst.make_optimizer(model, 0.1).param_groups
    assert decayed["weight_decay"] == 0.1 and gains["weight_decay"] == 0
    for p in experts.parameters():
        assert any(p is q for q in decayed["params"])
    assert all(p.ndim == 1 for p in gains["params"])


@pytest.mark.parametrize("s", [1, 6])
def test_a_superposed_step_costs_the_flops_of_a_baseline_step(s):
    model, rows = GPT(SMALL), torch.randint(0, VOCAB, (3, 17 * s))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        (model(*data.bags(rows, s, s)) + model.load[0]).backward()
    assert counter.get_total_flops() == model.flops_per_position() * 3 * 16


# Training

def test_training_adds_the_balance_of_each_micro_batch_and_logs_the_loss_without(
        moe_flags, corpus, tmp_path, monkeypatch):
    grads, real = [], torch.nn.utils.clip_grad_norm_

    def clip(parameters, limit):
        parameters = list(parameters)
        grads.append([p.grad.clone() for p in parameters])
        return real(parameters, limit)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip)
    train_tst.main([*moe_flags, "--micro-batch-size", "2", "--out", str(tmp_path / "run")])
    log = numbers(tmp_path / "run")
    torch.manual_seed(0)
    args = json.loads((tmp_path / "run/args.json").read_text())
    model = GPT(Config(**{name: args[name] for name in train_tst.SHAPE}, vocab_size=VOCAB))
    tokens, *_ = data.load(corpus)
    batches, loss, load = data.Batches(tokens, [(6, 3, 3), (6, 1, 1)], 8, 16, 0), 0, 0
    for first in (0, 2, 4, 6):
        loss = loss + model(*data.bags(batches.rows(0, first, 2), 3, 3)) / 4
        load = load + model.load / 4
    assert log[0]["loss"] == pytest.approx(loss.item(), rel=1e-6)
    assert [log[0]["balance"], log[0]["largest_share"]] == pytest.approx(load.tolist(), rel=1e-6)
    expected = torch.autograd.grad(loss + 1e-3 * 2 * load[0], list(model.parameters()))
    for ours, theirs in zip(grads[0], expected):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-7)
    router = [name.endswith("router.weight") for name, _ in model.named_parameters()].index(True)
    plain = torch.autograd.grad(
        model(*data.bags(batches.rows(0, 0, 8), 3, 3)), list(model.parameters()))
    assert (grads[0][router] - plain[router]).abs().max() > 1e-5    # so the last lines saw it


def test_the_load_is_the_mean_over_the_layers():
    model, loads = GPT(SMALL), []
    for block in model.blocks:
        block.register_forward_hook(lambda block, inputs, output: loads.append(output[1]))
    model(torch.randint(0, VOCAB, (2, 16, 3)))
    assert loads[0].tolist() != loads[1].tolist()
    torch.testing.assert_close(model.load, (loads[0] + loads[1]) / 2)


def test_the_balance_loss_is_in_no_logged_loss_and_makes_use_even(moe_flags, tmp_path, monkeypatch):
    def run(name, weight, *more):
        monkeypatch.setattr(train_tst, "BALANCE", weight)
        train_tst.main([*moe_flags, "--out", str(tmp_path / name), *more])
        return numbers(tmp_path / name)

    assert run("none", 0.0, "--lr", "0") == run("much", 100.0, "--lr", "0")
    assert run("free", 0.0)[-1]["balance"] > 1.001 + run("even", 1.0)[-1]["balance"] - 1


def test_it_resumes_exactly_and_in_bfloat16_it_trains(moe_flags, tmp_path):
    for name, more in (("float32", []), ("bfloat16", ["--dtype", "bfloat16"])):
        out, again = tmp_path / name, tmp_path / f"{name}-again"
        train_tst.main([*moe_flags, *more, "--out", str(out)])
        again.mkdir()
        shutil.copy(out / "ckpt_switch.pt", again / "ckpt.pt")
        train_tst.main([*moe_flags, *more, "--out", str(again), "--resume"])
        assert numbers(again) == numbers(out)[6:]
        ours, theirs = (models.load_checkpoint(folder)["model"] for folder in (again, out))
        assert "blocks.1.mlp.gate_up" in ours
        assert all(torch.equal(ours[parameter], theirs[parameter]) for parameter in theirs)


IN_FLOAT64 = """
import sys
import torch
torch.set_default_dtype(torch.float64)
sys.path.insert(0, {root!r})
import train_tst
policy = train_tst.MixedPrecisionPolicy         # whose second argument is the sums' dtype
train_tst.MixedPrecisionPolicy = lambda low, sums, **more: policy(low, torch.float64, **more)
train_tst.main(sys.argv[1:])
"""


def test_one_process_ddp_and_fsdp_train_the_same_over_the_switch(moe_flags, tmp_path):
    """In float64: in float32 rounding may flip a choice. 5 experts do not halve, either."""
    script, logs = tmp_path / "driver.py", {}
    script.write_text(IN_FLOAT64.format(root=str(ROOT)))
    words = [*moe_flags, "--micro-batch-size", "2"]             # the same ones in all three
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    for name, command in (("one", [sys.executable, str(script), *words]),
                          ("ddp", [*launch, "--", str(script), *words]),
                          ("fsdp", [*launch, "--", str(script), *words, "--fsdp"])):
        done = subprocess.run([*command, "--out", str(tmp_path / name)], capture_output=True,
                              text=True, timeout=200, env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stderr
        logs[name] = numbers(tmp_path / name)
    assert [entry["s"] for entry in logs["one"]] == 6 * [3] + 6 * [1]
    for name in ("ddp", "fsdp"):
        for ours, theirs in zip(logs[name], logs["one"]):
            for field in ("loss", "balance", "largest_share"):
                assert ours[field] == pytest.approx(theirs[field], rel=1e-10)
    one, fsdp = (models.load_checkpoint(tmp_path / name)["model"] for name in ("one", "fsdp"))
    for name in one:
        torch.testing.assert_close(fsdp[name], one[name], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("words, said", [
    (["--n-active", "6"], "--n-active 6"), (["--n-expert", "-1"], "--n-expert -1"),
    (["--n-active", "0"], "--n-active 0")])
def test_a_shape_that_does_not_fit_is_one_line(moe_flags, capsys, words, said):
    with pytest.raises(SystemExit) as end:
        train_tst.parse([*moe_flags, *words])
    assert end.value.code == 2 and said in capsys.readouterr().err


def test_a_small_preset_follows_from_tiny():
    tiny, moe = PRESETS["tiny"], PRESETS["tiny-moe"]
    assert replace(moe, n_hidden=tiny.n_hidden, n_expert=0, qk_norm=False) == tiny
    assert (moe.n_expert, moe.n_active) == (8, 2)
    args = train_tst.parse(["--model", "tiny-moe", "--device", "cpu"])
    assert args.out.startswith("runs/tiny-moe-s") and args.data == "data/python" and args.qk_norm


# Tools

def test_the_export_is_qwens_model_with_the_same_logits_and_the_same_words(moe_flags, tmp_path):
    transformers = pytest.importorskip("transformers", minversion="5")
    train_tst.main([*moe_flags, "--head-dim", "16", "--out", str(tmp_path / "run")])
    export.main([str(tmp_path / "run"), str(tmp_path / "hf")])
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert type(theirs) is transformers.Qwen3MoeForCausalLM
    model, _ = sample.load_model(tmp_path / "run")
    ids = torch.randint(0, VOCAB, (2, 16))
    with torch.no_grad():
        logits = model(ids[..., None])[..., :VOCAB]
        torch.testing.assert_close(theirs(ids).logits, logits, rtol=1e-4, atol=1e-4)
    start = ids[0, :5].tolist()
    words = theirs.generate(ids[:1, :5], attention_mask=torch.ones(1, 5, dtype=torch.int64),
                            max_new_tokens=10, min_new_tokens=10, do_sample=False, eos_token_id=-1)
    assert words[0, 5:].tolist() == list(sample.generate(model, start, 10, temperature=0))


def test_what_hugging_face_has_no_class_for_is_not_exported(flags, tmp_path, capsys):
    pytest.importorskip("transformers")
    train_tst.main([*flags, "--n-expert", "4", "--out", str(tmp_path / "run")])
    with pytest.raises(SystemExit):
        export.main([str(tmp_path / "run"), str(tmp_path / "hf")])
    assert "qk_norm" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_plan_knows_a_mixture_of_experts(dtype, capsys, monkeypatch):
    monkeypatch.setattr(train_tst, "WORLD", 1)
    plan.main(["--json", "--model", "10b-a1b", "--n-layer", "2", "--dtype", dtype,
               "--no-compile", "--vocab-size", "151936"])
    found = json.loads(capsys.readouterr().out)
    layers = 2 / 32
    assert found["active_parameters"] == pytest.approx(962_700_800 * layers + 2 * 151_936 * 1536,
                                                       rel=1e-5)
    attention = 12 * 2 * 24 * 128 * 4096
    weights = found["active_parameters"] - 151_936 * 1536
    assert found["model_flops_per_step"] == pytest.approx(
        (6 * weights + attention) * 2048 * 4096, rel=1e-4)
    assert found["superposition_tokens"] == 12_496 * 2048 * 4096 * 16
    assert found["memory_per_device"]["activations"] > 1e8


def test_the_papers_hours_say_how_well_its_gpus_were_used():
    found = plan.paper()
    assert found["10b-a1b, 125k steps"] == pytest.approx(0.126, abs=0.001)
    assert found["10b-a1b, 50k steps"] == pytest.approx(0.130, abs=0.001)
