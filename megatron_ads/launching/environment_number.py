"""Whole numbers that a user gives in environment variables."""

from collections.abc import Mapping

from megatron_ads.errors import ConfigError


def environment_number(environment: Mapping[str, str], name: str, default: int) -> int:
    """Return the number in a variable, the default if it is unset or empty.

    Raises:
        ConfigError: If it holds anything else.
    """
    text = environment.get(name) or str(default)
    if not text.isdecimal():
        raise ConfigError(f"{name} is {text!r}; it must be a whole number.")
    return int(text)
