"""When does a run learn to copy? study/copying.csv has the answer for the ten runs of `home`.

    python study/copying.py --s 6 --r 0.2 --data data/c --steps 4800 --seed 18 --save-every 100
    python study/copying.py                 # draws the CSV file

The first command trains. For each checkpoint it appends the losses on a text and its repetition.
"""
import csv
import sys

import numpy as np
import torch
from run import ROOT, read_rows

import data
import train_tst

FILE, ROWS, LENGTH = ROOT / "study" / "copying.csv", 256, 48        # two copies have 96 tokens


@torch.no_grad()
def measure(model, tokens):
    """(loss on LENGTH tokens, loss on their repetition), in nats per token."""
    text = tokens.rows(np.linspace(0, len(tokens) - LENGTH - 1, ROWS).astype(int), LENGTH)
    rows = torch.cat((text, text), 1)                                   # (ROWS, 2 * LENGTH)
    log_p = model(rows[:, :-1].unsqueeze(2)).log_softmax(-1)
    loss = -log_p.gather(-1, rows[:, 1:].unsqueeze(2)).squeeze(2)       # (ROWS, 2 * LENGTH - 1)
    return loss[:, :LENGTH - 1].mean().item(), loss[:, LENGTH:].mean().item()


def save_and_measure(run, model, optimizer, scaler, meta, entry, *rest, save=train_tst.Run.save):
    save(run, model, optimizer, scaler, meta, entry, *rest)
    losses = measure(model, data.load(run.args.data)[1])
    line = "{},{},{},{:.4f},{:.4f}\n".format(run.args.seed, run.args.s, entry["step"], *losses)
    with FILE.open("a") as file:
        file.write(line)


def draw():
    from matplotlib import pyplot
    lines = list(csv.DictReader(FILE.read_text().splitlines()))
    losses = {(row["seed"], row["s"]): float(row["val_loss"]) for row in read_rows()
              if row["experiment"] == "home"}
    seeds = sorted({line["seed"] for line in lines})
    _, axes = pyplot.subplots(1, len(seeds), figsize=(11, 2.8), sharey=True, layout="constrained")
    for ax, seed in zip(axes, seeds):
        for s, name in (("1", "baseline"), ("6", "TST")):
            points = sorted((int(line["step"]), float(line["first"]) - float(line["second"]))
                            for line in lines if (line["seed"], line["s"]) == (seed, s))
            ax.plot(*zip(*points), label=name)
        ax.set(title=f"seed {seed}, {losses[seed, '6'] - losses[seed, '1']:+.3f}", xlabel="step")
    axes[0].set_ylabel("gain by copying (nats per token)")
    axes[0].legend()
    pyplot.savefig(FILE.with_suffix(".png"), dpi=120)


if __name__ == "__main__":
    train_tst.Run.save = save_and_measure
    train_tst.main(sys.argv[1:]) if sys.argv[1:] else draw()
