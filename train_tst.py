"""Pre-train a language model with Token-Superposition Training (TST, arXiv 2605.06546).

For the first r of the steps the model reads bags of s tokens (the mean of their embeddings) and
predicts the next bag (multi-hot cross-entropy): the superposition phase. Then it trains on
ordinary next tokens: the recovery phase. Same model, same optimizer, same FLOPs per step; only
the shape of a batch changes.

    python train_tst.py --s 6 --r 0.3                       # TST
    python train_tst.py --s 1                               # the baseline, by the same code path
    torchrun --nproc_per_node=8 -- train_tst.py             # eight GPUs
    python train_tst.py --s 1 --resume                      # go on where that run stopped
"""
import argparse
import json
import math
import os
import shlex
import shutil
import signal
import time
from dataclasses import asdict, fields
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import (StateDictOptions, get_state_dict,
                                                     set_state_dict)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import data
from data import fail
from model import GPT, PRESETS, Config, bag_weights, load_checkpoint

# What each preset of model.py trains with where no flag says otherwise.
FINEWEB = dict(data="data/fineweb", s=[6], r=0.3, steps=20_000, batch_size=512, warmup_steps=2000,
               decay_frac=0.1)
RECIPES = {
    "tiny": dict(data="data/python", s=[6], r=0.2, steps=2400, batch_size=32, lr=3e-3,
                 warmup_steps=200, decay_frac=0.4, micro_batch_size=64),
    "270m": dict(FINEWEB, lr=1e-3, micro_batch_size=16),
    "600m": dict(FINEWEB, lr=5e-4, micro_batch_size=8),
    "3b": dict(FINEWEB, lr=1e-4, micro_batch_size=4),
    "10b-a1b": dict(FINEWEB, s=[16], r=0.25, steps=49_983, batch_size=2048, lr=3e-4,
                    micro_batch_size=1),
}
RECIPES["tiny-moe"] = RECIPES["tiny"]
SHAPE = {field.name: field.type for field in fields(Config) if field.name != "vocab_size"}
MAY_CHANGE = ("resume", "out", "data", "device", "dtype", "compile", "fsdp", "micro_batch_size",
              "eval_every", "save_every")                       # when a run goes on
BETAS, WEIGHT_DECAY, GRAD_CLIP = (0.9, 0.95), 0.1, 1.0
BALANCE = 1e-3                          # of the experts' balance loss, times n_active, as Qwen3's
VAL_TOKENS = {"tiny": 200_000, "tiny-moe": 200_000}     # of an evaluation; elsewhere 10 million
PEAK_FLOPS = {"B200": 2250e12, "H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12,
              "4090": 165e12}           # dense bfloat16, as their maker states them

RANK = int(os.environ.get("RANK", 0))   # torchrun sets these
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", 0))
WORLD = int(os.environ.get("WORLD_SIZE", 1))


def main(argv=None):
    """Train as the flags in argv say (default: the command line). SystemExit(2) on bad input."""
    args = parse(argv)
    try:
        train(args, argv)
    except OSError as error:
        fail(f"{error.filename or args.out}: {error.strerror or error}; make room, or name another "
             "folder", anywhere=True)
    except KeyboardInterrupt:
        fail("interrupted before the first step; nothing is lost", status=130)
    except RuntimeError as error:       # CUDA has a class of its own for this, Apple's has not
        if "out of memory" not in str(error):
            raise
        micro = micro_batch_size(args)
        remedy = f"--micro-batch-size {micro // 2}" if micro > 1 else "--fsdp, or a lower --seq-len"
        fail(f"--micro-batch-size {micro} does not fit on the device: try {remedy}", anywhere=True)
    if dist.is_initialized():           # not in a `finally`, where it waits for ranks that ended,
        dist.destroy_process_group()    # nor in `train`, where DDP is still there and may hang


def train(args, argv=None):
    """Run the training that args, from `parse(argv)`, describe."""
    started = time.time()
    say = tqdm.write if RANK == 0 else lambda line: None

    # Device and ranks
    device = find_device(f"cuda:{LOCAL_RANK}" if args.device == "cuda" else args.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")              # TF32 for float32 products
    if WORLD > 1:
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(hours=1))    # saving 3B takes minutes
        torch._dynamo.config.optimize_ddp = False               # blocks are compiled one by one
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=args.dtype == "bfloat16")

    # The run's folder: new, or with a checkpoint to go on from
    out, start, seconds_before, checkpoint = Path(args.out), 0, 0.0, None
    if args.resume and (out / "ckpt.pt").exists():
        checkpoint = load_checkpoint(out, mmap=True)
        check_same_run(args, checkpoint["args"])
        start, seconds_before = checkpoint["step"], checkpoint["seconds"]
    elif not args.resume and ((out / "ckpt.pt").exists() or (out / "metrics.jsonl").exists()):
        fail(f"--out {out} holds a run: add --resume to go on with it, or name another --out")
    if WORLD > 1:
        starts = [start] * WORLD
        dist.all_gather_object(starts, start)
        if len(set(starts)) > 1:        # each has a disk of its own
            fail(f"--out {out}: the processes found checkpoints of steps {sorted(set(starts))} "
                 "there; name a folder on a disk that they share")
    if start >= args.steps:
        return say(f"{out} is complete, all {args.steps:,} steps: nothing to do")

    # Data
    if args.data == "data/python" and LOCAL_RANK == 0:
        from tools.corpus import build_python_corpus            # the one thing used of tools/
        build_python_corpus()
    if WORLD > 1:
        dist.barrier()
    train_tokens, val_tokens, meta, encoding = data.load(args.data)
    if checkpoint and checkpoint["data"]["hash"] != meta["hash"]:
        fail(f"--data {args.data} does not hold the data of the run in {out}; restore them, or "
             "start anew with another --out")
    phases = bag_phases(args)
    switch = args.steps - phases[-1][0]                         # the first step of recovery
    sizes = [(s_in, s_out) for steps, s_in, s_out in phases for _ in range(steps)]
    batches = data.Batches(train_tokens, phases, args.batch_size, args.seq_len, args.seed)
    share = args.batch_size // WORLD                            # rows of a step for this process
    micro = micro_batch_size(args)
    if len(val_tokens) <= args.seq_len:
        fail(f"--data {args.data}: {len(val_tokens):,} validation tokens are too few for a row of "
             f"--seq-len {args.seq_len}")

    # Model
    torch.manual_seed(args.seed)
    shape = {name: getattr(args, name) for name in SHAPE}
    config = Config(vocab_size=meta["vocab_size"], **shape)
    with device:
        model = GPT(config)
    compiled = args.compile and compiler_works(device, say)
    if compiled:
        # In place, so that the parameters keep their names. One graph serves all blocks and every
        # s, for a block sees (micro, l, d) whatever s is; another one serves the loss
        for block in model.blocks:
            block.compile(dynamic=False)
        model.normalise = torch.compile(model.normalise)
    wrapped, sharded = model, args.fsdp and WORLD > 1
    if sharded:
        low = torch.bfloat16 if args.dtype == "bfloat16" else None
        policy = MixedPrecisionPolicy(low, torch.float32, cast_forward_inputs=False)
        mesh = init_device_mesh(device.type, (WORLD,))
        for part in (*model.blocks, model):                     # the rest is one part more
            fully_shard(part, mesh=mesh, mp_policy=policy)
    elif WORLD > 1:
        wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True)

    # Optimizer
    optimizer = make_optimizer(model, args.lr)
    if checkpoint:
        set_state_dict(model, optimizer, model_state_dict=checkpoint["model"],
                       optim_state_dict=checkpoint["optimizer"],
                       options=StateDictOptions(full_state_dict=True))

    # Log
    describe(args, model, device, compiled, train_tokens, batches, phases, start, say)
    log = open_folder(out, args, meta, keep=start) if RANK == 0 else None
    positions = args.batch_size * args.seq_len                  # that the trunk sees in a step
    tokens_read = positions * sum(s_in for s_in, _ in sizes[:start])
    flops = model.flops_per_position() * positions / WORLD      # of a step, for this process
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    peak = next((PEAK_FLOPS[name] for name in PEAK_FLOPS if name in gpu), None)
    bar = tqdm(total=args.steps, initial=start, disable=None if RANK == 0 else True)
    stop = []                           # holds something after Ctrl-C or SIGTERM
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.append(True))
    begun, last_save = time.time(), f"step {start:,}" if checkpoint else "none"
    say(HEADING)

    for step in range(start, args.steps):
        # Forward and backward. The phase switch: before step `switch` bags of s tokens, (s, s),
        # from it on bags of one, (1, 1). Nothing else changes (paper: the two phases).
        s_in, s_out = sizes[step]
        weights = bag_weights(args.weighting, s_out).to(device)
        loss, load = torch.zeros((), device=device), torch.zeros(2, device=device)
        for i in range(0, share, micro):
            rows = batches.rows(step, RANK * share + i, micro)  # (micro, l * s_in + s_out)
            if device.type == "cuda":
                rows = rows.pin_memory()                        # so that the copy need not wait
            rows = rows.to(device, non_blocking=True)
            inputs, targets = data.bags(rows, s_in, s_out)      # (micro, l, s_in) and (.., s_out)
            wrapped.require_backward_grad_sync = i + micro == share     # DDP reduces once
            with autocast:
                part = wrapped(inputs, targets, weights) / (share // micro)
                part_load = model.load / (share // micro)       # of experts; zero if dense
            (part + BALANCE * config.n_active * part_load[0]).backward()
            loss += part.detach()
            load += part_load.detach()

        # Update
        lr = learning_rate(args, step)
        for group in optimizer.param_groups:
            group["lr"] = lr
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), GRAD_CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=wrapped is model)       # DDP's stay views of its buckets

        # Log, evaluate, save. The numbers are read once a step, the only wait for the device
        norm = norm.full_tensor() if sharded else norm
        report = torch.stack((loss, norm, torch.full_like(loss, len(stop)), *load))
        if WORLD > 1:
            dist.all_reduce(report)                             # all ranks stop after the same step
        mean_loss, norm, stops, balance, largest_share = (report / WORLD).tolist()
        done, tokens_read = step + 1, tokens_read + positions * s_in
        if not math.isfinite(mean_loss + norm):
            fail(f"step {done:,}: the loss is {mean_loss} and the gradient's norm {norm}; start "
                 f"anew, with a --lr below {args.lr:g} and another --out", status=1)
        seconds = seconds_before + time.time() - begun
        entry = {"step": done, "phase": "superposition" if step < switch else "recovery",
                 "s": max(s_in, s_out), "loss": mean_loss, "lr": lr, "val_loss": None,
                 "val_bpb": None, "tokens": tokens_read, "s_tokens": positions * done,
                 "seconds": seconds}
        if config.n_expert:
            entry |= {"balance": balance, "largest_share": largest_share}
        if done == args.steps or done % args.eval_every == 0 and not stops:
            entry["val_loss"], entry["val_bpb"] = evaluate(
                model, val_tokens, encoding, args, device, autocast)
            left = (args.steps - done) * (time.time() - begun) / (done - start)
            say(table_row(entry, left))
        if log:
            log.write(json.dumps(entry).encode() + b"\n")
        if entry["val_loss"] or stops or done == switch or done % args.save_every == 0:
            save(model, optimizer, args, meta, entry, out, done == switch, last_save)
            last_save = f"step {done:,}"
        rate = bar.format_dict["rate"] or 0.0                   # steps per second, smoothed
        mfu = f" MFU {rate * flops / peak:.1%}" if peak and args.dtype == "bfloat16" else ""
        bar.set_postfix_str(f"{entry['phase']} s={entry['s']} loss {mean_loss:.3f} "
                            f"{rate * positions * s_in:,.0f} tokens/s{mfu}", refresh=False)
        bar.update()

        # Stop
        if stops:
            break

    bar.close()
    if done < args.steps:
        say(f"stopped after step {done:,}; the same command with --resume goes on")
    else:
        say_what_next(args, argv, entry, time.time() - started, say)


def make_parser():
    """The flags; `parse` gives those without a default here the preset's, or what follows."""
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail                 # one line, without the usage

    def add(name, kind, text, **more):
        parser.add_argument(name, type=kind, help=text + " (default: %(default)s)", **more)

    add("--s", bag_sizes, "bag size in superposition, or several in turn, as 8,4,2; 1: baseline")
    add("--r", float, "fraction of all steps in superposition, shared evenly by the sizes of --s")
    add("--s-in", bag_sizes, "tokens averaged into one input; --s if None")
    add("--s-out", bag_sizes, "tokens that one output predicts; --s if None")
    add("--weighting", str, "of target token i: 1, 1/i (power), exp(-i), the first alone",
        choices=("uniform", "power", "exp", "first"), default="uniform")
    add("--model", str, "preset; 270m where CUDA and data/fineweb are", choices=tuple(PRESETS))
    on_off = argparse.BooleanOptionalAction
    for name, kind in SHAPE.items():
        how = {"action": on_off} if kind is bool else {"type": kind}
        parser.add_argument(as_flag(name), **how, help="shape of the model, see Config in model.py "
                                                       "(default: %(default)s)")
    add("--data", str, "folder of token shards; data/python is the built-in corpus")
    add("--steps", int, "optimizer steps, both phases together")
    add("--batch-size", int, "rows per step, all processes together")
    add("--micro-batch-size", int, "rows a process computes at a time, at most")
    add("--lr", float, "peak; from 270m on the paper's, scaled to the batch, not tuned here")
    add("--warmup-steps", int, "of linear warmup; if None the preset's, at most steps / 10")
    add("--decay-frac", float, "last fraction of the steps, with linear decay to 0")
    add("--seed", int, "of initial weights and data order", default=0)
    add("--device", str, "cuda, cuda:1, mps or cpu: the first of these that is there")
    add("--dtype", str, "of matrix products; if None bfloat16 on CUDA; weights are float32",
        choices=("bfloat16", "float32"))
    add("--out", str, "the run's folder; if None runs/MODEL-sS-rR-seedSEED")
    add("--eval-every", int, "steps between evaluations, each of which also saves", default=500)
    add("--save-every", int, "steps between checkpoints", default=500)
    parser.add_argument("--compile", action=on_off, help="torch.compile (default: on CUDA)")
    parser.add_argument("--fsdp", action=on_off, default=False, help="shard over the processes")
    parser.add_argument("--resume", action="store_true", help="go on with the run, or start it")
    return parser


def parse(argv=None):
    """The flags with every default filled in. SystemExit(2) on bad input, with one line."""
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--device", default=best_device())
    early.add_argument("--model")
    early.error = fail
    known = early.parse_known_args(argv)[0]     # these two decide what the others' defaults are
    preset = known.model or default_preset(known.device)
    recipe = RECIPES.get(preset, RECIPES["tiny"])               # an unknown one is an error below
    parser = make_parser()
    parser.set_defaults(**asdict(PRESETS.get(preset, PRESETS["tiny"])))
    parser.set_defaults(**{**recipe, "model": preset, "device": known.device, "warmup_steps": None})
    args = parser.parse_args(argv)
    del args.vocab_size                         # the data give it

    args.s_in, args.s_out = args.s_in or args.s, args.s_out or args.s
    if max(args.s_in + args.s_out) == 1:
        args.r = 0.0
    if args.warmup_steps is None:
        args.warmup_steps = min(recipe["warmup_steps"], args.steps // 10)
    on_cuda = args.device.startswith("cuda")
    if args.compile is None:
        args.compile = on_cuda
    if args.dtype is None:
        native = on_cuda and torch.cuda.is_bf16_supported(including_emulation=False)
        args.dtype = "bfloat16" if native else "float32"
    if args.out is None:
        s_in, s_out = as_text(args.s_in), as_text(args.s_out)
        bag = s_in if s_in == s_out else f"{s_in}to{s_out}"
        args.out = f"runs/{args.model}-s{bag}-r{args.r:g}-seed{args.seed}"
    check(args)
    return args


def default_preset(device):
    """270m where it has a GPU and its data, else tiny."""
    fineweb = any(Path("data/fineweb").glob("*train*.bin"))
    return "270m" if device.startswith("cuda") and fineweb else "tiny"


def check(args):
    """SystemExit(2) with one line on numbers that do not fit, alone or together."""
    may_be_zero = ("seed", "warmup_steps", "n_expert", "head_dim")
    for name, value in vars(args).items():
        low = 1 if type(value) is int and name not in may_be_zero else 0
        if type(value) in (int, float) and not low <= value < math.inf:
            fail(f"{as_flag(name)} {value}: give a number from {low} on")
    for wrong, message in (
            (args.r > 1, f"--r {args.r}: give a fraction of the steps, from 0 to 1"),
            ((args.head_dim or args.n_embd / args.n_head) % 2,
             f"--n-head {args.n_head}: --head-dim, or --n-embd / --n-head, must be an even number"),
            (0 < args.n_expert < args.n_active,
             f"--n-active {args.n_active} is more than --n-expert {args.n_expert}"),
            (args.n_head % args.n_kv_head,
             f"--n-kv-head {args.n_kv_head} does not divide --n-head {args.n_head}"),
            (args.batch_size % WORLD,
             f"--batch-size {args.batch_size} does not divide by the {WORLD} processes"),
            (len(args.s_in) != len(args.s_out),
             f"--s-in {as_text(args.s_in)}, --s-out {as_text(args.s_out)}: give as many of each"),
            (args.warmup_steps + round(args.decay_frac * args.steps) > args.steps,
             f"--warmup-steps {args.warmup_steps} and --decay-frac {args.decay_frac} are together "
             f"longer than --steps {args.steps}"),
            (WORLD > 1 and args.device.startswith("cuda:"),
             f"--device {args.device} puts all {WORLD} processes on one GPU: say --device cuda")):
        if wrong:
            fail(message)


def check_same_run(args, stored):
    """SystemExit(2) at the first flag that is not as in the run to go on with."""
    for name, value in vars(args).items():
        if name not in MAY_CHANGE and value != stored.get(name):
            fail(f"{as_flag(name)} {as_text(value)} contradicts the run in {args.out}, which has "
                 f"{as_text(stored.get(name))}: give its flags, or another --out")


def best_device():
    """The best kind of device here, by name. It touches none, since every rank asks."""
    other = "mps" if torch.backends.mps.is_available() else "cpu"
    return "cuda" if torch.cuda.is_available() else other


def find_device(name):
    """The torch.device of that name. SystemExit(2) if it is not here."""
    try:
        torch.zeros(1, device=name).item()
    except Exception:                   # torch raises a different one for each way to be missing
        fail(f"--device {name} is not on this machine: leave it out to take what is", anywhere=True)
    return torch.device(name)


def micro_batch_size(args):
    """The largest divisor of a process's share of the batch within --micro-batch-size."""
    share = args.batch_size // WORLD
    return max(n for n in range(1, min(share, args.micro_batch_size) + 1) if share % n == 0)


def bag_phases(args):
    """[(steps, s_in, s_out), ...]: superposition, one for each bag size, then recovery."""
    n = len(args.s_in)
    ends = [round(args.r * args.steps * k / n) for k in range(n + 1)] + [args.steps]
    steps = [end - begin for begin, end in zip(ends, ends[1:])]
    return list(zip(steps, [*args.s_in, 1], [*args.s_out, 1]))


def make_optimizer(model, lr):
    """AdamW with weight decay on the matrices, none on the norms' gains."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    gains = [p for p in model.parameters() if p.ndim == 1]
    return torch.optim.AdamW([{"params": matrices, "weight_decay": WEIGHT_DECAY},
                              {"params": gains, "weight_decay": 0.0}],
                             lr=lr, betas=BETAS, fused=True)


def learning_rate(args, step):
    """Of step (from 0): warmup-stable-decay (WSD), linear up, constant, linear down to 0."""
    warmup = max(1, args.warmup_steps)
    decay = max(1, round(args.decay_frac * args.steps))
    return args.lr * min(1.0, (step + 1) / warmup, (args.steps - step) / decay)


def compiler_works(device, say):
    """Whether torch.compile does here, tried on a line."""
    try:
        torch.compile(lambda x: (x * 2).sum())(torch.ones(8, device=device))
        return True
    except Exception as error:          # no compiler, header or driver: each raises its own kind
        why = f"{type(error).__name__}: {error}".splitlines()[0]
        say(f"torch.compile does not work here, so this run is eager ({why})")
        return False


@torch.no_grad()
def evaluate(model, tokens, encoding, args, device, autocast):
    """Ordinary next-token loss, whatever s is: (nats per token, bits per byte or None).

    Every run reads the same rows of l targets, spread evenly over the validation split (its
    first tokens alone would be a few dozen files) and shared out over the ranks. End-of-text
    counts as no byte; without an encoding there are no bytes.
    """
    l, micro = args.seq_len, micro_batch_size(args)
    n = (min(len(tokens), VAL_TOKENS.get(args.model, 10_000_000)) - 1) // l
    starts = [i * (len(tokens) - 1 - l) // max(1, n - 1) for i in range(n)]
    token_bytes = torch.zeros(tokens.vocab_size, dtype=torch.float64)
    for token, i in encoding._mergeable_ranks.items() if encoding else ():
        token_bytes[i] = len(token)
    totals = torch.zeros(2, dtype=torch.float64)                # nats, bytes
    for k in range(0, n, WORLD * micro):
        group = starts[k:k + WORLD * micro]
        mine = group[RANK::WORLD] or group[:1]      # with FSDP every rank takes part every time
        rows = torch.from_numpy(np.stack([tokens.read(start, l + 1) for start in mine]))
        inputs, targets = data.bags(rows.to(device), 1, 1)
        with autocast:
            mean = model(inputs, targets).item()
        if RANK < len(group):
            totals += torch.tensor([mean * targets.numel(), token_bytes[rows[:, 1:]].sum()],
                                   dtype=torch.float64)
    if WORLD > 1:
        dist.all_reduce(totals)
    nats, n_bytes = totals.tolist()
    return nats / (n * l), nats / n_bytes / math.log(2) if n_bytes else None


def open_folder(out, args, meta, keep):
    """Make the run's folder, with what sampling needs beside the checkpoint. -> its log, open.

    The log, a line a step, is cut after step `keep`, the checkpoint's: what followed comes again.
    """
    out.mkdir(parents=True, exist_ok=True)
    (out / "args.json").write_text(json.dumps(vars(args), indent=1))
    (out / "meta.json").write_text(json.dumps(meta, indent=1))
    encoding = Path(args.data, "encoding.json")
    if encoding.exists():
        shutil.copy(encoding, out)
    path = out / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    lines = [line for line in lines if line.endswith(b"}\n") and json.loads(line)["step"] <= keep]
    path.with_suffix(".tmp").write_bytes(b"".join(lines))
    os.replace(path.with_suffix(".tmp"), path)
    return open(path, "ab", buffering=0)                        # a write a line


def save(model, optimizer, args, meta, entry, out, at_switch, last_save):
    """Write ckpt.pt, and at the switch ckpt_switch.pt, by rank 0: whole, or not at all.

    Whole tensors under their names, however the processes share them: any number can resume.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    parameters, moments = get_state_dict(model, optimizer, options=options)
    if RANK > 0:
        return
    state = {"model": parameters, "optimizer": moments, "step": entry["step"],
             "seconds": entry["seconds"], "args": vars(args), "config": asdict(model.config),
             "data": meta}
    temporary = out / "ckpt.tmp"
    try:
        torch.save(state, temporary)
        os.replace(temporary, out / "ckpt.pt")
        if at_switch:                   # a second name for the same file: writing 3B takes minutes
            (out / "ckpt_switch.pt").unlink(missing_ok=True)
            try:
                os.link(out / "ckpt.pt", out / "ckpt_switch.pt")
            except OSError:             # a disk without links
                shutil.copyfile(out / "ckpt.pt", out / "ckpt_switch.pt")
    except (OSError, RuntimeError) as error:        # torch raises the latter on a full disk
        temporary.unlink(missing_ok=True)
        reason = str(error).splitlines()[0]
        fail(f"{out}/ckpt.pt cannot be written ({reason}); last checkpoint: {last_save}; make "
             "room, then the same command with --resume")


def describe(args, model, device, compiled, tokens, batches, phases, start, say):
    """The block that a run starts with."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    reads = args.batch_size * args.seq_len * sum(steps * s_in for steps, s_in, _ in phases)
    n_parameters = sum(p.numel() for p in model.parameters())
    default = default_preset(args.device)
    found = "with" if default == "270m" else "without"
    why = f", the default {found} CUDA and data/fineweb" if args.model == default else ""
    say(f"model   {args.model}, {n_parameters:,} parameters{why}")
    say(f"device  {WORLD} x {name}, {args.dtype}, {'compiled' if compiled else 'eager'}")
    say(f"data    {args.data}: {len(tokens):,} training tokens, of which it reads {reads:,}")
    say(f"phases  {[phase for phase in phases if phase[0]]}: steps, s_in, s_out")
    say(f"run     {args.out}, {f'goes on after step {start:,}' if start else 'new'}")
    if batches.epochs > 1:
        say(f"tokens repeat, in {batches.epochs:.1f} epochs, and TST lives on spare data: --steps "
            f"{int(0.99 * args.steps / batches.epochs)} stays within one")


HEADING = ("\n   step  phase          train loss  validation loss  bits per byte           tokens"
           "  time left\n" + 88 * "-")


def table_row(entry, left):
    """A line under HEADING; left in seconds. A * marks a loss over bags, which does not compare."""
    mark = "*" if entry["s"] > 1 else " "
    bpb = f"{entry['val_bpb']:.4f}" if entry["val_bpb"] else "-"
    return (f"{entry['step']:7,}  {entry['phase']:13}  {entry['loss']:9.4f}{mark}  "
            f"{entry['val_loss']:15.4f}  {bpb:>13}  {entry['tokens']:15,}  "
            f"{str(timedelta(seconds=round(left))):>9}")


def say_what_next(args, argv, entry, seconds, say):
    """Where the run is, and three commands: the run to compare it with, a picture, a sample."""
    tst = max(args.s_in + args.s_out) > 1
    method = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for flag in ("--s", "--r", "--s-in", "--s-out", "--weighting", "--out"):
        method.add_argument(flag)
    others = [word for word in method.parse_known_args(argv)[1] if word != "--resume"]
    words = [*(["--s", "1"] if tst else []), *others]
    say(f"\n{args.out}: validation loss {entry['val_loss']:.4f} nats per token, after "
        f"{entry['tokens']:,} tokens in {seconds:.0f} s")
    say(f"{'baseline' if tst else 'TST':11}python train_tst.py {shlex.join(words)}")
    say(f"picture    python tools/plot.py {args.out} {parse(words).out}")
    say(f"sample     python tools/sample.py {args.out} --prompt 'import '")


def as_flag(name):
    return "--" + name.replace("_", "-")


def as_text(value):
    """A value as its flag takes it: a list is 8,4,2."""
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def bag_sizes(text):
    """An argparse type: 6, or several sizes with commas between them, as a list."""
    sizes = [int(part) for part in text.split(",")]
    if min(sizes) < 1:
        raise argparse.ArgumentTypeError(f"{text}: bags have at least one token")
    return sizes


if __name__ == "__main__":
    main()
