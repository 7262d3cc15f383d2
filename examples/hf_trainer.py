"""Token superposition in somebody else's trainer: Hugging Face's, with a small Llama.

    pip install "transformers>=5.2" accelerate
    python examples/hf_trainer.py               # 500 steps, the first 100 on bags of 4 tokens
    python examples/hf_trainer.py --s 1         # the baseline ends lower, because 500 steps are few

Your own trainer needs superposed_loss, collate, SuperposedTrainer, and an s in each row.
"""
import argparse
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
from tools.corpus import PYTHON_CORPUS, build_python_corpus

try:
    import accelerate                   # Trainer needs it
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
except ImportError as error:
    data.fail(f"{error}. Run: pip install 'transformers>=5.2' accelerate")

SEQ_LEN = 96                            # l, the number of positions in a row, for every s


def superposed_loss(model, embed, bags):
    """bags (B, l+1, s) token ids -> nats, float32. With s = 1 it is the next-token loss."""
    inputs, targets = bags[:, :-1], bags[:, 1:]                     # bag j predicts bag j+1
    x = embed(inputs).float().mean(2).to(embed.weight.dtype)        # (B, l, d): one mean per bag
    z = model(inputs_embeds=x).logits.float()                       # (B, l, V)
    return (z.logsumexp(-1) - z.gather(-1, targets).mean(-1)).mean()


def collate(rows):
    tokens = torch.stack([row["tokens"] for row in rows])
    return {"bags": tokens.unflatten(1, (-1, rows[0]["s"]))}        # (B, l+1, s)


class SuperposedTrainer(Trainer):
    # Without "labels" there is no num_items_in_batch, so Trainer averages over micro-batches
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = superposed_loss(model, self.model.get_input_embeddings(), inputs["bags"])
        return (loss, {}) if return_outputs else loss


def draw_rows(stream, sizes, batch):
    """For each s in sizes, `batch` rows of l+1 bags from random places of the stream, as a list."""
    rng, rows = np.random.default_rng(0), []
    for s in sizes:
        n = (SEQ_LEN + 1) * s
        for start in rng.integers(len(stream) - n, size=batch):
            rows.append({"tokens": stream.rows([start], n)[0], "s": s})
    return rows


def main(argv=None):
    """Train as argv says, print the validation loss, return the Trainer."""
    parser = argparse.ArgumentParser(description="Superpose a Hugging Face Trainer.")
    parser.error, flag = data.fail, parser.add_argument
    flag("--steps", type=int, default=500, help="optimizer steps (default: 500)")
    flag("--s", type=int, default=4, help="tokens in a bag (default: 4)")
    flag("--r", type=float, default=0.2, help="fraction of the steps on bags (default: 0.2)")
    flags = parser.parse_args(argv)
    if flags.steps < 1 or flags.s < 1 or not 0 <= flags.r <= 1:
        data.fail(f"--steps {flags.steps} --s {flags.s} --r {flags.r}: choose two positive numbers "
                  "and a fraction.")
    build_python_corpus(PYTHON_CORPUS)
    train, val, meta, _ = data.load(PYTHON_CORPUS)
    args = TrainingArguments(
        output_dir="runs/hf_trainer", save_strategy="no", report_to="none", logging_steps=25,
        max_steps=flags.steps, per_device_train_batch_size=16, per_device_eval_batch_size=16,
        learning_rate=3e-3, warmup_steps=flags.steps // 10, dataloader_pin_memory=False,
        remove_unused_columns=False,            # otherwise Trainer drops our columns
        label_names=["bags"],                   # otherwise evaluation has no loss
        train_sampling_strategy="sequential")   # otherwise a batch mixes both values of s
    config = LlamaConfig(vocab_size=meta["vocab_size"], hidden_size=96, intermediate_size=256,
                         num_hidden_layers=3, num_attention_heads=4)
    # The phase switch is in the data, because Trainer makes batches ahead of its global_step
    switch = round(flags.r * flags.steps)
    sizes = switch * [flags.s] + (flags.steps - switch) * [1]
    batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    trainer = SuperposedTrainer(LlamaForCausalLM(config), args, collate,
                                draw_rows(train, sizes, batch), draw_rows(val, 64 * [1], batch))
    trainer.train()
    print(f"validation loss {trainer.evaluate()['eval_loss']:.4f}, nats per next token")
    return trainer


if __name__ == "__main__":
    main()
