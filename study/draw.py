"""The README's picture, from what `python study/run.py seeds length` has left in runs/study/.

    pip install matplotlib && python study/draw.py          # writes study/loss.png

Left: validation loss against steps, means and ranges over the seeds. Right, which is also printed
as a table: how much lower TST ends than the baseline of the same seed, against the run's length
in tokens of the baseline per parameter.
"""
import statistics
from collections import defaultdict

from run import EXPERIMENTS, HERE, baseline, finished, folder, log

from model import load_checkpoint

COLOURS = {"--s 1": "tab:grey", "--s 6 --r 0.2": "tab:blue", "--s 8,4,2 --r 0.15": "tab:orange"}
SIZES = {96: ("tiny", "-o"), 32: ("small model", "--s")}


def method_of(flags):
    return max((method for method in COLOURS if f"{flags} ".startswith(f"{method} ")), key=len)


def seeds():
    """Of "seeds": {method: {step: a loss for each seed}}, and {method: the step of the switch}."""
    found, switches = defaultdict(lambda: defaultdict(list)), {}
    for flags in EXPERIMENTS["seeds"]:
        for line in log(flags):
            if line["phase"] == "superposition":
                switches[method_of(flags)] = line["step"]
            if line["val_loss"]:
                found[method_of(flags)][line["step"]].append(line["val_loss"])
    return found, switches


def curves(axes, found, switches):
    for method, losses in found.items():
        means, lows, highs = ([kind(each) for each in losses.values()]
                              for kind in (statistics.mean, min, max))
        name = f"TST: {method}" if method in switches else f"baseline: {method}"
        axes.plot(list(losses), means, color=COLOURS[method], linewidth=2, label=name)
        axes.fill_between(list(losses), lows, highs, color=COLOURS[method], alpha=0.25, linewidth=0)
        if method in switches:
            axes.axvline(switches[method], color=COLOURS[method], linewidth=1.5, linestyle=":")
    axes.grid(alpha=0.3)


def lengths():
    """Of "length": {(width, method): {(steps, tokens per parameter): each seed's gain}}."""
    found = defaultdict(lambda: defaultdict(list))
    for flags in EXPERIMENTS["length"]:
        run, other = finished(folder(flags)), finished(folder(baseline(flags)))
        if flags == baseline(flags) or not (run and other):
            continue
        weights = load_checkpoint(folder(flags))["model"].values()
        per_parameter = run[1]["s_tokens"] / sum(weight.numel() for weight in weights)
        found[run[0]["n_embd"], method_of(flags)][run[0]["steps"], per_parameter].append(
            other[1]["val_loss"] - run[1]["val_loss"])
    return found


def main():
    try:
        from matplotlib import pyplot
    except ImportError:
        raise SystemExit("study/draw.py: matplotlib is missing: pip install matplotlib")
    missing = [flags for flags in EXPERIMENTS["seeds"] if not finished(folder(flags))]
    if missing:
        raise SystemExit(f"study/draw.py: {missing} are not done yet: python study/run.py seeds")
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.4), width_ratios=(3, 2),
                                            constrained_layout=True)
    end = left.inset_axes((0.42, 0.3, 0.56, 0.44))
    found, switches = seeds()
    for axes in (left, end):
        curves(axes, found, switches)
    steps = max(found["--s 1"])
    late = [loss for losses in found.values() for step in losses if step > 0.6 * steps
            for loss in losses[step]]
    end.set_xlim(0.6 * steps, steps)
    end.set_ylim(min(late) - 0.02, max(late) + 0.02)
    end.text(0.04, 0.06, "the end, enlarged", transform=end.transAxes, fontsize=9)
    left.set_xlim(0, steps)
    left.set_xlabel("optimizer steps, all of the same cost (dotted: the switch to next tokens)")
    left.set_ylabel("next-token validation loss (nats)")
    left.set_title("Training tiny: means and ranges over 5 seeds", fontsize=10)
    left.legend(frameon=False, fontsize=9, loc="upper right")

    print("| width | flags | steps | tokens per parameter | gain, nats |")
    print("| --- | --- | --- | --- | --- |")
    for (width, method), points in lengths().items():
        points = sorted(points.items())
        name, style = SIZES[width]
        right.plot([per for (_, per), _ in points], [statistics.mean(gains) for _, gains in points],
                   style, color=COLOURS[method], label=f"{name}, {method.split(' --r')[0]}")
        for (steps, per_parameter), gains in points:
            right.plot([per_parameter] * len(gains), gains, style[-1], color=COLOURS[method],
                       alpha=0.4, markersize=4)
            each = f" ({', '.join(f'{gain:+.3f}' for gain in gains)})" if len(gains) > 1 else ""
            print(f"| {width} | `{method}` | {steps} | {per_parameter:.0f} "
                  f"| {statistics.mean(gains):+.3f}{each} |")
    right.axhline(0, color="tab:grey", linewidth=2)
    right.set_xscale("log")
    right.xaxis.set_major_formatter("{x:g}")
    right.xaxis.set_minor_formatter("")
    right.set_xlabel("length: the baseline's tokens per parameter")
    right.set_ylabel("gain over the baseline (nats)")
    right.set_title("When it pays: above the grey line", fontsize=10)
    right.grid(alpha=0.3)
    right.legend(frameon=False, fontsize=8)
    figure.savefig(HERE / "loss.png", dpi=120)
    print(f"\n{HERE / 'loss.png'} is drawn")


if __name__ == "__main__":
    main()
