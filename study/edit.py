"""What must survive the switch? Edit a finished run's ckpt_switch.pt and train on from there.

    python study/run.py ablations transitions                           # all of them, among others
    python study/edit.py --edit tables --s 6 --r 0.2        # one, if run.py has made --s 6 --r 0.2

--edit is one of
    tables    the embedding and the LM head drawn anew (the paper's ablation)
    moments   AdamW's state set to zero
    scale     the embedding shrunk until single tokens have the mean norm that bags had
    rewarm    the learning rate warms up anew from the switch, over as many steps as at the start
"""
import argparse
import shutil
import sys

from run import HERE, folder

import torch

import data
import model
import train_tst


def tables(checkpoint, args):
    torch.manual_seed(args["seed"] + 1)
    for name in ("embedding.weight", "head.weight"):
        torch.nn.init.normal_(checkpoint["model"][name], std=0.02)
        zero(checkpoint["optimizer"]["state"][name])


def moments(checkpoint, args):
    for state in checkpoint["optimizer"]["state"].values():
        zero(state)


def zero(state):
    for tensor in state.values():
        tensor.zero_()


def scale(checkpoint, args):
    table, s = checkpoint["model"]["embedding.weight"], args["s_in"][-1]
    stream = data.load(HERE.parent / args["data"])[0]
    tokens = torch.from_numpy(stream.read(0, s * min(100_000, len(stream) // s)))
    bags, singles = (model.bag_average(table, tokens.view(1, -1, size)).norm(dim=-1).mean()
                     for size in (s, 1))
    table *= bags / singles


def rewarm(checkpoint, args):
    schedule, switch = train_tst.learning_rate, checkpoint["step"]

    def learning_rate(args, step):
        return schedule(args, step) * min(1, (step - switch + 1) / args.warmup_steps)

    train_tst.learning_rate = learning_rate


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--edit", required=True, choices=["tables", "moments", "scale", "rewarm"])
    args, flags = parser.parse_known_args()
    source, out = (folder(" ".join(words)) for words in (flags, sys.argv[1:]))
    checkpoint = model.load_checkpoint(source / "ckpt_switch.pt")
    globals()[args.edit](checkpoint, checkpoint["args"])
    if not (out / "ckpt.pt").exists():
        not_ours = shutil.ignore_patterns("*.pt", "split.json", "commit.txt")
        shutil.copytree(source, out, ignore=not_ours, dirs_exist_ok=True)
        lines = (source / "metrics.jsonl").read_text().splitlines(keepends=True)
        lines = lines[:checkpoint["step"]]                      # or it would pass for finished
        (out / "metrics.jsonl").write_text("".join(lines))
        torch.save(checkpoint, out / "ckpt.pt")
    train_tst.main([*flags, "--out", str(out), "--resume"])


if __name__ == "__main__":
    main()
