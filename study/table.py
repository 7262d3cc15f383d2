"""The README's tables: the losses in study/results.csv, TST beside the baseline with the same other flags and seed.

    python study/table.py                               # every experiment
    python study/table.py seeds lr                      # these
    python study/table.py seeds "--s 6 --r 0.2"         # with the differences to that instead of the baseline
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


def main(names):
    found = defaultdict(lambda: defaultdict(dict))              # experiment, other flags: method: seed: loss
    with open(Path(__file__).with_name("results.csv")) as file:
        for row in csv.DictReader(file):
            words = row["command"].split()[2:]
            flags = [(flag, value) for flag, value in zip(words[::2], words[1::2]) if flag != "--seed"]
            method, other = (" ".join(f"{flag} {value}" for flag, value in flags if (flag in METHOD) == is_method)
                             for is_method in (True, False))
            found[row["experiment"], other][method][row["seed"]] = float(row["val_loss"])
    reference = next((name for name in names if name.startswith("--")), "--s 1")
    for experiment in [name for name in names if name != reference] or dict.fromkeys(name for name, _ in found):
        print(f"\n{experiment}\n\n| flags | seeds | validation loss | minus `{reference}` |\n| --- | --- | --- | --- |")
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
