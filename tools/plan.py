"""Estimate the FLOPs, the tokens, the memory per GPU and the hours of a run before it is paid for.

    python tools/plan.py --model 3b --fsdp --devices 8 --gpu h100 --mfu 0.4

The memory is a formula. For 270m with 16 rows it gives 21.7 GB, and 22.6 GB were measured (H200,
bfloat16, compiled). FSDP and float16 were not measured. CUDA itself (1 GB) and gaps of the
allocator come in addition, and so does the time for evaluations and checkpoints.
"""
import argparse
import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train_tst
from data import GPT2, fail
from model import GPT, Config
from tools.corpus import SHARD_TOKENS, VOCAB_SIZE

PEAK_FLOPS = {"B200": 2250e12, "H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12,
              "4090": 165e12, "T4": 65e12}      # dense, in 16 bits, as stated by their makers


def plan(args, vocab_size, gpu="H100", devices=1, mfu=0.4):
    """The plan of a run with args (from `train_tst.parse`), as a dict. A GB is 1e9 bytes."""
    c = Config(**{name: getattr(args, name) for name in train_tst.SHAPE}, vocab_size=vocab_size)
    with torch.device("meta"):                          # tensors without memory
        model = GPT(c)
    parameters, table = sum(p.numel() for p in model.parameters()), model.head.weight.numel()
    active = sum(p.numel() * c.n_active // c.n_expert if p.ndim == 3 else p.numel()
                 for p in model.parameters())           # tensors with 3 axes are experts
    positions, switch = args.batch_size * args.seq_len, round(args.r * args.steps)
    superposition, recovery = switch * args.s * positions, (args.steps - switch) * positions
    flops = float(model.flops_per_position() * positions)               # per step
    hours = flops * args.steps / (PEAK_FLOPS[gpu] * mfu * devices) / 3600

    # Values that are kept for the backward pass, per layer and position: inputs and outputs of two
    # norms; q, k, the tensor that v is a slice of, and the output of attention; gate, up and their
    # product. Without compilation also silu(gate), and the inputs of the norms in 32 bits
    sixteen_bits, eager = args.dtype != "float32", not args.compile
    hidden = (3 + eager) * c.n_hidden
    mlp = c.n_active * (hidden + 2 * c.n_embd) if c.n_expert else hidden
    attention = 3 * (c.n_head + c.n_kv_head) * model.blocks[0].head_dim
    kept = (4 + 2 * (eager and sixteen_bits)) * c.n_embd + attention + mlp
    width, rows = 2 if sixteen_bits else 4, args.micro_batch_size * args.seq_len
    copies, shards = width * (parameters - table) if sixteen_bits else 0, 1     # made by autocast
    if args.fsdp and devices > 1:                       # the tables and two blocks are unsharded
        copies, shards = 2 * width * (table + (parameters - 2 * table) // c.n_layer), devices
    memory = {"weights_gradients_adamw": 16 * parameters / shards, "copies": copies,    # float32
              "activations": width * kept * c.n_layer * rows,
              "logits": (12 if eager else 4 + width) * model.head.out_features * rows}
    return {"parameters": parameters, "active_parameters": active, "flops_per_step": flops,
            "flops": flops * args.steps, "hours": hours, "superposition_tokens": superposition,
            "recovery_tokens": recovery, "shards": -(-(superposition + recovery) // SHARD_TOKENS),
            **{f"{name}_gb": size / 1e9 for name, size in memory.items()},
            "memory_gb": sum(memory.values()) / 1e9, "checkpoint_gb": 12 * parameters / 1e9}


def main(argv=None):
    """Print the plan of argv (default: the command line). SystemExit(2) on bad input."""
    parser = argparse.ArgumentParser(allow_abbrev=False, epilog="All flags of train_tst.py, too.")
    parser.error, flag = fail, parser.add_argument
    flag("--gpu", type=str.upper, choices=PEAK_FLOPS, default="H100")
    flag("--devices", type=int, default=1, help="the number of GPUs, with one process each")
    flag("--mfu", type=float, default=0.4, help="the fraction of the 16-bit peak (default: 0.4)")
    flag("--vocab-size", type=int, help="default: the built-in corpus's or GPT-2's")
    own, rest = parser.parse_known_args(argv)
    if min(own.devices, own.vocab_size or 1) < 1 or not 0 < own.mfu <= 1:
        fail("--devices and --vocab-size must be at least 1, and --mfu a fraction up to 1.")
    train_tst.WORLD = own.devices                       # as with torchrun
    args = train_tst.parse(["--device", "cuda", "--dtype", "bfloat16", *rest])
    usual = VOCAB_SIZE if args.data == "data/python" else GPT2["vocab_size"]
    print(json.dumps(plan(args, own.vocab_size or usual, own.gpu, own.devices, own.mfu), indent=1))


if __name__ == "__main__":
    main()
