"""Make shards of tokens from your own files. The trainer also builds data/python with this file.

    python tools/corpus.py notes/ book.txt corpus.jsonl --out data/mine
    python tools/corpus.py notes/ --out data/own --tokenizer train      # needs no network
"""
import argparse
import base64
import contextlib
import heapq
import importlib.util
import io
import itertools
import json
import os
import random
import shlex
import shutil
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
DOCUMENT_CHARS = 2 ** 16                # longer texts are split; they can overflow tiktoken's stack
HELD_OUT = 33                           # one of 33 documents of your own text is for validation
PYTHON_CORPUS = Path("data/python")     # the path of the built-in corpus
PYTHON_PACKAGES = (
    "torch torchgen functorch numpy tiktoken tqdm sympy mpmath networkx jinja2 fsspec filelock "
    "regex requests urllib3 idna certifi charset_normalizer").split()
VOCAB_SIZE = 1024                       # the default, with the end-of-text token
BPE_SAMPLE = 8_000_000                  # number of characters on which a vocabulary is trained
# Byte pairs are merged only within a match of this expression: a word with the character before
# it, up to three digits, punctuation, or a line break with the indentation of the next line
PATTERN = (r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+(?:[\r\n]+ *)?"
           r"|\s*[\r\n]+ *|\s+(?!\S)|\s+")
# In your own text, a word can have combining marks, such as the vowels of Hindi or Thai
OWN_PATTERN = PATTERN.replace(r"\p{L}\p{N}", r"\p{L}\p{M}\p{N}").replace(
    r"\p{L}+", r"[\p{L}\p{M}]+")
PATTERNS = {                            # for tokenizer files, which have no such expression
    "gpt2": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "llama3": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
              r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"}
TEXT, JSON, FOLDER = "text", "JSON lines", "folder"     # all other kinds of paths are skipped
UTF16 = ("skipped, because it is UTF-16; convert it with `iconv -f UTF-16 -t UTF-8 FILE > NEW`, or "
         "in PowerShell with `Get-Content FILE | Set-Content -Encoding utf8 NEW`")
BINARY = ("skipped, because it is not UTF-8 text; open a .gz with `gunzip`, a .zst with `unzstd`, "
          "and convert a .parquet to JSON lines with pandas.read_parquet")


def build_corpus(folder, name, read, split, choose_encoding):
    """Make a folder of shards from the texts of read(), which yields (source, text).

    `name` begins the names of the shards. Each text is used once. split(k, source) is the split of
    the k-th text. choose_encoding(texts) makes a tiktoken.Encoding from the training texts. Because
    read() is called twice, the texts need not fit into memory.
    """
    def documents():
        for k, (source, text) in enumerate(distinct(read())):
            yield text, split(k, source)

    training_texts = (text for text, its_split in documents() if its_split == "train")
    write_corpus(folder, name, documents(), choose_encoding(training_texts))


def distinct(documents):
    """Yield each (source, text) whose text has not occurred before."""
    seen = set()
    for source, text in documents:
        digest = sha256(text.encode()).digest()[:8]
        if digest not in seen:
            seen.add(digest)
            yield source, text


def write_corpus(folder, name, documents, encoding):
    """Tokenize documents, an iterator of (text, split), into a new folder of shards.

    An end-of-text token precedes each document. SystemExit(2) without training or validation text.
    """
    dtype = np.dtype(np.uint16 if encoding.n_vocab <= 2 ** 16 else np.uint32)
    with new_folder(folder) as new, tempfile.TemporaryDirectory(dir=new.parent) as token_files:
        documents = iter(tqdm(documents, "tokenizing", unit=" documents", disable=None))
        while batch := list(itertools.islice(documents, 128)):
            texts = [text for text, _ in batch]
            ids = encoding.encode_ordinary_batch(texts, num_threads=os.cpu_count())
            for split in {split for _, split in batch}:         # one file of tokens for each split
                with open(Path(token_files, split), "ab") as file:
                    file.writelines(np.array([encoding.eot_token, *document], dtype)
                                    for (_, its_split), document in zip(batch, ids)
                                    if its_split == split)
        if not {"train", "val"} <= set(os.listdir(token_files)):
            fail(f"{folder} would have no training text or no validation text. Add distinct text.")
        for path in Path(token_files).iterdir():
            for k, start in enumerate(range(0, path.stat().st_size, SHARD_TOKENS * dtype.itemsize)):
                write_shard(new / f"{name}_{path.name}_{k:06d}.bin",
                            np.fromfile(path, dtype, SHARD_TOKENS, offset=start))
        save_encoding(encoding, new)
        digests = [sha256(data.read_shard(path)).hexdigest() for path in sorted(new.glob("*.bin"))]
        meta = {"tokenizer": encoding.name, "vocab_size": encoding.n_vocab,
                "hash": sha256("".join(digests).encode()).hexdigest()}
        (new / "meta.json").write_text(json.dumps(meta, indent=1))


@contextlib.contextmanager
def new_folder(folder):
    """Yield a temporary folder, which gets the name `folder` at the end, when it is complete.

    Temporary folders of killed processes are removed. Each process has a shared lock on the parent
    folder, so that an exclusive lock is possible only if no other process is at work.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    prefix = f"{folder.name}.unfinished-"
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(ImportError, OSError):     # Windows and some disks have no locks
            import fcntl
            lock = os.open(folder.parent, os.O_RDONLY)
            stack.callback(os.close, lock)
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                for leftover in folder.parent.glob(prefix + "*"):
                    shutil.rmtree(leftover)
            fcntl.flock(lock, fcntl.LOCK_SH)
        temporary = tempfile.TemporaryDirectory(prefix=prefix, dir=folder.parent)
        new = Path(stack.enter_context(temporary), "new")
        new.mkdir()
        yield new
        if is_new(folder):              # otherwise another process was faster
            new.replace(folder)


def is_new(folder):
    """Whether this path does not exist, or is an empty folder."""
    return not folder.exists() or folder.is_dir() and not any(folder.iterdir())


def write_shard(path, tokens):
    """Write tokens, (count,) uint16 or uint32, as a shard in llm.c's format."""
    kind, dtype = next(item for item in data.FORMATS.items() if item[1].itemsize == tokens.itemsize)
    header = np.zeros(data.HEADER_BYTES // 4, "<i4")
    header[:3] = *kind, len(tokens)
    with open(path, "wb") as file:
        file.write(header)
        file.write(tokens.astype(dtype, copy=False))


def save_encoding(encoding, folder):
    """Write a tiktoken.Encoding to encoding.json, so that nothing has to be downloaded again."""
    ranks = encoding._mergeable_ranks.items()
    (folder / "encoding.json").write_text(json.dumps({
        "name": encoding.name, "pat_str": encoding._pat_str,
        "mergeable_ranks": {base64.b64encode(token).decode(): rank for token, rank in ranks},
        "special_tokens": encoding._special_tokens}))


def load_encoding(folder):
    """The tiktoken.Encoding in a folder's encoding.json, or None if there is no such file."""
    path = Path(folder, "encoding.json")
    if path.exists():
        try:
            stored = json.loads(path.read_text())
            return make_encoding(stored["name"], stored["pat_str"],
                                 stored["mergeable_ranks"].items(), stored["special_tokens"])
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            fail(f"{path} is damaged ({first_line(error)}). Restore the file.")


def make_encoding(name, pattern, pairs, special=None):
    """A tiktoken.Encoding of pairs (token, rank), where a token is bytes, or a str in base64.

    special: {token: rank} (default: end-of-text). ValueError if tiktoken would crash.
    """
    pairs = [(base64.b64decode(token, validate=True) if isinstance(token, str) else token, int(i))
             for token, i in pairs]
    ranks = dict(pairs)
    if len(set(ranks.values())) < len(pairs):
        raise ValueError("a token or a rank occurs twice")
    if any(bytes([byte]) not in ranks for byte in range(256)):
        raise ValueError("a byte has no rank")
    special = {END_OF_TEXT: max(ranks.values()) + 1} if special is None else special
    return tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)


def train_bpe(texts, n, pattern=PATTERN):
    """Train a byte-pair vocabulary of at most n tokens -> {token: rank}.

    The sample is the first BPE_SAMPLE characters. Equal words are stored once, with their number.
    A word is a string with one character per token, so that a merge is a str.replace. Of equally
    frequent pairs, the pair with the smaller ids is merged.
    """
    words_seen, size = Counter(), 0
    for text in texts:
        text = text[:BPE_SAMPLE // 50]          # at most a fiftieth of the sample
        words_seen.update(regex.findall(pattern, text))
        size += len(text)
        if size >= BPE_SAMPLE:
            break
    words = ["".join(map(chr, word.encode())) for word in words_seen]
    counts = list(words_seen.values())
    total = Counter()                           # {pair: how often it occurs}
    holders = defaultdict(set)                  # {pair: indices of words that contained it}
    changed = set()                             # the pairs whose new count is not in the heap yet

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
        if -count != total[pair] or count == 0:  # the count has changed since this entry was made
            continue
        for i in holders.pop(pair):
            tally(i, -1)
            words[i] = words[i].replace(pair, chr(len(tokens)))
            tally(i, 1)
        tokens.append(tokens[ord(pair[0])] + tokens[ord(pair[1])])
    return {token: rank for rank, token in enumerate(tokens)}


def spread(texts):
    """A random sample of at most BPE_SAMPLE characters: the texts with the smallest hashes."""
    kept, size = [], 0
    for text in texts:
        heapq.heappush(kept, (-int(sha256(text.encode()).hexdigest(), 16), text))
        size += len(text)
        while size > BPE_SAMPLE:
            size -= len(heapq.heappop(kept)[1])         # the text with the largest hash
    return [text for _, text in kept]


def download_encoding(name, remedy):
    """The tiktoken.Encoding with this name, downloaded once. SystemExit(2) if that fails."""
    try:
        return tiktoken.get_encoding(name)
    except Exception as error:          # an unknown name, no connection, or no space on the disk
        fail(f"tiktoken cannot load the tokenizer {name} ({first_line(error)}). {remedy}")


def first_line(error):
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def build_python_corpus(folder=PYTHON_CORPUS, vocab_size=VOCAB_SIZE):
    """Build the built-in corpus if it is missing. Its runs can resume only on the same corpus."""
    if is_new(folder):
        print(f"Building {folder} from the Python source code on this machine (once).", flush=True)
        build_corpus(folder, "python", read_python, lambda k, file: split_of(file), lambda texts:
                     make_encoding("python", PATTERN, train_bpe(texts, vocab_size - 1).items()))


def read_python():
    """Yield (name, text) of the standard library and the packages, in a shuffled, fixed order."""
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
        with contextlib.suppress(UnicodeDecodeError):           # a few old modules are in Latin-1
            yield name, path.read_bytes().decode()


def split_of(name):
    """The split of a file, from a hash of its name: 3% are for validation and 3% for the test."""
    percent = int(sha256(name.encode()).hexdigest(), 16) % 100
    return "val" if percent < 3 else "test" if percent < 6 else "train"


def own_split(k, source):
    """Each 33rd document (HELD_OUT) is for validation, and the document after it for the test."""
    if k % HELD_OUT == HELD_OUT - 1:
        return "val"
    return "test" if k % HELD_OUT == 0 and k > 0 else "train"


def find_files(paths, field, only):
    """Print what is read and what is skipped -> [(path, TEXT or JSON)], in a shuffled fixed order.

    A file in a folder is read if its name matches one of the patterns in `only`.
    """
    kinds = {}                          # {path: TEXT, JSON, or why the path is skipped}
    for given in map(Path, paths):
        if not given.exists():
            fail(f"{given} does not exist. Correct the path.")
        for path in [given, *sorted(given.rglob("*"))]:
            kinds[path] = kind_of(path, given, field, only)
    for kind in sorted(set(kinds.values()) - {FOLDER}, key=lambda kind: ("skipped" in kind, kind)):
        found = [str(path) for path in kinds if kinds[path] == kind]
        print(f"{kind}: {len(found):,} files, such as {', '.join(found[:3])}", flush=True)
    files = [(path, kind) for path, kind in kinds.items() if kind in (TEXT, JSON)]
    random.Random(0).shuffle(files)     # so that the held-out documents come from every folder
    return files or fail(f"There is no text in {' '.join(paths)}. Change the paths or --only.")


def kind_of(path, given, field, only):
    """TEXT, JSON (by the name or by the first two lines), FOLDER, or why the path is skipped."""
    if any(part.startswith(".") for part in path.relative_to(given).parts):
        return "skipped, because the name begins with a dot"
    if not os.access(path, os.R_OK):
        return "skipped, because it cannot be read"
    if path.is_dir():
        return "skipped, because it is a link" if path != given and path.is_symlink() else FOLDER
    if not path.is_file() or path.stat().st_size == 0:
        return "skipped, because it is empty or no regular file"
    if path != given and not any(path.match(pattern) for pattern in only):
        return "skipped, because the name does not match --only"
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            lines = [file.readline(2 ** 24), file.readline(2 ** 24)]
            rest = iter(lambda: file.read(2 ** 20), "")
            if any("\0" in chunk for chunk in itertools.chain(lines, rest)):
                return BINARY           # text has no zero bytes
    except UnicodeDecodeError as error:         # UTF-16 begins with the bytes ff fe or fe ff
        return UTF16 if error.object[:2] in (b"\xff\xfe", b"\xfe\xff") else BINARY
    if path.suffix.lower() in (".jsonl", ".ndjson", ".jsonlines"):
        return JSON
    try:
        first = json.loads(lines[0])
    except ValueError:
        return TEXT
    is_json = isinstance(first, dict) and (field in first or lines[1].startswith("{"))
    return JSON if is_json else TEXT


def read_documents(files, field, size):
    """Yield (path, text). Texts are split at `size` characters, or at an earlier end of line."""
    for path, kind in files:
        with open(path, encoding="utf-8-sig", newline="") as file:
            for source in [file] if kind == TEXT else json_texts(path, file, field):
                while document := source.read(size - size // 4) + source.readline(size // 4):
                    if document.strip():
                        yield path, document


def json_texts(path, lines, field):
    """Yield the text in the field of each line, as a file. SystemExit(2) if a line has no text."""
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                text = json.loads(line)[field]
                yield io.StringIO(text.encode(errors="replace").decode())   # also half an emoji
            except (ValueError, LookupError, TypeError, AttributeError):
                fail(f"{path}:{number} is not a JSON object with text in the field {field!r}. "
                     "Correct the line, or choose another --field.")


def choose_encoding(args, texts):
    """The tiktoken.Encoding of --tokenizer: trained on texts, from a BPE file, or from tiktoken."""
    name = args.tokenizer
    if name == "train":
        return make_encoding("trained", OWN_PATTERN,
                             train_bpe(spread(texts), args.vocab_size - 1, OWN_PATTERN).items())
    if args.pattern:
        try:
            lines = [line.split() for line in Path(name).read_text().splitlines() if line.strip()]
            return make_encoding(Path(name).stem, PATTERNS[args.pattern], lines)
        except (OSError, ValueError) as error:
            fail(f"--tokenizer {name} is not a BPE file of tiktoken, or is truncated "
                 f"({first_line(error)}). Name a BPE file, or download it again.")
    return download_encoding(name, "Use a name that tiktoken knows (such as gpt2), a BPE file with "
                             "--pattern, or --tokenizer train, which needs no network.")


def main(argv=None):
    """Tokenize as argv (default: the command line) says. SystemExit(2) on bad input."""
    parser = argparse.ArgumentParser(description="Make shards from text.", allow_abbrev=False)
    parser.error, flag = fail, parser.add_argument
    flag("paths", nargs="+", help="files of text or of JSON lines, and folders; before the flags")
    flag("--out", type=Path, required=True, help="the folder to create")
    flag("--tokenizer", default="gpt2", help="a name that tiktoken knows, a BPE file, or train, "
         "which trains a tokenizer on the text (default: gpt2)")
    flag("--pattern", choices=PATTERNS, help="the expression that splits text, for a BPE file")
    flag("--vocab-size", type=int, default=VOCAB_SIZE,
         help="the number of tokens for --tokenizer train (default: %(default)s)")
    flag("--only", nargs="+", default=["*"], metavar="PATTERN",
         help='names of the files that are read in folders, such as "*.c" "*.h" (default: all)')
    flag("--field", default="text", help="the field with the text in JSON lines (default: text)")
    args = parser.parse_args(argv)
    if not is_new(args.out):
        fail(f"--out {args.out} exists and is not empty. Choose a new folder, or delete it.")
    if args.vocab_size < 257:
        fail(f"--vocab-size {args.vocab_size} is too small. Choose 257 or more.")
    try:
        files = find_files(args.paths, args.field, args.only)
        # A small text is split into small documents, so that about 3% of it is for validation. The
        # first 10,000 documents show whether the text is small
        documents = distinct(read_documents(files, args.field, DOCUMENT_CHARS))
        total = sum(len(text) for _, text in itertools.islice(documents, 10_000))
        size = max(1, min(DOCUMENT_CHARS, total // (2 * HELD_OUT)))
        build_corpus(args.out, "text", lambda: read_documents(files, args.field, size), own_split,
                     lambda texts: choose_encoding(args, texts))
    except OSError as error:
        fail(f"{error.filename or args.out}: {error.strerror or error}. Check path and disk.")
    print(f"{args.out} is ready: python train_tst.py --data {shlex.quote(str(args.out))}")


if __name__ == "__main__":
    main()
