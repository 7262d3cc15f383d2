"""Run named experiments, --workers runs at a time with one core each, into study/results.csv.

    python study/run.py                         # the experiments and how much of each is done
    python study/run.py seeds lr                # run them; what is done is skipped, what stopped
                                                # goes on; a row a run
    python study/run.py seeds --test            # and look at the test split, once, at the end
    python study/run.py seeds --done            # train and measure nothing: rows of what is done

A run's folder is runs/study/ and its flags. The same run in two experiments is made once and has
a row in each. Of baselines that differ in --steps alone only the longest is trained from its
start, and the others branch off where their decay begins (study/branch.py). `commit` is that of
the code which trained a run, with a + if it was changed; rows without one, and without a
data_hash, are older than these columns, and keep the commands of their time.
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
ROOT = HERE.parent
sys.path.insert(0, str(ROOT))
RUNS, RESULTS = ROOT / "runs" / "study", HERE / "results.csv"
SPLIT = ("bpb", "hit", "seen", "unseen", "again")           # by study/split.py
LOSSES = ("val_loss", "test_loss", "val_bpb", *SPLIT)
COLUMNS = ("experiment", "seed", "s", "r", "lr", "decay_frac", "steps", "tokens", "epochs",
           "vocab_size", *LOSSES, "seconds", "commit", "data_hash", "command")


def grid(**flags):
    """Every combination of the flags' values as command lines; at None a flag is left out.

    grid(s=[1, 2], seed=[None, 1]) -> ["--s 1", "--s 1 --seed 1", "--s 2", "--s 2 --seed 1"]
    """
    values = [value if isinstance(value, list) else [value] for value in flags.values()]
    names = [name.replace("_", "-") for name in flags]
    return [" ".join(f"--{name} {value}" for name, value in zip(names, combination)
                     if value is not None)
            for combination in itertools.product(*values)]


def both(**flags):
    """The baseline and tiny's own TST, each with those flags."""
    return grid(s=1, **flags) + grid(s=6, r=0.2, **flags)


# What is at tiny's default is left out, so that no run is made twice.
FIVE = [None, 1, 2, 3, 4]               # seeds
THREE = FIVE[:3]
SHRINKING = dict(s="8,4,2", r=0.15)
BEFORE = dict(n_layer=2, n_head=2, n_kv_head=1)         # tiny until now, which does not copy
LONG = dict(**BEFORE, steps=3500)
HEADS = "--n-head 4 --n-kv-head 4"
AROUND = [1680, None, 3360, 4800]       # baselines of 0.7, 1, 1.4 and 2 times tiny's steps, for w
C, C_4096, C_16384 = "data/c-1024", "data/c-4096", "data/c-16384"
PROSE = "data/prose-4096"
CELL = dict(data=C_4096, steps=4800)                    # where TST was furthest ahead on the map
GPU = dict(device="cuda")               # in bfloat16 and compiled, as a GPU's default is
# 6.9M parameters, on 74M tokens: a usual shape, not looked for
WIDE = dict(n_layer=6, n_embd=256, n_head=4, n_kv_head=4, n_hidden=704, init_std=0.02, seq_len=256,
            batch_size=48, data=C_4096, steps=6000, **GPU)
SWITCHES = [4, 6, 8, "8,4", "8,4,2", "6,3"]             # three hard ones, three that shrink
EXPERIMENTS = {
    "seeds": both(seed=FIVE),
    # tiny by the baseline alone: 270 s on two idle cores, by the time of a step measured alone
    "search": [f"--s 1 {flags}" for flags in (
        "--n-layer 2 --n-head 2 --n-kv-head 1 --steps 3058",
        f"--n-layer 2 {HEADS} --n-hidden 256 --steps 2718",
        f"--n-layer 3 {HEADS} --steps 2358",
        f"--n-layer 3 {HEADS} --lr 6e-3 --steps 2358",
        f"--n-layer 3 {HEADS} --decay-frac 0.6 --steps 2358",
        f"--n-layer 3 {HEADS} --n-hidden 128 --steps 2600",
        "--n-layer 3 --n-head 4 --n-kv-head 2 --steps 2510",
        "--n-layer 3 --n-head 4 --n-kv-head 2 --n-hidden 256 --steps 2310",
        "--n-layer 3 --n-head 2 --n-kv-head 2 --n-hidden 256 --steps 2213",
        f"--n-layer 3 {HEADS} --n-hidden 256 --steps 2176",
        f"--n-layer 3 {HEADS} --n-hidden 256 --lr 6e-3 --steps 2176",
        f"--n-layer 3 {HEADS} --n-hidden 256 --init-std 0.02 --steps 2176",
        f"--n-layer 3 {HEADS} --n-hidden 256 --batch-size 16 --steps 3471",
        f"--n-layer 3 {HEADS} --n-hidden 256 --seq-len 64 --batch-size 48 --steps 2148",
        f"--n-layer 3 {HEADS} --n-hidden 256 --seq-len 128 --batch-size 24 --steps 1962",
        f"--n-layer 3 {HEADS} --n-hidden 256 --data data/python-2048 --steps 1649",
        f"--n-layer 3 --n-embd 128 {HEADS} --n-hidden 192 --steps 1750",
        f"--n-layer 3 --n-embd 128 {HEADS} --n-hidden 320 --steps 1567",
        f"--n-layer 4 {HEADS} --steps 1880",
        f"--n-layer 4 {HEADS} --n-hidden 256 --seq-len 128 --batch-size 12 --steps 2560",
        f"--n-layer 4 {HEADS} --n-hidden 256 --seq-len 256 --batch-size 6 --steps 2396",
        f"--n-layer 4 --n-embd 64 {HEADS} --n-hidden 192 --steps 2706")],
    # TST's s and r on tiny, with seed 0
    "tuning": both() + grid(s=6, r=0.1) + grid(s=4, r=0.2),
    # how much of TST is copying: tiny of before, and trunks whose baseline copies
    "copying": both(**LONG, seed=THREE) + grid(s=6, r=0.1, **LONG, seed=THREE)
    + grid(**SHRINKING, **LONG, seed=THREE) + grid(patch="kv-shift", s=1, **LONG, seed=THREE)
    + grid(patch="kv-shift", s=6, r=[0.2, 0.1], **LONG, seed=THREE)
    + grid(patch="kv-shift", **SHRINKING, **LONG, seed=THREE)
    + both(n_layer=4, n_head=4, n_kv_head=4, steps=3500)
    + grid(s=1, **LONG, seq_len=576, batch_size=5),
    # does a residual stream in bfloat16 cost quality?
    "residual": grid(s=1, **BEFORE, steps=1000, seed=THREE)
    + grid(patch="residual", s=1, **BEFORE, steps=1000, seed=THREE),
    "experts": grid(model="tiny-moe", s=1, seed=THREE)
    + grid(model="tiny-moe", s=6, r=0.2, seed=THREE),
    "worth": grid(s=1, steps=AROUND, seed=FIVE),
    # what a superposed step is worth, by corpus, length and s: seed 0, and three on C
    "map": grid(s=1, data=C, steps=[1680, 3360, 6720])
    + both(data=C, steps=[None, 4800, 9600], seed=THREE)
    + grid(s=[2, 4], r=0.2, data=C, steps=[None, 4800])
    + grid(s=[2, 4], r=0.2, data=C, steps=4800, seed=[1, 2])
    + grid(s=1, data=PROSE, steps=AROUND)
    + grid(s=[2, 6], r=0.2, data=PROSE, steps=[None, 4800])
    + both(data=PROSE, steps=4800, seed=[1, 2])
    + grid(s=1, data=C_4096, steps=[None, 4800])
    + grid(s=[2, 6], r=0.2, data=C_4096, steps=[None, 4800])
    + both(**CELL, seed=[1, 2]),
    # that cell, with seeds that had no part in choosing it
    "confirm": both(**CELL, seed=[3, 4, 5, 6, 7]),
    # which half of the method teaches what, on the map's middle length
    "halves": both(data=C, steps=4800) + grid(s=6, r=0.2, s_in=1, data=C, steps=4800)
    + grid(s=6, r=0.2, s_out=1, data=C, steps=4800)
    + grid(s=6, r=0.2, weighting="power", data=C, steps=4800),
    # past the hard switch: as many shrinking schedules as hard switches, chosen on seeds 0 and 1
    "past": grid(s=1, seed=[None, 1]) + grid(s=SWITCHES, r=[0.1, 0.2], seed=[None, 1]),
    # the best of either kind, on fresh seeds
    "past-confirm": grid(s=1, seed=FIVE[2:]) + grid(s=4, r=0.2, seed=FIVE[2:])
    + grid(s="6,3", r=0.1, seed=FIVE[2:]),
    "past-cell": grid(s=1, **CELL, **GPU, seed=[None, 1])
    + grid(s=SWITCHES, r=[0.1, 0.2], **CELL, **GPU, seed=[None, 1]),
    # the best of the nine that a GPU finished, on fresh seeds, and s = 6 on the same
    "past-cell-confirm": both(**CELL, seed=[3, 4, 5, 6, 7])
    + grid(s="8,4", r=0.2, **CELL, seed=[3, 4, 5, 6, 7]),
    # on a GPU: the cell again with ten more seeds, longer runs, a larger vocabulary; then a
    # larger model
    "confirm-gpu": both(**CELL, **GPU, seed=list(range(8, 18))),
    "map-gpu": both(data=C_4096, steps=[9600, 24_000], **GPU, seed=THREE)
    + both(data=C_16384, steps=4800, **GPU, seed=THREE),
    # each at the best rate of the four, by the mean of the seeds: for both the same one
    "wide-rates": both(lr=[5e-4, 1e-3, 2e-3, 4e-3], **WIDE, seed=FIVE[:4]),
    "wide": both(lr=2e-3, **WIDE, seed=FIVE[:4]),
    # the same sweep of the learning rate for both, on Python and on the cell of `confirm`
    "lr": both(lr=[None, 1.5e-3, 6e-3]) + both(**CELL, lr=[None, 1.5e-3, 6e-3]),
    # one seed had chosen the larger model's rates, and had misled: the cell's again, with three
    "lr-cell": both(**CELL, lr=[None, 6e-3], seed=THREE),
    "decay": both(decay_frac=[None, 0.2, 0.6]),
    "init": both(init_std=[None, 0.02], seed=THREE),
    "length": both(steps=[1200, 4800, 9600]) + grid(**SHRINKING, steps=[1200, 4800, 9600]),
    "r": both(seed=THREE) + grid(s=6, r=[0.1, 0.15, 0.3], seed=THREE)
    + grid(**SHRINKING, seed=THREE),
    "ablations": grid(s=1) + grid(s=[6, 16], r=0.2) + grid(s=[6, 16], r=0.2, s_in=1)
    + grid(s=[6, 16], r=0.2, s_out=1) + grid(s=[6, 16], r=0.2, weighting=["power", "exp"])
    + grid(edit="tables", s=[6, 16], r=0.2),
    "transitions": both() + grid(edit=["moments", "scale", "rewarm"], s=6, r=0.2)
    + grid(**SHRINKING) + grid(**SHRINKING, weighting="power") + grid(**SHRINKING, s_in="8,1,1"),
    "grid": grid(s=1, steps=2000)
    + grid(s=[2, 3, 4, 6, 8, 12, 16], r=[0.1, 0.2, 0.3, 0.5], steps=2000),
}


def folder(flags):
    return RUNS / flags.replace("--", "").replace("/", "-").replace(" ", "_")


def script(flags):
    names = {"--edit": "study/edit.py", "--patch": "study/patched.py"}
    return names.get(flags.split()[0], "train_tst.py")


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


def pairs(runs):
    """[(flags, its baseline's), ...] of the TST runs among `runs` where both are done."""
    return [(flags, baseline(flags)) for flags in dict.fromkeys(runs)
            if flags != baseline(flags) and finished(folder(flags))
            and finished(folder(baseline(flags)))]


def log(flags):
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (folder(flags) / "metrics.jsonl").read_text().splitlines()]


# Making runs

def chains(runs):
    """[[flags, ...], ...]: what one worker makes in turn.

    One run, or baselines that differ in nothing but --steps, the longest first.
    """
    from train_tst import parse
    found = {}
    for flags in runs:
        args = parse(flags.split()) if script(flags) == "train_tst.py" else None
        if args is None or args.r > 0:
            found[flags] = [(0, flags)]
        else:
            same = {name: value for name, value in vars(args).items() if name != "steps"}
            found.setdefault(json.dumps(same), []).append((args.steps, flags))
    return [[flags for _, flags in sorted(chain, reverse=True)] for chain in found.values()]


def make_data(runs):
    """Make the study's corpora that the runs name, where they are not there yet."""
    from corpora import make
    for path in dict.fromkeys(re.findall(r"--data (\S+)", " ".join(runs))):
        if not (ROOT / path).exists():
            make(ROOT / path)


def commit():
    """The commit of this code, with a + where the files that train differ from it."""
    def git(*words):
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True)

    files = ("train_tst.py", "model.py", "data.py")
    name = git("rev-parse", "--short", "HEAD").stdout.strip() or "unknown"
    return f"{name}+" if git("diff", "--quiet", "HEAD", "--", *files).returncode else name


def note_commit(out):
    """Write this code's commit into a run's folder, after those that trained it so far."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / "commit.txt"
    names = path.read_text().split() if path.exists() else []
    if commit() not in names:
        path.write_text(" ".join([*names, commit()]))


def python(out, *words):
    """Run a script with one thread. What it prints goes to a file beside the run's folder."""
    with open(f"{out}.txt", "a") as output:
        subprocess.run([sys.executable, *words], stdout=output, stderr=output, cwd=ROOT,
                       env={**os.environ, "OMP_NUM_THREADS": "1"})


def train(chain):
    """Make the runs of a chain unless they are done -> what `finished` says of each."""
    for flags in chain:
        out = folder(flags)
        if not finished(out):
            note_commit(out)
            if "--edit" in flags:
                python(out, "study/edit.py", *flags.split())
            elif flags == chain[0] and len(chain) > 1:
                python(out, "study/branch.py", *chain)
            else:
                python(out, script(flags), *flags.split(), *way(out))
        if finished(out) and not (out / "split.json").exists():
            python(out, "study/split.py", flags)
    return done(chain)


def done(chain):
    """`train` without training or measuring anything."""
    return [finished(folder(flags)) for flags in chain]


def way(out):
    """The flags that a run of the study has beside its own."""
    return ["--out", str(out), "--resume", "--eval-every", "250"]


# Their rows

def test_loss(args, out):
    """The final model's loss on the test split, as train_tst.py takes val_loss on the other."""
    import torch

    import data
    import train_tst
    from patched import load
    model, _ = load(out)
    files = sorted((ROOT / args["data"]).glob("*test*.bin"))
    tokens = data.Stream(files, model.config.vocab_size)
    args, cpu = argparse.Namespace(**args), torch.device("cpu")
    return train_tst.evaluate(model, tokens, None, args, cpu, contextlib.nullcontext())[0]


def row(experiment, flags, args, last, test):
    """The row of a finished run; without its split.json SPLIT is empty. test: its loss, or None."""
    from train_tst import as_text
    out = folder(flags)
    meta, split = json.loads((out / "meta.json").read_text()), dict.fromkeys(SPLIT)
    if (out / "split.json").exists():
        split = json.loads((out / "split.json").read_text())
    commits = out / "commit.txt"
    # 2 bytes a token, after a header of 1,024
    train_tokens = sum(path.stat().st_size // 2 - 512
                       for path in (ROOT / args["data"]).glob("*train*.bin"))
    known = {**args, **last, **split, "s": as_text(args["s"]), "lr": f"{args['lr']:g}",
             "experiment": experiment, "command": f"python {script(flags)} {flags}",
             "epochs": f"{last['tokens'] / train_tokens:.2f}", "test_loss": test,
             "seconds": f"{last['seconds']:.0f}", "vocab_size": meta["vocab_size"],
             "data_hash": meta["hash"][:12],
             "commit": commits.read_text() if commits.exists() else "unknown"}
    for name in LOSSES:
        known[name] = "" if known[name] is None else f"{known[name]:.4f}"
    return {name: known[name] for name in COLUMNS}


def key(row):
    return row["experiment"], row["command"], row["data_hash"]


def read_rows():
    """The rows of results.csv, in which those of before have no commit and no data_hash."""
    with RESULTS.open() as file:
        return [{**dict.fromkeys(COLUMNS, ""), **row} for row in csv.DictReader(file)]


def write_rows(rows):
    with RESULTS.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiments", nargs="*", choices=[[], *EXPERIMENTS])
    parser.add_argument("--test", action="store_true", help="also compute test_loss")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time (default: 2)")
    parser.add_argument("--done", action="store_true", help="train and measure nothing")
    args = parser.parse_args()
    if args.workers < 1:
        parser.error(f"--workers {args.workers}: give a number from 1 on")
    if not args.experiments:
        for name, runs in EXPERIMENTS.items():
            count = sum(finished(folder(flags)) is not None for flags in runs)
            print(f"{name}: {count} of {len(runs)} runs done")
        return
    rows = {key(row): row for row in read_rows()}
    runs = list(dict.fromkeys(flags for name in args.experiments for flags in EXPERIMENTS[name]))
    if args.done:
        runs = [flags for flags in runs if finished(folder(flags))]
    make_data(runs)
    work, make = chains(runs), done if args.done else train
    with ThreadPoolExecutor(args.workers) as pool:
        for chain, results in zip(work, pool.map(make, work)):
            for flags, result in zip(chain, results):
                if result is None:
                    print(f"did not finish: {flags}; see {folder(flags)}.txt")
                    continue
                test = test_loss(result[0], folder(flags)) if args.test else None
                for name in (name for name in args.experiments if flags in EXPERIMENTS[name]):
                    new = row(name, flags, *result, test)
                    old = rows.get(key(new), new)
                    rows[key(new)] = {**new, "test_loss": new["test_loss"] or old["test_loss"]}
                    print(", ".join(f"{name} {value}" for name, value in new.items() if value),
                          flush=True)
            write_rows(rows.values())


if __name__ == "__main__":
    main()
