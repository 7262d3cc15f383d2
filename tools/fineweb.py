"""Download shards: GPT-2 tokens of FineWeb, 100 million tokens (200 MB) per shard.

    pip install huggingface_hub && python tools/fineweb.py --shards 10      # into data/fineweb
    python tools/fineweb.py --shards 0 --out FOLDER     # only GPT-2's tokenizer, into any folder
"""
import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
from data import fail
from tools.corpus import download_encoding, first_line, is_new, save_encoding

REPOSITORIES = {103: "kjj0/fineweb10B-gpt2", 1030: "kjj0/fineweb100B-gpt2"}     # {shards: dataset}


def fetch(shards, out):
    """Download a validation shard, training shards and the tokenizer, unless they are there.

    SystemExit(2) if a download fails, or if out has another dataset, which may share documents.
    """
    repo = next(repo for most, repo in REPOSITORIES.items() if shards <= most)
    meta = out / "meta.json"
    if shards and is_new(out):
        out.mkdir(parents=True, exist_ok=True)
        meta.write_text(json.dumps({**data.GPT2, "repo": repo}))
    found = json.loads(meta.read_text()) if meta.exists() else data.GPT2
    if is_new(out) or found["tokenizer"] != "gpt2" or shards and found.get("repo") != repo:
        fail(f"--out {out} has no {repo if shards else 'GPT-2 tokens'}. Choose another --out.")
    for k in range(shards + 1 if shards else 0):
        path = out / f"fineweb_{'train' if k else 'val'}_{k:06d}.bin"
        if not path.exists():
            try:
                from huggingface_hub import hf_hub_download
                hf_hub_download(repo, path.name, repo_type="dataset", local_dir=out)
            except ImportError:
                fail("Downloads need one more package. Run: pip install huggingface_hub")
            except Exception as error:  # of the server, of the connection or of the disk
                fail(f"{repo}/{path.name}: {first_line(error)}. Run the same command to continue.")
        data.read_shard(path)           # SystemExit(2) if the shard is incomplete
    if not (out / "encoding.json").exists():
        save_encoding(download_encoding("gpt2", "Run the same command again."), out)


def main(argv=None):
    """Download as argv (default: the command line) says. SystemExit(2) on bad input."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error, flag = fail, parser.add_argument
    flag("--shards", type=int, required=True, help="the number of training shards; 0: no shard")
    flag("--out", type=Path, default=Path("data/fineweb"), help="(default: data/fineweb)")
    args = parser.parse_args(argv)
    if not 0 <= args.shards <= max(REPOSITORIES):
        fail(f"--shards {args.shards} must be from 0 to {max(REPOSITORIES)}. Change the number.")
    try:
        fetch(args.shards, args.out)
    except OSError as error:
        fail(f"{error.filename or args.out}: {error.strerror or error}. Remove the cause.")
    print(f"{args.out} is ready: python train_tst.py --data {args.out}")


if __name__ == "__main__":
    main()
