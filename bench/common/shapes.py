"""Shapes of real models, written down, so that benchmarks meet the sizes people use and nobody has to download
weights."""

from typing import NamedTuple


class Shape(NamedTuple):
    """The numbers of a Llama or Qwen2 `config.json` that decide its parameters."""

    family: str  # transformers' model_type
    hidden: int
    layers: int
    intermediate: int
    heads: int
    kv_heads: int
    vocab: int
    tied: bool  # the output layer is the embedding


MODELS = {
    "50M": Shape("llama", 512, 12, 1536, 8, 8, 16384, True),  # no published model: what a CPU can still generate with
    "SmolLM2-135M": Shape("llama", 576, 30, 1536, 9, 3, 49152, True),
    "Qwen2.5-0.5B": Shape("qwen2", 896, 24, 4864, 14, 2, 151936, True),
    "Qwen2.5-1.5B": Shape("qwen2", 1536, 28, 8960, 12, 2, 151936, True),
    "Qwen2.5-7B": Shape("qwen2", 3584, 28, 18944, 28, 4, 152064, False),
    "Llama-3.1-8B": Shape("llama", 4096, 32, 14336, 32, 8, 128256, False),
    "Llama-3.1-70B": Shape("llama", 8192, 80, 28672, 64, 8, 128256, False),
}


def parameter_shapes(model):
    """{name: shape} of every parameter, in the order of named_parameters()."""
    m = MODELS[model]
    kv = m.hidden // m.heads * m.kv_heads
    shapes = {"model.embed_tokens.weight": (m.vocab, m.hidden)}
    for i in range(m.layers):
        layer = f"model.layers.{i}."
        for projection, rows in (("q", m.hidden), ("k", kv), ("v", kv)):
            shapes[f"{layer}self_attn.{projection}_proj.weight"] = (rows, m.hidden)
            if m.family == "qwen2":
                shapes[f"{layer}self_attn.{projection}_proj.bias"] = (rows,)
        shapes[f"{layer}self_attn.o_proj.weight"] = (m.hidden, m.hidden)
        shapes[f"{layer}mlp.gate_proj.weight"] = shapes[f"{layer}mlp.up_proj.weight"] = (m.intermediate, m.hidden)
        shapes[f"{layer}mlp.down_proj.weight"] = (m.hidden, m.intermediate)
        shapes[f"{layer}input_layernorm.weight"] = shapes[f"{layer}post_attention_layernorm.weight"] = (m.hidden,)
    shapes["model.norm.weight"] = (m.hidden,)
    if not m.tied:
        shapes["lm_head.weight"] = (m.vocab, m.hidden)
    return shapes


def config(model):
    """The transformers config of a model of these shapes."""
    from transformers import AutoConfig

    m = MODELS[model]
    return AutoConfig.for_model(
        m.family,
        hidden_size=m.hidden,
        num_hidden_layers=m.layers,
        intermediate_size=m.intermediate,
        num_attention_heads=m.heads,
        num_key_value_heads=m.kv_heads,
        vocab_size=m.vocab,
        tie_word_embeddings=m.tied,
        max_position_embeddings=8192,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
