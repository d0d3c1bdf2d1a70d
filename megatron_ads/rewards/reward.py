"""What a reward is: a callable that takes one unit of rollouts, and returns a number or None for each of them."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from difflib import get_close_matches
from enum import StrEnum
from typing import Any, Protocol, TypeVar, get_type_hints

from megatron_ads.errors import ConfigError
from megatron_ads.rollouts import Rollout, groups_of

R = TypeVar("R")


class Unit(StrEnum):
    """What a reward is given at once, and what is lost when it fails."""

    sample = "sample"
    group = "group"
    """The answers to one prompt."""
    batch = "batch"
    """All answers that are scored together."""


class Fault(StrEnum):
    """Why a rollout has no value although its reward did not decline."""

    raised = "raised"
    not_finite = "not_finite"
    wrong_type = "wrong_type"
    """Something that is no number."""
    wrong_length = "wrong_length"
    """Not one value for each rollout; of a teacher, for each token."""
    timed_out = "timed_out"
    died = "died"
    """The process that computes it ended: a crash, or no memory."""
    refused = "refused"
    """A teacher cannot read it, such as a text that is too long."""
    unanswered = "unanswered"
    """A teacher's server answered others, and this one at no attempt."""


@dataclass(frozen=True, slots=True)
class RewardFailure:
    """What went wrong."""

    fault: Fault
    text: str
    """In one line."""


Outcome = float | RewardFailure | None
"""Of one rollout; None: its row is not one that the reward judges."""


class Reward(Protocol):
    """A reward that runs in this process."""

    @property
    def unit(self) -> Unit:
        """What it is given at once."""

    def __call__(self, rollouts: Sequence[Rollout]) -> Sequence[Outcome]:
        """Return one value for each rollout of one unit; None where the row is not one that it judges.

        Whatever else it raises is a mistake of its own, and counted in the same way.

        Raises:
            DataError: If a row lacks what is needed to judge its answers, and the unit has no other row.
        """


def units_of(rollouts: Sequence[Rollout], unit: Unit) -> Iterable[Sequence[Rollout]]:
    """Return the rollouts as a reward is given them, in order."""
    if unit is Unit.group:
        return groups_of(rollouts)
    return [rollouts][: len(rollouts)] if unit is Unit.batch else [[rollout] for rollout in rollouts]


def outcomes_of(values: Sequence[Any], count: int) -> list[Outcome]:
    """Return what a reward made of the ``count`` rollouts of one unit, everything that is no finite number named."""
    if len(values) != count:
        return [RewardFailure(Fault.wrong_length, f"{len(values)} values for {count} rollouts")] * count
    return [_outcome(value) for value in values]


def _outcome(value: Any) -> Outcome:
    if value is None or isinstance(value, RewardFailure):
        return value
    try:
        number = math.nan if isinstance(value, str | bytes) else float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):  # RuntimeError: a tensor of several numbers
        number = math.nan
    if math.isfinite(number):
        return number
    is_number = isinstance(value, int | float) or hasattr(value, "dtype")
    return RewardFailure(Fault.not_finite if is_number else Fault.wrong_type, f"{value!r:.80} is no finite number")


def with_settings(kind: type[R], settings: Mapping[str, Any], section: str) -> R:
    """Return a reward, a dataclass, with the settings of a recipe.

    Raises:
        ConfigError: If it has no such setting (the nearest is offered), a text, number or switch is of another type, or
            the reward refuses it.
    """
    hints = get_type_hints(kind)
    known = [field.name for field in fields(kind) if field.init]  # type: ignore[arg-type]
    for name, value in settings.items():
        if name not in known:
            near = get_close_matches(name, known, n=1)
            offer = f"Did you mean {near[0]}?" if near else f"Known: {', '.join(known) or 'none'}."
            raise ConfigError(f"{section}.settings has no {name!r}. {offer}")
        if not _fits(value, hints[name]):
            raise ConfigError(f"{section}.settings.{name} is {value!r:.80}; it must be of type {hints[name].__name__}.")
    return kind(**settings)


def refuse_idle(name: str, reward: Any, *settings: str, idle: bool, why: str) -> None:
    """Refuse settings of a reward, a dataclass, that are not as by default although they are ``idle``.

    Raises:
        ConfigError: Naming the reward, the setting and ``why`` it has no effect.
    """
    defaults = {field.name: field.default for field in fields(reward)}
    for setting in settings if idle else ():
        value = getattr(reward, setting)
        if value != defaults[setting]:
            raise ConfigError(f"{name} has {setting} = {value!r}, which has no effect {why}. Remove it.")


def _fits(value: object, wanted: Any) -> bool:
    if wanted not in (bool, int, float, str):
        return True
    return isinstance(value, int | float if wanted is float else wanted) and (
        wanted is bool or not isinstance(value, bool)
    )
