"""Refuse a setting with one sentence: what it is, and what it must be."""

import math

from megatron_ads.errors import ConfigError


def require(condition: bool, message: str) -> None:
    """Raise ConfigError with ``message`` unless ``condition`` holds."""
    if not condition:
        raise ConfigError(message)


def require_at_least(section: str, config: object, minimum: float, *names: str) -> None:
    """Raise ConfigError unless the named settings of a section are finite and at least ``minimum``, or None."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not (math.isfinite(value) and value >= minimum):
            raise ConfigError(f"{section}.{name} is {value}; it must be at least {minimum:g}.")


def require_between(section: str, config: object, lowest: float, highest: float, *names: str) -> None:
    """Raise ConfigError unless the named settings of a section are finite and in the range, or None."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not (math.isfinite(value) and lowest <= value <= highest):
            limit = f"at least {lowest:g}" if highest == math.inf else f"from {lowest:g} to {highest:g}"
            raise ConfigError(f"{section}.{name} is {value}; it must be {limit}.")
