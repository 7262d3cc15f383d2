"""The loss curves of any runs, in one picture.

    python tools/plot.py runs/tiny-s1-r0-seed0 runs/tiny-s4-r0.2-seed0 --out loss.png

Thin: the training loss, means over hundredths of a phase; paler in the superposition phase, whose
multi-hot loss does not compare. With markers: the validation loss. Dotted: the switch.
"""
import argparse
import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import fail


def read_log(run):
    """The lines of a run's metrics.jsonl, as dicts. SystemExit(2) if there are none."""
    path = Path(run, "metrics.jsonl")
    try:
        lines = path.read_text().split("\n")[:-1]       # a run may be writing the last one
        return [json.loads(line) for line in lines] or fail(f"{path}: no step is logged yet")
    except (OSError, ValueError) as error:
        fail(f"{path}: no log of train_tst.py ({error}); name a run's folder")


def main(argv=None):
    """Plot as argv says (default: the command line). SystemExit(2) on bad input."""
    parser = argparse.ArgumentParser(description="Plot the losses of runs.", allow_abbrev=False)
    parser.error, flag = fail, parser.add_argument
    flag("runs", nargs="+", metavar="RUN", help="folders of runs")
    flag("--x", choices=("steps", "tokens", "seconds"), default="steps", help="(default: steps)")
    flag("--out", default="loss.png", help="the picture (default: loss.png)")
    args = parser.parse_args(argv)
    try:
        from matplotlib.figure import Figure
    except ImportError:
        fail("plots need one more package: pip install matplotlib")
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.subplots()
    x = "step" if args.x == "steps" else args.x         # a field of the log
    for k, run in enumerate(args.runs):
        log, color = read_log(run), f"C{k}"
        for phase, alpha in (("superposition", 0.3), ("recovery", 0.65)):
            lines = [line for line in log if line["phase"] == phase]
            if lines:
                parts = np.array_split(lines, min(100, len(lines)))
                axes.plot([part[-1][x] for part in parts],
                          [np.mean([line["loss"] for line in part]) for part in parts],
                          color=color, alpha=alpha, linewidth=1)
            if lines and phase == "superposition":
                axes.axvline(lines[-1][x], color=color, linestyle=":", linewidth=1.2)
        measured = [line for line in log if line["val_loss"] is not None]
        axes.plot([line[x] for line in measured], [line["val_loss"] for line in measured],
                  color=color, marker="o", markersize=4, label=Path(run).resolve().name)
    axes.set(xlabel=args.x, ylabel="loss (nats a token)")
    axes.grid(alpha=0.25)
    axes.legend(title="validation (thin: training, paler: in bags; dotted: the switch)")
    try:
        figure.savefig(args.out, dpi=150)
    except (OSError, ValueError) as error:
        fail(f"--out {args.out}: cannot write it ({error})")
    print(f"{args.out} shows {len(args.runs)} runs")


if __name__ == "__main__":
    main()
