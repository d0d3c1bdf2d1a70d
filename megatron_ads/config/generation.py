"""How answers are generated: the choices, and which of them go together. Importing it needs no torch."""

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass, fields
from enum import StrEnum

from megatron_ads.errors import ConfigError

# Member names are lower case because OmegaConf reads an enum by its name, and that is what a recipe writes.


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


BEAM_METHODS = (Method.beam, Method.constrained_beam)


@dataclass(kw_only=True, slots=True)  # not frozen: Hydra merges into it
class GenerationConfig:
    """One way to generate; settings that do not belong to ``method`` play no part."""

    method: Method = Method.greedy
    """Where the next token comes from."""
    temperature: float = 1.0
    """``sampled``: divides the logits."""
    top_p: float = 1.0
    """``sampled``: draw from the fewest tokens that hold this probability."""
    seed: int = 0
    """``sampled``: decides the draws, together with the prompts that are generated from at once."""
    samples: int = 1
    """``sampled``: completions of every prompt."""
    beams: int = 20
    """``beam``, ``constrained-beam``: completions of every prompt, the best first."""
    length: LengthRule = LengthRule.sum
    """``sum`` is D3's (arXiv:2406.14900): sure tokens add nothing, so they should not divide either."""
    collaborative: float = 0.0
    """``constrained-beam``: how much a model of who buys from whom counts, next to the language model (D3)."""
    max_new_tokens: int | None = None
    """Longest completion in tokens, the end token included (of beams: not counted); None: as long as fits the model,
    or in an evaluation what the task's training targets suggest."""
    log_probabilities: bool = False
    """Ask for the log-probability of every generated token: the model's own, at temperature 1 without ``top_p``."""

    def check(self, section: str = "generation") -> None:
        """Refuse impossible values, and values that have no effect; ``section`` is its name in the recipe.

        Raises:
            ConfigError: Naming the setting and its value.
        """
        changed = [field.name for field in fields(self) if getattr(self, field.name) != field.default]
        self.check_as(lambda name: f"{section}.{name}", changed)

    def check_as(self, named: Callable[[str], str], given: Collection[str]) -> None:
        """Refuse impossible values, and those of ``given`` that have no effect; ``named`` says what a user calls them.

        Raises:
            ConfigError: Naming the setting and its value.
        """
        for name in given:
            allowed = _BELONGS_TO.get(name, tuple(Method))
            if self.method not in allowed:
                method = named("method")
                raise ConfigError(
                    f"{named(name)} has no effect with {method} {self.method}; leave it out, or take {method} "
                    f"{' or '.join(allowed)}."
                )
        for name, wanted in self._faults().items():
            raise ConfigError(f"{named(name)} is {getattr(self, name)}; it must be {wanted}.")

    def _faults(self) -> dict[str, str]:
        """Return what settings with an impossible value must be."""
        limit = self.max_new_tokens
        rules = {
            "temperature": (math.isfinite(self.temperature) and self.temperature > 0, "above 0"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
            "samples": (self.samples >= 1, "at least 1"),
            "beams": (self.beams >= 1, "at least 1"),
            "collaborative": (0 <= self.collaborative <= 1, "from 0 to 1"),
            "max_new_tokens": (limit is None or limit >= 1, "at least 1"),
        }
        return {name: wanted for name, (fits, wanted) in rules.items() if not fits}


_BELONGS_TO = {
    "temperature": (Method.sampled,),
    "top_p": (Method.sampled,),
    "seed": (Method.sampled,),
    "samples": (Method.sampled,),
    "beams": BEAM_METHODS,
    "length": BEAM_METHODS,
    "collaborative": (Method.constrained_beam,),
}
