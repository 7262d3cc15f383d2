"""Export a trained model to a folder that Hugging Face transformers loads.

    python tools/export.py runs/tiny-s4-r0.2-seed0 exported

This tool writes the files itself, because versions 4 and 5 of transformers write different names
for the same fields and tensors. The names below are those of version 4, which version 5 reads too.
"""
import argparse
import json
import sys
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import fail
from tools.corpus import END_OF_TEXT, first_line, is_new, new_folder
from tools.sample import load_model


def hugging_face(model, end):
    """(fields of config.json, {name: tensor}) of a Llama or a Qwen3-MoE with the same logits.

    end is the id of the end-of-text token, or None. The embedding and the head have vocab_size
    rows, because our other rows are padding. SystemExit(2) if transformers has no such model.
    """
    c = model.config
    if bool(c.n_expert) != c.qk_norm:
        fail(f"This model has --n-expert {c.n_expert} and --qk-norm {c.qk_norm}. Train a model "
             "with neither (a Llama) or with both (a Qwen3-MoE).")
    if not c.n_expert and c.n_embd % c.n_head:
        fail(f"transformers 5 does not load a Llama whose --n-head {c.n_head} does not divide "
             f"--n-embd {c.n_embd}. Train a model with another --n-head.")
    config = dict(
        model_type="llama", architectures=["LlamaForCausalLM"], dtype="float32",
        # Without this field, 4.57.6 warns by mistake about a tokenizer of more than 100,000 tokens
        transformers_version="4.57.0",
        vocab_size=c.vocab_size, hidden_size=c.n_embd, intermediate_size=c.n_hidden,
        num_hidden_layers=c.n_layer, num_attention_heads=c.n_head, num_key_value_heads=c.n_kv_head,
        head_dim=model.blocks[0].head_dim, max_position_embeddings=c.seq_len,
        rope_theta=c.rope_theta,        # version 4 does not read the rope_parameters of version 5
        rms_norm_eps=1e-5, hidden_act="silu", attention_bias=False, tie_word_embeddings=False,
        bos_token_id=end, eos_token_id=end)
    if c.n_expert:
        config |= dict(
            model_type="qwen3_moe", architectures=["Qwen3MoeForCausalLM"],
            num_experts=c.n_expert,     # version 4 does not read the num_local_experts of version 5
            num_experts_per_tok=c.n_active, norm_topk_prob=True, moe_intermediate_size=c.n_hidden,
            decoder_sparse_step=1, mlp_only_layers=[])      # all layers have experts
        if c.n_embd % 8 or c.n_hidden % 8:      # the default experts of version 5 do not allow this
            config["experts_implementation"] = "eager"
    tensors = {"model.embed_tokens.weight": model.embedding.weight[:c.vocab_size],
               "model.norm.weight": model.norm.weight,
               "lm_head.weight": model.head.weight[:c.vocab_size]}
    for i, block in enumerate(model.blocks):
        q, k, v = block.qkv.weight.split([n * block.head_dim for n in block.heads])
        layer = {"input_layernorm": block.attention_norm.weight,
                 "self_attn.q_proj": q, "self_attn.k_proj": k, "self_attn.v_proj": v,
                 "self_attn.o_proj": block.out.weight,
                 "post_attention_layernorm": block.mlp_norm.weight}
        if c.n_expert:
            layer |= {"self_attn.q_norm": block.q_norm.weight,
                      "self_attn.k_norm": block.k_norm.weight,
                      "mlp.gate": block.mlp.router.weight}
            # Version 5 joins the experts of a layer itself. Version 4 cannot read joined experts
            swiglus = {f"mlp.experts.{e}": weights
                       for e, weights in enumerate(zip(block.mlp.gate_up, block.mlp.down))}
        else:
            swiglus = {"mlp": (block.mlp.gate_up.weight, block.mlp.down.weight)}
        for name, (gate_up, down) in swiglus.items():
            gate, up = gate_up.chunk(2)
            layer |= {f"{name}.gate_proj": gate, f"{name}.up_proj": up, f"{name}.down_proj": down}
        tensors |= {f"model.layers.{i}.{name}.weight": tensor for name, tensor in layer.items()}
    return config, tensors


def convert_tokenizer(encoding):
    """A tokenizers.Tokenizer with the ids of a tiktoken.Encoding, or None if the ids differ.

    They can differ because the two packages use different libraries for regular expressions.
    """
    from transformers.convert_slow_tokenizer import TikTokenConverter
    special = encoding._special_tokens
    tokens = encoding._mergeable_ranks | {token.encode(): id for token, id in special.items()}
    try:
        # The converter reads the tokens from a file. The patch gives it these tokens instead.
        with mock.patch("tiktoken.load.load_tiktoken_bpe", lambda path: tokens):
            tokenizer = TikTokenConverter(None, encoding._pat_str, False, list(special)).converted()
    except Exception:       # tokenizers raises a bare Exception for an expression it does not know
        return None
    text = b"".join(tokens).decode(errors="replace")
    same = tokenizer.encode(text).ids == encoding.encode(text, allowed_special="all")
    return tokenizer if same else None


def main(argv=None):
    """Export as argv (default: the command line) says. SystemExit(2) on bad input."""
    parser = argparse.ArgumentParser(description="Export a trained model.", allow_abbrev=False)
    parser.error, flag = fail, parser.add_argument
    flag("run", help="the folder of a run, or a checkpoint file in such a folder")
    flag("folder", metavar="DIR", type=Path, help="the folder to create")
    args = parser.parse_args(argv)
    if not is_new(args.folder):
        fail(f"{args.folder} holds something already. Name a new folder.")
    model, encoding = load_model(args.run)
    end = encoding._special_tokens.get(END_OF_TEXT) if encoding else None
    config, tensors = hugging_face(model, end)
    try:
        from safetensors.torch import save_file
        tokenizer = convert_tokenizer(encoding) if encoding else None
    except ImportError as error:
        fail(f"{first_line(error)}. Run: pip install -U transformers safetensors")
    files = {"config.json": config,
             "generation_config.json": dict(bos_token_id=end, eos_token_id=end)}
    if tokenizer:
        token = None if end is None else END_OF_TEXT
        files["tokenizer_config.json"] = dict(
            tokenizer_class="PreTrainedTokenizerFast", bos_token=token, eos_token=token,
            model_max_length=model.config.seq_len, clean_up_tokenization_spaces=False,
            model_input_names=["input_ids", "attention_mask"])
    try:
        with new_folder(args.folder) as new:
            save_file(tensors, new / "model.safetensors", metadata={"format": "pt"})
            if tokenizer:
                tokenizer.save(str(new / "tokenizer.json"))
            for name, fields in files.items():
                (new / name).write_text(json.dumps(fields, indent=1))
    except Exception as error:          # if the disk is full, safetensors raises no OSError
        fail(f"{args.folder} cannot be written ({first_line(error)}). Name another folder.")
    if not tokenizer:
        reason = "transformers would give other ids" if encoding else "the run has none"
        print(f"The export has no tokenizer, because {reason}.", file=sys.stderr)
    print(f"{args.folder} is ready. Load it with AutoModelForCausalLM.from_pretrained.")


if __name__ == "__main__":
    main()
