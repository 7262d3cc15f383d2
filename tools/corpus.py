"""Shards from text: the built-in corpus, or your own files.

The built-in corpus is the Python source code that every machine that can run this already has; the
trainer makes it when it first needs it. Your own text becomes a folder for --data:

    python tools/corpus.py notes/ book.txt corpus.jsonl --out data/mine
    python tools/corpus.py notes/ --out data/own --tokenizer train      # no network needed
"""
import argparse
import base64
import heapq
import importlib.util
import io
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

END_OF_TEXT = "<|endoftext|>"
SHARD_TOKENS = 100_000_000
DOCUMENT_CHARS = 2 ** 16                # longer text is cut; tiktoken dies of a million spaces
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
# Your own text may have marks in its words: vowels in Hindi or Thai, say.
OWN_PATTERN = PATTERN.replace(r"\p{L}\p{N}", r"\p{L}\p{M}\p{N}").replace(
    r"\p{L}+", r"[\p{L}\p{M}]+")
PATTERNS = {                            # of the tokenizers whose files hold byte pairs alone
    "gpt2": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "llama3": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
              r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"}

HELD_OUT = 33                           # of so many documents of your own text
TEXT, JSON = "text: {}", "JSON lines: {}"           # kinds of files, as they are listed
OTHER = ("skipped, since it is not UTF-8 text: {}; `gunzip` opens a .gz, `unzstd` a .zst, and `pip "
         "install pandas pyarrow && python -c \"import pandas; pandas.read_parquet('FILE').to_json("
         "'FILE.jsonl', orient='records', lines=True)\"` a .parquet")


def build_corpus(folder, name, read, split, choose_encoding):
    """Make folder of the texts of read(), an iterator of (source, text), each text once.

    split(k, source) is the split of the k-th text, from 0. choose_encoding(texts) makes a
    tiktoken.Encoding, of training text alone. Texts need not fit into memory: they are read twice.
    """
    def documents():
        for k, (source, text) in enumerate(distinct(read())):
            yield text, split(k, source)

    training_texts = (text for text, its_split in documents() if its_split == "train")
    write_corpus(folder, name, documents(), choose_encoding(training_texts))


def distinct(documents):
    """Yield those (source, text) of documents whose text has not been there."""
    seen = set()
    for source, text in documents:
        digest = sha256(text.encode()).digest()[:8]
        if digest not in seen:
            seen.add(digest)
            yield source, text


def write_corpus(folder, name, documents, encoding):
    """Tokenize documents, an iterator of (text, split), each after end-of-text, into a new folder.

    It is built beside its place and then renamed, so that nobody ever sees half of one.
    SystemExit(2) if there is nothing to train on or nothing held out.
    """
    dtype = np.dtype(np.uint16 if encoding.n_vocab <= 2 ** 16 else np.uint32)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{folder.name}.", dir=folder.parent) as temporary:
        tokens, new = Path(temporary, "tokens"), Path(temporary, "new")
        tokens.mkdir()                  # a file of tokens for each split
        new.mkdir()
        documents = iter(tqdm(documents, "tokenizing", unit=" documents", disable=None))
        while batch := list(itertools.islice(documents, 128)):
            texts = [text for text, _ in batch]
            ids = encoding.encode_ordinary_batch(texts, num_threads=os.cpu_count())
            for split in {split for _, split in batch}:
                with open(tokens / split, "ab") as file:
                    file.writelines(np.array([encoding.eot_token, *document], dtype)
                                    for (_, its), document in zip(batch, ids) if its == split)
        if not ((tokens / "train").exists() and (tokens / "val").exists()):
            fail(f"{folder}: too little distinct text to train on some and hold out some: add text")
        for path in tokens.iterdir():
            for k, start in enumerate(range(0, path.stat().st_size, SHARD_TOKENS * dtype.itemsize)):
                write_shard(new / f"{name}_{path.name}_{k:06d}.bin",
                            np.fromfile(path, dtype, SHARD_TOKENS, offset=start))
        save_encoding(encoding, new)
        digests = [sha256(data.read_shard(path)).hexdigest() for path in sorted(new.glob("*.bin"))]
        meta = {"tokenizer": encoding.name, "vocab_size": encoding.n_vocab,
                "hash": sha256("".join(digests).encode()).hexdigest()}
        (new / "meta.json").write_text(json.dumps(meta, indent=1))
        if is_new(folder):              # or a second builder was quicker, with the same result
            new.replace(folder)


def is_new(folder):
    """Whether there is nothing yet at this path, or an empty folder."""
    return not folder.exists() or folder.is_dir() and not any(folder.iterdir())


def write_shard(path, tokens):
    """Write tokens, (count,) uint16 or uint32, as an llm.c shard."""
    kind, dtype = next(item for item in data.FORMATS.items() if item[1].itemsize == tokens.itemsize)
    header = np.zeros(data.HEADER_BYTES // 4, "<i4")
    header[:3] = *kind, len(tokens)
    with open(path, "wb") as file:
        file.write(header)
        file.write(tokens.astype(dtype, copy=False))


def save_encoding(encoding, folder):
    """Write a tiktoken.Encoding whole, so that the folder needs no other file and no network."""
    ranks = encoding._mergeable_ranks.items()
    (folder / "encoding.json").write_text(json.dumps({
        "name": encoding.name, "pat_str": encoding._pat_str,
        "mergeable_ranks": {base64.b64encode(token).decode(): rank for token, rank in ranks},
        "special_tokens": encoding._special_tokens}))


def train_bpe(texts, n, pattern=PATTERN):
    """Byte-pair ranks, {bytes: rank} with at most n, from the first BPE_SAMPLE characters of texts.

    Distinct words are counted once, and a merge touches only the words that hold its pair. A word
    is a string with one character a token, so merging is str.replace. Ties go to the smaller pair.
    """
    words_seen, size = Counter(), 0
    for text in texts:
        text = text[:BPE_SAMPLE // 50]          # no file is more than a fiftieth of the sample
        words_seen.update(regex.findall(pattern, text))
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


def spread(texts):
    """A sample of all texts in fixed memory: BPE_SAMPLE characters, of those of smallest hash."""
    kept, size = [], 0
    for text in texts:
        heapq.heappush(kept, (-int(sha256(text.encode()).hexdigest(), 16), text))
        size += len(text)
        while size > BPE_SAMPLE:
            size -= len(heapq.heappop(kept)[1])         # the one with the largest hash
    return [text for _, text in kept]


def byte_pair_encoding(name, pattern, ranks):
    """The tiktoken.Encoding of ranks {bytes: id}, with end-of-text after the last id."""
    special = {END_OF_TEXT: max(ranks.values()) + 1}
    return tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)


def download_encoding(name, remedy):
    """tiktoken's Encoding of that name, downloaded once. SystemExit(2), with a remedy, if not."""
    try:
        return tiktoken.get_encoding(name)
    except Exception as error:          # of the name, of the connection, of the disk
        fail(f"tokenizer {name}: tiktoken cannot load it ({first_line(error)}); {remedy}")


def first_line(error):
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def build_python_corpus(folder=PYTHON_CORPUS, vocab_size=VOCAB_SIZE):
    """Make the built-in corpus in folder, unless it is there: runs need the data that they had.

    It is the Python source of the standard library, of the runtime packages and of what those
    require, with a vocabulary of vocab_size trained on it.
    """
    if not is_new(folder):
        return
    print(f"building {folder} from the Python source on this machine, once", flush=True)
    build_corpus(folder, "python", read_python, lambda k, name: split_of(name),
                 lambda texts: byte_pair_encoding("python", PATTERN,
                                                  train_bpe(texts, vocab_size - 1)))


def read_python():
    """Yield (name, text) of the corpus's files, sorted by name and shuffled with a fixed seed."""
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
    for name, path in files:
        try:
            text = path.read_bytes().decode()
        except UnicodeDecodeError:      # a few old modules are Latin-1
            continue
        yield name, text


def split_of(name):
    """The split of a file, by a hash of its name: 3% each to validation and test."""
    percent = int(sha256(name.encode()).hexdigest(), 16) % 100
    return "val" if percent < 3 else "test" if percent < 6 else "train"


def own_split(k, source):
    """Of every HELD_OUT documents the last is for validation, and the next one for test."""
    if k % HELD_OUT == HELD_OUT - 1:
        return "val"
    return "test" if k % HELD_OUT == 0 and k > 0 else "train"


def find_files(paths, field, only=("*",)):
    """List the files, those of folders too, but hidden ones: [(path, TEXT or JSON)], shuffled.

    Of a folder's files those are read whose name matches one of the patterns in only.
    """
    kinds = {}
    for given in map(Path, paths):
        for path in sorted(given.rglob("*")) if given.is_dir() else [given]:
            hidden = any(part.startswith(".") for part in path.relative_to(given).parts)
            wanted = not hidden and any(path.match(pattern) for pattern in only)
            if path == given or path.is_file() and wanted:
                kinds[path] = kind_of(path, field)
    for kind in (TEXT, JSON, OTHER):
        found = [str(path) for path in kinds if kinds[path] == kind]
        if found:
            print(kind.format(f"{len(found):,} files, {', '.join(found[:4])}"), flush=True)
    files = [(path, kind) for path, kind in kinds.items() if kind != OTHER]
    random.Random(0).shuffle(files)     # so that the held-out documents come from every folder
    return files


def kind_of(path, field):
    """TEXT, or JSON if the name or the first two lines of a file say so; OTHER if not UTF-8."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            lines = [file.readline(2 ** 24), file.readline(2 ** 24)]
            rest = iter(lambda: file.read(2 ** 20), "")
            if any("\0" in part for part in itertools.chain(lines, rest)):
                return OTHER            # binary files have zero bytes
    except UnicodeDecodeError:
        return OTHER
    if path.suffix.lower() in (".jsonl", ".ndjson", ".jsonlines"):
        return JSON
    try:
        first = json.loads(lines[0])
    except ValueError:
        return TEXT
    alike = isinstance(first, dict) and (field in first or lines[1].startswith("{"))
    return JSON if alike else TEXT


def read_documents(files, field, size):
    """Yield (path, text) of files' texts, in parts of at most size characters, to a line's end."""
    for path, kind in files:
        with open(path, encoding="utf-8-sig", newline="") as file:
            for text in [file] if kind == TEXT else json_texts(path, file, field):
                while part := text.read(size - size // 4) + text.readline(size // 4):
                    if part.strip():
                        yield path, part


def json_texts(path, lines, field):
    """Yield that field of each line as a file. SystemExit(2) on a line without text there."""
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                text = json.loads(line)[field]
                yield io.StringIO(text.encode(errors="replace").decode())   # of half an emoji: ?
            except (ValueError, LookupError, TypeError, AttributeError):
                fail(f"{path}:{number}: no JSON object with text in its field {field!r}; mend it, "
                     "or say --field")


def choose_encoding(args, texts):
    """The tiktoken.Encoding that --tokenizer says: `train` (on texts), a BPE file, or a name."""
    name = args.tokenizer
    if name == "train":
        ranks = train_bpe(spread(texts), args.vocab_size - 1, OWN_PATTERN)
        return byte_pair_encoding("trained", OWN_PATTERN, ranks)
    if args.pattern:
        try:
            pairs = [line.split() for line in Path(name).read_bytes().splitlines()]
            ranks = {base64.b64decode(token): int(rank) for token, rank in pairs}
            return byte_pair_encoding(Path(name).stem, PATTERNS[args.pattern], ranks)
        except ValueError:
            fail(f"--tokenizer {name}: no tiktoken BPE file, whose lines are base64 and a rank")
    return download_encoding(name, f"tiktoken has {', '.join(tiktoken.list_encoding_names())}; a "
                             "BPE file needs --pattern; --tokenizer train needs no network")


def main(argv=None):
    """Tokenize as argv says (default: the command line). SystemExit(2) on bad input."""
    parser = argparse.ArgumentParser(description="Make shards from text.", allow_abbrev=False)
    parser.error, flag = fail, parser.add_argument
    flag("paths", nargs="+", help="files of text or JSON lines, and folders of them")
    flag("--out", type=Path, required=True, help="the new folder")
    flag("--tokenizer", default="gpt2",
         help="tiktoken's name of it, a tiktoken BPE file, or train, on the text (default: gpt2)")
    flag("--pattern", choices=PATTERNS, help="how text is split, for a tokenizer from a file")
    flag("--vocab-size", type=int, default=VOCAB_SIZE, help="for train (default: %(default)s)")
    flag("--only", nargs="+", default=["*"], metavar="PATTERN",
         help='names of the files that are read in folders, such as "*.c" "*.h" (default: all)')
    flag("--field", default="text", help="of JSON lines' objects (default: text)")
    args = parser.parse_args(argv)
    if not is_new(args.out):
        fail(f"--out {args.out} holds other data; name a new folder, or delete it")
    if args.vocab_size < 257:
        fail(f"--vocab-size {args.vocab_size}: 256 bytes and end-of-text need 257")
    try:
        files = find_files(args.paths, args.field, args.only)
        # Of a small text (as its first documents tell) none is above half of what may be held out
        documents = distinct(read_documents(files, args.field, DOCUMENT_CHARS))
        total = sum(len(text) for _, text in itertools.islice(documents, 10_000))
        size = max(1, min(DOCUMENT_CHARS, total // (2 * HELD_OUT)))
        build_corpus(args.out, "text", lambda: read_documents(files, args.field, size), own_split,
                     lambda texts: choose_encoding(args, texts))
    except OSError as error:
        fail(f"{error.filename or args.out}: {error.strerror or error}; mend it, or change --out")
    print(f"{args.out} is ready: python train_tst.py --data {args.out}")


if __name__ == "__main__":
    main()
