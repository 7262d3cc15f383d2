"""Batches of token ids, cut from a folder of shards in the format of llm.c."""
import base64
import json
import os
import re
import sys
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

GPT2 = {"tokenizer": "gpt2", "vocab_size": 50_257}
HEADER_BYTES = 1024
FORMATS = {(20240520, 1): np.dtype("<u2"), (20240801, 7): np.dtype("<u4")}  # (magic, version)
GET_SHARDS = "tools/fineweb.py downloads shards, and tools/corpus.py makes shards from text."

for stream in (sys.stdout, sys.stderr):     # a file name can have letters that a terminal lacks
    if hasattr(stream, "reconfigure"):      # Jupyter's streams do not have this method
        stream.reconfigure(errors="backslashreplace")


class Batches:
    """The rows of every batch, as a pure function of (seed, step, row).

    The training tokens are cut into blocks of l * s tokens. A block is one row of l bags, or s rows
    of l single tokens. The blocks are shuffled, and each phase gets a number of blocks in
    proportion to the tokens that it reads. The recovery phase reads row 0 of all its blocks, then
    row 1 of all its blocks, and so on. After its l inputs each row has one more bag or token, which
    is the last target. Example: 15 tokens, l = 2, s = 3, one row per step, 1 + 3 steps.

        blocks     0 1 2 3 4 5 | 6 7 8 9 10 11 | 12 13 14   block 0, block 1, three more targets
        shuffled   block 1, block 0                         one block for each phase
        step 0     6 7 8,  9 10 11,  12 13 14               block 1, as bags of three tokens
        step 1     0, 1, 2                                  block 0, row 0, as single tokens
        step 2     2, 3, 4                                  block 0, row 1
        step 3     4, 5, 6                                  block 0, row 2

    So each token is an input at most once per epoch. `epochs` is that of the phase with the most.
    """

    def __init__(self, tokens, steps, switch, s, batch_size, seq_len, seed):
        self.tokens, self.batch_size, self.seq_len = tokens, batch_size, seq_len
        self.switch, self.s = switch, s if switch else 1    # switch: the first step of recovery
        n_blocks = max(0, len(tokens) - self.s) // (seq_len * self.s)
        blocks = np.random.default_rng(seed).permutation(n_blocks)
        n_superposition = round(n_blocks * switch * self.s / (switch * self.s + steps - switch))
        self.superposition, self.recovery = blocks[:n_superposition], blocks[n_superposition:]
        phases = (switch, len(self.superposition)), (steps - switch, len(self.recovery) * self.s)
        if any(n_steps > 0 and n_rows < batch_size for n_steps, n_rows in phases):
            fail(f"{len(tokens):,} training tokens are too few for one batch in each phase. Lower "
                 "--batch-size, --seq-len or --s, or add data.")
        self.epochs = max(n_steps * batch_size / max(1, n_rows) for n_steps, n_rows in phases)

    def rows(self, step, first, count):
        """Read count rows of a step's batch, from row `first` on: (count, (l + 1) * s) int64."""
        if step < self.switch:
            s, blocks, rows_per_block, phase_start = self.s, self.superposition, 1, 0
        else:
            s, blocks, rows_per_block, phase_start = 1, self.recovery, self.s, self.switch
        row = (step - phase_start) * self.batch_size + np.arange(first, first + count)
        block = blocks[row % len(blocks)]                   # `row` counts the rows of the phase
        row_in_block = row // len(blocks) % rows_per_block
        starts = (block * self.s + row_in_block) * self.seq_len
        return self.tokens.rows(starts, (self.seq_len + 1) * s)


class Stream:
    """The tokens of one split: its shards, in the order of their names, as one long sequence."""

    def __init__(self, files, vocab_size):
        self.files, self.vocab_size = files, vocab_size
        self.shards = [read_shard(file) for file in files]
        self.bounds = np.cumsum([0, *map(len, self.shards)])    # k: from bounds[k] to bounds[k + 1]

    def __len__(self):
        return int(self.bounds[-1])

    def rows(self, starts, n):
        """One row of n tokens for each start, from that token on: (len(starts), n) int64."""
        rows = np.empty((len(starts), n), np.int64)
        for row, start in zip(rows, starts):                # a row can lie in several shards
            first = np.searchsorted(self.bounds, start, side="right") - 1
            after = np.searchsorted(self.bounds, start + n)
            row[:] = np.concatenate([self.shards[k][max(0, start - self.bounds[k]):
                                                    start + n - self.bounds[k]]
                                     for k in range(first, after)])
        if rows.max() >= self.vocab_size:
            fail(f"{self.files[0].parent} has the token id {rows.max()}, but a vocabulary of "
                 f"{self.vocab_size}. Use files of one tokenizer.", every_process=True)
        return torch.from_numpy(rows)


def read_shard(path):
    """Map a shard from disk: a header of 256 int32 (magic, version, count, zeros), then tokens."""
    size = path.stat().st_size
    magic, version, count = np.fromfile(path, "<i4", 3).tolist() if size > HEADER_BYTES else 3 * [0]
    dtype = FORMATS.get((magic, version))
    if dtype is None or size != HEADER_BYTES + count * dtype.itemsize:
        fail(f"{path} is truncated, or is not in llm.c's format. Replace the shard. {GET_SHARDS}")
    return np.asarray(np.memmap(path, dtype, "r", HEADER_BYTES, (count,)))


def load(folder):
    """Open a folder of shards -> (train Stream, val Stream, meta dict, bytes of each token).

    meta["shards"] is a hash of names, sizes and first tokens. Without encoding.json the numbers of
    bytes are 0.
    """
    streams, names, heads, path = [], [], [], Path(folder, "meta.json")
    try:
        meta = json.loads(path.read_text()) if path.exists() else dict(GPT2)    # llm.c has none
        token_bytes, _ = torch.zeros(int(meta["vocab_size"])), meta["tokenizer"]
        for path in Path(folder).glob("encoding.json"):
            for token, i in json.loads(path.read_text())["mergeable_ranks"].items():
                token_bytes[i] = len(base64.b64decode(token))
    except (ValueError, LookupError, TypeError, AttributeError):
        fail(f"{path} is damaged. Restore the file. An example of meta.json is {json.dumps(GPT2)}")
    for split in ("train", "val"):      # compare whole words, because "retrieval" contains "val"
        files = [file for file in sorted(Path(folder).glob("*.bin"))
                 if split in re.split("[^a-z]+", file.name.lower()) and file.name[0] != "."]
        streams.append(Stream(files, len(token_bytes)))
        if len(streams[-1]) < 2:
            fail(f"--data {folder} needs a *_{split}_*.bin with two tokens or more. {GET_SHARDS}")
        for file, shard in zip(files, streams[-1].shards):
            head = b"%d" % len(shard) + shard[:4096].tobytes()
            if head in heads:
                fail(f"{file} is a copy of {names[heads.index(head)]}. Delete one of the two.")
            names, heads = [*names, file.name], [*heads, head]
    meta.setdefault("hash", sha256(b"".join(heads)).hexdigest())
    meta["shards"] = sha256(b"".join([*heads, *map(os.fsencode, names)])).hexdigest()
    return *streams, meta, token_bytes


def fail(message, status=2, every_process=False):
    """Print one line on standard error (once per machine, or from every process), and exit."""
    if every_process or os.environ.get("LOCAL_RANK", "0") == "0":
        tqdm.write(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    raise SystemExit(status)
