"""Print text from a trained model.

    python tools/sample.py runs/tiny-s4-r0.2-seed0 --prompt "def main"
"""
import argparse
import codecs
import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import fail
from model import GPT, Config
from tools.corpus import load_encoding
from train_tst import find_device, load_checkpoint


def load_model(path, device="cpu"):
    """The trained GPT and its tiktoken.Encoding (or None), from a run's folder or a checkpoint."""
    checkpoint, path = load_checkpoint(path), Path(path)
    with torch.device(device):
        model = GPT(Config(**checkpoint["config"]))
    model.load_state_dict(checkpoint["model"])
    return model.eval(), load_encoding(path if path.is_dir() else path.parent)


@torch.no_grad()
def generate(model, ids, n, known=None, temperature=0.8, top_k=50, generator=None):
    """Yield n token ids that continue the list ids. The model sees the last seq_len ids.

    Only ids in the list known are sampled, because a vocabulary can have ids without a token; None
    means all ids. Temperature 0 is greedy. The model computes the whole context for each token,
    because a key-value cache would complicate this function.
    """
    device = model.embedding.weight.device
    known = torch.tensor(known or range(model.config.vocab_size), device=device)
    for _ in range(n):
        context = torch.tensor(ids[-model.config.seq_len:], device=device)
        logits = model(context.view(1, -1, 1))[0, -1, known].float()    # bags of one token
        top, index = logits.topk(1 if temperature < 1e-6 else min(top_k, len(known)))
        p = torch.softmax(top / max(temperature, 1e-6), dim=-1).cpu()
        token = known[index[torch.multinomial(p, 1, generator=generator)]].item()
        ids = ids + [token]
        yield token


def main(argv=None):
    """Print samples as argv (default: the command line) says. SystemExit(2) on bad input."""
    parser = argparse.ArgumentParser(description="Sample from a trained model.", allow_abbrev=False)
    parser.error, flag = fail, parser.add_argument
    flag("run", help="the folder of a run, or a checkpoint in it")
    flag("--prompt", default="", help="the text to continue")
    flag("--tokens", type=int, default=200, help="maximum number of tokens to add (default: 200)")
    flag("--temperature", type=float, default=0.8, help="0 is greedy (default: 0.8)")
    flag("--top-k", type=int, default=50, help="sample from the k likeliest tokens (default: 50)")
    flag("--seed", type=int, default=0, help="the seed of the random choices (default: 0)")
    flag("--device", default="cuda" if torch.cuda.is_available() else "cpu",
         help="cuda, cuda:1, mps or cpu (default: %(default)s)")
    args = parser.parse_args(argv)
    for name, least in dict(tokens=0, temperature=0, top_k=1, seed=0).items():
        if not getattr(args, name) >= least:            # also true for nan
            fail(f"--{name.replace('_', '-')} {getattr(args, name)}: choose {least} or more.")
    model, encoding = load_model(args.run, find_device(args.device))
    if encoding is None:
        folder = args.run if Path(args.run).is_dir() else Path(args.run).parent
        fail(f"{folder} has no encoding.json, which is the tokenizer. If the tokenizer is GPT-2's, "
             f"run python tools/fineweb.py --shards 0 --out {folder}")
    known = [*encoding._mergeable_ranks.values(), *encoding._special_tokens.values()]
    start = [encoding.eot_token, *encoding.encode_ordinary(args.prompt)]    # as in training
    generator = torch.Generator().manual_seed(args.seed)
    print(args.prompt, end="", flush=True)
    decoder = codecs.getincrementaldecoder("utf-8")("replace")  # a token can end inside a character
    for token in generate(model, start, args.tokens, known, args.temperature, args.top_k,
                          generator):
        if token == encoding.eot_token:
            break
        print(decoder.decode(encoding.decode_single_token_bytes(token)), end="", flush=True)
    print(decoder.decode(b"", final=True), flush=True)


if __name__ == "__main__":
    try:
        main()
    except (KeyboardInterrupt, BrokenPipeError):
        os._exit(130)                   # without flushing to a pipe that nobody reads
