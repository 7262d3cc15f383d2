"""The study's tables: the losses in study/results.csv, TST beside the baseline with the same other flags and seed.

    python study/table.py                               # every experiment
    python study/table.py seeds lr                      # these
    python study/table.py seeds "--s 6 --r 0.2"         # with the differences to that instead of the baseline
    python study/table.py seeds test                    # of the test split, where it has been looked at
"""
import csv
import statistics
import sys
from collections import defaultdict
from pathlib import Path

METHOD = ("--edit", "--s", "--r", "--s-in", "--s-out", "--weighting")


def spread(values):
    """Mean and, of several, the standard deviation."""
    return f"{statistics.mean(values):.4f}" + (f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else "")


def by_s_and_r(rows):
    """Print one row of losses for each r and one column for each s."""
    losses = {(row["s"], row["r"]): row["val_loss"] for row in rows}
    sizes, fractions = (sorted({key[i] for key in losses if key[0] != "1"}, key=float) for i in (0, 1))
    print(f"the baseline: {losses['1', '0.0']}\n\n| r \\ s | " + " | ".join(sizes) + " |")
    print("| --- " * (1 + len(sizes)) + "|")
    for r in fractions:
        print(f"| {r} | " + " | ".join(losses.get((s, r), "") for s in sizes) + " |")


def main(words):
    split, names = "test" if "test" in words else "val", [name for name in words if name != "test"]
    found = defaultdict(lambda: defaultdict(dict))              # experiment, other flags: method: seed: loss
    rows = defaultdict(list)
    with open(Path(__file__).with_name("results.csv")) as file:
        for row in (row for row in csv.DictReader(file) if row[f"{split}_loss"]):
            command = row["command"].split()[2:]
            flags = [(flag, value) for flag, value in zip(command[::2], command[1::2]) if flag != "--seed"]
            method, other = (" ".join(f"{flag} {value}" for flag, value in flags if (flag in METHOD) == is_method)
                             for is_method in (True, False))
            found[row["experiment"], other][method][row["seed"]] = float(row[f"{split}_loss"])
            rows[row["experiment"]].append(row)
    reference = next((name for name in names if name.startswith("--")), "--s 1")
    experiments = [name for name in names if name != reference] or rows
    if not set(experiments) <= set(rows):
        raise SystemExit(f"study/table.py: of {experiments} results.csv has only {list(rows)}")
    for experiment in experiments:
        print(f"\n{experiment}\n")
        if experiment == "grid":
            by_s_and_r(rows[experiment])
            continue
        print(f"| flags | seeds | {split} loss | minus `{reference}` |\n| --- | --- | --- | --- |")
        for (name, other), methods in found.items():
            if name != experiment:
                continue
            other_losses = methods.get(reference, {})
            for method, losses in methods.items():
                less = [losses[seed] - other_losses[seed] for seed in losses if seed in other_losses]
                gain = spread(less) if less and method != reference else ""
                each = "" if len(losses) == 1 else f" ({', '.join(f'{loss:.4f}' for loss in losses.values())})"
                print(f"| `{f'{method} {other}'.strip()}` | {len(losses)} | {spread(losses.values())}{each} | {gain} |")


if __name__ == "__main__":
    main(sys.argv[1:])
