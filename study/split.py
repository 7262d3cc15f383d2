"""What does a run copy, and what does it know? Its validation loss split by target.

    python study/split.py "--s 1" "--s 6 --r 0.2"           # runs of study/run.py, by their flags
    python study/split.py "--s 1 --seq-len 576 --batch-size 5" --seq-len 96     # its first 96

All of the validation split is read, in rows of the run's l targets, or of --seq-len. A target is
    hit       where the token before it occurred earlier in the row, followed by this target
    seen      where it occurred earlier in the row itself, and is no hit
    unseen    else
and its loss is in nats. (Longer rows have more hits.) "again" is the loss on text just read: of
rows spread over the split, the first l // 2 tokens and then the same once more, on those of the
copy that have another of the copy before them, l // 2 - 1 (47 where l is 96). "bpb" is in bits
per byte, end-of-text counting as no byte: the same bytes for every vocabulary and every l, where
the trainer's val_bpb is on at most 200,000 tokens spread over the split. What is measured is kept
in the run's split.json.
"""
import argparse
import json
import math

from patched import load
from run import ROOT, finished, folder

import numpy as np
import torch
import torch.nn.functional as F

import data
from data import fail

KINDS = ("unseen", "seen", "hit")
POSITIONS = 1024                        # of the trunk at a time
AGAIN = 1000                            # rows that are read again, at most twice as many
PARTS = 8                               # of a row, for the loss by position


def kinds(rows):
    """rows (B, n) -> the kind of each target rows[:, 1:], as its index in KINDS: (B, n - 1)."""
    same = rows[:, :, None] == rows[:, None, :]                         # (B, n, n)
    pairs = same[:, :-1, :-1] & same[:, 1:, 1:]     # [k, i, j]: input and target i are those of j
    hit = pairs.tril(-1).any(2)                                         # at a j before i
    seen = same[:, 1:, :-1].tril().any(2)                   # target i is an input so far
    return hit.long() + seen                        # a hit was seen too: its target is an input


@torch.no_grad()
def losses(model, rows):
    """rows (B, n) -> the loss of each token but the first, in nats: (B, n - 1) float64."""
    inputs, targets = data.bags(rows, 1, 1)
    logits = model(inputs)                                              # (B, n - 1, V)
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    return loss.view(len(rows), -1).double()


def losses_again(model, rows):
    """The loss of the first half of rows (B, n), n = l + 1, where it is read the second time."""
    half = (rows.size(1) - 1) // 2
    return losses(model, rows[:, :half].repeat(1, 2))[:, half:]         # (B, half - 1)


def batches(tokens, l):
    """Yield all of a Stream in contiguous rows of l targets, (B, l + 1), and its shorter rest."""
    starts, count = list(range(0, len(tokens) - 1 - l, l)), max(1, POSITIONS // l)
    for k in range(0, len(starts), count):
        rows = [tokens.read(start, l + 1) for start in starts[k:k + count]]
        yield torch.from_numpy(np.stack(rows))
    begin = len(starts) * l
    yield torch.from_numpy(tokens.read(begin, len(tokens) - begin))[None]


def measure(out, seq_len=None):
    """The dict that becomes a finished run's split.json; seq_len: of the rows, if not the run's."""
    args, meta = (json.loads((out / f"{name}.json").read_text()) for name in ("args", "meta"))
    _, tokens, found, _ = data.load(ROOT / args["data"])
    if found["hash"] != meta["hash"]:
        fail(f"{args['data']} does not hold the data of the run in {out}: restore them")
    model, encoding = load(out)
    device = "cuda" if torch.cuda.is_available() else "cpu"     # Apple's has no float64
    model.to(device)
    token_bytes = torch.zeros(tokens.vocab_size, dtype=torch.long)
    for token, i in encoding._mergeable_ranks.items() if encoding else ():
        token_bytes[i] = len(token)

    l = seq_len or args["seq_len"]
    if l > args["seq_len"]:
        fail(f"--seq-len {l}: the model in {out} reads {args['seq_len']} tokens at most")
    every = max(1, len(tokens) // l // AGAIN)       # of the rows, one in so many is read again
    nats, counts = torch.zeros(2, len(KINDS), dtype=torch.float64)
    by_position, row_counts = torch.zeros(2, l, dtype=torch.float64)
    again, size, first = [], 0, 0
    for rows in batches(tokens, l):
        size += token_bytes[rows[:, 1:]].sum().item()
        rows = rows.to(device)
        loss, kind = losses(model, rows).cpu(), kinds(rows).cpu()
        nats.index_add_(0, kind.flatten(), loss.flatten())
        counts += torch.bincount(kind.flatten(), minlength=len(KINDS))
        by_position[:loss.size(1)] += loss.sum(0)
        row_counts[:loss.size(1)] += len(loss)
        spread = rows[-first % every::every]
        if len(spread) and rows.size(1) == l + 1:
            again.append(losses_again(model, spread).flatten().cpu())
        first += len(rows)

    parts = zip(by_position.tensor_split(PARTS), row_counts.tensor_split(PARTS))
    return {**dict(zip(KINDS, (nats / counts).tolist())),
            "again": torch.cat(again).mean().item(),
            "bpb": nats.sum().item() / size / math.log(2) if size else None,
            "loss": (nats.sum() / counts.sum()).item(),
            "hit_share": (counts[2] / counts.sum()).item(),
            "seen_share": (counts[1] / counts.sum()).item(),
            "targets": int(counts.sum()), "bytes": size,
            **{f"part {k} of {PARTS}": (part.sum() / n.sum()).item()
               for k, (part, n) in enumerate(parts, 1)}}


def measured(out):
    """What `measure` gives, kept in the run's folder."""
    path = out / "split.json"
    if not path.exists():
        path.write_text(json.dumps(measure(out), indent=1))
    return json.loads(path.read_text())


def main():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail
    parser.add_argument("runs", nargs="+", help="each the flags of a finished run, in quotes")
    parser.add_argument("--seq-len", type=int, help="targets in a row, if not as many as the run's")
    args = parser.parse_args()
    torch.set_num_threads(1)
    unfinished = [flags for flags in args.runs if not finished(folder(flags))]
    if unfinished:
        fail(f"no finished runs of study/run.py: {unfinished}")
    columns = [measure(folder(flags), args.seq_len) if args.seq_len else measured(folder(flags))
               for flags in args.runs]
    print("| | " + " | ".join(f"`{flags}`" for flags in args.runs) + " |")
    print("| --- " * (len(columns) + 1) + "|")
    for name in columns[0]:
        values = [column[name] for column in columns]
        texts = ["-" if value is None else f"{value:,}" if isinstance(value, int)
                 else f"{value:.4f}" for value in values]
        print(f"| {name} | " + " | ".join(texts) + " |")


if __name__ == "__main__":
    main()
