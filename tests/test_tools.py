"""The tools, from a small run: corpus, sample, export, plot, plan, fineweb."""
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT

import data
import train_tst
from tools import corpus as corpora
from tools import export, fineweb, plan, plot, sample
from tools.sample import load_model


@pytest.fixture
def run(flags, tmp_path):
    train_tst.main([*flags, "--out", str(tmp_path / "run")])
    return tmp_path / "run"


def test_own_text_becomes_shards_that_say_the_same(tmp_path, capsys):
    folder = tmp_path / "text"
    folder.mkdir()
    for k in range(40):
        (folder / f"{k}.txt").write_text(f"line {k} of the text, Zürich\n" * 20)
    (folder / "picture.bin").write_bytes(b"\xff\xfe\x00")
    corpora.main([str(folder), "--out", str(tmp_path / "out"), "--tokenizer", "train",
                  "--vocab-size", "300"])
    assert "skipped 1 file" in capsys.readouterr().out
    train, val, meta, encoding = data.load(tmp_path / "out")
    assert meta["vocab_size"] == encoding.n_vocab == 300
    documents = encoding.decode(train.read(0, len(train)).tolist()).split("<|endoftext|>")[1:]
    texts = {path.read_text() for path in folder.glob("*.txt")}
    assert len(documents) == 36 and set(documents) <= texts     # and two each to val and test


@pytest.mark.parametrize("name, content, said", [
    ("a.txt", b"\xff\xfe", "not UTF-8"), ("a.jsonl", b'{"other": 1}\n', "field 'text'"),
])
def test_a_named_file_that_is_no_text_is_one_line(tmp_path, capsys, name, content, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SystemExit) as end:
        corpora.main([str(tmp_path / name), "--out", str(tmp_path / "out"), "--tokenizer", "train"])
    assert end.value.code == 2 and said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_byte_pairs_are_the_most_frequent_ones():
    ranks = corpora.train_bpe(["aab aab aab xy"], 258)
    assert ranks[b"aa"] == 256 or ranks[b"ab"] == 256
    assert len(ranks) == 258 and b"aab" in ranks


def test_greedy_samples_are_the_likeliest_tokens(run, capsys):
    model, encoding = load_model(run)
    ids, found = [encoding.eot_token, 97, 98], []
    for _ in range(5):
        with torch.no_grad():
            logits = model(torch.tensor(ids + found)[None, :, None])[0, -1, :300]
        found.append(logits.argmax().item())
    assert list(sample.generate(model, ids, 5, temperature=0)) == found
    sample.main([str(run), "--prompt", "ab", "--tokens", "3", "--device", "cpu"])
    assert capsys.readouterr().out.startswith("ab")


def test_the_export_is_the_same_model_and_tokenizer(run, tmp_path):
    transformers = pytest.importorskip("transformers")
    export.main([str(run), str(tmp_path / "hf")])
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    model, encoding = load_model(run)
    ids = torch.randint(0, 300, (2, 16))
    with torch.no_grad():
        ours = model(ids[..., None])[..., :300]
        torch.testing.assert_close(theirs(ids).logits, ours, rtol=1e-4, atol=1e-4)
    with pytest.raises(SystemExit):             # a folder that holds something
        export.main([str(run), str(tmp_path / "hf")])


def test_a_picture_of_two_runs(run, tmp_path):
    pytest.importorskip("matplotlib")
    for x in ("steps", "tokens"):
        plot.main([str(run), str(run), "--x", x, "--out", str(tmp_path / f"{x}.png")])
        assert (tmp_path / f"{x}.png").stat().st_size > 5000


def test_the_plan_counts_what_the_run_reads(capsys, monkeypatch):
    monkeypatch.setattr(train_tst, "WORLD", 1)
    plan.main(["--json", "--model", "tiny", "--device", "cpu", "--dtype", "float32"])
    found = json.loads(capsys.readouterr().out)
    assert found["parameters"] == 473_760
    assert found["superposition_tokens"] == 480 * 32 * 96 * 6
    assert found["recovery_tokens"] == 1920 * 32 * 96


def test_fineweb_downloads_what_is_missing_and_mixes_nothing(tmp_path, monkeypatch, capsys):
    hub = pytest.importorskip("huggingface_hub")
    asked = []

    def download(repo_id, filename, *, repo_type, local_dir):
        asked.append(filename)
        corpora.write_shard(local_dir / filename, np.arange(9, dtype=np.uint16))

    monkeypatch.setattr(hub, "hf_hub_download", download)
    out = tmp_path / "fineweb"
    fineweb.main(["--shards", "1", "--out", str(out)])
    fineweb.main(["--shards", "2", "--out", str(out)])
    val, first, second = (f"fineweb_{name}.bin" for name in (
        "val_000000", "train_000001", "train_000002"))
    assert asked == [val, first, second]
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        fineweb.main(["--shards", "1", "--edu", "--out", str(out)])
    assert end.value.code == 2 and "holds other data" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["corpus", "fineweb", "sample", "export", "plot", "plan"])
def test_every_tool_explains_itself(name):
    command = [sys.executable, str(ROOT / "tools" / f"{name}.py"), "--help"]
    assert subprocess.run(command, capture_output=True, cwd=ROOT).returncode == 0
