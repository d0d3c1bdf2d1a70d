"""Errors a user can cause, and checks of settings that raise them.

Each message says what is wrong, with the values, then what to do.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any


class MegatronAdsError(Exception):
    """Base of every error this project raises on purpose; command lines catch only this."""


class ConfigError(MegatronAdsError, ValueError):
    """A setting is impossible, unknown, or contradicts another one."""


class ConversionError(MegatronAdsError, ValueError):
    """A checkpoint does not match the model it is being converted for."""


class DiskFullError(ConversionError):
    """A disk or a quota has no room for a file."""


class CheckpointError(MegatronAdsError, RuntimeError):
    """A training checkpoint is missing, incomplete, damaged, or of another job."""


class DataError(MegatronAdsError, ValueError):
    """A row or a data file cannot be used; the message names the file and the row."""


class DivergedError(MegatronAdsError, ArithmeticError):
    """A job stopped learning: update after update is skipped, or its weights are no numbers any more."""


class TopologyError(MegatronAdsError, RuntimeError):
    """The ranks of a job disagree about what they are about to do; the message names the odd one."""


def require(condition: bool, message: str) -> None:
    """Raise ConfigError with ``message`` unless ``condition`` holds."""
    if not condition:
        raise ConfigError(message)


def require_each(section: str, config: object, names: Iterable[str], fits: Callable[[Any], bool], wanted: str) -> None:
    """Raise ConfigError unless each of the named settings of a section fits what is ``wanted``, or is None."""
    for name in names:
        value = getattr(config, name)
        finite = "a finite number, " if isinstance(value, float) and not math.isfinite(value) else ""
        require(value is None or fits(value), f"{section}.{name} is {value}; it must be {finite}{wanted}.")


def require_at_least(section: str, config: object, minimum: float, *names: str) -> None:
    """Raise ConfigError unless the named settings of a section are finite and at least ``minimum``, or None."""
    require_each(section, config, names, lambda value: minimum <= value < math.inf, f"at least {minimum:g}")


def require_above(section: str, config: object, limit: float, *names: str) -> None:
    """Raise ConfigError unless the named settings of a section are finite and above ``limit``, or None."""
    require_each(section, config, names, lambda value: limit < value < math.inf, f"above {limit:g}")


def require_between(section: str, config: object, lowest: float, highest: float, *names: str) -> None:
    """Raise ConfigError unless the named settings of a section are in the range, or None."""
    require_each(section, config, names, lambda value: lowest <= value <= highest, f"from {lowest:g} to {highest:g}")


def require_distinct(setting: str, values: Sequence[str]) -> None:
    """Raise ConfigError if a list names something more than once."""
    repeated = sorted({value for value in values if values.count(value) > 1})
    require(not repeated, f"{setting} lists {', '.join(repeated)} more than once.")
