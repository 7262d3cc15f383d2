"""The README's picture: validation loss against steps, baseline and TST, means over the seeds of an experiment.

    python study/draw.py                # from runs/study/, as left by `python study/run.py seeds`, to study/loss.png
"""
import json
import statistics
from collections import defaultdict
from pathlib import Path

from run import EXPERIMENTS, HERE, finished, folder


def curves(experiment):
    """{s: {step: [validation losses]}}, and the args of a TST run."""
    found, tst = defaultdict(lambda: defaultdict(list)), None
    for run in map(folder, EXPERIMENTS[experiment]):
        if finished(run):
            args, _ = finished(run)
            tst = args if args["s"] > 1 else tst
            for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()):
                if line["val_loss"]:
                    found[args["s"]][line["step"]].append(line["val_loss"])
    return found, tst


def main():
    try:
        import matplotlib
    except ImportError:
        raise SystemExit("study/draw.py: matplotlib is missing: pip install matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot
    found, tst = curves("seeds")
    if tst is None:
        raise SystemExit("study/draw.py: there are no runs to draw yet: python study/run.py seeds")
    switch = round(tst["r"] * tst["steps"])
    figure, (whole, end) = pyplot.subplots(1, 2, figsize=(9, 3.6), constrained_layout=True)
    for axes in (whole, end):
        for (s, losses), colour in zip(sorted(found.items()), ("tab:grey", "tab:orange", "tab:blue")):
            name = "next tokens from the start (baseline)" if s == 1 else f"bags of {s} first (TST)"
            mean = [statistics.mean(values) for values in losses.values()]
            axes.plot(list(losses), mean, color=colour, label=name, linewidth=2 if s > 1 else 1.5)
            axes.fill_between(list(losses), [min(values) for values in losses.values()],
                              [max(values) for values in losses.values()], color=colour, alpha=0.25, linewidth=0)
        axes.set_xlabel("optimizer steps, each of the same cost")
        axes.grid(alpha=0.3)
    whole.axvspan(0, switch, color="tab:orange", alpha=0.08)
    whole.text(switch / 2, whole.get_ylim()[1], f"\nbags of {tst['s']}", ha="center", va="top")
    whole.text(switch * 1.05, whole.get_ylim()[1], "\nnext tokens", ha="left", va="top")
    whole.set_ylabel("next-token validation loss (nats)")
    whole.set_title("the whole run", fontsize=10)
    end.set_xlim(tst["steps"] * 0.55, tst["steps"])
    last = [value for losses in found.values() for step, values in losses.items() if step > tst["steps"] * 0.55
            for value in values]
    end.set_ylim(min(last) - 0.01, max(last) + 0.01)
    end.set_title("its end, enlarged", fontsize=10)
    end.legend(frameon=False, fontsize=9)
    figure.savefig(HERE / "loss.png", dpi=130)
    print(f"{HERE / 'loss.png'}: means over {max(map(len, found[1].values()))} seeds, bands from least to most")


if __name__ == "__main__":
    main()
