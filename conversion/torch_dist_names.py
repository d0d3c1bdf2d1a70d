"""Keys of Megatron-Core's torch_dist checkpoints, and the canonical parameters behind them.

Keys are canonical names but for two things. The routed experts of a layer are one tensor
``...mlp.experts.experts.linear_fc1.weight`` of shape (experts, rows, columns). With Transformer Engine layers, the
norms in front of a projection are part of it (``linear_q_up_proj.layer_norm_weight``).
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from conversion.layer_specs import FUSED_NORMS, LayerSpec
from conversion.names import Parameter

_EXPERT = re.compile(r"(.+\.mlp\.experts)\.(linear_fc[12])\.weight\d+")
_LINEAR = re.compile(r"(.+\.(?:linear_\w+|eh_proj))\.weight\d*")
_FURTHER_TE_MODULES = re.compile(r"(.+(?:_layernorm|enorm|hnorm))\.weight")


@dataclass(frozen=True, slots=True)
class KeyedTensor:
    """One tensor of a torch_dist checkpoint: a canonical parameter, or a layer's routed experts stacked on dim 0."""

    key: str
    parameters: tuple[Parameter, ...]

    @property
    def is_stacked(self) -> bool:
        """Whether dim 0 counts routed experts."""
        return self.parameters[0].expert is not None

    @property
    def shape(self) -> tuple[int, ...]:
        """Full shape."""
        one = self.parameters[0].shape
        return (len(self.parameters), *one) if self.is_stacked else one


def keyed_tensors(model: Mapping[str, Parameter], spec: LayerSpec) -> tuple[KeyedTensor, ...]:
    """Return every tensor of a model's checkpoint for one layer spec, in model order."""
    found: dict[str, list[Parameter]] = {}
    for parameter in model.values():
        found.setdefault(_key(parameter, model, spec), []).append(parameter)
    return tuple(KeyedTensor(key, tuple(parts)) for key, parts in found.items())


def _key(parameter: Parameter, model: Mapping[str, Parameter], spec: LayerSpec) -> str:
    name = parameter.name
    if match := _EXPERT.fullmatch(name):
        return f"{match[1]}.experts.{match[2]}.weight"
    if spec is not LayerSpec.TE:
        return name
    for fused, canonical in FUSED_NORMS:
        if name.endswith(canonical):
            carrier = name.removesuffix(canonical) + fused
            if carrier.replace(".layer_norm_weight", ".weight") in model:
                return carrier
    return name


def extra_state_keys(model: Mapping[str, Parameter], spec: LayerSpec) -> Iterator[str]:
    """Yield the keys of the (empty) extra states that Megatron-Core asks for at every linear layer.

    For Transformer Engine also those of its norms and attention; keys that a job does not ask for do no harm.
    """
    experts = 1 + max((parameter.expert for parameter in model.values() if parameter.expert is not None), default=-1)
    for parameter in model.values():
        if match := _EXPERT.fullmatch(parameter.name):
            yield f"{match[1]}.experts.{match[2]}._extra_state/shard_{parameter.expert}_{experts}"
        elif match := _LINEAR.fullmatch(parameter.name):
            yield f"{match[1]}._extra_state/shard_0_1"
            if spec is LayerSpec.TE and match[1].endswith(".linear_proj"):
                yield f"{match[1].removesuffix('linear_proj')}core_attention._extra_state/shard_0_1"
        elif spec is LayerSpec.TE and (match := _FURTHER_TE_MODULES.fullmatch(parameter.name)):
            yield f"{match[1]}._extra_state/shard_0_1"
