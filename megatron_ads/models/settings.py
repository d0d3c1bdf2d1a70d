"""How one model is run and trained, apart from its shape and its layout. Importable without torch."""

from dataclasses import dataclass, replace
from importlib.util import find_spec

from conversion.layer_specs import LayerSpec
from megatron_ads.config.model import LayerSpecChoice, ModelConfig, Precision, Recompute, recompute_on
from megatron_ads.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSettings:
    """What ``build_chunks`` needs in addition to the shape, the layout and the placement."""

    spec: LayerSpec
    precision: Precision = Precision.fp32
    recompute: Recompute = Recompute.none
    recompute_stages: int | None = None
    """Pipeline stages, from the first, that recompute; None: all."""
    expert_bias_update_rate: float = 0.0
    """Step of the aux-loss-free balancing of each expert's selection bias (arXiv:2408.15664); 0 keeps it as loaded."""
    aux_loss_coefficient: float = 0.0
    """Weight of the sequence-level balancing loss; 0 is off."""
    mtp_loss_weight: float = 0.0
    """Weight of the multi-token-prediction loss; 0 keeps the MTP layers as loaded and does not run them."""
    deterministic: bool = False
    """Prefer kernels whose result does not depend on the order of their threads."""

    @classmethod
    def of(cls, model: ModelConfig, *, deterministic: bool = False) -> "ModelSettings":
        return cls(
            spec=resolve_layer_spec(model.layer_spec),
            precision=model.precision,
            recompute=model.recompute,
            recompute_stages=model.recompute_stages,
            expert_bias_update_rate=model.expert_bias_update_rate or 0.0,
            aux_loss_coefficient=model.aux_loss_coefficient,
            mtp_loss_weight=model.mtp_loss_weight,
            deterministic=deterministic,
        )

    def on_stage(self, stage: int) -> "ModelSettings":
        """Return what holds on the ranks of a pipeline stage."""
        recompute = recompute_on(stage, self.recompute, self.recompute_stages)
        return replace(self, recompute=recompute, recompute_stages=None)


def resolve_layer_spec(choice: LayerSpecChoice) -> LayerSpec:
    """Return the layer spec to build: ``auto`` is Transformer Engine where it is installed and there is a GPU, else
    grouped torch experts.

    Raises:
        ConfigError: If Transformer Engine is asked for and not installed.
    """
    installed = find_spec("transformer_engine") is not None
    if choice is LayerSpecChoice.te and not installed:
        raise ConfigError(
            "model.layer_spec is te, but transformer-engine is not installed. "
            "Install megatron-ads[te], or set model.layer_spec to auto."
        )
    if choice is LayerSpecChoice.auto:
        if not installed:
            return LayerSpec.GROUPED
        import torch  # only where Transformer Engine is installed

        return LayerSpec.TE if torch.cuda.is_available() else LayerSpec.GROUPED
    return LayerSpec(choice.value)
