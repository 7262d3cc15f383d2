"""The tools: shards from text, samples, exports, pictures, and what a model has learned."""
import json
import math
import os
import signal
import subprocess
import sys
import sysconfig
import time

import numpy as np
import pytest
import regex
import tiktoken
import torch
from conftest import ROOT, VOCAB, export_and_load

import data
import train_tst
from model import multi_hot_cross_entropy
from tools import corpus as corpora
from tools import export, fineweb, peek, plot, sample


def prose(seed, characters):
    """Lines of random words. Each seed has other words."""
    words = [a + b + c for a in "bdfgklm" for b in "aeiou" for c in "nrst"]
    chosen = np.random.default_rng(seed).choice(words, characters // 4)
    return "".join(word + (" " if k % 9 else "\n") for k, word in enumerate(chosen))


def json_lines(texts):
    return "".join(json.dumps({"text": text}) + "\n" for text in texts)


def shards_of(out, *paths, vocab_size=400, more=()):
    """What tools/corpus.py makes of files: ({split: documents}, the encoding)."""
    corpora.main([*map(str, paths), "--out", str(out), "--tokenizer", "train",
                  "--vocab-size", str(vocab_size), *more])
    found, encoding = {}, corpora.load_encoding(out)
    for split in ("train", "val", "test"):
        tokens = [data.read_shard(path) for path in sorted(out.glob(f"text_{split}_*.bin"))]
        found[split] = encoding.decode(np.concatenate(tokens)).split("<|endoftext|>")[1:]
    return found, encoding


def message_of(capsys, main, *argv):
    """The error of a tool, which must be one line with status 2, and what it printed before."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        main(list(map(str, argv)))
    printed = capsys.readouterr()
    assert end.value.code == 2 and printed.err.count("\n") == 1
    return printed.err + printed.out


# Shards from text

def test_the_built_in_corpus_keeps_its_hash(tmp_path, monkeypatch):
    for k in range(120):                # 70 different texts
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


def test_a_build_that_was_killed_leaves_nothing_after_the_next_start(tmp_path):
    script = ("import sys, time; from pathlib import Path; from tools.corpus import new_folder\n"
              "with new_folder(Path(sys.argv[1])) as new:\n    print(flush=True); time.sleep(99)\n")
    processes = [subprocess.Popen([sys.executable, "-c", script, tmp_path / name], cwd=ROOT,
                                  stdout=subprocess.PIPE) for name in ("python", "python", "other")]
    for process in processes:
        process.stdout.readline()
    for process, number in zip(processes, (signal.SIGKILL, signal.SIGTERM)):
        process.send_signal(number)
        process.wait()
    with corpora.new_folder(tmp_path / "python") as new:        # the third one is still at work
        assert new.is_dir() and len(list(tmp_path.glob("python.unfinished-*"))) == 3
    processes[2].kill(), processes[2].wait()
    with corpora.new_folder(tmp_path / "mine") as new:
        (new / "file").touch()
    with corpora.new_folder(tmp_path / "python"):
        pass
    assert {path.name.partition("-")[0] for path in tmp_path.iterdir()} == {
        "python", "mine", "other.unfinished"}                   # and only a builder of `other`


def test_own_text_becomes_shards_with_the_same_text(tmp_path, capsys):
    (tmp_path / "text" / ".hidden").mkdir(parents=True)
    texts = [prose(k, 600) + "Zürich\r\n" for k in range(40)]
    for k, text in enumerate(texts[1:]):                        # half with a byte-order mark
        (tmp_path / "text" / f"{k}.md").write_bytes(text.encode("utf-8-sig" if k % 2 else "utf-8"))
    (tmp_path / "text" / "a.jsonl").write_text(json_lines(texts[:1]), "utf-8-sig")
    (tmp_path / "text" / ".hidden" / "b.txt").write_text(prose(50, 600))
    found, _ = shards_of(tmp_path / "out", tmp_path / "text")
    assert "".join(sorted("".join(sum(found.values(), [])))) == "".join(sorted("".join(texts)))
    assert all(any(part in text for text in texts) for part in sum(found.values(), []))
    train, val, meta, sizes = data.load(tmp_path / "out")       # as the trainer reads them
    encoding = corpora.load_encoding(tmp_path / "out")
    assert meta["vocab_size"] == encoding.n_vocab == 400 and len(train) > 20 * len(val) > 0
    assert sizes[300] == len(encoding.decode_single_token_bytes(300))
    message = message_of(capsys, corpora.main, tmp_path, "--out", tmp_path / "out")
    assert "holds other data" in message


@pytest.mark.parametrize("name, rows", [
    ("a.ndjson", 1), ("a.JSONL", 1), ("a.jsonlines", 1), ("a.txt", 1), ("a.json", 80), ("a", 80)])
def test_json_lines_are_recognised_under_any_name(tmp_path, name, rows):
    texts = [prose(k, 9000 // rows) for k in range(rows)]
    (tmp_path / name).write_text(json_lines(texts))
    (tmp_path / "package.json").write_text('{"name": "a"}')     # not JSON lines: this is text
    found, _ = shards_of(tmp_path / "out", tmp_path / name, tmp_path / "package.json")
    others = [part for part in sum(found.values(), []) if not any(part in text for text in texts)]
    assert others == ['{"name": "a"}']


@pytest.mark.parametrize("name, content, words", [
    ("a.txt", b'{"body": "a"}\n{"body": "b"}\n', ("a.txt:1", "'text'")),
    ("a.csv", b'{"text": "a"}\nb\n', ("a.csv:2", "'text'")),
    ("a.jsonl", b'{"text": 3}\n', ("a.jsonl:1", "'text'")),
    ("a.NDJSON", b"[1]\n", ("a.NDJSON:1", "'text'")),
    ("a.jsonl.gz", b"\xff", ("1 files", "a.jsonl.gz", "gunzip", "no training text")),
    ("a.txt", "a".encode("utf-16"), ("1 files", "a.txt", "UTF-16", "iconv", "-Encoding utf8")),
    ("a.parquet", b"PAR1\0", ("1 files", "a.parquet", "pandas", "no training text"))])
def test_a_file_that_cannot_be_read_is_named(tmp_path, capsys, name, content, words):
    (tmp_path / name).write_bytes(content)
    text = message_of(capsys, corpora.main, tmp_path, "--out", tmp_path / "out", "--tokenizer=train")
    assert all(word in text for word in words) and not (tmp_path / "out").exists()


def test_all_that_is_skipped_is_listed_with_the_reason(tmp_path, capsys, monkeypatch):
    text = tmp_path / "text"
    (text / "locked").mkdir(parents=True)
    (text / "a.c").write_text(prose(0, 9000))
    (text / "secret.c").write_text(prose(1, 900))
    (text / "notes.txt").write_text(prose(2, 900))
    (text / ".git").write_text(prose(3, 900))
    (text / "empty.c").touch()
    (text / "broken.c").symlink_to("nowhere")
    (text / "linked").symlink_to(tmp_path)
    os.mkfifo(text / "pipe.c")
    access = os.access                  # root may read everything
    monkeypatch.setattr(os, "access", lambda path, mode: (
        path.name not in ("locked", "secret.c") and access(path, mode)))
    found, _ = shards_of(tmp_path / "out", text, more=["--only", "*.c", "*.h"])
    assert "".join(sorted("".join(sum(found.values(), [])))) == "".join(sorted(prose(0, 9000)))
    lines = capsys.readouterr().out.splitlines()
    for name, reason in (("locked", "cannot be read"), ("secret.c", "cannot be read"),
                         ("broken.c", "cannot be read"), ("notes.txt", "--only"),
                         (".git", "begins with a dot"), ("empty.c", "empty"), ("pipe.c", "empty"),
                         ("linked", "is a link")):
        assert any(str(text / name) in line and reason in line for line in lines), name
    assert "does not exist" in message_of(capsys, corpora.main, text / "b", "--out", tmp_path / "b")


@pytest.mark.parametrize("change, message", [
    (lambda lines: lines, None), (lambda lines: [*lines, b"", b""], None),      # blank last lines
    (lambda lines: [*lines[:-1], lines[-1][:-2]], "occurs twice"),              # cut in a rank
    (lambda lines: [*lines[:-1], lines[-1].split()[0]], "BPE file"),            # cut before it
    (lambda lines: lines[:200], "a byte has no rank"), (lambda lines: [*lines, lines[0]], "twice"),
    (lambda lines: [*lines, b"YWI= 5"], "occurs twice"), (lambda lines: [b"!!! 5"], "BPE file")])
def test_a_damaged_tokenizer_file_gives_one_line(tmp_path, capsys, change, message):
    ranks = corpora.train_bpe([prose(0, 3000)], 300)
    lines = [b"%s %d" % (corpora.base64.b64encode(token), rank) for token, rank in ranks.items()]
    (tmp_path / "a.tiktoken").write_bytes(b"\n".join(change(lines)) + b"\n")
    (tmp_path / "a.txt").write_text(prose(0, 9000))
    words = [tmp_path / "a.txt", "--out", tmp_path / "out", "--tokenizer", tmp_path / "a.tiktoken",
             "--pattern", "gpt2"]
    if message:
        assert message in message_of(capsys, corpora.main, *words)
    else:
        corpora.main(list(map(str, words)))
        assert corpora.load_encoding(tmp_path / "out")._mergeable_ranks == ranks


def test_held_out_text_is_neither_trained_on_nor_in_the_vocabulary(tmp_path, monkeypatch):
    texts = [prose(k, 300) for k in range(100)]
    for name in "ab":                   # each text occurs twice
        (tmp_path / f"{name}.jsonl").write_text(json_lines(texts))
    seen, train_bpe = [], corpora.train_bpe
    monkeypatch.setattr(corpora, "train_bpe", lambda texts, *rest: train_bpe(
        seen.extend(texts) or seen, *rest))
    found, _ = shards_of(tmp_path / "out", tmp_path / "a.jsonl", tmp_path / "b.jsonl")
    assert sorted(sum(found.values(), [])) == sorted(texts)
    assert sorted(seen) == sorted(found["train"]) and len(found["val"]) == len(found["test"]) == 3


def test_the_vocabulary_is_trained_on_all_of_the_text(tmp_path, monkeypatch):
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
def test_little_of_a_small_text_is_held_out(tmp_path, lengths):
    for k, length in enumerate(lengths):
        (tmp_path / f"{k}.txt").write_text(prose(k, length))
    found, _ = shards_of(tmp_path / "out", *tmp_path.glob("*.txt"))
    for split in "val", "test":
        assert 0 < len("".join(found[split])) <= sum(lengths) / 33


def test_combining_marks_stay_with_their_letters(tmp_path):
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


# What reads a run

@pytest.fixture
def run(flags, tmp_path):
    train_tst.main([*flags, "--out", str(tmp_path / "run")])
    return tmp_path / "run"


def test_no_id_without_a_token_is_sampled(run, capsys):
    path = run / "encoding.json"        # without a third of its pairs
    stored = json.loads(path.read_text())
    stored["mergeable_ranks"] = {token: rank for token, rank in stored["mergeable_ranks"].items()
                                 if rank < 256 or rank % 3}
    path.write_text(json.dumps(stored))
    for seed in range(5):
        sample.main([str(run), "--tokens", "300", "--temperature", "9", "--top-k", "999", "--seed",
                     str(seed)])
    assert len(capsys.readouterr().out) > 300


def test_the_export_means_the_same_in_versions_4_and_5_of_transformers(flags, tmp_path, capsys):
    transformers = pytest.importorskip("transformers")
    run, folder = tmp_path / "run", tmp_path / "hf"
    train_tst.main([*flags, "--rope-theta", "500000", "--out", str(run)])
    theirs, config, shapes = export_and_load(run, folder)
    assert config["rope_theta"] == 500_000 and "rope_parameters" not in config
    assert (config["transformers_version"], config["max_position_embeddings"]) == ("4.57.0", 16)
    assert shapes == {name: list(p.shape) for name, p in theirs.state_dict().items()}

    encoding, text = corpora.load_encoding(run), "ab ac<|endoftext|>\r\n  12345 é\t"
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
    assert "holds something" in message_of(capsys, export.main, run, folder)


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
        reason = "give the same ids" if pattern else "the run has none"
        assert reason in capsys.readouterr().err
        assert not [*(tmp_path / name).glob("tokenizer*")]
        ids = {theirs.config.eos_token_id, theirs.generation_config.eos_token_id}
        assert ids == {299 if pattern else None}


def test_peek_predicts_the_next_bags_and_shows_neighbours(run, corpus, capsys):
    peek.main([str(run)])
    at_switch, at_end = capsys.readouterr().out.split("ckpt.pt: ")
    assert "ckpt_switch.pt: predictions of the next bag of 3" in at_switch
    model, _ = sample.load_model(run)
    train, val, _, _ = data.load(corpus)
    rows = peek.spaced_rows(val, 20_000 // 16, 17 * 3)
    bags = rows.view(len(rows), 17, 3)
    inputs, targets = bags[:, :-1], bags[:, 1:]
    with torch.no_grad():
        logits = model(inputs)[..., :VOCAB]
    likeliest = logits.topk(12).indices.tolist()
    hits = np.mean([token in likeliest[row][j] for row in range(len(rows)) for j in range(16)
                    for token in targets[row, j].tolist()])
    counts = np.bincount(train.rows([0], 60_000)[0], minlength=VOCAB) + 1
    bag_entropy = np.mean([-sum(bag.count(token) / 3 * math.log(bag.count(token) / 3)
                                for token in set(bag)) for bag in targets.reshape(-1, 3).tolist()])
    for name, loss, hit in (("a uniform guess", math.log(VOCAB), 12 / VOCAB),
                            ("the model", multi_hot_cross_entropy(logits, targets), hits),
                            ("the floor, a bag's entropy", bag_entropy, 1)):
        assert f"{name:27} loss {loss:.2f}   hits {hit:4.0%}" in at_end
    frequencies = -np.log(counts / counts.sum())[targets].mean()
    assert f"the token frequencies       loss {frequencies:.2f}" in at_end
    assert at_end.count("next bag  ") == 2 and "is near" in at_end
    (run / "encoding.json").unlink()    # shards of llm.c have none
    peek.main([str(run / "ckpt.pt")])
    assert "is near" not in capsys.readouterr().out


def test_a_picture_of_two_runs(run, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    for x in ("steps", "tokens"):
        plot.main([str(run), str(run), "--x", x, "--out", str(tmp_path / f"{x}.png")])
        assert (tmp_path / f"{x}.png").stat().st_size > 5000
    assert "metrics.jsonl" in message_of(capsys, plot.main, tmp_path)


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
    message = message_of(capsys, fineweb.main, "--shards", "200", "--out", out)
    assert "fineweb100B" in message and "Choose another --out" in message

    (out / "encoding.json").unlink()                            # as in the folders of llm.c
    (out / "meta.json").unlink()
    fineweb.main(["--shards", "0", "--out", str(out)])
    assert corpora.load_encoding(out).name == "gpt2"
    for folder in corpus, tmp_path / "missing":                 # another tokenizer; no folder
        assert "GPT-2" in message_of(capsys, fineweb.main, "--shards", "0", "--out", folder)
    (run / "encoding.json").unlink()
    message = message_of(capsys, sample.main, run)
    assert f"python tools/fineweb.py --shards 0 --out {run}" in message
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: {}["no network\nat all"])
    (out / "encoding.json").unlink()
    assert "same command" in message_of(capsys, fineweb.main, "--shards", "0", "--out", out)
