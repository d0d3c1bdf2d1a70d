"""Which canonical parameters a module built from one of Megatron-Core's layer specs holds under which name.

local    torch modules; one module per local expert        mlp.experts.local_experts.{i}.linear_fc1.weight
grouped  torch modules; local experts stacked on dim 0      mlp.experts.weight1, mlp.experts.weight2
te       Transformer Engine; norms fused into the linears   mlp.experts.linear_fc1.weight{i}

The keys of a torch_dist checkpoint are canonical names but for two things. The routed experts of a layer are one tensor
``...mlp.experts.experts.linear_fc1.weight`` of shape (experts, rows, columns). With Transformer Engine layers, the
norms in front of a projection are part of it (``linear_q_up_proj.layer_norm_weight``).
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum

from conversion.names import Parameter
from megatron_ads.errors import ConversionError


class LayerSpec(StrEnum):
    """The layer specs whose parameter names are known."""

    LOCAL = "local"
    GROUPED = "grouped"
    TE = "te"


_INNER_MTP_LAYER = ".mtp_model_layer.", ".transformer_layer."
"""Name since megatron-core 0.17, and the older one, which checkpoints keep."""
_DECODER_LAYER = re.compile(r"(decoder\.layers\.)(\d+)(\..+)")
_LOCAL_EXPERT = re.compile(r"(.*\.mlp\.experts)\.local_experts\.(\d+)\.(linear_fc[12])\.weight")
_GROUPED_EXPERTS = re.compile(r"(.*\.mlp\.experts)\.weight([12])")
_TE_EXPERT = re.compile(r"(.*\.mlp\.experts\.linear_fc[12]\.weight)(\d+)")
_EXPERT = re.compile(r"(.+\.mlp\.experts)\.(linear_fc[12])\.weight\d+")
_LINEAR = re.compile(r"(.+\.(?:linear_\w+|eh_proj))\.weight\d*")
_FURTHER_TE_MODULES = re.compile(r"(.+(?:_layernorm|enorm|hnorm))\.weight")
FUSED_NORMS = (
    (".self_attention.linear_qkv.layer_norm_weight", ".input_layernorm.weight"),
    (".self_attention.linear_q_up_proj.layer_norm_weight", ".self_attention.q_layernorm.weight"),
    (".self_attention.linear_kv_up_proj.layer_norm_weight", ".self_attention.kv_layernorm.weight"),
    (".mlp.linear_fc1.layer_norm_weight", ".pre_mlp_layernorm.weight"),
)


def canonical_names(parameter: str, *, spec: LayerSpec, first_layer: int, local_experts: range) -> tuple[str, ...]:
    """Return the canonical names behind one parameter of a module.

    One name, or for stacked experts one per local expert in order (they stack on dim 0).

    Args:
        parameter: Name as in ``GPTModel.named_parameters()``, with layers counted from 0 in this module.
        first_layer: Global number of the module's first decoder layer.
        local_experts: Global numbers of the routed experts on this rank.

    Raises:
        ConversionError: If an expert number is outside ``local_experts``.
    """
    name = parameter.replace(*_INNER_MTP_LAYER)
    if match := _DECODER_LAYER.fullmatch(name):
        name = f"{match[1]}{int(match[2]) + first_layer}{match[3]}"
    if spec is LayerSpec.LOCAL and (match := _LOCAL_EXPERT.fullmatch(name)):
        expert = _global_expert(int(match[2]), local_experts, parameter)
        return (f"{match[1]}.{match[3]}.weight{expert}",)
    if spec is LayerSpec.GROUPED and (match := _GROUPED_EXPERTS.fullmatch(name)):
        return tuple(f"{match[1]}.linear_fc{match[2]}.weight{expert}" for expert in local_experts)
    if spec is LayerSpec.TE:
        if match := _TE_EXPERT.fullmatch(name):
            return (f"{match[1]}{_global_expert(int(match[2]), local_experts, parameter)}",)
        for fused, canonical in FUSED_NORMS:
            if name.endswith(fused):
                return (name.removesuffix(fused) + canonical,)
    return (name,)


def _global_expert(local: int, local_experts: range, parameter: str) -> int:
    if local >= len(local_experts):
        raise ConversionError(
            f"The module parameter {parameter!r} is local expert {local}, but this rank holds "
            f"{len(local_experts)} experts ({local_experts.start} to {local_experts.stop - 1}). "
            "The module was built with another layout.ep than it is filled for."
        )
    return local_experts[local]


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
    for fused, canonical in FUSED_NORMS if spec is LayerSpec.TE else ():
        carrier = name.removesuffix(canonical) + fused
        if name.endswith(canonical) and carrier.replace(".layer_norm_weight", ".weight") in model:
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
