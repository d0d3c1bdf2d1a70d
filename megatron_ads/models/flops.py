"""How many floating-point operations one token of training costs: the matrix products, counted exactly. No torch.

A product of (1, m) by (m, n) is 2 m n operations. The backward pass takes two products for each of the forward pass,
one for the gradient of either factor, so training costs three times the forward pass; weights beside adapters need no
gradient. Norms, activations, routing beyond its one product, the softmax, and whatever is recomputed to save memory are
not counted.

    h hidden, a heads, q/c ranks of the query/key-value projections, n/r/v head widths (no position, position, value),
    S length of a sample, f/g inner widths of a dense feed-forward/an expert, k experts per token, s shared, E experts
"""

from conversion.names import parameters
from megatron_ads.architecture import ModelShape
from megatron_ads.models.adapter_shapes import Lora


def flops_per_token(shape: ModelShape, seq_length: int, *, with_mtp: bool = False, lora: Lora | None = None) -> int:
    """Return the forward and backward operations of one token in a causal sample of ``seq_length`` tokens.

    Attention counts what a token may look at: itself and those before it, (S + 1) / 2 on average.

    Args:
        with_mtp: Count the multi-token-prediction layers and their pass through the output layer too.
        lora: The adapters that are trained instead of the weights.
    """
    layers = range(shape.num_layers)
    forward = sum(_layer(shape, layer, seq_length) for layer in layers) + _product(shape.hidden_size, shape.vocab_size)
    if with_mtp:
        forward += sum(
            _product(2 * shape.hidden_size, shape.hidden_size)
            + _layer(shape, shape.num_layers + layer, seq_length)
            + _product(shape.hidden_size, shape.vocab_size)
            for layer in range(shape.mtp_layers)
        )
    if lora is None:
        return 3 * forward
    scores = (shape.num_layers + with_mtp * shape.mtp_layers) * _scores(shape, seq_length)
    return 2 * forward + scores + 3 * _adapters(shape, lora)


def _adapters(shape: ModelShape, lora: Lora) -> int:
    """2 r (m + n) for a weight of (m, n), k times for those of one expert."""
    return 2 * sum(
        lora.elements(parameter) * (1 if parameter.expert is None else shape.experts_per_token)
        for parameter in parameters(shape).values()
        if parameter.expert in (None, 0)
    )


def _product(rows: int, columns: int) -> int:
    return 2 * rows * columns


def _layer(shape: ModelShape, layer: int, seq_length: int) -> int:
    return _attention(shape, seq_length) + (_experts(shape) if shape.is_moe_layer(layer) else _dense(shape))


def _attention(shape: ModelShape, seq_length: int) -> int:
    """h q + q a (n + r), or h a (n + r); h (c + r) + c a (n + v); (S + 1) / 2 keys of a (n + r + v); a v h."""
    queries = shape.num_heads * shape.qk_head_dim
    if shape.q_lora_rank is None:
        query = _product(shape.hidden_size, queries)
    else:
        query = _product(shape.hidden_size, shape.q_lora_rank) + _product(shape.q_lora_rank, queries)
    down = _product(shape.hidden_size, shape.kv_lora_rank + shape.qk_rope_head_dim)
    up = _product(shape.kv_lora_rank, shape.num_heads * (shape.qk_nope_head_dim + shape.v_head_dim))
    output = _product(shape.num_heads * shape.v_head_dim, shape.hidden_size)
    return query + down + up + _scores(shape, seq_length) + output


def _scores(shape: ModelShape, seq_length: int) -> int:
    return (seq_length + 1) * shape.num_heads * (shape.qk_head_dim + shape.v_head_dim)


def _dense(shape: ModelShape) -> int:
    """Gate, up and down: 3 h f."""
    return 3 * _product(shape.hidden_size, shape.dense_ffn_size)


def _experts(shape: ModelShape) -> int:
    """Router h E, and (k + s) experts of 3 h g."""
    running = shape.experts_per_token + shape.num_shared_experts
    router = _product(shape.hidden_size, shape.num_experts)
    return router + running * 3 * _product(shape.hidden_size, shape.expert_ffn_size)
