"""Measure the time of a step with bags, against a step with single tokens.

    python study/bench.py                   # tiny, not compiled
    python study/bench.py --compile         # compiled in parts, as in train_tst.py, and as a whole

A step is one micro-batch and one update, on random tokens whose frequencies follow Zipf's law.
float16 has no gradient scaler here. The variants take turns. A ratio is the median over all rounds,
with quartiles. On a CPU one thread is measured, in CPU time. These commands check one GPU in ten
minutes:

    python -m pytest -n 8                   # needs pytest-xdist
    for n in 16 32 64; do python study/bench.py --model 270m --rows $n --shards /tmp/zipf
      for s in 6 1; do python train_tst.py --model 270m --data /tmp/zipf --steps 12 --r 0.5 \\
        --batch-size 64 --micro-batch-size $n --s $s --out /tmp/zipf/270m-$n-$s; done; done
    for t in bfloat16 float16; do python train_tst.py --model small --data /tmp/zipf \\
      --steps 200 --dtype $t --out /tmp/zipf/small-$t; done
    tail -qn 1 /tmp/zipf/*/metrics.jsonl
"""
import argparse
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
import train_tst
from model import GPT, Config
from tools.corpus import VOCAB_SIZE, write_shard
from tools.plan import PEAK_FLOPS, plan

ROUNDS, TOKENS = 25, 40_000_000


def main(argv=None):
    """Print times and ratios, and on CUDA memory and MFU. SystemExit(2) on bad input."""
    parser = argparse.ArgumentParser(allow_abbrev=False, epilog="All flags of train_tst.py, too.")
    parser.error = data.fail
    parser.add_argument("--rows", type=int, help="rows per step (default: the micro-batch)")
    parser.add_argument("--shards", help="a folder in which the random tokens are kept")
    own, rest = parser.parse_known_args(argv)
    args = train_tst.parse(rest)
    args.batch_size = args.micro_batch_size = own.rows or args.micro_batch_size
    device = train_tst.find_device(args.device)
    cuda = device.type == "cuda"
    gpu = torch.cuda.get_device_name(device) if cuda else "one CPU thread"
    peak = [PEAK_FLOPS[name] for name in PEAK_FLOPS if name in gpu]
    clock = time.perf_counter if cuda else time.process_time
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("high" if cuda else "highest")   # as in training
    print(f"{args.model}, {args.batch_size} rows of {args.seq_len}, {args.dtype}, {gpu}")

    temporary = tempfile.TemporaryDirectory()       # for tokens, with frequencies like 1 / k
    folder = Path(own.shards or temporary.name)
    folder.mkdir(parents=True, exist_ok=True)
    vocab_size = VOCAB_SIZE if args.data == "data/python" else data.GPT2["vocab_size"]
    tokens = (vocab_size ** np.random.default_rng(0).random(TOKENS)).astype(np.uint16)
    write_shard(folder / "zipf_train_0.bin", tokens)
    write_shard(folder / "zipf_val_0.bin", tokens[:200_000])
    stream = data.Stream([folder / "zipf_train_0.bin"], vocab_size)

    found, times = plan(args, vocab_size), {}
    for kind in ("parts", "whole") if args.compile else ("eager",):
        earlier = torch.cuda.memory_allocated() if cuda else 0
        step = make_step(kind, args, device, stream)
        step(args.s), step(1)                           # these steps compile
        if cuda:
            torch.cuda.reset_peak_memory_stats()
            step(args.s), step(1)
            used = (torch.cuda.max_memory_allocated() - earlier) / 1e9
            print(f"{kind}: {used:.2f} GB at the peak, {found['memory_gb']:.2f} by tools/plan.py")
        times.update({(kind, s, step): [] for s in (1, args.s)})
    for kind, s, step in list(times) * ROUNDS:
        start = clock()
        step(s)
        times[kind, s, step].append(clock() - start)
    base = next(iter(times.values()))                   # s = 1, in parts or not compiled
    for (kind, s, _), seconds in times.items():
        lower, ratio, upper = np.quantile(np.divide(seconds, base), (0.25, 0.5, 0.75))
        second = np.median(seconds)
        mfu = f", MFU {found['flops_per_step'] / second / peak[0]:.1%}" if peak else ""
        print(f"{kind}, s = {s}: {second * 1000:.1f} ms, {ratio:.3f} [{lower:.3f}, {upper:.3f}] of "
              f"the first time, {args.batch_size * args.seq_len * s / second:,.0f} tokens/s{mfu}")


def make_step(kind, args, device, tokens):
    """A function step(s) that does a training step, compiled in parts, as a whole, or not."""
    config = Config(**{k: getattr(args, k) for k in train_tst.SHAPE}, vocab_size=tokens.vocab_size)
    with device:
        model = GPT(config)
    forward = torch.compile(model, dynamic=False) if kind == "whole" else model
    if kind == "parts":
        train_tst.compile_parts(model, args)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    autocast = torch.autocast(device.type, getattr(torch, args.dtype), args.dtype != "float32")
    batches = {s: data.Batches(tokens, 10 ** 6, 10 ** 6, s, args.batch_size, args.seq_len, 0)
               for s in (args.s, 1)}

    def step(s):
        rows = batches[s].rows(np.random.randint(10 ** 6), 0, args.batch_size)
        rows = rows.pin_memory() if device.type == "cuda" else rows
        bags = rows.to(device, non_blocking=True).view(-1, args.seq_len + 1, s)
        with autocast:
            loss = forward(bags[:, :-1], bags[:, 1:])
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), train_tst.GRAD_CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)          # micro-batches add to gradients
        norm.item()                                     # waits for the GPU

    return step


if __name__ == "__main__":
    main()
