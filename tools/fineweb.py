"""Ready shards: GPT-2 tokens of FineWeb, 100 million (200 MB) a shard, from Hugging Face.

    python tools/fineweb.py --shards 10                     # into data/fineweb
    python tools/fineweb.py --shards 10 --edu               # FineWeb-Edu, into data/fineweb-edu
"""
import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
from data import fail

FINEWEB = {                             # start of the files' names: training shards: dataset
    "fineweb": {103: "kjj0/fineweb10B-gpt2", 1030: "kjj0/fineweb100B-gpt2"},
    "finewebedu": {99: "kjj0/finewebedu10B-gpt2"}}


def fineweb_repo(stem, shards):
    """The smallest dataset whose files are so called that has that many training shards."""
    return next(repo for most, repo in FINEWEB[stem].items() if shards <= most)


def fetch(stem, shards, out):
    """Download the validation shard and training shards 1 .. shards into out, but those there.

    A folder holds one dataset, since two may share documents. SystemExit(2) where it holds
    another, and if a download fails: what has arrived stays.
    """
    try:
        from huggingface_hub import hf_hub_download
    except ImportError:
        fail("downloads need one more package: pip install huggingface_hub")
    repo, meta = fineweb_repo(stem, shards), out / "meta.json"
    if not meta.exists() or json.loads(meta.read_text()).get("repo") != repo:
        if out.exists() and any(out.iterdir()):
            fail(f"--out {out} holds other data, and {repo} may repeat its documents; name another "
                 "folder")
        out.mkdir(parents=True, exist_ok=True)
        meta.write_text(json.dumps({**data.GPT2, "repo": repo}))
    names = [f"{stem}_val_000000.bin"]
    names += [f"{stem}_train_{k:06d}.bin" for k in range(1, shards + 1)]
    for name in names:
        if not (out / name).exists():
            try:                        # it goes on with a file that it has begun
                hf_hub_download(repo_id=repo, repo_type="dataset", filename=name, local_dir=out)
            except Exception as error:  # of the hub, of the connection, of the disk
                reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                fail(f"{repo}/{name}: {reason}; the same command goes on where this one stopped")
        data.read_shard(out / name)     # which ends here if it is not whole


def main(argv=None):
    """Download as argv says (default: the command line). SystemExit(2) on bad input."""
    parser = argparse.ArgumentParser(description="Download GPT-2 tokens of FineWeb, 100M a shard.",
                                     allow_abbrev=False)
    parser.error = fail
    parser.add_argument("--shards", type=int, required=True, help="training shards, 200 MB each")
    parser.add_argument("--edu", action="store_true", help="FineWeb-Edu, of which there are 99")
    parser.add_argument("--out", help="folder (default: data/fineweb, or data/fineweb-edu)")
    args = parser.parse_args(argv)
    stem, default = ("finewebedu", "data/fineweb-edu") if args.edu else ("fineweb", "data/fineweb")
    if not 1 <= args.shards <= max(FINEWEB[stem]):
        fail(f"--shards {args.shards}: there are 1 to {max(FINEWEB[stem])}")
    out = Path(args.out or default)
    try:
        fetch(stem, args.shards, out)
    except OSError as error:
        fail(f"{error.filename or out}: {error.strerror or error}; mend that, or name another "
             "--out")
    except KeyboardInterrupt:
        fail("interrupted; the same command goes on where this one stopped", status=130)
    print(f"{out} has {args.shards} training shards: python train_tst.py --data {out}")


if __name__ == "__main__":
    main()
