"""What must hold of a mixture of experts: its arithmetic, its balance, its training, its export."""
import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, VOCAB, export_and_load, log, message_of, run_script
from torch._dynamo.testing import CompileCounter

import train_tst
from model import GPT, Config, MoE, multi_hot_cross_entropy
from tools import export

SMALL = Config(n_layer=2, n_embd=32, n_head=4, n_kv_head=2, n_hidden=24, n_expert=5, n_active=2,
               head_dim=16, qk_norm=True, vocab_size=VOCAB, seq_len=16)     # head_dim is not 32 / 4


@pytest.fixture
def moe_flags(flags):
    return [*flags, "--n-expert", "5", "--n-active", "2", "--qk-norm", "--n-hidden", "24"]


def random_experts(dtype, **shape):
    """A layer of experts. Its weights are so large that rounding does not change the choices."""
    experts = MoE(replace(SMALL, **shape)).to(dtype)
    for p in experts.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return experts


def random_batch(s):
    bags = torch.randint(0, VOCAB, (2, 17, s))
    return bags[:, :-1], bags[:, 1:]


# The arithmetic

def all_experts_for_all_tokens(experts, x):
    """The output and the balance loss of a layer, where a token's other experts have weight 0."""
    tokens, n_expert = x.flatten(0, 1), len(experts.gate_up)
    p = (tokens @ experts.router.weight.T).softmax(1)                           # (N, E)
    chosen = torch.zeros_like(p).scatter(1, p.argsort(descending=True)[:, :experts.n_active], 1)
    weight = p * chosen / (p * chosen).sum(1, keepdim=True)
    y = 0
    for e in range(n_expert):
        gate, up = (tokens @ experts.gate_up[e].T).chunk(2, dim=1)
        y = y + weight[:, e:e + 1] * ((F.silu(gate) * up) @ experts.down[e].T)
    used = chosen.mean(0) / experts.n_active            # fraction of the choices, for each expert
    return y.view_as(x), n_expert * (used * p.mean(0)).sum()


@pytest.mark.parametrize("rows, l", [(3, 7), (1, 1)])   # with one token, some experts have no token
@pytest.mark.parametrize("n_expert, n_active", [(5, 2), (8, 3)])
def test_the_output_of_a_layer_is_the_weighted_sum_of_the_chosen_experts(
        rows, l, n_expert, n_active):
    experts = random_experts(torch.float64, n_expert=n_expert, n_active=n_active)
    x = torch.randn(rows, l, 32, dtype=torch.float64, requires_grad=True)
    ours, expected = (experts(x), experts.balance), all_experts_for_all_tokens(experts, x)
    torch.testing.assert_close(ours, expected)
    inputs, direction = [x, *experts.parameters()], torch.randn_like(x)
    torch.testing.assert_close(*(torch.autograd.grad((y * direction).sum() + 3 * balance, inputs)
                                 for y, balance in (ours, expected)))


@pytest.mark.skipif(not hasattr(F, "grouped_mm"), reason="PyTorch before 2.10")
def test_the_grouped_product_equals_the_loop_over_the_experts():
    experts = random_experts(torch.float32, n_expert=40)        # 14 tokens leave experts unused
    x = torch.randn(2, 7, 32, requires_grad=True)

    def output_and_gradients(grouped):
        experts.grouped = grouped
        with torch.autocast("cpu", torch.bfloat16):
            y = experts(x)
        assert (y.dtype, experts.balance.dtype) == (torch.bfloat16, torch.float32)
        loss = y.float().square().sum() + experts.balance
        return [y, loss, *torch.autograd.grad(loss, [x, *experts.parameters()])]

    for ours, expected in zip(output_and_gradients(True), output_and_gradients(False)):
        assert (ours - expected).abs().max() < 0.02 * expected.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_are_compiled_once_for_every_s_and_all_counts(dtype):
    torch._dynamo.reset()
    counter, model, graphs = CompileCounter(), GPT(SMALL), set()
    for block in model.blocks:
        block.compile(backend=counter, dynamic=False)
    for s in (6, 6, 1, 1):
        with torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16):
            model(*random_batch(s)).backward()
        graphs.add(counter.frame_count)
    assert len(graphs) == 1             # no graph was added after the first step
    if dtype == torch.bfloat16 and hasattr(F, "grouped_mm"):
        # The grouped product does not read the counts. The loop reads them, which splits the graph
        assert graphs == {1}


# Training and export

def test_the_balance_loss_changes_the_gradient_but_not_the_reported_loss():
    model, (inputs, targets) = GPT(SMALL).double(), random_batch(3)
    balances, parameters = [], list(model.parameters())
    for block in model.blocks:
        block.mlp.register_forward_hook(lambda mlp, *_: balances.append(mlp.balance))
    # A loss so small that rounding would change it if the balance loss was added and subtracted
    model.loss = lambda *arguments: GPT.loss(model, *arguments) / 1e6
    plain, balance = multi_hot_cross_entropy(model(inputs), targets) / 1e6, sum(balances) / 2
    loss = model(inputs, targets)
    assert torch.equal(loss, plain)
    torch.testing.assert_close(
        torch.autograd.grad(loss, parameters),
        torch.autograd.grad(plain + 1e-3 * 2 * balance, parameters), rtol=1e-6, atol=1e-15)
    copy.deepcopy(model)                # fails if a module still holds a tensor with a graph


IN_FLOAT64 = """
import torch
torch.set_default_dtype(torch.float64)
import train_tst
policy = train_tst.MixedPrecisionPolicy         # its second argument is the dtype of the sums
train_tst.MixedPrecisionPolicy = lambda dtype, _, **more: policy(dtype, torch.float64, **more)
train_tst.main()
"""


def test_one_process_ddp_and_fsdp_train_the_same_model_over_the_switch(
        moe_flags, tmp_path, monkeypatch):
    """In float64, because rounding in float32 can change the experts of a token.

    The 5 experts cannot be sharded into two equal halves.
    """
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    (tmp_path / "script.py").write_text(IN_FLOAT64)
    expected = None
    for name, processes, more in (("one", 1, []), ("ddp", 2, []), ("fsdp", 2, ["--fsdp"])):
        out = tmp_path / name
        run_script(tmp_path / "script.py", *moe_flags, "--micro-batch-size", "2", *more,
                   "--out", out, processes=processes)
        found = [(entry["loss"], entry["val_loss"] or 0) for entry in log(out)]
        weights = dict(train_tst.load_checkpoint(out)["model"])
        expected = expected or (found, weights)
        assert found == [pytest.approx(entry, rel=1e-10) for entry in expected[0]]
        torch.testing.assert_close(weights, expected[1], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("n_hidden", [24, 22])      # 22 is not a multiple of 8
def test_the_export_is_a_qwen3_moe_in_versions_4_and_5_of_transformers(
        moe_flags, tmp_path, n_hidden):
    if n_hidden % 8:                    # versions 5.0 to 5.3 compute only multiples of 8
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


@pytest.mark.parametrize("shape, flag", [
    (dict(qk_norm=False), "--qk-norm"), (dict(n_expert=0, qk_norm=False, n_head=6), "--n-head 6")])
def test_a_model_that_transformers_does_not_have_is_not_exported(shape, flag, capsys):
    model = GPT(replace(SMALL, **shape))
    assert flag in message_of(capsys, lambda _: export.hugging_face(model, None))
