"""The data: a batch is a pure function of (seed, step, row), read from shards of tokens.

`Batches` cuts the stream of tokens into rows and `bags` cuts rows into bags, which
is all that superposition asks of the data. The rest of the file is shards on disk
(llm.c's format) and where they come from: a download, your own text, or the built-in
corpus, the Python source code that every machine that can run this already has.

    python data.py fineweb --shards 10                        # GPT-2 tokens of FineWeb, 100M a shard
    python data.py text notes/ book.txt corpus.jsonl --out data/mine
"""
import argparse
import base64
import contextlib
import functools
import heapq
import importlib.util
import itertools
import json
import math
import os
import random
import sys
import sysconfig
import tempfile
import time
from collections import Counter, defaultdict
from hashlib import sha256
from pathlib import Path
from unittest import mock

import numpy as np
import regex
import requests
import tiktoken
import torch
from tqdm import tqdm

END_OF_TEXT = "<|endoftext|>"
SPLITS = ("train", "val", "test")
SHARD_TOKENS = 100_000_000
HEADER_BYTES = 1024
FORMATS = {(20240520, 1): np.dtype("<u2"), (20240801, 7): np.dtype("<u4")}      # llm.c's (magic, version)
MAX_VOCAB = 2 ** 20                     # larger numbers come from damaged files
BATCH_DOCUMENTS, DOCUMENT_CHARS = 128, 2 ** 16          # tokenized at once; a longer text file is cut into documents
REMEDY = ("`python data.py fineweb --shards 10` downloads shards, `python data.py text FILES --out FOLDER` makes them "
          "from text, and without --data the corpus is the built-in one")

GPT2 = {"tokenizer": "gpt2", "vocab_size": 50_257}
FINEWEB = {                             # start of the files' names: training shards: Hugging Face dataset
    "fineweb": {103: "kjj0/fineweb10B-gpt2", 1030: "kjj0/fineweb100B-gpt2"},
    "finewebedu": {99: "kjj0/finewebedu10B-gpt2"}}
RETRIES, BACKOFF = 8, 1.0               # of a shard's download; seconds, doubled each time

PYTHON_CORPUS = Path("data/python")     # this path names the built-in corpus, which is made when absent
PYTHON_PACKAGES = ("torch torchgen functorch numpy tiktoken tqdm sympy mpmath networkx jinja2 fsspec filelock "
                   "regex requests urllib3 idna certifi charset_normalizer").split()
VOCAB_SIZE = 1024                       # of the built-in corpus, end-of-text included
BPE_SAMPLE = 8_000_000                  # characters the vocabulary is trained on
# What byte pairs may merge within: a word with the character before it, three digits, punctuation,
# and a line break with the next line's indentation, of which source code is full.
PATTERN = (r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+(?:[\r\n]+ *)?"
           r"|\s*[\r\n]+ *|\s+(?!\S)|\s+")
PATTERNS = {                            # of the tokenizers whose files hold byte pairs alone
    "gpt2": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "llama3": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
              r"|\s*[\r\n]+|\s+(?!\S)|\s+"}


def bags(rows, s_in, s_out):
    """rows (B, l * s_in + s_out) -> inputs (B, l, s_in) and targets (B, l, s_out).

    Target bag j is the s_out tokens right after input bag j. With s_in = s_out = s a row is
    l+1 bags, inputs the first l, targets the last l; with s = 1 it is next-token training.
    """
    return rows.unfold(1, s_in + s_out, s_in).split((s_in, s_out), dim=2)


class Batches:
    """The rows of every training batch, a pure function of (seed, step, row): resuming is asking for another step.

    The stream is cut into blocks of l * lcm(all s_in) tokens, which any phase can cut into
    whole rows. They are shuffled once with the seed, and each phase gets a run of them, in
    proportion to the tokens that it reads. Row k of a phase with n blocks of p rows is part
    (k // n) % p of block k % n. Say, 15 tokens, l = 2, one row a step, 1 step of s = 3, then 3
    of s = 1:

        blocks     0 1 2 3 4 5 | 6 7 8 9 10 11 | 12 13 14      2 * lcm(3, 1) tokens each; the rest are targets
        shuffled   the second, the first                       s = 3 gets one, and s = 1 the other
        step 0     6 7 8  9 10 11  12 13 14                    s = 3: the last bag is a target alone
        steps 1-3  0 1 2,  2 3 4,  4 5 6                       s = 1: parts 0, 1, 2 of its block

    In an epoch each token is an input once, in one phase, and where s_in = s_out a target at
    most once in a phase; only the last targets of a row may lie in another phase's block.

    tokens: a `Stream`; phases: [(steps, s_in, s_out), ...]. `epochs` says how often the
    run will read the data. SystemExit(2) if a phase has too few rows for one batch.
    """

    def __init__(self, tokens, phases, batch_size, seq_len, seed):
        self.tokens, self.batch_size, self.seq_len = tokens, batch_size, seq_len
        used = [phase for phase in phases if phase[0] > 0]
        self.block = seq_len * math.lcm(*(s_in for _, s_in, _ in used))
        n_blocks = max(0, len(tokens) - max(s_out for *_, s_out in used)) // self.block
        order = np.random.default_rng(seed).permutation(n_blocks)
        total, read, first_step = sum(steps * s_in for steps, s_in, _ in used), 0, 0
        self.phases, self.epochs = [], 0.0
        for steps, s_in, s_out in used:
            start, read = round(n_blocks * read / total), read + steps * s_in
            blocks = order[start:round(n_blocks * read / total)]
            rows = len(blocks) * (self.block // (seq_len * s_in))
            if rows < batch_size:
                fail(f"{len(tokens):,} training tokens are too few for a batch of {batch_size} rows of {seq_len} bags "
                     f"of {s_in}: bring more data, or lower --batch-size, --seq-len or --s")
            self.phases.append((first_step, blocks, rows, s_in, s_out))
            self.epochs = max(self.epochs, steps * batch_size / rows)
            first_step += steps

    def rows(self, step, first, count):
        """Rows first .. first + count - 1 of the batch of step (from 0): (count, l * s_in + s_out) int64."""
        first_step, blocks, _, s_in, s_out = self.phase(step)
        length, n = self.seq_len * s_in, len(blocks)
        k = (step - first_step) * self.batch_size + first
        starts = [int(blocks[i % n]) * self.block + i // n % (self.block // length) * length for i in range(k, k + count)]
        return torch.from_numpy(np.stack([self.tokens.read(start, length + s_out) for start in starts]))

    def epoch(self, step):
        """How often the phase of step (from 0) has used up its rows before that step."""
        first_step, _, rows, *_ = self.phase(step)
        return (step - first_step) * self.batch_size // rows

    def phase(self, step):
        return [phase for phase in self.phases if phase[0] <= step][-1]


class Stream:
    """The tokens of one split, in llm.c shards in reading order, as one long sequence over their memory maps.

    SystemExit(2) on a file that is not a whole shard, and on a token id from vocab_size on when it is read.
    """

    def __init__(self, files, vocab_size):
        self.files, self.vocab_size = files, vocab_size
        self.shard = functools.lru_cache(500)(read_shard)   # each holds a file open, of which a process has 1,024 or so
        lengths = [len(self.shard(file)) for file in files]
        self.ends = np.cumsum(lengths)
        for end, length in zip(self.ends, lengths):         # a first look: the rest is checked as it is read
            self.read(end - length, min(length, 2 ** 16))

    def __len__(self):
        return int(self.ends[-1])

    def read(self, start, n):
        """The n tokens from position start on, across the ends of shards: (n,) int64."""
        parts, k = [], int(np.searchsorted(self.ends, start, side="right"))
        while n > 0:
            part = self.shard(self.files[k])[start - self.ends[k]:][:n]    # counted from the shard's end, so negative
            if part.max() >= self.vocab_size:
                fail(f"{self.files[k]}: token id {part.max()} is beyond the vocabulary of {self.vocab_size}; are these "
                     "shards of another tokenizer?")
            parts.append(part)
            start, n, k = start + len(part), n - len(part), k + 1
        return np.concatenate(parts).astype(np.int64)


def read_shard(path):
    """Map an llm.c shard: 256 int32 of header (magic, version, count), then count tokens of uint16 or uint32."""
    size = path.stat().st_size
    *kind, count = map(int, np.fromfile(path, "<i4", 3)) if size >= HEADER_BYTES else (0, 0, 0)
    dtype = FORMATS.get(tuple(kind))
    if dtype is None:
        what = "nanoGPT's, without a header" if path.name in ("train.bin", "val.bin") else "no header of llm.c's"
        fail(f"{path}: not an llm.c shard ({what}); {REMEDY}")
    if count < 1 or size != HEADER_BYTES + dtype.itemsize * count:
        fail(f"{path}: its header promises {count:,} tokens, {HEADER_BYTES + dtype.itemsize * count:,} bytes, and the "
             f"file has {size:,}: truncated or damaged; delete it, and make or download it again")
    return np.asarray(np.memmap(path, dtype, "r", offset=HEADER_BYTES, shape=(count,)))      # its slices cost half


def write_shard(path, tokens):
    """Write tokens, (count,) integers, as an llm.c shard: of uint32 if they are an array of that, else of uint16."""
    dtype = np.dtype("<u4" if tokens.dtype == np.uint32 else "<u2")
    header = np.zeros(256, "<i4")
    header[:3] = *next(kind for kind, stored in FORMATS.items() if stored == dtype), len(tokens)
    with open(path, "wb") as file:
        file.write(header)
        file.write(tokens.astype(dtype, copy=False))


def load(folder):
    """Open a folder of shards: (train Stream, val Stream, meta dict, tiktoken.Encoding or None).

    meta has `tokenizer`, `vocab_size` and `hash`; without a meta.json the shards are taken
    for GPT-2's, as llm.c's and modded-nanogpt's are. The encoding is None where it would
    have to be downloaded and cannot be. SystemExit(2) on what is missing or damaged.
    """
    folder, streams = Path(folder), []
    path = folder / "meta.json"
    meta = read_json(path, tokenizer=str, vocab_size=int) if path.exists() else dict(GPT2)
    if not 0 < meta["vocab_size"] <= MAX_VOCAB:
        fail(f"{path}: vocab_size {meta['vocab_size']} is not between 1 and {MAX_VOCAB:,}; mend it")
    for split in ("train", "val"):
        files = sorted(folder.glob(f"*{split}*.bin"))
        if not files:
            npy = ", but .npy files, build-nanogpt's, which are not read" if any(folder.glob("*.npy")) else ""
            fail(f"--data {folder}: no *{split}*.bin there{npy}; {REMEDY}")
        streams.append(Stream(files, meta["vocab_size"]))
    if "hash" not in meta:              # of names, sizes and beginnings: the content can be tens of GB
        shards = [(file.name, stream.shard(file)) for stream in streams for file in stream.files]
        content = b"".join(f"{name} {len(shard)} ".encode() + shard[:4096].tobytes() for name, shard in shards)
        meta["hash"] = sha256(content).hexdigest()
    encoding = load_encoding(folder, meta["tokenizer"])
    if encoding and encoding.n_vocab != meta["vocab_size"]:
        fail(f"{path}: vocab_size {meta['vocab_size']} is not the {encoding.n_vocab} of its tokenizer; mend it")
    return *streams, meta, encoding


def read_json(path, **fields):
    """The object in a JSON file, its named fields checked for their types."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if all(type(found[name]) is kind for name, kind in fields.items()):
            return found
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        pass
    fail(f"{path}: not a JSON object with the fields {', '.join(fields)}; mend it, or make its folder again")


def fail(message, status=2, anywhere=False):
    """One line on standard error, and exit; of the processes on a machine only the first speaks, unless anywhere."""
    if anywhere or os.environ.get("LOCAL_RANK", "0") == "0":
        tqdm.write(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    raise SystemExit(status)


def byte_pair_encoding(name, pattern, ranks, special_tokens=None):
    """The tiktoken.Encoding of ranks {bytes: id}. ValueError where tiktoken would panic, at once or when encoding."""
    special_tokens = special_tokens or {END_OF_TEXT: len(ranks)}
    ids = [*ranks.values(), *special_tokens.values()]
    in_range = all(type(i) is int and 0 <= i < MAX_VOCAB for i in ids)
    every_byte = all(bytes([byte]) in ranks for byte in range(0xF5))        # UTF-8 has no larger ones
    if not (in_range and every_byte and len(set(ids)) == len(ids) and END_OF_TEXT in special_tokens):
        raise ValueError(f"each byte, each token and {END_OF_TEXT} need an id of their own, below 2^20")
    return tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special_tokens)


def save_encoding(encoding, folder):
    """Write a tiktoken.Encoding whole, so that the folder needs no other file and no network."""
    ranks = {base64.b64encode(token).decode(): rank for token, rank in encoding._mergeable_ranks.items()}
    (folder / "encoding.json").write_text(json.dumps({
        "name": encoding.name, "pat_str": encoding._pat_str, "mergeable_ranks": ranks,
        "special_tokens": encoding._special_tokens}))


def load_encoding(folder, name):
    """The tiktoken.Encoding in folder, or else the one tiktoken knows by name, or None if that needs a network."""
    path = folder / "encoding.json"
    try:
        if not path.exists():
            return tiktoken.get_encoding(name)
    except Exception:                   # whatever the network raises: training can do without
        return None
    stored = read_json(path, name=str, pat_str=str, mergeable_ranks=dict, special_tokens=dict)
    try:
        ranks = {base64.b64decode(token): rank for token, rank in stored["mergeable_ranks"].items()}
        return byte_pair_encoding(stored["name"], stored["pat_str"], ranks, stored["special_tokens"])
    except ValueError as error:
        fail(f"{path}: not a tokenizer ({error}); restore it from a copy, or make its folder again")


def save_hugging_face_tokenizer(encoding, folder):
    """Write what transformers.AutoTokenizer opens as the same tokenizer, or return False if none has the same ids."""
    from transformers.convert_slow_tokenizer import TikTokenConverter
    special = encoding._special_tokens
    tokens = encoding._mergeable_ranks | {token.encode(): rank for token, rank in special.items()}
    try:
        with mock.patch("tiktoken.load.load_tiktoken_bpe", lambda path: tokens):       # there is no file to read
            tokenizer = TikTokenConverter(None, encoding._pat_str, False, special).converted()
    except Exception:                   # its regular expressions are of another library than tiktoken's
        return False
    everything = b"".join(tokens).decode(errors="replace")
    if tokenizer.encode(everything).ids != encoding.encode(everything, allowed_special="all"):
        return False
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT,
        "model_input_names": ["input_ids", "attention_mask"], "clean_up_tokenization_spaces": False}))
    return True


def train_bpe(texts, n):
    """Byte-pair ranks, {bytes: rank} with n of them, from the first BPE_SAMPLE characters of texts.

    Distinct words are counted once, and a merge touches only the words that hold its
    pair. A word is a string with one character a token, so merging is str.replace. Ties
    go to the smaller pair: the same texts give the same ranks.
    """
    counts, size = Counter(), 0
    for text in texts:
        text = text[:BPE_SAMPLE // 50]                  # no file is more than a fiftieth of the sample
        counts.update(regex.findall(PATTERN, text))
        size += len(text)
        if size >= BPE_SAMPLE:
            break
    words, counts = ["".join(map(chr, word.encode())) for word in counts], list(counts.values())
    total, holders, changed = Counter(), defaultdict(set), set()

    def tally(i, sign):
        for pair in map("".join, zip(words[i], words[i][1:])):
            total[pair] += sign * counts[i]
            holders[pair].add(i)
            changed.add(pair)

    for i in range(len(words)):
        tally(i, 1)
    tokens, heap = [bytes([byte]) for byte in range(256)], []
    while len(tokens) < n and (heap or changed):
        for pair in changed:
            heapq.heappush(heap, (-total[pair], pair))
        changed.clear()
        count, pair = heapq.heappop(heap)
        if 0 < -count == total[pair]:                   # else the entry is from before its count changed
            for i in holders.pop(pair):
                tally(i, -1)
                words[i] = words[i].replace(pair, chr(len(tokens)))
                tally(i, 1)
            tokens.append(tokens[ord(pair[0])] + tokens[ord(pair[1])])
    return {token: rank for rank, token in enumerate(tokens)}


def build_python_corpus(folder=PYTHON_CORPUS):
    """Make the built-in corpus in folder, unless it is there, of the same sources and settings.

    It is the Python source of the standard library, of the runtime packages and of what those require.
    """
    files = python_files()
    sources = sha256(json.dumps([VOCAB_SIZE, BPE_SAMPLE, PATTERN, [
        (name, path.stat().st_size, path.stat().st_mtime_ns) for name, path in files]]).encode()).hexdigest()
    if folder.exists() and read_json(folder / "meta.json", sources=str)["sources"] == sources:
        return
    print(f"building {folder} from {len(files):,} Python files of this machine, once", flush=True)
    texts = {}                          # text: split, in the files' order, duplicates dropped
    for name, path in files:
        with contextlib.suppress(UnicodeDecodeError):
            texts.setdefault(path.read_bytes().decode(), split_of(name))
    ranks = train_bpe((text for text, split in texts.items() if split == "train"), VOCAB_SIZE - 1)
    write_corpus(folder, "python", iter(texts.items()), byte_pair_encoding("python", PATTERN, ranks), sources=sources)


def python_files():
    """[(name, path), ...] of the corpus, sorted by name and then shuffled with a fixed seed."""
    specs = {package: importlib.util.find_spec(package) for package in PYTHON_PACKAGES}
    roots = {package: spec.submodule_search_locations[0] for package, spec in specs.items() if spec}
    roots["python"] = sysconfig.get_path("stdlib")
    files = sorted((f"{root}/{path.relative_to(folder).as_posix()}", path)
                   for root, folder in roots.items() for path in Path(folder).rglob("*.py")
                   if not {"site-packages", "dist-packages"} & set(path.relative_to(folder).parts))
    random.Random(0).shuffle(files)
    return files


def split_of(name):
    """The split of a file, by a hash of its name: 3% each to validation and test."""
    percent = int(sha256(name.encode()).hexdigest(), 16) % 100
    return "val" if percent < 3 else "test" if percent < 6 else "train"


def write_corpus(folder, name, documents, encoding, **extra):
    """Tokenize documents, an iterator of (text, split), into shards, meta.json and encoding.json in folder.

    Each document begins with end-of-text. A batch of documents and a shard of each split
    are in memory. The folder is built in another and then renamed, so that nobody, a
    second builder included, ever sees half of one.
    """
    dtype = np.uint16 if encoding.n_vocab <= 2 ** 16 else np.uint32
    parts, held, shards, batch = {split: [] for split in SPLITS}, Counter(), Counter(), True
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{folder.name}.", dir=folder.parent) as temporary, tqdm(
            unit="B", unit_scale=True, desc="tokenizing", disable=None) as bar:
        new, old = Path(temporary, "new"), Path(temporary, "old")
        new.mkdir()
        while batch:                    # the last one is empty, and then what is left is written
            batch = list(itertools.islice(documents, BATCH_DOCUMENTS))
            for split in SPLITS:
                texts = [text for text, its_split in batch if its_split == split]
                ids = encoding.encode_ordinary_batch(texts, num_threads=os.cpu_count())
                parts[split] += [np.array([encoding.eot_token, *document], dtype) for document in ids]
                held[split] += sum(len(document) + 1 for document in ids)
                bar.update(sum(map(len, texts)))
                if held[split] < (SHARD_TOKENS if batch else 1):
                    continue
                tokens = np.concatenate(parts[split])                   # once a shard
                while len(tokens) >= (SHARD_TOKENS if batch else 1):
                    write_shard(new / f"{name}_{split}_{shards[split]:06d}.bin", tokens[:SHARD_TOKENS])
                    tokens = tokens[SHARD_TOKENS:]
                    shards[split] += 1
                parts[split], held[split] = [tokens.copy()], len(tokens)    # a view would keep what is written
        if not (shards["train"] and shards["val"]):
            fail(f"{folder}: too few documents to train on some and hold some out; bring more, or longer ones")
        save_encoding(encoding, new)
        content = "".join(sha256(read_shard(path)).hexdigest() for path in sorted(new.glob("*.bin")))
        digest = sha256(content.encode()).hexdigest()
        meta = {"tokenizer": encoding.name, "vocab_size": encoding.n_vocab, "hash": digest, **extra}
        (new / "meta.json").write_text(json.dumps(meta, indent=1))
        try:
            if folder.exists():
                folder.rename(old)
            new.rename(folder)
        except OSError:                 # a second builder was quicker, with the same result
            if not folder.exists():
                raise


def text(args):
    """Tokenize the files and folders of args.paths into args.out, a new folder."""
    out, files = Path(args.out), []
    if out.exists() and any(out.iterdir()):
        fail(f"--out {out} holds other data; name a new folder, or delete it")
    for given in map(Path, args.paths):
        for path in sorted(given.rglob("*")) if given.is_dir() else [given]:
            if not path.is_dir() and not any(part.startswith(".") for part in path.relative_to(given).parts):
                files.append(path)
    random.Random(0).shuffle(files)     # each phase reads its stretch of the stream, and should meet every folder
    encoding = choose_encoding(args, read_documents(files, args.field))
    splits = itertools.cycle(["train", "val", "test", *30 * ["train"]])
    write_corpus(out, "text", zip(read_documents(files, args.field), splits), encoding)
    print(f"{out} is ready: python train_tst.py --data {out}")


def read_documents(files, field):
    """Yield the texts in files: each line's field of a .jsonl, others whole, or in parts if long."""
    for path in files:
        jsonl = path.suffix == ".jsonl"
        try:
            with open(path, encoding="utf-8", newline="") as file:
                read = file.readline if jsonl else lambda: file.read(DOCUMENT_CHARS) + file.readline(DOCUMENT_CHARS)
                for n, text in enumerate(iter(read, ""), 1):
                    if "\0" in text:
                        raise UnicodeError
                    if jsonl and text.strip():
                        text = json.loads(text)[field].encode(errors="replace").decode()
                    if text.strip():
                        yield text
        except UnicodeError:
            fail(f"{path}: not UTF-8 text; convert it, or leave it out")
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            fail(f"{path}:{n}: not a JSON object with text in its field {field!r}; mend it, or say --field")


def choose_encoding(args, texts):
    """The tiktoken.Encoding that --tokenizer says: `train` (on texts), a file of byte pairs, or a name."""
    name = args.tokenizer
    if name == "train":
        if args.vocab_size < 257:
            fail(f"--vocab-size {args.vocab_size}: 256 bytes and end-of-text need 257")
        return byte_pair_encoding("trained", PATTERN, train_bpe(texts, args.vocab_size - 1))
    if args.pattern:
        try:
            pairs = map(bytes.split, Path(name).read_bytes().splitlines())
            ranks = {base64.b64decode(token): int(rank) for token, rank in pairs}
            return byte_pair_encoding(Path(name).stem, PATTERNS[args.pattern], ranks)
        except ValueError:
            fail(f"--tokenizer {name}: not a tiktoken BPE file, which has a token in base64 and its rank a line")
    names, cache = tiktoken.list_encoding_names(), os.environ.get("TIKTOKEN_CACHE_DIR", "not set")
    return load_encoding(Path(args.out), name) or fail(
        f"--tokenizer {name}: tiktoken cannot load it; it knows {', '.join(names)}, and downloads each once into "
        f"TIKTOKEN_CACHE_DIR ({cache}); a BPE file needs --pattern {' or '.join(PATTERNS)}; --tokenizer train works "
        "without a network")


def fineweb(args):
    """Download the validation shard and the training shards 1 .. args.shards, but those that are there."""
    stem = "finewebedu" if args.edu else "fineweb"
    if not 1 <= args.shards <= max(FINEWEB[stem]):
        fail(f"--shards {args.shards}: there are 1 to {max(FINEWEB[stem])}")
    out, repo = Path(args.out or f"data/fineweb{'-edu' * args.edu}"), fineweb_repo(stem, args.shards)
    path = out / "meta.json"
    if not path.exists() or read_json(path, tokenizer=str).get("repo") != repo:
        if out.exists() and any(out.iterdir()):
            fail(f"--out {out} holds other data, and {repo} may repeat its documents; name another folder")
        out.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({**GPT2, "repo": repo}))
    names = [f"{stem}_val_000000.bin"] + [f"{stem}_train_{k:06d}.bin" for k in range(1, args.shards + 1)]
    missing = [name for name in names if not (out / name).exists()]
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    with tqdm(total=len(missing) * (HEADER_BYTES + 2 * SHARD_TOKENS), unit="B", unit_scale=True, disable=None) as bar:
        for name in missing:
            download(f"{endpoint}/datasets/{repo}/resolve/main/{name}", out / name, bar)
    print(f"{out} has {args.shards} training shards: python train_tst.py --data {out}")


def fineweb_repo(stem, shards):
    """The smallest dataset whose files are so called that has that many training shards."""
    return next(repo for most, repo in FINEWEB[stem].items() if shards <= most)


def download(url, path, bar):
    """Fetch the shard at url to path, by way of path.part, which it goes on with after any failure."""
    part, before = path.with_name(path.name + ".part"), bar.n
    for attempt in range(1, RETRIES + 1):
        have = part.stat().st_size if part.exists() else 0
        headers = {"Range": f"bytes={have}-", "Accept-Encoding": "identity"}
        try:
            with requests.get(url, stream=True, timeout=60, headers=headers) as reply:
                if reply.status_code == 416:            # there is nothing after what we have
                    break
                reply.raise_for_status()
                with open(part, "ab" if reply.status_code == 206 else "wb") as file:
                    whole = file.tell() + int(reply.headers.get("Content-Length", 0))
                    for chunk in reply.iter_content(2 ** 16):
                        file.write(chunk)
                        bar.update(before + file.tell() - bar.n)
                if part.stat().st_size >= whole:
                    break
                raise requests.ConnectionError("the connection was lost")
        except requests.RequestException as error:
            if attempt == RETRIES or getattr(error.response, "status_code", 0) in (401, 403, 404):
                fail(f"{url}: {error}; the same command goes on where this one stopped")
            time.sleep(BACKOFF * 2 ** attempt)
    try:
        read_shard(part)
    except SystemExit:
        part.unlink()
        raise
    part.replace(path)


def main(argv=None):
    """Download or tokenize as argv says (default: the command line). SystemExit(2) on bad input."""
    parser = argparse.ArgumentParser(description="Make a folder of token shards to train on.", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("fineweb", help="download GPT-2 tokens of FineWeb, 100M a shard", allow_abbrev=False)
    command.add_argument("--shards", type=int, required=True, help="training shards to have, 200 MB each")
    command.add_argument("--edu", action="store_true", help="FineWeb-Edu, of which there are 99")
    command.add_argument("--out", help="folder (default: data/fineweb, or data/fineweb-edu)")
    other = commands.add_parser("text", help="tokenize your own text", allow_abbrev=False)
    other.add_argument("paths", nargs="+", help="text files, .jsonl files, and folders of them")
    other.add_argument("--out", required=True, help="the new folder")
    other.add_argument("--tokenizer", default="gpt2",
                       help="tiktoken's name of it, a tiktoken BPE file, or train, on the text (default: gpt2)")
    other.add_argument("--pattern", choices=tuple(PATTERNS), help="how text is split, for a tokenizer from a file")
    other.add_argument("--vocab-size", type=int, default=VOCAB_SIZE, help="for train (default: %(default)s)")
    other.add_argument("--field", default="text", help="of a .jsonl's objects (default: text)")
    parser.error = command.error = other.error = fail
    args = parser.parse_args(argv)
    try:
        fineweb(args) if args.command == "fineweb" else text(args)
    except OSError as error:
        fail(f"{error.filename or args.out}: {error.strerror or error}; mend that, or name another --out")
    except KeyboardInterrupt:
        fail("interrupted; the same command starts again, and downloads go on where they stopped", status=130)


if __name__ == "__main__":
    main()
