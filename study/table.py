"""Print the table of study/README.md and all pairs, from study/results.csv.

    python study/table.py

A pair is a TST run and the baseline with the same other flags, the same seed and the same data.
Differences are TST minus baseline in validation loss, in nats per token. The number after ± is the
standard deviation over the pairs.
"""
import re
import statistics
from collections import defaultdict, namedtuple

from run import read_rows

CORPORA = {"python": "Python", "c-": "C", "c": "C (home)", "prose-": "English",
           "english-": "English", "mixed-": "C and English"}    # {start of a folder's name: corpus}

# What all pairs of a setting have in common. Seeds and learning rates can differ
Setting = namedtuple("Setting", "tokens corpus vocab_size parameters s r")     # tokens: baseline's


def settings(rows):
    """{Setting: {learning rate: [(loss of the baseline, loss of TST), ...]}} of all pairs.

    Runs that read a token twice are left out.
    """
    def without_method(row):
        return row["data_hash"], re.sub(r" --[sr] \S+", "", row["command"])

    baselines = {without_method(row): row for row in rows if row["s"] == "1"}
    found = defaultdict(lambda: defaultdict(list))
    for row in rows:
        baseline = baselines.get(without_method(row))
        if row["s"] != "1" and baseline and float(row["epochs"]) <= 1:
            folder = re.search(r"--data (?:data/)?(\w+-?)|$", row["command"])[1] or "python"
            setting = Setting(int(baseline["tokens"]), CORPORA.get(folder, folder),
                              int(row["vocab_size"]), int(row["parameters"]), int(row["s"]),
                              float(row["r"]))
            found[setting][row["lr"]].append((float(baseline["val_loss"]), float(row["val_loss"])))
    return dict(sorted(found.items()))


def best(by_rate):
    """TST minus baseline of each pair, with the learning rate that is best for the baseline."""
    pairs = min(by_rate.values(), key=lambda pairs: statistics.mean(loss for loss, _ in pairs))
    return [tst - baseline for baseline, tst in pairs]


def spread(values, sign="+"):
    """The mean and, for several values, the standard deviation, as text. sign="" hides a plus."""
    deviation = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{sign}.3f}{deviation}"


def line(setting, values, *more):
    cells = (f"{setting.parameters / 1e6:.3g}M on {setting.corpus}, V = {setting.vocab_size:,}, "
             f"s = {setting.s}, r = {setting.r}", f"{setting.tokens / 1e6:.3g}M", len(values),
             spread(values), f"{sum(value < 0 for value in values)} of {len(values)}", *more)
    return f"| {' | '.join(map(str, cells))} |"


def main():
    found = settings(read_rows())
    head = "| pair | tokens | seeds | TST minus baseline | TST lower |"
    print("Settings with four seeds or more, or with more than 10M parameters, at the learning\n"
          f"rate that is best for the baseline\n\n{head}\n{5 * '| --- '}|")
    for setting, by_rate in found.items():
        values = best(by_rate)
        if len(values) >= 4 or setting.parameters > 10e6:
            print(line(setting, values))
    print(f"\nAll settings\n\n{head} each pair | learning rate | baseline | TST |\n{9 * '| --- '}|")
    for setting, by_rate in found.items():
        for lr, pairs in sorted(by_rate.items()):
            values = [tst - baseline for baseline, tst in pairs]
            each = " ".join(f"{value:+.3f}" for value in values)
            print(line(setting, values, each, lr, *(spread(some, "") for some in zip(*pairs))))


if __name__ == "__main__":
    main()
