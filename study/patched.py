"""Train with one change to the model, which itself stays an ordinary Llama.

    python study/patched.py --patch kv-shift --s 1          # and any flag of train_tst.py

--patch is one of
    kv-shift    k and v each become m x their own + (1 - m) x the previous position's, with a
                learned m a head, 0.5 at first, before RoPE (arXiv 2411.19574): one layer can copy
    residual    the residual stream and its gradients are rounded to bfloat16 after every addition,
                as under bfloat16 on a GPU; all else stays float32
"""
import argparse
import contextlib
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import nn

import model
import train_tst
from tools.sample import load_model


class Shift(nn.Module):
    """The projection to q, k and v with k and v mixed with those one position before."""

    def __init__(self, qkv, n_head, n_kv_head):
        super().__init__()
        self.qkv, self.n_head, self.n_kv = qkv, n_head, 2 * n_kv_head
        self.own = nn.Parameter(torch.full((self.n_kv,), 0.5))                  # m, of k and of v

    def forward(self, x):                                                       # (B, l, d)
        heads = self.qkv(x).unflatten(-1, (self.n_head + self.n_kv, -1))
        q, kv = heads.split((self.n_head, self.n_kv), dim=2)                    # (B, l, heads, D)
        before = torch.cat((torch.zeros_like(kv[:, :1]), kv[:, :-1]), dim=1)
        m = self.own[:, None]
        return torch.cat((q, m * kv + (1 - m) * before), dim=2).flatten(2)


class ShiftedAttention(model.Attention):
    def __init__(self, config):
        super().__init__(config)
        self.qkv = Shift(self.qkv, self.n_head, self.n_kv_head)


class RoundedBlock(model.Block):
    def forward(self, x, cos, sin):
        x = (x + self.attention(self.attention_norm(x), cos, sin)).bfloat16().float()
        y, load = self.mlp(self.mlp_norm(x))
        return (x + y).bfloat16().float(), load


PATCHES = {"kv-shift": ("Attention", ShiftedAttention), "residual": ("Block", RoundedBlock)}


@contextlib.contextmanager
def patched(name):
    """Inside, a GPT is built with that patch; None: with none."""
    part, replacement = PATCHES.get(name, ("GPT", model.GPT))
    original = getattr(model, part)
    setattr(model, part, replacement)
    try:
        yield
    finally:
        setattr(model, part, original)


def load(out):
    """The model of a run of study/run.py, built with the patch it has, and its encoding or None."""
    patch = re.search(r"patch_([a-z-]+)", out.name)
    with patched(patch and patch[1]):
        return load_model(out)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--patch", required=True, choices=PATCHES)
    args, flags = parser.parse_known_args()
    with patched(args.patch):
        train_tst.main(flags)


if __name__ == "__main__":
    main()
