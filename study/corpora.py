"""Build the corpora of the study from packages of Debian 12: C source code, English, and both.

    python study/corpora.py data/c-4096 data/english-16384 data/mixed-16384

The name of a folder is a kind and a vocabulary size. All corpora of a kind have the same documents
and splits. c: half of the .c, .h and .rst files of a Linux kernel, except generated files. prose:
sentences, without markup and tables, from the kernel's documentation, manuals and dictionaries.
english: prose and the RFCs. mixed: all .c and .h files (not only half of them), and english.

`apt-get download` fetches each package into data/cache, in the version that is named below. The
RFCs are in Debian's component non-free. To add it, run as root:

    echo deb http://deb.debian.org/debian bookworm non-free > /etc/apt/sources.list.d/non-free.list
    apt-get update

If Debian has a newer version, put the .deb of the version below, from snapshot.debian.org, into
data/cache, because another version makes other data, with another hash.
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
GENERATED = "drivers/gpu/drm/amd/include/"      # register tables, a quarter of the kernel
WORDS, LETTERS = 8, 0.9         # a paragraph of prose has at least 8 words and 90% letters
KINDS = {                       # {kind: a function that makes the documents, [(text, split), ...]}
    "c": lambda: c_documents(2, (".c", ".h", ".rst")),
    "prose": lambda: prose_documents(),
    "english": lambda: prose_documents() + rfc_documents(),
    "mixed": lambda: c_documents(1, (".c", ".h")) + prose_documents() + rfc_documents()}


def make(folder):
    """Build a folder of shards, unless it exists. SystemExit(2) if the name is not KIND-SIZE."""
    kind, _, size = folder.name.rpartition("-")
    if kind not in KINDS or not size.isdigit() or int(size) < 257:
        fail(f"{folder} is not KIND-SIZE, such as data/c-4096. KIND is {', '.join(KINDS)}.")
    if not folder.exists():
        documents = KINDS[kind]()
        corpus.BPE_SAMPLE = 8_000_000
        if kind in ("english", "mixed"):        # these have several sources
            random.Random(1).shuffle(documents)
            corpus.BPE_SAMPLE = 40_000_000
        print(f"Building {folder} from {sum(len(text) for text, _ in documents):,} characters.")
        train = (text for text, split in documents if split == "train")
        ranks = corpus.train_bpe(train, int(size) - 1)
        encoding = corpus.make_encoding(kind, corpus.PATTERN, ranks.items())
        corpus.write_corpus(folder, kind, iter(documents), encoding)
    print(f"{folder}: data_hash {json.loads((folder / 'meta.json').read_text())['hash'][:12]}")


def unpack(package):
    """The folder with the files of a Debian package, which is given as NAME=VERSION."""
    name, version = package.split("=")
    folder = CACHE / f"{name}_{version.replace(':', '%3a')}"
    if not folder.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        if not list(CACHE.glob(f"{folder.name}_*.deb")):
            subprocess.run(["apt-get", "download", package], cwd=CACHE)
        debs = list(CACHE.glob(f"{folder.name}_*.deb"))
        if not debs:
            fail(f"{package} cannot be downloaded. Run python study/corpora.py for instructions.")
        with corpus.new_folder(folder) as new:
            subprocess.run(["dpkg-deb", "-x", debs[0], new], check=True)
    return folder


def kernel_files(wanted):
    """Yield (name, text) of the files of the kernel that are wanted and are UTF-8."""
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
    """[(name, text)] -> [(text, split)] in a shuffled but fixed order, with each text once."""
    documents = sorted(documents)
    random.Random(0).shuffle(documents)
    split_by_text = {}
    for name, text in documents:
        split_by_text.setdefault(text, split_of(name))
    return list(split_by_text.items())


def c_documents(every, suffixes):
    """One of `every` files of the kernel, by a hash of its name. Of the held-out ones only 1/4."""
    def wanted(name):
        number = int(sha256(f"half {name}".encode()).hexdigest(), 16)       # unlike in split_of
        return (name.endswith(suffixes) and not name.startswith(GENERATED) and number % every == 0
                and (split_of(name) == "train" or number // 2 % 4 == 0))
    return shuffled(kernel_files(wanted))


def prose_documents():
    """The paragraphs that are sentences, each once. A document has paragraphs of one file only."""
    documents, seen = [], set()
    for name, text in prose_files():
        groups = [[]]
        for paragraph in re.split(r"\n\s*\n", text):
            paragraph = " ".join(paragraph.split())
            letters = sum(map(paragraph.count, " ,.'-")) + sum(map(str.isalpha, paragraph))
            if (paragraph.count(" ") >= WORDS - 1 and letters >= LETTERS * len(paragraph)
                    and paragraph not in seen):
                seen.add(paragraph)
                groups[-1].append(paragraph)
                if sum(map(len, groups[-1])) >= DOCUMENT_CHARS:
                    groups.append([])
        texts = ["\n\n".join(group) for group in groups if group]
        documents += [(f"{name} {text[:100]}", text) for text in texts]
    return shuffled(documents)


def prose_files():
    """Yield (name, text) of all files that may be prose, with blank lines between paragraphs."""
    for name, text in kernel_files(lambda name: name.endswith(".rst")):
        yield name, plain(text)
    for package in PROSE:
        folder = unpack(package)
        for path in sorted(folder.rglob("*")):
            if not path.is_file() or path.is_symlink():
                continue
            name = f"{package} {path.relative_to(folder).as_posix()}"
            if path.suffix in (".html", ".pod"):
                text = path.read_bytes().decode(errors="ignore")
                yield name, without_tags(text) if path.suffix == ".html" else plain(text)
            elif path.suffix == ".dz" or "/share/misc/" in name and path.suffix == ".gz":
                yield name, plain(gzip.decompress(path.read_bytes()).decode(errors="ignore"))
            elif "/games/fortunes/" in name and not path.suffix:
                yield name, path.read_bytes().decode(errors="ignore").replace("\n%\n", "\n\n")


def without_tags(page):
    """The text of an HTML page, with blank lines between its blocks."""
    page = re.sub(r"(?is)<!--.*?-->|<(head|script|style|pre|nav)\b.*?</\1>", "\n\n", page)
    page = re.sub(r"(?i)</?(p|div|section|li|ul|ol|dl|dd|dt|table|tr|td|th|h\d|br|blockquote|body)"
                  r"\b[^>]*>", "\n\n", page)
    return html.unescape(re.sub(r"<[^>]*>", "", page))


def plain(text):
    """The text without the markup of reStructuredText, POD and Webster's dictionary."""
    text = re.sub(r"\[[^\]]*(Webster|PJC|WordNet)[^\]]*\]", "\n\n", text)
    text = re.sub(r":[a-z:+-]+:(?=`)|`|\*\*", "", text)
    return re.sub(r"\b[BCEFILXSZ]<+([^<>]*)>+", r"\1", text)


def rfc_documents():
    """The RFCs without page footers and headers, split into documents."""
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
