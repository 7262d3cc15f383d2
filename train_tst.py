"""Pre-train a language model with Token-Superposition Training (TST, arXiv 2605.06546).

For a fraction r of the steps (the superposition phase) the model reads bags of s tokens, each as
the mean of its embeddings, and predicts the next bag by multi-hot cross-entropy. Then (in the
recovery phase) it trains on ordinary next tokens. At the switch only the shape of a batch changes.

    python train_tst.py --s 6 --r 0.3                       # TST
    python train_tst.py --s 1                               # the baseline, by the same code
    python train_tst.py --s 1 --resume                      # continue the baseline after a stop
    torchrun --nproc_per_node=8 -- train_tst.py --s 6       # TST on eight GPUs
"""
import argparse
import contextlib
import json
import math
import os
import re
import shlex
import signal
import threading
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

# A preset has the shape of a model and its training. Each value except eval_tokens has a flag
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
SHAPE = {field.name: field.default for field in fields(Config) if field.name != "vocab_size"}
MAY_DIFFER = ("resume", "out", "data", "device", "dtype", "compile", "fsdp", "micro_batch_size",
              "eval_every", "save_every")               # --resume accepts new values of these
FULL_STATE = state_dicts.StateDictOptions(full_state_dict=True, cpu_offload=True)

RANK = int(os.environ.get("RANK", 0))                   # torchrun sets these three variables
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", 0))
WORLD = int(os.environ.get("WORLD_SIZE", 1))            # the number of processes


def train(args, run):
    """Train the model that args describe, with its log and its checkpoints in the folder of run."""
    device = set_up_device(args)                        # with torchrun: joins the other processes
    checkpoint = run.find_checkpoint()                  # None if the run starts at step 0
    if run.first_step == args.steps:
        return report(f"{args.out} is complete. All of its {args.steps:,} steps are done.")

    train_tokens, val_tokens, meta, token_bytes = load_data(args, checkpoint)
    l, switch = args.seq_len, round(args.r * args.steps)        # switch: the first recovery step
    batches = data.Batches(train_tokens, args.steps, switch, args.s, args.batch_size, l, args.seed)

    torch.manual_seed(args.seed)
    shape = {name: getattr(args, name) for name in SHAPE}
    with device:
        model = GPT(Config(**shape, vocab_size=train_tokens.vocab_size))
    if args.compile:
        compile_parts(model, args)
    wrapped = distribute(model, args, device)           # DDP, FSDP, or the model itself
    groups = [{"params": [p for p in model.parameters() if p.ndim > 1]},
              {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, args.lr, BETAS, weight_decay=WEIGHT_DECAY, fused=True)
    autocast = torch.autocast(device.type, getattr(torch, args.dtype), args.dtype != "float32")
    scaler = torch.amp.GradScaler(device.type, enabled=args.dtype == "float16")
    if checkpoint:
        state_dicts.set_state_dict(model, optimizer, options=FULL_STATE,
                                   model_state_dict=checkpoint["model"],
                                   optim_state_dict=checkpoint["optimizer"])
        scaler.load_state_dict(checkpoint.get("scaler") or scaler.state_dict())
    describe(args, run, model, device, len(train_tokens), switch, batches.epochs)
    run.open(meta)                                      # from here on the run writes to its folder

    n_rows, micro = args.batch_size // WORLD, args.micro_batch_size    # rows: per process, per pass
    warmup, decay = max(1, args.warmup_steps), max(1, round(args.decay_frac * args.steps))
    for step in range(run.first_step, args.steps):
        # The phase switch: a bag has s tokens before the switch, and one token after the switch
        s = args.s if step < switch else 1
        loss = torch.zeros((), device=device)
        for i in range(0, n_rows, micro):               # gradient accumulation
            rows = batches.rows(step, RANK * n_rows + i, micro)         # (micro, (l + 1) * s)
            rows = rows.pin_memory() if device.type == "cuda" else rows     # for an async copy
            bags = rows.to(device, non_blocking=True).view(micro, l + 1, s)
            inputs, targets = bags[:, :-1], bags[:, 1:]                 # bag j predicts bag j + 1
            wrapped.require_backward_grad_sync = i + micro == n_rows    # DDP: in the last pass only
            with autocast:
                micro_loss = wrapped(inputs, targets) / (n_rows // micro)
            scaler.scale(micro_loss).backward()
            loss += micro_loss.detach()

        # Update. The learning rate warms up, stays constant, and decays linearly to 0 (WSD)
        lr = args.lr * min(1, (step + 1) / warmup, (args.steps - step) / decay)
        for group in optimizer.param_groups:
            group["lr"] = lr
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), GRAD_CLIP)
        scaler.step(optimizer)          # in float16, skips the step if a gradient has overflowed
        scaler.update()
        optimizer.zero_grad(set_to_none=wrapped is model)       # DDP reuses its gradient buffers

        # Average over the processes. In these lines the CPU waits for the GPU
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm     # FSDP shards it
        sums = torch.stack((loss, norm, torch.full_like(loss, len(run.signals))))
        if WORLD > 1:
            dist.all_reduce(sums)
        mean_loss, norm, stop = (sums / WORLD).tolist()         # stop > 0: a process got a signal
        if not math.isfinite(mean_loss if scaler.is_enabled() else mean_loss + norm):
            fail(f"Step {step + 1:,} has the loss {mean_loss} and the gradient norm {norm}. Start "
                 f"again with a --lr below {args.lr:g} and another --out.", status=1)

        # Log, validate, save
        done, at_switch = step + 1, step + 1 == switch
        entry = {"step": done, "phase": "superposition" if step < switch else "recovery", "s": s,
                 "loss": mean_loss, "lr": lr, "val_loss": None, "val_bpb": None,
                 "tokens": args.batch_size * l * (done + (args.s - 1) * min(done, switch)),
                 "s_tokens": args.batch_size * l * done,
                 "seconds": run.earlier_seconds + time.time() - run.start}
        if done == args.steps or not stop and (at_switch or done % args.eval_every == 0):
            entry["val_loss"], entry["val_bpb"] = evaluate(
                model, val_tokens, token_bytes, args, device, autocast)
        if RANK == 0:
            run.log.write(json.dumps(entry).encode() + b"\n")
        if entry["val_loss"] or stop or at_switch or done % args.save_every == 0:
            run.save(model, optimizer, scaler, meta, entry, at_switch)
        run.show(entry)
        if stop:
            return report(f"Stopped after step {done:,}. The same command with --resume continues.")

    folder = shlex.quote(args.out)
    report(f"\n{args.out} is complete.\n"
           f"plot the losses          python tools/plot.py {folder}\n"
           f"see what it learned      python tools/peek.py {folder}\n"
           f"sample text              python tools/sample.py {folder}")


@torch.no_grad()
def evaluate(model, tokens, token_bytes, args, device, autocast):
    """The next-token loss on evenly spaced validation rows: (nats per token, bits per byte)."""
    l, micro = min(args.seq_len, len(tokens) - 1), args.micro_batch_size
    n_rows = max(1, (min(len(tokens), args.eval_tokens) - 1) // l)
    starts = [i * (len(tokens) - 1 - l) // max(1, n_rows - 1) for i in range(n_rows)]
    batches = [starts[i:i + micro] for i in range(0, n_rows, micro)]
    totals = torch.zeros(2, dtype=torch.float64)                # nats, bytes
    # Several processes divide the batches among them. Because FSDP needs every process in each call
    # of the model, a process without a last batch repeats the first batch, and does not count it
    for k in range(RANK, math.ceil(len(batches) / WORLD) * WORLD, WORLD):
        rows = tokens.rows(batches[k] if k < len(batches) else batches[0], l + 1)
        bags = rows.unsqueeze(2).to(device)                     # bags of one token (rows, l + 1, 1)
        with autocast:
            loss = model(bags[:, :-1], bags[:, 1:]).item()
        if k < len(batches):
            totals[0] += loss * len(rows) * l
            totals[1] += token_bytes[rows[:, 1:]].sum()
    if WORLD > 1:
        dist.all_reduce(totals)
    nats, n_bytes = totals.tolist()
    return nats / (n_rows * l), (nats / n_bytes / math.log(2) if n_bytes else None)


def describe(args, run, model, device, n_tokens, switch, epochs):
    """Print the model, the device, the data, and the number of steps in each phase."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    reads = args.batch_size * args.seq_len * (switch * args.s + args.steps - switch)
    report(f"model   {args.model}, {sum(p.numel() for p in model.parameters()):,} parameters\n"
           f"device  {WORLD} x {name}, {args.dtype}, {'compiled' if args.compile else 'eager'}\n"
           f"data    {args.data}, {n_tokens:,} training tokens; the run reads {reads:,}\n"
           f"phases  {switch:,} steps on bags of {args.s}, then {args.steps - switch:,} on tokens\n"
           f"run     {args.out}, {f'from step {run.first_step:,} on' if run.first_step else 'new'}")
    if epochs > 1:
        report(f"The run reads its data {epochs:.1f} times. TST gains from new text, so add data.")
    report("\n   step  phase          train loss  validation loss           tokens")


def report(text):
    """Print text above the progress bar. Of several processes only the first one prints."""
    if RANK == 0:
        tqdm.write(text)


def find_device(name):
    """The torch.device with this name. SystemExit(2) if this machine does not have it."""
    try:
        torch.zeros(1, device=name).item()
    except Exception:                   # PyTorch has a different exception for each reason
        fail(f"--device {name} does not work here. Choose another device.", every_process=True)
    return torch.device(name)


def set_up_device(args):
    """The torch.device of this process. With torchrun, the process also joins the others."""
    one_per_process = args.device == "cuda" or WORLD > 1 and args.device.startswith("cuda")
    device = find_device(f"cuda:{LOCAL_RANK}" if one_per_process else args.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")              # TF32 for products in float32
    if WORLD > 1:
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(minutes=10))     # longer in `Run.save`
        torch._dynamo.config.optimize_ddp = False       # would split graphs that are small already
    return device


def compile_parts(model, args):
    """Compile blocks, which share one graph, and embedding and loss, whose shapes depend on s."""
    try:
        torch.compile(lambda x: (x * 2).sum())(torch.ones(8, device=model.head.weight.device))
        for block in model.blocks:
            block.compile(dynamic=False)
        model.embed = torch.compile(model.embed, dynamic=False)
        model.loss = torch.compile(model.loss, dynamic=False)
    except Exception as error:          # the first line tests the compiler, which can be missing
        args.compile = False
        report(f"torch.compile does not work here, so the run is not compiled ({error!r:.200})")


def distribute(model, args, device):
    """The module that the loop calls: the model itself, or with several processes DDP or FSDP."""
    if WORLD > 1 and args.fsdp:
        dtype = None if args.dtype == "float32" else getattr(torch, args.dtype)
        policy = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
        mesh = dist.device_mesh.init_device_mesh(device.type, (WORLD,))
        for module in (*model.blocks, model):           # the last one shards all that is left
            fully_shard(module, mesh=mesh, mp_policy=policy)
    elif WORLD > 1:
        model = torch.nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
        model.broadcast_buffers = False                 # RoPE's table is equal in all processes
    return model


def load_data(args, checkpoint):
    """`data.load` of --data. SystemExit(2) if the checkpoint was trained on other shards."""
    if Path(args.data) == Path("data/python") and LOCAL_RANK == 0:
        from tools.corpus import build_python_corpus
        build_python_corpus()
    if WORLD > 1:
        dist.barrier()
    loaded = data.load(args.data)
    if checkpoint:
        name = "shards" if "shards" in checkpoint["data"] else "hash"   # for runs of old versions
        if checkpoint["data"][name] != loaded[2][name]:
            fail(f"--data {args.data} has other shards than the run in {args.out} was trained on. "
                 "Restore the shards, or choose another --out.")
    return loaded


class Run:
    """A run's folder, with its log and its checkpoints, and the signals that stop the run."""

    def __init__(self, args):
        self.args, self.folder = args, Path(args.out)
        self.first_step, self.earlier_seconds, self.signals = 0, 0.0, []
        self.resources = contextlib.ExitStack()         # `main` closes them when the run ends

    def find_checkpoint(self):
        """The last checkpoint, or None. SystemExit(2) if --out holds a run with other flags."""
        checkpoint = None
        if (self.folder / "ckpt.pt").exists():
            if not self.args.resume:
                fail(f"--out {self.folder} holds a run already. Add --resume to continue it, or "
                     "choose another --out.")
            checkpoint = load_checkpoint(self.folder)
            self.first_step, self.earlier_seconds = checkpoint["step"], checkpoint["seconds"]
            for name, value in vars(self.args).items():
                old = checkpoint["args"].get(name)
                if name not in MAY_DIFFER and value != old:
                    fail(f"--{name.replace('_', '-')} is {value}, but was {old} in the run in "
                         f"{self.folder}. Use the flags of that run, or choose another --out.")
        if WORLD > 1:
            steps = [0] * WORLD
            dist.all_gather_object(steps, self.first_step)
            if len(set(steps)) > 1:
                fail(f"--out {self.folder} has checkpoints of different steps on different "
                     f"machines: {steps} for each process. Put --out on a shared disk.")
        return checkpoint

    def open(self, meta):
        """Create the folder, lock it, and truncate the log to the step of the checkpoint.

        Nothing is written to --out before this call, so that bad input leaves no run behind.
        """
        if WORLD > 1:                   # the other processes wait in this group while one saves
            self.savers = dist.new_group(backend="gloo", timeout=timedelta(hours=1))
        if RANK == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            path = self.folder / "metrics.jsonl"
            self.log = self.resources.enter_context(open(path, "ab", buffering=0))
            try:
                import fcntl
                fcntl.flock(self.log, fcntl.LOCK_EX | fcntl.LOCK_NB)    # held until the log closes
            except BlockingIOError:
                fail(f"--out {self.folder} is in use by another process. Stop that process, or "
                     "choose another --out.")
            except (ImportError, OSError):      # Windows and some file systems have no such locks
                pass
            # Keep the steps up to the checkpoint. After a power cut, other bytes can follow them
            lines = re.findall(rb'({"step": (\d+),.*}\n)', path.read_bytes())
            kept = [line for line, step in lines if int(step) <= self.first_step]
            self.log.truncate(sum(map(len, kept)))
            if len(kept) < self.first_step:
                report(f"Note: {path} has {len(kept):,} of the {self.first_step:,} earlier steps.")
            (self.folder / "args.json").write_text(json.dumps(vars(self.args), indent=1))
            (self.folder / "meta.json").write_text(json.dumps(meta, indent=1))
            for file in Path(self.args.data).glob("encoding.json"):     # the tokenizer, if any
                (self.folder / file.name).write_bytes(file.read_bytes())
        self.start, self.bar = time.time(), self.resources.enter_context(tqdm(
            total=self.args.steps, initial=self.first_step, disable=None if RANK == 0 else True))
        if threading.current_thread() is threading.main_thread():       # others cannot set handlers
            for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"):     # Windows lacks the last two
                number = getattr(signal, name, None)
                if number and signal.getsignal(number) != signal.SIG_IGN:   # `nohup` ignores SIGHUP
                    old_handler = signal.signal(number, self.on_signal)
                    self.resources.callback(signal.signal, number, old_handler)

    def on_signal(self, number, frame):
        """Ctrl-C, `kill`, a closed terminal and SLURM's USR1 end the run after the current step."""
        if self.signals and number == signal.SIGINT and WORLD == 1:     # torchrun sends it twice
            raise KeyboardInterrupt
        self.signals.append(number)

    def show(self, entry):
        """Advance the progress bar, and after a validation print a row of the table."""
        if entry["val_loss"]:           # * marks a bag loss, not comparable with a next-token loss
            row = "{step:7,}  {phase:13}  {loss:9.4f}{mark}  {val_loss:15.4f}  {tokens:15,}"
            report(row.format(mark="*" if entry["s"] > 1 else " ", **entry))
        self.bar.set_postfix_str(f"{entry['phase']} loss {entry['loss']:.3f}", refresh=False)
        self.bar.update()

    def save(self, model, optimizer, scaler, meta, entry, at_switch):
        """Write ckpt.pt, and at the switch ckpt_switch.pt: unsharded tensors, atomically."""
        parameters, moments = state_dicts.get_state_dict(model, optimizer, options=FULL_STATE)
        if RANK == 0:
            state = {"model": parameters, "optimizer": moments, "scaler": scaler.state_dict(),
                     "step": entry["step"], "seconds": entry["seconds"], "args": vars(self.args),
                     "config": asdict(model.config), "data": meta}
            temporary = self.folder / "ckpt.tmp"
            try:
                for name in ("ckpt_switch.pt", "ckpt.pt") if at_switch else ("ckpt.pt",):
                    torch.save(state, temporary)
                    os.replace(temporary, self.folder / name)
            except (OSError, RuntimeError) as error:    # PyTorch raises the latter on a full disk
                temporary.unlink(missing_ok=True)
                raise OSError(f"{temporary} cannot be written ({error})") from error
        if WORLD > 1:
            dist.barrier(self.savers)


def load_checkpoint(path):
    """Load the checkpoint in a run's folder, or in a file, to the CPU, without pickled code."""
    file = Path(path, "ckpt.pt") if Path(path).is_dir() else Path(path)
    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=os.name == "posix")
    except Exception as error:          # PyTorch, pickle, zip files and the system raise many kinds
        fail(f"{file} is not a complete checkpoint ({type(error).__name__}). Name a run's folder.")


def parse(argv=None):
    """The flags, with every default filled in. SystemExit(2) on bad input, with one line."""
    def between(low, high, kind):
        def number(text):
            if not low <= kind(text) <= high:
                raise argparse.ArgumentTypeError(f"{text} is not between {low} and {high:g}.")
            return kind(text)
        number.__name__ = kind.__name__     # for argparse's own message: "invalid int value"
        return number

    count, natural = between(1, 1e12, int), between(0, 1e12, int)
    real, fraction = between(0, 1e12, float), between(0, 1, float)
    on_off = argparse.BooleanOptionalAction
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], usage="%(prog)s [flags]", allow_abbrev=False,
        add_help=False, formatter_class=lambda prog: argparse.ArgumentDefaultsHelpFormatter(
            prog, max_help_position=28, width=100))
    parser.error = fail                 # one line, without the usage
    method, run, model, machine = (parser.add_argument_group(name).add_argument
                                   for name in ("method", "run", "model", "machine"))
    # These two flags are parsed first, because the defaults of the other flags depend on them
    model("--model", choices=PRESETS, help="preset, which sets the defaults of the other flags; "
          "small if the device is CUDA and data/fineweb exists, otherwise tiny")
    machine("--device", default="cuda" if torch.cuda.is_available() else "cpu",
            help="cuda, cuda:1, mps or cpu")
    known = parser.parse_known_args(argv)[0]
    cuda = known.device.startswith("cuda")
    preset = known.model or ("small" if cuda and Path("data/fineweb").exists() else "tiny")
    bfloat16 = cuda and torch.cuda.is_bf16_supported(including_emulation=False)
    dtype = "bfloat16" if bfloat16 else "float16" if cuda else "float32"
    method("--s", type=count, help="tokens per bag in the superposition phase; 1: the baseline")
    method("--r", type=fraction, help="fraction of the steps that form the superposition phase")
    run("--data", help="folder of token shards; data/python: the built-in corpus")
    run("--steps", type=count, help="optimizer steps in both phases together")
    run("--batch-size", type=count, help="rows per step in all processes together")
    run("--lr", type=real, help="peak learning rate; not tuned in the presets from 270m on")
    run("--warmup-steps", type=natural, help="steps in which the learning rate grows linearly to "
        f"--lr; if not given: {PRESETS[preset]['warmup_steps']}, but at most a tenth of --steps")
    run("--decay-frac", type=fraction, help="fraction of the steps, at the end, in which the "
        "learning rate decays linearly to 0")
    run("--eval-every", type=count, default=500, help="steps between two evaluations")
    run("--save-every", type=count, default=500, help="steps between saves; each evaluation saves")
    run("--seed", type=natural, default=0, help="seed of the initial weights and the data order")
    run("--out", help="folder of the run; if not given: runs/MODEL-sS-rR-seedSEED")
    run("--resume", action="store_true", help="continue the run in --out, or start it if it is new")
    model("--n-layer", type=count, help="number of blocks")
    model("--n-embd", type=count, help="width of the residual stream")
    model("--n-head", type=count, help="number of query heads per block")
    model("--n-kv-head", type=count, help="number of key-value heads per block")
    model("--n-hidden", type=count, help="hidden width of the SwiGLU, or of each expert")
    model("--n-expert", type=natural, help="number of experts per block; 0: one SwiGLU")
    model("--n-active", type=count, help="number of experts that each token uses")
    model("--head-dim", type=natural, help="width of a head; 0: n_embd / n_head")
    model("--qk-norm", action=on_off, help="RMSNorm of the queries and keys of each head")
    model("--rope-theta", type=real, help="base of the RoPE frequencies")
    model("--init-std", type=real, help="standard deviation of the initial weights of the blocks")
    model("--seq-len", type=count, help="context length l, in bags or in single tokens")
    machine("--micro-batch-size", type=count, help="maximum number of rows in one forward pass; "
            "lowered until it divides the rows per process")
    machine("--dtype", choices=("bfloat16", "float16", "float32"), default=dtype,
            help="dtype of the matrix products (autocast)")
    machine("--compile", action=on_off, default=cuda, help="use torch.compile")
    machine("--fsdp", action=on_off, default=False, help="shard the model over the processes")
    machine("--help", action="help", help="show these flags with the defaults of the preset")
    parser.set_defaults(**{**SHAPE, **PRESETS[preset], "model": preset, "warmup_steps": None})
    return check(parser.parse_args(argv))


def check(args):
    """Fill in the defaults that depend on other flags. SystemExit(2) if flags are contradictory."""
    if args.warmup_steps is None:
        args.warmup_steps = min(PRESETS[args.model]["warmup_steps"], args.steps // 10)
    args.r = args.r if args.s > 1 else 0.0
    args.out = args.out or f"runs/{args.model}-s{args.s}-r{args.r:g}-seed{args.seed}"
    if args.warmup_steps > args.steps:
        fail(f"--warmup-steps {args.warmup_steps} is above --steps {args.steps}. Choose fewer.")
    if args.batch_size % WORLD:
        fail(f"--batch-size {args.batch_size}: choose a multiple of {WORLD}, the process count.")
    if args.n_head % args.n_kv_head or (args.head_dim or args.n_embd / args.n_head) % 2:
        fail(f"--n-head {args.n_head} must be a multiple of --n-kv-head {args.n_kv_head}, and "
             f"the width of a head, {args.head_dim or args.n_embd / args.n_head:g}, must be even.")
    if args.n_expert and not 1 < args.n_active <= args.n_expert:    # 1: router learns balance only
        fail(f"--n-active {args.n_active}: choose a number from 2 to --n-expert {args.n_expert}.")
    n_rows, most = args.batch_size // WORLD, min(args.batch_size // WORLD, args.micro_batch_size)
    args.micro_batch_size = max(n for n in range(1, most + 1) if n_rows % n == 0)
    return args


def main(argv=None):
    """Train as argv (default: the command line) says. SystemExit(2) on bad input."""
    args = parse(argv)
    run = Run(args)
    try:
        train(args, run)
    except KeyboardInterrupt:           # before the first step, or a second Ctrl-C
        raise SystemExit(130)
    except OSError as error:
        fail(f"{error.filename or args.out}: {error.strerror or error}. Remove the cause, and run "
             "the same command with --resume.", every_process=True)
    except (MemoryError, RuntimeError) as error:    # each device has its own message
        if not re.search("(?i)out of memory|allocate|enough memory", str(error)):
            raise
        fail(f"--micro-batch-size {args.micro_batch_size} needs more memory than there is. Halve "
             "--micro-batch-size. At 1, use --fsdp or a lower --seq-len.", every_process=True)
    finally:
        run.resources.close()
    if dist.is_initialized():           # not after an error, because other processes have ended
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
