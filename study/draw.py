"""The README's picture: validation loss against steps, TST and the baseline, as left by `python study/run.py seeds`.

    pip install matplotlib && python study/draw.py          # from runs/study/ to study/loss.png
"""
import statistics
from collections import defaultdict

from run import EXPERIMENTS, HERE, finished, folder, log

COLOURS = ("tab:grey", "tab:blue", "tab:orange")


def main():
    try:
        from matplotlib import pyplot
    except ImportError:
        raise SystemExit("study/draw.py: matplotlib is missing: pip install matplotlib")
    found, switches, steps = defaultdict(lambda: defaultdict(list)), {}, 0      # method: step: a loss for each seed
    for flags in EXPERIMENTS["seeds"]:
        method, done = flags.split(" --seed")[0], finished(folder(flags))
        if not done:
            raise SystemExit(f"study/draw.py: {flags} is not done yet: python study/run.py seeds")
        steps = done[0]["steps"]
        for line in log(flags):
            if line["phase"] == "superposition":
                switches[method] = line["step"]
            if line["val_loss"]:
                found[method][line["step"]].append(line["val_loss"])
    figure, panels = pyplot.subplots(1, 2, figsize=(9, 3.6), constrained_layout=True)
    for axes in panels:
        for (method, losses), colour in zip(found.items(), COLOURS):
            name = f"TST: {method}" if method in switches else f"baseline: {method}"
            axes.plot(list(losses), [statistics.mean(seeds) for seeds in losses.values()], color=colour, label=name,
                      linewidth=2)
            axes.fill_between(list(losses), [min(seeds) for seeds in losses.values()],
                              [max(seeds) for seeds in losses.values()], color=colour, alpha=0.25, linewidth=0)
            if method in switches:
                axes.axvline(switches[method], color=colour, linewidth=1.5, linestyle=":")
        axes.set_xlabel("optimizer steps, all of the same cost")
        axes.grid(alpha=0.3)
    whole, end = panels
    whole.set_ylabel("next-token validation loss (nats)")
    whole.set_title("the whole run", fontsize=10)
    whole.set_xlim(0, steps)
    low, high = whole.get_ylim()
    whole.text(max(switches.values()), low + 0.85 * (high - low), "  dotted: the switch from bags to next tokens")
    late = [loss for losses in found.values() for step in losses if step > 0.55 * steps for loss in losses[step]]
    end.set_xlim(0.55 * steps, steps)
    end.set_ylim(min(late) - 0.02, max(late) + 0.02)
    end.set_title("its end, enlarged", fontsize=10)
    end.legend(frameon=False, fontsize=9)
    figure.savefig(HERE / "loss.png", dpi=120)
    print(f"{HERE / 'loss.png'}: means and ranges over {max(map(len, found['--s 1'].values()))} seeds")


if __name__ == "__main__":
    main()
