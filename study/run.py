"""Run named experiments, two runs at a time with one core each, into study/results.csv, one row a run.

    python study/run.py                         # the experiments and how much of each is done
    python study/run.py seeds lr                # run them; what is done is skipped, what stopped goes on
    python study/run.py seeds --test            # and look at the test split, once, for the final table

A run's folder is runs/study/ and its flags. The same run in two experiments is made once
and has a row in each.
"""
import argparse
import contextlib
import csv
import itertools
import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
RUNS, RESULTS = HERE.parent / "runs" / "study", HERE / "results.csv"
COLUMNS = ("experiment", "seed", "s", "r", "lr", "decay_frac", "steps", "tokens", "epochs", "val_loss", "test_loss",
           "val_bpb", "seconds", "command")


def grid(**flags):
    """Every combination of the flags' values as command lines; at None a flag is left out.

    grid(s=[1, 2], seed=[None, 1]) -> ["--s 1", "--s 1 --seed 1", "--s 2", "--s 2 --seed 1"]
    """
    values = [value if isinstance(value, list) else [value] for value in flags.values()]
    names = [name.replace("_", "-") for name in flags]
    return [" ".join(f"--{name} {value}" for name, value in zip(names, combination) if value is not None)
            for combination in itertools.product(*values)]


def both(**flags):
    """The baseline and tiny's own TST, each with those flags."""
    return grid(s=1, **flags) + grid(s=6, r=0.2, **flags)


FIVE = [None, 1, 2, 3, 4]               # seeds; what is at tiny's default is left out, so that no run is made twice
THREE = FIVE[:3]
SHRINKING = dict(s="8,4,2", r=0.15)
NARROW, SMALL = dict(n_embd=64, n_hidden=128, steps=5000), dict(n_embd=32, n_hidden=64)
EXPERIMENTS = {
    "blocks": both(seed=THREE),         # with batches of shuffled blocks; the rows of the others are older
    "seeds": both(seed=FIVE) + grid(**SHRINKING, seed=FIVE),                    # equal FLOPs
    "steps": both(seed=THREE) + grid(**SHRINKING, seed=THREE)                   # equal loss: how many steps reach it?
    + grid(s=1, steps=[7000, 10500], seed=THREE) + grid(s=1, steps=[4375, 5250, 8750], seed=1),
    "length": both(seed=FIVE) + both(steps=1000, seed=THREE) + both(steps=[2000, 7000])             # when does it pay?
    + grid(**SHRINKING, seed=FIVE) + grid(**SHRINKING, steps=1000, seed=THREE) + grid(**SHRINKING, steps=[2000, 7000])
    + both(**SMALL, steps=[1000, 2000, 4000, 8000]) + grid(**SHRINKING, **SMALL, steps=[1000, 2000, 4000, 8000]),
    "r": both(seed=THREE) + grid(s=6, r=[0.1, 0.3], seed=THREE) + grid(s=6, r=0.15, seed=[None, 1])
    + grid(**SHRINKING, seed=THREE) + grid(s="8,4", r=0.1) + grid(s="8,8,4,2", r=0.2, seed=1),
    "lr": both(lr=[None, 1.5e-3, 6e-3]),                                        # fair ground: best against best
    "decay": both(decay_frac=[None, 0.2, 0.6]),
    "init": grid(s=1, init_std=[None, 0.02], seed=THREE),
    "narrow": both(**NARROW) + grid(**SHRINKING, **NARROW),                     # another size and length
    "ablations": grid(s=1) + grid(s=[6, 16], r=0.2) + grid(s=[6, 16], r=0.2, s_in=1) + grid(s=[6, 16], r=0.2, s_out=1)
    + grid(s=[6, 16], r=0.2, weighting=["power", "exp"]) + grid(s=6, r=0.2, weighting="first")  # is input-only
    + grid(edit="tables", s=[6, 16], r=0.2),
    "transitions": both() + grid(edit=["moments", "scale", "rewarm"], s=6, r=0.2) + grid(**SHRINKING)
    + grid(**SHRINKING, weighting="power") + grid(**SHRINKING, s_in="8,1,1")
    + grid(s="8,2,6,3,4,8,2,6,3,4", r=0.15) + grid(s="6,1,6,1,6,1,6", r=0.21),
    "grid": grid(s=1, steps=2000) + grid(s=[2, 3, 4, 6, 8, 12, 16], r=[0.1, 0.2, 0.3, 0.5], steps=2000),
}


def folder(flags):
    return RUNS / flags.replace("--", "").replace(" ", "_")


def script(flags):
    return "study/edit.py" if "--edit" in flags else "train_tst.py"


def finished(out):
    """(args, last log line) of the run in a folder if it has reached its end, else None."""
    try:
        args = json.loads((out / "args.json").read_text())
        last = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
        return (args, last) if last["step"] == args["steps"] else None
    except (OSError, ValueError, IndexError):
        return None


def baseline(flags):
    """The flags of the baseline of a run whose flags begin with --s and --r: the same others."""
    return re.sub(r"--s [\d,]+( --r [\d.,]+)?", "--s 1", flags)


def log(flags):
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (folder(flags) / "metrics.jsonl").read_text().splitlines()]


def train(flags):
    """Make one run unless it is done. Its output goes to a file beside its folder."""
    out = folder(flags)
    if not finished(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        with open(f"{out}.txt", "a") as output:
            more = [] if "--edit" in flags else ["--out", str(out), "--resume", "--eval-every", "250"]
            subprocess.run([sys.executable, script(flags), *flags.split(), *more], stdout=output, stderr=output,
                           cwd=HERE.parent, env={**os.environ, "OMP_NUM_THREADS": "1"})
    return finished(out)


def test_loss(args, out):
    """The final model's loss on the test split, taken as train_tst.py takes val_loss on the other; args: the run's."""
    import torch

    import data
    import train_tst
    from model import load_model
    model, _ = load_model(out)
    files = sorted((HERE.parent / args["data"]).glob("*test*.bin"))
    tokens = data.Stream(files, model.config.vocab_size)
    args, cpu = argparse.Namespace(**args), torch.device("cpu")
    return train_tst.evaluate(model, tokens, None, args, cpu, contextlib.nullcontext())[0]


def row(experiment, flags, args, last, test):
    # 2 bytes a token, after a header of 1,024
    train_tokens = sum(path.stat().st_size // 2 - 512 for path in (HERE.parent / args["data"]).glob("*train*.bin"))
    from train_tst import as_text
    bags = {name: as_text(args[name]) for name in ("s", "r")}
    known = {**args, **last, **bags, "experiment": experiment, "command": f"python {script(flags)} {flags}",
             "epochs": f"{last['tokens'] / train_tokens:.2f}", "test_loss": f"{test:.4f}" if test else "",
             "seconds": f"{last['seconds']:.0f}", "lr": f"{args['lr']:g}"}
    return {name: f"{known[name]:.4f}" if name in ("val_loss", "val_bpb") else known[name] for name in COLUMNS}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiments", nargs="*", choices=[[], *EXPERIMENTS])
    parser.add_argument("--test", action="store_true", help="also compute test_loss")
    args = parser.parse_args()
    if not args.experiments:
        for name, runs in EXPERIMENTS.items():
            print(f"{name}: {sum(finished(folder(flags)) is not None for flags in runs)} of {len(runs)} runs done")
        return
    old = list(csv.DictReader(RESULTS.open())) if RESULTS.exists() else []
    rows = {(line["experiment"], line["command"]): line for line in old}
    jobs = [(name, flags) for name in args.experiments for flags in EXPERIMENTS[name]]
    with ThreadPoolExecutor(2) as pool:
        runs = list(dict.fromkeys(flags for _, flags in jobs))
        for flags, result in zip(runs, pool.map(train, runs)):
            if result is None:
                print(f"did not finish: {flags}; see {folder(flags)}.txt")
                continue
            test = test_loss(result[0], folder(flags)) if args.test else None
            for name in (name for name, other in jobs if other == flags):
                new = row(name, flags, *result, test)
                rows[name, new["command"]] = {**new, "test_loss": new["test_loss"] or
                                              rows.get((name, new["command"]), new)["test_loss"]}
                print(", ".join(f"{key} {value}" for key, value in new.items() if value != ""), flush=True)
            with RESULTS.open("w", newline="") as file:
                writer = csv.DictWriter(file, COLUMNS)
                writer.writeheader()
                writer.writerows(rows.values())


if __name__ == "__main__":
    main()
