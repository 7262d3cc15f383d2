"""A Llama-style GPT that reads and predicts bags of tokens.

RMSNorm, RoPE, grouped-query attention (GQA), SwiGLU or several (`MoE`), no biases, untied tables.
Token superposition adds two short functions, `bag_average` and `multi_hot_cross_entropy`; it
adds no parameter and no buffer, and with bags of one token the model is an ordinary GPT.
"""
import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from data import fail


@dataclass
class Config:
    n_layer: int
    n_embd: int                         # d, the width of the residual stream
    n_head: int
    n_kv_head: int
    n_hidden: int                       # width of the SwiGLU, of each one in a mixture of experts
    n_expert: int = 0                   # SwiGLUs of a layer, see MoE; 0: one, which all tokens use
    n_active: int = 2                   # experts that a token uses, where there are experts
    head_dim: int = 0                   # width of a head; 0: n_embd / n_head
    qk_norm: bool = False               # RMSNorm of each head's queries and keys, as in Qwen3
    rope_theta: float = 500_000.0
    init_std: float = 0.02              # of the blocks' initial weights
    vocab_size: int = 50_257            # tokens that exist; tables are padded to a multiple of 64
    seq_len: int = 1024                 # l, the positions the trunk sees


PRESETS = {                             # layers, width, heads, KV heads, SwiGLU width
    "tiny": Config(3, 96, 4, 4, 192, rope_theta=10_000.0, init_std=0.05, seq_len=96),
    "270m": Config(30, 768, 12, 4, 2048),
    "600m": Config(32, 1152, 18, 6, 3072),
    "3b": Config(36, 2048, 16, 4, 11008),
    "10b-a1b": Config(32, 1536, 24, 4, 512, n_expert=128, n_active=8, head_dim=128, qk_norm=True,
                      rope_theta=50_000.0, seq_len=4096),
}
PRESETS["tiny-moe"] = replace(PRESETS["tiny"], n_hidden=256, n_expert=8, qk_norm=True)


def bag_average(table, bags):
    """One latent s-token per bag: the mean of its token embeddings (paper: the input of phase 1).

    table (V, d) float; bags (B, l, s) integer -> (B, l, d) in the table's dtype, averaged in
    float32 or better. At s = 1 it is the plain embedding, bit for bit.
    """
    return at_least_float32(F.embedding(bags, table)).mean(2).to(table.dtype)


def multi_hot_cross_entropy(logits, targets, weights=None):
    """Mean cross-entropy against every token of the target bag (paper: MCE, the loss of phase 1).

    logits (..., V) float; targets (..., s) integer; weights (s,) summing to 1, uniform if None
    -> scalar of float32 or better, nats. A token that occurs twice counts twice. The s
    cross-entropies share one log-sum-exp, so this is logsumexp(z) - mean z[y], and at s = 1 the
    ordinary cross-entropy. To read and to test by: training runs `ChunkedHeadLoss`, its equal.
    """
    logits = at_least_float32(logits)
    z_y = logits.gather(-1, targets)                                    # (..., s)
    mean = z_y.mean(-1) if weights is None else (z_y * weights.to(z_y)).sum(-1)
    return (logits.logsumexp(-1) - mean).mean()


def bag_weights(kind, s):
    """Weight of each position of the target bag (appendix D): (s,) float32, summing to 1."""
    i = torch.arange(1, s + 1, dtype=torch.float32)
    g = {"uniform": i ** 0, "power": 1 / i, "exp": torch.exp(-i), "first": (i == 1).float()}[kind]
    return g / g.sum()


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        rows = math.ceil(config.vocab_size / 64) * 64
        self.embedding = nn.Embedding(rows, config.n_embd)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = RMSNorm(config.n_embd)
        self.head = nn.Linear(config.n_embd, rows, bias=False)
        self.normalise = normalise      # here, so that the trainer can compile it
        head_dim = self.blocks[0].attention.head_dim
        cos, sin = rope_table(config.seq_len, head_dim, config.rope_theta)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        for name, p in self.named_parameters():
            if p.ndim > 1:
                std = config.init_std if name.startswith("blocks") else 0.02
                if name.endswith(("attention.out.weight", "mlp.down.weight", "mlp.down")):
                    std /= math.sqrt(2 * config.n_layer)    # as many add up in the residual stream
                nn.init.normal_(p, std=std)

    def forward(self, bags, targets=None, weights=None):
        """bags (B, l, s_in) integer -> logits (B, l, V), or with targets (B, l, s_out) the loss.

        V is vocab_size, padded; the padding is never a target. weights as `bag_weights`. It leaves
        the mean load of the layers' experts in `self.load`, see MoE; a dense model's is zero.
        """
        x = bag_average(self.embedding.weight, bags)                    # (B, l, d)
        if torch.is_autocast_enabled(x.device.type):    # the residual stream too: half the bytes
            x = x.to(torch.get_autocast_dtype(x.device.type))
        cos, sin = self.cos[:x.size(1)], self.sin[:x.size(1)]
        loads = []
        for block in self.blocks:
            x, load = block(x, cos, sin)
            loads.append(load)
        self.load = torch.stack(loads).mean(0)
        x = self.norm(x)
        if targets is None:
            return self.head(x)
        return ChunkedHeadLoss.apply(x.flatten(0, 1), self.head.weight, targets.flatten(0, 1),
                                     weights, torch.is_grad_enabled(), self.normalise)

    def flops_per_position(self):
        """Model FLOPs of a training step per position, forward and backward, whatever s is.

        6 per weight in a matrix product, and 12 l per layer and column of the queries for the
        attention products over all l positions (the causal half is not discounted).
        """
        c = self.config
        matrices = sum(self.active(p) for p in self.parameters() if p.ndim > 1)
        weights = matrices - self.embedding.weight.numel()              # that table is looked up
        columns = c.n_head * self.blocks[0].attention.head_dim
        return 6 * weights + 12 * c.n_layer * columns * c.seq_len

    def active(self, p):
        """How many numbers of parameter p a token uses: all, or of the experts' n_active / E."""
        c, n = self.config, p.numel()
        return n * c.n_active // c.n_expert if p.ndim == 3 else n


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.attention_norm = RMSNorm(config.n_embd)
        self.attention = Attention(config)
        self.mlp_norm = RMSNorm(config.n_embd)
        self.mlp = MoE(config) if config.n_expert else SwiGLU(config)

    def forward(self, x, cos, sin):                                     # (B, l, d)
        x = x + self.attention(self.attention_norm(x), cos, sin)
        y, load = self.mlp(self.mlp_norm(x))
        return x + y, load


class Attention(nn.Module):
    """Causal GQA: each key-value head serves n_head / n_kv_head query heads."""

    def __init__(self, config):
        super().__init__()
        self.n_head, self.n_kv_head = config.n_head, config.n_kv_head
        self.head_dim = config.head_dim or config.n_embd // config.n_head
        heads = self.n_head + 2 * self.n_kv_head
        self.qkv = nn.Linear(config.n_embd, heads * self.head_dim, bias=False)
        self.q_norm = RMSNorm(self.head_dim) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(self.head_dim) if config.qk_norm else nn.Identity()
        self.out = nn.Linear(self.n_head * self.head_dim, config.n_embd, bias=False)

    def forward(self, x, cos, sin):
        heads = self.qkv(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        q, k, v = heads.split((self.n_head, self.n_kv_head, self.n_kv_head), dim=1)
        q = rope(self.q_norm(q), cos, sin).type_as(v)       # autocast leaves a norm in float32
        k = rope(self.k_norm(k), cos, sin).type_as(v)
        # In float32 no fused CUDA kernel knows GQA, and the unfused one keeps whole matrices
        if q.is_cuda and q.dtype == torch.float32:
            repeats = self.n_head // self.n_kv_head
            k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True,     # (B, H, l, head_dim)
                                           enable_gqa=k.size(1) < q.size(1))
        return self.out(y.transpose(1, 2).flatten(2))                   # (B, l, d)


class SwiGLU(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate_up = nn.Linear(config.n_embd, 2 * config.n_hidden, bias=False)
        self.down = nn.Linear(config.n_hidden, config.n_embd, bias=False)

    def forward(self, x):
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up), x.new_zeros(2)             # no experts, no load


class MoE(nn.Module):
    """A mixture of experts: E SwiGLUs in place of one, of which a token uses k (arXiv 1701.06538).

    So a layer holds many weights, and a token costs few. The router gives a token a probability
    for each expert. The k likeliest compute; their outputs are added in proportion to these
    probabilities, which is how the router learns: a choice has no gradient, a proportion has one.

    A token and an expert of its choice are a slot. Slots are sorted by expert, so that the rows of
    an expert are neighbours, and one product computes them and nothing else.

    A router left alone favours the experts that are ahead, which then learn even more. The balance
    loss, E * sum over experts of (share of slots) * (mean probability), is 1 if all are used alike
    and E / k at worst; its gradient makes busy experts less probable (arXiv 2101.03961).
    """

    def __init__(self, config):
        super().__init__()
        self.n_active, n, d, h = config.n_active, config.n_expert, config.n_embd, config.n_hidden
        self.router = nn.Linear(d, n, bias=False)
        self.gate_up = nn.Parameter(torch.empty(n, 2 * h, d))
        self.down = nn.Parameter(torch.empty(n, d, h))

    def forward(self, x):
        """x (B, l, d) -> (B, l, d), and the load (2,): balance loss, largest expert's share."""
        tokens = x.flatten(0, 1)                                        # (N, d), N = B l
        logits = self.router(tokens)                                    # (N, E)
        p = at_least_float32(logits).softmax(1)
        weight, expert = p.topk(self.n_active)                          # (N, k)
        weight = weight / weight.sum(1, keepdim=True)
        expert, slot = expert.flatten().sort(stable=True)               # (N k): slot / k is a token
        token = slot // self.n_active
        counts = F.one_hot(expert, p.size(1)).sum(0)                    # (E,), slots of each expert

        low = logits.dtype              # bfloat16 under autocast, which overlooks what follows
        gate_up, down = self.gate_up.to(low), self.down.to(low)
        gate, up = expert_products(tokens.to(low)[token], gate_up, counts).chunk(2, dim=1)
        y = expert_products(F.silu(gate) * up, down, counts)            # (N k, d)
        y = y * weight.flatten()[slot].unsqueeze(1)                     # in float32
        y = torch.zeros_like(tokens, dtype=y.dtype).index_add(0, token, y)

        share = counts.to(p) / len(slot)
        balance = p.size(1) * (share * p.mean(0)).sum()
        return y.to(low).view_as(x), torch.stack((balance, share.max()))


def expert_products(x, weights, counts):
    """x (n, in), sorted by expert, times weights (E, out, in) -> (n, out); counts (E,) of rows."""
    aligned = x.size(1) % 8 == weights.size(1) % 8 == 0                 # in rows of 16 bytes
    if x.dtype == torch.bfloat16 and aligned and hasattr(F, "grouped_mm"):  # PyTorch 2.10 on
        ends = counts.cumsum(0).to(torch.int32)     # on the device: from Hopper on, nobody waits
        return F.grouped_mm(x, weights.transpose(1, 2), offs=ends)
    return loop_over_experts(x, weights, counts)


@torch.compiler.disable                 # which would compile again for every other count
def loop_over_experts(x, weights, counts):
    rows = x.split(counts.tolist())
    return torch.cat([F.linear(part, weight) for part, weight in zip(rows, weights)])


class RMSNorm(nn.RMSNorm):
    """In its gains' dtype, since a fused kernel wants one dtype and x may be bfloat16."""

    def __init__(self, width):
        super().__init__(width, eps=1e-5)

    def forward(self, x):
        return super().forward(x.to(self.weight.dtype))


def at_least_float32(x):
    return x.to(torch.promote_types(x.dtype, torch.float32))


def rope_table(length, head_dim, theta):
    """cos and signed sin of the rotary angles, each (length, head_dim) float32 (arXiv 2104.09864).

    In Hugging Face's order of operations, for the same rounding, which far positions magnify.
    """
    frequency = 1 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    angle = torch.outer(torch.arange(length, dtype=torch.float32), frequency)
    return torch.cat((angle, angle), 1).cos(), torch.cat((-angle, angle), 1).sin()


def rope(x, cos, sin):
    """Rotate pairs (i, i + head_dim / 2), Hugging Face's layout; x (B, heads, l, head_dim)."""
    return (x * cos + x.roll(x.size(-1) // 2, -1) * sin).type_as(x)


class ChunkedHeadLoss(torch.autograd.Function):
    """The head and `multi_hot_cross_entropy` in one, a chunk of positions at a time.

    The gradient with respect to a chunk's logits z is known with them: softmax(z) minus the
    weights at the targets. So it is used at once, and the logits, the largest tensor of a step,
    never exist whole. Same value and gradients as the two lines it stands for.
    """

    @staticmethod
    def forward(ctx, x, head, targets, weights, with_grad, normalise):
        """x (N, d), head (V, d), targets (N, s), weights (s,) or None -> scalar, mean over the N.

        with_grad: whether gradients are wanted; in here autograd is off and cannot tell.
        """
        size = 512 if x.device.type == "cpu" else 4096      # fits a CPU's cache; fills a GPU
        exact = torch.promote_types(head.dtype, torch.float32)
        s = targets.size(1)
        weights = x.new_full((s,), 1 / s, dtype=exact) if weights is None else weights.to(exact)
        loss, grad_x = 0.0, []
        grad_head = torch.zeros_like(head, dtype=exact) if with_grad else None
        for chunk, target in zip(x.split(size), targets.split(size)):
            z = F.linear(chunk, head)                                   # (size, V), the logits
            mean = (z.gather(1, target) * weights).sum(1)   # not @, which autocast makes bfloat16
            torch._dynamo.maybe_mark_dynamic(z, 0)          # one graph for any number of rows
            lse, p = normalise(z)                           # log-sum-exp; may overwrite z
            loss = loss + (lse - mean).sum()
            if with_grad:
                p.scatter_add_(1, target, -weights.expand_as(target))   # now the gradient in z
                z.copy_(p)                                  # in the dtype of the products
                grad_x.append(z @ head)
                grad_head += z.T @ chunk
            del z, p                                        # before the next chunk is there
        if with_grad:
            ctx.save_for_backward(torch.cat(grad_x), grad_head)
        return loss / len(x)

    @staticmethod
    def backward(ctx, grad):
        grad_x, grad_head = ctx.saved_tensors
        scale = grad / len(grad_x)
        return grad_x.mul_(scale), grad_head.mul_(scale), None, None, None, None


def normalise(z):
    """Logits (n, V) -> their log-sum-exp (n,) and softmax (n, V), in float32 or better.

    A float32 z is overwritten, which saves memory. The targets stay outside, so that no shape in
    here depends on s and it is compiled once.
    """
    z = at_least_float32(z)
    top = z.amax(1, keepdim=True)                           # so that no exponential overflows
    p = z.sub_(top).exp_()
    total = p.sum(1, keepdim=True)
    return (top + total.log()).squeeze(1), p.div_(total)


def load_checkpoint(path, mmap=False):
    """The checkpoint in a run's folder (its ckpt.pt), or the file itself, as a dict on the CPU.

    No pickled code runs (weights_only). SystemExit(2) if it is missing or not one of ours.
    """
    file = Path(path, "ckpt.pt") if Path(path).is_dir() else Path(path)
    if not file.is_file():
        fail(f"{path}: no checkpoint there; name a run's folder, such as runs/tiny-s6-r0.2-seed0")
    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:          # pickle, zip files and torch raise all kinds
        fail(f"{file}: not a whole checkpoint of train_tst.py ({type(error).__name__}); use "
             "another, such as the run's ckpt_switch.pt")
