"""Which Hugging Face tensors make up each Megatron-Core parameter of a model.

The table is read from the Megatron side: a dense and an MoE layer store the same HF ``post_attention_layernorm``
as the same ``pre_mlp_layernorm``, but the fused gate and up projections exist there only.

Canonical names are those of a Megatron-Core ``GPTModel`` with global layer and global expert numbers, whatever the
layer spec; ``conversion/layer_specs.py`` maps each spec's own names to them. HF names are those of
``DeepseekV3ForCausalLM``, ``Qwen2ForCausalLM`` and ``LlamaForCausalLM`` on disk; MTP layers follow the decoder layers.

An output layer that is tied to the embedding is no parameter of its own.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache

from megatron_ads.architecture import GroupedQueryShape, LatentAttentionShape, ModelShape
from megatron_ads.errors import ConversionError


class Split(StrEnum):
    """How a parameter is divided over the tensor-parallel ranks (expert-tensor-parallel for routed experts)."""

    REPLICATED = "replicated"
    ROWS = "rows"
    """Dim 0, the output features (column-parallel linear)."""
    COLUMNS = "columns"
    """Dim 1, the input features (row-parallel linear)."""
    GATE_UP = "gate_up"
    """Gate over up, stacked on dim 0; each half split by rows."""


class ParameterKind(StrEnum):
    """How a parameter is stored in a published checkpoint."""

    LINEAR = "linear"
    """A projection inside a layer: FP8 with block scales in an FP8 checkpoint."""
    PLAIN = "plain"
    """Never quantised."""
    ROUTER_BIAS = "router_bias"
    """Always FP32."""


@dataclass(frozen=True, slots=True)
class Rule:
    """One Megatron parameter and the HF tensors it is stacked from on dim 0, in order.

    ``dims`` is the shape of each of those HF tensors, in the words of :func:`dimensions`. Where they differ in their
    rows, a tuple of words, one for each tensor, stands first.
    """

    megatron: str
    hf: tuple[str, ...]
    dims: tuple[str | tuple[str, ...], ...]
    split: Split = Split.REPLICATED
    kind: ParameterKind = ParameterKind.PLAIN
    by_group: bool = False
    """Stacked query group by query group: of each tensor the rows of the group, then those of the next group."""


@dataclass(frozen=True, slots=True)
class HfPart:
    """One HF tensor of a parameter, with the shape the config asks for."""

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Parameter:
    """One canonical Megatron parameter of a concrete model."""

    name: str
    parts: tuple[HfPart, ...]
    split: Split
    kind: ParameterKind
    expert: int | None = None
    """Global number of the routed expert it belongs to."""
    groups: int = 1
    """Each part is cut on dim 0 into so many equal pieces; the first pieces of all parts come first, in order."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Full shape, before any tensor-parallel slicing."""
        first = self.parts[0].shape
        return (sum(part.shape[0] for part in self.parts), *first[1:])


_LAYER = "{layer}"  # replaced by the layer's prefix on either side

EMBEDDING = "embedding.word_embeddings.weight"
OUTPUT_LAYER = "output_layer.weight"
TOKEN_TABLES = (EMBEDDING, OUTPUT_LAYER)
"""Parameters with a row for each token; models whose head is the embedding have the first alone."""
OUTSIDE = (
    Rule(EMBEDDING, ("model.embed_tokens.weight",), ("vocab", "hidden"), Split.ROWS),
    Rule("decoder.final_layernorm.weight", ("model.norm.weight",), ("hidden",)),
    Rule(OUTPUT_LAYER, ("lm_head.weight",), ("vocab", "hidden"), Split.ROWS),
)


def _linear(megatron: str, hf: tuple[str, ...] | str, dims: tuple[str, str], split: Split) -> Rule:
    names = (hf,) if isinstance(hf, str) else hf
    return Rule(f"{_LAYER}.{megatron}", tuple(f"{_LAYER}.{name}" for name in names), dims, split, ParameterKind.LINEAR)


def _plain(megatron: str, hf: str, dims: tuple[str, ...], kind: ParameterKind = ParameterKind.PLAIN) -> Rule:
    return Rule(f"{_LAYER}.{megatron}", (f"{_LAYER}.{hf}",), dims, Split.REPLICATED, kind)


INPUT_NORM = _plain("input_layernorm.weight", "input_layernorm.weight", ("hidden",))
FEED_FORWARD_NORM = _plain("pre_mlp_layernorm.weight", "post_attention_layernorm.weight", ("hidden",))
OUTPUT_PROJECTION = _linear(
    "self_attention.linear_proj.weight", "self_attn.o_proj.weight", ("hidden", "heads_v"), Split.COLUMNS
)
# Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1). The down-projections are replicated,
# as with Transformer Engine: their outputs are normalised over the full width.
LATENT_ATTENTION = (
    INPUT_NORM,
    _linear(
        "self_attention.linear_kv_down_proj.weight",
        "self_attn.kv_a_proj_with_mqa.weight",
        ("kv_down", "hidden"),
        Split.REPLICATED,
    ),
    _plain("self_attention.kv_layernorm.weight", "self_attn.kv_a_layernorm.weight", ("kv_lora",)),
    _linear("self_attention.linear_kv_up_proj.weight", "self_attn.kv_b_proj.weight", ("kv_up", "kv_lora"), Split.ROWS),
    OUTPUT_PROJECTION,
    FEED_FORWARD_NORM,
)
QUERY_LOW_RANK = (
    _linear(
        "self_attention.linear_q_down_proj.weight", "self_attn.q_a_proj.weight", ("q_lora", "hidden"), Split.REPLICATED
    ),
    _plain("self_attention.q_layernorm.weight", "self_attn.q_a_layernorm.weight", ("q_lora",)),
    _linear("self_attention.linear_q_up_proj.weight", "self_attn.q_b_proj.weight", ("heads_qk", "q_lora"), Split.ROWS),
)
QUERY_FULL_RANK = (
    _linear("self_attention.linear_q_proj.weight", "self_attn.q_proj.weight", ("heads_qk", "hidden"), Split.ROWS),
)
# Grouped-query attention (arXiv:2305.13245). Megatron-Core has one projection for queries, keys and values: of each
# group its query heads, its key head and its value head.
_QKV = tuple(f"{_LAYER}.self_attn.{letter}_proj" for letter in "qkv")
_QKV_ROWS = ("heads_qk", "groups_qk", "groups_v")
GROUPED_QUERY_ATTENTION = (
    INPUT_NORM,
    Rule(
        f"{_LAYER}.self_attention.linear_qkv.weight",
        tuple(f"{name}.weight" for name in _QKV),
        (_QKV_ROWS, "hidden"),
        Split.ROWS,
        ParameterKind.LINEAR,
        by_group=True,
    ),
    OUTPUT_PROJECTION,
    FEED_FORWARD_NORM,
)
QKV_BIAS = (
    Rule(
        f"{_LAYER}.self_attention.linear_qkv.bias",
        tuple(f"{name}.bias" for name in _QKV),
        (_QKV_ROWS,),
        Split.ROWS,
        by_group=True,
    ),
)
OUTPUT_BIAS = (_plain("self_attention.linear_proj.bias", "self_attn.o_proj.bias", ("hidden",)),)


def _feed_forward(megatron: str, hf: str, width: str, suffix: str = "") -> tuple[Rule, Rule]:
    return (
        _linear(
            f"{megatron}.linear_fc1.weight{suffix}",
            (f"{hf}.gate_proj.weight", f"{hf}.up_proj.weight"),
            (width, "hidden"),
            Split.GATE_UP,
        ),
        _linear(f"{megatron}.linear_fc2.weight{suffix}", f"{hf}.down_proj.weight", ("hidden", width), Split.COLUMNS),
    )


DENSE = _feed_forward("mlp", "mlp", "dense_ffn")
ROUTER = (_plain("mlp.router.weight", "mlp.gate.weight", ("experts", "hidden")),)
ROUTER_BIAS = (
    _plain("mlp.router.expert_bias", "mlp.gate.e_score_correction_bias", ("experts",), ParameterKind.ROUTER_BIAS),
)
SHARED_EXPERTS = _feed_forward("mlp.shared_experts", "mlp.shared_experts", "shared_ffn")
EXPERT = _feed_forward("mlp.experts", "mlp.experts.{expert}", "expert_ffn", "{expert}")

# Multi-token prediction (DeepSeek-V3, arXiv:2412.19437, section 2.2), around a layer like any other.
MTP = (
    _plain("enorm.weight", "enorm.weight", ("hidden",)),
    _plain("hnorm.weight", "hnorm.weight", ("hidden",)),
    Rule(f"{_LAYER}.eh_proj.weight", (f"{_LAYER}.eh_proj.weight",), ("hidden", "hidden_twice"), Split.ROWS),
    _plain("final_layernorm.weight", "shared_head.norm.weight", ("hidden",)),
)
MTP_REPEATS = (
    ("embed_tokens.weight", EMBEDDING),
    ("shared_head.head.weight", OUTPUT_LAYER),
)
"""HF tensors an MTP layer stores again, and the canonical parameters they repeat."""

DERIVED_BUFFER = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")
"""Tensors some checkpoints store although the config determines them."""

_MOST_PARAMETERS = 1_000_000


def dimensions(shape: ModelShape) -> dict[str, int]:
    """Return the size that each word stands for in ``Rule.dims``."""
    attention, heads = shape.attention, shape.num_heads
    sizes = {
        "vocab": shape.vocab_size,
        "hidden": shape.hidden_size,
        "hidden_twice": 2 * shape.hidden_size,
        "heads_qk": heads * attention.qk_head_dim,
        "heads_v": heads * attention.v_head_dim,
        "dense_ffn": shape.dense_ffn_size,
        "shared_ffn": shape.shared_ffn_size,
        "expert_ffn": shape.expert_ffn_size,
        "experts": shape.num_experts,
    }
    if isinstance(attention, GroupedQueryShape):
        return sizes | {
            "groups": attention.num_groups,
            "groups_qk": attention.num_groups * attention.qk_head_dim,
            "groups_v": attention.num_groups * attention.v_head_dim,
        }
    return sizes | {
        "q_lora": attention.q_lora_rank or 0,
        "kv_lora": attention.kv_lora_rank,
        "kv_down": attention.kv_lora_rank + attention.qk_rope_head_dim,
        "kv_up": heads * (attention.qk_nope_head_dim + attention.v_head_dim),
    }


def _concrete(
    rule: Rule, sizes: dict[str, int], prefixes: tuple[str, str] = ("", ""), expert: int | None = None
) -> Parameter:
    megatron_prefix, hf_prefix = prefixes
    return Parameter(
        name=rule.megatron.format(layer=megatron_prefix, expert=expert),
        parts=tuple(
            HfPart(name.format(layer=hf_prefix, expert=expert), part_shape)
            for name, part_shape in zip(rule.hf, _part_shapes(rule, sizes), strict=True)
        ),
        split=rule.split,
        kind=rule.kind,
        expert=expert,
        groups=sizes["groups"] if rule.by_group else 1,
    )


def _part_shapes(rule: Rule, sizes: dict[str, int]) -> Iterator[tuple[int, ...]]:
    words = [(word,) * len(rule.hf) if isinstance(word, str) else word for word in rule.dims]
    for dims in zip(*words, strict=True):
        yield tuple(sizes[word] for word in dims)


def attention_rules(shape: ModelShape) -> tuple[Rule, ...]:
    """Return the rules of a layer's attention, and of the two norms of a layer."""
    attention = shape.attention
    if isinstance(attention, LatentAttentionShape):
        query = QUERY_FULL_RANK if attention.q_lora_rank is None else QUERY_LOW_RANK
        return LATENT_ATTENTION + query
    biases = (QKV_BIAS if attention.qkv_bias else ()) + (OUTPUT_BIAS if attention.output_bias else ())
    return GROUPED_QUERY_ATTENTION + biases


@lru_cache(maxsize=256)
def layer_parameters(shape: ModelShape, layer: int) -> tuple[Parameter, ...]:
    """Return every parameter of one layer; numbers from ``num_layers`` on are the MTP layers."""
    sizes, hf_prefix, mtp = dimensions(shape), f"model.layers.{layer}", layer - shape.num_layers
    prefix = f"decoder.layers.{layer}" if mtp < 0 else f"mtp.layers.{mtp}.transformer_layer"
    rules = attention_rules(shape)
    if shape.is_moe_layer(layer):
        rules += ROUTER + (ROUTER_BIAS if shape.has_expert_bias else ())
        rules += SHARED_EXPERTS if shape.num_shared_experts else ()
    else:
        rules += DENSE
    found = [_concrete(rule, sizes, (prefix, hf_prefix)) for rule in rules]
    if shape.is_moe_layer(layer):
        found += [
            _concrete(rule, sizes, (prefix, hf_prefix), expert)
            for expert in range(shape.num_experts)
            for rule in EXPERT
        ]
    if mtp >= 0:
        found += [_concrete(rule, sizes, (f"mtp.layers.{mtp}", hf_prefix)) for rule in MTP]
    return tuple(found)


def outside_parameters(shape: ModelShape) -> tuple[Parameter, ...]:
    """Return the embedding, the final norm and the output layer; the last only where it is not tied to the embedding.

    Raises:
        ConversionError: If the config of a DeepSeek model ties them, which none of that family does.
    """
    if shape.tie_word_embeddings and isinstance(shape.attention, LatentAttentionShape):
        raise ConversionError(
            "config.json sets tie_word_embeddings to true, but DeepSeek-V3 models store lm_head.weight separately. "
            "Set it to false if the checkpoint holds lm_head.weight; other checkpoints cannot be converted."
        )
    rules = OUTSIDE[:-1] if shape.tie_word_embeddings else OUTSIDE
    return tuple(_concrete(rule, dimensions(shape)) for rule in rules)


def output_layer_name(shape: ModelShape) -> str:
    """Return the canonical parameter that turns hidden states into logits."""
    return EMBEDDING if shape.tie_word_embeddings else OUTPUT_LAYER


def tensors_at_least(shape: ModelShape) -> int:
    """Return a lower bound of the number of parameters, without listing them: what a file says may be absurd."""
    layers = shape.num_layers + shape.mtp_layers
    return layers + (layers - shape.first_dense_layers) * shape.num_experts


@lru_cache(maxsize=8)
def parameters(shape: ModelShape) -> dict[str, Parameter]:
    """Return every canonical parameter of a model by name, in model order. Treat the result as read-only.

    Raises:
        ConversionError: If there would be absurdly many, or the output layer is tied to the embedding.
    """
    if tensors_at_least(shape) > _MOST_PARAMETERS:
        raise ConversionError(
            f"num_hidden_layers = {shape.num_layers}, num_nextn_predict_layers = {shape.mtp_layers} and "
            f"n_routed_experts = {shape.num_experts} make over {_MOST_PARAMETERS:,} tensors. Correct "
            "config.json."
        )
    found = list(outside_parameters(shape))
    for layer in range(shape.num_layers + shape.mtp_layers):
        found += layer_parameters(shape, layer)
    return {parameter.name: parameter for parameter in found}


def hf_aliases(shape: ModelShape) -> dict[str, str]:
    """Return the HF tensors that only repeat another in a published checkpoint: HF name -> canonical name."""
    return {
        f"model.layers.{shape.num_layers + mtp}.{repeat}": canonical
        for mtp in range(shape.mtp_layers)
        for repeat, canonical in MTP_REPEATS
    }


def possible_aliases(shape: ModelShape) -> dict[str, str]:
    """Return ``hf_aliases``, and those that only some writers store: a tied head beside the embedding."""
    return hf_aliases(shape) | ({"lm_head.weight": EMBEDDING} if shape.tie_word_embeddings else {})


def slice_shape(parameter: Parameter, size: int) -> tuple[int, ...]:
    """Return the shape of one rank's slice when the parameter is split over ``size`` tensor-parallel ranks.

    Raises:
        ConversionError: If the dimension does not divide; the message carries the numbers.
    """
    if size == 1 or parameter.split is Split.REPLICATED:
        return parameter.shape
    dim = 1 if parameter.split is Split.COLUMNS else 0
    unit = 2 if parameter.split is Split.GATE_UP else 1
    length = parameter.shape[dim]
    if parameter.split is Split.ROWS and len(parameter.parts) > 1 and parameter.groups % size:
        raise ConversionError(
            f"{parameter.name} of {parameter.groups} query groups cannot be split over layout.tp = {size} ranks: "
            f"a rank holds whole groups. Choose a divisor of {parameter.groups}."
        )
    if length % (unit * size):
        axis = "tp" if parameter.expert is None else "etp"
        raise ConversionError(
            f"{parameter.name} of shape {parameter.shape} cannot be split over layout.{axis} = {size} ranks: "
            f"{length // unit} is not a multiple of {size}. Choose a divisor of {length // unit}."
        )
    return tuple(extent // size if index == dim else extent for index, extent in enumerate(parameter.shape))
