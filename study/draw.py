"""The README's picture, from what `python study/run.py seeds` has left in runs/study/.

    pip install matplotlib && python study/draw.py          # writes study/loss.png

Validation loss against steps, means and ranges over the seeds that both methods have finished.
"""
import statistics
from collections import defaultdict

from run import EXPERIMENTS, HERE, log, pairs


def curve(runs):
    """{step: a loss for each run} at the evaluations that all of them have."""
    losses = defaultdict(list)
    for flags in runs:
        for line in log(flags):
            if line["val_loss"]:
                losses[line["step"]].append(line["val_loss"])
    return {step: each for step, each in losses.items() if len(each) == len(runs)}


def main():
    try:
        from matplotlib import pyplot
    except ImportError:
        raise SystemExit("study/draw.py: matplotlib is missing: pip install matplotlib")
    done = pairs(EXPERIMENTS["seeds"])
    if not done:
        raise SystemExit("study/draw.py: no seed is done yet: python study/run.py seeds")
    tst, plain = zip(*done)
    figure, axes = pyplot.subplots(figsize=(7.5, 3.8), constrained_layout=True)
    end = axes.inset_axes((0.48, 0.36, 0.49, 0.42))
    late = []
    for runs, colour, name in ((plain, "tab:grey", "baseline"), (tst, "tab:blue", "TST")):
        losses = curve(runs)
        means = [statistics.mean(each) for each in losses.values()]
        for part in (axes, end):
            part.plot(list(losses), means, "o-", color=colour, label=f"{name}: {runs[0]}")
            part.fill_between(list(losses), [min(each) for each in losses.values()],
                              [max(each) for each in losses.values()], color=colour, alpha=0.25)
        late += [loss for each in list(losses.values())[-2:] for loss in each]
    steps = list(losses)
    switch = sum(line["phase"] == "superposition" for line in log(tst[0]))
    axes.axvline(switch, color="tab:blue", linestyle=":")
    end.set_xlim(steps[-2] - 20, steps[-1] + 20)
    end.set_ylim(min(late) - 0.02, max(late) + 0.02)
    end.set_title("the end, enlarged", fontsize=9)
    axes.set_xlim(0, steps[-1])
    axes.set_xlabel("optimizer steps, all of the same cost (dotted: the switch to single tokens)")
    axes.set_ylabel("validation loss (nats per token)")
    axes.legend(frameon=False, fontsize=9, loc="upper right")
    for part in (axes, end):
        part.grid(alpha=0.3)
    figure.savefig(HERE / "loss.png", dpi=120)
    print(f"{HERE / 'loss.png'} is drawn, of {len(done)} seeds")


if __name__ == "__main__":
    main()
