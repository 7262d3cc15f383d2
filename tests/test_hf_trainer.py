"""examples/hf_trainer.py passes examples/check_port.py: its loss, and its Trainer at the switch."""
import pytest
import torch
from conftest import run_script

transformers = pytest.importorskip("transformers", "5.2")
pytest.importorskip("accelerate")
from examples import hf_trainer
from examples.check_port import Spy, check_port


def test_the_example_passes_every_check_of_a_port(tmp_path):
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=100, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)).eval()
    for p in model.parameters():        # weights as large as after training
        torch.nn.init.normal_(p, std=0.3)
    args = transformers.TrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    ours, theirs = hf_trainer.SuperposedTrainer(model, args), transformers.Trainer(model, args)

    def loss_of(rows, s):
        return ours.compute_loss(model, hf_trainer.collate(
            [{"tokens": row, "s": s} for row in rows]))

    def own_loss(rows):
        return theirs.compute_loss(model, {"input_ids": rows, "labels": rows})
    assert check_port(loss_of, 100, own_loss, [model.get_input_embeddings().weight]) == []


def test_a_run_reads_bags_in_the_first_r_of_its_steps(corpus, monkeypatch):
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


def test_check_port_as_a_script_passes_our_model_and_the_example():
    assert run_script("examples/check_port.py").splitlines() == [
        "model.py: every check passed", "examples/hf_trainer.py: every check passed"]
