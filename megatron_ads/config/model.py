"""``model``: the weights to start from and how they are run."""

from dataclasses import dataclass, field
from enum import StrEnum

from omegaconf import MISSING

from megatron_ads.config.checks import require, require_at_least


class LayerSpecChoice(StrEnum):
    """Which layer implementation Megatron builds."""

    auto = "auto"
    local = "local"
    grouped = "grouped"
    te = "te"


class Precision(StrEnum):
    """Number format of weights and activations in the forward and backward pass."""

    fp32 = "fp32"
    bf16 = "bf16"


class Recompute(StrEnum):
    """Which activations are computed again in the backward pass instead of being kept."""

    none = "none"
    selective = "selective"
    full = "full"


class RouterBias(StrEnum):
    """What fine-tuning does with the router's selection bias."""

    frozen = "frozen"
    update = "update"


class FrozenPart(StrEnum):
    """A part of the model that can be kept as loaded; layers of MTP count as ``mtp`` only."""

    embedding = "embedding"
    attention = "attention"
    """Attention projections, with their norms and the norm before them."""
    dense = "dense"
    """Feed-forward of the dense layers, with the norm before it."""
    router = "router"
    experts = "experts"
    """Routed experts."""
    shared_experts = "shared_experts"
    mtp = "mtp"
    """The whole multi-token-prediction block; its loss then trains the layers below it only."""
    output = "output"
    """Final norm and output layer."""


@dataclass(kw_only=True, slots=True)
class ModelConfig:
    """The weights to start from and how they are run."""

    load: str = MISSING
    """Folder of weights: a Hugging Face checkpoint, converted shards or a torch_dist checkpoint."""
    layer_spec: LayerSpecChoice = LayerSpecChoice.auto
    """``te``: Transformer Engine; ``grouped``: torch with grouped experts; ``local``: torch, experts one by one.
    ``auto`` takes ``te`` where it is installed and there is a GPU, else ``grouped``."""
    precision: Precision = Precision.bf16
    """``bf16`` computes in BF16 and keeps gradients and optimizer state in FP32."""
    recompute: Recompute = Recompute.none
    """``selective``: the core attention; ``full``: whole layers."""
    router_bias: RouterBias = RouterBias.frozen
    """``update`` moves the bias against the load of each expert after every step (arXiv:2408.15664)."""
    router_bias_update_rate: float | None = None
    """Size of one such move; None with a frozen bias. DeepSeek-V3 was pre-trained with 0.001."""
    aux_loss_coefficient: float = 0.0
    """Weight of the load-balancing loss; 0 is off."""
    mtp_loss_weight: float = 0.0
    """Weight of the multi-token-prediction loss; 0 keeps the MTP layers as loaded and does not run them."""
    frozen: list[FrozenPart] = field(default_factory=list)
    """Parts that are not trained; empty trains everything."""
    published: str | None = None
    """Name of the published model this is for, by which a job is planned before ``load`` is at hand; None: unknown."""

    def check(self) -> None:
        """Refuse values that are impossible whatever the other sections say."""
        require_at_least("model", self, 0, "router_bias_update_rate", "aux_loss_coefficient", "mtp_loss_weight")
        rate = self.router_bias_update_rate
        if self.router_bias is RouterBias.frozen:
            require(
                rate is None,
                f"model.router_bias_update_rate is {rate}, which has no effect while model.router_bias is frozen. "
                "Remove it, or set model.router_bias=update.",
            )
        else:
            require(
                rate is not None and rate > 0,
                f"model.router_bias is update, but model.router_bias_update_rate is {rate}. Set it, 0.001 for example.",
            )
        repeated = sorted({part for part in self.frozen if self.frozen.count(part) > 1})
        require(not repeated, f"model.frozen lists {', '.join(repeated)} more than once.")
        require(
            FrozenPart.mtp not in self.frozen or self.mtp_loss_weight > 0,
            "model.frozen lists mtp, which has no effect: with model.mtp_loss_weight = 0 the MTP layers are kept as "
            "loaded. Remove mtp.",
        )
