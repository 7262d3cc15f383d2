"""What the switch costs: training loss minus the baseline's, same seed and step, for runs that study/run.py has made.

    python study/switch.py              # every run of "seeds", "r" and "length" that has its baseline

The spike is the mean over the first 10 steps after the switch; the run has recovered when its mean over
the last 50 steps is below the baseline's.
"""
from run import EXPERIMENTS, baseline, finished, folder, log


def difference(flags):
    """(switch step, loss minus the baseline's at each step), or None where a run is missing or is a baseline."""
    pair = flags, baseline(flags)
    if flags == pair[1] or not all(finished(folder(one)) for one in pair):
        return None
    ours, theirs = map(log, pair)
    switch = sum(line["phase"] == "superposition" for line in ours)
    return switch, [a["loss"] - b["loss"] for a, b in zip(ours, theirs)]


def main():
    print("| flags | switch | spike | steps to recover |\n| --- | --- | --- | --- |")
    for flags in dict.fromkeys(flags for name in ("seeds", "r", "length") for flags in EXPERIMENTS[name]):
        found = difference(flags)
        if found:
            switch, less = found
            ends = range(switch + 50, len(less) + 1)
            recovered = next((end - switch for end in ends if sum(less[end - 50:end]) < 0), "never")
            print(f"| `{flags}` | {switch} | {sum(less[switch:switch + 10]) / 10:+.2f} | {recovered} |")


if __name__ == "__main__":
    main()
