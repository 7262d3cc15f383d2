"""What is a superposed step worth, in plain steps?

B(n) is the loss of a baseline of n steps with its own decay, n* the steps at which B(n*) is TST's
loss, and r n of TST's n steps are superposed. Then they are worth w = (n* - (1 - r) n) / (r n)
plain steps each: at w = 1 TST breaks even, at w = s it has the whole of its throughput.
study/table.py prints w where results.csv has baselines of other lengths.

    python study/worth.py               # w in the paper's own tables
"""
import math
import statistics

# The paper's tables (arXiv 2605.06546): model, steps, s, r, TST's loss, {steps: loss} of baselines
SMALL = {20_000: 3.212, 100_000: 3.092}
PAPER = (("270M", 20_000, 6, 0.3, 3.142, SMALL),
         ("270M", 100_000, 6, 0.3, 3.048, SMALL),
         ("600M", 20_000, 6, 0.3, 2.943, {20_000: 3.019}),
         ("3B", 20_000, 6, 0.3, 2.676, {20_000: 2.808, 36_000: 2.677, 50_000: 2.640}),
         ("10B-A1B", 49_983, 16, 0.25, 2.236, {125_000: 2.252}))
GRID_SIZES = (2, 3, 4, 5, 6, 8, 10, 12, 16)
PAPER_GRID = {      # appendix E, 270M at 20,000 steps: {r: the loss for each of GRID_SIZES}
    0.1: (3.1847, 3.1646, 3.1549, 3.1539, 3.1496, 3.1495, 3.1498, 3.1495, 3.1487),
    0.2: (3.1751, 3.1555, 3.1480, 3.1461, 3.1425, 3.1419, 3.1434, 3.1437, 3.1455),
    0.3: (3.1723, 3.1517, 3.1457, 3.1434, 3.1423, 3.1425, 3.1438, 3.1454, 3.1484),
    0.5: (3.1729, 3.1527, 3.1496, 3.1461, 3.1485, 3.1506, 3.1544, 3.1550, 3.1611)}
GRID_BASELINES = {20_000: 3.2124, 100_000: 3.092}


def worth(loss, baselines, n, r):
    """(w, bound) of a run of n steps that ends at loss; baselines: {steps: loss}.

    n* is interpolated in log steps. bound is "" or, where loss is outside of the baselines, ">"
    or "<": then w is that of the longest or the shortest of them.
    """
    equal, bound = steps_to(loss, sorted(baselines.items()))
    return (equal - (1 - r) * n) / (r * n), bound


def steps_to(loss, baselines):
    """(n*, bound), of [(steps, loss), ...] from the shortest to the longest."""
    if loss > baselines[0][1]:
        return baselines[0][0], "<"
    for (few, high), (many, low) in zip(baselines, baselines[1:]):
        if high >= loss >= low:
            part = (high - loss) / (high - low) if high > low else 0.0
            return math.exp((1 - part) * math.log(few) + part * math.log(many)), ""
    if loss == baselines[-1][1]:
        return baselines[-1][0], ""
    return baselines[-1][0], ">"


def as_text(worths):
    """[(w, bound), ...] of several seeds: mean and deviation, or all where one is a bound."""
    if any(bound for _, bound in worths):
        return ", ".join(f"{bound} {w:.2f}".strip() for w, bound in worths)
    values = [w for w, _ in worths]
    deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{deviation}"


def main():
    print("| model | steps | s | r | w |\n| --- | --- | --- | --- | --- |")
    for model, n, s, r, loss, baselines in PAPER:
        print(f"| {model} | {n:,} | {s} | {r} | {as_text([worth(loss, baselines, n, r)])} |")
    print(f"\n| 270M: r \\ s | {' | '.join(map(str, GRID_SIZES))} |\n"
          f"{'| --- ' * (1 + len(GRID_SIZES))}|")
    for r, losses in PAPER_GRID.items():
        worths = [worth(loss, GRID_BASELINES, 20_000, r)[0] for loss in losses]
        print(f"| {r} | {' | '.join(f'{w:.1f}' for w in worths)} |")


if __name__ == "__main__":
    main()
