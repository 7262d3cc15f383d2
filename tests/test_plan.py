"""tools/plan.py: what a run will take."""
import json

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

import train_tst
from model import Block, Config
from tools import plan


@pytest.fixture
def planned(monkeypatch, capsys):
    def run(flags):
        monkeypatch.setattr(train_tst, "WORLD", 1)      # the plan sets it
        plan.main(["--json", *flags.split()])
        return json.loads(capsys.readouterr().out)
    return run


def test_a_plan_counts_parameters_tokens_and_hours(planned, capsys):
    found = planned("--model tiny --s 6 --r 0.2 --devices 2 --mfu 0.5")
    assert found["parameters"] == found["active_parameters"] == 473_760
    assert found["superposition_tokens"] == 480 * 32 * 96 * 6       # steps, rows, positions, s
    assert found["recovery_tokens"] == 1920 * 32 * 96
    flops = (6 * (473_760 - 1024 * 96 - 7 * 96) + 12 * 3 * 96 * 96) * 2400 * 32 * 96
    assert found["hours"] == pytest.approx(flops / (2 * 0.5 * 989e12) / 3600)
    assert planned("--model tiny-moe")["active_parameters"] == 752_688      # 2 of 8 experts
    with pytest.raises(SystemExit):
        plan.main(["--mfu", "40"])
    assert capsys.readouterr().err.count("\n") == 1


def test_planned_memory_is_the_measured_and_what_autograd_keeps(planned):
    assert planned("--model 270m")["memory_gb"] == pytest.approx(20.5 + 2.1, rel=0.15)     # H200
    whole, eighth = (planned("--model 3b --devices 8" + more) for more in ("", " --fsdp"))
    assert whole["weights_gradients_adamw_gb"] == 8 * eighth["weights_gradients_adamw_gb"]
    kept, block = {}, Block(Config(1, 96, 4, 4, 192))
    with saved_tensors_hooks(lambda x: kept.update({x.untyped_storage().data_ptr(): x}), id):
        block(torch.zeros(2, 96, 96, requires_grad=True), torch.zeros(2, 96, 24))
    size = sum(x.untyped_storage().nbytes() for x in kept.values())
    known = 2 * 96 * 2 * 96 + sum(p.numel() for p in block.parameters())    # CPU norms keep more
    found = planned("--model tiny --n-layer 1 --batch-size 2 --dtype float32 --no-compile")
    assert size - 4 * known == pytest.approx(found["activations_gb"] * 1e9, rel=0.03)
