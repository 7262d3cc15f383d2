"""Show what a model has learned: its predictions of the next bag, and its embedding.

    python tools/peek.py runs/tiny-s6-r0.3-seed0        # at the switch, and at the end
"""
import argparse
import math
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
from tools.sample import load_model
from train_tst import load_checkpoint, load_data

BAGS, TOP = 20_000, 12                  # bags that are predicted, tokens in a prediction
SYMBOLS = "1 ( == True None self import return".split()


def spaced_rows(stream, n_rows, n):
    """About n_rows evenly spaced rows of n tokens, or fewer: (rows, n) int64."""
    return stream.rows(range(0, len(stream) - n + 1, max(n, len(stream) // n_rows)), n)


def compare(model, rows, s, f):
    """Print the loss of the next bag, and how many of its tokens are among the TOP likeliest."""
    rows, loss, hits = rows.view(len(rows), -1, s), 0.0, 0.0                    # (rows, l + 1, s)
    for bags in rows:                                       # one row at a time, to save memory
        log_p = model(bags[None, :-1])[0, :, :len(f)].log_softmax(-1)           # (l, V)
        loss -= log_p.gather(1, bags[1:]).mean() / len(rows)
        top = log_p.topk(TOP).indices.unsqueeze(1)                              # (l, 1, TOP)
        hits += (bags[1:].unsqueeze(2) == top).any(2).float().mean() / len(rows)
    targets = rows[:, 1:]
    counts = (targets.unsqueeze(2) == targets.unsqueeze(3)).sum(3)      # of the token in its bag
    f_hits = torch.isin(targets, f.topk(TOP).indices).float().mean()
    for name, nats, fraction in (
            ("a uniform guess", math.log(len(f)), TOP / len(f)),
            ("the token frequencies", -f.log()[targets].mean(), f_hits), ("the model", loss, hits),
            ("the floor, a bag's entropy", (s / counts).log().mean(), 1 if s <= TOP else math.nan)):
        print(f"  {name:27} loss {nats:.2f}   hits {fraction:4.0%}")


def show_place(model, bags, f, show):
    """Print bags that the model reads, the tokens that it makes likelier, and the next bag."""
    p = model(bags[None, :-1])[0, -1, :len(f)].softmax(-1)                      # (V,)
    likelier = (p * (p / f).log()).topk(TOP).indices.tolist()       # than by their frequencies f
    marked = (f"[{show(i)}]" if i in likelier else show(i) for i in bags[-1].tolist())
    print(f"\n  read      ... {' '.join(map(show, bags[-4:-1].flatten().tolist()))}\n"
          f"  likelier  {' '.join(map(show, likelier))}\n  next bag  {' '.join(marked)}\n")


def show_neighbours(model, f, show):
    """Print the nearest neighbours, by cosine, of some frequent words and symbols."""
    common = f.argsort(descending=True)[:4000]              # other tokens are hardly trained
    vectors = torch.nn.functional.normalize(model.embedding.weight[common], dim=1)
    names = [show(i) for i in common.tolist()]              # such as "' the'", with its quotes
    words = [name for name in names if name[1:2] == " " and name[2:-1].isalpha() and len(name) > 5]
    for name in words[:6] + [repr(symbol) for symbol in SYMBOLS if repr(symbol) in names]:
        nearest = (vectors @ vectors[names.index(name)]).topk(6).indices[1:].tolist()
        print(f"  {name:10} is near {'  '.join(names[i] for i in nearest)}")


@torch.no_grad()
def main(argv=None):
    """Print what argv (default: the command line) asks for. SystemExit(2) on bad input."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.error, flag = data.fail, parser.add_argument
    flag("run", type=Path, help="the folder of a run, or a checkpoint in it")
    flag("--seed", type=int, default=0, help="seed of the two random places (default: 0)")
    given = parser.parse_args(argv)
    files = [file for name in ("ckpt_switch.pt", "ckpt.pt") if (file := given.run / name).exists()]
    for file in files or [given.run]:
        checkpoint, (model, encoding) = load_checkpoint(file), load_model(file)
        args = argparse.Namespace(**checkpoint["args"])
        train, val, _, _ = load_data(args, checkpoint)      # SystemExit(2) if the shards differ
        s, l = args.s, min(args.seq_len, len(val) // args.s - 1)
        counts = spaced_rows(train, 10_000, 1000).flatten().bincount(minlength=train.vocab_size)
        f = (counts + 1) / (counts + 1).sum()               # each frequency has a logarithm
        print(f"\n{file}: predictions of the next bag of {s}")
        compare(model, spaced_rows(val, BAGS // l, (l + 1) * s), s, f)
        show = (lambda i: repr(encoding.decode([i]))) if encoding else str
        torch.manual_seed(given.seed)
        for start in torch.randint(len(val) - (l + 1) * s + 1, (2,)).tolist():
            show_place(model, val.rows([start], (l + 1) * s).view(-1, s), f, show)
        show_neighbours(model, f, show)


if __name__ == "__main__":
    main()
