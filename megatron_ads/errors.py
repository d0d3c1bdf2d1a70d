"""Errors a user can cause, and checks of settings that raise them.

Each message says what is wrong, with the values, then what to do.
"""

import math


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


def require_at_least(section: str, config: object, minimum: float, *names: str) -> None:
    """Raise ConfigError unless the named settings of a section are finite and at least ``minimum``, or None."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not (math.isfinite(value) and value >= minimum):
            raise ConfigError(f"{section}.{name} is {value}; it must be {_finite(value)}at least {minimum:g}.")


def require_between(section: str, config: object, lowest: float, highest: float, *names: str) -> None:
    """Raise ConfigError unless the named settings of a section are finite and in the range, or None."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not (math.isfinite(value) and lowest <= value <= highest):
            limit = f"at least {lowest:g}" if highest == math.inf else f"from {lowest:g} to {highest:g}"
            raise ConfigError(f"{section}.{name} is {value}; it must be {_finite(value)}{limit}.")


def _finite(value: float) -> str:
    return "" if math.isfinite(value) else "a finite number, "
