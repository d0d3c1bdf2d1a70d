"""How an evaluation gets answers out of a model: the choices, and which of them go together. No torch, for help."""

import math
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from megatron_ads.errors import ConfigError


class Method(StrEnum):
    """Where the next token comes from."""

    greedy = "greedy"
    """The most probable token."""
    sampled = "sampled"
    """Drawn from the most probable tokens."""
    beam = "beam"
    """The most probable answers, in order."""
    constrained_beam = "constrained-beam"
    """The same among valid names, behind an empty block of reasoning; tasks that do not answer with a name are answered
    greedily."""


class LengthRule(StrEnum):
    """What beams of different length are compared by."""

    sum = "sum"
    """The log-probability of the whole answer."""
    mean = "mean"
    """Per token, end token included: what transformers does. Favours long answers whose later tokens are sure."""
    mean_of_choices = "mean-of-choices"
    """Per token that had an alternative: forced tokens are sure and do not count."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Decoding:
    """One way to decode; fields that do not belong to ``method`` play no part."""

    method: Method = Method.greedy
    temperature: float = 1.0
    """``sampled``: divides the logits."""
    top_p: float = 1.0
    """``sampled``: draw from the fewest tokens that hold this probability."""
    seed: int = 0
    """``sampled``: decides the draws, together with the batch size."""
    beams: int = 20
    length: LengthRule = LengthRule.sum
    """``sum`` is D3's (arXiv:2406.14900): sure tokens add nothing, so they should not divide either."""
    collaborative: float = 0.0
    """``constrained-beam``: how much a model of who buys from whom counts, beside the language model (D3)."""

    @property
    def uses_beams(self) -> bool:
        """Whether an answer comes with others, less probable."""
        return self.method in (Method.beam, Method.constrained_beam)


GREEDY = Decoding()
_BELONGS_TO = {
    "temperature": (Method.sampled,),
    "top_p": (Method.sampled,),
    "seed": (Method.sampled,),
    "beams": (Method.beam, Method.constrained_beam),
    "length": (Method.beam, Method.constrained_beam),
    "collaborative": (Method.constrained_beam,),
}


def choose_decoding(method: Method, **options: Any) -> Decoding:
    """Return the decoding of a command line; options that were not given are None.

    Raises:
        ConfigError: If an option is impossible, or would have no effect.
    """
    given = {name: value for name, value in options.items() if value is not None}
    for name in given:
        if method not in (allowed := _BELONGS_TO[name]):
            raise ConfigError(
                f"--{name.replace('_', '-')} has no effect with --decode {method}; leave it out, or take --decode "
                f"{' or '.join(allowed)}."
            )
    how = Decoding(method=method, **given)
    _require("temperature", how.temperature, math.isfinite(how.temperature) and how.temperature > 0, "above 0")
    _require("top-p", how.top_p, 0 < how.top_p <= 1, "above 0 and at most 1")
    _require("beams", how.beams, how.beams >= 1, "at least 1")
    _require("collaborative", how.collaborative, 0 <= how.collaborative <= 1, "from 0 to 1")
    return how


def _require(name: str, value: float, fits: bool, wanted: str) -> None:
    if not fits:
        raise ConfigError(f"--{name} is {value}; it must be {wanted}.")
