"""examples/hf_trainer.py: Trainer's own loss at s = 1, the four checks of a port, the switch."""
import math

import pytest
import torch
from conftest import VOCAB

transformers = pytest.importorskip("transformers", "5.2")
pytest.importorskip("accelerate")
from examples import hf_trainer


@pytest.fixture
def model():
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4))


def look(model, bags):
    """The loss of bags (B, l+1, s), and the logits (B, l, V) that it is taken of."""
    seen = []
    hook = model.register_forward_hook(lambda module, given, output: seen.append(output.logits))
    with torch.no_grad():
        loss = hf_trainer.superposed_loss(model, model.get_input_embeddings(), bags)
    hook.remove()
    return loss, seen[0]


@pytest.mark.parametrize("s", [1, 4, 16])
def test_the_first_loss_is_log_v(model, s):
    bags = torch.randint(0, VOCAB, (4, 12, s))
    assert look(model, bags)[0].item() == pytest.approx(math.log(VOCAB), abs=0.03)


@pytest.mark.parametrize("s", [1, 3])           # a bag of equal tokens is that token
def test_bags_of_one_token_have_trainers_own_loss(model, tmp_path, s):
    args = transformers.TrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    rows = torch.randint(0, VOCAB, (4, 12))
    theirs = transformers.Trainer(model, args).compute_loss(
        model, {"input_ids": rows, "labels": rows})
    ours = hf_trainer.SuperposedTrainer(model, args).compute_loss(
        model, hf_trainer.collate([{"tokens": row.numpy().repeat(s), "s": s} for row in rows]))
    torch.testing.assert_close(ours, theirs)


def test_the_order_of_tokens_in_a_bag_changes_nothing(model):
    bags = torch.randint(0, VOCAB, (4, 12, 4))
    torch.testing.assert_close(look(model, bags.flip(2)), look(model, bags))


def test_bag_j_plus_1_is_the_target_of_position_j_and_nothing_that_it_sees(model):
    bags = torch.randint(0, VOCAB, (4, 12, 4))
    for j in (0, 5, 10):
        other = bags.clone()
        other[:, j + 1] = (other[:, j + 1] + 1) % VOCAB
        equal = (look(model, other)[1] == look(model, bags)[1]).all(2)
        assert equal[:, :j + 1].all() and not equal[:, j + 1:].any()
        # Rows that end with bag j+1 have no position that reads it, and position j is their last
        assert abs(look(model, other[:, :j + 2])[0] - look(model, bags[:, :j + 2])[0]) > 1e-4


def test_a_run_reads_bags_in_the_first_r_of_its_steps(corpus, monkeypatch, capsys):
    seen, loss = [], hf_trainer.superposed_loss
    monkeypatch.setattr(hf_trainer, "PYTHON_CORPUS", corpus)
    monkeypatch.setattr(hf_trainer, "superposed_loss", lambda model, embed, bags: (
        seen.append((model.training, *bags.shape)) or loss(model, embed, bags)))
    hf_trainer.main(["--steps", "10", "--s", "3", "--r", "0.4"])
    positions = hf_trainer.SEQ_LEN + 1
    assert seen[:10] == 4 * [(True, 16, positions, 3)] + 6 * [(True, 16, positions, 1)]
    assert seen[10:] == 64 * [(False, 16, positions, 1)]        # validation
    assert "validation loss" in capsys.readouterr().out
