"""A Llama-style GPT that reads and predicts bags of tokens.

RMSNorm, RoPE, grouped-query attention (GQA), SwiGLU, no biases, untied
embedding and head. Token superposition adds two short functions, `bag_average`
and `multi_hot_cross_entropy`; it adds no parameter and no buffer, and with bags
of one token the model is an ordinary GPT.

    python model.py RUN --prompt "def main"     # sample from a run's folder
    python model.py RUN --export DIR            # write it for Hugging Face transformers
"""
import argparse
import codecs
import json
import math
import os
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import nn

import data
from data import fail


@dataclass
class Config:
    n_layer: int
    n_embd: int
    n_head: int
    n_kv_head: int
    n_hidden: int                   # width of the SwiGLU
    rope_theta: float = 500_000.0
    init_std: float = 0.02          # of the blocks' initial weights
    vocab_size: int = 50_257        # tokens that exist; tables are padded to a multiple of 64
    seq_len: int = 1024             # l, the positions the trunk sees


PRESETS = {
    "tiny": Config(2, 96, 2, 1, 192, rope_theta=10_000.0, init_std=0.05),      # the same on 96 inputs as 0.02 on 600
    "270m": Config(30, 768, 12, 4, 2048),
    "600m": Config(32, 1152, 18, 6, 3072),
    "3b": Config(36, 2048, 16, 4, 11008),
}


def bag_average(table, bags):
    """One latent s-token per bag: the mean of its token embeddings (paper: the superposition phase's input).

    table (V, d) float; bags (B, l, s) integer -> (B, l, d) in the table's dtype,
    averaged in float32 or better. At s = 1 it is the plain embedding, bit for bit.
    """
    return at_least_float32(F.embedding(bags, table)).mean(2).to(table.dtype)


def multi_hot_cross_entropy(logits, targets, weights=None):
    """Mean cross-entropy against every token of the target bag (paper: MCE, its output).

    logits (..., V) float; targets (..., s) integer; weights (s,) summing to 1,
    uniform if None -> scalar of float32 or better, nats. A token that occurs twice counts
    twice. The s cross-entropies share one log-sum-exp, so this is
    logsumexp(z) - mean z[y], and at s = 1 the ordinary cross-entropy.
    """
    logits = at_least_float32(logits)
    hits = logits.gather(-1, targets)                                   # (..., s)
    hit = hits.mean(-1) if weights is None else (hits * weights.to(hits)).sum(-1)
    return (logits.logsumexp(-1) - hit).mean()


def bag_weights(kind, s):
    """Weight of each position of the target bag (paper, appendix D): (s,) float32, summing to 1."""
    i = torch.arange(1, s + 1, dtype=torch.float32)
    g = {"uniform": i ** 0, "power": 1 / i, "exp": torch.exp(-i), "first": (i == 1).float()}[kind]
    return g / g.sum()


class GPT(nn.Module):
    checkpoint_activations = False      # keep the blocks' inputs alone, and compute the rest again in the backward pass

    def __init__(self, config):
        super().__init__()
        self.config = config
        rows = table_rows(config.vocab_size)
        self.embedding = nn.Embedding(rows, config.n_embd)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = RMSNorm(config.n_embd)
        self.head = nn.Linear(config.n_embd, rows, bias=False)
        cos, sin = rope_table(config.seq_len, config.n_embd // config.n_head, config.rope_theta)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        for name, p in self.named_parameters():
            if p.ndim == 2:     # outputs into the residual stream start smaller, as there are 2 a layer
                std = config.init_std if name.startswith("blocks") else 0.02
                residual = name.endswith(("attention.out.weight", "mlp.down.weight"))
                nn.init.normal_(p, std=std / math.sqrt(2 * config.n_layer) if residual else std)

    def forward(self, bags, targets=None, weights=None):
        """bags (B, l, s) integer -> logits (B, l, V), or with targets (B, l, s) the scalar loss.

        V is vocab_size, padded; the padding is never a target.
        """
        x = bag_average(self.embedding.weight, bags)                    # (B, l, d)
        cos, sin = self.cos[:x.size(1)], self.sin[:x.size(1)]
        for block in self.blocks:
            x = (torch.utils.checkpoint.checkpoint(block, x, cos, sin, use_reentrant=False)
                 if self.checkpoint_activations else block(x, cos, sin))
        x = self.norm(x)
        return self.head(x) if targets is None else self.loss(x, targets, weights)

    def loss(self, x, targets, weights=None):
        """x (B, l, d), targets (B, l, s) -> scalar: `multi_hot_cross_entropy` of the head's logits."""
        if weights is None:
            weights = torch.full(targets.shape[-1:], 1 / targets.size(-1), device=x.device)
        return ChunkedHeadLoss.apply(x.flatten(0, 1), self.head.weight, targets.flatten(0, 1), weights,
                                     torch.is_grad_enabled())

    def flops_per_token(self):
        """Model FLOPs of a training step per position, forward and backward, whatever s is.

        6 per weight in a matrix product, and 12 l d per layer for the attention
        products over all l positions (the causal half is not discounted).
        """
        c = self.config
        weights = sum(p.numel() for p in self.parameters() if p.ndim == 2) - self.embedding.weight.numel()
        return 6 * weights + 12 * c.n_layer * c.n_embd * c.seq_len

    @torch.no_grad()
    def generate(self, ids, n, temperature=0.8, top_k=50, generator=None):
        """Yield n token ids that continue the list ids, from its last seq_len; temperature 0 is greedy.

        Every token runs the whole context again: a key-value cache would complicate
        the attention that people come here to read, and `export` gives the model to
        every engine that has one.
        """
        for _ in range(n):
            context = torch.tensor(ids[-self.config.seq_len:], device=self.cos.device)
            logits = self(context.view(1, -1, 1))[0, -1, :self.config.vocab_size].float()
            if temperature < 1e-6:          # 0, or so near it that the division would overflow
                ids = ids + [logits.argmax().item()]
            else:
                top, index = logits.topk(min(top_k, logits.numel()))
                p = F.softmax(top / temperature, dim=-1).cpu()
                ids = ids + [index[torch.multinomial(p, 1, generator=generator)].item()]
            yield ids[-1]


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.attention_norm = RMSNorm(config.n_embd)
        self.attention = Attention(config)
        self.mlp_norm = RMSNorm(config.n_embd)
        self.mlp = SwiGLU(config)

    def forward(self, x, cos, sin):                                     # (B, l, d)
        x = x + self.attention(self.attention_norm(x), cos, sin)
        return x + self.mlp(self.mlp_norm(x))


class Attention(nn.Module):
    """Causal grouped-query attention: each key-value head serves n_head / n_kv_head query heads."""

    def __init__(self, config):
        super().__init__()
        self.n_head, self.n_kv_head = config.n_head, config.n_kv_head
        self.head_dim = config.n_embd // config.n_head
        self.qkv = nn.Linear(config.n_embd, (self.n_head + 2 * self.n_kv_head) * self.head_dim, bias=False)
        self.out = nn.Linear(config.n_embd, config.n_embd, bias=False)

    def forward(self, x, cos, sin):
        heads = self.qkv(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (B, H + 2 KV, l, head_dim)
        qk, v = heads.split((self.n_head + self.n_kv_head, self.n_kv_head), dim=1)
        q, k = rope(qk, cos, sin).split((self.n_head, self.n_kv_head), dim=1)
        if q.is_cuda and q.dtype == torch.float32:      # no fused kernel there knows GQA, and the other one keeps
            repeats = self.n_head // self.n_kv_head     # every attention matrix
            k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.out(y.transpose(1, 2).flatten(2))                   # (B, l, d)


class SwiGLU(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate_up = nn.Linear(config.n_embd, 2 * config.n_hidden, bias=False)
        self.down = nn.Linear(config.n_hidden, config.n_embd, bias=False)

    def forward(self, x):
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


def RMSNorm(width):
    return nn.RMSNorm(width, eps=1e-5)


def at_least_float32(x):
    return x.to(torch.promote_types(x.dtype, torch.float32))


def table_rows(vocab_size):
    return math.ceil(vocab_size / 64) * 64


def rope_table(length, head_dim, theta):
    """cos and signed sin of the rotary angles, each (length, head_dim) float32 (RoFormer, arXiv 2104.09864).

    In Hugging Face's order of operations, for the same rounding, which far positions would magnify.
    """
    frequency = 1 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    angle = torch.outer(torch.arange(length, dtype=torch.float32), frequency)
    return torch.cat((angle, angle), 1).cos(), torch.cat((-angle, angle), 1).sin()


def rope(x, cos, sin):
    """Rotate the pairs (i, i + head_dim / 2), Hugging Face's half-split layout; x (B, heads, l, head_dim)."""
    return (x * cos + x.roll(x.size(-1) // 2, -1) * sin).type_as(x)


class ChunkedHeadLoss(torch.autograd.Function):
    """The head and `multi_hot_cross_entropy` in one, a chunk of positions at a time.

    The gradient with respect to a chunk's logits is known with them, softmax minus the
    weights at the targets, so it is used at once and the logits, the largest tensor of
    a step, never exist whole. Same value and gradients as the two lines it stands for.
    """

    @staticmethod
    def forward(ctx, x, head, targets, weights, with_grad):             # (N, d), (V, d), (N, s), (s,)
        size = 512 if x.device.type == "cpu" else 4096                  # fits a CPU's cache; fills a GPU
        exact = torch.promote_types(head.dtype, torch.float32)
        weights = weights.to(exact)
        loss, grad_x, grad_head = 0.0, [], torch.zeros_like(head, dtype=exact) if with_grad else None
        for chunk, target in zip(x.split(size), targets.split(size)):
            z = F.linear(chunk, head)                                   # (size, V), the logits
            hit = (z.gather(1, target) * weights).sum(1)                # not @, which autocast takes to bfloat16
            total, p = normalise(z)
            loss = loss + (total - hit).sum()
            if with_grad:
                p.scatter_add_(1, target, -weights.expand_as(target))   # the loss's gradient in z
                z.copy_(p)                                              # in the dtype of the products
                grad_x.append(z @ head)
                grad_head += z.T @ chunk
            del z, p                                                    # before the next chunk is there
        if with_grad:
            ctx.save_for_backward(torch.cat(grad_x), grad_head)
        return loss / len(x)

    @staticmethod
    def backward(ctx, grad):
        grad_x, grad_head = ctx.saved_tensors
        scale = grad / len(grad_x)
        return grad_x.mul_(scale), grad_head.mul_(scale), None, None, None


def normalise(z):
    """Logits (n, V) -> their log-sum-exp (n,) and softmax (n, V), of float32 or better; z itself is overwritten."""
    z = at_least_float32(z)
    top = z.amax(1, keepdim=True)                       # so that no exponential overflows
    p = z.sub_(top).exp_()
    total = p.sum(1, keepdim=True)
    return (top + total.log()).squeeze(1), p.div_(total)


CHECKPOINT = {"model": dict, "optimizer": dict, "step": int, "seconds": float, "args": dict, "config": dict,
              "data": dict}


def load_checkpoint(path, mmap=False):
    """The checkpoint in a run's folder (its ckpt.pt), or the file itself, as a dict on the CPU.

    No pickled code runs (weights_only), and every byte is held against the checksums that
    torch.save writes. SystemExit(2) if it is missing or is not a whole checkpoint of ours.
    """
    file = Path(path) / "ckpt.pt" if Path(path).is_dir() else Path(path)
    if not file.is_file():
        fail(f"{path}: no checkpoint there; name the folder of a run, such as runs/tiny-s6-r0.3-seed0")
    try:
        if zipfile.ZipFile(file).testzip():
            raise ValueError("damaged")
        checkpoint = torch.load(file, map_location="cpu", weights_only=True, mmap=mmap)
        foreign = [name for name, kind in CHECKPOINT.items() if not isinstance(checkpoint.get(name), kind)]
        if not foreign:
            c, weights = Config(**checkpoint["config"]), checkpoint["model"]     # whose sizes are allocated later
            sizes = c.n_layer, c.n_embd, c.n_hidden, table_rows(c.vocab_size)
            found = (sum(name.endswith("down.weight") for name in weights),
                     *weights[f"blocks.{c.n_layer - 1}.mlp.down.weight"].shape, len(weights["head.weight"]))
            if sizes != found or c.n_head > c.n_embd or c.seq_len > 2 ** 24:
                raise ValueError("its sizes are not those of its weights")
    except Exception as error:          # a bad file can raise anything, from zipfile, pickle or torch
        fail(f"{file}: not a readable checkpoint ({type(error).__name__}); use another, such as the run's "
             "ckpt_switch.pt")
    if foreign:
        fail(f"{file}: not a checkpoint of train_tst.py, it lacks {', '.join(foreign)}")
    return checkpoint


def load_model(path, device="cpu"):
    """The trained GPT and its tiktoken.Encoding (or None) from a run's folder or a checkpoint file in it."""
    checkpoint = load_checkpoint(path, mmap=True)
    with torch.device(device):
        model = GPT(Config(**checkpoint["config"]))
    model.load_state_dict(checkpoint["model"])
    return model.eval(), data.load_encoding(run_folder(path), checkpoint["data"]["tokenizer"])


def run_folder(path):
    """The run's folder, of itself or of a checkpoint file in it."""
    return Path(path) if Path(path).is_dir() else Path(path).parent


def best_device():
    """The name of the best kind of device here: "cuda", "mps" or "cpu"."""
    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"


def find_device(name=None):
    """The torch.device of that name, by default the best one here. SystemExit(2) if it is not on this machine."""
    name = name or best_device()
    try:
        torch.zeros(1, device=name).item()
    except Exception:                   # torch raises a different one for each way to be missing
        fail(f"--device {name} is not on this machine: leave it out to take what is", anywhere=True)
    return torch.device(name)


def export(model, encoding, folder):
    """Write a GPT as Hugging Face's LlamaForCausalLM, with its tiktoken.Encoding (or None) where that converts.

    folder, new or empty, appears whole or not at all. SystemExit(2) where it cannot,
    ImportError where a package is missing.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file
    c, path = model.config, Path(folder).resolve()
    end = encoding and encoding._special_tokens.get(data.END_OF_TEXT)
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "float32",
              "vocab_size": c.vocab_size, "hidden_size": c.n_embd, "intermediate_size": c.n_hidden,
              "hidden_act": "silu", "num_hidden_layers": c.n_layer, "num_attention_heads": c.n_head,
              "num_key_value_heads": c.n_kv_head, "max_position_embeddings": c.seq_len, "rope_theta": c.rope_theta,
              "rms_norm_eps": model.norm.eps, "tie_word_embeddings": False, "bos_token_id": end, "eos_token_id": end}
    weights = {"model.embed_tokens": model.embedding.weight[:c.vocab_size], "model.norm": model.norm.weight,
               "lm_head": model.head.weight[:c.vocab_size]}             # the padding is cut
    for i, block in enumerate(model.blocks):
        head_dim = block.attention.head_dim
        q, k, v = block.attention.qkv.weight.split([n * head_dim for n in (c.n_head, c.n_kv_head, c.n_kv_head)])
        gate, up = block.mlp.gate_up.weight.chunk(2)
        layer = {"input_layernorm": block.attention_norm.weight, "self_attn.q_proj": q, "self_attn.k_proj": k,
                 "self_attn.v_proj": v, "self_attn.o_proj": block.attention.out.weight,
                 "post_attention_layernorm": block.mlp_norm.weight, "mlp.gate_proj": gate, "mlp.up_proj": up,
                 "mlp.down_proj": block.mlp.down.weight}
        weights.update({f"model.layers.{i}.{name}": weight for name, weight in layer.items()})
    try:
        if path.exists() and (path.is_file() or any(path.iterdir())):
            fail(f"--export {folder} holds something already: name a new folder")
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as temporary:
            new = Path(temporary, path.name)
            new.mkdir()
            save_file({f"{name}.weight": weight.detach().clone() for name, weight in weights.items()},
                      new / "model.safetensors", metadata={"format": "pt"})
            (new / "config.json").write_text(json.dumps(config, indent=1))
            (new / "generation_config.json").write_text(json.dumps({"bos_token_id": end, "eos_token_id": end}))
            if not (encoding and data.save_hugging_face_tokenizer(encoding, new)):
                print(f"{folder} gets no tokenizer: it cannot be loaded, or not converted exactly", file=sys.stderr)
            new.rename(path)
    except (OSError, SafetensorError) as error:
        fail(f"--export {folder}: cannot write there ({error}): name another folder")
    print(f"{folder} is ready for transformers and for lm_eval --model hf --model_args pretrained={folder}")


def main(argv=None):
    parser = argparse.ArgumentParser(description="Sample from a trained model, or export it.")
    parser.error = fail
    parser.add_argument("run", help="a run's folder, or a checkpoint file in it")
    parser.add_argument("--prompt", default="", help="text to continue; - reads standard input")
    parser.add_argument("--tokens", type=int, default=200, help="tokens to add at most (default: 200)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 is greedy (default: 0.8)")
    parser.add_argument("--top-k", type=int, default=50, help="sample among the k likeliest (default: 50)")
    parser.add_argument("--seed", type=int, default=0, help="(default: 0)")
    parser.add_argument("--n", type=int, default=1, help="samples, a line of --- between them (default: 1)")
    parser.add_argument("--device", help="cuda, cuda:1, mps or cpu (default: the first of these that is there)")
    parser.add_argument("--export", metavar="DIR", help="write the model to this new folder for Hugging Face instead")
    args = parser.parse_args(argv)
    if args.export is not None:
        try:
            return export(*load_model(args.run), args.export)
        except ImportError as error:
            fail(f"--export: {error}: pip install transformers safetensors")
    for flag, value, low in (("--tokens", args.tokens, 0), ("--temperature", args.temperature, 0),
                             ("--top-k", args.top_k, 1), ("--seed", args.seed, 0), ("--n", args.n, 1)):
        if not low <= value < 2 ** 63:
            fail(f"{flag} {value}: give a number from {low} on, below 2^63")
    model, encoding = load_model(args.run, find_device(args.device))
    if encoding is None:
        fail(f"{args.run}: its tokenizer cannot be loaded here; tiktoken wants the network once, or TIKTOKEN_CACHE_DIR")
    sys.stdout.reconfigure(errors="replace")        # a terminal may be ASCII
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    prompt = sys.stdin.buffer.read().decode(errors="replace") if args.prompt == "-" else args.prompt
    ids = encoding.encode_ordinary(prompt)
    if len(ids) > model.config.seq_len:
        print(f"the prompt's {len(ids)} tokens are cut to its last {model.config.seq_len}, the training length",
              file=sys.stderr)
    generator = torch.Generator().manual_seed(args.seed)
    for k in range(args.n):
        print("---\n" * (k > 0) + prompt, end="", flush=True)
        for token in model.generate([encoding.eot_token] + ids, args.tokens, args.temperature, args.top_k, generator):
            if token == encoding.eot_token:
                break
            print(decoder.decode(encoding.decode_single_token_bytes(token)), end="", flush=True)
        print(decoder.decode(b"", final=True), flush=True)


if __name__ == "__main__":
    try:
        main()
    except (KeyboardInterrupt, BrokenPipeError):
        os._exit(130)                   # at once, without flushing to a pipe that is gone
