"""Does superposition change which experts are used? Their load before and after the switch.

    python study/run.py experts                             # tiny-moe, the runs
    pip install matplotlib && python study/experts.py       # a table, and study/experts.png

The load of a layer is the share of slots that each of its experts has, over rows spread over the
validation split. "Moved" is the share of the slots that would have to change hands to turn one
load into another, mean over layers: 0 where both use the experts alike. "Kept", of two readings
of the same tokens, is the mean share of a token's experts that are the same in both; by chance it
would be n_active / n_expert.
"""
from collections import defaultdict

from run import EXPERIMENTS, HERE, ROOT, baseline, finished, folder, log

import numpy as np
import torch

import data
from table import spread
from tools.sample import load_model

ROWS = 500                              # of l tokens, or of l bags, that the load is measured on
READINGS = ("bags at the switch", "single tokens at the switch", "single tokens at the end")


@torch.no_grad()
def choices(path, tokens, s):
    """The experts that a checkpoint chooses, reading bags of s: (layers, positions, k)."""
    model, _ = load_model(path)
    found = [[] for _ in model.blocks]
    for block, chosen in zip(model.blocks, found):
        k = block.mlp.n_active
        block.mlp.router.register_forward_hook(
            lambda _, x, logits, k=k, chosen=chosen: chosen.append(logits.topk(k).indices))
    l = model.config.seq_len
    starts = np.linspace(0, len(tokens) - l * s - 1, ROWS).astype(int)
    for group in np.array_split(starts, ROWS // 10):
        rows = torch.from_numpy(np.stack([tokens.read(start, l * s + 1) for start in group]))
        model(data.bags(rows, s, 1)[0])
    return torch.stack([torch.cat(chosen) for chosen in found])


def load(chosen, n_expert):
    """(layers, positions, k) -> the share of slots of each expert, (layers, n_expert)."""
    counts = torch.nn.functional.one_hot(chosen.flatten(1), n_expert).sum(1)
    return counts / counts.sum(1, keepdim=True)


def moved(one, other):
    return ((one - other).abs().sum(1) / 2).mean().item()


def kept(one, other):
    """Of each token's choice, the mean share that is in its other choice too."""
    return (one[..., :, None] == other[..., None, :]).any(-1).double().mean().item()


def readings(flags):
    """Of a finished run, what it chooses in each of READINGS; of a baseline, at the end alone."""
    out, (args, _) = folder(flags), finished(folder(flags))
    _, tokens, _, _ = data.load(ROOT / args["data"])
    last = choices(out / "ckpt.pt", tokens, 1)
    if flags == baseline(flags):
        return args["n_expert"], {READINGS[2]: last}
    found = [choices(out / "ckpt_switch.pt", tokens, s) for s in (args["s_in"][-1], 1)]
    return args["n_expert"], dict(zip(READINGS, [*found, last]))


def main():
    try:
        from matplotlib import pyplot
    except ImportError:
        raise SystemExit("study/experts.py: matplotlib is missing: pip install matplotlib")
    runs = [flags for flags in EXPERIMENTS["experts"] if finished(folder(flags))]
    if not runs:
        raise SystemExit("study/experts.py: no runs yet: python study/run.py experts")
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 3.8), constrained_layout=True)
    table, of_tst = defaultdict(list), []
    for flags in runs:
        tst, lines = flags != baseline(flags), log(flags)
        shares = np.array([line["largest_share"] for line in lines])
        smooth = np.convolve(shares, np.full(50, 1 / 50), "valid")
        left.plot(np.arange(50, len(shares) + 1), smooth, color="tab:blue" if tst else "tab:grey",
                  linewidth=1, label=None if "--seed" in flags else "TST" if tst else "baseline")
        n_expert, found = readings(flags)
        loads = {name: load(chosen, n_expert) for name, chosen in found.items()}
        for name in loads:
            table[tst, f"largest share, {name}"].append(loads[name].amax(1).mean().item())
        if tst:
            bags, before, end = READINGS
            table[tst, f"moved, {bags} to {before}"].append(moved(loads[bags], loads[before]))
            table[tst, f"moved, {before} to {end}"].append(moved(loads[before], loads[end]))
            table[tst, f"kept, {before} to {end}"].append(kept(found[before], found[end]))
            of_tst.append((loads, sum(line["phase"] == "superposition" for line in lines)))
    for loads, switch in of_tst[:1]:                            # seed 0's
        draw_loads(right, loads)
        left.axvline(switch, color="tab:blue", linestyle=":")
    left.axhline(1 / n_expert, color="black", linewidth=0.8, linestyle="--")
    left.set_ylim(0)
    left.set_xlabel("steps (dotted: the switch; dashed: all experts alike)")
    left.set_ylabel("share of the most used expert")
    left.set_title("In training, mean of 50 steps, a line a seed", fontsize=10)
    left.legend(frameon=False, fontsize=9)
    left.grid(alpha=0.3)
    figure.savefig(HERE / "experts.png", dpi=110)
    print("| run | what | seeds | mean | each |\n| --- | --- | --- | --- | --- |")
    for (tst, what), values in table.items():
        print(f"| {'TST' if tst else 'baseline'} | {what} | {len(values)} | {spread(values)} | "
              f"{', '.join(f'{value:.3f}' for value in values)} |")


def draw_loads(axes, loads):
    """Each expert's share in the three readings, layer after layer, sorted by the first."""
    order = loads[READINGS[0]].argsort(1, descending=True)
    n_layer, n_expert = order.shape
    places = np.concatenate([np.arange(n_expert) + k * (n_expert + 1) for k in range(n_layer)])
    for (name, found), marker in zip(loads.items(), "s^o"):
        axes.plot(places, found.gather(1, order).flatten(), marker, label=name, alpha=0.8)
    axes.axhline(1 / n_expert, color="black", linewidth=0.8, linestyle="--")
    axes.set_ylim(0)
    axes.set_xticks([k * (n_expert + 1) + (n_expert - 1) / 2 for k in range(n_layer)],
                    [f"layer {k + 1}" for k in range(n_layer)])
    axes.set_xlabel("experts of each layer, most used by bags first")
    axes.set_ylabel("share of slots")
    axes.set_title("The load over the validation split, seed 0", fontsize=10)
    axes.legend(frameon=False, fontsize=9)


if __name__ == "__main__":
    main()
