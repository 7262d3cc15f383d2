"""Where in its context does a model gain? Validation loss by position in the row, for the runs of an experiment.

    python study/context.py seeds       # after `python study/run.py seeds`; means over the seeds
"""
import statistics
import sys
from collections import defaultdict

from run import EXPERIMENTS, HERE, finished, folder

import numpy as np
import torch
import torch.nn.functional as F

import data
from model import load_model

ROWS, PARTS = 1000, 8


def losses(out, args):
    """The mean next-token loss, nats, in each of PARTS equal parts of the row, over ROWS rows of validation data."""
    model, l = load_model(out)[0], args["seq_len"]
    tokens = data.Stream(sorted((HERE.parent / args["data"]).glob("*val*.bin")), model.config.vocab_size)
    found = []
    for k in range(ROWS):
        row = tokens.read(k * (len(tokens) - l - 1) // (ROWS - 1), l + 1)
        inputs, targets = data.bags(torch.from_numpy(row.astype(np.int64))[None], 1, 1)
        with torch.no_grad():
            found.append(F.cross_entropy(model(inputs)[0], targets[0, :, 0], reduction="none"))
    return [part.mean().item() for part in torch.stack(found).mean(0).tensor_split(PARTS)]


def main(experiment):
    torch.set_num_threads(1)
    found, l = defaultdict(list), None
    for flags in EXPERIMENTS[experiment]:
        if finished(folder(flags)):
            args, _ = finished(folder(flags))
            l, method = args["seq_len"], flags.split(" --seed")[0]
            found[method].append(losses(folder(flags), args))
    print("| positions | " + " | ".join(f"`{method}`" for method in found) + " |\n" + "| --- " * (len(found) + 1) + "|")
    for k, part in enumerate(np.array_split(np.arange(1, l + 1), PARTS)):
        means = [statistics.mean(seed[k] for seed in seeds) for seeds in found.values()]
        print(f"| {part[0]} to {part[-1]} | " + " | ".join(f"{mean:.3f}" for mean in means) + " |")


if __name__ == "__main__":
    main(*sys.argv[1:])
