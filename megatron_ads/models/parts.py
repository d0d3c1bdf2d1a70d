"""Which part of a model each parameter belongs to, which of them a job trains, and which have adapters. No torch.

Low-rank adapters: ``W' = W + scale * B A`` (arXiv:2106.09685, section 4.1), with W (out, in), A (rank, in), B (out,
rank).
"""

import math
import re
from collections import Counter
from dataclasses import dataclass

from conversion.names import TOKEN_TABLES, Parameter, ParameterKind, Split, parameters, slice_shape
from megatron_ads.architecture import ModelShape
from megatron_ads.config.model import FrozenPart, LoraTarget, ModelConfig

_TARGETS = (
    (r".+\.self_attention\.linear_\w+\.weight", LoraTarget.attention),
    (r".+\.mlp\.linear_fc[12]\.weight", LoraTarget.dense),
    (r".+\.mlp\.shared_experts\.linear_fc[12]\.weight", LoraTarget.shared_experts),
    (r".+\.mlp\.experts\.linear_fc[12]\.weight\d+", LoraTarget.experts),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Lora:
    """The adapters of a job."""

    rank: int
    scale: float
    """alpha / rank."""
    targets: frozenset[LoraTarget]
    with_mtp: bool
    """Whether the layers of MTP have adapters: they have if they are run."""

    @classmethod
    def of(cls, model: ModelConfig) -> "Lora | None":
        """Take a recipe's ``model`` section; None where the weights themselves are trained."""
        settings = model.lora
        if settings.rank is None:
            return None
        return cls(
            rank=settings.rank,
            scale=settings.alpha / settings.rank,
            targets=frozenset(settings.targets),
            with_mtp=model.mtp_loss_weight > 0,
        )

    def adapts(self, parameter: Parameter) -> bool:
        if parameter.kind is not ParameterKind.LINEAR or (parameter.name.startswith("mtp.") and not self.with_mtp):
            return False
        return target_of(parameter.name) in self.targets

    def elements(self, parameter: Parameter, size: int = 1) -> int:
        """Return how many values both factors have on one of ``size`` tensor-parallel ranks; 0 without an adapter."""
        return sum(map(math.prod, self.factor_shapes(parameter, size))) if self.adapts(parameter) else 0

    def parameters(self, shape: ModelShape) -> int:
        return sum(map(self.elements, parameters(shape).values()))

    def factor_shapes(self, parameter: Parameter, size: int = 1) -> tuple[tuple[int, int], tuple[int, int, int]]:
        """Return the shapes of A and B on one of ``size`` tensor-parallel ranks (expert-tensor for experts).

        A is (rank, inputs). B is (parts, outputs of a part, rank): gate and up are two parts of one weight, and a rank
        has the same rows of either. A weight divided by rows has a whole A, one divided by columns a whole B.
        """
        rows, columns = slice_shape(parameter, size)
        parts = 2 if parameter.split is Split.GATE_UP else 1
        return (self.rank, columns), (parts, rows // parts, self.rank)


def target_of(canonical: str) -> LoraTarget | None:
    """Return what of ``model.lora.targets`` a canonical parameter belongs to; None: it never has an adapter."""
    return next((target for pattern, target in _TARGETS if re.fullmatch(pattern, canonical)), None)


def part_of(name: str, shape: ModelShape) -> FrozenPart | None:
    """Return what of ``model.frozen`` a canonical parameter belongs to; a norm belongs to what follows it.

    None is the norm before a mixture of experts, which belongs to router and experts alike.
    """
    for words, part in (
        (("mtp.",), FrozenPart.mtp),
        (("embedding.",), FrozenPart.embedding),
        (("output_layer.", "decoder.final_layernorm."), FrozenPart.output),
        ((".self_attention.", ".input_layernorm."), FrozenPart.attention),
        ((".mlp.experts.",), FrozenPart.experts),
        ((".mlp.shared_experts.",), FrozenPart.shared_experts),
        ((".mlp.router.",), FrozenPart.router),
    ):
        if any(word in name for word in words):
            return part
    return None if shape.is_moe_layer(int(name.split(".")[2])) else FrozenPart.dense


def is_trained(name: str, model: ModelConfig, shape: ModelShape) -> bool:
    """Return whether a canonical parameter, or with ``model.train_only`` some of its rows, is trained."""
    if model.train_only is not None:
        return name in TOKEN_TABLES
    return part_of(name, shape) not in frozen_parts(model, shape)


def frozen_parts(model: ModelConfig, shape: ModelShape) -> frozenset[FrozenPart | None]:
    """Return the parts of which a job keeps everything as loaded: ``model.frozen``, and MTP layers that are not run.

    The norm before a mixture of experts (None) is kept where router and all experts are.
    """
    if model.train_only is not None:
        return frozenset({*FrozenPart, None} - {FrozenPart.embedding, FrozenPart.output})
    frozen: set[FrozenPart | None] = set(model.frozen)
    fed = {FrozenPart.router, FrozenPart.experts} | ({FrozenPart.shared_experts} if shape.shared_ffn_size else set())
    if fed <= frozen:
        frozen.add(None)
    return frozenset(frozen if model.mtp_loss_weight else frozen | {FrozenPart.mtp})


def parameters_by_part(shape: ModelShape) -> Counter[FrozenPart | None]:
    """Return how many parameters each part of a model has, each counted once; their sum is the whole model.

    Router biases are buffers and not counted.
    """
    counts: Counter[FrozenPart | None] = Counter()
    for parameter in parameters(shape).values():
        if parameter.kind is not ParameterKind.ROUTER_BIAS:
            counts[part_of(parameter.name, shape)] += math.prod(parameter.shape)
    return counts


def trained_parameters(settings: ModelConfig, shape: ModelShape, new_tokens: int = 0) -> tuple[int, int]:
    """Return how many parameters a job trains, and how many its model has without adapters.

    Args:
        settings: Which are trained.
        shape: Of the model.
        new_tokens: Rows that ``model.train_only`` trains.
    """
    counts = parameters_by_part(shape)
    if settings.train_only is not None:
        tables = sum(name in TOKEN_TABLES for name in parameters(shape))
        return new_tokens * tables * shape.hidden_size, counts.total()
    lora = Lora.of(settings)
    if lora is not None:
        return lora.parameters(shape), counts.total()
    frozen = frozen_parts(settings, shape)
    return sum(count for part, count in counts.items() if part not in frozen), counts.total()
