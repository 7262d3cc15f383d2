"""Pre-train a language model with Token-Superposition Training (TST, arXiv 2605.06546).

For the first r of the steps the model reads bags of s tokens (the mean of their embeddings) and
predicts the next bag (multi-hot cross-entropy): the superposition phase. Then it trains on
ordinary next tokens: the recovery phase. Same model, same optimizer, same FLOPs per step; only
the shape of a batch changes.

    python train_tst.py --s 6 --r 0.3                       # TST
    python train_tst.py --s 1                               # the baseline, by the same code path
    torchrun --nproc_per_node=8 -- train_tst.py --s 6       # eight GPUs
    python train_tst.py --s 1 --resume                      # go on where that run stopped
"""
import argparse
import json
import math
import os
import re
import shlex
import signal
import time
from dataclasses import asdict, fields
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint.state_dict as state_dicts
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from tqdm import tqdm

import data
from data import fail
from model import GPT, Config

# The presets: a model's shape and how it trains. Flags of the same names override them
TINY = dict(n_layer=3, n_embd=96, n_head=4, n_kv_head=4, n_hidden=192, seq_len=96, init_std=0.05,
    rope_theta=10_000.0, data="data/python", s=4, r=0.2, steps=2400, batch_size=32, lr=3e-3,
    warmup_steps=200, decay_frac=0.4, micro_batch_size=64, eval_tokens=200_000)
LARGE = dict(seq_len=1024, data="data/fineweb", s=6, r=0.3, steps=20_000, batch_size=512, lr=1e-3,
    warmup_steps=2000, decay_frac=0.1, micro_batch_size=16, eval_tokens=10_000_000)
PRESETS = {
    "tiny": TINY,
    "tiny-moe": dict(TINY, n_hidden=256, n_expert=8, n_active=2, qk_norm=True),
    "small": dict(LARGE, n_layer=8, n_embd=512, n_head=8, n_kv_head=8, n_hidden=1408, seq_len=512,
        steps=15_000, batch_size=128, warmup_steps=500, decay_frac=0.2, eval_tokens=1_000_000),
    "270m": dict(LARGE, n_layer=30, n_embd=768, n_head=12, n_kv_head=4, n_hidden=2048),
    "600m": dict(LARGE, n_layer=32, n_embd=1152, n_head=18, n_kv_head=6, n_hidden=3072,
        lr=5e-4, micro_batch_size=8),
    "3b": dict(LARGE, n_layer=36, n_embd=2048, n_head=16, n_kv_head=4, n_hidden=11008,
        lr=1e-4, micro_batch_size=4),
    "10b-a1b": dict(LARGE, n_layer=32, n_embd=1536, n_head=24, n_kv_head=4, n_hidden=512,
        head_dim=128, n_expert=128, n_active=8, qk_norm=True, rope_theta=50_000.0, seq_len=4096,
        s=16, r=0.25, steps=49_983, batch_size=2048, lr=3e-4, micro_batch_size=1)}
BETAS, WEIGHT_DECAY, GRAD_CLIP = (0.9, 0.95), 0.1, 1.0
PEAK_FLOPS = {"B200": 2250e12, "H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12,
              "4090": 165e12, "T4": 65e12}      # dense, 16 bits, as their makers state them
MAY_CHANGE = ("resume", "out", "data", "device", "dtype", "compile", "fsdp", "micro_batch_size",
              "eval_every", "save_every")       # when a run goes on
SHAPE = {field.name: field.default for field in fields(Config) if field.name != "vocab_size"}
WHOLE = state_dicts.StateDictOptions(full_state_dict=True, cpu_offload=True)

RANK = int(os.environ.get("RANK", 0))           # torchrun sets these
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", 0))
WORLD = int(os.environ.get("WORLD_SIZE", 1))


def parse(argv=None):
    """The flags with every default filled in. SystemExit(2) on bad input, with one line."""
    def within(low, high, kind):
        def number(text):
            if not low <= kind(text) <= high:
                raise argparse.ArgumentTypeError(f"{text}: give a number from {low} to {high:g}")
            return kind(text)
        return number

    count, natural = within(1, 1e12, int), within(0, 1e12, int)
    real, fraction = within(0, 1e12, float), within(0, 1, float)
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], allow_abbrev=False, add_help=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.error = fail                 # one line, without the usage
    flag, on_off = parser.add_argument, argparse.BooleanOptionalAction
    # These two are parsed first, since the others' defaults follow from them
    flag("--device", default=best_device(), help="cuda, cuda:1, mps or cpu")
    flag("--model", choices=PRESETS, help="a preset; small where CUDA and data/fineweb are")
    known = parser.parse_known_args(argv)[0]
    cuda = known.device.startswith("cuda")
    model = known.model or ("small" if cuda and Path("data/fineweb").exists() else "tiny")
    bfloat16 = cuda and torch.cuda.is_bf16_supported(including_emulation=False)
    dtype = "bfloat16" if bfloat16 else "float16" if cuda else "float32"
    flag("--s", type=count, help="tokens in a bag of the superposition phase; 1 is the baseline")
    flag("--r", type=fraction, help="fraction of the steps in the superposition phase")
    flag("--data", help="folder of token shards; data/python is the built-in corpus")
    flag("--steps", type=count, help="optimizer steps, both phases together")
    flag("--batch-size", type=count, help="rows of a step, all processes together")
    flag("--micro-batch-size", type=count, help="rows that a process computes at a time, at most")
    flag("--lr", type=real, help="peak learning rate; from 270m on not tuned here")
    flag("--warmup-steps", type=natural, help="of linear warmup; if not given at most steps / 10")
    flag("--decay-frac", type=fraction, help="last fraction of the steps, with linear decay to 0")
    flag("--eval-every", type=count, default=500, help="steps between evaluations, which also save")
    flag("--save-every", type=count, default=500, help="steps between checkpoints")
    flag("--seed", type=natural, default=0, help="of initial weights and data order")
    flag("--out", help="the run's folder; if None runs/MODEL-sS-rR-seedSEED")
    flag("--resume", action="store_true", help="go on with the run in --out, or start it")
    flag("--dtype", choices=("bfloat16", "float16", "float32"), default=dtype, help="of products")
    flag("--compile", action=on_off, default=cuda, help="torch.compile")
    flag("--fsdp", action=on_off, default=False, help="shard the model over the processes")
    flag("--n-layer", type=count, help="blocks")
    flag("--n-embd", type=count, help="width of the residual stream")
    flag("--n-head", type=count, help="attention heads")
    flag("--n-kv-head", type=count, help="key-value heads")
    flag("--n-hidden", type=count, help="width of the SwiGLU, or of each expert")
    flag("--n-expert", type=natural, help="experts of a layer; 0: one SwiGLU for all tokens")
    flag("--n-active", type=count, help="experts that a token uses")
    flag("--head-dim", type=natural, help="width of a head; 0: n_embd / n_head")
    flag("--qk-norm", action=on_off, help="RMSNorm of each head's queries and keys")
    flag("--rope-theta", type=real, help="base of RoPE's frequencies")
    flag("--init-std", type=real, help="of the blocks' initial weights")
    flag("--seq-len", type=count, help="l, the positions that the blocks see")
    flag("--help", action="help", help="show this")
    parser.set_defaults(**{**SHAPE, **PRESETS[model], "model": model, "warmup_steps": None})
    args = parser.parse_args(argv)

    if args.warmup_steps is None:
        args.warmup_steps = min(PRESETS[model]["warmup_steps"], args.steps // 10)
    args.r = args.r if args.s > 1 else 0.0
    args.out = args.out or f"runs/{args.model}-s{args.s}-r{args.r:g}-seed{args.seed}"
    if args.batch_size % WORLD:
        fail(f"--batch-size {args.batch_size} does not divide by the {WORLD} processes")
    if args.n_head % args.n_kv_head or (args.head_dim or args.n_embd / args.n_head) % 2:
        fail(f"--n-head {args.n_head}: --n-kv-head must divide it, and its width must be even")
    if args.n_expert and not 1 < args.n_active <= args.n_expert:    # one alone teaches no router
        fail(f"--n-active {args.n_active}: give a number from 2 to --n-expert {args.n_expert}")
    share = args.batch_size // WORLD    # rows of a step for each process, in equal micro-batches
    most = min(share, args.micro_batch_size)
    args.micro_batch_size = next(n for n in range(most, 0, -1) if share % n == 0)
    return args


def main(argv=None):
    """Train as the flags in argv say (default: the command line). SystemExit(2) on bad input."""
    args = parse(argv)
    try:
        train(args)
    except OSError as error:
        fail(f"{error.filename or args.out}: {error.strerror or error}; mend that, then the same "
             "command with --resume goes on", anywhere=True)
    except RuntimeError as error:       # CUDA has a class of its own for this, Apple's has not
        if "out of memory" not in str(error):
            raise
        fail(f"--micro-batch-size {args.micro_batch_size} does not fit on the device: halve it, or "
             "at 1 take --fsdp or a lower --seq-len", anywhere=True)
    if dist.is_initialized():           # not in a `finally`, where it waits for ranks that ended,
        dist.destroy_process_group()    # nor in `train`, where DDP is still there and may hang


def train(args):
    """The run that args, from `parse(argv)`, describe."""
    say = tqdm.write if RANK == 0 else lambda line: None

    # Device and processes
    one_each = args.device == "cuda" or WORLD > 1 and args.device.startswith("cuda")
    device = find_device(f"cuda:{LOCAL_RANK}" if one_each else args.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")              # TF32 for float32 products
    if WORLD > 1:
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(hours=1))    # saving 3B takes minutes
        torch._dynamo.config.optimize_ddp = False   # it would cut graphs, and ours are small
    low = None if args.dtype == "float32" else getattr(torch, args.dtype)
    autocast = torch.autocast(device.type, low, enabled=low is not None)
    scaler = torch.amp.GradScaler(device.type, enabled=args.dtype == "float16")     # else no-ops

    # The run's folder: new, or with a checkpoint to go on from
    out, start, checkpoint = Path(args.out), 0, None
    if args.resume and (out / "ckpt.pt").exists():
        checkpoint = load_checkpoint(out)
        start = checkpoint["step"]
        for name, value in vars(args).items():
            if name not in MAY_CHANGE and value != checkpoint["args"].get(name):
                fail(f"--{name.replace('_', '-')} {value} contradicts the run in {out}, which has "
                     f"{checkpoint['args'].get(name)}: give its flags, or another --out")
    elif not args.resume and (out / "ckpt.pt").exists():
        fail(f"--out {out} holds a run: add --resume to go on with it, or name another --out")
    if WORLD > 1:
        starts = [start] * WORLD
        dist.all_gather_object(starts, start)
        if len(set(starts)) > 1:        # each has a disk of its own
            fail(f"--out {out} is at other steps for other processes, {starts}: share a disk")
    if start >= args.steps:
        return say(f"{out} is complete, all {args.steps:,} steps: nothing to do")

    # Data
    if Path(args.data) == Path("data/python") and LOCAL_RANK == 0:
        from tools.corpus import build_python_corpus            # the one thing used of tools/
        build_python_corpus()
    if WORLD > 1:
        dist.barrier()
    train_tokens, val_tokens, meta, encoding = data.load(args.data)
    if checkpoint and checkpoint["data"]["hash"] != meta["hash"]:
        fail(f"--data {args.data} is not what the run in {out} read: restore it, or another --out")
    l, switch = args.seq_len, round(args.r * args.steps)        # the first step of recovery
    warmup, decay = max(1, args.warmup_steps), max(1, round(args.decay_frac * args.steps))
    batches = data.Batches(train_tokens, args.steps, switch, args.s, args.batch_size, l, args.seed)

    # Model
    torch.manual_seed(args.seed)
    shape = {name: getattr(args, name) for name in SHAPE}
    with device:
        model = GPT(Config(**shape, vocab_size=train_tokens.vocab_size))
    if args.compile:
        try:
            torch.compile(lambda x: (x * 2).sum())(torch.ones(8, device=device))    # a trial
            # In parts: one graph serves all blocks in both phases, and only the two small parts
            # that see s get another at the switch. In place, so that parameters keep their names
            for block in model.blocks:
                block.compile(dynamic=False)
            model.embed = torch.compile(model.embed, dynamic=False)
            model.loss = torch.compile(model.loss, dynamic=False)
        except Exception as error:      # no compiler, header or driver: each raises its own kind
            args.compile = False
            say(f"torch.compile does not work here, so this run is eager ({error!r:.200})")
    wrapped, sharded = model, args.fsdp and WORLD > 1
    if sharded:
        policy = MixedPrecisionPolicy(low, torch.float32, cast_forward_inputs=False)
        mesh = dist.device_mesh.init_device_mesh(device.type, (WORLD,))
        for part in (*model.blocks, model):                     # the rest is one part more
            fully_shard(part, mesh=mesh, mp_policy=policy)
    elif WORLD > 1:
        wrapped = torch.nn.parallel.DistributedDataParallel(    # RoPE's table is the same anyway
            model, gradient_as_bucket_view=True, broadcast_buffers=False)
    groups = [{"params": [p for p in model.parameters() if p.ndim > 1]},        # matrices decay,
              {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, args.lr, BETAS, weight_decay=WEIGHT_DECAY, fused=True)
    if checkpoint:
        state_dicts.set_state_dict(model, optimizer, options=WHOLE,
                                   model_state_dict=checkpoint["model"],
                                   optim_state_dict=checkpoint["optimizer"])
        scaler.load_state_dict(checkpoint.get("scaler") or scaler.state_dict())

    # What is about to run
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    positions = args.batch_size * l                             # of a step, whatever s is
    reads = positions * (switch * args.s + args.steps - switch)
    say(f"model   {args.model}, {sum(p.numel() for p in model.parameters()):,} parameters\n"
        f"device  {WORLD} x {gpu}, {args.dtype}, {'compiled' if args.compile else 'eager'}\n"
        f"data    {args.data}: {len(train_tokens):,} training tokens, of which it reads {reads:,}\n"
        f"phases  {switch:,} steps on bags of {args.s}, then {args.steps - switch:,} on tokens\n"
        f"run     {out}, {f'goes on after step {start:,}' if start else 'new'}")
    if batches.epochs > 1:
        say(f"tokens repeat {batches.epochs:.1f} times, and TST lives on spare data: bring more")

    # The log, a line a step, cut after the checkpoint's: what followed it comes again
    if RANK == 0:
        out.mkdir(parents=True, exist_ok=True)
        log = open(out / "metrics.jsonl", "ab", buffering=0)    # a write a line
        try:
            import fcntl
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)     # until this process ends
        except BlockingIOError:
            fail(f"--out {out}: another process trains there; stop it, or name another --out")
        except (ImportError, OSError):  # Windows and some file systems have no such locks
            pass
        steps, size = 0, 0
        for line in (out / "metrics.jsonl").read_bytes().splitlines(keepends=True):
            found = re.fullmatch(rb'{"step": (\d+),.*}\n', line)    # a power cut leaves zero bytes
            if not found or int(found[1]) > start:
                break
            steps, size = steps + 1, size + len(line)
        log.truncate(size)
        if steps < start:
            say(f"{out}/metrics.jsonl has {steps:,} of the {start:,} steps before this one")
        (out / "args.json").write_text(json.dumps(vars(args), indent=1))
        (out / "meta.json").write_text(json.dumps(meta, indent=1))
        if Path(args.data, "encoding.json").exists():
            (out / "encoding.json").write_bytes(Path(args.data, "encoding.json").read_bytes())

    # Ctrl-C, kill, a closed terminal and SLURM's warning (USR1) stop the run after a whole step
    signals = []

    def on_signal(number, frame):
        if signals and number == signal.SIGINT and WORLD == 1:  # torchrun sends each one twice
            raise SystemExit(130)
        signals.append(number)

    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"):     # Windows lacks the last two
        if hasattr(signal, name) and signal.getsignal(getattr(signal, name)) != signal.SIG_IGN:
            signal.signal(getattr(signal, name), on_signal)     # nohup has SIGHUP ignored

    peak = next((PEAK_FLOPS[name] for name in PEAK_FLOPS if name in gpu), None)
    flops = model.flops_per_position() * positions / WORLD      # of a step, for this process
    bar = tqdm(total=args.steps, initial=start, disable=None if RANK == 0 else True)
    begun, before = time.time(), checkpoint["seconds"] if checkpoint else 0.0
    say("\n   step  phase          train loss  validation loss           tokens")
    share, micro = args.batch_size // WORLD, args.micro_batch_size      # rows of a step, at a time
    for step in range(start, args.steps):
        # Forward and backward. The phase switch: bags of s tokens before it, of one from it on
        s = args.s if step < switch else 1
        loss = torch.zeros((), device=device)
        for i in range(0, share, micro):
            rows = batches.rows(step, RANK * share + i, micro)          # (micro, (l + 1) * s)
            rows = rows.pin_memory() if device.type == "cuda" else rows     # to copy without a wait
            bags = rows.to(device, non_blocking=True).view(micro, l + 1, s)
            inputs, targets = bags[:, :-1], bags[:, 1:]                 # bag j predicts bag j + 1
            wrapped.require_backward_grad_sync = i + micro == share     # DDP's: average once a step
            with autocast:
                part = wrapped(inputs, targets) / (share // micro)
            scaler.scale(part).backward()
            loss += part.detach()

        # Update
        lr = args.lr * min(1, (step + 1) / warmup, (args.steps - step) / decay)     # WSD
        for group in optimizer.param_groups:
            group["lr"] = lr
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), GRAD_CLIP)
        scaler.step(optimizer)          # in float16 not where a gradient overflowed
        scaler.update()
        optimizer.zero_grad(set_to_none=wrapped is model)       # DDP's stay views of its buckets

        # Log, evaluate, save. The numbers are read once a step, the only wait for the device
        norm = norm.full_tensor() if sharded else norm
        report = torch.stack((loss, norm, torch.full_like(loss, len(signals))))
        if WORLD > 1:
            dist.all_reduce(report)                             # all ranks stop after the same step
        mean_loss, norm, stopping = (report / WORLD).tolist()
        done, phase = step + 1, "superposition" if step < switch else "recovery"
        if not math.isfinite(mean_loss if scaler.is_enabled() else mean_loss + norm):
            fail(f"step {done:,}: loss {mean_loss}, gradient norm {norm}; start anew with a --lr "
                 f"below {args.lr:g} and another --out", status=1)
        entry = {"step": done, "phase": phase, "s": s, "loss": mean_loss, "lr": lr,
                 "val_loss": None, "val_bpb": None,
                 "tokens": positions * (done + (args.s - 1) * min(done, switch)),
                 "s_tokens": positions * done, "seconds": before + time.time() - begun}
        if done == args.steps or done % args.eval_every == 0 and not stopping:
            entry["val_loss"], entry["val_bpb"] = evaluate(
                model, val_tokens, encoding, args, device, autocast)
        if RANK == 0:
            log.write(json.dumps(entry).encode() + b"\n")
        if entry["val_loss"] or stopping or done == switch or done % args.save_every == 0:
            save(model, optimizer, scaler, args, meta, entry, done == switch)
        if entry["val_loss"]:           # * marks a loss of bags, which compares with no other
            say(f"{done:7,}  {phase:13}  {mean_loss:9.4f}{'*' if s > 1 else ' '}  "
                f"{entry['val_loss']:15.4f}  {entry['tokens']:15,}")
        rate = bar.format_dict["rate"] or 0.0                   # steps per second, smoothed
        mfu = f" MFU {rate * flops / peak:.1%}" if peak and low else ""
        bar.set_postfix_str(f"{phase} s={s} loss {mean_loss:.3f} "
                            f"{rate * positions * s:,.0f} tokens/s{mfu}", refresh=False)
        bar.update()
        if stopping:
            break

    bar.close()
    if done < args.steps:
        return say(f"stopped after step {done:,}; the same command with --resume goes on")
    say(f"\n{out} is complete\npicture    python tools/plot.py {shlex.quote(args.out)}\n"
        f"sample     python tools/sample.py {shlex.quote(args.out)}")


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


@torch.no_grad()
def evaluate(model, tokens, encoding, args, device, autocast):
    """Next-token loss on evenly spaced rows, the same in every run: nats, bits per byte."""
    l, micro = min(args.seq_len, len(tokens) - 1), args.micro_batch_size
    n = max(1, (min(len(tokens), args.eval_tokens) - 1) // l)
    starts = [i * (len(tokens) - 1 - l) // max(1, n - 1) for i in range(n)]
    sizes = {i: len(token) for token, i in encoding._mergeable_ranks.items()} if encoding else {}
    token_bytes = torch.tensor([sizes.get(i, 0.0) for i in range(tokens.vocab_size)])
    totals = torch.zeros(2, dtype=torch.float64)                # nats, bytes
    for k in range(0, n, WORLD * micro):
        group = starts[k:k + WORLD * micro]
        mine = group[RANK::WORLD] or group[:1]      # idle ranks join FSDP's calls, uncounted
        rows = tokens.rows(mine, l + 1)
        bags = rows.unsqueeze(2).to(device)                     # of one token: (rows, l + 1, 1)
        with autocast:
            mean = model(bags[:, :-1], bags[:, 1:]).item()
        if RANK < len(group):
            totals[0] += mean * len(mine) * l
            totals[1] += token_bytes[rows[:, 1:]].sum()
    if WORLD > 1:
        dist.all_reduce(totals)
    nats, n_bytes = totals.tolist()
    return nats / (n * l), (nats / n_bytes / math.log(2) if n_bytes else None)


def save(model, optimizer, scaler, args, meta, entry, at_switch):
    """Write ckpt.pt, and at the switch ckpt_switch.pt: whole tensors by their names, or nothing."""
    parameters, moments = state_dicts.get_state_dict(model, optimizer, options=WHOLE)
    if RANK > 0:
        return
    state = {"model": parameters, "optimizer": moments, "scaler": scaler.state_dict(),
             "step": entry["step"], "seconds": entry["seconds"], "args": vars(args),
             "config": asdict(model.config), "data": meta}
    temporary = Path(args.out, "ckpt.tmp")
    for name in ("ckpt_switch.pt", "ckpt.pt") if at_switch else ("ckpt.pt",):
        try:
            torch.save(state, temporary)
            os.replace(temporary, Path(args.out, name))
        except (OSError, RuntimeError) as error:    # the latter is what torch makes of a full disk
            temporary.unlink(missing_ok=True)
            raise OSError(f"{temporary} cannot be written ({error})") from error


def load_checkpoint(path):
    """The checkpoint in a run's folder, or in a file: a dict, on the CPU, by no pickled code."""
    file = Path(path, "ckpt.pt") if Path(path).is_dir() else Path(path)
    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=os.name == "posix")
    except Exception as error:          # the system, pickle, zip files and torch raise all kinds
        fail(f"{file}: no whole checkpoint of train_tst.py ({type(error).__name__}); name a run's "
             "folder, such as runs/tiny-s4-r0.2-seed0, or its ckpt_switch.pt")


if __name__ == "__main__":
    main()
