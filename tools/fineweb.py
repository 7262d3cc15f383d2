"""Download shards: GPT-2 tokens of FineWeb, 100 million tokens (200 MB) per shard.

    pip install huggingface_hub && python tools/fineweb.py --shards 10      # into data/fineweb
    python tools/fineweb.py --shards 0 --out FOLDER     # adds the tokenizer to a folder
"""
import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
from data import fail
from tools.corpus import download_encoding, first_line, save_encoding

REPOSITORY, MOST = "kjj0/fineweb100B-gpt2", 1030        # the number of its training shards


def main(argv=None):
    """Download as argv (default: the command line) says. SystemExit(2) on bad input."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error, flag = fail, parser.add_argument
    flag("--shards", type=int, required=True, help="number of training shards; 0: no shard")
    flag("--out", type=Path, default=Path("data/fineweb"),
         help="folder of the shards (default: data/fineweb)")
    args = parser.parse_args(argv)
    if not 0 <= args.shards <= MOST:
        fail(f"--shards {args.shards} is not from 0 to {MOST}. Change the number.")
    meta = args.out / "meta.json"
    if meta.exists() and (REPOSITORY if args.shards else '"gpt2"') not in meta.read_text():
        fail(f"--out {args.out} has tokens from another source. Choose another --out.")
    for k in range(args.shards + 1 if args.shards else 0):
        path = args.out / f"fineweb_{'train' if k else 'val'}_{k:06d}.bin"
        try:
            from huggingface_hub import hf_hub_download
            if not path.exists():
                hf_hub_download(REPOSITORY, path.name, repo_type="dataset", local_dir=args.out)
        except ImportError:
            fail("Downloads need one more package. Run: pip install huggingface_hub")
        except Exception as error:      # the server, the connection or the disk failed
            fail(f"{REPOSITORY}/{path.name}: {first_line(error)}. Repeat the command to continue.")
        data.read_shard(path)           # SystemExit(2) if the shard is incomplete
    if not args.out.is_dir():
        fail(f"--out {args.out} is not a folder. Choose another --out, or a larger --shards.")
    if not (args.out / "encoding.json").exists():
        save_encoding(download_encoding("gpt2", "Repeat the command to continue."), args.out)
    print(f"{args.out} is ready.")


if __name__ == "__main__":
    main()
