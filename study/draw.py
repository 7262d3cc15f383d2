"""Draw study/pays.png, from study/results.csv and from published tables.

    pip install matplotlib && python study/draw.py

A coloured point is a setting of study/table.py: the mean over seeds of TST minus baseline, with a
bar of one standard deviation if there are several seeds, against the tokens that the baseline
reads. A hollow point is another project's pair (docs/related.md), a black point is the paper's.
"""
import math
import statistics
from itertools import groupby

from run import ROOT, read_rows
from table import Setting, best, settings

PICTURE = ROOT / "study" / "pays.png"
COLOURS = {"Python": "#e07b00", "C": "#1f6fb4", "C (home)": "#12a5b8", "English": "#2a9d3a",
           "C and English": "#8e44ad", "paper": "black", "other project": "black"}
OTHER = "#c2185b"
PUBLISHED = [           # dense pairs, with the losses of the baseline and of TST
    (Setting(int(tokens), source, 0, int(parameters), 6, 0.3), [tst - baseline])
    for source, tokens, parameters, baseline, tst in (
        ("paper", 42e9, 270e6, 3.212, 3.142), ("paper", 42e9, 600e6, 3.019, 2.943),
        ("paper", 42e9, 3e9, 2.808, 2.676), ("paper", 209e9, 270e6, 3.092, 3.048),
        ("other project", 655e6, 355e6, 3.450, 3.412))]         # TokenSuperPaper, "345M"
LABELS = {("Python", 6, 0.3): "the README's first run,\n--s 6 --r 0.3",    # {(corpus, s, r): label}
          ("C (home)", 6, 0.2): "a win at home,\n--s 6 --r 0.2"}
TICKS = {1e7: "10M", 1e8: "100M", 1e9: "1B", 1e10: "10B", 1e11: "100B"}


def size(parameters):
    """The diameter of a marker in points, for 0.5M to 3B parameters."""
    return 5 + 2.5 * math.log10(parameters / 4e5)


def spread_out(points):
    """Yield (x, setting, differences). Neighbours are spread over at most a tenth of a decade."""
    def position(point):
        return round(4 * math.log2(point[0].tokens))

    for _, group in groupby(sorted(points), position):
        group = sorted(group, key=lambda point: point[0][1:])
        for i, (setting, values) in enumerate(group):
            shift = 0.1 * (i / (len(group) - 1) - 0.5) if len(group) > 1 else 0
            yield setting.tokens * 10 ** shift, setting, values


def draw(axes, points):
    for x, setting, values in spread_out(points):
        mean, colour = statistics.mean(values), COLOURS.get(setting.corpus, OTHER)
        deviation = statistics.stdev(values) if len(values) > 1 else 0
        hollow = setting.corpus == "other project"
        axes.errorbar(x, mean, deviation, fmt="o", color=colour, elinewidth=1.2,
                      markersize=size(setting.parameters),
                      markerfacecolor="white" if hollow else colour,
                      markeredgecolor=colour if hollow else "white")
        if setting.corpus in ("paper", "other project"):
            name = f"{setting.parameters / 1e6:.0f}M".replace("000M", "B")
            aside, side = (-10, "right") if name == "270M" else (10, "left")    # 600M is near
            axes.annotate("TokenSuperPaper,\n345M, 1 seed" if hollow else name, (x, mean),
                          (aside, 0), textcoords="offset points", ha=side, va="center", fontsize=10)
        label = LABELS.get((setting.corpus, setting.s, setting.r))
        if label:
            axes.annotate(label, (x, mean), (45, 0), textcoords="offset points", va="center",
                          fontsize=11, color=colour,
                          arrowprops={"arrowstyle": "-|>", "color": colour})


def explain(axes, corpora):
    """Draw everything except the points."""
    for corpus in corpora:
        colour = COLOURS.get(corpus, OTHER)
        axes.plot([], [], "o", color=colour, markersize=7, label=corpus,
                  markerfacecolor="white" if corpus == "other project" else colour)
    for parameters, label in ((5e5, "0.5M parameters"), (4e7, "40M"), (3e9, "3B")):
        axes.plot([], [], "o", color="#999999", markersize=size(parameters), label=label)
    axes.legend(fontsize=10, ncols=2, loc="lower center")
    axes.axhline(0, color="black", linewidth=1)
    for y, text, side in ((0.004, "TST loses", "bottom"), (-0.004, "TST wins", "top")):
        axes.annotate(text, (2e11, y), va=side, ha="center", fontsize=11, color="#555555")
    axes.set_title("How much training does superposition need before it pays?", fontsize=13)
    axes.set_xscale("log")
    axes.set_xlim(4e6, 6e11)
    axes.set_xticks(list(TICKS), list(TICKS.values()))
    axes.set_xlabel("tokens that the baseline reads", fontsize=11)
    axes.set_ylabel("TST minus baseline (nats per token)", fontsize=11)
    axes.grid(alpha=0.25)


def main():
    from matplotlib import pyplot
    figure, axes = pyplot.subplots(figsize=(9, 5.4), constrained_layout=True, facecolor="white")
    points = [(setting, best(by_rate)) for setting, by_rate in settings(read_rows()).items()]
    draw(axes, points + PUBLISHED)
    explain(axes, dict.fromkeys(setting.corpus for setting, _ in points + PUBLISHED))
    figure.savefig(PICTURE, dpi=150)
    print(f"{PICTURE} shows {len(points)} points of ours and {len(PUBLISHED)} published points")


if __name__ == "__main__":
    main()
