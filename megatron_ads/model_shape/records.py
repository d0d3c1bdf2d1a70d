"""What a model looks like: every number that decides its tensors and its arithmetic, whatever said so."""

from dataclasses import asdict, dataclass
from typing import Any

from megatron_ads.errors import require


@dataclass(frozen=True, kw_only=True, slots=True)
class YarnShape:
    """YaRN position scaling (arXiv:2309.00071)."""

    factor: float
    """How many times longer than ``original_max_positions`` the context became."""
    original_max_positions: int
    """Positions of the model before scaling."""
    beta_fast: float = 32.0
    """Rotations over the original context above which a dimension keeps its frequency."""
    beta_slow: float = 1.0
    """Rotations below which a dimension is interpolated by ``factor``."""
    mscale: float = 1.0
    """Scales the attention temperature of the rotated part."""
    mscale_all_dim: float = 0.0
    """Scales the attention temperature of all of it; 0 is off."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Llama3Shape:
    """Position scaling of Llama 3.1 (arXiv:2407.21783, section 3.4.2, as in Meta's published code)."""

    factor: float
    """What the frequencies of dimensions with long wavelengths are divided by."""
    original_max_positions: int
    """Positions of the model before scaling."""
    low_frequency_factor: float
    """Dimensions that turn less often than this over the original context are slowed by ``factor``."""
    high_frequency_factor: float
    """Those that turn more often keep their frequency; between the two it is interpolated."""

    def __post_init__(self) -> None:
        require(
            self.low_frequency_factor < self.high_frequency_factor,
            f"low_freq_factor = {self.low_frequency_factor:g} is not below high_freq_factor = "
            f"{self.high_frequency_factor:g}.",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class LatentAttentionShape:
    """Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1)."""

    q_lora_rank: int | None
    """Rank of the query's low-rank projection; None: one full-rank query projection."""
    kv_lora_rank: int
    """Rank of the joint low-rank projection of keys and values."""
    qk_nope_head_dim: int
    """Width of the part of a query or key head without positions."""
    qk_rope_head_dim: int
    """Width of the part with rotary positions."""
    v_head_dim: int
    """Width of a value head."""

    def __post_init__(self) -> None:
        _require_pairs("qk_rope_head_dim", self.qk_rope_head_dim)

    @property
    def qk_head_dim(self) -> int:
        """Width of one query or key head: the part without and the part with positions."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def rotary_dim(self) -> int:
        """Channels of a head that positions turn."""
        return self.qk_rope_head_dim

    @property
    def cached_width(self) -> int:
        """Values that generation remembers of a token in one layer."""
        return self.kv_lora_rank + self.qk_rope_head_dim


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupedQueryShape:
    """Grouped-query attention (arXiv:2305.13245): each key-value head serves a group of query heads."""

    num_groups: int
    """Query groups, which is the number of key heads and of value heads."""
    head_dim: int
    """Width of a query, key or value head."""
    qkv_bias: bool
    """The projections to queries, keys and values have biases."""
    output_bias: bool
    """So has the projection of the heads' outputs."""

    def __post_init__(self) -> None:
        _require_pairs("head_dim", self.head_dim)

    @property
    def qk_head_dim(self) -> int:
        """Width of one query or key head."""
        return self.head_dim

    @property
    def v_head_dim(self) -> int:
        """Width of a value head."""
        return self.head_dim

    @property
    def rotary_dim(self) -> int:
        """Channels of a head that positions turn: all."""
        return self.head_dim

    @property
    def cached_width(self) -> int:
        """Values that generation remembers of a token in one layer."""
        return 2 * self.num_groups * self.head_dim


def _require_pairs(name: str, width: int) -> None:
    require(width % 2 == 0, f"{name} is {width}; rotary positions turn pairs: it must be even.")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelShape:
    """Every number that decides the tensors and the arithmetic of one model. Layers count from 0."""

    model_type: str
    """As in config.json: ``deepseek_v3`` (V3, R1, Moonlight), ``kimi_k2``, ``deepseek_v2``, ``qwen2`` or ``llama``."""
    vocab_size: int
    hidden_size: int
    num_layers: int
    """Decoder layers, without the MTP layers."""
    num_heads: int
    dense_ffn_size: int
    """Inner width of the dense feed-forward layers."""
    first_dense_layers: int
    """Layers 0 to this one, exclusive, are dense; every later one is a mixture of experts. Without experts: all."""

    attention: LatentAttentionShape | GroupedQueryShape
    """The kind of attention of every layer, with its widths."""

    num_experts: int = 0
    """Routed experts per MoE layer; 0: a model without any, and so are all fields about them."""
    num_shared_experts: int = 0
    """Shared experts per MoE layer, stored fused as one feed-forward of this many widths."""
    expert_ffn_size: int = 0
    """Inner width of one routed expert."""
    experts_per_token: int = 0
    """Routed experts a token is sent to."""
    num_expert_groups: int = 1
    """Group-limited routing: groups the experts are divided into; 1 is no limit."""
    groups_per_token: int = 1
    """Groups a token may choose from."""
    score_function: str = "softmax"
    """``sigmoid`` or ``softmax``."""
    has_expert_bias: bool = False
    """An FP32 ``e_score_correction_bias`` takes part in the selection (not in the weights)."""
    normalize_expert_weights: bool = False
    """Divide the weights of the chosen experts by their sum."""
    routed_scaling_factor: float = 1.0
    """Multiplies the weights of the chosen experts."""

    rope_theta: float
    """Base of the rotary frequencies."""
    rope_scaling: YarnShape | Llama3Shape | None
    """Position scaling; None is none."""
    max_positions: int
    """Longest sequence, in tokens."""
    rms_norm_eps: float
    initializer_range: float = 0.02
    """Standard deviation of freshly drawn weights."""
    mtp_layers: int = 0
    """Multi-token-prediction layers stored behind the decoder layers; they are MoE layers."""
    tie_word_embeddings: bool = False
    """Embedding and output layer are one tensor, of which the last pipeline stage has a copy."""

    def __post_init__(self) -> None:
        if isinstance(self.attention, GroupedQueryShape):
            require(
                self.num_heads % self.attention.num_groups == 0,
                f"num_key_value_heads = {self.attention.num_groups} does not divide num_attention_heads = "
                f"{self.num_heads}.",
            )
        if not self.num_experts:
            assert self.first_dense_layers == self.num_layers and not self.mtp_layers
            return
        experts, groups, in_group = self.num_experts, self.num_expert_groups, self.num_experts // self.num_expert_groups
        require(
            self.first_dense_layers < self.num_layers,
            f"first_k_dense_replace = {self.first_dense_layers} leaves none of num_hidden_layers = {self.num_layers} "
            "with experts; a mixture-of-experts model is expected.",
        )
        require(experts % groups == 0, f"n_group = {groups} does not divide n_routed_experts = {experts}.")
        require(
            self.groups_per_token <= groups, f"topk_group = {self.groups_per_token} is more than n_group = {groups}."
        )
        reachable = self.groups_per_token * in_group
        require(
            self.experts_per_token <= reachable,
            f"num_experts_per_tok = {self.experts_per_token}, but a token reaches topk_group * n_routed_experts / "
            f"n_group = {self.groups_per_token} * {experts} / {groups} = {reachable} experts.",
        )
        require(
            groups == 1 or in_group >= self.experts_scored_per_group,
            f"n_routed_experts / n_group = {experts} / {groups} = {in_group} experts a group, but the best "
            f"{self.experts_scored_per_group} of a group decide its rank.",
        )

    @property
    def shared_ffn_size(self) -> int:
        """Inner width of the fused shared experts."""
        return self.num_shared_experts * self.expert_ffn_size

    @property
    def experts_scored_per_group(self) -> int:
        """Best experts whose scores are added to rank a group: 2 with a selection bias (V3), else 1 (V2).

        Source: DeepSeek-V3 (arXiv:2412.19437) section 2.1.2; DeepSeek-V2 (arXiv:2405.04434) section 2.2.2.
        """
        return 2 if self.has_expert_bias else 1

    def differences(self, other: "ModelShape") -> dict[str, tuple[Any, Any]]:
        """Return the fields in which two models differ, with both values; None where one has no such field.

        Those of the attention and of the position scaling stand beside the others.
        """
        mine, theirs = _flat(self), _flat(other)
        both = {name: (mine.get(name), theirs.get(name)) for name in mine | theirs}
        return {name: pair for name, pair in both.items() if pair[0] != pair[1]}

    def require_megatron_routing(self) -> None:
        """Refuse routing that Megatron-Core 0.16's ``topk_routing_with_score_function`` computes differently.

        Raises:
            ConfigError: Naming the fields of ``config.json``.
        """
        if not self.num_experts:
            return
        best, normalizes = self.experts_per_token // self.groups_per_token, self.score_function == "sigmoid"
        wanted = 2 if normalizes else 1
        require(
            self.num_expert_groups == 1 or best == wanted,
            f"num_experts_per_tok / topk_group is {self.experts_per_token} / {self.groups_per_token}: Megatron-Core "
            f"ranks expert groups by the sum of their best {best} scores, but this model does so by its best {wanted}. "
            "This routing is not supported.",
        )
        require(
            self.normalize_expert_weights == normalizes,
            f"norm_topk_prob is {self.normalize_expert_weights} with {self.score_function} scores; Megatron-Core "
            f"{'always' if normalizes else 'never'} normalises those. This routing is not supported.",
        )

    def is_moe_layer(self, layer: int) -> bool:
        """Whether ``layer`` (global, MTP layers counted on from ``num_layers``) has routed experts."""
        return layer >= self.first_dense_layers


def _flat(shape: ModelShape) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in asdict(shape).items():
        flat |= value if isinstance(value, dict) else {name: value}
    return flat
