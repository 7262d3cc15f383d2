"""Check a port of token superposition: its loss, and what its trainer does at the switch.

`python examples/check_port.py` checks our model and examples/hf_trainer.py. To check your own port,
copy this file. Use a small float32 model of 128 token ids in eval mode, after 50 training steps,
because an untrained model hides mistakes. For nanoGPT (`original` is unchanged):

    loss_of = lambda rows, s: model(rows[:, :-s], rows[:, s:].contiguous(), s)[1]
    own_loss = lambda rows: original(rows[:, :-1], rows[:, 1:].contiguous())[1]
    assert not check_port(loss_of, 128, own_loss, tables=[model.transformer.wte.weight])
"""
import sys

import torch


def check(failed, name, got, expected, mistakes, tolerance=5e-5, where=""):
    """Compare two numbers. If they differ, print them and append name to the list failed."""
    if not abs(got - expected) <= tolerance and name not in failed:     # NaN fails too
        print(f"{name} FAILED{where}: {got:.8g}, not {expected:.8g}. Likely mistakes: {mistakes}.")
        failed.append(name)


@torch.no_grad()
def check_port(loss_of, V, own_loss=None, tables=(), padding=None, labelled=None, s=4, l=8):
    """Print the checks that a port's loss fails, and return the list of their names.

    loss_of(rows, s) is the port's loss, a scalar, of token ids (B, (k + 1) s), for any B and k.
    V is the number of columns of the logits, and tables are the tensors (V, width) that are looked
    up by token id. own_loss(rows) is the trainer's own next-token loss of token ids (B, l + 1).
    padding is the token id that is not averaged into a bag, if the port has one.
    labelled(rows, s, labels) is the loss with labels (B, (k + 1) s). Label i is token i or -100.
    """
    failed = []
    rows = torch.randint(V - 2, (4, (l + 1) * s), generator=torch.Generator().manual_seed(0))
    rows[rows == padding] = V - 2
    unused = V - 1 if padding != V - 1 else V - 2       # a token that is not in rows
    singles = rows[:, :l + 1]                                           # (4, l + 1)

    def first_bag(bag):                 # the loss of a row that begins with this bag
        return loss_of(torch.cat((torch.tensor([bag]), rows[:1, s:]), 1), s)

    def last_bag(bag):                  # the loss at the last position alone, if bag is its target
        row = torch.cat((rows[:1, :-s], torch.tensor([bag])), 1)
        return l * loss_of(row, s) - (l - 1) * loss_of(row[:, :-s], s)

    check(failed, "repeat", loss_of(rows, s), loss_of(rows, s), "dropout is on; call model.eval()")
    if own_loss:
        check(failed, "own", loss_of(singles, 1), own_loss(singles),
              "the logits are in bfloat16; the port changes s = 1 too; the targets are the inputs")
    check(failed, "copies", loss_of(singles.repeat_interleave(s, 1), s), loss_of(singles, 1),
          "a sum of embeddings; a loss divided by s; positions of tokens; wrong or missing targets")
    flipped = rows.unflatten(1, (-1, s)).flip(2).flatten(1)
    check(failed, "order", loss_of(flipped, s), loss_of(rows, s),
          "one token of a bag is used; labels are shifted by 1 and not by s; sums in bfloat16")
    f = torch.tensor([last_bag([v] * s) for v in range(V)])     # (V,): -log p(v); all p(v) sum to 1
    check(failed, "chain", f.neg().exp().sum(), 1, "a position sees its target; the target is not "
          "the next bag; the loss is not a cross-entropy, or not a mean over positions", 5e-4)
    a, b = int(f.argmax()), int(f.argmin())
    check(failed, "target", last_bag([a] * (s - 1) + [b]), ((s - 1) * f[a] + f[b]) / s,
          "a token that is twice in its bag counts once; the log of a mean probability", 5e-4)
    if labelled:                        # all labels except the last two are ignored
        row = torch.cat((rows[:1, :-2], torch.tensor([[a, b]])), 1)
        labels = torch.cat((torch.full_like(row[:, :-2], -100), row[:, -2:]), 1)
        check(failed, "ignore", labelled(row, s, labels), (f[a] + f[b]) / 2,
              "ignored labels are trained as token 0, or count in the divisor of a mean", 5e-4)
    a, b = rows.unique()[:2].tolist()
    if padding is not None:
        check(failed, "padding", first_bag([a] * (s - 1) + [padding]), first_bag([a] * s),
              "padding is averaged into its bag")
    if tables:                          # the unused token becomes the mean of bag (a, ..., a, b)
        saved = [table[unused].clone() for table in tables]
        for table in tables:
            table[unused] = ((s - 1) * table[a] + table[b]) / s
        check(failed, "mean", first_bag([a] * (s - 1) + [b]), first_bag([unused] * s),
              "a maximum or a set in place of the mean; a norm before the mean; a missing table")
        for table, saved_row in zip(tables, saved):
            table[unused] = saved_row
    return failed


class Spy(list):
    """A record of a trainer's forward passes, about ten steps on each side of the switch."""

    def record(self, step, inputs, targets, training, optimizer):
        """Call this in every forward pass, also in validation, with ids (B, l s) or (B, l, s)."""
        inputs, targets = inputs.flatten(1).cpu(), targets.flatten(1).cpu()
        count = max((int(state.get("step", 0)) for state in optimizer.state.values()), default=0)
        self.append((step, inputs, targets, training, count, optimizer.param_groups[0]["lr"]))

    def check(self, s, l, switch):
        """Print and return as check_port does. `switch` is the first step on single tokens."""
        failed, counts, rates = [], {}, {}
        for step, inputs, targets, training, count, rate in self:
            n, at = inputs.size(1), f" at step {step}"
            size = s if training and step < switch else 1
            shift = next((d for d in range(n) if inputs[:, d:].equal(targets[:, :n - d])), -1)
            if training:
                counts[step], rates[step] = count, rate
                check(failed, "row length", n, l * size, "rows not s times longer; a batch with "
                      "the other s; a wrong switch step; a phase that never runs", where=at)
                check(failed, "target shift", shift, size, "the loader shifts by 1 and not by s; "
                      "the targets are the inputs; a wrong switch step", where=at)
            else:
                check(failed, "validation shift", shift, 1, "validation is in bags", where=at)
        if not {switch - 2, switch - 1, switch, switch + 1} <= rates.keys():
            raise ValueError(f"Record every training step from {switch - 2} to {switch + 1}.")
        for step in (switch, switch + 1):
            at, expected_rate = f" at step {step}", 2 * rates[step - 1] - rates[step - 2]
            check(failed, "learning rate", rates[step], expected_rate,
                  "the schedule starts again", 0.02 * rates[step - 1], at)
            if counts[step - 1]:        # 0 if the optimizer does not count its steps
                check(failed, "optimizer steps", counts[step], counts[step - 1] + 1,
                      "the optimizer is new or cleared; float16 skipped a step", where=at)
        return failed


if __name__ == "__main__":
    sys.path.append(sys.path[0] + "/..")        # the folder of model.py
    from model import GPT, Config
    def check_model(name, model, embed, superposed_loss):
        for p in model.parameters():    # weights as large as after training
            torch.nn.init.normal_(p, std=0.5)
        loss_of = lambda rows, s: superposed_loss(model, embed, rows.unflatten(1, (-1, s)))
        print(f"{name}: {check_port(loss_of, 128, tables=[embed.weight]) or 'every check passed'}")

    gpt = GPT(Config(n_layer=2, n_embd=32, n_head=4, n_kv_head=2, n_hidden=64, vocab_size=128))
    check_model("model.py", gpt, gpt.embedding, lambda _, __, bags: gpt(bags[:, :-1], bags[:, 1:]))
    from hf_trainer import LlamaConfig, LlamaForCausalLM, superposed_loss
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=128, hidden_size=64, num_hidden_layers=2))
    check_model("examples/hf_trainer.py", llama, llama.get_input_embeddings(), superposed_loss)
