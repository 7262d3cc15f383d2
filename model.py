"""A Llama-style GPT that reads and predicts bags of tokens.

The first two functions are token superposition. The rest is an ordinary GPT with RMSNorm, RoPE,
grouped-query attention (GQA), SwiGLU or a mixture of experts, no biases, and separate tables for
the embedding and the head. In shapes, B is the number of rows, l the number of positions in a row,
s the number of tokens in a bag, V the number of token ids, d the width of the residual stream.
"""
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn


def bag_average(table, bags):
    """Input: each bag becomes one s-token, the mean of its tokens' embeddings (paper, section 3).

    table (V, d) float, bags (B, l, s) integer -> (B, l, d) in the dtype of the table. The mean is
    taken in float32 or float64. With s = 1 it equals the plain embedding bit for bit.
    """
    return at_least_float32(F.embedding(bags, table)).mean(2).to(table.dtype)


def multi_hot_cross_entropy(logits, targets):
    """Loss: the mean of the cross-entropies of all tokens of the next bag (MCE in the paper).

    logits (B, l, V) float, targets (B, l, s) integer -> scalar in nats, float32 or float64. A
    token that occurs twice in a bag counts twice. With s = 1 it is the ordinary cross-entropy.
    """
    return -at_least_float32(logits).log_softmax(-1).gather(-1, targets).mean()


def at_least_float32(x):
    return x.to(torch.promote_types(x.dtype, torch.float32))


@dataclass
class Config:
    n_layer: int
    n_embd: int                         # d, the width of the residual stream
    n_head: int                         # query heads
    n_kv_head: int                      # key-value heads, each for n_head / n_kv_head query heads
    n_hidden: int                       # hidden width of the SwiGLU, or of each expert
    n_expert: int = 0                   # experts per layer; 0 means one SwiGLU for all tokens
    n_active: int = 2                   # experts that each token uses
    head_dim: int = 0                   # width of a head; 0 means n_embd / n_head
    qk_norm: bool = False               # RMSNorm of the queries and keys of each head, as in Qwen3
    rope_theta: float = 500_000.0       # base of the RoPE frequencies
    init_std: float = 0.02              # standard deviation of the initial weights of the blocks
    seq_len: int = 1024                 # context length l, in bags or in single tokens
    vocab_size: int = 50_257            # ids of the tokenizer; V is rounded up to a multiple of 64


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        padded = -(-config.vocab_size // 64) * 64               # V; tensor cores prefer such sizes
        self.embedding = nn.Embedding(padded, config.n_embd)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = RMSNorm(config.n_embd)
        self.head = nn.Linear(config.n_embd, padded, bias=False)
        # The order of operations is Hugging Face's, so that both have the same rounding errors
        columns = torch.arange(0, self.blocks[0].head_dim, 2, dtype=torch.float32)
        frequency = 1 / config.rope_theta ** (columns / self.blocks[0].head_dim)
        angle = torch.outer(torch.arange(config.seq_len, dtype=torch.float32), frequency)
        rope = torch.stack((angle.cos().repeat(1, 2), torch.cat((-angle, angle), 1).sin()))
        self.register_buffer("rope", rope, persistent=False)    # (2, l, head_dim), see `rotate`
        for name, p in self.named_parameters():
            if p.ndim > 1:
                std = config.init_std if name.startswith("blocks") else 0.02
                if name.endswith(("out.weight", "down.weight", "down")):
                    std /= (2 * config.n_layer) ** 0.5      # the residual stream sums their outputs
                nn.init.normal_(p, std=std)

    def forward(self, bags, targets=None):
        """bags (B, l, s) integer -> logits (B, l, V), or, with targets (B, l, s), the loss."""
        x = self.embed(bags)                                            # (B, l, d)
        for block in self.blocks:
            x = block(x, self.rope[:, :x.size(1)])
        # Remove the balance losses from the modules, because `deepcopy` fails on their graphs
        balances = [vars(block.mlp).pop("balance") for block in self.blocks if self.config.n_expert]
        if targets is None:
            return self.head(self.norm(x))
        loss = self.loss(x, targets)
        if balances:                    # keep all experts in use; the factor 1e-3 is Qwen3's
            balance = 1e-3 * self.config.n_active * torch.stack(balances).mean()
            loss = loss + (balance - balance.detach())      # adds its gradient, but not its value
        return loss

    def embed(self, bags):
        x = bag_average(self.embedding.weight, bags)
        if torch.is_autocast_enabled(x.device.type):    # a 16-bit residual stream halves the memory
            x = x.to(torch.get_autocast_dtype(x.device.type))
        return x

    def loss(self, x, targets):
        return multi_hot_cross_entropy(self.head(self.norm(x)), targets)

    def flops_per_position(self):
        """FLOPs per position, forward and backward, for any s: products with active weights, and
        attention over all l x l pairs. Norms and lookups are not counted."""
        c, attention_width = self.config, self.blocks[0].out.in_features
        weights = sum(p.numel() * c.n_active // c.n_expert if p.ndim == 3 else p.numel()
                      for p in self.parameters() if p.ndim > 1)     # expert weights have 3 axes
        weights -= self.embedding.weight.numel()        # an embedding lookup is no matrix product
        return 6 * weights + 12 * c.n_layer * attention_width * c.seq_len   # matrices, attention


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.heads = config.n_head, config.n_kv_head, config.n_kv_head          # of q, k, v
        self.head_dim = config.head_dim or config.n_embd // config.n_head
        self.attention_norm = RMSNorm(config.n_embd)
        self.qkv = nn.Linear(config.n_embd, sum(self.heads) * self.head_dim, bias=False)
        self.q_norm = RMSNorm(self.head_dim) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(self.head_dim) if config.qk_norm else nn.Identity()
        self.out = nn.Linear(config.n_head * self.head_dim, config.n_embd, bias=False)
        self.mlp_norm = RMSNorm(config.n_embd)
        self.mlp = MoE(config) if config.n_expert else SwiGLU(config)

    def forward(self, x, rope):                                         # (B, l, d) -> (B, l, d)
        x = x + self.attention(self.attention_norm(x), rope)
        return x + self.mlp(self.mlp_norm(x))

    def attention(self, x, rope):
        heads = self.qkv(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        q, k, v = heads.split(self.heads, dim=1)            # (B, n_head or n_kv_head, l, head_dim)
        q = rotate(self.q_norm(q), rope).type_as(v)         # under autocast a norm returns float32
        k = rotate(self.k_norm(k), rope).type_as(v)
        if q.is_cuda and q.dtype != torch.bfloat16:
            # Some fused CUDA kernels support GQA only in bfloat16. Without a fused kernel, PyTorch
            # would store an (l, l) matrix for each head
            repeats = q.size(1) // k.size(1)
            k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True,
                                           enable_gqa=k.size(1) < q.size(1))
        return self.out(y.transpose(1, 2).flatten(2))


class SwiGLU(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate_up = nn.Linear(config.n_embd, 2 * config.n_hidden, bias=False)
        self.down = nn.Linear(config.n_hidden, config.n_embd, bias=False)

    def forward(self, x):
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class RMSNorm(nn.RMSNorm):
    def forward(self, x):               # the fused kernel needs x and the gains in the same dtype
        return F.rms_norm(x.to(self.weight.dtype), self.normalized_shape, self.weight, eps=1e-5)


def rotate(x, rope):
    """Apply RoPE (arXiv 2104.09864) to x (B, heads, l, head_dim), with h = head_dim / 2.

    Each pair (x[i], x[i + h]) is rotated by an angle a to the pair
    (x[i] cos a - x[i + h] sin a, x[i + h] cos a + x[i] sin a). `roll` swaps the halves of x.
    rope[0] is cos a. rope[1] is -sin a in the first half and sin a in the second half.
    """
    return (x * rope[0] + x.roll(x.size(-1) // 2, -1) * rope[1]).type_as(x)


class MoE(nn.Module):
    """A mixture of E SwiGLUs (arXiv 1701.06538). A router chooses k of them for each token."""

    def __init__(self, config):
        super().__init__()
        self.n_active, n, d, h = config.n_active, config.n_expert, config.n_embd, config.n_hidden
        self.router = nn.Linear(d, n, bias=False)
        self.gate_up = nn.Parameter(torch.empty(n, 2 * h, d))
        self.down = nn.Parameter(torch.empty(n, d, h))
        # grouped_mm (PyTorch 2.10) needs rows whose size is a multiple of 16 bytes. On Blackwell
        # its gradient is wrong for an expert without tokens (PyTorch issue 172439)
        blackwell = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] >= 10
        self.grouped = hasattr(F, "grouped_mm") and d % 8 == h % 8 == 0 and not blackwell

    def forward(self, x):                                               # (B, l, d) -> (B, l, d)
        tokens = x.flatten(0, 1)                                        # (N, d), N = B l
        logits = self.router(tokens)                                    # (N, E)
        p = at_least_float32(logits).softmax(1)
        weight, expert = p.topk(self.n_active)                          # (N, k)
        weight = weight / weight.sum(1, keepdim=True)
        # Sort the tokens by expert, so that the rows of each expert are contiguous
        expert, order = expert.flatten().sort(stable=True)              # both (N k,)
        token, counts = order // self.n_active, F.one_hot(expert, p.size(1)).sum(0) # (N k,), (E,)
        dtype = logits.dtype            # autocast does not cast the inputs of the products below
        grouped = self.grouped and dtype == torch.bfloat16
        products = grouped_products if grouped else loop_of_products
        gate, up = products(tokens.to(dtype)[token], self.gate_up.to(dtype), counts).chunk(2, 1)
        y = products(F.silu(gate) * up, self.down.to(dtype), counts)    # (N k, d)
        y = y * weight.flatten()[order].unsqueeze(1)                    # in float32
        y = torch.zeros_like(tokens, dtype=y.dtype).index_add(0, token, y)
        # 1 if all experts are used equally, E / k in the worst case (arXiv 2101.03961)
        self.balance = p.size(1) * (counts / len(order) * p.mean(0)).sum()
        return y.to(dtype).view_as(x)


def grouped_products(x, weights, counts):               # (n, in), (E, out, in), (E,) -> (n, out)
    return F.grouped_mm(x, weights.transpose(1, 2), offs=counts.cumsum(0).to(torch.int32))


@torch.compiler.disable                 # torch.compile would recompile whenever a count changes
def loop_of_products(x, weights, counts):
    rows = x.split(counts.tolist())     # the CPU waits for the GPU here; grouped_mm needs no wait
    return torch.cat([F.linear(expert_rows, w) for expert_rows, w in zip(rows, weights)])
