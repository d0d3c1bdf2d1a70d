"""Errors a user can cause, and checks of settings that raise them.

Each message says what is wrong, with the values, then what to do.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
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


_LONGEST_LINE = 2000


def one_line(error: BaseException) -> str:
    """Return an error's message on one line; of a very long one, which repeats what it was given, both ends."""
    text = " ".join(str(error).split())
    half = _LONGEST_LINE // 2
    return text if len(text) <= _LONGEST_LINE else f"{text[:half]} ... {text[-half:]}"


_LIBRARIES = frozenset(
    [
        "httpcore2",
        "httpx2",
        "jinja2",
        "json",
        "openai",
        "pyarrow",
        "safetensors",
        "tokenizers",
        "yaml",
        "zipfile",
    ]
)
"""Packages whose own errors are about what they were given: a damaged file, a server that does not answer."""
_NO_MEMORY = ("can't allocate memory", "not enough memory", "out of memory")


@contextmanager
def as_refusals() -> Iterator[None]:
    """Turn an error of the operating system, or of a library about its input, into one of this project.

    Command lines run in it, so that a path that is missing, no folder, a folder or forbidden is one line everywhere.

    Raises:
        MegatronAdsError: In place of such an error.
    """
    try:
        yield
    except (MegatronAdsError, BrokenPipeError):  # the second: our reader went away
        raise
    except Exception as error:
        if (text := _refusal(error)) is None:
            raise
        raise MegatronAdsError(text) from error


def _refusal(error: Exception) -> str | None:
    reason = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
    if isinstance(error, OSError) and error.filename is not None:
        other = "" if error.filename2 is None else f" to {error.filename2}"
        return (
            f"{error.filename}{other} cannot be read or written ({error.strerror}). Check the path and its permissions."
        )
    if isinstance(error, MemoryError) or any(words in str(error) for words in _NO_MEMORY):
        return f"There is not enough memory ({reason}). Ask for less at once, or use a machine that has more."
    if isinstance(error, UnicodeError):
        return f"A file or a name is not UTF-8 text ({reason}). Save it as UTF-8."
    if isinstance(error, RuntimeError) and reason.startswith("Symlink loop"):  # pathlib's, until Python 3.13
        return f"{reason}. Check the path."
    libraries = {kind.__module__.partition(".")[0] for kind in type(error).__mro__} & _LIBRARIES
    if isinstance(error, OSError) or libraries:
        names = "".join(f"{name}: " for name in sorted(libraries))
        return (
            f"{names}{reason.removesuffix('.')}. Check the files and addresses that were given; "
            "MEGATRON_ADS_TRACEBACK=1 shows where it came up."
        )
    return None


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
