"""The tools: shards from text, samples, exports, pictures, and what a model has learned."""
import json
import os
import shutil
import sysconfig
from unittest.mock import Mock

import numpy as np
import pytest
import tiktoken
import torch
from conftest import VOCAB, export_and_load, message_of

import data
import train_tst
from tools import corpus as corpora
from tools import fineweb, peek, plot, sample


def prose(seed, characters):
    """Lines of random words. Each seed has other words."""
    words = [a + b + c for a in "bdfgklm" for b in "aeiou" for c in "nrst"]
    chosen = np.random.default_rng(seed).choice(words, characters // 4)
    return "".join(word + (" " if k % 9 else "\n") for k, word in enumerate(chosen))


def json_lines(texts):
    return "".join(json.dumps({"text": text}) + "\n" for text in texts)


def shards_of(out, *paths, more=()):
    """The documents that tools/corpus.py makes of files: {"train", "val", "test" or "all": list}"""
    corpora.main([*map(str, paths), "--out", str(out), "--tokenizer", "train",
                  "--vocab-size", "400", *more])
    found, encoding = {}, corpora.load_encoding(out)
    for split in ("train", "val", "test"):
        tokens = [data.read_shard(path) for path in sorted(out.glob(f"text_{split}_*.bin"))]
        found[split] = encoding.decode(np.concatenate(tokens)).split("<|endoftext|>")[1:]
    return {**found, "all": sum(found.values(), [])}


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
    folder, left, other = (tmp_path / name for name in (
        "python", "python.unfinished-1", "other.unfinished-1"))
    other.mkdir()                       # belongs to another folder, so that it must be kept
    with corpora.new_folder(folder) as new:
        assert new.parent.name.startswith("python.unfinished-")
        shutil.copytree(new.parent, left)       # a build that is killed here leaves this
        with corpora.new_folder(folder):        # removes nothing while the first build is at work
            assert left.exists() and new.exists()
    with corpora.new_folder(folder):
        assert not left.exists()
    assert set(tmp_path.iterdir()) == {folder, other}


def test_own_text_becomes_shards_with_the_same_text(tmp_path):
    texts = [prose(k, 600) + "Zürich\r\n" for k in range(40)]
    files = {f"{k}.md": texts[k] for k in range(20)}
    files |= {"a.NDJSON": json_lines(texts[20:30]), "a": json_lines(texts[30:])}
    (tmp_path / "text").mkdir()
    for k, (name, content) in enumerate(files.items()):         # half have a byte-order mark
        path, encoding = tmp_path / "text" / name, "utf-8-sig" if k % 2 else "utf-8"
        path.write_bytes(content.encode(encoding))
    documents = shards_of(tmp_path / "out", tmp_path / "text")["all"]
    assert sorted("".join(documents)) == sorted("".join(texts))         # the same characters
    assert all(any(document in text for text in texts) for document in documents)
    train, val, meta, sizes = data.load(tmp_path / "out")       # as the trainer reads them
    encoding = corpora.load_encoding(tmp_path / "out")
    assert meta["vocab_size"] == encoding.n_vocab == 400 and len(train) > 20 * len(val) > 0
    assert sizes[300] == len(encoding.decode_single_token_bytes(300))


@pytest.mark.parametrize("name, content, line", [
    ("a.txt", '{"text": "a"}\n{"body": "b"}\n', 2), ("a.jsonl", '{"text": 3}\n', 1),
    ("a.NDJSON", "[1]\n", 1)])         # the name alone shows that these are JSON lines
def test_a_line_without_text_is_named(tmp_path, capsys, name, content, line):
    (tmp_path / name).write_text(content)
    message = message_of(capsys, corpora.main, tmp_path, "--out", tmp_path / "out",
                         "--tokenizer=train")
    assert f"{name}:{line} is not a JSON object with text in the field 'text'" in message
    assert not (tmp_path / "out").exists()


def test_all_that_is_skipped_is_listed_with_the_reason(tmp_path, capsys, monkeypatch):
    text, reasons = tmp_path / "text", {}
    (text / "locked").mkdir(parents=True)
    (text / "broken.c").symlink_to("nowhere")
    (text / "linked").symlink_to(tmp_path)
    os.mkfifo(text / "pipe.c")
    (text / "a.c").write_text(prose(0, 9000))
    for name, content, reason in (
            ("locked", None, "cannot be read"), ("broken.c", None, "cannot be read"),
            ("linked", None, "is a link"), ("pipe.c", None, "is empty"),
            ("Makefile", b"a", "--only"), (".git", b"a", "begins with a dot"),
            ("a.jsonl.gz", b"\xff", "gunzip"), ("a.parquet", b"PAR1\0", "pandas.read_parquet"),
            ("utf16.c", "a".encode("utf-16"), "is UTF-16; convert it with `iconv")):
        reasons[str(text / name)] = reason
        if content is not None:
            (text / name).write_bytes(content)
    access = os.access                  # root may read everything
    monkeypatch.setattr(os, "access", lambda path, mode: (
        path.name != "locked" and access(path, mode)))
    documents = shards_of(tmp_path / "out", text, more=["--only", "*.*"])["all"]
    assert sorted("".join(documents)) == sorted(prose(0, 9000))
    lines = capsys.readouterr().out.splitlines()
    for path, reason in reasons.items():
        assert any(path in line and reason in line for line in lines), path


def test_a_damaged_tokenizer_file_gives_one_line_and_blank_last_lines_are_accepted(
        tmp_path, capsys):
    ranks = corpora.train_bpe([prose(0, 3000)], 300)
    lines = [b"%s %d" % (corpora.base64.b64encode(token), rank) for token, rank in ranks.items()]
    file = tmp_path / "a.tiktoken"
    (tmp_path / "a.txt").write_text(prose(0, 9000))
    words = [str(tmp_path / "a.txt"), "--out", str(tmp_path / "out"), "--tokenizer", str(file),
             "--pattern", "gpt2"]
    for damaged, message in (
            ([*lines[:-1], lines[-1][:-2]], "occurs twice"),            # cut within the last rank
            ([*lines[:-1], lines[-1].split()[0]], "BPE file"),          # cut before the last rank
            (lines[:200], "a byte has no rank")):
        file.write_bytes(b"\n".join(damaged))
        assert message in message_of(capsys, corpora.main, *words)
    file.write_bytes(b"\n".join([*lines, b"", b"", b""]))
    corpora.main(words)
    assert corpora.load_encoding(tmp_path / "out")._mergeable_ranks == ranks


def test_the_vocabulary_is_trained_on_a_sample_of_all_training_texts(tmp_path, monkeypatch):
    monkeypatch.setattr(corpora, "BPE_SAMPLE", 15_000)
    monkeypatch.setattr(corpora, "train_bpe", train_bpe := Mock(wraps=corpora.train_bpe))
    texts = [prose(k, 300) for k in range(100)]
    (tmp_path / "a.jsonl").write_text(json_lines(texts + texts))        # each text occurs twice
    found, seen = shards_of(tmp_path / "out", tmp_path / "a.jsonl"), train_bpe.call_args.args[0]
    assert sorted(found["all"]) == sorted(texts) and len(found["val"]) == len(found["test"]) == 3
    assert set(seen) < set(found["train"])                      # no held-out text is used
    assert 14_000 < sum(map(len, seen)) <= 15_000
    assert 15 < len(set(seen) & set(found["train"][:47])) < 32  # about half of the first half


@pytest.mark.parametrize("lengths", [[150_000], [20_000, 30_000, 900], [3000], 40 * [500] + [9000]])
def test_little_of_a_small_text_is_held_out(tmp_path, lengths):
    for k, length in enumerate(lengths):
        (tmp_path / f"{k}.txt").write_text(prose(k, length))
    found = shards_of(tmp_path / "out", *tmp_path.glob("*.txt"))
    for split in "val", "test":
        assert 0 < len("".join(found[split])) <= sum(lengths) / 33


# What reads a run

def test_no_id_without_a_token_is_sampled(run):
    model, _ = sample.load_model(run)       # of its ids only some belong to a token
    known = [2, 3, 5, 7, 11]
    assert set(sample.generate(model, [0], 300, known, temperature=9, top_k=999)) == set(known)


def test_the_export_means_the_same_in_versions_4_and_5_of_transformers(flags, tmp_path):
    transformers = pytest.importorskip("transformers")
    run, folder = tmp_path / "run", tmp_path / "hf"
    train_tst.main([*flags, "--rope-theta", "500000", "--out", str(run)])
    theirs, config, _ = export_and_load(run, folder)
    assert config["rope_theta"] == 500_000 and "rope_parameters" not in config
    assert (config["transformers_version"], config["max_position_embeddings"]) == ("4.57.0", 16)

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


@pytest.mark.parametrize("change, reason", [
    ({"pat_str": "[a-z--[c]]+|c|[^a-z]+"}, "give other ids"),    # the two libraries differ in --
    (None, "the run has none")])
def test_an_export_without_an_equal_tokenizer_says_so(run, tmp_path, capsys, change, reason):
    path, folder = run / "encoding.json", tmp_path / "hf"
    if change:
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
    else:
        path.unlink()
    theirs, *_ = export_and_load(run, folder)
    assert reason in capsys.readouterr().err and not [*folder.glob("tokenizer*")]
    ids = theirs.config.eos_token_id, theirs.generation_config.eos_token_id
    assert ids == ((299, 299) if change else (None, None))


def test_peek_compares_a_model_with_guesses_and_with_the_floor(capsys, monkeypatch):
    """With three tokens, (0, 2) is the bag after (0, 1), and (2, 2) is the bag after (0, 2)."""
    monkeypatch.setattr(peek, "TOP", 2)
    p_after = torch.tensor([[0.3, 0.3, 0.4], [0.1, 0.2, 0.7], [0.5, 0.4, 0.1]])
    model = lambda bags: p_after[bags[:, :, 1]].log()           # depends on a bag's second token
    peek.compare(model, torch.tensor([[0, 1, 0, 2, 2, 2]]), 2, f=torch.tensor([0.5, 0.3, 0.2]))
    assert capsys.readouterr().out.splitlines() == [
        "  a uniform guess             loss 1.10   hits  67%",      # log 3
        "  the token frequencies       loss 1.38   hits  25%",      # -(log 0.5 + 3 log 0.2) / 4
        "  the model                   loss 1.82   hits  25%",      # -(log 0.7 + 3 log 0.1) / 4
        "  the floor, a bag's entropy  loss 0.35   hits 100%"]      # (log 2 + log 1) / 2


def test_peek_shows_bags_of_the_validation_split_and_neighbours(run, corpus, capsys, monkeypatch):
    calls, compare = [], peek.compare
    monkeypatch.setattr(peek, "compare", lambda *call: [calls.append(call), compare(*call)])
    peek.main([str(run)])
    at_switch, at_end = capsys.readouterr().out.split("ckpt.pt: ")
    assert "ckpt_switch.pt: predictions of the next bag of 3" in at_switch
    assert at_end.count("next bag  ") == 2 and "is near" in at_end
    train, val, _, _ = data.load(corpus)
    for _, rows, s, f in calls:         # the rows are those of the validation split
        assert s == 3 and torch.equal(rows[1:2], val.rows([17 * 3], 17 * 3))
        counts = train.rows([0], 60_000)[0].bincount(minlength=VOCAB) + 1
        torch.testing.assert_close(f, counts / counts.sum())


def test_a_picture_of_two_runs(run, tmp_path):
    pytest.importorskip("matplotlib")
    plot.main([str(run), str(run), "--x", "tokens", "--out", str(tmp_path / "a.png")])
    assert (tmp_path / "a.png").stat().st_size > 5000


def test_fineweb_downloads_what_is_missing_and_the_tokenizer_once(
        corpus, tmp_path, monkeypatch, capsys):
    hub, out = pytest.importorskip("huggingface_hub"), tmp_path / "fineweb"
    out.mkdir()
    download = Mock(side_effect=lambda repo, name, repo_type, local_dir: (
        corpora.write_shard(local_dir / name, np.arange(9, dtype=np.uint16))))
    get_encoding = Mock(return_value=corpora.load_encoding(corpus))
    monkeypatch.setattr(hub, "hf_hub_download", download)
    monkeypatch.setattr(tiktoken, "get_encoding", get_encoding)
    for shards in "1", "2", "0":        # the guide adds the tokenizer to other shards with 0
        fineweb.main(["--shards", shards, "--out", str(out)])
    assert [call.args[1] for call in download.mock_calls] == [
        "fineweb_val_000000.bin", "fineweb_train_000001.bin", "fineweb_train_000002.bin"]
    get_encoding.assert_called_once_with("gpt2")
    (out / "meta.json").write_text(json.dumps(data.GPT2))       # GPT-2's tokens of other text
    for words in (["--shards", 3, "--out", out], ["--shards", 0, "--out", corpus]):
        assert "Choose another --out" in message_of(capsys, fineweb.main, *words)
