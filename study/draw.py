"""The study's picture, study/pays.png, from study/results.csv and the paper's tables.

    pip install matplotlib && python study/draw.py

A point is a setting of study/table.py: the mean of TST minus baseline over its seeds, with a bar
of one standard deviation where there are several, against the tokens that the baseline reads.
"""
import math
import statistics
from itertools import groupby

from run import ROOT, read_rows
from table import Setting, best, settings

PICTURE = ROOT / "study" / "pays.png"
COLOURS = {"Python": "#e07b00", "C": "#1f6fb4", "English": "#2a9d3a", "C and English": "#8e44ad",
           "the paper's": "black"}
OTHER = "#c2185b"
PAPER = [               # its dense pairs, with their baseline's loss and TST's
    (Setting(int(tokens), "the paper's", 128_256, int(parameters), 6, 0.3), [tst - baseline])
    for tokens, parameters, baseline, tst in (
        (42e9, 270e6, 3.212, 3.142), (42e9, 600e6, 3.019, 2.943), (42e9, 3e9, 2.808, 2.676),
        (209e9, 270e6, 3.092, 3.048))]
FIRST = ("Python", 6, 0.3)              # corpus, s and r of the README's first run
TICKS = {1e7: "10M", 1e8: "100M", 1e9: "1B", 1e10: "10B", 1e11: "100B"}


def size(parameters):
    """A marker's diameter in points, for 0.5M to 3B parameters."""
    return 5 + 2.5 * math.log10(parameters / 4e5)


def beside(points):
    """Yield (x, setting, differences): those of about the same tokens stand side by side."""
    def about(point):
        return round(4 * math.log2(point[0].tokens))

    for _, group in groupby(sorted(points), about):
        group = sorted(group, key=lambda point: point[0][1:])
        for i, (setting, values) in enumerate(group):
            yield setting.tokens * 1.15 ** (i - (len(group) - 1) / 2), setting, values


def draw(axes, points):
    for x, setting, values in beside(points):
        mean, colour = statistics.mean(values), COLOURS.get(setting.corpus, OTHER)
        deviation = statistics.stdev(values) if len(values) > 1 else 0
        axes.errorbar(x, mean, deviation, fmt="o", color=colour, elinewidth=1.2,
                      markersize=size(setting.parameters), markeredgecolor="white")
        if setting.corpus == "the paper's":
            name = f"{setting.parameters / 1e6:.0f}M".replace("000M", "B")
            aside, side = (-10, "right") if name == "270M" else (10, "left")    # not on 600M
            axes.annotate(name, (x, mean), (aside, 0), textcoords="offset points", ha=side,
                          va="center", fontsize=10)
        if (setting.corpus, setting.s, setting.r) == FIRST:
            axes.annotate("you are here:\nthe README's --s 6 --r 0.3", (x, mean), (45, 0),
                          textcoords="offset points", va="center", fontsize=11, color=colour,
                          arrowprops={"arrowstyle": "-|>", "color": colour})


def explain(axes, corpora):
    """Everything beside the points."""
    for corpus in corpora:
        axes.plot([], [], "o", color=COLOURS.get(corpus, OTHER), markersize=7, label=corpus)
    for parameters, label in ((5e5, "0.5M parameters"), (4e7, "40M"), (3e9, "3B")):
        axes.plot([], [], "o", color="#999999", markersize=size(parameters), label=label)
    axes.legend(fontsize=10, ncols=2, loc="upper right")
    axes.axhline(0, color="black", linewidth=1)
    for y, words, side in ((0.004, "superposition costs", "bottom"),
                           (-0.004, "superposition pays", "top")):
        axes.annotate(words, (2e9, y), va=side, ha="center", fontsize=11, color="#555555")
    axes.set_title("From how much training on does superposition pay?", fontsize=13)
    axes.set_xscale("log")
    axes.set_xlim(4e6, 6e11)
    axes.set_xticks(list(TICKS), list(TICKS.values()))
    axes.set_xlabel("tokens that the baseline reads", fontsize=11)
    axes.set_ylabel("TST minus baseline (nats per token)", fontsize=11)
    axes.grid(alpha=0.25)


def main():
    try:
        from matplotlib import pyplot
    except ImportError:
        raise SystemExit("study/draw.py: matplotlib is missing: pip install matplotlib")
    figure, axes = pyplot.subplots(figsize=(9, 5), constrained_layout=True, facecolor="white")
    points = [(setting, best(by_rate)) for setting, by_rate in settings(read_rows()).items()]
    draw(axes, points + PAPER)
    explain(axes, dict.fromkeys(setting.corpus for setting, _ in points + PAPER))
    figure.savefig(PICTURE, dpi=150)
    print(f"{PICTURE} is drawn, with {len(points)} points of ours and {len(PAPER)} of the paper's")


if __name__ == "__main__":
    main()
