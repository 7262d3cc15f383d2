"""Where in its context does a model gain? Validation loss by position in the row, for runs of study/run.py.

    python study/context.py "--s 1" "--s 6 --r 0.2"                     # named by their flags

The last line is the loss on the first half of each row when it is read a second time, right after the first.
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
    """The mean loss, nats, in each of PARTS equal parts of ROWS validation rows, and of their first halves again."""
    model, l = load_model(out)[0], args["seq_len"]
    _, tokens, *_ = data.load(HERE.parent / args["data"])
    rows = [tokens.read(k * (len(tokens) - l - 1) // (ROWS - 1), l + 1) for k in range(ROWS)]
    plain, again = (torch.stack([loss_of(model, row) for row in group]).mean(0) for group in (
        rows, [np.tile(row[:l // 2], 2) for row in rows]))
    return [part.mean().item() for part in (*plain.tensor_split(PARTS), again[l // 2:])]


@torch.no_grad()
def loss_of(model, row):
    """row (n,) tokens -> (n - 1,), the loss of each but the first."""
    inputs, targets = data.bags(torch.from_numpy(row)[None], 1, 1)
    return F.cross_entropy(model(inputs)[0], targets[0, :, 0], reduction="none")


def main(*runs):
    torch.set_num_threads(1)
    done = {flags: finished(folder(flags)) for flags in runs}
    if not runs or None in done.values():
        unfinished = [flags for flags in runs if not done[flags]]
        raise SystemExit(f"study/context.py: name runs that study/run.py has made, by their flags: {unfinished}")
    columns = [losses(folder(flags), args) for flags, (args, _) in done.items()]
    print("| positions | " + " | ".join(f"`{flags}`" for flags in runs) + " |\n" + "| --- " * (len(runs) + 1) + "|")
    seq_len = done[runs[0]][0]["seq_len"]
    names = [f"{part[0]} to {part[-1]}" for part in np.array_split(np.arange(1, seq_len + 1), PARTS)]
    for name, row in zip([*names, f"1 to {seq_len // 2}, again"], zip(*columns)):
        print(f"| {name} | " + " | ".join(f"{loss:.3f}" for loss in row) + " |")


if __name__ == "__main__":
    main(*sys.argv[1:])
