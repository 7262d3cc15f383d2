"""Pre-train a language model with Token-Superposition Training (TST, arXiv 2605.06546).

For the first r of the steps the model reads bags of s tokens (the mean of their
embeddings) and predicts the next bag (multi-hot cross-entropy): the superposition
phase. Then it trains on ordinary next tokens: the recovery phase. Same model, same
optimizer, same FLOPs per step; only the shape of a batch changes.

    python train_tst.py --s 6 --r 0.3                       # TST
    python train_tst.py --s 1                               # the baseline, by the same code path
    torchrun --nproc_per_node=8 train_tst.py                # eight GPUs
    python train_tst.py --resume runs/tiny-s6-r0.3-seed0    # go on where a run stopped
"""
import argparse
import contextlib
import itertools
import json
import math
import os
import shlex
import signal
import sys
import time
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import data
from data import fail
from model import GPT, PRESETS, bag_weights, best_device, find_device, load_checkpoint, run_folder

S = 6                                   # the paper's for its 270M to 3B
# What each preset trains with where no flag says otherwise; batch_size counts sequences per optimizer step.
LARGE = dict(r=0.3, steps=20_000, batch_size=512, seq_len=1024, warmup_steps=2000, decay_frac=0.1)
RECIPES = {
    "tiny": dict(r=0.2, steps=3500, batch_size=32, seq_len=96, lr=3e-3, warmup_steps=200, decay_frac=0.4),
    "270m": dict(LARGE, lr=1e-3),
    "600m": dict(LARGE, lr=5e-4),
    "3b": dict(LARGE, lr=1e-4),
}
MAX_MICRO_BATCH = {"tiny": 64, "270m": 16, "600m": 8, "3b": 4}
MAX_VAL_TOKENS = {"tiny": 200_000, "270m": 10_000_000, "600m": 10_000_000, "3b": 10_000_000}
BETAS, WEIGHT_DECAY, GRAD_CLIP = (0.9, 0.95), 0.1, 1.0
PEAK_FLOPS = {"B200": 2250e12, "H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}
SHAPE_FLAGS = ("n_layer", "n_embd", "n_head", "n_kv_head", "n_hidden", "init_std")
FREE_ON_RESUME = ("resume", "out", "data", "device", "dtype", "compile", "fsdp", "checkpoint_activations",
                  "micro_batch_size", "eval_every", "save_every")
RANK, LOCAL_RANK, WORLD = (int(os.environ.get(name, default)) for name, default                # torchrun sets them
                           in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)))


def main(argv=None):
    """Train as the flags in argv say (default: the command line). SystemExit(2) on bad input."""
    args, checkpoint = parse(argv)
    try:
        train(args, checkpoint)
    except OSError as error:
        fail(f"{error.filename or args.out or 'disk'}: {error.strerror or error}; make room, or name another folder")
    except KeyboardInterrupt:
        fail("interrupted before the first step; nothing is lost", status=130)
    except torch.OutOfMemoryError:
        micro = micro_batch_size(args)
        smaller = max((n for n in range(1, micro) if micro % n == 0), default=None)
        fail(f"--micro-batch-size {micro} does not fit on the device: try "
             + (f"--micro-batch-size {smaller}" if smaller else "--checkpoint-activations, or --fsdp"), anywhere=True)
    if dist.is_initialized():           # not in a `finally`, which would wait for the other ranks where one failed
        dist.destroy_process_group()


def train(args, checkpoint=None):
    """Run the training that args (from `parse`) describe, from checkpoint (of `--resume`) on if there is one."""
    started = time.time()
    say = tqdm.write if RANK == 0 else lambda line: None
    device = own_device(args)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")                      # TF32 for float32 products
    if WORLD > 1:
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(hours=1))    # a checkpoint of 3B takes minutes
        torch._dynamo.config.optimize_ddp = False                       # blocks are compiled one by one; do not split
    say("flags in force: " + shlex.join(as_flags(vars(args))))

    # Data
    keep = checkpoint and Path(args.data).exists()                      # a rebuilt corpus would be another
    if Path(args.data) == data.PYTHON_CORPUS and LOCAL_RANK == 0 and not keep:
        data.build_python_corpus()
    if WORLD > 1:
        dist.barrier()
    train_tokens, val_tokens, meta, encoding = data.load(args.data)
    if checkpoint and checkpoint["data"]["hash"] != meta["hash"]:
        fail(f"--resume {args.resume}: {args.data} no longer holds the data of this run; restore them or start anew")
    phases = bag_phases(args)
    switch_step = args.steps - phases[-1][0]
    sizes = [(s_in, s_out) for steps, s_in, s_out in phases for _ in range(steps)]      # of the bags of each step
    batches = data.Batches(train_tokens, phases, args.batch_size, args.seq_len, args.seed)
    say(describe(args, phases, train_tokens, batches, encoding, meta))
    share, micro = args.batch_size // WORLD, micro_batch_size(args)
    accumulation = share // micro

    def fetch(k):
        """Micro-batch k of the run on the device: this process's (micro, l * s_in + s_out) tokens."""
        step, i = divmod(k, accumulation)
        if step == args.steps:
            return None
        rows = batches.rows(step, RANK * share + i * micro, micro)
        return rows.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else rows.to(device)

    # Model and optimizer
    torch.manual_seed(args.seed)
    with device:
        model = GPT(replace(PRESETS[args.model], vocab_size=meta["vocab_size"], seq_len=args.seq_len,
                            **{name: getattr(args, name) for name in SHAPE_FLAGS}))
    model.checkpoint_activations = args.checkpoint_activations
    if args.compile and compiler_works(device, say):
        for block in model.blocks:                                      # in place, so the parameters keep their names;
            block.compile(dynamic=False)                                # all share one graph, which never sees a bag
    wrapped, sharded = model, args.fsdp and WORLD > 1
    if sharded:
        low = args.dtype == "bfloat16"
        policy = MixedPrecisionPolicy(torch.bfloat16 if low else None, torch.float32, cast_forward_inputs=False)
        mesh = init_device_mesh(device.type, (WORLD,))
        for part in (*model.blocks, model):                             # the rest of the model is one part more
            fully_shard(part, mesh=mesh, mp_policy=policy)
    elif WORLD > 1:
        wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True)
    optimizer = make_optimizer(model, args.lr)
    start, seconds_before = 0, 0.0
    if checkpoint:
        set_state_dict(model, optimizer, model_state_dict=checkpoint["model"], optim_state_dict=checkpoint["optimizer"],
                       options=StateDictOptions(full_state_dict=True))
        start, seconds_before = checkpoint["step"], checkpoint["seconds"]
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=args.dtype == "bfloat16")

    # Validation, log, progress bar, checkpoints
    evaluate = validation(val_tokens, args, encoding, device)
    out = log = None
    if RANK == 0:
        out = run_folder(args.resume) if checkpoint else make_folder(args, meta, encoding)
        log = open_log(out / "metrics.jsonl", keep=start)
    last_save = f"the last good checkpoint is {args.resume}" if checkpoint else "there is no checkpoint yet"
    bar = tqdm(total=args.steps, initial=start, disable=None if RANK == 0 else True)
    positions = args.batch_size * args.seq_len                          # that the trunk sees in a step
    flops, peak = model.flops_per_token() * positions / WORLD, peak_flops(device, args.dtype)
    val_loss = None

    def save(entry, *names):
        """Whole tensors under their names, whatever the processes share: any number of them can resume."""
        nonlocal last_save
        whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
        parameters, moments = get_state_dict(model, optimizer, options=whole)
        if RANK > 0:
            return
        state = {"model": parameters, "optimizer": moments, "step": entry["step"], "seconds": entry["seconds"],
                 "args": vars(args), "config": asdict(model.config), "data": meta}
        for name in names:
            temporary = out / f"{name}.tmp"
            try:
                torch.save(state, temporary)
                os.replace(temporary, out / name)                       # whole, or not at all
            except (OSError, RuntimeError) as error:                    # torch raises the latter on a full disk
                temporary.unlink(missing_ok=True)
                fail(f"{out / name} cannot be written ({str(error).splitlines()[0]}); {last_save}; make room, then "
                     f"--resume {out}")
            last_save = f"the last good checkpoint is {out / name}, of step {entry['step']:,}"

    def write(entry, read):
        entry["loss"], norm = read()
        if not math.isfinite(entry["loss"] + norm):
            fail(f"step {entry['step']:,}: the loss is {entry['loss']} and the gradient's norm {norm}; try a --lr "
                 f"below {args.lr:g}; {last_save}", status=1)
        if log:
            log.write(json.dumps(entry).encode() + b"\n")
        rate = bar.format_dict["rate"] or 0.0                           # steps per second, smoothed
        parts = [f"{entry['phase']} s={entry['s']} loss {entry['loss']:.3f}", val_loss and f"val {val_loss:.3f}",
                 f"{rate * positions * s_in:,.0f} tokens/s", peak and f"MFU {rate * flops / peak:.1%}"]
        bar.set_postfix_str(" ".join(filter(None, parts)), refresh=False)

    # The loop
    flag, begun = stop_flag(), time.time()
    weights = pending = None
    tokens = positions * sum(s_in for s_in, _ in sizes[:start])
    rows = fetch(start * accumulation)
    for step in range(start, args.steps):
        s_in, s_out = sizes[step]                                       # (s, s), and (1, 1) after the phase switch
        if step == start or s_out != sizes[step - 1][1]:
            weights = bag_weights(args.weighting, s_out).to(device)
        if step > start and batches.epoch(step) > batches.epoch(step - 1):
            say(f"step {step + 1:,}: this phase has used up its data; its epoch {batches.epoch(step) + 1} begins")
        lr = learning_rate(args, step)
        for group in optimizer.param_groups:
            group["lr"] = lr
        loss = torch.zeros((), device=device)
        for i in range(accumulation):
            more = i < accumulation - 1
            with wrapped.no_sync() if more and wrapped is not model else contextlib.nullcontext():
                inputs, targets = data.bags(rows, s_in, s_out)          # (B, l, s_in), (B, l, s_out)
                with autocast:
                    part = wrapped(inputs, targets, weights) / accumulation
                part.backward()
            loss += part.detach()
            rows = fetch(step * accumulation + i + 1)                   # while the device still computes
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), GRAD_CLIP)
        optimizer.step()
        optimizer.zero_grad()
        stop = flag.clone()
        if WORLD > 1:
            dist.all_reduce(loss)
            dist.all_reduce(stop, op=dist.ReduceOp.MAX)                 # all ranks stop after the same step
        read = read_later(torch.stack((loss / WORLD, norm.full_tensor() if sharded else norm)))

        if pending:
            write(*pending)         # the step before this one's, whose loss has arrived: the device never waits
        done, tokens = step + 1, tokens + positions * s_in
        entry = {"step": done, "phase": "superposition" if step < switch_step else "recovery", "s": max(s_in, s_out),
                 "loss": None, "lr": lr, "val_loss": None, "val_bpb": None, "tokens": tokens,
                 "s_tokens": positions * done, "seconds": seconds_before + time.time() - begun}
        pending = (entry, read)
        stopping = bool(stop)
        evaluating = done == args.steps or done % args.eval_every == 0 and not stopping
        if evaluating or stopping or done == switch_step or done % args.save_every == 0:
            if evaluating:
                val_loss, entry["val_bpb"] = evaluate(model, autocast)
                entry["val_loss"] = val_loss
            write(*pending)
            pending = None
            save(entry, *["ckpt_switch.pt"] * (done == switch_step), "ckpt.pt")     # a kill between repeats both
            if evaluating:
                say(f"step {done:,}  {entry['phase']} s={entry['s']}  loss {entry['loss']:.4f}  {bits(entry)}  "
                    f"{entry['tokens']:,} tokens  {entry['seconds']:.0f} s")
        bar.update()
        if stopping:
            break
    bar.close()

    # The end
    if done < args.steps:
        return say(f"stopped after step {done:,}; go on with: python train_tst.py --resume {out}")
    say(f"{out}: validation loss {bits(entry)} after {entry['tokens']:,} tokens in {entry['seconds']:.0f} s "
        f"({time.time() - started:.0f} s with start-up); peak memory {peak_memory(device) / 2 ** 30:.2f} GiB; "
        f"checkpoint {out}/ckpt.pt")
    if args.model == "tiny":
        say("on tiny TST ended below the baseline with every seed at --r 0.2, the default, but not at --r 0.3: Results "
            "in README.md")
    other = {"s": 1} if switch_step else {"s": S}
    same = {name: args.given[name] for name in args.given if name not in ("s", "r", "s_in", "s_out", "out", "resume")}
    say(f"{'the baseline' if switch_step else 'TST'}, to compare: python train_tst.py "
        + shlex.join(as_flags({**other, **same})))
    if encoding:
        with torch.compiler.set_stance("force_eager"):                  # every length would compile anew
            ids = list(model.generate([encoding.eot_token], 100, generator=torch.Generator().manual_seed(args.seed)))
        say("a sample:\n" + encoding.decode(ids, errors="replace"))


def parse(argv=None):
    """The flags with every default filled in, and the checkpoint to continue or None. SystemExit(2) on bad input."""
    parser = make_parser()
    given = vars(parser.parse_known_args(argv)[0])                      # what the command line says, and nothing else
    checkpoint = resume = None
    if "resume" in given:
        auto = given["resume"] == "auto"
        if auto and "out" not in given:
            fail("--resume auto continues or starts the run in --out: name that folder")
        resume = given["out"] if auto else given["resume"]
        if Path(given.get("out", resume)) not in (Path(resume), run_folder(resume)):
            fail(f"--out {given['out']}: --resume {resume} goes on in the run's own folder; leave --out out")
    if resume and (not auto or (Path(resume) / "ckpt.pt").exists()):
        checkpoint = load_checkpoint(resume, mmap=True)
        stored = checkpoint["args"]
        for name in given.keys() - set(FREE_ON_RESUME):
            if given[name] != stored.get(name):
                fail(f"--{name.replace('_', '-')} {joined(given[name])} contradicts the run in {resume}, which has "
                     f"{joined(stored.get(name))}; leave it out, or start a new run")
    flags = stored if checkpoint else {"given": given, **default_flags(given)}
    parser.set_defaults(**{name: joined(value) for name, value in flags.items()})
    parser.add_argument("-h", "--help", action="help", help="show this message: the defaults are those of --model")
    args = parser.parse_args([*as_flags(flags), *(sys.argv[1:] if argv is None else argv)])     # later ones win
    args.resume = resume if checkpoint else None
    taken = not resume and args.out and (Path(args.out) / "metrics.jsonl").exists()
    check(args, taken)
    if checkpoint and checkpoint["step"] >= args.steps:
        fail(f"--resume {resume}: the run is complete, all {args.steps} steps; start a new one",
             status=0 if auto else 2)
    return args, checkpoint


def default_flags(given):
    """Every flag's value, {name: value}, those given among them; some follow from others."""
    best = best_device()
    fineweb = best != "cpu" and any(Path("data/fineweb").glob("*train*.bin"))
    flags = {"device": best, "data": "data/fineweb" if fineweb else str(data.PYTHON_CORPUS), **given}
    flags = {"model": "tiny" if Path(flags["data"]) == data.PYTHON_CORPUS else "270m", **flags}
    cuda, recipe = flags["device"].startswith("cuda"), RECIPES[flags["model"]]
    shape = {name: getattr(PRESETS[flags["model"]], name) for name in SHAPE_FLAGS}
    flags = {**recipe, **shape, "s": [S], "weighting": "uniform", "seed": 0, "compile": cuda, "fsdp": False,
             "checkpoint_activations": False, "micro_batch_size": None, "eval_every": 500, "save_every": 500,
             "out": None, "resume": None, "dtype": "bfloat16" if cuda and has_bfloat16() else "float32", **flags}
    flags = {"s_in": flags["s"], "s_out": flags["s"], **flags}
    superposed, sizes = max(flags["s_in"] + flags["s_out"]) > 1, len(flags["s_in"])
    warmup_steps = min(recipe["warmup_steps"], flags["steps"] // 10)
    r = sizes * [recipe["r"] / sizes if superposed else 0.0]
    return {**flags, "r": r, "warmup_steps": warmup_steps, **given}


def check(args, taken):
    """What no single flag can know; taken: --out holds a run that is not continued. SystemExit(2) with one line."""
    own_device(args)
    one_gpu = WORLD > 1 and args.device.startswith("cuda:")
    each, decay_steps = args.batch_size // WORLD, round(args.decay_frac * args.steps)
    for wrong, message in (
        (args.n_embd % args.n_head or args.n_embd // args.n_head % 2,
         f"--n-head {args.n_head} does not divide --n-embd {args.n_embd} into heads of even width"),
        (args.n_head % args.n_kv_head, f"--n-kv-head {args.n_kv_head} does not divide --n-head {args.n_head}"),
        (one_gpu, f"--device {args.device} puts all {WORLD} processes on one GPU: say --device cuda"),
        (args.batch_size % WORLD, f"--batch-size {args.batch_size} does not divide by the {WORLD} processes"),
        (args.micro_batch_size and each % args.micro_batch_size,
         f"--micro-batch-size {args.micro_batch_size} does not divide the {each} sequences of a process"),
        (len(args.s_in) != len(args.s_out), f"--s-in {joined(args.s_in)} and --s-out {joined(args.s_out)}: give as "
         "many sizes of input bags as of output bags"),
        (len(args.r) != len(args.s_in), f"--r {joined(args.r)}: give as many fractions as bag sizes, {len(args.s_in)}"),
        (round(sum(args.r) * args.steps) > args.steps, f"--r {joined(args.r)}: together more than the whole run"),
        (args.warmup_steps + decay_steps > args.steps, f"--warmup-steps {args.warmup_steps} and --decay-frac "
         f"{args.decay_frac} ({decay_steps} steps) are longer than --steps {args.steps}"),
        (taken, f"--out {args.out} holds a run: continue it with --resume {args.out}, or name another folder"),
    ):
        if wrong:
            fail(message)


def own_device(args):
    """This process's torch.device: a GPU has an index, which torch wants, and under torchrun each its own."""
    return find_device(f"cuda:{LOCAL_RANK}" if args.device == "cuda" else args.device)


def micro_batch_size(args):
    """--micro-batch-size, or the largest divisor of a process's share of the batch within the preset's limit."""
    share = args.batch_size // WORLD
    limit = min(share, MAX_MICRO_BATCH[args.model])
    return args.micro_batch_size or max(n for n in range(1, limit + 1) if share % n == 0)


def bag_phases(args):
    """[(steps, s_in, s_out), ...]: the superposition phase, one for each bag size, and the recovery phase."""
    superposed = max(args.s_in + args.s_out) > 1
    ends = [round(r * args.steps) * superposed for r in itertools.accumulate(args.r, initial=0)]
    steps = [end - start for start, end in itertools.pairwise([*ends, args.steps])]
    return list(zip(steps, [*args.s_in, 1], [*args.s_out, 1]))


def joined(value):
    """A list as its flag takes it, 8,4,2; another value as it is."""
    return ",".join(map(str, value)) if isinstance(value, list) else value


def as_flags(values):
    """{name: value} as a list of words; None and what is no flag, a dict, are left out."""
    words = []
    for name, value in values.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        elif value is not None and not isinstance(value, dict):
            words += [f"--{flag}", str(joined(value))]
    return words


def make_optimizer(model, lr):
    """AdamW with weight decay on the matrices, none on the norms' gains."""
    matrices, gains = ([p for p in model.parameters() if (p.ndim == 2) == is_matrix] for is_matrix in (True, False))
    return torch.optim.AdamW([{"params": matrices, "weight_decay": WEIGHT_DECAY},
                              {"params": gains, "weight_decay": 0.0}], lr=lr, betas=BETAS, fused=True)


def learning_rate(args, step):
    """Of step (from 0): warmup-stable-decay (WSD), linear up, constant, linear down to 0 over the last decay_frac."""
    warmup, decay = max(1, args.warmup_steps), max(1, round(args.decay_frac * args.steps))
    return args.lr * min(1.0, (step + 1) / warmup, (args.steps - step) / decay)


def describe(args, phases, tokens, batches, encoding, meta):
    """What the run will read, what it does without, and what to type for something else."""
    positions = args.batch_size * args.seq_len
    builtin = Path(args.data) == data.PYTHON_CORPUS
    more, stem = "", tokens.files[0].name.split("_")[0]
    needed = math.ceil(batches.epochs * len(tokens) / data.SHARD_TOKENS)
    if needed <= max(data.FINEWEB.get(stem, [0])):
        repo = meta.get("repo", data.fineweb_repo(stem, 1))
        out = args.data if repo == data.fineweb_repo(stem, needed) else f"{args.data}-100B"
        more = (f", or get all it needs: python data.py fineweb --shards {needed}" + " --edu" * (stem == "finewebedu")
                + f" --out {out}")
    lines = (
        (True, f"{args.model} on {args.data}: of {len(tokens):,} training tokens it reads "
         f"{sum(steps * s_in for steps, s_in, _ in phases[:-1]) * positions:,} in the superposition phase and "
         f"{phases[-1][0] * positions:,} in the recovery phase, {batches.epochs:.2f} epochs"),
        (batches.epochs > 1, "above one epoch tokens repeat, and TST lives on spare data: --steps "
         f"{int(0.99 * args.steps / batches.epochs)} stays within one{more}"),
        (builtin, "for your own shards: python train_tst.py --model 270m --data FOLDER"),
        (not builtin, f"for the built-in corpus: python train_tst.py --data {data.PYTHON_CORPUS}"),
        (not (Path(args.data) / "meta.json").exists(), f"{args.data} names no tokenizer: GPT-2's is assumed"),
        (encoding is None, "its tokenizer is neither here nor to be downloaded: no bits per byte, no sample"),
        (args.device.startswith("cuda") and not has_bfloat16(), f"no native bfloat16 here: {args.dtype} is in force"),
    )
    return "\n".join(line for true, line in lines if true)


def has_bfloat16():
    return torch.cuda.is_bf16_supported(including_emulation=False)


def compiler_works(device, say):
    """Whether torch.compile does on every rank, tried on two lines."""
    works, why = 1, "not on another rank"
    try:
        torch.compile(lambda x: (x * 2).sum())(torch.ones(8, device=device))
    except Exception as error:                  # no compiler, header or driver: each raises a kind of its own
        works, why = 0, f"{type(error).__name__}: {error}".splitlines()[0]
    works = torch.tensor(works)
    if dist.is_initialized():
        dist.all_reduce(works, op=dist.ReduceOp.MIN)
    if not works:
        say(f"torch.compile does not work here, so this run is eager ({why})")
    return bool(works)


def validation(tokens, args, encoding, device):
    """A function (model, autocast) -> ordinary next-token loss in nats per token, and bits per byte.

    It reads the same tokens in every run, whatever s is, in rows of l shared out over the
    ranks: the whole split, or rows spread evenly over it up to the preset's cap. (The first
    tokens alone would be a few dozen files.) End-of-text counts as no byte; without an
    encoding the bits are None. SystemExit(2) if the split is shorter than a row.
    """
    l = args.seq_len
    n = (min(len(tokens), MAX_VAL_TOKENS[args.model]) - 1) // l
    if n < 1:
        fail(f"--data {args.data}: {len(tokens):,} validation tokens are too few for a row of --seq-len {l}")
    starts = [i * (len(tokens) - 1 - l) // max(1, n - 1) for i in range(n)]
    micro, size = micro_batch_size(args), None
    if encoding:
        lengths = np.zeros(tokens.vocab_size)
        for token, i in encoding._mergeable_ranks.items():
            lengths[i] = len(token)
        size = sum(lengths[tokens.read(start + 1, l)].sum() for start in starts)

    @torch.no_grad()
    def evaluate(model, autocast):
        total = torch.zeros((), dtype=torch.float64)
        for k in range(0, n, WORLD * micro):
            group = starts[k:k + WORLD * micro]
            mine = group[RANK::WORLD] or group[:1]                      # with FSDP every rank takes part every time
            rows = np.stack([tokens.read(start, l + 1) for start in mine])
            inputs, targets = data.bags(torch.from_numpy(rows).to(device), 1, 1)
            with autocast:
                total += model(inputs, targets).item() * targets.numel() * (RANK < len(group))
        if WORLD > 1:
            dist.all_reduce(total)
        return total.item() / (n * l), total.item() / size / math.log(2) if encoding else None

    return evaluate


def bits(entry):
    bpb = entry["val_bpb"]
    return f"{entry['val_loss']:.4f} nats per token" + (f", {bpb:.4f} bits per byte" if bpb else "")


def make_folder(args, meta, encoding):
    """Create the run's folder with all that sampling and resuming need beside the checkpoint."""
    bag = joined(args.s_in) if args.s_in == args.s_out else f"{joined(args.s_in)}to{joined(args.s_out)}"
    name = f"runs/{args.model}-s{bag}-r{joined([f'{r:g}' for r in args.r])}-seed{args.seed}"
    for out in [args.out] if args.out else (name + f"-{k}" * (k > 1) for k in itertools.count(1)):
        out = Path(out)
        try:
            out.mkdir(parents=True, exist_ok=bool(args.out))
            break
        except FileExistsError:
            if args.out:
                fail(f"--out {out} is a file; name a folder")
    (out / "args.json").write_text(json.dumps(vars(args), indent=1))
    (out / "meta.json").write_text(json.dumps(meta, indent=1))
    if encoding:
        data.save_encoding(encoding, out)
    return out


def open_log(path, keep):
    """Open metrics.jsonl for appending, one write a line, cut back to its first `keep` lines (one a step)."""
    lines = path.read_bytes().splitlines(keepends=True)[:keep] if path.exists() else []
    temporary = path.with_suffix(".tmp")
    temporary.write_bytes(b"".join(lines))
    os.replace(temporary, path)
    return open(path, "ab", buffering=0)


def stop_flag():
    """A tensor that Ctrl-C or SIGTERM sets to 1. One that comes over 5 seconds later ends the process at once."""
    flag, first = torch.zeros((), dtype=torch.int32), []

    def handler(number, frame):
        flag.fill_(1)
        first.append(time.time())               # launchers may send several for one
        if first[-1] - first[0] > 5:
            raise SystemExit(128 + number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handler)
    return flag


def read_later(tensor):
    """Start copying a small tensor to the host; the function returned waits for that copy alone and gives a list."""
    if tensor.device.type != "cuda":
        values = tensor.tolist()
        return lambda: values
    host, arrived = tensor.to("cpu", non_blocking=True), torch.cuda.Event()
    arrived.record()

    def read():
        arrived.synchronize()
        return host.tolist()

    return read


def peak_flops(device, dtype):
    """Dense bfloat16 FLOP/s of the GPU as its maker states them, or None."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" and dtype == "bfloat16" else ""
    return next((peak for gpu, peak in PEAK_FLOPS.items() if gpu in name), None)


def peak_memory(device):
    """Bytes that this process has held at most: on CUDA of the GPU's memory, else of the machine's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource                             # not on Windows
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def number(kind, low, high=math.inf):
    """An argparse type: a finite number from low to high."""
    def parse_number(text):
        value = kind(text)
        if not low <= value <= high or math.isinf(value):
            raise argparse.ArgumentTypeError(f"{text} is not a number from {low}" + f" to {high}" * (high < math.inf))
        return value

    parse_number.__name__ = kind.__name__       # for argparse's "invalid int value: 'x'"
    return parse_number


def several(kind):
    """An argparse type: such values with commas between them, as a list."""
    def parse_several(text):
        return [kind(part) for part in text.split(",")]

    parse_several.__name__ = kind.__name__
    return parse_several


def make_parser():
    """The flags, without their defaults, which `parse` fills in."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False, add_help=False, argument_default=argparse.SUPPRESS)
    parser.error = fail                         # one line, without the usage
    count, whole, share = number(int, 1), number(int, 0, 2 ** 63 - 1), number(float, 0, 1)
    for name, kind, text in (
        ("s", several(count), "bag size of the superposition phase, or several one after the other, as in 8,4; 1 is "
         "the baseline"),
        ("r", several(share), "fraction of the steps in the superposition phase, one for each bag size"),
        ("s-in", several(count), "tokens averaged into one input, s unless given"),
        ("s-out", several(count), "tokens that one output predicts, s unless given"),
        ("weighting", ("uniform", "power", "exp", "first"), "of a target's tokens: 1, 1/i, exp(-i), first alone"),
        ("model", tuple(PRESETS), "preset: tiny on the built-in corpus, else 270m, unless given"),
        ("n-layer", count, "layers"), ("n-embd", count, "width"), ("n-head", count, "query heads"),
        ("n-kv-head", count, "key-value heads"), ("n-hidden", count, "width of the SwiGLU"),
        ("init-std", number(float, 0), "standard deviation of the blocks' initial weights; 0.02 that of the tables"),
        ("data", str, f"folder of token shards: {data.PYTHON_CORPUS} is the built-in corpus; data/fineweb is the "
         "default where that and an accelerator are there"),
        ("steps", count, "optimizer steps, both phases together"),
        ("batch-size", count, "sequences per step over all processes"),
        ("micro-batch-size", count, "sequences a process computes at a time; unless given, the largest divisor of its "
         "share up to " + ", ".join(f"{n} for {name}" for name, n in MAX_MICRO_BATCH.items())),
        ("seq-len", count, "l, the (s-)tokens of a sequence"),
        ("lr", number(float, 1e-12), "peak learning rate; the large ones are the paper's, scaled to the batch, not "
         "tuned here"),
        ("warmup-steps", whole, "steps of linear warmup; unless given, at most a tenth of the run"),
        ("decay-frac", share, "last fraction of the steps, with linear decay to 0"),
        ("seed", whole, "of initial weights and data order"),
        ("device", str, "cuda, cuda:1, mps or cpu; unless given, the first of these that is there"),
        ("dtype", ("bfloat16", "float32"), "of the matrix products; weights and optimizer are float32"),
        ("out", str, "the run's folder; unless given runs/MODEL-sS-rR-seedSEED, with -2, -3 appended when taken"),
        ("resume", str, "continue the run in this folder, with the flags stored there; auto: continue --out, or start "
         "it"),
        ("eval-every", count, "steps between evaluations, each of which also saves"),
        ("save-every", count, "steps between checkpoints"),
        ("compile", bool, "torch.compile; on CUDA unless given"),
        ("fsdp", bool, "shard weights, gradients and optimizer over torchrun's processes"),
        ("checkpoint-activations", bool, "compute activations again in the backward pass: less memory, a third more "
         "time"),
    ):
        choice = {"action": argparse.BooleanOptionalAction} if kind is bool else (
            {"choices": kind} if isinstance(kind, tuple) else {"type": kind})
        default = "" if name in ("micro-batch-size", "out", "resume") else " (default: %(default)s)"
        parser.add_argument(f"--{name}", help=text + default, **choice)
    return parser


if __name__ == "__main__":
    main()
