"""Estimate the FLOPs, the tokens, the memory per GPU and the hours of a run before it is paid for.

    python tools/plan.py --model 3b --fsdp --devices 8 --gpu h100 --mfu 0.4

The memory is a formula for compiled runs in 16 bits. For 270m with 16 rows it gives 21.7 GB, and
22.6 GB were measured (H200, bfloat16). FSDP and float16 were not measured. CUDA itself (1 GB) and
gaps of the allocator come in addition, as does the time for evaluations and checkpoints.
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
    parameters, table_size = sum(p.numel() for p in model.parameters()), model.head.weight.numel()
    active = sum(p.numel() * c.n_active // c.n_expert if p.ndim == 3 else p.numel()
                 for p in model.parameters())           # tensors with 3 axes are experts
    positions, switch = args.batch_size * args.seq_len, round(args.r * args.steps)
    superposition, recovery = switch * args.s * positions, (args.steps - switch) * positions
    flops = float(model.flops_per_position() * positions)               # per step
    hours = flops * args.steps / (PEAK_FLOPS[gpu] * mfu * devices) / 3600

    # Bytes per GPU of a compiled run in 16 bits. For the backward pass each layer keeps, for every
    # position: inputs and outputs of two norms; q, k, the tensor that v is a slice of, and the
    # output of attention; gate, up and their product
    mlp = c.n_active * (3 * c.n_hidden + 2 * c.n_embd) if c.n_expert else 3 * c.n_hidden
    kept = 4 * c.n_embd + 3 * (c.n_head + c.n_kv_head) * model.blocks[0].head_dim + mlp
    rows, processes, copies = args.micro_batch_size * args.seq_len, 1, parameters - table_size
    if args.fsdp and devices > 1:                       # the tables and two blocks are unsharded
        processes, copies = devices, 2 * (table_size + (parameters - 2 * table_size) // c.n_layer)
    memory = {"weights_gradients_adamw": 16 * parameters / processes,           # in float32
              "copies": 2 * copies, "activations": 2 * kept * c.n_layer * rows,
              "logits": 6 * model.head.out_features * rows}
    return {"parameters": parameters, "active_parameters": active, "flops_per_step": flops,
            "flops": flops * args.steps, "hours": hours, "superposition_tokens": superposition,
            "recovery_tokens": recovery, "shards": -(-(superposition + recovery) // SHARD_TOKENS),
            **{f"{name}_gb": size / 1e9 for name, size in memory.items()},
            "memory_gb": sum(memory.values()) / 1e9, "checkpoint_gb": 12 * parameters / 1e9}


def main(argv=None):
    """Print the plan of argv (default: the command line). SystemExit(2) on bad input."""
    parser = argparse.ArgumentParser(allow_abbrev=False, epilog="Also all flags of train_tst.py.")
    parser.error, flag = fail, parser.add_argument
    flag("--gpu", type=str.upper, choices=PEAK_FLOPS, default="H100", help="(default: H100)")
    flag("--devices", type=int, default=1, help="the number of GPUs, with one process each")
    flag("--mfu", type=float, default=0.4, help="MFU, a fraction of the peak (default: 0.4)")
    flag("--vocab-size", type=int, help="(default: that of data/python, or GPT-2's)")
    own, rest = parser.parse_known_args(argv)
    if min(own.devices, own.vocab_size or 1) < 1 or not 0 < own.mfu <= 1:
        fail(f"--devices {own.devices}, --vocab-size {own.vocab_size} and --mfu {own.mfu}: choose "
             "two numbers above 0, and a fraction of at most 1.")
    train_tst.WORLD = own.devices                       # as with torchrun
    args = train_tst.parse(["--device", "cuda", "--dtype", "bfloat16", *rest])
    usual = VOCAB_SIZE if args.data == "data/python" else GPT2["vocab_size"]
    print(json.dumps(plan(args, own.vocab_size or usual, own.gpu, own.devices, own.mfu), indent=1))


if __name__ == "__main__":
    main()
