"""Every figure of study/README.md, from study/results.csv.

    python study/table.py

A pair is a TST run and the baseline with the same other flags, seed and data. Differences are TST
minus baseline in validation loss, nats per token; ± is the standard deviation over the pairs.
"""
import re
import statistics
from collections import defaultdict, namedtuple

from run import read_rows

CORPORA = {"python": "Python", "c": "C", "prose": "English", "english": "English",
           "mixed": "C and English"}            # by a folder's name; another has its own

# Of pairs that differ in seed and learning rate alone; tokens are those the baseline reads
Setting = namedtuple("Setting", "tokens corpus vocab_size parameters s r")


def settings(rows):
    """{Setting: {learning rate: [(baseline's loss, TST's), ...]}} of the pairs among the rows.

    Left out are those that read a token twice.
    """
    def same(row):
        return row["data_hash"], re.sub(r" --[sr] \S+", "", row["command"])

    baselines = {same(row): row for row in rows if row["s"] == "1"}
    found = defaultdict(lambda: defaultdict(list))
    for row in rows:
        if row["s"] != "1" and same(row) in baselines and float(row["epochs"]) <= 1:
            baseline = baselines[same(row)]
            data = re.search(r"--data (?:data/)?([^-\s]+)|$", row["command"])[1] or "python"
            setting = Setting(int(baseline["tokens"]), CORPORA.get(data, data),
                              int(row["vocab_size"]), int(row["parameters"]), int(row["s"]),
                              float(row["r"]))
            found[setting][row["lr"]].append((float(baseline["val_loss"]), float(row["val_loss"])))
    return dict(sorted(found.items()))


def best(by_rate):
    """TST minus baseline of each pair, at the learning rate that is best for the baseline."""
    pairs = min(by_rate.values(), key=lambda pairs: statistics.mean(loss for loss, _ in pairs))
    return [tst - baseline for baseline, tst in pairs]


def spread(values, sign="+"):
    """Mean, with a sign where sign is "+", and, of several, the standard deviation, as text."""
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
    print("The README's table: four seeds or more, or more than 10M parameters, each at the "
          f"learning rate that is best for its baseline\n\n{head}\n{5 * '| --- '}|")
    for setting, by_rate in found.items():
        values = best(by_rate)
        if len(values) >= 4 or setting.parameters > 10e6:
            print(line(setting, values))
    print(f"\nAll\n\n{head} each | learning rate | baseline | TST |\n{9 * '| --- '}|")
    for setting, by_rate in found.items():
        for lr, pairs in sorted(by_rate.items()):
            values = [tst - baseline for baseline, tst in pairs]
            each = " ".join(f"{value:+.3f}" for value in values)
            print(line(setting, values, each, lr, *(spread(some, "") for some in zip(*pairs))))


if __name__ == "__main__":
    main()
