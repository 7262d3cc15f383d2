"""The study's other corpora: C source and English prose, and any vocabulary of the built-in one.

    python study/corpora.py data/python-4096 data/c-1024 data/prose-4096

A folder is a kind, python, c or prose, and a size of vocabulary; study/run.py makes those that
its runs name. Folders of one kind hold the same documents in the same splits.

c: half of the .c, .h and .rst files of a Linux kernel. prose: the sentences of that kernel's
Documentation and of Debian's dictionaries and manuals, without markup, code and tables. They
come from the Debian packages below, each in this one version, which `apt-get download` fetches
into data/cache (run `apt-get update` first, on Debian 12). When the archive has gone on to
another version, put the .deb of this one, of Debian's snapshots, into data/cache: another
version makes other data, whose hash no table mixes with these.
"""
import argparse
import gzip
import html
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
from tools.corpus import (DOCUMENT_CHARS, PATTERN, build_python_corpus, byte_pair_encoding,
                          split_of, train_bpe, write_corpus)

CACHE = ROOT / "data" / "cache"
KERNEL = "linux-source-6.1=6.1.176-1"
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


def make(folder):
    """Make a folder of shards unless it is there. SystemExit(2) if it has no name of ours."""
    folder = Path(folder)
    kind, _, size = folder.name.rpartition("-")
    if kind not in ("python", "c", "prose") or not size.isdigit():
        fail(f"{folder}: give python, c or prose and a size of vocabulary, such as data/c-1024")
    if folder.exists():
        return
    if kind == "python":
        build_python_corpus(folder, int(size))
        return
    documents = c_documents() if kind == "c" else prose_documents()
    print(f"building {folder} from {sum(len(text) for text, _ in documents):,} characters")
    ranks = train_bpe((text for text, split in documents if split == "train"), int(size) - 1)
    write_corpus(folder, kind, iter(documents), byte_pair_encoding(kind, PATTERN, ranks))


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
            fail(f"{package} cannot be downloaded: run apt-get update; if the archive has it no "
                 f"more, put its .deb, of Debian's snapshots, into {CACHE}")
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


# C source

def c_documents():
    """Half of the kernel's source, by a hash of the names; of what is held out, a quarter."""
    def wanted(name):
        return (name.endswith((".c", ".h", ".rst")) and not name.startswith(GENERATED)
                and hash_of(name) % 2 == 0
                and (split_of(name) == "train" or hash_of(name) // 2 % 4 == 0))
    return shuffled(kernel_files(wanted))


def hash_of(name):
    return int(sha256(f"half {name}".encode()).hexdigest(), 16)     # not split_of's


# Prose

def prose_documents():
    """The paragraphs of every source that are sentences, each once, in parts of its file."""
    documents, seen = [], set()
    for name, text in prose_files():
        kept = []
        for paragraph in re.split(r"\n\s*\n", text):
            paragraph = " ".join(paragraph.split())
            if is_prose(paragraph) and paragraph not in seen:
                seen.add(paragraph)
                kept.append(paragraph)
        for part in parts(kept):
            documents.append((f"{name} {part[:100]}", part))
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


def is_prose(paragraph):
    letters = sum(map(paragraph.count, " ,.'-")) + sum(map(str.isalpha, paragraph))
    return paragraph.count(" ") >= WORDS - 1 and letters >= LETTERS * len(paragraph)


def parts(paragraphs):
    """Yield the paragraphs as texts of DOCUMENT_CHARS characters or a little more."""
    part, size = [], 0
    for paragraph in paragraphs:
        part.append(paragraph)
        size += len(paragraph)
        if size >= DOCUMENT_CHARS:
            yield "\n\n".join(part)
            part, size = [], 0
    if part:
        yield "\n\n".join(part)


def main():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail
    parser.add_argument("folders", nargs="+")
    for folder in parser.parse_args().folders:
        make(folder)


if __name__ == "__main__":
    main()
