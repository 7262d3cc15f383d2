"""What must hold of a mixture of experts: its arithmetic, its balance, its training, its export."""
import copy
import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, VOCAB, export_and_load
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode

import train_tst
from model import GPT, Config, MoE, multi_hot_cross_entropy
from tools import export

SMALL = Config(n_layer=2, n_embd=32, n_head=4, n_kv_head=2, n_hidden=24, n_expert=5, n_active=2,
               head_dim=16, qk_norm=True, vocab_size=VOCAB, seq_len=16)     # heads: twice the width


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def moe_flags(flags):
    return [*flags, "--n-expert", "5", "--n-active", "2", "--qk-norm", "--n-hidden", "24"]


def layer(dtype=torch.float64, **shape):
    """One layer's experts, with weights so large that the choice is clear-cut."""
    experts = MoE(replace(SMALL, **shape)).to(dtype)
    for p in experts.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return experts


def batch(s):
    bags = torch.randint(0, VOCAB, (2, 17, s))
    return bags[:, :-1], bags[:, 1:]


def numbers(out):                       # the log without its times
    return [{**json.loads(line), "seconds": 0} for line in open(out / "metrics.jsonl")]


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
    return torch.stack(rows).view_as(x), n_expert * (used * mean).sum()


@pytest.mark.parametrize("rows, l", [(3, 7), (1, 1)])          # one token leaves experts without
@pytest.mark.parametrize("n_expert, n_active", [(5, 2), (8, 3), (4, 4)])
def test_a_layer_is_the_loop_over_its_tokens(rows, l, n_expert, n_active):
    experts = layer(n_expert=n_expert, n_active=n_active)
    x = torch.randn(rows, l, 32, dtype=torch.float64, requires_grad=True)
    ours, theirs = (experts(x), experts.balance), by_hand(experts, x)
    torch.testing.assert_close(ours, theirs)
    inputs, direction = [x, *experts.parameters()], torch.randn_like(x)
    torch.testing.assert_close(*(
        torch.autograd.grad((y * direction).sum() + 3 * balance, inputs)
        for y, balance in (ours, theirs)))


@pytest.mark.skipif(not hasattr(F, "grouped_mm"), reason="PyTorch before 2.10")
def test_one_product_for_all_experts_is_the_loop_over_them_without_its_waits():
    experts = layer(torch.float32, n_expert=40)     # so that some of them go without
    x = torch.randn(2, 7, 32, requires_grad=True)

    def run(grouped):
        experts.grouped = grouped
        with torch.autocast("cpu", torch.bfloat16):
            y = experts(x)
        assert (y.dtype, experts.balance.dtype) == (torch.bfloat16, torch.float32)
        loss = y.float().square().sum() + experts.balance
        return [y, loss, *torch.autograd.grad(loss, [x, *experts.parameters()])]

    for one, other in zip(run(True), run(False)):
        torch.testing.assert_close(one, other, rtol=0.02, atol=0.02 * other.abs().max().item())
    with FakeTensorMode(), torch.autocast("cpu", torch.bfloat16):   # which have no values to read
        MoE(SMALL)(torch.randn(2, 7, 32)).sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_are_compiled_once_whatever_s_and_the_counts_are(dtype):
    torch._dynamo.reset()
    counter, model, graphs = CompileCounter(), GPT(SMALL), set()
    for block in model.blocks:
        block.compile(backend=counter, dynamic=False)
    for s in (6, 6, 1, 1):
        with torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16):
            model(*batch(s)).backward()
        graphs.add(counter.frame_count)
    in_one = dtype == torch.bfloat16 and hasattr(F, "grouped_mm")
    assert graphs == {1} if in_one else len(graphs) == 1


def test_the_papers_model_has_its_parameters():
    shape = {name: value for name, value in train_tst.PRESETS["10b-a1b"].items()
             if name in train_tst.SHAPE}
    with torch.device("meta"):
        model = GPT(Config(**shape, vocab_size=151_936))
    assert sum(p.numel() for p in model.parameters()) == 10_489_144_832
    active = [p.numel() // 16 if p.ndim == 3 else p.numel() for p in model.parameters()]
    assert sum(active) == 1_429_448_192             # 8 of 128 experts are


# Training and export

def test_the_balance_loss_changes_the_gradient_and_not_the_value():
    model, (inputs, targets) = GPT(SMALL).double(), batch(3)
    model.loss = lambda *given: GPT.loss(model, *given) / 1e6   # so small that a sum would round it
    balances = []
    for block in model.blocks:
        block.mlp.register_forward_hook(lambda mlp, *_: balances.append(mlp.balance))
    plain, balance = multi_hot_cross_entropy(model(inputs), targets) / 1e6, sum(balances) / 2
    loss, parameters = model(inputs, targets), list(model.parameters())
    assert torch.equal(loss, plain)
    torch.testing.assert_close(
        torch.autograd.grad(loss, parameters),
        torch.autograd.grad(plain + 1e-3 * 2 * balance, parameters), rtol=1e-6, atol=1e-15)
    copy.deepcopy(model)                # which a tensor with a graph, left there, would prevent


IN_FLOAT64 = """
import torch
torch.set_default_dtype(torch.float64)
import train_tst
policy = train_tst.MixedPrecisionPolicy         # whose second argument is the sums' dtype
train_tst.MixedPrecisionPolicy = lambda low, sums, **more: policy(low, torch.float64, **more)
train_tst.main()
"""


def test_one_process_ddp_and_fsdp_train_the_same_over_the_switch(moe_flags, tmp_path, monkeypatch):
    """In float64: in float32 rounding may flip a choice. 5 experts do not halve, either."""
    script, logs, models = tmp_path / "script.py", {}, {}
    script.write_text(IN_FLOAT64)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    words = [str(script), *moe_flags, "--micro-batch-size", "2"]    # the same ones in all three
    two = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--", *words]
    for name, command in (("one", words), ("ddp", two), ("fsdp", [*two, "--fsdp"])):
        done = subprocess.run([sys.executable, *command, "--out", str(tmp_path / name)],
                              capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr
        logs[name] = [(e["loss"], e["val_loss"] or 0) for e in numbers(tmp_path / name)]
        models[name] = dict(train_tst.load_checkpoint(tmp_path / name)["model"])
    for name in ("ddp", "fsdp"):
        assert logs[name] == [pytest.approx(entry, rel=1e-10) for entry in logs["one"]]
        torch.testing.assert_close(models[name], models["one"], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("n_hidden", [24, 22])      # 22 is not a multiple of 8
def test_the_export_is_qwens_model_in_versions_4_and_5_of_transformers(
        moe_flags, tmp_path, n_hidden):
    if n_hidden % 8:                    # earlier versions 5 compute only multiples of 8
        pytest.importorskip("transformers", minversion="5.4")
    train_tst.main([*moe_flags, "--head-dim", "16", "--n-hidden", str(n_hidden),
                    "--rope-theta", "500000", "--out", str(tmp_path / "run")])
    theirs, config, shapes = export_and_load(tmp_path / "run", tmp_path / "hf")
    assert type(theirs).__name__ == "Qwen3MoeForCausalLM"
    expected = dict(rope_theta=500_000, num_experts=5, num_experts_per_tok=2, norm_topk_prob=True)
    assert expected.items() <= config.items() and "num_local_experts" not in config
    projections = dict(gate=[n_hidden, 32], up=[n_hidden, 32], down=[32, n_hidden])
    expected = {f"model.layers.{i}.mlp.experts.{e}.{name}_proj.weight": shape
                for i in range(2) for e in range(5) for name, shape in projections.items()}
    assert {name: shape for name, shape in shapes.items() if "experts" in name} == expected


@pytest.mark.parametrize("shape, wrong", [
    (dict(qk_norm=False), "experts but no --qk-norm"),
    (dict(n_expert=0), "--qk-norm but no experts"),
    (dict(n_expert=0, qk_norm=False, n_head=6), "--n-embd 32, which --n-head 6 does not divide")])
def test_a_model_that_transformers_does_not_have_is_not_exported(shape, wrong, capsys):
    with pytest.raises(SystemExit) as end:
        export.hugging_face(GPT(replace(SMALL, **shape)), None)
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.count("\n") == 1 and wrong in said
