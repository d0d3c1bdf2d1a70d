"""Typed access to a JSON object that knows which of its fields were read, so that the others can be refused."""

import difflib
import sys
from collections.abc import Collection, Mapping
from typing import Any, TypeVar

from megatron_ads.errors import ConfigError

_T = TypeVar("_T")
_REQUIRED: Any = object()
_LARGEST = 1 << 63
"""No size is so large; a JSON number may have any number of digits."""


class JsonFields:
    """One JSON object. Every getter refuses a missing required field or another type, naming both.

    A field that is absent or null counts as missing and takes the default.
    """

    def __init__(self, values: Mapping[str, Any], *, prefix: str = "") -> None:
        self._values = values
        self._prefix = prefix
        self._read: set[str] = set()

    def __contains__(self, name: str) -> bool:
        return self._values.get(name) is not None

    def _get(self, name: str, default: Any, kinds: tuple[type, ...], words: str) -> Any:
        self._read.add(name)
        value = self._values.get(name)
        if value is None:
            if default is _REQUIRED:
                raise ConfigError(f"{self._prefix}{name} is missing; it must be {words}.")
            return default
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise ConfigError(f"{self._prefix}{name} is {value!r}; it must be {words}.")
        return value

    def integer(self, name: str, default: int = _REQUIRED, *, minimum: int = 1) -> int:
        """Return a whole number of at least ``minimum``."""
        value: int = self._get(name, default, (int,), "a whole number")
        if not minimum <= value < _LARGEST:
            limit = f"at least {minimum}" if value < minimum else f"below {_LARGEST}"
            raise ConfigError(f"{self._prefix}{name} is {str(value)[:40]}; it must be {limit}.")
        return value

    def number(self, name: str, default: float = _REQUIRED) -> float:
        """Return a finite number as a float."""
        value = self._get(name, default, (int, float), "a number")
        if not abs(value) <= sys.float_info.max:  # a whole number may have any number of digits
            raise ConfigError(f"{self._prefix}{name} is {str(value)[:40]}; it must be finite.")
        return float(value)

    def positive(self, name: str, default: float = _REQUIRED) -> float:
        """Return a finite number above 0."""
        value = self.number(name, default)
        if value <= 0:
            raise ConfigError(f"{self._prefix}{name} is {value:g}; it must be above 0.")
        return value

    def flag(self, name: str, default: bool = _REQUIRED) -> bool:
        """Return true or false."""
        value: bool = self._get(name, default, (bool,), "true or false")
        return value

    def choice(self, name: str, options: Collection[str], default: str = _REQUIRED) -> str:
        """Return a text that is one of ``options``."""
        value: str = self._get(name, default, (str,), f"one of {', '.join(options)}")
        if value not in options:
            raise ConfigError(f"{self._prefix}{name} is {value!r}; supported: {', '.join(options)}.")
        return value

    def texts(self, name: str) -> list[str]:
        """Return a list of texts; empty where it is missing."""
        values: list[Any] = self._get(name, [], (list,), "a list of texts")
        for value in values:
            if not isinstance(value, str):
                raise ConfigError(f"{self._prefix}{name} holds {str(value)[:40]!r}; it must be a list of texts.")
        return values

    def section(self, name: str) -> "JsonFields | None":
        """Return the object in a field, or None where it is missing."""
        value = self._get(name, None, (Mapping,), "an object")
        return None if value is None else JsonFields(value, prefix=f"{self._prefix}{name}.")

    def expect(self, name: str, wanted: _T, why: str) -> None:
        """Refuse any value but ``wanted``; a missing field is taken to agree."""
        self._read.add(name)
        value = self._values.get(name)
        if value is not None and (value != wanted or isinstance(value, bool) is not isinstance(wanted, bool)):
            raise ConfigError(f"{self._prefix}{name} is {value!r}, but {why}: only {wanted!r} is supported.")

    def require_present(self, name: str, why: str) -> None:
        """Refuse an object that does not mention ``name`` at all; null is a mention."""
        if name not in self._values:
            raise ConfigError(f"{self._prefix}{name} is missing. {why}")

    def refuse_unread(self, *, harmless: Collection[str] = ()) -> None:
        """Refuse every field that no getter asked for and that is not known to be harmless."""
        for name in self._values:
            if name in self._read or name in harmless or self._values[name] is None:
                continue
            near = difflib.get_close_matches(name, sorted(self._read), n=1, cutoff=0.6)
            hint = f"Did you mean {self._prefix}{near[0]}?" if near else "It may change what the model computes."
            raise ConfigError(f"{self._prefix}{name} = {self._values[name]!r} is not a known field. {hint}")
