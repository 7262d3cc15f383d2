"""What several test files need. All tests run on the CPU; pretend.py simulates a GPU on it."""
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["CUDA_VISIBLE_DEVICES"] = ""         # hides a real GPU

import numpy as np
import pytest
import torch

VOCAB = 300


@pytest.fixture(autouse=True)
def same_everywhere():
    """Each test has one thread and random seed 0, and handles the signals that a run handles."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"):     # Windows lacks the last two
        if hasattr(signal, name):       # pytest inherits ignored signals from nohup or a shell
            signal.signal(getattr(signal, name), signal.default_int_handler)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A folder of shards: 60,000 training tokens in three files, and 3,000 validation tokens."""
    from tools.corpus import PATTERN, make_encoding, save_encoding, write_shard
    folder = tmp_path_factory.mktemp("corpus")
    tokens = np.random.default_rng(0).integers(0, VOCAB // 3, 63_000).astype(np.uint16)
    tokens[1::2] = tokens[::2] * 2 + 7          # every second token is determined by the last one
    for k in range(3):
        write_shard(folder / f"retrieval_train_{k}.bin", tokens[20_000 * k:20_000 * (k + 1)])
    write_shard(folder / "retrieval_val_0.bin", tokens[60_000:])
    ranks = {bytes([i]): i for i in range(256)}
    ranks.update({bytes([97 + i // 9, 97 + i % 9]): 256 + i for i in range(VOCAB - 257)})
    save_encoding(make_encoding("mine", PATTERN, ranks.items()), folder)
    (folder / "meta.json").write_text(json.dumps({"tokenizer": "mine", "vocab_size": VOCAB}))
    return folder


@pytest.fixture(scope="session")
def flags(corpus):
    """The flags of a run of 12 steps, which takes a second. 6 of the steps are on bags of 3."""
    return ("--model tiny --device cpu --n-layer 2 --n-embd 32 --n-head 4 --n-kv-head 2 "
            "--n-hidden 48 --seq-len 16 --batch-size 8 --steps 12 --s 3 --r 0.5 --eval-every 4 "
            f"--data {corpus}").split()


@pytest.fixture
def run(flags, tmp_path):
    """The folder of a finished run with these flags."""
    import train_tst
    train_tst.main([*flags, "--out", str(tmp_path / "run")])
    return tmp_path / "run"


def message_of(capsys, main, *argv):
    """The error of a script, which must be one line with status 2, and what it printed before."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        main(list(map(str, argv)))
    printed = capsys.readouterr()
    assert end.value.code == 2 and printed.err.count("\n") == 1, printed.err
    return printed.err + printed.out


def log(out):
    """The log of the run in the folder out: a list with an entry (a dict) for each step."""
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def losses(out):
    return [entry["loss"] for entry in log(out)]


def run_script(*words, processes=1):
    """Run a script with its arguments, which must succeed, and return what the script printed."""
    torchrun = f"-m torch.distributed.run --standalone --nproc_per_node={processes} --".split()
    done = subprocess.run(
        [sys.executable, *(torchrun if processes > 1 else []), *map(str, words)],
        capture_output=True, text=True, cwd=ROOT, timeout=200)
    assert done.returncode == 0, done.stderr
    return done.stdout


def export_and_load(run, folder):
    """Export a run, and require that transformers computes the same logits and greedy text.

    Return the model of transformers, the fields of config.json, and the shapes {name: list} of the
    tensors in model.safetensors.
    """
    transformers = pytest.importorskip("transformers")
    safetensors = pytest.importorskip("safetensors")
    from tools import export, sample
    export.main([str(run), str(folder)])
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True)
    assert not any(report.values())     # no tensor is missing, unexpected or of another shape
    model, _ = sample.load_model(run)
    ids = torch.randint(0, VOCAB, (2, 16))
    with torch.no_grad():
        ours = model(ids[..., None])[..., :VOCAB]
        torch.testing.assert_close(theirs(ids).logits, ours, rtol=1e-4, atol=1e-4)
    prompt = ids[:1, :5]
    text = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False,
                           max_new_tokens=8)
    greedy = sample.generate(model, prompt[0].tolist(), 8, temperature=0)
    assert text[0, 5:].tolist() == list(greedy)
    with safetensors.safe_open(folder / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}      # older versions require this
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}
    return theirs, json.loads((folder / "config.json").read_text()), shapes
