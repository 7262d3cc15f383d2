"""The README's table: final validation losses of finished runs, TST against the baseline seed by seed.

    python study/table.py runs/*

Runs are grouped by their flags; a group with s > 1 is paired with the baseline that
shares every other flag, and the difference is given with its spread over the seeds.
"""
import json
import statistics
import sys
from collections import defaultdict
from pathlib import Path

METHOD = ("s", "r", "s_in", "s_out", "weighting")
IRRELEVANT = ("out", "resume", "given", "device", "compile", "micro_batch_size", "eval_every", "save_every")


def finished(folder):
    """(method, other flags, seed, validation loss, minutes) of a run that reached its last step, else None."""
    args = json.loads((folder / "args.json").read_text())
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    if last["step"] < args["steps"]:
        return None
    other = tuple((name, value) for name, value in args.items() if name not in METHOD + IRRELEVANT + ("seed",))
    method = tuple(args[name] for name in METHOD) if max(args["s_in"], args["s_out"]) > 1 and args["r"] else "baseline"
    return method, other, args["seed"], last["val_loss"], last["seconds"] / 60


def spread(values):
    return f"{statistics.mean(values):.4f} +- {statistics.stdev(values) if len(values) > 1 else float('nan'):.4f}"


runs = defaultdict(lambda: defaultdict(dict))
for folder in map(Path, sys.argv[1:]):
    run = finished(folder) if (folder / "metrics.jsonl").exists() else None
    if run:
        method, other, seed, loss, minutes = run
        runs[other][method][seed] = loss
for other, methods in runs.items():
    print(" ".join(f"{name}={value}" for name, value in other))
    for method, losses in sorted(methods.items(), key=str):
        name = method if method == "baseline" else "s={} r={} (in {}, out {}) {}".format(*method)
        print(f"  {name}: {spread(losses.values())}  " + "  ".join(f"seed {k}: {v:.4f}" for k, v in sorted(losses.items())))
        shared = [losses[seed] - methods["baseline"][seed] for seed in losses if seed in methods.get("baseline", {})]
        if method != "baseline" and shared:
            print(f"    minus the baseline: {spread(shared)} over {len(shared)} seeds")
