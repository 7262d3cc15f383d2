"""What does a superposed step cost, and how fast is a step?

    python study/bench.py                                   # every part, on tiny and 270m
    python study/bench.py --only step --model tiny --s 2    # one part of one model
    python study/bench.py --device cuda                     # the same at full size

Contestants take turns in one process; a ratio is the median over the rounds, with its
quartiles. The data are random tokens of Zipf's frequencies, read the way training reads.
"""
import argparse
import itertools
import os
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

TEMPORARY = tempfile.TemporaryDirectory()
os.environ["TORCHINDUCTOR_CACHE_DIR"] = TEMPORARY.name  # it is timed, so never remembered
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters

import data
from model import GPT, PRESETS, ChunkedHeadLoss, bag_weights, multi_hot_cross_entropy
from model import normalise
from tools.corpus import VOCAB_SIZE, write_shard
from train_tst import GRAD_CLIP, RECIPES, compiler_works, make_optimizer

SIZES = (1, 2, 4, 6, 8, 16)
SECONDS = 6             # of a race, where its fewest rounds do not take longer
ROUNDS = 5              # at least
TOKENS = 20_000_000


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = data.fail
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="(default: cpu)")
    dense = [name for name, config in PRESETS.items() if not config.n_expert]
    parser.add_argument("--model", choices=dense, help="(default: tiny, then 270m)")
    parser.add_argument("--s", type=int, default=6,
                        help="bag size where one is compared (default: 6)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"),
                        help="(default: bfloat16 on CUDA, else float32)")
    parser.add_argument("--only", choices=PARTS, help="run this part alone")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(),
                        help="of the CPU; 1 takes CPU time, for a machine shared with others "
                             "(default: %(default)s)")
    args = parser.parse_args()
    cuda = args.device == "cuda"
    if args.s < 1 or args.threads < 1 or cuda and not torch.cuda.is_available():
        data.fail("--s and --threads are at least 1, and --device is one that this machine has")
    args.dtype = getattr(torch, args.dtype or ("bfloat16" if cuda else "float32"))
    args.autocast = lambda: torch.autocast(args.device, torch.bfloat16,
                                           args.dtype == torch.bfloat16)
    torch.set_num_threads(args.threads)
    alone = args.device == "cpu" and args.threads == 1
    args.clock = time.process_time if alone else time.perf_counter
    torch.set_float32_matmul_precision("high" if cuda else "highest")   # as in training
    machine = torch.cuda.get_device_name(args.device) if cuda else f"{args.threads} CPU threads"
    print(f"{machine}, torch {torch.__version__}, {args.dtype}; ratios: median [quartiles]")
    args.kinds = ("eager", "compiled") if compiler_works(args.device, print) else ("eager",)
    for args.model in [args.model] if args.model else ["tiny", "270m"]:
        recipe = RECIPES[args.model]
        vocab_size = VOCAB_SIZE if args.model == "tiny" else data.GPT2["vocab_size"]
        c = args.config = replace(PRESETS[args.model], vocab_size=vocab_size)
        args.batch, cut = min(recipe["batch_size"], recipe["micro_batch_size"]), ""
        if args.model != "tiny" and not cuda:
            c = args.config = replace(c, n_layer=2, seq_len=256)
            args.batch, cut = 2, ", cut down for a CPU in layers, l and batch"
        print(f"\n{args.model}: width {c.n_embd}, V = {vocab_size:,}, layers {c.n_layer}, "
              f"l = {c.seq_len}, rows a step {args.batch}{cut}")
        shard = Path(TEMPORARY.name, f"{args.model}.bin")
        uniform = np.random.default_rng(0).random(TOKENS)
        write_shard(shard, (vocab_size ** uniform).astype(np.uint16))
        args.tokens = data.Stream([shard], vocab_size)
        for name in [args.only] if args.only else PARTS:
            # the loss has one shape, the large models'
            if name != "loss" or args.only or args.model != "tiny":
                PARTS[name](args)


# Parts

def superposition(args):
    """Whole steps with bags of s against bags of one, the switch, and the wait for the data."""
    for kind in args.kinds:
        step, graphs = trainer(args, *ours(args, kind)), counters["stats"]
        step(args.s), step(args.s)                                      # the superposition phase
        before = graphs["unique_graphs"]
        first, *later = (timed(args, lambda: step(1), clock=time.perf_counter) for _ in range(4))
        longer = first - statistics.median(later)
        again = graphs["unique_graphs"] - before
        sizes = SIZES if kind == "eager" else sorted({1, args.s})
        times = race(args, {s: lambda s=s: step(s) for s in sizes})
        for s in times:
            middle, wait = statistics.median(times[s]), statistics.median(step.waits[s])
            print(f"  step, {kind}, s = {s:2} / s = 1: {ratio(times, s, 1)}, "
                  f"{1000 * middle:.1f} ms, of which it waits for data {wait / middle:.2%}")
        print(f"  switch, {kind}: the first step after it took {longer:.3f} s longer, "
              f"{again} of {before} graphs were compiled again")


def whole(args):
    """The baseline's step against the same GPT compiled in one piece, logits and all.

    That is nanoGPT's way.
    """
    if "compiled" not in args.kinds:
        return
    steps = {"ours": trainer(args, *ours(args, "compiled"))}
    with torch.device(args.device):
        model = GPT(args.config)
    in_one = torch.compile(lambda inputs, targets: multi_hot_cross_entropy(model(inputs), targets),
                           dynamic=False)
    steps["whole"] = trainer(args, model, lambda inputs, targets, s: in_one(inputs, targets))
    times = race(args, {name: lambda step=step: step(1) for name, step in steps.items()})
    print("  whole: our tokens per second / those of the model compiled whole: "
          f"{ratio(times, 'whole', 'ours')}")


def loss(args):
    """The head and its loss, forward and backward: ours against others, in time and memory."""
    rows, d, s = -(-args.config.vocab_size // 64) * 64, args.config.n_embd, args.s
    n = args.batch * args.config.seq_len        # timed; too few on a CPU to show the memory
    most = 4 * n if args.device == "cpu" else n
    x = torch.randn(most, d, device=args.device, requires_grad=True)
    head = torch.randn(rows, d, device=args.device).mul_(0.02).requires_grad_()
    y = torch.from_numpy(args.tokens.read(0, most * s)).view(-1, s).to(args.device)
    weights = bag_weights("uniform", s).to(args.device)

    def z(x):
        return F.linear(x, head).float()

    def chunked(part):
        return lambda x, y: ChunkedHeadLoss.apply(x, head, y, weights, True, part)

    plain = "cross-entropy with s = 1"
    losses = {
        plain: lambda x, y: F.cross_entropy(z(x), y[:, 0]),
        "the paper's listing": lambda x, y: listing(F.cross_entropy, z(x), y),
        "PatchTrain's": lambda x, y: listing(F.nll_loss, z(x).log_softmax(-1), y),
        "multi_hot_cross_entropy": lambda x, y: multi_hot_cross_entropy(z(x), y),
        "ChunkedHeadLoss": chunked(normalise)}

    def forward_backward(f, n):
        x.grad = head.grad = None
        with args.autocast():
            value = f(x[:n], y[:n])
        value.backward()

    print(f"  loss with the head, s = {s}: time of {n:,} positions, memory of {most:,} in their "
          "float32 logits")
    for kind in args.kinds:
        made = dict(losses)
        if kind == "compiled":
            made = {name: torch.compile(f, dynamic=False) for name, f in losses.items()}
            made["ChunkedHeadLoss"] = chunked(torch.compile(normalise))         # as in training
        times = race(args, {name: lambda f=f: forward_backward(f, n) for name, f in made.items()})
        for name in times:
            peak = peak_memory(args, lambda: forward_backward(made[name], most))
            print(f"  loss, {kind}, {name} / {plain}: {ratio(times, name, plain)}, "
                  f"peak memory {peak / (4 * most * rows):.2f} logits")


def listing(f, z, y):
    return sum(f(z, y[:, i]) for i in range(y.size(1))) / y.size(1)


def llama(args):
    """The baseline's step against transformers' LlamaForCausalLM of the same shape."""
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError:
        return print("  llama: skipped, pip install transformers")
    c = args.config
    config = LlamaConfig(
        vocab_size=-(-c.vocab_size // 64) * 64, hidden_size=c.n_embd,
        intermediate_size=c.n_hidden, num_hidden_layers=c.n_layer, num_attention_heads=c.n_head,
        num_key_value_heads=c.n_kv_head, max_position_embeddings=c.seq_len,
        tie_word_embeddings=False, use_cache=False)
    for kind in args.kinds:
        with torch.device(args.device):
            theirs = LlamaForCausalLM(config)
        forward = torch.compile(theirs, dynamic=False) if kind == "compiled" else theirs
        step = {"ours": trainer(args, *ours(args, kind)),
                "theirs": trainer(args, theirs, lambda inputs, _, s: forward(
                    input_ids=inputs[..., 0], labels=inputs[..., 0]).loss)}
        times = race(args, {name: lambda run=run: run(1) for name, run in step.items()})
        print(f"  llama, {kind}: our tokens per second / transformers': "
              f"{ratio(times, 'theirs', 'ours')}")


def floor(args):
    """Achieved FLOP/s against those of the step's matrix products alone, and where time goes."""
    for kind in args.kinds:
        model, loss_of = ours(args, kind)
        step = trainer(args, model, loss_of)
        _, *weights = [p.detach().to(args.dtype) for p in model.parameters()
                       if p.ndim == 2]                                  # without the embedding
        n = args.batch * args.config.seq_len
        buffers = {size: torch.randn(n, size, dtype=args.dtype, device=args.device)
                   for size in {size for w in weights for size in w.shape}}

        def products():
            for w in weights:
                x, y = buffers[w.size(1)], buffers[w.size(0)]
                F.linear(x, w), y @ w, y.T @ x

        times = race(args, {"products": products, "step": lambda: step(1),
                            "passes": lambda: step(1, optimize=False)})
        # The attention's come on top
        flops = model.flops_per_position() / (6 * sum(w.numel() for w in weights))
        for name, what in (("step", "whole step"), ("passes", "forward and backward")):
            print(f"  floor, {kind}, FLOP/s of the {what} / of the matrix products alone: "
                  f"{ratio(times, 'products', name, flops)}")
        if "step" in times:
            with torch.profiler.profile() as profile:
                step(1), step(1), step(1)
            spent = spent_by(profile.key_averages(), args.device)
            total = sum(spent.values())
            print("    time: " + ", ".join(f"{name[:40]} {spent[name] / total:.0%}"
                                           for name in sorted(spent, key=spent.get)[:-11:-1]))


def spent_by(events, device):
    """{name: time} of a profile's averages, each moment in one of them.

    On a GPU its kernels alone: to an operator PyTorch counts the kernels that it launched, and to
    an annotation those under it, so with them each kernel would count again.
    """
    if device == "cpu":
        return {event.key: event.self_cpu_time_total for event in events}
    return {event.key: event.self_device_time_total for event in events
            if event.device_type == torch.autograd.DeviceType.CUDA
            and not event.is_user_annotation}


PARTS = {"step": superposition, "whole": whole, "loss": loss, "llama": llama, "floor": floor}


# Their tools

def ours(args, kind):
    """Our model and its loss, (inputs (B, l, s), targets (B, l, s), s) -> scalar.

    Compiled in parts as in training.
    """
    torch._dynamo.reset()                                       # it gives up on the ninth of a kind
    counters.clear()
    torch.manual_seed(0)
    with torch.device(args.device):
        model = GPT(args.config)
    if kind == "compiled":
        for block in model.blocks:
            block.compile(dynamic=False)
        model.normalise = torch.compile(model.normalise)
    weights = {s: bag_weights("uniform", s).to(args.device) for s in {*SIZES, args.s}}
    return model, lambda inputs, targets, s: model(inputs, targets, weights[s])


def trainer(args, model, loss_of):
    """A function of s that takes an optimizer step as train_tst.py does.

    Its waits[s] are its times to fetch rows.
    """
    optimizer = make_optimizer(model, lr=1e-4)
    batches, rows, count = {}, {}, itertools.count()

    def fetch(s):
        if s not in batches:
            batches[s] = data.Batches(args.tokens, [(10 ** 6, s, s)], args.batch,
                                      args.config.seq_len, seed=0)
            step.waits[s] = []
        started = args.clock()
        new = batches[s].rows(next(count), 0, args.batch)
        if args.device != "cpu":
            new = new.pin_memory().to(args.device, non_blocking=True)
        rows[s] = new
        step.waits[s].append(args.clock() - started)

    def step(s, optimize=True):
        if s not in rows:
            fetch(s)
        inputs, targets = data.bags(rows[s], s, s)
        with args.autocast():
            value = loss_of(inputs, targets, s)
        value.backward()
        fetch(s)                                        # the next batch, while the device computes
        if optimize:
            torch.nn.utils.clip_grad_norm_(model.parameters(), GRAD_CLIP)
            optimizer.step()
        optimizer.zero_grad()

    step.waits = {}
    return step


def timed(args, run, repeat=1, clock=None):
    """Seconds of one of `repeat` runs, by args.clock unless another is given."""
    wait, clock = torch.cuda.synchronize if args.device == "cuda" else bool, clock or args.clock
    wait()
    started = clock()
    for _ in range(repeat):
        run()
    wait()
    return (clock() - started) / repeat


def race(args, contestants):
    """{name: function} -> {name: seconds in each round} of those that fit in memory.

    Everyone once a round, in turned order every second round. Who does not fit is a line.
    """
    fit = {}
    for name, run in contestants.items():
        try:
            run()                                                       # compiles
            fit[name] = run
        except torch.OutOfMemoryError:
            print(f"  {name} does not fit in the device's memory")
        if args.device == "cuda":               # out of the clause: its error holds tensors
            torch.cuda.empty_cache()
    once = [timed(args, run) for run in fit.values()]
    repeat = max(1, round(0.1 / min(once, default=1)))
    rounds = max(ROUNDS, round(SECONDS / sum(once) / repeat)) if fit else 0
    times = {name: [] for name in fit}
    for k in range(rounds):
        for name in list(fit)[::1 if k % 2 else -1]:
            times[name].append(timed(args, fit[name], repeat))
    return times


def ratio(times, a, b, scale=1.0):
    if not {a, b} <= set(times):
        return "none, one of the two does not fit"
    ratios = [scale * x / y for x, y in zip(times[a], times[b])]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return f"{middle:.3f} [{low:.3f}, {high:.3f}]"


def peak_memory(args, run):
    """Bytes that run holds at most above those before; on a CPU as PyTorch's profiler counts."""
    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=cpu, profile_memory=True) as profile:
        run()
    events = [event for event in profile.profiler.kineto_results.events()
              if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate(event.nbytes() for event in events))


if __name__ == "__main__":
    main()
