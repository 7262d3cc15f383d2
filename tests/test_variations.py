"""Each of examples/variations.py trains over the switch, with the loss that it defines."""
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import VOCAB, log, run_script

import data
import train_tst
from model import GPT, Config

VARIATIONS = ["halves --half output", "halves", "weighting", "shrinking --s 8", "tables",
              "optimizer", "tied"]


def test_every_variation_trains_and_its_first_loss_is_the_one_that_it_defines(
        flags, corpus, tmp_path):
    def first_loss(variation):          # in a run of 12 steps
        name, *more = variation.split()
        run_script("examples/variations.py", name, *flags, *more, "--out", tmp_path / variation)
        entries = log(tmp_path / variation)
        assert len(entries) == 12 and entries[-1]["s"] == 1
        return entries[0]["loss"]

    with ThreadPoolExecutor(2) as pool:
        found = dict(zip(VARIATIONS, pool.map(first_loss, VARIATIONS)))
    torch.manual_seed(0)
    args = train_tst.parse([*flags])
    model = GPT(Config(**{name: getattr(args, name) for name in train_tst.SHAPE}, vocab_size=VOCAB))
    bags = data.Batches(data.load(corpus)[0], 12, 6, 3, 8, 16, 0).rows(0, 0, 8).view(8, 17, 3)
    tokens, inputs, targets = bags.flatten(1), bags[:, :-1], bags[:, 1:]
    with torch.no_grad():
        of_bags = model(inputs).log_softmax(-1).gather(-1, targets)             # (8, 16, 3)
        next_three = torch.stack([tokens[:, i:i + 16] for i in (1, 2, 3)], -1)
        single = model(tokens[:, :16, None]).log_softmax(-1).gather(-1, next_three)
        model.head.weight = model.embedding.weight
        tied = model(inputs).log_softmax(-1).gather(-1, targets)
    expected = {"halves": of_bags[..., 0], "halves --half output": single, "tied": tied,
                "weighting": of_bags @ torch.tensor([6.0, 3.0, 2.0]) / 11,
                "tables": of_bags, "optimizer": of_bags}        # unchanged until the switch
    for name, log_p in expected.items():
        assert found[name] == pytest.approx(-log_p.mean().item(), abs=1e-6), name
