"""Where in its context does a model gain? Validation loss by position in the row, for runs of study/run.py.

    python study/context.py "--s 1" "--s 3" "--s 3 --seed 2"            # named by their flags
"""
import sys

from run import HERE, finished, folder

import numpy as np
import torch
import torch.nn.functional as F

import data
from model import load_model

ROWS, PARTS = 1000, 8


def losses(out, args):
    """The mean next-token loss, nats, in each of PARTS equal parts of the row, over ROWS rows of validation data."""
    model, l = load_model(out)[0], args["seq_len"]
    _, tokens, *_ = data.load(HERE.parent / args["data"])
    found = []
    for k in range(ROWS):
        row = tokens.read(k * (len(tokens) - l - 1) // (ROWS - 1), l + 1)
        inputs, targets = data.bags(torch.from_numpy(row.astype(np.int64))[None], 1, 1)
        with torch.no_grad():
            found.append(F.cross_entropy(model(inputs)[0], targets[0, :, 0], reduction="none"))
    return [part.mean().item() for part in torch.stack(found).mean(0).tensor_split(PARTS)]


def main(*runs):
    torch.set_num_threads(1)
    done = {flags: finished(folder(flags)) for flags in runs}
    if not runs or None in done.values():
        unfinished = [flags for flags in runs if not done[flags]]
        raise SystemExit(f"study/context.py: name runs that study/run.py has made, by their flags: {unfinished}")
    columns = [losses(folder(flags), args) for flags, (args, _) in done.items()]
    print("| positions | " + " | ".join(f"`{flags}`" for flags in runs) + " |\n" + "| --- " * (len(runs) + 1) + "|")
    seq_len = done[runs[0]][0]["seq_len"]
    for part, row in zip(np.array_split(np.arange(1, seq_len + 1), PARTS), zip(*columns)):
        print(f"| {part[0]} to {part[-1]} | " + " | ".join(f"{loss:.3f}" for loss in row) + " |")


if __name__ == "__main__":
    main(*sys.argv[1:])
