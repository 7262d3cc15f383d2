"""Shards from text: the built-in corpus, or your own files.

The built-in corpus is the Python source code that every machine that can run this already has.
The trainer makes it when it first needs it. Your own text becomes a folder for --data:

    python tools/corpus.py notes/ book.txt corpus.jsonl --out data/mine
    python tools/corpus.py notes/ --out data/own --tokenizer train      # no network needed
"""
import argparse
import base64
import heapq
import importlib.util
import itertools
import json
import os
import random
import sys
import sysconfig
import tempfile
from collections import Counter, defaultdict
from hashlib import sha256
from pathlib import Path

import numpy as np
import regex
import tiktoken
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
from data import fail

SPLITS = ("train", "val", "test")
SHARD_TOKENS = 100_000_000
BATCH_DOCUMENTS = 128                   # tokenized at once
DOCUMENT_CHARS = 2 ** 16                # a longer text file is cut into documents

PYTHON_CORPUS = Path("data/python")     # this path names the built-in corpus, made when absent
PYTHON_PACKAGES = (
    "torch torchgen functorch numpy tiktoken tqdm sympy mpmath networkx jinja2 fsspec filelock "
    "regex requests urllib3 idna certifi charset_normalizer").split()
VOCAB_SIZE = 1024                       # of the built-in corpus, end-of-text included
BPE_SAMPLE = 8_000_000                  # characters the vocabulary is trained on
# What byte pairs may merge within: a word with the character before it, three digits,
# punctuation, and a line break with the next line's indentation, of which source code is full.
PATTERN = (r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+(?:[\r\n]+ *)?"
           r"|\s*[\r\n]+ *|\s+(?!\S)|\s+")
PATTERNS = {                            # of the tokenizers whose files hold byte pairs alone
    "gpt2": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "llama3": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
              r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"}


# The vocabulary

def train_bpe(texts, n):
    """Byte-pair ranks, {bytes: rank} with n of them, from the first BPE_SAMPLE characters of texts.

    Distinct words are counted once, and a merge touches only the words that hold its pair. A
    word is a string with one character a token, so merging is str.replace. Ties go to the
    smaller pair: the same texts give the same ranks. Fewer than n when no pair is left.
    """
    words_seen, size = Counter(), 0
    for text in texts:
        text = text[:BPE_SAMPLE // 50]          # no file is more than a fiftieth of the sample
        words_seen.update(regex.findall(PATTERN, text))
        size += len(text)
        if size >= BPE_SAMPLE:
            break
    words = ["".join(map(chr, word.encode())) for word in words_seen]
    counts = list(words_seen.values())
    total = Counter()                           # how often each pair occurs
    holders = defaultdict(set)                  # the words that have had it
    changed = set()                             # the pairs whose count the heap does not know yet

    def tally(i, sign):
        for first, second in zip(words[i], words[i][1:]):
            pair = first + second
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
        if -count != total[pair] or count == 0:  # an entry from before its count changed
            continue
        for i in holders.pop(pair):
            tally(i, -1)
            words[i] = words[i].replace(pair, chr(len(tokens)))
            tally(i, 1)
        tokens.append(tokens[ord(pair[0])] + tokens[ord(pair[1])])
    return {token: rank for rank, token in enumerate(tokens)}


def byte_pair_encoding(name, pattern, ranks):
    """The tiktoken.Encoding of ranks {bytes: id}, with end-of-text after the last id."""
    end = max(ranks.values()) + 1
    return tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks,
                             special_tokens={data.END_OF_TEXT: end})


# The built-in corpus

def build_python_corpus(folder=PYTHON_CORPUS, vocab_size=VOCAB_SIZE):
    """Make the built-in corpus in folder, unless it is there: runs need the data that they had.

    It is the Python source of the standard library, of the runtime packages and of what those
    require, with a vocabulary of vocab_size trained on it.
    """
    if folder.exists():
        return
    files = python_files()
    print(f"building {folder} from {len(files):,} Python files of this machine, once", flush=True)
    split_by_text = {}                  # in the files' order, duplicates dropped
    for name, path in files:
        try:
            split_by_text.setdefault(path.read_bytes().decode(), split_of(name))
        except UnicodeDecodeError:
            pass                        # a few old modules are Latin-1
    documents = split_by_text.items()
    ranks = train_bpe((text for text, split in documents if split == "train"), vocab_size - 1)
    encoding = byte_pair_encoding("python", PATTERN, ranks)
    write_corpus(folder, "python", iter(documents), encoding)


def python_files():
    """[(name, path), ...] of the corpus, sorted by name and then shuffled with a fixed seed."""
    roots = {"python": sysconfig.get_path("stdlib")}
    for package in PYTHON_PACKAGES:
        spec = importlib.util.find_spec(package)
        if spec:
            roots[package] = spec.submodule_search_locations[0]
    files = []
    for root, folder in roots.items():
        for path in Path(folder).rglob("*.py"):
            inside = path.relative_to(folder)
            if not {"site-packages", "dist-packages"} & set(inside.parts):
                files.append((f"{root}/{inside.as_posix()}", path))
    files.sort()
    random.Random(0).shuffle(files)
    return files


def split_of(name):
    """The split of a file, by a hash of its name: 3% each to validation and test."""
    percent = int(sha256(name.encode()).hexdigest(), 16) % 100
    return "val" if percent < 3 else "test" if percent < 6 else "train"


# Shards

def write_shard(path, tokens):
    """Write (count,) integers as an llm.c shard: of uint32 if they are that, else of uint16."""
    dtype = np.dtype("<u4" if tokens.dtype == np.uint32 else "<u2")
    header = np.zeros(data.HEADER_BYTES // 4, "<i4")
    header[:2] = next(kind for kind, stored in data.FORMATS.items() if stored == dtype)
    header[2] = len(tokens)
    with open(path, "wb") as file:
        file.write(header)
        file.write(tokens.astype(dtype, copy=False))


class ShardWriter:
    """Collects the tokens of one split, and writes a shard whenever SHARD_TOKENS are there."""

    def __init__(self, stem, dtype):
        self.stem, self.shards, self.held = stem, 0, 0      # stem: a path without the number
        self.tokens = np.empty(SHARD_TOKENS, dtype)

    def add(self, tokens):
        while len(tokens):
            part = tokens[:SHARD_TOKENS - self.held]
            self.tokens[self.held:self.held + len(part)] = part
            self.held += len(part)
            tokens = tokens[len(part):]
            if self.held == SHARD_TOKENS:
                self.flush()

    def flush(self):
        if self.held:
            write_shard(Path(f"{self.stem}_{self.shards:06d}.bin"), self.tokens[:self.held])
            self.shards, self.held = self.shards + 1, 0


def write_corpus(folder, name, documents, encoding):
    """Tokenize documents, an iterator of (text, split), into shards in folder.

    It gets meta.json and encoding.json too. Each document begins with end-of-text.
    A batch of documents and a shard of each split are in memory. The folder is built elsewhere
    and then renamed, so that nobody, a second builder included, ever sees half of one.
    SystemExit(2) if there is nothing to train on or nothing held out.
    """
    dtype = np.uint16 if encoding.n_vocab <= 2 ** 16 else np.uint32
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{folder.name}.", dir=folder.parent) as temporary, \
            tqdm(unit=" characters", unit_scale=True, desc="tokenizing", disable=None) as bar:
        new, old = Path(temporary, "new"), Path(temporary, "old")
        new.mkdir()
        writers = {split: ShardWriter(new / f"{name}_{split}", dtype) for split in SPLITS}
        while batch := list(itertools.islice(documents, BATCH_DOCUMENTS)):
            texts = [text for text, _ in batch]
            ids = encoding.encode_ordinary_batch(texts, num_threads=os.cpu_count())
            for (_, split), document in zip(batch, ids):
                writers[split].add(np.array([encoding.eot_token, *document], dtype))
            bar.update(sum(map(len, texts)))
        for writer in writers.values():
            writer.flush()
        if not (writers["train"].shards and writers["val"].shards):
            fail(f"{folder}: too few documents to train on some and hold some out; bring more, or "
                 "longer ones")
        save_encoding(encoding, new)
        digests = [sha256(data.read_shard(path)).hexdigest() for path in sorted(new.glob("*.bin"))]
        meta = {"tokenizer": encoding.name, "vocab_size": encoding.n_vocab,
                "hash": sha256("".join(digests).encode()).hexdigest()}
        (new / "meta.json").write_text(json.dumps(meta, indent=1))
        try:
            if folder.exists():
                folder.rename(old)
            new.rename(folder)
        except OSError:                 # a second builder was quicker, with the same result
            if not folder.exists():
                raise


def save_encoding(encoding, folder):
    """Write a tiktoken.Encoding whole, so that the folder needs no other file and no network."""
    ranks = encoding._mergeable_ranks.items()
    (folder / "encoding.json").write_text(json.dumps({
        "name": encoding.name, "pat_str": encoding._pat_str,
        "mergeable_ranks": {base64.b64encode(token).decode(): rank for token, rank in ranks},
        "special_tokens": encoding._special_tokens}))


# Your own text

def tokenize(args):
    """Tokenize the files and folders of args.paths into args.out, a new folder."""
    out = Path(args.out)
    if out.exists() and (out.is_file() or any(out.iterdir())):
        fail(f"--out {out} holds other data; name a new folder, or delete it")
    files, skipped = find_files(args.paths)
    encoding = choose_encoding(args, read_documents(files, args.field))
    splits = itertools.cycle(["train", "val", "test", *30 * ["train"]])
    write_corpus(out, "text", zip(read_documents(files, args.field), splits), encoding)
    if skipped:
        print(f"skipped {skipped:,} files that are not UTF-8 text")
    print(f"{out} is ready: python train_tst.py --data {out}")


def find_files(paths):
    """(the text files of the given files and folders, shuffled; how many others were skipped).

    What is hidden in a folder stays out. SystemExit(2) for a file given by name that is not
    text.
    """
    files, skipped = [], 0
    for given in map(Path, paths):
        if not given.is_dir():
            if not is_text(given):
                fail(f"{given}: not UTF-8 text; convert it, or leave it out")
            files.append(given)
            continue
        for path in sorted(given.rglob("*")):
            hidden = any(part.startswith(".") for part in path.relative_to(given).parts)
            if hidden or not path.is_file():
                continue
            if is_text(path):
                files.append(path)
            else:
                skipped += 1
    random.Random(0).shuffle(files)     # so that the held-out documents come from every folder
    return files, skipped


def is_text(path):
    """Whether all of a file is UTF-8 and none of it a zero byte, which binary files have."""
    try:
        with open(path, encoding="utf-8", newline="") as file:
            return not any("\0" in chunk for chunk in iter(lambda: file.read(2 ** 20), ""))
    except UnicodeDecodeError:
        return False


def read_documents(files, field):
    """Yield the texts in files: each line's field of a .jsonl, others whole, or in parts if long.

    SystemExit(2) on a line that is not an object with text in that field.
    """
    for path in files:
        with open(path, encoding="utf-8", newline="") as file:
            texts = json_texts(path, file, field) if path.suffix == ".jsonl" else parts(file)
            yield from (text for text in texts if text.strip())


def parts(file):
    """Yield an open text file in parts of DOCUMENT_CHARS characters, each to its line's end."""
    while part := file.read(DOCUMENT_CHARS):
        yield part + file.readline(DOCUMENT_CHARS)          # a line may be the whole file


def json_texts(path, lines, field):
    """Yield the text in that field of each line of an open .jsonl."""
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                text = json.loads(line)[field]
                yield text.encode(errors="replace").decode()    # half an emoji cannot be UTF-8
            except (ValueError, LookupError, TypeError, AttributeError):
                fail(f"{path}:{number}: not a JSON object with text in its field {field!r}; mend "
                     "it, or say --field")


def choose_encoding(args, texts):
    """The tiktoken.Encoding that --tokenizer says: `train` (on texts), a BPE file, or a name."""
    name = args.tokenizer
    if name == "train":
        if args.vocab_size < 257:
            fail(f"--vocab-size {args.vocab_size}: 256 bytes and end-of-text need 257")
        return byte_pair_encoding("trained", PATTERN, train_bpe(texts, args.vocab_size - 1))
    if args.pattern:
        try:
            pairs = [line.split() for line in Path(name).read_bytes().splitlines()]
            ranks = {base64.b64decode(token): int(rank) for token, rank in pairs}
            return byte_pair_encoding(Path(name).stem, PATTERNS[args.pattern], ranks)
        except ValueError:
            fail(f"--tokenizer {name}: not a tiktoken BPE file, which has a token in base64 and "
                 "its rank a line")
    encoding = data.load_encoding(args.out, name)
    if encoding is None:
        fail(f"--tokenizer {name}: tiktoken cannot load it; it knows "
             f"{', '.join(tiktoken.list_encoding_names())}, and downloads each once into "
             f"TIKTOKEN_CACHE_DIR ({os.environ.get('TIKTOKEN_CACHE_DIR', 'not set')}); a BPE file "
             f"needs --pattern {' or '.join(PATTERNS)}; --tokenizer train works without a network")
    return encoding


def main(argv=None):
    """Tokenize as argv says (default: the command line). SystemExit(2) on bad input."""
    parser = argparse.ArgumentParser(description="Make a folder of shards from your own text.",
                                     allow_abbrev=False)
    parser.error = fail
    parser.add_argument("paths", nargs="+", help="text files, .jsonl files, and folders of them")
    parser.add_argument("--out", required=True, help="the new folder")
    parser.add_argument("--tokenizer", default="gpt2", help="tiktoken's name of it, a tiktoken BPE "
                        "file, or train, on the text (default: gpt2)")
    parser.add_argument("--pattern", choices=tuple(PATTERNS),
                        help="how text is split, for a tokenizer from a file")
    parser.add_argument("--vocab-size", type=int, default=VOCAB_SIZE,
                        help="for train (default: %(default)s)")
    parser.add_argument("--field", default="text", help="of a .jsonl's objects (default: text)")
    args = parser.parse_args(argv)
    try:
        tokenize(args)
    except OSError as error:
        fail(f"{error.filename or args.out}: {error.strerror or error}; mend that, or name another "
             "--out")
    except KeyboardInterrupt:
        fail("interrupted; the same command starts again", status=130)


if __name__ == "__main__":
    main()
