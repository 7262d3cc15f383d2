"""Each of examples/variations.py trains over the switch, and some have a number only theirs."""
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import ROOT, VOCAB

import data
import train_tst
from model import GPT, Config

NAMES = {"halves": ["--half", "output"], "input": [], "weighting": [], "shrinking": ["--s", "8"],
         "tables": [], "optimizer": [], "tied": []}             # "input" is the other of halves


@pytest.fixture(scope="module")
def first_losses(flags, tmp_path_factory):
    """{variation: its loss at step 1}, of runs of 12 steps over the switch."""
    def first_loss(name):
        out = tmp_path_factory.mktemp(name) / "run"
        script = [sys.executable, "examples/variations.py", name.replace("input", "halves")]
        done = subprocess.run([*script, *flags, *NAMES[name], "--out", str(out)],
                              capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0, done.stderr
        log = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        assert len(log) == 12 and log[-1]["s"] == 1
        return log[0]["loss"]

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(NAMES, pool.map(first_loss, NAMES)))


def test_every_variation_trains_and_has_the_loss_that_only_it_gives(first_losses, flags, corpus):
    torch.manual_seed(0)
    args = train_tst.parse([*flags])
    model = GPT(Config(**{name: getattr(args, name) for name in train_tst.SHAPE}, vocab_size=VOCAB))
    bags = data.Batches(data.load(corpus)[0], 12, 6, 3, 8, 16, 0).rows(0, 0, 8).view(8, 17, 3)
    tokens, inputs, targets = bags.flatten(1), bags[:, :-1], bags[:, 1:]
    with torch.no_grad():
        log_p = model(inputs).log_softmax(-1)
        single = model(tokens[:, :16, None]).log_softmax(-1)
        model.head.weight = model.embedding.weight
        tied = model(inputs).log_softmax(-1).gather(-1, targets)
    of_bags = log_p.gather(-1, targets)                         # (8, 16, 3)
    next_three = torch.stack([tokens[:, i:i + 16] for i in (1, 2, 3)], -1)
    expected = {"input": of_bags[..., 0], "halves": single.gather(-1, next_three), "tied": tied,
                "weighting": of_bags @ torch.tensor([6.0, 3.0, 2.0]) / 11,
                "tables": of_bags, "optimizer": of_bags}        # as without, until the switch
    for name, log_p in expected.items():
        assert first_losses[name] == pytest.approx(-log_p.mean().item(), abs=1e-6), name
    assert len(set(first_losses.values())) >= 5                 # so that each change was seen
