"""What a run will take, before it is paid for: FLOPs, tokens, memory per device, time.

Nothing is trained. It takes any flag of train_tst.py beside its own:

    python tools/plan.py --model 3b --fsdp --devices 8 --gpu h100 --mfu 0.4
    python tools/plan.py --paper            # the utilisations behind the paper's B200-hours

A micro-batch's memory is measured: the model runs on fake tensors, which have shapes and no
storage, and `LiveBytes` adds up what is alive. With --compile, the default on a GPU, torch.compile
itself picks what the blocks keep. The fake device is a CPU, whose eager norms keep more than a
GPU's, and below PyTorch 2.13 perhaps its attention, with the blocks as if eager: there the plan is
too high. Left out: the CUDA context and workspaces (about 1 GB), NCCL's buffers, the allocator's
gaps, and of the time evaluations, checkpoints and waiting. The head's loss counts as eager, and
gradients as always there.
"""
import argparse
import json
import math
import sys
import weakref
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
import train_tst
from model import GPT, PRESETS, Config
from tools.corpus import SHARD_TOKENS, VOCAB_SIZE
from train_tst import PEAK_FLOPS, SHAPE

# Preset, steps, B200-hours, and the trunk where it is narrower than the preset of that name.
PAPER = {"270m": ("270m", 20_000, 34, dict(n_embd=576, n_head=9, n_kv_head=3, n_hidden=1536)),
         "600m": ("600m", 20_000, 61, dict(n_embd=960, n_head=15, n_kv_head=5, n_hidden=2560)),
         "3b": ("3b", 20_000, 247, {}),
         "10b-a1b, 125k steps": ("10b-a1b", 125_000, 12_311, {}),
         "10b-a1b, 50k steps": ("10b-a1b", 49_983, 4_768, {})}
ECHOED = ("devices", "gpu", "mfu", "micro_batch_size", "dtype", "compile", "vocab_size")


def plan(args):
    """All of it as a dict, in FLOPs, tokens, bytes and hours (None where no peak is known).

    args are `parse`'s.
    """
    config = Config(**{name: getattr(args, name) for name in (*SHAPE, "vocab_size")})
    with torch.device("meta"):
        model = GPT(config)
    parameters = sum(p.numel() for p in model.parameters())
    # The norms' gains are nothing
    blocks = sum(p.numel() for p in model.blocks.parameters() if p.ndim > 1)
    positions = args.batch_size * args.seq_len                  # that the trunk sees in a step
    phases = train_tst.bag_phases(args)
    tokens = [sum(steps * s_in for steps, s_in, _ in part) * positions
              for part in (phases[:-1], phases[-1:])]

    step_flops = model.flops_per_position() * positions
    flops = step_flops * args.steps
    known = args.device.startswith("cuda") and args.dtype == "bfloat16"
    gpu_hours = flops / (PEAK_FLOPS[args.gpu] * args.mfu) / 3600 if known else None

    stored, shards, gathered = 4 * parameters, 1, 0                     # float32
    bag = max(((s_in, s_out) for steps, s_in, s_out in phases if steps), key=sum)
    activations = micro_batch_bytes(config, args, bag) - 2 * stored
    if args.fsdp:
        # Whole are the tables, and a block with its gradients; autocast's copies of the other
        # blocks do not stay
        size = 2 if args.dtype == "bfloat16" else 4
        shards, gathered = args.devices, (parameters - blocks + 2 * blocks // config.n_layer) * size
        activations -= 2 * blocks if size == 2 else 0
    memory = {"weights": stored // shards, "gradients": stored // shards,   # DDP's buckets too
              "optimizer": 2 * stored // shards, "gathered": gathered, "activations": activations}
    active = sum(model.active(p) for p in model.parameters())
    return {"parameters": parameters, "active_parameters": active,
            "model_flops_per_step": step_flops, "flops": flops,
            "superposition_tokens": tokens[0], "recovery_tokens": tokens[1],
            "shards": math.ceil(sum(tokens) / SHARD_TOKENS),
            "memory_per_device": {**memory, "total": sum(memory.values())},
            "checkpoint_bytes": 3 * stored,
            "hours": gpu_hours and gpu_hours / args.devices, "gpu_hours": gpu_hours,
            **{name: getattr(args, name) for name in ECHOED}}


def micro_batch_bytes(config, args, bag):
    """Peak of weights, gradients and a micro-batch's forward and backward, on one device.

    bag: (s_in, s_out).
    """
    # Fake experts have no counts to split by: one serves all rows, in the same memory
    loop = mock.patch("model.loop_over_experts", lambda x, weights, _: F.linear(x, weights[0]))
    with loop, FakeTensorMode(), LiveBytes() as live:
        model = GPT(config)
        for block in model.blocks:
            if args.compile:            # saves what the default backend would
                block.compile(backend="aot_eager_decomp_partition", dynamic=False)
        length = args.seq_len * bag[0] + bag[1]
        rows = torch.zeros(args.micro_batch_size, length, dtype=torch.int64)
        for _ in range(2):              # the first makes the gradients, and compiles
            live.peak = 0
            with torch.autocast("cpu", torch.bfloat16, enabled=args.dtype == "bfloat16"):
                loss = model(*data.bags(rows, *bag))
            loss.backward()
            del loss

    def logits(chunk):          # of `ChunkedHeadLoss`: in float32, and as a bfloat16 product
        n = min(args.micro_batch_size * args.seq_len, chunk)
        return n * model.head.out_features * (4 + 2 * (args.dtype == "bfloat16"))

    return live.peak + (logits(4096) - logits(512) if args.device.startswith("cuda") else 0)


class LiveBytes(TorchDispatchMode):
    """The bytes of all storages that operators made inside and that are still there.

    `live` now, `peak` at most.
    """
    live = peak = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        out = operator(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if not isinstance(tensor, torch.Tensor):
                continue
            storage = tensor.untyped_storage()
            if not hasattr(storage, "counted"):             # not a view of one
                storage.counted = True
                self.add(storage.nbytes())
                weakref.finalize(storage, self.add, -storage.nbytes())
        return out

    def add(self, size):
        self.live += size
        self.peak = max(self.peak, self.live)

    @classmethod
    def ignore_compile_internals(cls):      # or torch.compile does nothing inside
        return True


def paper():
    """{run: utilisation} behind the paper's B200-hours, with its vocabularies and batches.

    It gives no l: 2,048 here, and the preset's for 10b-a1b.
    """
    found = {}
    for name, (preset, steps, hours, trunk) in PAPER.items():
        moe = preset == "10b-a1b"
        own = dict(vocab_size=151_936) if moe else dict(vocab_size=128_256, seq_len=2048)
        with torch.device("meta"):
            model = GPT(replace(PRESETS[preset], **own, **trunk))
        batch = 2 ** (23 if moe else 21)                # 8M and 2M s-tokens
        flops = model.flops_per_position() * batch * steps
        found[name] = flops / (hours * 3600 * PEAK_FLOPS["B200"])
    return found


def parse(argv=None):
    """The training script's flags and the plan's own, defaults filled in for a GPU."""
    ours = argparse.ArgumentParser(
        description=__doc__ + "\nand every flag of train_tst.py: python train_tst.py --help",
        formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    ours.error = data.fail
    ours.add_argument("--devices", type=int, default=1, help="processes, one a GPU (default: 1)")
    ours.add_argument("--gpu", type=str.upper, choices=PEAK_FLOPS, default="H100",
                      help="(default: H100)")
    ours.add_argument("--mfu", type=float, default=0.4,
                      help="utilisation of its peak (default: 0.4)")
    ours.add_argument("--vocab-size", type=int, help="(default: that of --data, or GPT-2's)")
    ours.add_argument("--json", action="store_true", help="print one object, memory in bytes")
    ours.add_argument("--paper", action="store_true",
                      help="print the utilisations behind the paper's hours")
    plan_args, rest = ours.parse_known_args(argv)
    if plan_args.devices < 1 or not 0 < plan_args.mfu <= 1:
        data.fail("--devices is a number from 1 on, --mfu a fraction of 1")
    train_tst.WORLD = plan_args.devices                                 # as torchrun would
    args = train_tst.parse(["--device", "cuda", "--dtype", "bfloat16", *rest])
    for name, value in vars(plan_args).items():
        setattr(args, name, value)
    meta = Path(args.data) / "meta.json"                                # there now, or to come
    if args.vocab_size is None:
        builtin = VOCAB_SIZE if args.data == "data/python" else data.GPT2["vocab_size"]
        args.vocab_size = json.loads(meta.read_text())["vocab_size"] if meta.exists() else builtin
    args.micro_batch_size = train_tst.micro_batch_size(args)
    return args


def main(argv=None):
    args = parse(argv)
    found = paper() if args.paper else plan(args)
    if args.json:
        return print(json.dumps(found))
    for name, value in found.items():
        if name == "memory_per_device":
            value = ", ".join(f"{part} {size / 1e9:.2f} GB" for part, size in value.items())
        elif type(value) in (int, float):
            value = f"{value:.4g}" if value > 1e13 or type(value) is float else f"{value:,}"
        print(f"{name.replace('_', ' '):22}{value}")


if __name__ == "__main__":
    main()
