"""What is a superposed step worth, in plain steps?

B(n) is the loss of a baseline of n steps with its own decay, n* the steps at which B(n*) is TST's
loss, and r n of TST's n steps are superposed. Then they are worth w = (n* - (1 - r) n) / (r n)
plain steps each: at w = 1 TST breaks even, at w = s it has the whole of its throughput.
study/table.py prints w where results.csv has baselines of other lengths.
"""
import math
import statistics


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
