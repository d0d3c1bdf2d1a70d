"""What a reward is: a callable that takes one unit of rollouts, and returns a number or None for each of them."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from difflib import get_close_matches
from enum import StrEnum
from typing import Any, Protocol, TypeVar

from megatron_ads.errors import ConfigError
from megatron_ads.rollouts import Rollout, groups_of

R = TypeVar("R")


class Unit(StrEnum):
    """What a reward is given at once, and what is lost when it fails."""

    sample = "sample"
    group = "group"
    """The answers to one prompt."""
    batch = "batch"
    """All answers of a step."""


class Fault(StrEnum):
    """Why a rollout has no value although the reward did not return None."""

    raised = "raised"
    not_finite = "not_finite"
    wrong_length = "wrong_length"
    """Not one value for each rollout."""
    wrong_type = "wrong_type"
    """Something that is no number."""
    timed_out = "timed_out"
    died = "died"
    """The process that computes it ended: a crash, or no memory."""


class Reward(Protocol):
    """A reward that runs in this process."""

    @property
    def unit(self) -> Unit:
        """What it is given at once."""

    def __call__(self, rollouts: Sequence[Rollout]) -> Sequence[float | None]:
        """Return one value for each rollout of one unit; None where the row is not one that it judges.

        Raises:
            DataError: If a row lacks what is needed to judge its answers.
        """


def units_of(rollouts: Sequence[Rollout], unit: Unit) -> Iterable[Sequence[Rollout]]:
    """Return the rollouts as a reward is given them, in order."""
    if unit is Unit.group:
        return groups_of(rollouts)
    return [rollouts] if unit is Unit.batch else [[rollout] for rollout in rollouts]


def with_settings(kind: type[R], settings: Mapping[str, Any], section: str) -> R:
    """Return a reward, a dataclass, with the settings of a recipe.

    Raises:
        ConfigError: If it has no such setting (the nearest is offered), a value is of another type than the default, or
            the reward refuses it.
    """
    known = {field.name: field.default for field in fields(kind)}  # type: ignore[arg-type]
    for name, value in settings.items():
        if name not in known:
            near = get_close_matches(name, known, n=1)
            offer = f"Did you mean {near[0]}?" if near else f"Known: {', '.join(known) or 'none'}."
            raise ConfigError(f"{section}.settings has no {name!r}. {offer}")
        wanted = type(known[name])
        fits = type(value) in (int, float) if wanted is float else isinstance(value, wanted)
        if not fits or (type(value) is bool and wanted is not bool):
            raise ConfigError(f"{section}.settings.{name} is {value!r:.80}; it must be of type {wanted.__name__}.")
    return kind(**settings)
