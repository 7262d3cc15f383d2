"""Make the runs of the study, several at a time, and append a row for each run to results.csv.

    python study/run.py                                 # lists the experiments, and what is done
    python study/run.py first                           # makes or continues its runs
    python study/run.py scale --workers 6 --minutes 8   # on a GPU, in parts of 8 minutes

Each run is made once, in runs/study/, with one CPU thread. The .txt file beside its folder has the
output. In results.csv, `commit` is the code that trained the run, with a + if a core file was
changed, and `epochs` is the number of tokens that were read, divided by that of training tokens.
"""
import argparse
import csv
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import data
from train_tst import load_checkpoint

RUNS, RESULTS = ROOT / "runs" / "study", ROOT / "study" / "results.csv"
COLUMNS = ("experiment", "seed", "s", "r", "lr", "decay_frac", "steps", "tokens", "epochs",
           "vocab_size", "parameters", "val_loss", "val_bpb", "seconds", "commit", "data_hash",
           "command")


def runs(flags, seeds, methods=("--s 1", "--s 6 --r 0.2")):
    """The flags of each method with each seed, as a list. Seed 0 is the default of the trainer."""
    return [f"{method} {flags}" + (f" --seed {seed}" if seed else "")
            for seed in seeds for method in methods]


# 16,384 positions per step. Shapes and learning rates are those of two pairs of results.csv
LARGER = ("--model 270m --device cuda --data data/mixed-16384 --seq-len 512 --batch-size 32 "
          "--micro-batch-size 32 --steps 8000 --warmup-steps 200 --decay-frac 0.4 "
          "--eval-every 4000")
M13 = "--lr 0.002 --n-layer 6 --n-embd 256 --n-head 4 --n-kv-head 4 --n-hidden 704"
M42 = "--lr 0.001 --n-layer 8 --n-embd 512 --n-head 8 --n-kv-head 8 --n-hidden 1408"
# The setting of `confirm` on a corpus that anybody can make, with seeds that no other row has.
# The corpus comes from Linux 6.1.176 (kernel.org, or Debian's package linux-source-6.1):
#   python tools/corpus.py linux-6.1.176/{fs,kernel,mm,net,sound} --only "*.c" "*.h" \
#       --tokenizer train --vocab-size 4096 --out data/c
HOME = "--model tiny --device cpu --data data/c --steps 4800"
EXPERIMENTS = {     # the other rows of results.csv were made by earlier code
    "first": runs("--model tiny --device cpu", range(5),
                  ("--s 1", "--s 4 --r 0.2", "--s 6 --r 0.3")),
    "home": runs(HOME, range(18, 23)),
    "scale": runs(f"{LARGER} {M13}", range(2)) + runs(f"{LARGER} {M42}", [0]),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = data.fail
    parser.add_argument("experiments", nargs="*", choices=[[], *EXPERIMENTS], metavar="NAME")
    parser.add_argument("--workers", type=int, default=2,
                        help="the number of runs at the same time (default: 2)")
    parser.add_argument("--minutes", type=float, default=float("inf"),
                        help="minutes until the runs are saved and stopped (default: inf)")
    args = parser.parse_args()
    if not args.experiments:
        for name, commands in EXPERIMENTS.items():
            recorded = sum(row["experiment"] == name for row in read_rows())
            here = sum(finished(folder(flags)) is not None for flags in commands)
            print(f"{name}: {len(commands)} runs, {here} finished here, {recorded} in results.csv")
        return

    work = {flags: name for name in args.experiments for flags in EXPERIMENTS[name]}
    end = time.time() + 60 * args.minutes
    with ThreadPoolExecutor(max(1, args.workers)) as pool:
        waiting = {pool.submit(make, flags, end): flags for flags in work}
        try:
            for future in as_completed(waiting):
                flags, result = waiting[future], future.result()
                if result:
                    new = row_of(work[flags], flags, *result)
                    append(new)
                    print(f"{flags}: val_loss {new['val_loss']}, {new['seconds']} s", flush=True)
                else:
                    print(f"{folder(flags)} is not finished. See its .txt, if any.", flush=True)
        finally:
            pool.shutdown(cancel_futures=True)  # after Ctrl-C no further run begins


def make(flags, end):
    """Train a run until it is complete, or until the time `end` -> the result of `finished`."""
    out, seconds_left = folder(flags), end - time.time()
    if finished(out) or seconds_left < 0:
        return finished(out)
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "commit.txt", "a") as file:         # a run can be continued by other code
        file.write(f"{commit()} ")
    with open(f"{out}.txt", "a") as output:
        process = subprocess.Popen(
            [sys.executable, "train_tst.py", *flags.split(), "--out", str(out), "--resume"],
            stdout=output, stderr=output, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})
        try:
            process.wait(seconds_left)
        except subprocess.TimeoutExpired:
            process.terminate()                 # the trainer saves and stops
            process.wait()
    return finished(out)


def folder(flags):
    return RUNS / flags.replace("--", "").replace("/", "-").replace(" ", "_")


def finished(out):
    """(flags, last entry of the log) of the run in a folder, or None if it is not complete."""
    try:
        args = json.loads((out / "args.json").read_text())
        last = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
        return (args, last) if last["step"] == args["steps"] else None
    except (OSError, ValueError, IndexError):
        return None


def commit():
    """The commit of this code, with a + if one of the core files was changed since."""
    git = "git rev-parse --short HEAD && git diff --quiet HEAD -- train_tst.py model.py data.py"
    asked = subprocess.run(git, shell=True, cwd=ROOT, capture_output=True, text=True)
    return (asked.stdout.strip() or "unknown") + ("+" if asked.returncode else "")


def row_of(experiment, flags, args, last):
    """The row of a complete run in results.csv, as a dict."""
    out = folder(flags)
    train_tokens, _, meta, _ = data.load(ROOT / args["data"])
    weights = load_checkpoint(out)["model"]
    known = {**last, **args, "experiment": experiment, "command": f"python train_tst.py {flags}",
             "lr": f"{args['lr']:g}", "epochs": f"{last['tokens'] / len(train_tokens):.2f}",
             "vocab_size": meta["vocab_size"], "data_hash": meta["hash"][:12],
             "parameters": sum(weight.numel() for weight in weights.values()),
             "val_loss": f"{last['val_loss']:.4f}", "seconds": f"{last['seconds']:.0f}",
             "val_bpb": f"{last['val_bpb']:.4f}" if last["val_bpb"] else "",
             "commit": " ".join(dict.fromkeys((out / "commit.txt").read_text().split()))}
    return {name: str(known[name]) for name in COLUMNS}


def read_rows():
    with RESULTS.open() as file:
        return list(csv.DictReader(file))


def append(new):
    """Add a row to results.csv, unless its experiment has this command on the same data."""
    key = ("experiment", "command", "data_hash")
    if not any(all(row[name] == new[name] for name in key) for row in read_rows()):
        with RESULTS.open("a", newline="") as file:
            csv.DictWriter(file, COLUMNS).writerow(new)


if __name__ == "__main__":
    main()
