"""tools/plan.py prints the size, the time and the memory of a run."""
import json

import pytest

import train_tst
from tools import plan


@pytest.fixture
def planned(monkeypatch, capsys):
    def run(flags):
        monkeypatch.setattr(train_tst, "WORLD", 1)      # plan.main sets it
        plan.main(flags.split())
        return json.loads(capsys.readouterr().out)
    return run


def test_a_plan_counts_parameters_tokens_and_hours(planned):
    found = planned("--model tiny --s 6 --r 0.2 --devices 2 --mfu 0.5")
    assert found["parameters"] == found["active_parameters"] == 473_760
    assert found["superposition_tokens"] == 480 * 32 * 96 * 6       # steps, rows, positions, s
    assert found["recovery_tokens"] == 1920 * 32 * 96
    flops = (6 * (473_760 - 1024 * 96 - 7 * 96) + 12 * 3 * 96 * 96) * 2400 * 32 * 96
    assert found["hours"] == pytest.approx(flops / (2 * 0.5 * 989e12) / 3600)
    assert planned("--model tiny-moe")["active_parameters"] == 752_688      # 2 of 8 experts


def test_the_planned_memory_is_near_the_measured_memory(planned):
    assert planned("--model 270m")["memory_gb"] == pytest.approx(22.6, rel=0.06)   # on an H200
    whole, eighth = (planned("--model 3b --devices 8" + more) for more in ("", " --fsdp"))
    assert whole["weights_gradients_adamw_gb"] == 8 * eighth["weights_gradients_adamw_gb"]
