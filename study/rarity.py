"""Where does TST gain, on frequent tokens or on rare ones? Its loss minus its baseline's.

    python study/rarity.py "--s 6 --r 0.2 --data data/c-1024 --steps 4800"  # runs of study/run.py

The vocabulary is cut into bands by how often a token occurs in the training split, the most
frequent first, at these shares of the text: BANDS. Within a band, targets of the validation split
are hits, seen or unseen (study/split.py). A negative difference is a gain. One group of rows in
EVERY is read.
"""
import argparse

from patched import load
from run import ROOT, baseline, finished, folder, pairs
from split import KINDS, batches, kinds, losses

import numpy as np
import torch

import data
from data import fail

BANDS = (0.25, 0.5, 0.75, 0.9, 0.97, 1.0)
COUNTED = 20_000_000                    # training tokens whose frequency is taken, at most
EVERY = 4


def bands(tokens, vocab_size):
    """The band of each token of the vocabulary, (vocab_size,) int64, by its share of tokens (n,).

    A token is in the band where its share begins, so none is cut.
    """
    counts = np.bincount(tokens, minlength=vocab_size)
    order = np.argsort(-counts, kind="stable")
    begins = counts[order].cumsum() - counts[order]
    found = np.empty(vocab_size, np.int64)
    found[order] = np.searchsorted(BANDS[:-1], begins / len(tokens), side="right")
    return torch.from_numpy(found)


def measure(out, tokens, band):
    """Of a run: (nats, count) of each kind and band, (len(KINDS), len(BANDS)) float64 each."""
    model, _ = load(out)
    nats, counts = torch.zeros(2, len(KINDS) * len(BANDS), dtype=torch.float64)
    for k, rows in enumerate(batches(tokens, model.config.seq_len)):
        if k % EVERY == 0:
            cell = (kinds(rows) * len(BANDS) + band[rows[:, 1:]]).flatten()
            nats.index_add_(0, cell, losses(model, rows).flatten())
            counts += torch.bincount(cell, minlength=len(counts))
    return nats.view(len(KINDS), -1), counts.view(len(KINDS), -1)


def with_sums(x):
    """x (m, n) with a column and a row more, of its sums: (m + 1, n + 1)."""
    x = torch.cat((x, x.sum(0, keepdim=True)))
    return torch.cat((x, x.sum(1, keepdim=True)), 1)


def main():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail
    parser.add_argument("runs", nargs="+", help="each the flags of a finished TST run, in quotes")
    torch.set_num_threads(1)
    for flags in parser.parse_args().runs:
        if not pairs([flags]):
            fail(f"{flags}: no finished TST run of study/run.py whose baseline is finished too")
        args, _ = finished(folder(flags))
        train, tokens, _, _ = data.load(ROOT / args["data"])
        band = bands(train.read(0, min(len(train), COUNTED)), train.vocab_size)
        nats, counts = measure(folder(flags), tokens, band)
        plain, _ = measure(folder(baseline(flags)), tokens, band)
        print(f"\n`{flags}` minus `{baseline(flags)}`\n")
        print(f"| tokens | of targets | {' | '.join(KINDS)} | all |\n{'| --- ' * 6}|")
        sizes = torch.bincount(band, minlength=len(BANDS)).tolist()
        shares = with_sums(counts)[-1] / counts.sum()
        differences = (with_sums(nats - plain) / with_sums(counts)).T       # a row a band, and all
        for size, share, each in zip([*sizes, sum(sizes)], shares, differences):
            cells = " | ".join(f"{value:+.3f}" for value in each)
            print(f"| {size:,} | {share:.1%} | {cells} |")


if __name__ == "__main__":
    main()
