"""Ready shards: GPT-2 tokens of FineWeb, 100 million (200 MB) a shard, from Hugging Face.

    pip install huggingface_hub && python tools/fineweb.py --shards 10      # into data/fineweb
    python tools/fineweb.py --shards 10 --edu               # FineWeb-Edu, into data/fineweb-edu
    python tools/fineweb.py --shards 0 --out FOLDER         # GPT-2's tokenizer, for llm.c's shards
"""
import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
from data import fail
from tools.corpus import download_encoding, first_line, is_new, save_encoding

FINEWEB = {                             # start of the files' names: training shards: dataset
    "fineweb": {103: "kjj0/fineweb10B-gpt2", 1030: "kjj0/fineweb100B-gpt2"},
    "finewebedu": {99: "kjj0/finewebedu10B-gpt2"}}


def fetch(stem, shards, out):
    """Download the validation shard, training shards 1 .. shards and the tokenizer into out.

    What is there is not downloaded again. SystemExit(2) if a download fails, and where out holds
    another dataset, since two may share documents.
    """
    repo = next(repo for most, repo in FINEWEB[stem].items() if shards <= most)
    meta = out / "meta.json"
    if shards and is_new(out):
        out.mkdir(parents=True, exist_ok=True)
        meta.write_text(json.dumps({**data.GPT2, "repo": repo}))
    found = json.loads(meta.read_text()) if meta.exists() else data.GPT2
    if is_new(out) or found["tokenizer"] != "gpt2" or shards and found.get("repo") != repo:
        fail(f"--out {out}: not a folder of {repo if shards else 'GPT-2 tokens'}; name another")
    for k in range(shards + 1 if shards else 0):
        path = out / (f"{stem}_train_{k:06d}.bin" if k else f"{stem}_val_000000.bin")
        if not path.exists():
            try:
                from huggingface_hub import hf_hub_download
                hf_hub_download(repo, path.name, repo_type="dataset", local_dir=out)
            except ImportError:
                fail("downloads need one more package: pip install huggingface_hub")
            except Exception as error:  # of the hub, of the connection, of the disk
                fail(f"{repo}/{path.name}: {first_line(error)}; the same command goes on from here")
        data.read_shard(path)           # which ends here if it is not whole
    if not (out / "encoding.json").exists():
        save_encoding(download_encoding("gpt2", "the same command tries again; meanwhile the "
                                        "shards train, without bits per byte"), out)


def main(argv=None):
    """Download as argv says (default: the command line). SystemExit(2) on bad input."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error, flag = fail, parser.add_argument
    flag("--shards", type=int, required=True, help="training shards, 200 MB each; 0: none")
    flag("--edu", action="store_true", help="FineWeb-Edu, of which there are 99")
    flag("--out", help="folder (default: data/fineweb, or data/fineweb-edu)")
    args = parser.parse_args(argv)
    stem, default = ("finewebedu", "data/fineweb-edu") if args.edu else ("fineweb", "data/fineweb")
    if not 0 <= args.shards <= max(FINEWEB[stem]):
        fail(f"--shards {args.shards}: give 0 to {max(FINEWEB[stem])}")
    out = Path(args.out or default)
    try:
        fetch(stem, args.shards, out)
    except OSError as error:
        fail(f"{error.filename or out}: {error.strerror or error}; mend it, or change --out")
    print(f"{out} is ready" + (f": python train_tst.py --data {out}" if args.shards else ""))


if __name__ == "__main__":
    main()
