"""Text from a trained model, by its run's folder.

    python tools/sample.py runs/tiny-s6-r0.2-seed0 --prompt "def main"
"""
import argparse
import codecs
import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import fail, load_encoding
from model import GPT, Config, load_checkpoint
from train_tst import best_device, find_device


def load_model(path, device="cpu"):
    """The trained GPT and its tiktoken.Encoding (or None), of a run's folder or a checkpoint."""
    checkpoint, path = load_checkpoint(path, mmap=True), Path(path)
    with torch.device(device):
        model = GPT(Config(**checkpoint["config"]))
    model.load_state_dict(checkpoint["model"])
    folder = path if path.is_dir() else path.parent
    return model.eval(), load_encoding(folder, checkpoint["data"]["tokenizer"])


@torch.no_grad()
def generate(model, ids, n, temperature=0.8, top_k=50, generator=None):
    """Yield n token ids that continue the list ids, from its last seq_len; temperature 0 is greedy.

    Every token runs the whole context again: a key-value cache would complicate the attention
    that people come here to read, and tools/export.py gives the model to engines that have one.
    """
    vocab_size, device = model.config.vocab_size, model.embedding.weight.device
    for _ in range(n):
        context = torch.tensor(ids[-model.config.seq_len:], device=device)
        logits = model(context.view(1, -1, 1))[0, -1, :vocab_size].float()     # bags of one
        if temperature < 1e-6:          # 0, or so near it that the division would overflow
            token = logits.argmax().item()
        else:
            top, index = logits.topk(min(top_k, vocab_size))
            p = torch.softmax(top / temperature, dim=-1).cpu()
            token = index[torch.multinomial(p, 1, generator=generator)].item()
        ids = ids + [token]
        yield token


def main(argv=None):
    """Print samples as argv says (default: the command line). SystemExit(2) on bad input."""
    parser = argparse.ArgumentParser(description="Sample from a trained model.", allow_abbrev=False)
    parser.error = fail
    parser.add_argument("run", help="a run's folder, or a checkpoint file in it")
    parser.add_argument("--prompt", default="", help="text to continue; - reads standard input")
    parser.add_argument("--tokens", type=int, default=200, help="to add at most (default: 200)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 is greedy (default: 0.8)")
    parser.add_argument("--top-k", type=int, default=50,
                        help="sample among the k likeliest (default: 50)")
    parser.add_argument("--seed", type=int, default=0, help="(default: 0)")
    parser.add_argument("--n", type=int, default=1,
                        help="samples, a line of --- between them (default: 1)")
    parser.add_argument("--device", help="cuda, cuda:1, mps or cpu (default: the first there)")
    args = parser.parse_args(argv)
    for flag, value, low in (("--tokens", args.tokens, 0), ("--temperature", args.temperature, 0),
                             ("--top-k", args.top_k, 1), ("--seed", args.seed, 0),
                             ("--n", args.n, 1)):
        if not value >= low:            # nan is not either
            fail(f"{flag} {value}: give a number from {low} on")
    model, encoding = load_model(args.run, find_device(args.device or best_device()))
    if encoding is None:
        fail(f"{args.run}: its tokenizer cannot be loaded here; tiktoken wants the network once, "
             "or TIKTOKEN_CACHE_DIR")
    sys.stdout.reconfigure(errors="replace")        # a terminal may be ASCII
    prompt = args.prompt
    if prompt == "-":
        prompt = sys.stdin.buffer.read().decode(errors="replace")
    ids = encoding.encode_ordinary(prompt)
    if len(ids) > model.config.seq_len:
        print(f"the prompt's {len(ids)} tokens are cut to its last {model.config.seq_len}, the "
              "training length", file=sys.stderr)
    generator = torch.Generator().manual_seed(args.seed)
    for k in range(args.n):
        if k > 0:
            print("---")
        print(prompt, end="", flush=True)
        decoder = codecs.getincrementaldecoder("utf-8")("replace")  # a token may be half a letter
        start = [encoding.eot_token, *ids]          # documents began so in training
        for token in generate(model, start, args.tokens, args.temperature, args.top_k, generator):
            if token == encoding.eot_token:
                break
            piece = encoding.decode_single_token_bytes(token)
            print(decoder.decode(piece), end="", flush=True)
        print(decoder.decode(b"", final=True), flush=True)


if __name__ == "__main__":
    try:
        main()
    except (KeyboardInterrupt, BrokenPipeError):
        os._exit(130)                   # at once, without flushing to a pipe that is gone
