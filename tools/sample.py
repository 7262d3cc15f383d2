"""Text from a trained model, by its run's folder.

    python tools/sample.py runs/tiny-s4-r0.2-seed0 --prompt "def main"
"""
import argparse
import codecs
import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import fail, load_encoding
from model import GPT, Config
from train_tst import best_device, find_device, load_checkpoint


def load_model(path, device="cpu"):
    """The trained GPT and its tiktoken.Encoding (or None), of a run's folder or a checkpoint."""
    checkpoint, path = load_checkpoint(path), Path(path)
    with torch.device(device):
        model = GPT(Config(**checkpoint["config"]))
    model.load_state_dict(checkpoint["model"])
    return model.eval(), load_encoding(path if path.is_dir() else path.parent)


@torch.no_grad()
def generate(model, ids, n, known=None, temperature=0.8, top_k=50, generator=None):
    """Yield n token ids that continue the list ids, from its last seq_len; temperature 0 is greedy.

    They are from the list known, since a model may have ids that no token has; None: all of them.
    Every token runs the whole context again, since a key-value cache would complicate the model.
    """
    device = model.embedding.weight.device
    known = torch.tensor(known or range(model.config.vocab_size), device=device)
    for _ in range(n):
        context = torch.tensor(ids[-model.config.seq_len:], device=device)
        logits = model(context.view(1, -1, 1))[0, -1, known].float()    # bags of one
        top, index = logits.topk(1 if temperature < 1e-6 else min(top_k, len(known)))
        p = torch.softmax(top / max(temperature, 1e-6), dim=-1).cpu()
        token = known[index[torch.multinomial(p, 1, generator=generator)]].item()
        ids = ids + [token]
        yield token


def main(argv=None):
    """Print samples as argv says (default: the command line). SystemExit(2) on bad input."""
    parser = argparse.ArgumentParser(description="Sample from a trained model.", allow_abbrev=False)
    parser.error, flag = fail, parser.add_argument
    flag("run", help="a run's folder, or a checkpoint file in it")
    flag("--prompt", default="", help="text to continue; - reads standard input")
    flag("--tokens", type=int, default=200, help="to add at most (default: 200)")
    flag("--temperature", type=float, default=0.8, help="0 is greedy (default: 0.8)")
    flag("--top-k", type=int, default=50, help="sample among the k likeliest (default: 50)")
    flag("--seed", type=int, default=0, help="(default: 0)")
    flag("--n", type=int, default=1, help="samples, a line of --- between them (default: 1)")
    flag("--device", default=best_device(), help="cuda, cuda:1, mps or cpu (default: %(default)s)")
    args = parser.parse_args(argv)
    for name, low in dict(tokens=0, temperature=0, top_k=1, seed=0, n=1).items():
        if not getattr(args, name) >= low:          # nan is not either
            fail(f"--{name.replace('_', '-')} {getattr(args, name)}: give a number from {low} on")
    model, encoding = load_model(args.run, find_device(args.device))
    if encoding is None:
        folder = args.run if Path(args.run).is_dir() else Path(args.run).parent
        fail(f"{folder} has no encoding.json, its tokenizer: if that is GPT-2's, "
             f"python tools/fineweb.py --shards 0 --out {folder}")
    known = [*encoding._mergeable_ranks.values(), *encoding._special_tokens.values()]
    prompt = args.prompt
    if prompt == "-":
        prompt = sys.stdin.buffer.read().decode(errors="replace")
    start = [encoding.eot_token, *encoding.encode_ordinary(prompt)]     # so documents begin
    generator = torch.Generator().manual_seed(args.seed)
    sys.stdout.reconfigure(errors="replace")        # a terminal may be ASCII
    for k in range(args.n):
        print("---\n" if k > 0 else "", prompt, sep="", end="", flush=True)
        decoder = codecs.getincrementaldecoder("utf-8")("replace")  # a token may be half a letter
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
        os._exit(130)                   # at once, without flushing to a pipe that is gone
