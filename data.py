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
import hashlib
import heapq
import importlib.util
import json
import math
import os
import random
import shutil
import sys
import sysconfig
import time
import uuid
from collections import Counter, defaultdict
from pathlib import Path

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
BATCH_CHARS, DOCUMENT_CHARS = 2 ** 24, 2 ** 18          # tokenized at once; a longer text file is cut into documents
REMEDY = ("`python data.py fineweb --shards 10` downloads shards, `python data.py text FILES --out FOLDER` makes them "
          "from text, and without --data the corpus is the built-in one")

GPT2 = {"tokenizer": "gpt2", "vocab_size": 50_257}
FINEWEB = {                             # start of the files' names: training shards: Hugging Face dataset
    "fineweb": {103: "kjj0/fineweb10B-gpt2", 1030: "kjj0/fineweb100B-gpt2"},
    "finewebedu": {99: "kjj0/finewebedu10B-gpt2"}}
RETRIES, BACKOFF = 6, 1.0               # times in a row that bring no byte; seconds, doubled each time

PYTHON_CORPUS = Path("data/python")     # this path names the built-in corpus, which is made when absent
PYTHON_PACKAGES = ("torch torchgen functorch numpy tiktoken tqdm sympy mpmath networkx jinja2 fsspec filelock "
                   "regex requests urllib3 idna certifi charset_normalizer").split()
VOCAB_SIZE = 4096                       # of the built-in corpus, end-of-text included
BPE_SAMPLE = 8_000_000                  # characters the vocabulary is trained on
# What byte pairs may merge within: a word with the character before it, three digits, punctuation,
# and a line break with the next line's indentation, of which source code is full.
PATTERN = (r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+(?:[\r\n]+ *)?"
           r"|\s*[\r\n]+ *|\s+(?!\S)|\s+")
PATTERNS = {                            # of the tokenizers whose files hold byte pairs alone
    "gpt2": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "llama3": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
              r"|\s*[\r\n]+|\s+(?!\S)|\s+"}


def fail(message, status=2, anywhere=False):
    """One line on standard error, and exit; of the processes on a machine only the first speaks, unless anywhere."""
    if anywhere or os.environ.get("LOCAL_RANK", "0") == "0":
        tqdm.write(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    raise SystemExit(status)


def bags(rows, s_in, s_out):
    """rows (B, l * s_in + s_out) -> inputs (B, l, s_in) and targets (B, l, s_out).

    Input bag j is predicted to be followed by target bag j, the s_out tokens right
    after it. With s_in = s_out = s that is the batch (B, l+1, s) of consecutive bags,
    inputs its [:, :-1] and targets its [:, 1:]; with s = 1 it is next-token training.
    """
    return rows.unfold(1, s_in + s_out, s_in).split((s_in, s_out), dim=2)


class Batches:
    """The rows of every training batch, with no state: resuming is asking for another step.

    Each phase owns a stretch of the stream, in proportion to the tokens it will read,
    cut into windows of l * s_in tokens (a row also reads the s_out tokens after its
    window, as its last target). Row after row, the windows are visited from an offset
    drawn from the seed in strides near the golden section of their number, so that a
    batch, and successive batches, are spread over the whole stretch. The stride is
    coprime to the number: no window comes twice before all have come once.

    tokens: a `Stream`; phases: [(steps, s_in, s_out), ...]. `epochs` says how often the
    run will read the data. SystemExit(2) if a stretch is too short for one batch.
    """

    def __init__(self, tokens, phases, batch_size, seq_len, seed):
        self.tokens, self.batch_size, self.seq_len = tokens, batch_size, seq_len
        self.phases, self.epochs = [], 0.0
        reads = np.cumsum([0] + [steps * s_in for steps, s_in, _ in phases])
        cuts = [len(tokens) * int(read) // int(reads[-1]) for read in reads]
        first_step = 0
        for k, (steps, s_in, s_out) in enumerate(phases):
            windows = (cuts[k + 1] - cuts[k] - s_out) // (seq_len * s_in)
            if steps and windows < batch_size:
                fail(f"{len(tokens):,} training tokens are too few for one batch of {batch_size} rows of {seq_len} bags "
                     f"of {s_in}: bring more data, or lower --batch-size, --seq-len or --s")
            if steps:
                offset = int(np.random.default_rng((seed, k)).integers(windows))
                self.phases.append((first_step, cuts[k], windows, seq_len * s_in, s_out, offset))
                self.epochs = max(self.epochs, steps * batch_size / windows)
            first_step += steps

    def rows(self, step, first, count):
        """Rows first .. first + count - 1 of the batch of step (from 0): (count, l * s_in + s_out) int64."""
        first_step, start, windows, window, s_out, offset = self.phase(step)
        row, stride = (step - first_step) * self.batch_size + first, golden_stride(windows)
        places = [start + (offset + (row + k) * stride) % windows * window for k in range(count)]
        return torch.from_numpy(np.stack([self.tokens.read(place, window + s_out) for place in places]))

    def epoch(self, step):
        """How often the phase of step (from 0) has used up its stretch before that step."""
        first_step, _, windows, *_ = self.phase(step)
        return (step - first_step) * self.batch_size // windows

    def phase(self, step):
        return [phase for phase in self.phases if phase[0] <= step][-1]


@functools.cache
def golden_stride(n):
    """A number coprime to n, near the golden section of n."""
    return next(k for k in range(max(1, round(n * 0.618)), n + 2) if math.gcd(k, n) == 1)


class Stream:
    """The tokens of one split as one long sequence over its memory-mapped shards.

    files: paths of llm.c shards in reading order; vocab_size: ids from it on are
    refused. SystemExit(2) on a file that is not a whole shard.
    """

    def __init__(self, files, vocab_size):
        self.files, self.vocab_size = files, vocab_size
        self.shard = functools.lru_cache(500)(read_shard)   # each holds a file open, of which a process has 1,024 or so
        for file in files:                                  # the rest is checked as it is read
            self.check(self.shard(file)[:2 ** 20], file)
        self.ends = np.cumsum([len(self.shard(file)) for file in files])

    def __len__(self):
        return int(self.ends[-1])

    def read(self, start, n):
        """The n tokens from position start on, across the ends of shards: (n,) int64."""
        parts, k = [], int(np.searchsorted(self.ends, start, side="right"))
        while n > 0:
            part = self.shard(self.files[k])[start - self.ends[k]:][:n]    # counted from the shard's end, so negative
            parts.append(part)
            start, n, k = start + len(part), n - len(part), k + 1
        return self.check(np.concatenate(parts).astype(np.int64), self.files[k - 1])

    def check(self, tokens, file):
        if tokens.max() >= self.vocab_size:
            fail(f"{file}: token id {tokens.max()} is beyond the vocabulary of {self.vocab_size}; are these shards of "
                 "another tokenizer?")
        return tokens


def read_shard(path):
    """Map an llm.c shard: 256 int32 of header (magic, version, count), then count tokens of uint16 or uint32."""
    size = path.stat().st_size
    *kind, count = map(int, np.fromfile(path, "<i4", 3)) if size >= HEADER_BYTES else (0, 0, 0)
    dtype = FORMATS.get(tuple(kind))
    if dtype is None:
        what = ": nanoGPT's, without a header" if path.name in ("train.bin", "val.bin") else ""
        fail(f"{path}: not an llm.c shard (256 int32 that start {' or '.join(map(str, FORMATS))}, then tokens){what}; "
             + REMEDY)
    if count < 1 or size != HEADER_BYTES + dtype.itemsize * count:
        fail(f"{path}: its header promises {count:,} tokens, {HEADER_BYTES + dtype.itemsize * count:,} bytes, and the "
             f"file has {size:,}: truncated or damaged; delete it, and make or download it again")
    return np.memmap(path, dtype, "r", offset=HEADER_BYTES, shape=(count,))


def write_shard(path, tokens):
    """Write tokens, (count,) integers, as an llm.c shard: of uint32 if they are an array of that, else of uint16."""
    header, dtype = np.zeros(256, "<i4"), np.dtype("<u4" if tokens.dtype == np.uint32 else "<u2")
    header[:3] = *next(kind for kind, stored in FORMATS.items() if stored == dtype), len(tokens)
    with open(path, "wb") as file:
        file.write(header)
        file.write(tokens.astype(dtype, copy=False))


def load(folder):
    """Open a folder of shards: (train Stream, val Stream, meta dict, tiktoken.Encoding or None).

    meta has `tokenizer`, `vocab_size` and `hash`, from meta.json, where a hash may lack;
    without one the shards are taken for GPT-2's, as llm.c's and modded-nanogpt's are.
    The encoding is None where it would have to be downloaded and cannot be.
    """
    folder = Path(folder)
    files = {split: sorted(folder.glob(f"*{split}*.bin")) for split in ("train", "val")}
    for split, found in files.items():
        if not found:
            npy = ", but .npy files, build-nanogpt's, which are not read" if any(folder.glob("*.npy")) else ""
            fail(f"--data {folder}: no *{split}*.bin there{npy}; {REMEDY}")
    if (folder / "meta.json").exists():
        meta = read_json(folder / "meta.json", tokenizer=str, vocab_size=int)
    else:
        meta = dict(GPT2)
    streams = [Stream(found, meta["vocab_size"]) for found in files.values()]
    if "hash" not in meta:              # of names, sizes and beginnings: the content can be tens of GB
        meta["hash"] = sha256(*(f"{file.name} {len(stream.shard(file))} ".encode() + stream.shard(file)[:4096].tobytes()
                                for stream in streams for file in stream.files))
    encoding = load_encoding(folder, meta["tokenizer"])
    if encoding and encoding.n_vocab != meta["vocab_size"]:
        fail(f"{folder / 'meta.json'}: vocab_size {meta['vocab_size']} is not the {encoding.n_vocab} of its tokenizer")
    return *streams, meta, encoding


def read_json(path, **fields):
    """The object in a JSON file, its named fields checked for their types."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if type(found) is dict and all(type(found[name]) is kind for name, kind in fields.items()):
            return found
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        pass
    fail(f"{path}: not a JSON object with the fields {', '.join(fields)}; make it again, or restore it from a copy")


def sha256(*parts):
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def save_encoding(encoding, folder):
    """Write a tiktoken.Encoding whole, so that the folder needs no other file and no network."""
    ranks = {base64.b64encode(token).decode(): rank for token, rank in encoding._mergeable_ranks.items()}
    (folder / "encoding.json").write_text(json.dumps({
        "name": encoding.name, "pat_str": encoding._pat_str, "mergeable_ranks": ranks,
        "special_tokens": encoding._special_tokens}))


def load_encoding(folder, name):
    """The tiktoken.Encoding in folder, or else the one tiktoken knows by name, or None if that needs a network."""
    if (folder / "encoding.json").exists():
        stored = read_json(folder / "encoding.json", name=str, pat_str=str, mergeable_ranks=dict, special_tokens=dict)
        try:
            stored["mergeable_ranks"] = {base64.b64decode(t): rank for t, rank in stored["mergeable_ranks"].items()}
            return tiktoken.Encoding(**stored)
        except (ValueError, TypeError) as error:
            fail(f"{folder / 'encoding.json'}: not a tokenizer ({error}); make it again, or restore it from a copy")
    try:
        return tiktoken.get_encoding(name)
    except Exception:                   # whatever the network raises: training can do without
        return None


def save_hugging_face_tokenizer(encoding, folder):
    """Write what transformers.AutoTokenizer opens as the same tokenizer, or return False if no exact one can be made.

    tiktoken joins any two neighbours whose bytes are a token, the lowest rank first, so each
    way to cut a token in two is a merge. ImportError without the package.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]     # the bytes that GPT-2 writes as themselves
    hidden = [byte for byte in range(256) if byte not in visible]
    letters = dict(zip(visible + hidden, map(chr, visible + [*range(256, 324)])))
    ranks = sorted(encoding._mergeable_ranks.items(), key=lambda item: item[1])
    names = {token: "".join(letters[byte] for byte in token) for token, _ in ranks}
    merges = [(names[token[:k]], names[token[k:]]) for token in names for k in range(1, len(token))
              if token[:k] in names and token[k:] in names]
    vocabulary = {names[token]: rank for token, rank in ranks} | encoding._special_tokens
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=True))
    try:
        split = pre_tokenizers.Split(Regex(encoding._pat_str), "removed", invert=True)
    except Exception:                   # its regular expressions are of another library than tiktoken's
        return False
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in encoding._special_tokens])
    everything = b"".join(names).decode(errors="replace")
    if tokenizer.encode(everything).ids != encoding.encode_ordinary(everything):
        return False
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT,
        "model_input_names": ["input_ids", "attention_mask"], "clean_up_tokenization_spaces": False}))
    return True


def build_python_corpus(folder=PYTHON_CORPUS):
    """Make the built-in corpus in folder, unless it is there, of the same sources and settings.

    It is the Python source of the standard library, of the runtime packages and of what
    those require. Validation and test are whole files, about 3% each.
    """
    files = python_files()
    sources = sha256(json.dumps([VOCAB_SIZE, BPE_SAMPLE, PATTERN, [
        (name, path.stat().st_size, path.stat().st_mtime_ns) for name, path in files]]).encode())
    if folder.exists():
        found = read_json(folder / "meta.json").get("sources") if (folder / "meta.json").exists() else None
        if not found:
            fail(f"{folder}: the place of the built-in corpus holds something else; move that to another folder")
        if found == sources:
            return
    print(f"building {folder} from {len(files):,} Python files of this machine, once", flush=True)
    texts = {}                          # text: split, in the files' order, duplicates dropped
    for name, path in files:
        with contextlib.suppress(UnicodeDecodeError):
            texts.setdefault(path.read_bytes().decode(), split_of(name))
    ranks = train_bpe((text for text, split in texts.items() if split == "train"), VOCAB_SIZE - 1)
    write_corpus(folder, "python", texts.items(), byte_pair_encoding("python", PATTERN, ranks), sources=sources)


def python_files():
    """[(name, path), ...] of the corpus, sorted by name and then shuffled with a fixed seed."""
    roots = {"python": Path(sysconfig.get_path("stdlib"))}
    for package in PYTHON_PACKAGES:
        spec = importlib.util.find_spec(package)
        if spec and spec.submodule_search_locations:
            roots[package] = Path(spec.submodule_search_locations[0])
    files = sorted((f"{root}/{path.relative_to(folder).as_posix()}", path)
                   for root, folder in roots.items() for path in folder.rglob("*.py")
                   if not {"site-packages", "dist-packages"} & set(path.relative_to(folder).parts))
    random.Random(0).shuffle(files)
    return files


def split_of(name):
    """The split of a document, by a hash of its name: 3% each to validation and test."""
    percent = int(sha256(name.encode()), 16) % 100
    return "val" if percent < 3 else "test" if percent < 6 else "train"


def write_corpus(folder, name, documents, encoding, **extra):
    """Tokenize documents, an iterable of (text, split), into shards, meta.json and encoding.json in folder.

    Each document begins with end-of-text. No more than BATCH_CHARS characters and a
    shard of each split are in memory. Where training or validation gets no document, it
    is the last twentieth of all tokens that validates. The folder is built under another
    name and then renamed, so that nobody, a second builder included, ever sees half of one.
    """
    new = folder.with_name(f"{folder.name}.{uuid.uuid4().hex[:8]}")
    old = new.with_suffix(".old")
    dtype = np.uint16 if encoding.n_vocab <= 2 ** 16 else np.uint32
    parts, shards = {split: [np.zeros(0, dtype)] for split in SPLITS}, Counter()

    def write_shards(split, least):
        tokens = np.concatenate(parts[split])
        while len(tokens) >= least:
            write_shard(new / f"{name}_{split}_{shards[split]:06d}.bin", tokens[:SHARD_TOKENS])
            tokens = tokens[SHARD_TOKENS:]
            shards[split] += 1
        parts[split] = [tokens.copy()]                  # a view would keep what is written in memory

    new.mkdir(parents=True)
    try:
        documents = iter(documents)
        with tqdm(unit="B", unit_scale=True, desc="tokenizing", disable=None) as bar:
            while batch := take(documents, BATCH_CHARS):
                texts, splits = zip(*batch)
                for split, ids in zip(splits, encoding.encode_ordinary_batch(texts, num_threads=os.cpu_count())):
                    parts[split].append(np.array([encoding.eot_token] + ids, dtype))
                for split in SPLITS:
                    if sum(map(len, parts[split])) >= SHARD_TOKENS:
                        write_shards(split, SHARD_TOKENS)
                bar.update(sum(map(len, texts)))
        if not all(shards[split] or len(parts[split]) > 1 for split in ("train", "val")):
            tokens = np.concatenate(sum(parts.values(), []))
            held_out = len(tokens) // 20
            if held_out == 0:
                fail(f"{folder}: {len(tokens)} tokens of text are too few to train on some and hold some out")
            parts = {"train": [tokens[:-held_out]], "val": [tokens[-held_out:]], "test": [tokens[:0]]}
        for split in SPLITS:
            write_shards(split, 1)
        save_encoding(encoding, new)
        content = [sha256(read_shard(path)).encode() for path in sorted(new.glob("*.bin"))]
        meta = {"tokenizer": encoding.name, "vocab_size": encoding.n_vocab, "hash": sha256(*content), **extra}
        (new / "meta.json").write_text(json.dumps(meta, indent=1))
        try:
            if folder.exists():
                folder.rename(old)
            new.rename(folder)
        except OSError:                 # a second builder was quicker, with the same result
            if not folder.exists():
                raise
    finally:
        shutil.rmtree(new, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def take(documents, size):
    """The next documents of an iterator, until they have size characters."""
    batch = []
    for document in documents:
        batch.append(document)
        size -= len(document[0])
        if size <= 0:
            break
    return batch


def byte_pair_encoding(name, pattern, ranks):
    return tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens={END_OF_TEXT: len(ranks)})


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
    words = [("".join(map(chr, word.encode())), count) for word, count in counts.items()]
    total, holders, changed = Counter(), defaultdict(set), set()

    def tally(i, sign):
        word, count = words[i]
        for k in range(len(word) - 1):
            pair = word[k:k + 2]
            total[pair] += sign * count
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
        if count == 0:
            break                                       # every word is one token
        if -count == total[pair]:                       # else the entry is from before its count changed
            for i in holders.pop(pair):
                tally(i, -1)
                words[i] = (words[i][0].replace(pair, chr(len(tokens))), words[i][1])
                tally(i, 1)
            tokens.append(tokens[ord(pair[0])] + tokens[ord(pair[1])])
    return {token: rank for rank, token in enumerate(tokens)}


def text(args):
    """Tokenize the files and folders of args.paths into args.out, a new folder."""
    out, found = Path(args.out), {}
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        fail(f"--out {out} holds other data; name a new folder, or delete it")
    for given in map(Path, args.paths):
        files = {path: path.relative_to(given.parent).as_posix() for path in (given, *sorted(given.rglob("*")))
                 if path.is_file() and (path == given or "/." not in f"/{path.relative_to(given).as_posix()}")}
        if not files:
            fail(f"{given}: no file there to tokenize")
        found.update(files)
    for left in out.parent.glob(out.name + "." + 8 * "[0-9a-f]"):
        print(f"{left} is left from a run that was killed, unless one is at work there: delete it")
    files = list(found.items())
    random.Random(0).shuffle(files)     # each phase reads its stretch of the stream, and should meet every folder
    encoding = choose_encoding(args, (text for text, _ in read_documents(files, args.field)))
    write_corpus(out, "text", read_documents(files, args.field), encoding)
    print(f"{out} is ready: python train_tst.py --data {out}")


def read_documents(files, field):
    """Yield (text, split) from files, [(path, name), ...]: a .jsonl by lines, others whole, or in parts if long."""
    for path, name in files:
        jsonl = path.suffix == ".jsonl"
        try:
            with open(path, encoding="utf-8", newline="") as file:
                read = file.readline if jsonl else lambda: file.read(DOCUMENT_CHARS) + file.readline(DOCUMENT_CHARS)
                for n, text in enumerate(iter(read, ""), 1):
                    if "\0" in text:
                        raise UnicodeError
                    if jsonl:
                        text = json_text(text, field, f"{path}:{n}")
                    if text.strip():
                        yield text, split_of(f"{name}:{n}")
        except UnicodeError:
            fail(f"{path}: not UTF-8 text; convert it, or leave it out")


def json_text(line, field, place):
    try:
        return json.loads(line)[field].encode(errors="replace").decode() if line.strip() else ""
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        fail(f"{place}: not a JSON object with text in its field {field!r}; mend it, or say --field")


def choose_encoding(args, texts):
    """The tiktoken.Encoding that --tokenizer says: `train` (on texts), a file of byte pairs, or a name."""
    name = args.tokenizer
    if name == "train":
        if args.vocab_size < 257:
            fail(f"--vocab-size {args.vocab_size}: 256 bytes and end-of-text need 257")
        return byte_pair_encoding("trained", PATTERN, train_bpe(texts, args.vocab_size - 1))
    if Path(name).is_file():
        if not args.pattern:
            fail(f"--tokenizer {name}: a file does not say where words end; add --pattern {' or '.join(PATTERNS)}")
        try:
            ranks = {base64.b64decode(token, validate=True): int(rank)
                     for token, rank in map(bytes.split, Path(name).read_bytes().splitlines())}
        except ValueError:
            ranks = {}
        if not {bytes([i]) for i in range(256)} <= set(ranks) or sorted(ranks.values()) != list(range(len(ranks))):
            fail(f"--tokenizer {name}: not a tiktoken BPE file, which has a token in base64 and its rank a line")
        return byte_pair_encoding(Path(name).stem, PATTERNS[args.pattern], ranks)
    if name not in tiktoken.list_encoding_names():
        fail(f"--tokenizer {name}: no such file; the names are train, {', '.join(tiktoken.list_encoding_names())}")
    encoding = load_encoding(Path(args.out), name)
    if encoding is None:
        fail(f"--tokenizer {name}: its file has to be downloaded once and cannot be; tiktoken keeps it in the folder "
             f"TIKTOKEN_CACHE_DIR ({os.environ.get('TIKTOKEN_CACHE_DIR', 'not set')}); --tokenizer train works without")
    return encoding


def fineweb_repo(stem, shards):
    """The smallest dataset whose files are so called that has that many training shards."""
    return next(repo for most, repo in FINEWEB[stem].items() if shards <= most)


def fineweb(args):
    """Download the validation shard and the training shards 1 .. args.shards, but those that are there."""
    stem, out = "finewebedu" if args.edu else "fineweb", Path(args.out)
    if not 1 <= args.shards <= max(FINEWEB[stem]):
        fail(f"--shards {args.shards}: there are 1 to {max(FINEWEB[stem])}")
    repo, held = fineweb_repo(stem, args.shards), None
    if (out / "meta.json").exists():
        held = read_json(out / "meta.json").get("repo", "of another tokenizer")
    elif any(out.glob("*.bin")):
        held = fineweb_repo(stem, 1)    # modded-nanogpt's, most likely
    if held not in (None, repo) or any(not path.name.startswith((f"{stem}_", "meta.json")) for path in out.glob("*")):
        fail(f"--out {out} holds other data, and {repo} may repeat its documents; name another folder")
    out.mkdir(parents=True, exist_ok=True)
    (out / "meta.json").write_text(json.dumps({**GPT2, "repo": repo}))
    names = [f"{stem}_val_000000.bin"] + [f"{stem}_train_{k:06d}.bin" for k in range(1, args.shards + 1)]
    missing = [name for name in names if not (out / name).exists()]
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    with tqdm(total=len(missing) * (HEADER_BYTES + 2 * SHARD_TOKENS), unit="B", unit_scale=True, disable=None) as bar:
        for name in missing:
            download(f"{endpoint}/datasets/{repo}/resolve/main/{name}", out / name, bar)
    print(f"{out} has {args.shards} training shards: python train_tst.py --data {out}")


def download(url, path, bar):
    """Fetch the shard at url to path, by way of path.part, which it goes on with after any failure."""
    part, before, failures = path.with_name(path.name + ".part"), bar.n, 0
    while not path.exists():
        have = part.stat().st_size if part.exists() else 0
        try:
            with requests.get(url, stream=True, timeout=60, headers={
                    "Range": f"bytes={have}-", "Accept-Encoding": "identity"}) as reply:
                if 400 <= reply.status_code < 500 and reply.status_code not in (408, 416, 429):
                    fail(f"{url}: HTTP {reply.status_code}; if another host has it, set HF_ENDPOINT")
                if reply.status_code != 416:                    # or else there is nothing after what we have
                    reply.raise_for_status()
                    with open(part, "ab" if reply.status_code == 206 else "wb") as file:
                        whole = file.tell() + int(reply.headers.get("Content-Length", 0))
                        for chunk in reply.iter_content(2 ** 16):
                            file.write(chunk)
                            bar.update(before + file.tell() - bar.n)
                        if file.tell() < whole:
                            raise requests.ConnectionError
            try:
                read_shard(part)
            except SystemExit:
                part.unlink()
                raise
            os.replace(part, path)
        except requests.RequestException as error:
            failures = 1 if part.exists() and part.stat().st_size > have else failures + 1
            if failures == RETRIES:
                why = type(error).__name__ if error.response is None else f"HTTP {error.response.status_code}"
                fail(f"{url}: {why}, {failures} times in a row; the same command goes on where this one stopped")
            time.sleep(BACKOFF * 2 ** failures)


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
    args.out = args.out or f"data/fineweb{'-edu' if args.edu else ''}"
    try:
        fineweb(args) if args.command == "fineweb" else text(args)
    except OSError as error:
        fail(f"{error.filename or args.out}: {error.strerror or error}; mend that, or name another --out")
    except KeyboardInterrupt:
        fail("interrupted; the same command starts again, and downloads go on where they stopped", status=130)


if __name__ == "__main__":
    main()
