"""The ``config.json`` of dense models with grouped-query attention: Qwen2 and Llama."""

from megatron_ads.errors import ConfigError, require
from megatron_ads.json_fields import JsonFields
from megatron_ads.model_shape.records import GroupedQueryShape, ModelShape
from megatron_ads.model_shape.rope import read_llama3, read_rope


def read_qwen2(fields: JsonFields) -> ModelShape:
    """Read Qwen2, Qwen2.5 and what is distilled into them; their queries, keys and values have biases."""
    fields.require_present("num_key_value_heads", "It decides how many query heads share a key and a value.")
    fields.expect("attention_bias", True, "the projections of Qwen2 to queries, keys and values have biases")
    shape = _read_dense(fields, "qwen2", qkv_bias=True, output_bias=False)
    fields.expect("use_mrope", False, "positions are those of text")
    windowed = fields.flag("use_sliding_window", False) and "sliding_window" in fields
    first = fields.integer("max_window_layers", 28, minimum=0)
    fields.integer("sliding_window", 4096)  # without effect
    require(
        not windowed or first >= shape.num_layers,
        f"use_sliding_window is True: layers from max_window_layers = {first} on would see a window of tokens only, "
        "which is not supported. Set it to false if the model was trained without.",
    )
    return shape


def read_llama(fields: JsonFields) -> ModelShape:
    """Read Llama 2 and 3 and what is distilled into them."""
    bias = fields.flag("attention_bias", False)
    fields.expect("pretraining_tp", 1, "products are not taken in slices")
    return _read_dense(fields, "llama", qkv_bias=bias, output_bias=bias)


def _read_dense(fields: JsonFields, model_type: str, *, qkv_bias: bool, output_bias: bool) -> ModelShape:
    hidden, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    require(
        hidden % heads == 0 or "head_dim" in fields,
        f"num_attention_heads = {heads} does not divide hidden_size = {hidden}, and there is no head_dim.",
    )
    rope_theta, scaling = read_rope(fields, {"llama3": read_llama3})
    layers = fields.integer("num_hidden_layers")
    shape = ModelShape(
        model_type=model_type,
        vocab_size=fields.integer("vocab_size"),
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        dense_ffn_size=fields.integer("intermediate_size"),
        first_dense_layers=layers,
        attention=GroupedQueryShape(
            num_groups=fields.integer("num_key_value_heads", heads),
            head_dim=fields.integer("head_dim", max(hidden // heads, 1)),
            qkv_bias=qkv_bias,
            output_bias=output_bias,
        ),
        rope_theta=rope_theta,
        rope_scaling=scaling,
        max_positions=fields.integer("max_position_embeddings"),
        rms_norm_eps=fields.positive("rms_norm_eps", 1e-6),
        initializer_range=fields.positive("initializer_range", 0.02),
        tie_word_embeddings=fields.flag("tie_word_embeddings", False),
    )
    fields.expect("mlp_bias", False, "the feed-forward layers have no biases")
    fields.expect("attention_dropout", 0.0, "fine-tuning runs without dropout")
    fields.expect("hidden_act", "silu", "the feed-forward layers are SwiGLU")
    if other := sorted(set(fields.texts("layer_types")) - {"full_attention"}):
        raise ConfigError(
            f"layer_types has {other[0]!r}, but every layer sees all tokens before: only 'full_attention' is supported."
        )
    return shape
