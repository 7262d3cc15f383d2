"""The data: a batch is a pure function of (seed, step, row), read from shards of tokens.

`Batches` cuts the stream of tokens into rows and `bags` cuts rows into bags, which
is all that superposition asks of the data. The rest of the file is shards on disk
(llm.c's format), the tokenizer, and the built-in corpus: the Python source code
that every machine that can run this already has.
"""
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
import uuid
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import regex
import tiktoken
import torch
from tqdm import tqdm

END_OF_TEXT = "<|endoftext|>"
SPLITS = ("train", "val", "test")
SHARD_TOKENS = 100_000_000
SHARD_MAGIC, SHARD_VERSION, HEADER_BYTES = 20240520, 1, 1024

PYTHON_CORPUS = Path("data/python")     # this path names the built-in corpus, which is made when absent
PYTHON_PACKAGES = ("torch torchgen functorch numpy tiktoken tqdm sympy mpmath networkx jinja2 fsspec filelock "
                   "regex requests urllib3 idna certifi charset_normalizer").split()
VOCAB_SIZE = 1024                       # of the built-in corpus, end-of-text included
BPE_SAMPLE = 8_000_000                  # characters the vocabulary is trained on
# What byte pairs may merge within: a word with the character before it, three digits, punctuation,
# and a line break with the next line's indentation, of which source code is full.
PATTERN = (r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+(?:[\r\n]+ *)?"
           r"|\s*[\r\n]+ *|\s+(?!\S)|\s+")


def fail(message, status=2):
    """One line on standard error, and exit; of the processes on a machine, one speaks."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
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
        self.shards = [read_shard(file) for file in files]
        for file, shard in zip(files, self.shards):         # the rest is checked as it is read
            self.check(shard[:2 ** 20], file)
        self.ends = np.cumsum([len(shard) for shard in self.shards])

    def __len__(self):
        return int(self.ends[-1])

    def read(self, start, n):
        """The n tokens from position start on, across the ends of shards: (n,) int64."""
        parts, k = [], int(np.searchsorted(self.ends, start, side="right"))
        while n > 0:
            part = self.shards[k][start - self.ends[k]:][:n]    # counted from the shard's end, so negative
            parts.append(part)
            start, n, k = start + len(part), n - len(part), k + 1
        return self.check(np.concatenate(parts).astype(np.int64), self.files[k - 1])

    def check(self, tokens, file):
        if tokens.max() >= self.vocab_size:
            fail(f"{file}: token id {tokens.max()} is beyond the vocabulary of {self.vocab_size}; are these shards of "
                 "another tokenizer?")
        return tokens


def read_shard(path):
    """Map an llm.c shard: 256 int32 of header (magic, version, count), then count uint16 tokens."""
    size = path.stat().st_size
    magic, version, count = np.fromfile(path, "<i4", 3) if size >= HEADER_BYTES else (0, 0, 0)
    if (magic, version) != (SHARD_MAGIC, SHARD_VERSION):
        fail(f"{path}: not an llm.c shard (a header of 256 int32 that starts {SHARD_MAGIC}, {SHARD_VERSION}, "
             f"then uint16 tokens)")
    if count < 1 or size != HEADER_BYTES + 2 * count:
        fail(f"{path}: its header promises {count:,} tokens, {HEADER_BYTES + 2 * int(count):,} bytes, and the file has "
             f"{size:,}: truncated or damaged; make or download it again")
    return np.memmap(path, "<u2", "r", offset=HEADER_BYTES, shape=(int(count),))


def write_shard(path, tokens):
    header = np.zeros(256, "<i4")
    header[:3] = SHARD_MAGIC, SHARD_VERSION, len(tokens)
    with open(path, "wb") as file:
        file.write(header.tobytes())
        file.write(tokens.astype("<u2").tobytes())


def load(folder):
    """Open a folder of shards: (train Stream, val Stream, meta dict, tiktoken.Encoding or None).

    meta has `tokenizer`, `vocab_size` and `hash`, from meta.json where there is one;
    without it the shards are taken for GPT-2's, as llm.c's and modded-nanogpt's are.
    The encoding is None where it would have to be downloaded and cannot be.
    """
    folder = Path(folder)
    files = {split: sorted(folder.glob(f"*{split}*.bin")) for split in ("train", "val")}
    for split, found in files.items():
        if not found:
            fail(f"--data {folder}: no *{split}*.bin there; leave out --data for the built-in corpus")
    if (folder / "meta.json").exists():
        meta = read_json(folder / "meta.json", tokenizer=str, vocab_size=int, hash=str)
    else:
        meta = {"tokenizer": "gpt2", "vocab_size": 50_257}
    streams = [Stream(found, meta["vocab_size"]) for found in files.values()]
    if "hash" not in meta:              # of names, sizes and beginnings: the content can be tens of GB
        meta["hash"] = sha256(*(f"{file.name} {len(shard)} ".encode() + shard[:4096].tobytes()
                                for stream in streams for file, shard in zip(stream.files, stream.shards)))
    return *streams, meta, load_encoding(folder, meta["tokenizer"])


def read_json(path, **fields):
    """The object in a JSON file, its named fields checked for their types."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if all(type(found[name]) is kind for name, kind in fields.items()):
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
        stored["mergeable_ranks"] = {base64.b64decode(t): rank for t, rank in stored["mergeable_ranks"].items()}
        return tiktoken.Encoding(**stored)
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
        if not (folder / "meta.json").exists():
            fail(f"{folder}: the place of the built-in corpus holds something else; move that to another folder")
        if read_json(folder / "meta.json").get("sources") == sources:
            return
    print(f"building {folder} from {len(files):,} Python files of this machine, once", flush=True)
    texts = {}                          # text: split, in the files' order, duplicates dropped
    for name, path in files:
        with contextlib.suppress(UnicodeDecodeError):
            texts.setdefault(path.read_bytes().decode(), split_of(name))
    ranks = train_bpe((text for text, split in texts.items() if split == "train"), VOCAB_SIZE - 1)
    encoding = tiktoken.Encoding("python", pat_str=PATTERN, mergeable_ranks=ranks,
                                 special_tokens={END_OF_TEXT: len(ranks)})
    write_corpus(folder, "python", list(texts.items()), encoding, sources=sources)


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
    """Tokenize documents, a list of (text, split), into shards, meta.json and encoding.json in folder.

    Each document begins with end-of-text. The folder is built under another name and
    then renamed, so that nobody, a second builder included, ever sees half of one.
    """
    new = folder.with_name(f"{folder.name}.{uuid.uuid4().hex[:8]}")
    old = new.with_suffix(".old")
    new.mkdir(parents=True)
    try:
        tokens = {split: [np.zeros(0, np.uint16)] for split in SPLITS}
        with tqdm(total=sum(len(text) for text, _ in documents), unit="B", unit_scale=True, desc="tokenizing", disable=None) as bar:
            for k in range(0, len(documents), 256):
                texts, splits = zip(*documents[k:k + 256])
                for split, ids in zip(splits, encoding.encode_ordinary_batch(texts, num_threads=os.cpu_count())):
                    tokens[split].append(np.array([encoding.eot_token] + ids, np.uint16))
                bar.update(sum(map(len, texts)))
        streams = {split: np.concatenate(parts) for split, parts in tokens.items()}
        for split, stream in streams.items():
            for k in range(0, len(stream), SHARD_TOKENS):
                write_shard(new / f"{name}_{split}_{k // SHARD_TOKENS:06d}.bin", stream[k:k + SHARD_TOKENS])
        save_encoding(encoding, new)
        meta = {"tokenizer": encoding.name, "vocab_size": encoding.n_vocab, "hash": sha256(*streams.values()), **extra}
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
    while len(tokens) < n:
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
