"""What the switch costs: TST's loss minus the baseline's, same seed and step, from runs of run.py.

    python study/switch.py      # every run of "seeds", "r" and "length" that has its baseline

The spike is the difference of the training losses, mean of the first 10 steps after the switch.
The steps to recover are those from the switch until the validation losses cross for good, on
straight lines between the evaluations. (The spike is large enough for training losses, the
crossing is not: after the switch the two read different text.)
"""
from run import EXPERIMENTS, log, pairs


def cost(flags, plain):
    """(switch step, spike, steps to recover or None) of a run and its baseline."""
    ours, theirs = log(flags), log(plain)
    less = [a["loss"] - b["loss"] for a, b in zip(ours, theirs)]
    switch = sum(line["phase"] == "superposition" for line in ours)
    points = [(a["step"], a["val_loss"] - b["val_loss"]) for a, b in zip(ours, theirs)
              if a["val_loss"]]
    recovered = None
    for (step, before), (later, after) in zip(points, points[1:]):
        if before > 0 > after:
            recovered = round(step + (later - step) * before / (before - after)) - switch
    return switch, sum(less[switch:switch + 10]) / 10, recovered if points[-1][1] < 0 else None


def main():
    print("| flags | switch | spike | steps to recover |\n| --- | --- | --- | --- |")
    runs = [flags for name in ("seeds", "r", "length") for flags in EXPERIMENTS[name]]
    for flags, plain in pairs(runs):
        switch, spike, recovered = cost(flags, plain)
        after = "never" if recovered is None else recovered
        print(f"| `{flags}` | {switch} | {spike:+.2f} | {after} |")


if __name__ == "__main__":
    main()
