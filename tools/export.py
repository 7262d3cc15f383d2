"""A trained model for Hugging Face transformers, and for what reads its folders.

    python tools/export.py runs/tiny-s4-r0.2-seed0 exported
"""
import argparse
import sys
import tempfile
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import fail
from tools.corpus import END_OF_TEXT, first_line, is_new
from tools.sample import load_model


def hugging_face(model, end):
    """A GPT as transformers' Llama or Qwen3-MoE, same logits; end: id of end-of-text or None.

    Its tables have vocab_size rows: the padding is cut. SystemExit(2) if it is neither.
    """
    import transformers
    c = model.config
    if bool(c.n_expert) != c.qk_norm:
        fail("Hugging Face has Llama without qk_norm and Qwen3-MoE with it; this is neither")
    shape = dict(
        vocab_size=c.vocab_size, hidden_size=c.n_embd, intermediate_size=c.n_hidden,
        num_hidden_layers=c.n_layer, num_attention_heads=c.n_head, num_key_value_heads=c.n_kv_head,
        head_dim=model.blocks[0].head_dim, max_position_embeddings=c.seq_len,
        rope_theta=c.rope_theta, rms_norm_eps=1e-5, bos_token_id=end, eos_token_id=end)
    if c.n_expert:
        shape |= dict(moe_intermediate_size=c.n_hidden, num_experts=c.n_expert,
                      num_experts_per_tok=c.n_active, norm_topk_prob=True)
    config = transformers.AutoConfig.for_model("qwen3_moe" if c.n_expert else "llama", **shape)
    theirs = transformers.AutoModelForCausalLM.from_config(config)
    weights = {"model.embed_tokens.weight": model.embedding.weight[:c.vocab_size],
               "model.norm.weight": model.norm.weight,
               "lm_head.weight": model.head.weight[:c.vocab_size]}
    for i, block in enumerate(model.blocks):
        q, k, v = block.qkv.weight.split([n * block.head_dim for n in block.heads])
        layer = {"input_layernorm.weight": block.attention_norm.weight,
                 "self_attn.q_proj.weight": q, "self_attn.k_proj.weight": k,
                 "self_attn.v_proj.weight": v, "self_attn.o_proj.weight": block.out.weight,
                 "post_attention_layernorm.weight": block.mlp_norm.weight}
        if c.n_expert:
            layer |= {"self_attn.q_norm.weight": block.q_norm.weight,
                      "self_attn.k_norm.weight": block.k_norm.weight,
                      "mlp.gate.weight": block.mlp.router.weight,
                      "mlp.experts.gate_up_proj": block.mlp.gate_up,
                      "mlp.experts.down_proj": block.mlp.down}
        else:
            gate, up = block.mlp.gate_up.weight.chunk(2)
            layer |= {"mlp.gate_proj.weight": gate, "mlp.up_proj.weight": up,
                      "mlp.down_proj.weight": block.mlp.down.weight}
        weights |= {f"model.layers.{i}.{name}": weight for name, weight in layer.items()}
    theirs.load_state_dict(weights)
    return theirs


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


def main(argv=None):
    """Export as argv says (default: the command line). SystemExit(2) on bad input."""
    parser = argparse.ArgumentParser(description="Export a trained model.", allow_abbrev=False)
    parser.error, flag = fail, parser.add_argument
    flag("run", help="a run's folder, or a checkpoint file in it")
    flag("folder", metavar="DIR", type=Path, help="the new folder")
    args = parser.parse_args(argv)
    if not is_new(args.folder):
        fail(f"{args.folder} holds something already: name a new folder")
    model, encoding = load_model(args.run)
    try:
        theirs = hugging_face(model, encoding and encoding._special_tokens.get(END_OF_TEXT))
        tokenizer = encoding and convert_tokenizer(encoding)
    except (ImportError, RuntimeError) as error:        # the latter: transformers 4 and experts
        fail(f"{first_line(error)}: pip install -U transformers safetensors")
    try:
        args.folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=args.folder.parent) as temporary:
            new = Path(temporary, "new")
            theirs.save_pretrained(new)
            if tokenizer:
                tokenizer.save_pretrained(new)
            new.rename(args.folder)
    except Exception as error:          # safetensors' of a full disk is no OSError
        fail(f"{args.folder}: cannot write there ({first_line(error)}): name another folder")
    if not tokenizer:
        print("without a tokenizer: the run has none, or it has no equal there", file=sys.stderr)
    print(f"{args.folder} is ready: lm_eval --model hf --model_args pretrained={args.folder}")


if __name__ == "__main__":
    main()
