"""How many parameters each part of a model has, from its shape alone."""

from megatron_ads.architecture import ModelShape


def parameters_by_component(shape: ModelShape) -> dict[str, int]:
    """Return the parameters of every part; their sum is the whole model, MTP included.

    The embedding and output layer that a checkpoint repeats for each MTP layer are counted once. The routers'
    selection biases are counted with the routers.
    """
    moe_layers = shape.num_layers - shape.first_dense_layers
    return {
        "embedding": shape.vocab_size * shape.hidden_size,
        "attention": shape.num_layers * _attention(shape),
        "dense": shape.first_dense_layers * _feed_forward(shape, shape.dense_ffn_size),
        "router": moe_layers * _router(shape),
        "experts": moe_layers * _experts(shape),
        "shared_experts": moe_layers * _feed_forward(shape, shape.shared_ffn_size),
        "norms": (2 * shape.num_layers + 1) * shape.hidden_size,
        "output": shape.vocab_size * shape.hidden_size,
        "mtp": shape.mtp_layers * _mtp_layer(shape),
    }


def _attention(shape: ModelShape) -> int:
    """Count one latent attention, its two inner norms included (arXiv:2405.04434, section 2.1)."""
    hidden, heads = shape.hidden_size, shape.num_heads
    query_width = heads * shape.qk_head_dim
    if shape.q_lora_rank is None:
        query = hidden * query_width
    else:
        query = hidden * shape.q_lora_rank + shape.q_lora_rank + shape.q_lora_rank * query_width
    down = hidden * (shape.kv_lora_rank + shape.qk_rope_head_dim)
    up = shape.kv_lora_rank * heads * (shape.qk_nope_head_dim + shape.v_head_dim)
    return query + down + shape.kv_lora_rank + up + heads * shape.v_head_dim * hidden


def _feed_forward(shape: ModelShape, width: int) -> int:
    """Count gate, up and down projections."""
    return 3 * shape.hidden_size * width


def _router(shape: ModelShape) -> int:
    return shape.num_experts * (shape.hidden_size + shape.has_expert_bias)


def _experts(shape: ModelShape) -> int:
    return shape.num_experts * _feed_forward(shape, shape.expert_ffn_size)


def _mtp_layer(shape: ModelShape) -> int:
    """Count an MoE layer, the projection of two hidden states to one, and five norms."""
    layer = _attention(shape) + _router(shape) + _experts(shape) + _feed_forward(shape, shape.shared_ffn_size)
    return layer + 2 * shape.hidden_size * shape.hidden_size + 5 * shape.hidden_size
