"""Train a baseline and leave, where a shorter one's decay begins, its checkpoint to go on from.

    python study/branch.py "--s 1 --steps 4800" "--s 1 --steps 2400"        # the longest first

Until its decay a baseline of s = 1 is the same run for any --steps: the learning rate is constant
after the warmup, and the batches do not depend on the length. So all but the longest train their
decay alone, and end with the same weights, to the bit, as from the start. study/run.py does this
with baselines that differ in --steps alone; a branch that is missing is trained from its start.
"""
import math
import os
import shutil
import sys

from run import folder, way

import torch

import model
import train_tst


def branches(shorter):
    """[(the step where its decay begins, its folder, its args), ...] of runs given by flags."""
    found = []
    for flags in shorter:
        args = train_tst.parse([*flags.split(), *way(folder(flags))])
        decay = max(1, round(args.decay_frac * args.steps))     # as in train_tst.learning_rate
        found.append((args.steps - decay, folder(flags), args))
    return found


def branch(checkpoint, source, target, args):
    """Make a folder that args' run goes on from, unless it has begun. source: the longer run's."""
    if not (target / "ckpt.pt").exists():
        target.mkdir(parents=True, exist_ok=True)
        for name in ("metrics.jsonl", "commit.txt"):
            if (source / name).exists():
                shutil.copyfile(source / name, target / name)
        torch.save({**checkpoint, "args": vars(args)}, target / "ckpt.tmp")
        os.replace(target / "ckpt.tmp", target / "ckpt.pt")


def main(longest, *shorter):
    out, todo, save = folder(longest), branches(shorter), train_tst.save

    def save_and_branch(*given):
        save(*given)
        checkpoint = model.load_checkpoint(out)
        for step, target, args in todo:
            if step == checkpoint["step"]:
                branch(checkpoint, out, target, args)

    train_tst.save = save_and_branch
    every = math.gcd(*(step for step, _, _ in todo))
    train_tst.main([*longest.split(), *way(out), "--save-every", str(every)])


if __name__ == "__main__":
    main(*sys.argv[1:])
