"""The loss curves of any runs, in one picture.

    python tools/plot.py runs/tiny-s1-r0-seed0 runs/tiny-s6-r0.2-seed0 --out loss.png

A thin line is the training loss, smoothed; its paler part is the superposition phase, whose
multi-hot loss does not compare with the rest. The line with markers is the validation loss,
always of next tokens. A dotted line marks the switch.
"""
import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import fail

AXES = {"steps": ("step", "step"), "tokens": ("tokens", "tokens read"),
        "seconds": ("seconds", "seconds of training")}     # the log's field, and how it is called


def read_log(run):
    """The lines of a run's metrics.jsonl, as dicts. SystemExit(2) if there are none."""
    path = Path(run, "metrics.jsonl")
    if not path.exists():
        fail(f"{path}: no log there; name a run's folder, such as runs/tiny-s6-r0.2-seed0")
    lines = path.read_text().split("\n")[:-1]   # a run may be writing the last one now
    try:
        log = [json.loads(line) for line in lines]
    except ValueError:
        fail(f"{path}: not a log of train_tst.py")
    if not log:
        fail(f"{path}: no step is logged yet")
    return log


def smooth(losses, width):
    """The running mean of each loss and the width - 1 before it, or as many as there are."""
    means, total = [], 0.0
    for i, loss in enumerate(losses):
        total += loss
        if i >= width:
            total -= losses[i - width]
        means.append(total / min(i + 1, width))
    return means


def draw(axes, run, log, field, color):
    """Draw one run; losses in nats a token."""
    width = max(1, len(log) // 100)
    for phase, alpha in (("superposition", 0.3), ("recovery", 0.65)):
        part = [line for line in log if line["phase"] == phase]
        losses = smooth([line["loss"] for line in part], width)    # each phase of its own
        axes.plot([line[field] for line in part], losses, color=color, alpha=alpha, linewidth=1)
    measured = [line for line in log if line["val_loss"] is not None]
    axes.plot([line[field] for line in measured], [line["val_loss"] for line in measured],
              color=color, marker="o", markersize=4, linewidth=1.8, label=Path(run).resolve().name)
    for before, after in zip(log, log[1:]):
        if before["phase"] == "superposition" and after["phase"] == "recovery":
            axes.axvline(before[field], color=color, linestyle=":", linewidth=1.2)


def main(argv=None):
    """Plot as argv says (default: the command line). SystemExit(2) on bad input."""
    parser = argparse.ArgumentParser(description="Plot the losses of runs.", allow_abbrev=False)
    parser.error = fail
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders of runs")
    parser.add_argument("--x", choices=tuple(AXES), default="steps", help="(default: steps)")
    parser.add_argument("--out", default="loss.png", help="the picture (default: loss.png)")
    args = parser.parse_args(argv)
    try:
        import matplotlib
        matplotlib.use("Agg")           # a picture, no window
        from matplotlib import pyplot
    except ImportError:
        fail("plots need one more package: pip install matplotlib")
    field, label = AXES[args.x]
    logs = [read_log(run) for run in args.runs]
    figure, axes = pyplot.subplots(figsize=(9, 5.5), layout="constrained")
    for k, (run, log) in enumerate(zip(args.runs, logs)):
        draw(axes, run, log, field, color=f"C{k % 10}")
    losses = [line[name] for log in logs for line in log for name in ("loss", "val_loss")]
    axes.set_ylim(min(loss for loss in losses if loss is not None) - 0.1)
    axes.set(xlabel=label, ylabel="loss (nats a token)")
    axes.grid(alpha=0.25)
    axes.legend(title="validation (thin: training, paler: in bags; dotted: the switch)")
    try:
        figure.savefig(args.out, dpi=150)
    except (OSError, ValueError) as error:
        fail(f"--out {args.out}: cannot write it ({error})")
    pyplot.close(figure)
    print(f"{args.out} shows {len(logs)} runs")


if __name__ == "__main__":
    main()
