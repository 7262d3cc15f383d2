"""Batches, a pure function of (seed, step, row), from a folder of shards in llm.c's format."""
import base64
import json
import os
import re
import sys
from hashlib import sha256
from pathlib import Path

import numpy as np
import tiktoken
import torch
from tqdm import tqdm

GPT2 = {"tokenizer": "gpt2", "vocab_size": 50_257}
HEADER_BYTES = 1024
FORMATS = {(20240520, 1): np.dtype("<u2"), (20240801, 7): np.dtype("<u4")}  # (magic, version)
REMEDY = "tools/fineweb.py downloads shards, tools/corpus.py makes them from text"


class Batches:
    """The rows of every batch: before step `switch` of bags of s tokens, then of single tokens.

    The stream is cut into blocks of l * s tokens, a row of bags or s rows of single tokens. They
    are shuffled, and each phase gets a share, by the tokens that it reads. Recovery reads row 0 of
    its blocks, then row 1, and so on. With 15 tokens, l = 2, s = 3, one row a step, 1 + 3 steps:

        blocks     0 1 2 3 4 5 | 6 7 8 9 10 11 | 12 13 14    the rest is for targets alone
        shuffled   the second, the first                     each phase gets one
        step 0     6 7 8  9 10 11  12 13 14                  s = 3: the last bag is only a target
        steps 1-3  0 1 2,  2 3 4,  4 5 6                     s = 1: rows 0, 1, 2 of its block

    So in an epoch a token is an input once. `epochs`: how often the run reads its data.
    """

    def __init__(self, tokens, steps, switch, s, batch_size, seq_len, seed):
        self.tokens, self.batch_size, self.seq_len = tokens, batch_size, seq_len
        self.switch, self.s = switch, s if switch else 1
        n_blocks = max(0, len(tokens) - self.s) // (seq_len * self.s)
        order = np.random.default_rng(seed).permutation(n_blocks)
        cut = round(n_blocks * switch * self.s / (switch * self.s + steps - switch))
        self.superposition, self.recovery = order[:cut], order[cut:]    # the blocks of each
        phases = (switch, cut), (steps - switch, (n_blocks - cut) * self.s)     # steps, rows
        if any(rows < batch_size for steps, rows in phases if steps):
            fail(f"{len(tokens)} training tokens are too few: lower --batch-size, --seq-len or --s")
        self.epochs = max(steps * batch_size / rows for steps, rows in phases if steps)

    def rows(self, step, first, count):
        """Rows first .. first + count - 1 of the batch of a step: (count, (l + 1) * s) int64."""
        s, blocks, begun = self.s, self.superposition, 0
        if step >= self.switch:
            s, blocks, begun = 1, self.recovery, self.switch
        row = (step - begun) * self.batch_size + np.arange(first, first + count)    # of the phase
        block, part = blocks[row % len(blocks)], row // len(blocks) % (self.s // s)
        starts = (block * self.s + part) * self.seq_len     # part: which of a block's s rows, or 0
        return self.tokens.rows(starts, (self.seq_len + 1) * s)


class Stream:
    """The tokens of one split: its shards, in order, as one long sequence on disk."""

    def __init__(self, files, vocab_size):
        self.files, self.vocab_size = files, vocab_size
        self.shards = [read_shard(file) for file in files]
        self.ends = np.cumsum([len(shard) for shard in self.shards])

    def __len__(self):
        return int(self.ends[-1])

    def read(self, start, n):
        """The n tokens from position start on: (n,) int64."""
        parts, k = [], int(np.searchsorted(self.ends, start, side="right"))
        while n > 0:                    # a row may begin in one shard and end in the next
            begin = start - int(self.ends[k]) + len(self.shards[k])
            part = self.shards[k][begin:begin + n]
            if part.max() >= self.vocab_size:
                fail(f"{self.files[k]}: token id {part.max()} is beyond the vocabulary of "
                     f"{self.vocab_size}; are these shards of another tokenizer?", anywhere=True)
            parts.append(part)
            start, n, k = start + len(part), n - len(part), k + 1
        return np.concatenate(parts).astype(np.int64)

    def rows(self, starts, n):                              # -> (len(starts), n) int64
        return torch.from_numpy(np.stack([self.read(int(start), n) for start in starts]))


def read_shard(path):
    """Map an llm.c shard on disk: 256 int32 (magic, version, count, zeros), then count tokens."""
    size = path.stat().st_size
    magic, version, count = np.fromfile(path, "<i4", 3).tolist() if size > HEADER_BYTES else 3 * [0]
    dtype = FORMATS.get((magic, version))
    if dtype is None or size != HEADER_BYTES + count * dtype.itemsize:
        fail(f"{path}: not in llm.c's format, or cut off; make it again: {REMEDY}")
    return np.asarray(np.memmap(path, dtype, "r", HEADER_BYTES, (count,)))      # slices faster


def load(folder):
    """A folder of shards -> (train Stream, val Stream, meta dict, tiktoken.Encoding or None)."""
    path, streams = Path(folder, "meta.json"), []
    try:
        meta = json.loads(path.read_text()) if path.exists() else dict(GPT2)    # as of llm.c
        vocab_size, _ = int(meta["vocab_size"]), meta["tokenizer"]
    except (ValueError, LookupError, TypeError):
        fail(f"{path}: not JSON with tokenizer and vocab_size, such as {json.dumps(GPT2)}")
    for split in ("train", "val"):      # as a word of the name: "val" is none in "retrieval"
        files = [file for file in sorted(Path(folder).glob("*.bin"))
                 if split in re.split("[^a-z]+", file.name.lower())]
        if not files:
            fail(f"--data {folder}: no *_{split}_*.bin there; {REMEDY}")
        streams.append(Stream(files, vocab_size))
    if "hash" not in meta:              # of sizes and beginnings, for shards can be tens of GB
        heads = [b"%d" % len(shard) + shard[:4096].tobytes() for s in streams for shard in s.shards]
        meta["hash"] = sha256(b"".join(heads)).hexdigest()
    return *streams, meta, load_encoding(folder)


def load_encoding(folder):
    """The tiktoken.Encoding stored in a folder, or None: training needs none, and no network."""
    if Path(folder, "encoding.json").exists():
        stored = json.loads(Path(folder, "encoding.json").read_text())
        ranks = {base64.b64decode(token): id for token, id in stored["mergeable_ranks"].items()}
        return tiktoken.Encoding(stored["name"], pat_str=stored["pat_str"], mergeable_ranks=ranks,
                                 special_tokens=stored["special_tokens"])


def fail(message, status=2, anywhere=False):
    """One line on standard error, by a machine's first process or from anywhere, and SystemExit."""
    if anywhere or os.environ.get("LOCAL_RANK", "0") == "0":
        tqdm.write(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    raise SystemExit(status)
