"""examples/hf_trainer.py passes examples/check_port.py: its loss, and its Trainer at the switch."""
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

transformers = pytest.importorskip("transformers", "5.2")
pytest.importorskip("accelerate")
from examples import hf_trainer
from examples.check_port import Spy, check_port

V = 100


def test_the_example_passes_every_check_of_a_port(tmp_path):
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=V, hidden_size=32, num_hidden_layers=2, num_attention_heads=4))
    embed, bags = model.get_input_embeddings(), torch.randint(V, (8, 9, 4))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(50):                 # because a new model hides mistakes
        hf_trainer.superposed_loss(model, embed, bags).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    args = transformers.TrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    ours, theirs = hf_trainer.SuperposedTrainer(model, args), transformers.Trainer(model, args)

    def loss_of(rows, s):
        return ours.compute_loss(model, hf_trainer.collate(
            [{"tokens": row, "s": s} for row in rows]))

    def own_loss(rows):
        return theirs.compute_loss(model, {"input_ids": rows, "labels": rows})
    assert check_port(loss_of, V, own_loss, [embed.weight]) == []


def test_a_run_reads_bags_in_the_first_r_of_its_steps(corpus, monkeypatch, capsys):
    spy, compute_loss = Spy(), hf_trainer.SuperposedTrainer.compute_loss

    def spied(self, model, inputs, *args, **named):
        bags, step = inputs["bags"], self.state.global_step
        spy.record(step, bags[:, :-1], bags[:, 1:], model.training, self.optimizer)
        return compute_loss(self, model, inputs, *args, **named)
    monkeypatch.setattr(hf_trainer, "PYTHON_CORPUS", corpus)
    monkeypatch.setattr(hf_trainer.SuperposedTrainer, "compute_loss", spied)
    hf_trainer.main(["--steps", "10", "--s", "3", "--r", "0.4"])
    assert spy.check(s=3, l=hf_trainer.SEQ_LEN, switch=4) == []
    assert len(spy) == 10 + 64          # steps of training, then batches of validation
    assert "validation loss" in capsys.readouterr().out


def test_check_port_run_by_itself_passes_our_model_and_the_example():
    done = subprocess.run([sys.executable, "examples/check_port.py"], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.stdout.splitlines() == ["model.py: every check passed",
                                        "examples/hf_trainer.py: every check passed"], done.stderr
