"""Two of the study's pictures.

    pip install matplotlib && python study/draw.py          # study/loss.png and study/map.png

loss.png: validation loss against steps, means and ranges over the seeds that both methods have
finished, from what `python study/run.py seeds` has left in runs/study/. map.png, from
study/results.csv: TST minus baseline against the length of both, beside the paper's models; and
what a superposed step is worth for each kind of target.
"""
import re
import statistics
from collections import defaultdict

from run import C, EXPERIMENTS, HERE, log, pairs, read_rows

from table import BASELINE, flags_of, lengths, spread, worth_of
from worth import PAPER, as_text

MAP = "--s 6 --r 0.2"                   # of whose runs map.png has a point each
MAPPED = ("seeds", "map", "confirm", "confirm-gpu", "map-gpu", "wide")
KINDS = ("again", "hit", "seen", "unseen")      # see study/split.py


def curve(runs):
    """{step: a loss for each run} at the evaluations that all of them have."""
    losses = defaultdict(list)
    for flags in runs:
        for line in log(flags):
            if line["val_loss"]:
                losses[line["step"]].append(line["val_loss"])
    return {step: each for step, each in losses.items() if len(each) == len(runs)}


def draw_loss(pyplot):
    done = pairs(EXPERIMENTS["seeds"])
    if not done:
        print("no seed is done here: python study/run.py seeds")
        return
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


def gains(rows, column="val_loss"):
    """{(what, data_hash): {steps: [TST's loss minus its baseline's, of each seed]}} of MAP.

    what: the corpus, and the model if it is not tiny.
    """
    rows = [row for row in rows if row["experiment"] in MAPPED and row["data_hash"] and row[column]]

    def run_of(row):
        return flags_of(row)[2], row["seed"], row["data_hash"]

    plain = {run_of(row): float(row[column]) for row in rows if flags_of(row)[0] == BASELINE}
    found = defaultdict(lambda: defaultdict(list))
    for row in rows:
        method, same, _ = flags_of(row)
        if method == MAP and run_of(row) in plain:
            kind = re.search(r"--data data/(\w+)|$", same)[1] or "python"
            model = "6.9M parameters, " if row["experiment"] == "wide" else ""
            what = f"{model}{kind.capitalize()}, vocabulary {int(row['vocab_size']):,}"
            gain = float(row[column]) - plain[run_of(row)]
            found[what, row["data_hash"]][int(row["steps"])].append(gain)
    return found


def worths(rows, loss, steps):
    """[(w, bound), ...] of the seeds of MAP on C, by the loss of one kind of target."""
    plain = lengths(rows, loss)
    return [worth_of(row, loss, plain) for row in rows
            if row["experiment"] == "map" and int(row["steps"]) == steps
            and flags_of(row)[:2] == (MAP, f"--data {C}")]


def draw_worths(axes, rows, steps=4800):
    for k, kind in enumerate(KINDS):
        found = worths(rows, kind, steps)
        for i, (w, bound) in enumerate(found):
            marker = {"": "o", ">": "^", "<": "v"}[bound]
            axes.plot(k + 0.15 * (i - (len(found) - 1) / 2), w, marker, color="C1", markersize=5)
        print(f"{steps:,} steps of C, worth for {kind}: {as_text(found)}")
    for w in (1, 6):
        axes.axhline(w, color="black", linewidth=0.8, linestyle="-" if w == 1 else ":")
    axes.set_xticks(range(len(KINDS)), KINDS)
    axes.set_xlim(-0.5, len(KINDS) - 0.5)
    axes.set_ylim(bottom=0)
    axes.set_title(f"C, vocabulary 1,024, {steps:,} steps", fontsize=9)
    axes.set_ylabel("worth of a superposed step in plain steps")
    axes.grid(alpha=0.3, axis="y")


def draw_map(pyplot):
    rows = read_rows()
    found = gains(rows)
    figure, (axes, right) = pyplot.subplots(1, 2, figsize=(9.5, 4.2), width_ratios=(2, 1),
                                            constrained_layout=True)
    draw_worths(right, rows)
    corpora = list(dict.fromkeys(corpus for corpus, _ in found))
    for k, corpus in enumerate(corpora):
        axes.plot([], [], "o-", color=f"C{k}", label=corpus)
    for (corpus, data_hash), by_steps in found.items():     # two machines' Python are two corpora
        k, steps = corpora.index(corpus), sorted(by_steps)
        aside = 1.025 ** k                                  # so that all points are seen
        axes.plot([n * aside for n in steps], [statistics.mean(by_steps[n]) for n in steps],
                  "-", color=f"C{k}")
        for n in steps:
            axes.plot([n * aside] * len(by_steps[n]), by_steps[n], "o", color=f"C{k}", markersize=4)
        print(f"{corpus}, data {data_hash}: " + ", ".join(
            f"{n:,} steps {spread(by_steps[n], '+')}" for n in steps))
    for column in ("val_loss", "bpb", *KINDS):
        each = [gain for (what, _), by_steps in gains(rows, column).items() if "Python" not in what
                for some in by_steps.values() for gain in some]
        print(f"{column} but on Python: TST is lower in {sum(gain < 0 for gain in each)} of "
              f"{len(each)} pairs")
    for model, n, _, _, loss, baselines in PAPER:
        if n in baselines:              # the mixture's baseline has another length
            axes.plot(n, loss - baselines[n], "s", color="black", markersize=5)
            after = model == "600M"     # whose point is just below 270M's
            axes.annotate(model, (n, loss - baselines[n]), xytext=(6 if after else -6, -3),
                          fontsize=9, textcoords="offset points", ha="left" if after else "right")
    axes.plot([], [], "s", color="black", label="the paper's models, r = 0.3")
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_xscale("log")
    ticks = (2400, 4800, 9600, 24_000, 100_000)
    axes.set_xticks(ticks, [f"{n:,}" for n in ticks])
    axes.minorticks_off()
    axes.set_xlabel("optimizer steps of both runs")
    axes.set_ylabel("TST minus baseline (nats per token)")
    figure.legend(frameon=False, fontsize=9, ncols=4, columnspacing=1, loc="outside upper left")
    axes.grid(alpha=0.3)
    figure.savefig(HERE / "map.png", dpi=120)
    print(f"{HERE / 'map.png'} is drawn")


def main():
    try:
        from matplotlib import pyplot
    except ImportError:
        raise SystemExit("study/draw.py: matplotlib is missing: pip install matplotlib")
    draw_loss(pyplot)
    draw_map(pyplot)


if __name__ == "__main__":
    main()
