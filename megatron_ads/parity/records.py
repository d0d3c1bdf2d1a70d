"""What a parity check found: plain records that become ``parity.json``."""

from dataclasses import dataclass
from enum import StrEnum


class Kind(StrEnum):
    """The kinds of layers."""

    DENSE = "dense"
    EXPERTS = "experts"
    MTP = "mtp"


@dataclass(frozen=True, kw_only=True, slots=True)
class RouterResult:
    """How one router compares over all tokens, given the layer's same input."""

    tokens: int
    rerouted: int
    """Tokens sent to another set of experts, near ties apart."""
    near_ties: int
    """Tokens whose other choice lies within the limit for ties."""
    weight_difference: float
    """Largest |difference| of a weight, over the tokens that keep their experts."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerResult:
    """How one layer compares. Differences are root mean squares over that of Hugging Face's output."""

    layer: int
    kind: Kind
    difference: float
    """Given the same input: what this layer alone contributes."""
    carried: float
    """Each side on its own output of the layer before: what has gathered so far."""
    largest: float
    """Largest single |difference| given the same input, over the root mean square of the output."""
    changed_tensors: tuple[str, ...]
    """Parameters whose slices, joined again, are not the stored bits."""
    router: RouterResult | None
    seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class LogitResult:
    """The next-token logits of the whole model, each side on its own."""

    tokens: int
    max_abs_difference: float
    divergence: float
    """Mean KL(Hugging Face || ours), nats."""
    agreement: float
    """Share of positions with the same most probable token."""
    by_position: tuple[float, ...]
    """Largest |difference| of any logit at each position, over all prompts that reach it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RungResult:
    """One rung of the ladder on this checkpoint."""

    rung: int
    name: str
    passed: bool | None
    """None: it does not fit a checkpoint check, and ``detail`` says why."""
    detail: str


@dataclass(frozen=True, slots=True)
class Comparison:
    """Everything measured by streaming once through the layers."""

    layers: tuple[LayerResult, ...]
    logits: LogitResult
