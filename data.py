"""The data: a batch is a pure function of (seed, step, row), read from shards of tokens.

`bags` cuts rows of tokens into bags, and `Batches` says which rows a step reads: that is all
that superposition asks of the data. `Stream` reads shards in llm.c's format, one file a piece
of a long sequence; `load` opens a folder of them. tools/corpus.py and tools/fineweb.py make
such folders.
"""
import base64
import functools
import json
import math
import os
import sys
from hashlib import sha256
from pathlib import Path

import numpy as np
import tiktoken
import torch
from tqdm import tqdm

END_OF_TEXT = "<|endoftext|>"
GPT2 = {"tokenizer": "gpt2", "vocab_size": 50_257}
HEADER_BYTES = 1024
FORMATS = {(20240520, 1): np.dtype("<u2"), (20240801, 7): np.dtype("<u4")}  # (magic, version)
REMEDY = ("`python tools/fineweb.py --shards 10` downloads shards, `python tools/corpus.py FILES "
          "--out FOLDER` makes them from text, and without --data the corpus is the built-in one")


def bags(rows, s_in, s_out):
    """rows (B, l * s_in + s_out) -> inputs (B, l, s_in) and targets (B, l, s_out), views of them.

    Target bag j is the s_out tokens right after input bag j. With s_in = s_out = s a row is
    l+1 bags, inputs the first l, targets the last l; with s = 1 it is next-token training.
    """
    windows = rows.unfold(1, s_in + s_out, s_in)                        # (B, l, s_in + s_out)
    return windows.split((s_in, s_out), dim=2)


class Batches:
    """The rows of every training batch, a pure function of (seed, step, row).

    So resuming is asking for another step, whatever the processes and micro-batches are. The
    stream is cut into blocks of l * lcm(all s_in) tokens, which any phase can cut into whole
    rows. They are shuffled once with the seed, and each phase gets a run of them, in proportion
    to the tokens that it reads. A phase with n blocks of p rows reads row 0 of every block, then
    row 1 of every block: its k-th is row (k // n) % p of block k % n. Say, 15 tokens, l = 2, one
    row a step, 1 step of s = 3, then 3 of s = 1:

        blocks     0 1 2 3 4 5 | 6 7 8 9 10 11 | 12 13 14    of 2 * lcm(3, 1); the rest: targets
        shuffled   the second, the first                     s = 3 gets one, s = 1 the other
        step 0     6 7 8  9 10 11  12 13 14                  s = 3: the last bag only a target
        steps 1-3  0 1 2,  2 3 4,  4 5 6                     s = 1: rows 0, 1, 2 of its block

    In an epoch each token is at most once an input, in one phase, and where s_in = s_out at most
    once a target in a phase; only the last targets of a row may lie in another phase's block.

    tokens: a `Stream`; phases: [(steps, s_in, s_out), ...]. `epochs` says how often the run
    will read its data. SystemExit(2) if a phase has too few rows for one batch.
    """

    def __init__(self, tokens, phases, batch_size, seq_len, seed):
        self.tokens, self.batch_size, self.seq_len = tokens, batch_size, seq_len
        used = [phase for phase in phases if phase[0] > 0]
        self.block = seq_len * math.lcm(*(s_in for _, s_in, _ in used))             # tokens
        last_targets = max(s_out for _, _, s_out in used)
        n_blocks = max(0, len(tokens) - last_targets) // self.block
        order = np.random.default_rng(seed).permutation(n_blocks)
        total = sum(steps * s_in for steps, s_in, _ in used)
        first_step, read = 0, 0
        self.phases, self.epochs = [], 0.0
        for steps, s_in, s_out in used:
            start = round(n_blocks * read / total)
            read += steps * s_in
            blocks = order[start:round(n_blocks * read / total)]
            rows = len(blocks) * (self.block // (seq_len * s_in))
            if rows < batch_size:
                fail(f"{len(tokens):,} training tokens are too few for a batch of {batch_size} "
                     f"rows of {seq_len} bags of {s_in}: bring more data, or lower --batch-size, "
                     "--seq-len or --s")
            self.phases.append((first_step, blocks, s_in, s_out))
            self.epochs = max(self.epochs, steps * batch_size / rows)
            first_step += steps

    def rows(self, step, first, count):
        """Rows first .. first + count - 1 of the batch of step (from 0).

        -> (count, l * s_in + s_out) int64.
        """
        first_step, blocks, s_in, s_out = [phase for phase in self.phases if phase[0] <= step][-1]
        length = self.seq_len * s_in
        n, parts = len(blocks), self.block // length
        rows = []
        for row in range(first, first + count):
            k = (step - first_step) * self.batch_size + row             # from the phase's start
            start = int(blocks[k % n]) * self.block + (k // n) % parts * length
            rows.append(self.tokens.read(start, length + s_out))
        return torch.from_numpy(np.stack(rows))


class Stream:
    """The tokens of one split: its shards in reading order, as one long sequence on disk.

    SystemExit(2) on a file that is not a whole shard, and on a token id from vocab_size on when
    it is read.
    """

    def __init__(self, files, vocab_size):
        self.files, self.vocab_size = files, vocab_size
        self.shard = functools.lru_cache(500)(read_shard)   # open files: a process may have 1,024
        lengths = [len(self.shard(file)) for file in files]
        self.ends = np.cumsum(lengths)
        for end, length in zip(self.ends, lengths):         # a first look; the rest as it is read
            self.read(end - length, min(length, 2 ** 16))

    def __len__(self):
        return int(self.ends[-1])

    def read(self, start, n):
        """The n tokens from position start on, across the ends of shards: (n,) int64."""
        parts, k = [], int(np.searchsorted(self.ends, start, side="right"))
        while n > 0:
            shard = self.shard(self.files[k])
            begin = start - int(self.ends[k]) + len(shard)
            part = shard[begin:begin + n]
            if part.max() >= self.vocab_size:
                fail(f"{self.files[k]}: token id {part.max()} is beyond the vocabulary of "
                     f"{self.vocab_size}; are these shards of another tokenizer?", anywhere=True)
            parts.append(part)
            start, n, k = start + len(part), n - len(part), k + 1
        return np.concatenate(parts).astype(np.int64)


def read_shard(path):
    """Map an llm.c shard to (count,) uint16 or uint32 on disk.

    256 int32 of header (magic, version, count, zeros), then count tokens.
    """
    size = path.stat().st_size
    magic, version, count = np.fromfile(path, "<i4", 3) if size >= HEADER_BYTES else (0, 0, 0)
    dtype = FORMATS.get((int(magic), int(version)))
    if dtype is None:
        fail(f"{path}: not an llm.c shard, it lacks the header (nanoGPT's .bin files do); {REMEDY}")
    wanted = HEADER_BYTES + dtype.itemsize * int(count)
    if count < 1 or size != wanted:
        fail(f"{path}: its header promises {count:,} tokens, {wanted:,} bytes, and the file has "
             f"{size:,}: truncated or damaged; delete it, and make or download it again")
    shard = np.memmap(path, dtype, "r", offset=HEADER_BYTES, shape=(int(count),))
    return np.asarray(shard)                                            # its slices cost half


def load(folder):
    """Open a folder of shards: (train Stream, val Stream, meta dict, tiktoken.Encoding or None).

    meta has `tokenizer`, `vocab_size` and `hash`; without a meta.json the shards are taken for
    GPT-2's, as llm.c's and modded-nanogpt's are. The encoding is None where it would have to be
    downloaded and cannot be. SystemExit(2) on what is missing or damaged.
    """
    folder, path = Path(folder), Path(folder, "meta.json")
    meta = json.loads(path.read_text()) if path.exists() else dict(GPT2)
    streams = []
    for split in ("train", "val"):
        files = sorted(folder.glob(f"*{split}*.bin"))
        if not files:
            fail(f"--data {folder}: no *{split}*.bin there; {REMEDY}")
        streams.append(Stream(files, meta["vocab_size"]))
    if "hash" not in meta:              # of names, sizes and beginnings: shards can be tens of GB
        content = sha256()
        for stream in streams:
            for file in stream.files:
                shard = stream.shard(file)
                content.update(f"{file.name} {len(shard)} ".encode() + shard[:4096].tobytes())
        meta["hash"] = content.hexdigest()
    encoding = load_encoding(folder, meta["tokenizer"])
    if encoding and encoding.n_vocab > meta["vocab_size"]:
        fail(f"{path}: vocab_size {meta['vocab_size']} is below its tokenizer's {encoding.n_vocab}")
    return *streams, meta, encoding


def load_encoding(folder, name):
    """The tiktoken.Encoding in folder, else tiktoken's of that name, or None without a network."""
    path = Path(folder, "encoding.json")
    if not path.exists():
        try:
            return tiktoken.get_encoding(name)
        except Exception:               # whatever the network raises: training can do without
            return None
    stored = json.loads(path.read_text())
    ranks = {base64.b64decode(token): rank for token, rank in stored["mergeable_ranks"].items()}
    return tiktoken.Encoding(stored["name"], pat_str=stored["pat_str"], mergeable_ranks=ranks,
                             special_tokens=stored["special_tokens"])


def fail(message, status=2, anywhere=False):
    """One line on standard error, and exit; under torchrun only a machine's first process speaks.

    anywhere: every process speaks, of what can befall one alone.
    """
    if anywhere or os.environ.get("LOCAL_RANK", "0") == "0":
        tqdm.write(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    raise SystemExit(status)
