"""The study's corpora, made of Debian's packages: C source, English, and both.

    python study/corpora.py data/c-4096 data/english-16384 data/mixed-16384

A folder is a kind and a size of vocabulary; those of a kind have the same documents and splits.
c: half of a Linux kernel's .c, .h and .rst files. prose: sentences, without markup and tables, of
that kernel's Documentation and of manuals and dictionaries. english: prose and the RFCs. mixed:
all of the kernel's .c and .h files, and english.

`apt-get download` fetches each package, in the version named below, into data/cache (Debian 12).
The RFCs are in Debian's component non-free, which apt may have to be told of. As root, first:

    echo deb http://deb.debian.org/debian bookworm non-free > /etc/apt/sources.list.d/non-free.list
    apt-get update

If Debian has gone on to another version, put the .deb of this one, from snapshot.debian.org, into
data/cache: another version makes other data, with another hash.
"""
import gzip
import html
import json
import random
import re
import subprocess
import sys
import tarfile
from hashlib import sha256
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from data import fail
from tools import corpus
from tools.corpus import DOCUMENT_CHARS, split_of

CACHE = ROOT / "data" / "cache"
KERNEL = "linux-source-6.1=6.1.176-1"
RFCS = [f"doc-rfc-{part}=20230121-1" for part in (
    "experimental fyi-bcp informational old-std others std std-proposed").split()]
PROSE = """
anarchism=15.3-3 debian-policy=4.6.2.0 debian-reference-en=2.100 developers-reference=12.18
dict-foldoc=20230119-1 dict-gcide=0.48.5+nmu2 dict-jargon=4.4.7-3.1 dict-wn=1:3.0-37
erlang-doc=1:25.2.3+dfsg-1+deb12u4 exim4-doc-html=4.96-1 fortunes=1:1.99.1-7.3
gimp-help-en=2.10.34-2 git-doc=1:2.39.5-0+deb12u3 libreoffice-help-en-us=4:7.4.7-1+deb12u14
llvm-14-doc=1:14.0.6-12 maxima-doc=5.46.0-11 miscfiles=1.5+dfsg-4 octave-doc=7.3.0-2
openjdk-17-doc=17.0.19+10-1~deb12u2 perl-doc=5.36.0-7+deb12u3
postgresql-doc-15=15.18-0+deb12u1 python-django-doc=3:3.2.25-0+deb12u3
python3.11-doc=3.11.2-6+deb12u8 qtbase5-doc-html=5.15.8+dfsg-11+deb12u3
sqlite3-doc=3.40.1-2+deb12u2 zsh-doc=5.9-4
""".split()
GENERATED = "drivers/gpu/drm/amd/include/"      # a quarter of the kernel: tables of registers
WORDS, LETTERS = 8, 0.9         # of a paragraph that is prose, at least: words, share of letters
KINDS = {                       # what makes the documents, [(text, split), ...]
    "c": lambda: c_documents(2, (".c", ".h", ".rst")),
    "prose": lambda: prose_documents(),
    "english": lambda: prose_documents() + rfc_documents(),
    "mixed": lambda: c_documents(1, (".c", ".h")) + prose_documents() + rfc_documents()}


def make(folder):
    """Make a folder of shards, unless it is there. SystemExit(2) if it has no name of ours."""
    kind, _, size = folder.name.rpartition("-")
    if kind not in KINDS or not size.isdigit() or int(size) < 257:
        fail(f"{folder}: give {', '.join(KINDS)}, and a size of vocabulary, such as data/c-4096")
    if not folder.exists():
        documents = KINDS[kind]()
        corpus.BPE_SAMPLE = 8_000_000
        if kind in ("english", "mixed"):        # of several parts
            random.Random(1).shuffle(documents)
            corpus.BPE_SAMPLE = 40_000_000
        print(f"building {folder} from {sum(len(text) for text, _ in documents):,} characters")
        train = (text for text, split in documents if split == "train")
        ranks = corpus.train_bpe(train, int(size) - 1)
        encoding = corpus.make_encoding(kind, corpus.PATTERN, ranks.items())
        corpus.write_corpus(folder, kind, iter(documents), encoding)
    print(f"{folder}: data_hash {json.loads((folder / 'meta.json').read_text())['hash'][:12]}")


def unpack(package):
    """The folder of a Debian package's files, given as NAME=VERSION."""
    name, version = package.split("=")
    folder = CACHE / f"{name}_{version.replace(':', '%3a')}"
    if not folder.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        if not list(CACHE.glob(f"{folder.name}_*.deb")):
            subprocess.run(["apt-get", "download", package], cwd=CACHE)
        debs = list(CACHE.glob(f"{folder.name}_*.deb"))
        if not debs:
            fail(f"{package} cannot be downloaded: python study/corpora.py alone says what to do")
        subprocess.run(["dpkg-deb", "-x", debs[0], folder], check=True)
    return folder


def kernel_files(wanted):
    """Yield (name, text) of the kernel's files whose name is wanted, where they are UTF-8."""
    path = unpack(KERNEL) / "usr" / "src" / "linux-source-6.1.tar.xz"
    with tarfile.open(path, "r|xz") as tar:
        for member in tar:
            name = member.name.partition("/")[2]
            if member.isfile() and wanted(name):
                try:
                    yield name, tar.extractfile(member).read().decode()
                except UnicodeDecodeError:
                    pass


def shuffled(documents):
    """[(name, text)] -> [(text, split)] in a fixed order, each text once."""
    documents = sorted(documents)
    random.Random(0).shuffle(documents)
    split_by_text = {}
    for name, text in documents:
        split_by_text.setdefault(text, split_of(name))
    return list(split_by_text.items())


def c_documents(every, suffixes):
    """One in `every` of the kernel's files, by a hash of the names; of what is held out, 1/4."""
    def wanted(name):
        number = int(sha256(f"half {name}".encode()).hexdigest(), 16)       # not split_of's
        return (name.endswith(suffixes) and not name.startswith(GENERATED) and number % every == 0
                and (split_of(name) == "train" or number // 2 % 4 == 0))
    return shuffled(kernel_files(wanted))


def prose_documents():
    """The paragraphs of every source that are sentences, each once, in parts of its file."""
    documents, seen = [], set()
    for name, text in prose_files():
        parts = [[]]
        for paragraph in re.split(r"\n\s*\n", text):
            paragraph = " ".join(paragraph.split())
            letters = sum(map(paragraph.count, " ,.'-")) + sum(map(str.isalpha, paragraph))
            if (paragraph.count(" ") >= WORDS - 1 and letters >= LETTERS * len(paragraph)
                    and paragraph not in seen):
                seen.add(paragraph)
                parts[-1].append(paragraph)
                if sum(map(len, parts[-1])) >= DOCUMENT_CHARS:
                    parts.append([])
        texts = ["\n\n".join(part) for part in parts if part]
        documents += [(f"{name} {text[:100]}", text) for text in texts]
    return shuffled(documents)


def prose_files():
    """Yield (name, text): paragraphs with blank lines between them, of all that may be prose."""
    for name, text in kernel_files(lambda name: name.endswith(".rst")):
        yield name, plain(text)
    for package in PROSE:
        folder = unpack(package)
        for path in sorted(folder.rglob("*")):
            if not path.is_file() or path.is_symlink():
                continue
            name = f"{package} {path.relative_to(folder).as_posix()}"
            if path.suffix in (".html", ".pod"):        # a .txt is the source of some .html
                text = path.read_bytes().decode(errors="ignore")
                yield name, without_tags(text) if path.suffix == ".html" else plain(text)
            elif path.suffix == ".dz" or "/share/misc/" in name and path.suffix == ".gz":
                yield name, plain(gzip.decompress(path.read_bytes()).decode(errors="ignore"))
            elif "/games/fortunes/" in name and not path.suffix:
                yield name, path.read_bytes().decode(errors="ignore").replace("\n%\n", "\n\n")


def without_tags(page):
    """The text of an HTML page, a blank line where a block begins or ends."""
    page = re.sub(r"(?is)<!--.*?-->|<(head|script|style|pre|nav)\b.*?</\1>", "\n\n", page)
    page = re.sub(r"(?i)</?(p|div|section|li|ul|ol|dl|dd|dt|table|tr|td|th|h\d|br|blockquote|body)"
                  r"\b[^>]*>", "\n\n", page)
    return html.unescape(re.sub(r"<[^>]*>", "", page))


def plain(text):
    """Text without the marks of reStructuredText, POD and Webster's dictionary."""
    text = re.sub(r"\[[^\]]*(Webster|PJC|WordNet)[^\]]*\]", "\n\n", text)
    text = re.sub(r":[a-z:+-]+:(?=`)|`|\*\*", "", text)
    return re.sub(r"\b[BCEFILXSZ]<+([^<>]*)>+", r"\1", text)


def rfc_documents():
    """The RFCs without the foot of one page and the head of the next, in parts."""
    files = {path.name: path for package in RFCS for path in unpack(package).rglob("*.txt.gz")}
    numbers = sorted(int(name[3:-7]) for name in files if re.fullmatch(r"rfc\d+\.txt\.gz", name))
    documents = []
    for number in numbers:
        text = gzip.decompress(files[f"rfc{number}.txt.gz"].read_bytes())
        text = text.decode(errors="ignore").replace("\r\n", "\n")
        text = re.sub(r"\n+[^\n]*\[Page \d+\][ ]*\n+\f?\n?[^\n]*\n+", "\n", text)
        text = re.sub(r"\n{3,}", "\n\n", text.replace("\f", "\n"))
        text = "\n".join(line.rstrip() for line in text.split("\n")).strip() + "\n"
        if len(text) > 500:
            documents += [(text[i:i + DOCUMENT_CHARS], split_of(f"rfc{number}"))
                          for i in range(0, len(text), DOCUMENT_CHARS)]
    return documents


if __name__ == "__main__":
    if len(sys.argv) == 1:
        print(__doc__)
    for argument in sys.argv[1:]:
        make(Path(argument))
