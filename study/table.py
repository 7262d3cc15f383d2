"""The study's tables: the losses in study/results.csv, TST beside the baseline with the same other
flags, seed and data, and w, the worth of a superposed step in plain steps (study/worth.py).

    python study/table.py                               # every experiment
    python study/table.py seeds tuning                  # these
    python study/table.py seeds --loss bpb              # another column instead of val_loss
    python study/table.py --old transitions --minus "--s 6 --r 0.2" # differences to that run
    python study/table.py wide --minus "--s 1 --lr 0.001"           # whatever the others' --lr
    python study/table.py confirm confirm-gpu --together            # one table, whatever --device
    python study/table.py --old                         # the rows from before data_hash alone

No table mixes data: each is of one experiment, or of those named together, and one data_hash. A
negative difference is a gain. Of six or more there are also the median, and p, two-sided, of
Wilcoxon's signed ranks.
"""
import argparse
import statistics
from collections import Counter, defaultdict

from run import LOSSES, read_rows

from data import fail
from worth import as_text, worth

METHOD = ("--edit", "--s", "--r", "--s-in", "--s-out", "--weighting")
BASELINE = "--s 1"


def flags_of(row, of_method=METHOD, of_seed=("--seed",)):
    """(the flags of the method, the others but --steps, the same with it), each text.

    Those of of_seed are left out.
    """
    words = row["command"].split()[2:]
    flags = [pair for pair in zip(words[::2], words[1::2]) if pair[0] not in of_seed]

    def text(pairs):
        return " ".join(f"{flag} {value}" for flag, value in pairs)

    others = [pair for pair in flags if pair[0] not in of_method]
    return (text(pair for pair in flags if pair[0] in of_method),
            text(pair for pair in others if pair[0] != "--steps"), text(others))


def lengths(rows, loss):
    """{(other flags, seed, data_hash): {steps: loss}} of the baselines of today's columns."""
    found = defaultdict(dict)
    for row in rows:
        method, same, _ = flags_of(row)
        if method == BASELINE and row["data_hash"] and row[loss]:
            found[same, row["seed"], row["data_hash"]][int(row["steps"])] = float(row[loss])
    return found


def worth_of(row, loss, baselines):
    """(w, bound) of a row, or None where it superposes nothing or has no baseline."""
    _, same, _ = flags_of(row)
    points = baselines.get((same, row["seed"], row["data_hash"]))
    if points and float(row["r"]) > 0:
        return worth(float(row[loss]), points, int(row["steps"]), float(row["r"]))


def spread(values, sign=""):
    """Mean, with a sign where sign is "+", and, of several, the standard deviation."""
    deviation = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{sign}.4f}{deviation}"


def signed_ranks(differences):
    """Wilcoxon's signed-rank test that the median is 0: the exact two-sided p."""
    n = len(differences)
    ordered = sorted(differences, key=abs)
    lower = sum(rank for rank, value in enumerate(ordered, 1) if value < 0)
    ways = Counter([0])                 # {sum of the negative ones' ranks: how many signs give it}
    for rank in range(1, n + 1):
        ways += Counter({total + rank: count for total, count in ways.items()})
    smaller = min(lower, n * (n + 1) // 2 - lower)
    return min(1, 2 * sum(ways[total] for total in range(smaller + 1)) / 2 ** n)


def summary(less):
    """What is said of the differences of several seeds."""
    if not less:
        return ""
    said = f"{spread(less, '+')}, {sum(value < 0 for value in less)} of {len(less)} lower"
    if len(less) > 5:
        said += f", median {statistics.median(less):+.4f}, p = {signed_ranks(less):.2g}"
    return said


def by_s_and_r(rows, loss):
    """Print one row of losses for each r and one column for each s."""
    losses = {(row["s"], row["r"]): row[loss] for row in rows}
    sizes, fractions = (sorted({key[i] for key in losses if key[0] != "1"}, key=float)
                        for i in (0, 1))
    print(f"the baseline: {losses.get(('1', '0.0'), 'not there')}\n")
    print("| r \\ s | " + " | ".join(sizes) + " |\n" + "| --- " * (1 + len(sizes)) + "|")
    for r in fractions:
        print(f"| {r} | " + " | ".join(losses.get((s, r), "") for s in sizes) + " |")


def differences(rows, loss, minus, baselines, together):
    """Print a line for each method and other flags, with the seeds' losses and differences."""
    of_method = (*METHOD, "--lr") if "--lr" in minus else METHOD
    of_seed = ("--seed", "--device") if together else ("--seed",)       # they tell pairs apart
    groups = defaultdict(lambda: defaultdict(dict))     # other flags: method: seed, device: row
    for row in rows:
        method, _, others = flags_of(row, of_method, of_seed)
        groups[others][method][row["seed"], "--device" in row["command"]] = row
    print(f"| flags | seeds | {loss} | minus `{minus}` | w |\n| --- | --- | --- | --- | --- |")
    for others, methods in groups.items():
        reference = methods.get(minus, {})
        for method, by_seed in methods.items():
            losses = {seed: float(row[loss]) for seed, row in by_seed.items()}
            less = [losses[seed] - float(reference[seed][loss])
                    for seed in losses if seed in reference and method != minus]
            worths = [worth_of(row, loss, baselines) for row in by_seed.values()]
            worths = [found for found in worths if found]
            each = ", ".join(f"{value:.4f}" for value in losses.values())
            each = f" ({each})" if len(losses) > 1 else ""
            print(f"| `{f'{method} {others}'.strip()}` | {len(losses)} "
                  f"| {spread(losses.values())}{each} | {summary(less)} "
                  f"| {as_text(worths) if worths else ''} |")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail
    parser.add_argument("experiments", nargs="*", help="(default: all)")
    parser.add_argument("--loss", choices=LOSSES, default="val_loss", help="(default: val_loss)")
    parser.add_argument("--minus", default=BASELINE, help="method flags of the run to compare with")
    parser.add_argument("--together", action="store_true", help="the experiments as one")
    parser.add_argument("--old", action="store_true", help="the rows without a data_hash alone")
    args = parser.parse_args(argv)
    rows = [row for row in read_rows() if args.old == (not row["data_hash"])]
    known = list(dict.fromkeys(row["experiment"] for row in rows))
    for name in args.experiments:
        if name not in known:
            fail(f"{name}: no such rows; there are {', '.join(known) or 'none'}; "
                 "the older ones are printed with --old, the others without")
    baselines, tables = lengths(rows, args.loss), defaultdict(list)
    for row in rows:
        if row[args.loss] and row["experiment"] in (args.experiments or known):
            name = " and ".join(args.experiments or known) if args.together else row["experiment"]
            tables[name, row["data_hash"]].append(row)
    for (experiment, data_hash), rows in tables.items():
        of = f"data {data_hash}" if data_hash else "old rows"
        print(f"\n{experiment}, {of}\n")
        if experiment.endswith("grid"):
            by_s_and_r(rows, args.loss)
        else:
            differences(rows, args.loss, args.minus, baselines, args.together)


if __name__ == "__main__":
    main()
