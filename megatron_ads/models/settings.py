"""How one model is run and trained, apart from its shape and its layout. Importable without torch."""

from dataclasses import dataclass, replace
from importlib.util import find_spec

from conversion.layer_specs import LayerSpec
from megatron_ads.config.model import LayerSpecChoice, ModelConfig, Precision, Recompute, recompute_on
from megatron_ads.errors import ConfigError

_HOPPER = (9, 0)


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
    """Return the layer spec to build: ``auto`` is Transformer Engine where it runs, else grouped torch experts.

    Transformer Engine attends within packed samples, with keys wider than values, on Hopper and newer only.

    Raises:
        ConfigError: If Transformer Engine is asked for and does not run here.
    """
    if choice not in (LayerSpecChoice.auto, LayerSpecChoice.te):
        return LayerSpec(choice.value)
    if find_spec("transformer_engine") is None:
        fault: str | None = "it is not installed"  # known without torch
    else:
        import torch

        from megatron_ads.runtime.device import transformer_engine_fault

        fault = transformer_engine_fault()
        if fault is None and (capability := torch.cuda.get_device_capability()) < _HOPPER:
            own = ".".join(map(str, capability))
            fault = f"packed samples need compute capability 9.0 (Hopper) and this GPU has {own}"
    if fault is None:
        return LayerSpec.TE
    if choice is LayerSpecChoice.te:
        raise ConfigError(
            f"model.layer_spec is te, but Transformer Engine cannot be used: {fault}. "
            "Install megatron-ads[te] on a machine with a GPU for it, or set model.layer_spec to auto."
        )
    return LayerSpec.GROUPED
