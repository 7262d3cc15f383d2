"""The tools: corpora into shards; samples, exports and pictures of a small run; the rest."""
import json
import sysconfig

import numpy as np
import pytest
import regex
import tiktoken
from conftest import export_and_load

import data
import train_tst
from tools import corpus as corpora
from tools import export, fineweb, plot, sample


def prose(seed, characters):
    """Lines of words, other ones for another seed."""
    words = [a + b + c for a in "bdfgklm" for b in "aeiou" for c in "nrst"]
    chosen = np.random.default_rng(seed).choice(words, characters // 4)
    return "".join(word + (" " if k % 9 else "\n") for k, word in enumerate(chosen))


def json_lines(texts):
    return "".join(json.dumps({"text": text}) + "\n" for text in texts)


def shards_of(out, *paths, vocab_size=400):
    """({split: documents}, the encoding) of what tools/corpus.py makes of files."""
    corpora.main([*map(str, paths), "--out", str(out), "--tokenizer", "train",
                  "--vocab-size", str(vocab_size)])
    found, encoding = {}, corpora.load_encoding(out)
    for split in ("train", "val", "test"):
        tokens = [data.read_shard(path) for path in sorted(out.glob(f"text_{split}_*.bin"))]
        found[split] = encoding.decode(np.concatenate(tokens)).split("<|endoftext|>")[1:]
    return found, encoding


def refused(capsys, main, *argv):
    """The one line with which a tool refuses, and what it has said before."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        main(list(map(str, argv)))
    said = capsys.readouterr()
    assert end.value.code == 2 and said.err.count("\n") == 1
    return said.err + said.out


def test_the_built_in_corpus_keeps_its_hash(tmp_path, monkeypatch):
    for k in range(120):                # 70 different ones
        text = f"def part_{k % 70}(x):\n    return x * {k % 70} + 1\n" * (1 + k % 70 % 7)
        (tmp_path / f"{k}.py").write_text(text)
    (tmp_path / "7.py").write_bytes(b"# \xe9t\xe9\n")           # not UTF-8
    monkeypatch.setattr(sysconfig, "get_path", lambda name: tmp_path)
    for name, value in dict(PYTHON_PACKAGES=(), BPE_SAMPLE=3000, SHARD_TOKENS=1000).items():
        monkeypatch.setattr(corpora, name, value)
    out = tmp_path / "python"
    out.mkdir()                         # an empty folder is not the corpus yet
    corpora.build_python_corpus(out, 300)
    assert json.loads((out / "meta.json").read_text()) == {
        "tokenizer": "python", "vocab_size": 300,
        "hash": "1f469c5b8b73cf5b6049920643a192f18693e06320c96e3ece683a4cddf7fa32"}


def test_own_text_becomes_shards_that_say_the_same(tmp_path, capsys):
    (tmp_path / "text" / ".hidden").mkdir(parents=True)
    texts = [prose(k, 600) + "Zürich\r\n" for k in range(40)]
    for k, text in enumerate(texts[1:]):                        # half with a byte-order mark
        (tmp_path / "text" / f"{k}.md").write_bytes(text.encode("utf-8-sig" if k % 2 else "utf-8"))
    (tmp_path / "text" / "a.jsonl").write_text(json_lines(texts[:1]), "utf-8-sig")
    (tmp_path / "text" / ".hidden" / "b.txt").write_text(prose(50, 600))
    found, _ = shards_of(tmp_path / "out", tmp_path / "text")
    assert "".join(sorted("".join(sum(found.values(), [])))) == "".join(sorted("".join(texts)))
    assert all(any(part in text for text in texts) for part in sum(found.values(), []))
    train, val, meta, _ = data.load(tmp_path / "out")     # as the trainer reads them
    encoding = corpora.load_encoding(tmp_path / "out")
    assert meta["vocab_size"] == encoding.n_vocab == 400 and len(train) > 20 * len(val) > 0
    assert "holds other data" in refused(capsys, corpora.main, tmp_path, "--out", tmp_path / "out")


@pytest.mark.parametrize("name, rows", [
    ("a.ndjson", 1), ("a.JSONL", 1), ("a.jsonlines", 1), ("a.txt", 1), ("a.json", 80), ("a", 80)])
def test_json_lines_are_known_by_any_name(tmp_path, name, rows):
    texts = [prose(k, 9000 // rows) for k in range(rows)]
    (tmp_path / name).write_text(json_lines(texts))
    (tmp_path / "package.json").write_text('{"name": "a"}')     # is none: it stays text
    found, _ = shards_of(tmp_path / "out", tmp_path / name, tmp_path / "package.json")
    others = [part for part in sum(found.values(), []) if not any(part in text for text in texts)]
    assert others == ['{"name": "a"}']


@pytest.mark.parametrize("name, content, parts", [
    ("a.txt", b'{"body": "a"}\n{"body": "b"}\n', ("a.txt:1", "'text'")),
    ("a.csv", b'{"text": "a"}\nb\n', ("a.csv:2", "'text'")),
    ("a.jsonl", b'{"text": 3}\n', ("a.jsonl:1", "'text'")),
    ("a.NDJSON", b"[1]\n", ("a.NDJSON:1", "'text'")),
    ("a.jsonl.gz", b"\xff", ("1 files", "a.jsonl.gz", "gunzip", "too little")),
    ("a.parquet", b"PAR1\0", ("1 files", "a.parquet", "pandas", "too little"))])
def test_what_cannot_be_read_is_named(tmp_path, capsys, name, content, parts):
    (tmp_path / name).write_bytes(content)
    said = refused(capsys, corpora.main, tmp_path, "--out", tmp_path / "out", "--tokenizer=train")
    assert all(part in said for part in parts) and not (tmp_path / "out").exists()


def test_held_out_text_is_neither_trained_on_nor_in_the_vocabulary(tmp_path, monkeypatch):
    texts = [prose(k, 300) for k in range(100)]
    for name in "ab":                   # each text is there twice
        (tmp_path / f"{name}.jsonl").write_text(json_lines(texts))
    seen, train_bpe = [], corpora.train_bpe
    monkeypatch.setattr(corpora, "train_bpe", lambda texts, *rest: train_bpe(
        seen.extend(texts) or seen, *rest))
    found, _ = shards_of(tmp_path / "out", tmp_path / "a.jsonl", tmp_path / "b.jsonl")
    assert sorted(sum(found.values(), [])) == sorted(texts)
    assert sorted(seen) == sorted(found["train"]) and len(found["val"]) == len(found["test"]) == 3


def test_the_vocabulary_is_of_all_the_text(tmp_path, monkeypatch):
    monkeypatch.setattr(corpora, "BPE_SAMPLE", 20_000)
    russian = str.maketrans("abdefgiklmnorstu", "абдефгиклмнорсту")
    texts = [prose(k, 500) for k in range(200)]
    texts[100:] = [text.translate(russian) for text in texts[100:]]
    (tmp_path / "a.jsonl").write_text(json_lines(texts))
    _, encoding = shards_of(tmp_path / "out", tmp_path / "a.jsonl")
    latin, cyrillic = (len(encoding.encode_ordinary(texts[k])) for k in (0, 150))
    assert 0.8 < latin / cyrillic < 1.25
    assert 19_000 < sum(map(len, corpora.spread(texts))) <= 20_000


@pytest.mark.parametrize("lengths", [[150_000], [20_000, 30_000, 900], [3000], 40 * [500] + [9000]])
def test_of_a_small_text_little_is_held_out(tmp_path, lengths):
    for k, length in enumerate(lengths):
        (tmp_path / f"{k}.txt").write_text(prose(k, length))
    found, _ = shards_of(tmp_path / "out", *tmp_path.glob("*.txt"))
    for split in "val", "test":
        assert 0 < len("".join(found[split])) <= sum(lengths) / 33


def test_marks_stay_with_their_letters(tmp_path):
    words = "हिन्दी भाषा में ทุกคน กำลัง".split()
    found = regex.findall(corpora.OWN_PATTERN, " ".join(words))
    assert [word.strip() for word in found] == words
    (tmp_path / "a.txt").write_text("".join(f"{word} {k}\n" for k in range(900) for word in words))
    _, encoding = shards_of(tmp_path / "out", tmp_path / "a.txt", vocab_size=330)
    assert len(encoding.encode_ordinary(words[0])) <= 2


def test_no_document_is_too_long_for_tiktoken(tmp_path):
    long = "q" + 1_000_000 * " " + "z"
    rows = [long, *(prose(k, 90_000) for k in range(60))]
    (tmp_path / "a.jsonl").write_text(json_lines(rows))
    (tmp_path / "b.txt").write_text(long)
    found, _ = shards_of(tmp_path / "out", tmp_path / "a.jsonl", tmp_path / "b.txt")
    documents = sum(found.values(), [])
    assert 49_152 < max(map(len, documents)) <= 65_536
    assert sum(not part.endswith("\n") for part in documents) <= len(rows) + 3     # the last parts


@pytest.fixture
def run(flags, tmp_path):
    train_tst.main([*flags, "--out", str(tmp_path / "run")])
    return tmp_path / "run"


def test_no_id_without_a_token_is_sampled(run, capsys):
    path = run / "encoding.json"        # it loses a third of its pairs
    stored = json.loads(path.read_text())
    stored["mergeable_ranks"] = {token: rank for token, rank in stored["mergeable_ranks"].items()
                                 if rank < 256 or rank % 3}
    path.write_text(json.dumps(stored))
    sample.main([str(run), "--tokens", "300", "--temperature", "9", "--top-k", "999", "--n", "5"])
    assert len(capsys.readouterr().out) > 300


def test_the_export_means_the_same_in_versions_4_and_5_of_transformers(flags, tmp_path, capsys):
    transformers = pytest.importorskip("transformers")
    run, folder = tmp_path / "run", tmp_path / "hf"
    train_tst.main([*flags, "--rope-theta", "500000", "--out", str(run)])
    theirs, config, shapes = export_and_load(run, folder)
    assert config["rope_theta"] == 500_000 and "rope_parameters" not in config
    assert (config["transformers_version"], config["max_position_embeddings"]) == ("4.57.0", 16)
    assert shapes == {name: list(p.shape) for name, p in theirs.state_dict().items()}

    encoding, text = data.load_encoding(run), "ab ac<|endoftext|>\r\n  12345 é\t"
    stored = json.loads((folder / "tokenizer_config.json").read_text())
    assert stored["tokenizer_class"] == "PreTrainedTokenizerFast"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert tokenizer.encode(text) == encoding.encode(text, allowed_special="all")
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert list(tokenizer(text)) == ["input_ids", "attention_mask"]     # generate takes no others
    assert tokenizer.model_max_length == 16
    ids = {encoding.eot_token}
    for part in tokenizer, theirs.config, theirs.generation_config:
        assert {part.bos_token_id, part.eos_token_id} == ids
    assert "holds something" in refused(capsys, export.main, run, folder)


def test_an_export_without_an_equal_tokenizer_says_so(run, tmp_path, capsys):
    transformers, path = pytest.importorskip("transformers"), run / "encoding.json"
    stored = json.loads(path.read_text())
    path.write_text(json.dumps({**stored, "special_tokens": {}}))
    theirs, *_ = export_and_load(run, tmp_path / "no end of text")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "no end of text")
    assert (len(tokenizer), tokenizer.eos_token, theirs.config.eos_token_id) == (299, None, None)
    # tokenizers does not know (?s), and the -- that excludes c in tiktoken excludes nothing there
    for name, pattern in ("unknown", "(?s)."), ("different", "[a-z--[c]]+|c|[^a-z]+"), ("none", ""):
        if pattern:
            path.write_text(json.dumps({**stored, "pat_str": pattern}))
        else:
            path.unlink()
        capsys.readouterr()
        theirs, *_ = export_and_load(run, tmp_path / name)
        reason = "give the same ids" if pattern else "has no encoding.json"
        assert reason in capsys.readouterr().err
        assert not [*(tmp_path / name).glob("tokenizer*")]
        ids = {theirs.config.eos_token_id, theirs.generation_config.eos_token_id}
        assert ids == {299 if pattern else None}


def test_a_picture_of_two_runs(run, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    for x in ("steps", "tokens"):
        plot.main([str(run), str(run), "--x", x, "--out", str(tmp_path / f"{x}.png")])
        assert (tmp_path / f"{x}.png").stat().st_size > 5000
    assert "metrics.jsonl" in refused(capsys, plot.main, tmp_path)


def test_fineweb_downloads_what_is_missing_and_the_encoding_once(
        run, corpus, tmp_path, monkeypatch, capsys):
    hub, out, asked = pytest.importorskip("huggingface_hub"), tmp_path / "fineweb", []

    def download(repo_id, filename, *, repo_type, local_dir):
        asked.append(filename)
        corpora.write_shard(local_dir / filename, np.arange(9, dtype=np.uint16))

    def encoding(name):
        asked.append(name)
        return corpora.make_encoding(name, "(?s).", [(bytes([i]), i) for i in range(256)])

    monkeypatch.setattr(hub, "hf_hub_download", download)
    monkeypatch.setattr(tiktoken, "get_encoding", encoding)
    for shards in "1", "2", "0":
        fineweb.main(["--shards", shards, "--out", str(out)])
    assert asked == ["fineweb_val_000000.bin", "fineweb_train_000001.bin", "gpt2",
                     "fineweb_train_000002.bin"]
    assert corpora.load_encoding(out).name == "gpt2"
    said = refused(capsys, fineweb.main, "--shards", "1", "--edu", "--out", out)
    assert "finewebedu10B" in said and "name another" in said

    (out / "encoding.json").unlink()                            # as llm.c's folders are
    (out / "meta.json").unlink()
    fineweb.main(["--shards", "0", "--out", str(out)])
    assert corpora.load_encoding(out).name == "gpt2"
    for folder in corpus, tmp_path / "missing":                 # of another tokenizer; no folder
        assert "GPT-2" in refused(capsys, fineweb.main, "--shards", "0", "--out", folder)
    (run / "encoding.json").unlink()
    said = refused(capsys, sample.main, run)
    assert f"python tools/fineweb.py --shards 0 --out {run}" in said
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: {}["no network\nat all"])
    (out / "encoding.json").unlink()
    assert "same command" in refused(capsys, fineweb.main, "--shards", "0", "--out", out)
