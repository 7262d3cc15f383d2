"""Draw the losses of any number of runs in one picture.

    python tools/plot.py runs/tiny-s1-r0-seed0 runs/tiny-s4-r0.2-seed0 --out loss.png

A line with markers is the validation loss. A thin line is the training loss, as means over
hundredths of a phase. It is pale in the superposition phase, because a bag loss cannot be compared
with a next-token loss. A dotted line is the switch.
"""
import argparse
import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import fail


def read_log(run):
    """The entries of a run's metrics.jsonl, as dicts. SystemExit(2) if there are none."""
    path = Path(run, "metrics.jsonl")
    try:
        lines = path.read_text().split("\n")[:-1]       # a run may be writing the last line
        entries = [json.loads(line) for line in lines]
    except (OSError, ValueError) as error:
        fail(f"{path} is not the log of a run ({type(error).__name__}). Name the folder of a run.")
    return entries or fail(f"{path} has no step yet. Wait for the first step.")


def main(argv=None):
    """Draw what argv (default: the command line) says. SystemExit(2) on bad input."""
    parser = argparse.ArgumentParser(description="Draw the losses of runs.", allow_abbrev=False)
    parser.error, flag = fail, parser.add_argument
    flag("runs", nargs="+", metavar="RUN", help="the folders of the runs")
    flag("--x", choices=("steps", "tokens", "seconds"), default="steps",
         help="the horizontal axis (default: steps)")
    flag("--out", default="loss.png", help="the file of the picture (default: loss.png)")
    args = parser.parse_args(argv)
    args.out = args.out if Path(args.out).suffix else f"{args.out}.png"
    try:
        from matplotlib.figure import Figure
    except ImportError:
        fail("Pictures need one more package. Run: pip install matplotlib")
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.subplots()
    x = "step" if args.x == "steps" else args.x         # a field of the log
    for k, run in enumerate(args.runs):
        log, color = read_log(run), f"C{k}"
        for phase, alpha in (("superposition", 0.3), ("recovery", 0.65)):
            entries = [entry for entry in log if entry["phase"] == phase]
            if entries:
                groups = np.array_split(entries, min(100, len(entries)))
                axes.plot([group[-1][x] for group in groups],
                          [np.mean([entry["loss"] for entry in group]) for group in groups],
                          color=color, alpha=alpha, linewidth=1)
            if entries and phase != log[-1]["phase"]:
                axes.axvline(entries[-1][x], color=color, linestyle=":", linewidth=1.2)
        validated = [entry for entry in log if entry["val_loss"] is not None]
        axes.plot([entry[x] for entry in validated], [entry["val_loss"] for entry in validated],
                  color=color, marker="o", markersize=4, label=Path(run).resolve().name)
    axes.set(xlabel=args.x, ylabel="loss (nats per token)")
    axes.grid(alpha=0.25)
    axes.legend(title="dots: validation loss, thin lines: training loss\n"
                      "pale: bag loss, dotted: the switch")
    try:
        figure.savefig(args.out, dpi=150)
    except (OSError, ValueError) as error:
        fail(f"--out {args.out} cannot be written ({error}). Choose another file.")
    print(f"{args.out} is drawn.")


if __name__ == "__main__":
    main()
