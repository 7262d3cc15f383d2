"""A trained model for Hugging Face transformers, and for what reads its folders.

    python tools/export.py runs/tiny-s6-r0.2-seed0 exported
"""
import argparse
import sys
import tempfile
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import END_OF_TEXT, fail
from tools.sample import load_model


def hugging_face(model, end):
    """A GPT as transformers' Llama or Qwen3-MoE, same logits; end: id of end-of-text or None.

    Its tables have vocab_size rows: the padding is cut. SystemExit(2) if it is neither.
    """
    import transformers
    c, vocabulary = model.config, slice(model.config.vocab_size)
    if bool(c.n_expert) != c.qk_norm:
        fail("Hugging Face has Llama without qk_norm and Qwen3-MoE with it; this is neither")
    if c.n_expert and int(transformers.__version__.split(".")[0]) < 5:
        fail("a mixture of experts wants transformers 5: pip install -U transformers")
    shape = dict(
        vocab_size=c.vocab_size, hidden_size=c.n_embd, intermediate_size=c.n_hidden,
        num_hidden_layers=c.n_layer, num_attention_heads=c.n_head, num_key_value_heads=c.n_kv_head,
        head_dim=model.blocks[0].attention.head_dim, max_position_embeddings=c.seq_len,
        rope_theta=c.rope_theta, rms_norm_eps=model.norm.eps, tie_word_embeddings=False,
        bos_token_id=end, eos_token_id=end)
    if c.n_expert:
        theirs = transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(
            **shape, moe_intermediate_size=c.n_hidden, num_experts=c.n_expert,
            num_experts_per_tok=c.n_active, norm_topk_prob=True))
    else:
        theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape))
    weights = {"model.embed_tokens.weight": model.embedding.weight[vocabulary],
               "model.norm.weight": model.norm.weight,
               "lm_head.weight": model.head.weight[vocabulary]}
    for i, block in enumerate(model.blocks):
        layer = attention_weights(block) | (moe_weights if c.n_expert else mlp_weights)(block)
        weights |= {f"model.layers.{i}.{name}": weight for name, weight in layer.items()}
    theirs.load_state_dict(weights)
    return theirs


def attention_weights(block):
    attention = block.attention
    heads = (attention.n_head, attention.n_kv_head, attention.n_kv_head)
    q, k, v = attention.qkv.weight.split([n * attention.head_dim for n in heads])
    norms = {f"self_attn.{name}": p for name, p in attention.named_parameters() if "norm" in name}
    return {"input_layernorm.weight": block.attention_norm.weight,
            "self_attn.q_proj.weight": q, "self_attn.k_proj.weight": k,
            "self_attn.v_proj.weight": v, "self_attn.o_proj.weight": attention.out.weight,
            "post_attention_layernorm.weight": block.mlp_norm.weight, **norms}


def mlp_weights(block):
    gate, up = block.mlp.gate_up.weight.chunk(2)
    return {"mlp.gate_proj.weight": gate, "mlp.up_proj.weight": up,
            "mlp.down_proj.weight": block.mlp.down.weight}


def moe_weights(block):
    return {"mlp.gate.weight": block.mlp.router.weight,
            "mlp.experts.gate_up_proj": block.mlp.gate_up, "mlp.experts.down_proj": block.mlp.down}


def convert_tokenizer(encoding):
    """transformers' tokenizer with the ids of a tiktoken.Encoding, or None if it cannot have them.

    Its regular expressions are of another library than tiktoken's, and may mean something else.
    """
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import TikTokenConverter
    special = encoding._special_tokens
    tokens = encoding._mergeable_ranks | {token.encode(): rank for token, rank in special.items()}
    try:
        # The converter wants a file of byte pairs: it gets what would be in it
        with mock.patch("tiktoken.load.load_tiktoken_bpe", lambda path: tokens):
            tokenizer = TikTokenConverter(None, encoding._pat_str, False, special).converted()
    except Exception:                   # of the expression that it does not know, without a class
        return None
    everything = b"".join(tokens).decode(errors="replace")
    if tokenizer.encode(everything).ids != encoding.encode(everything, allowed_special="all"):
        return None
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT,
        model_input_names=["input_ids", "attention_mask"], clean_up_tokenization_spaces=False)


def export(run, folder):
    """Write a run's model and tokenizer to folder, new or empty, which appears whole or not at all.

    SystemExit(2) where it cannot, ImportError where a package is missing.
    """
    import transformers                 # before the work, if it is missing
    path = Path(folder).resolve()
    if path.exists() and (path.is_file() or any(path.iterdir())):
        fail(f"{folder} holds something already: name a new folder")
    model, encoding = load_model(run)
    theirs = hugging_face(model, encoding and encoding._special_tokens.get(END_OF_TEXT))
    tokenizer = encoding and convert_tokenizer(encoding)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as temporary:
            new = Path(temporary, "new")
            new.mkdir()                 # with a plain folder's permissions
            theirs.save_pretrained(new)
            if tokenizer:
                tokenizer.save_pretrained(new)
            if path.exists():
                path.rmdir()            # Windows renames onto no folder, not even an empty one
            new.rename(path)
    except Exception as error:          # safetensors' of a full disk is no OSError
        fail(f"{folder}: cannot write there ({error}): name another folder")
    if not tokenizer:
        print(f"{folder} has no tokenizer: it cannot be loaded, or not converted exactly",
              file=sys.stderr)
    print(f"{folder} is ready for transformers and for lm_eval --model hf --model_args "
          f"pretrained={folder}")


def main(argv=None):
    """Export as argv says (default: the command line). SystemExit(2) on bad input."""
    parser = argparse.ArgumentParser(description="Write a trained model for Hugging Face.",
                                     allow_abbrev=False)
    parser.error = fail
    parser.add_argument("run", help="a run's folder, or a checkpoint file in it")
    parser.add_argument("folder", metavar="DIR", help="the new folder")
    args = parser.parse_args(argv)
    try:
        export(args.run, args.folder)
    except ImportError as error:
        fail(f"{error}: pip install transformers safetensors")


if __name__ == "__main__":
    main()
