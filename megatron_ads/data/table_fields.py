"""From the cells of a table to the fields of a task: which column holds a field, and what its values mean.

Numbers, decimals, dates and UUIDs are text where text is needed; labels and kinds of events are the same whatever their
capitals, and 3, 3.0 and "3" are one label.
"""

import ast
import difflib
import json
import math
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, date, datetime
from decimal import Decimal
from typing import Any

from megatron_ads.data.bad_rows import BadRow, BadRowError
from megatron_ads.data.table_files import Cells
from megatron_ads.errors import ConfigError

_INTEGRAL = re.compile(r"[+-]?\d{1,18}(\.0*)?")
_DAY = re.compile(r"(19|20)\d{6}")
_UNITS = ((1e11, 1), (1e14, 10**3), (1e17, 10**6), (1e20, 10**9))
"""Times below the first number are in so many units a second: s, ms, us, ns. Each is a time from 1973 to 5138."""
_YAML_WORDS = {True: ("true", "yes", "on"), False: ("false", "no", "off")}
"""What YAML reads as true and false; as a value's name it is any of these."""


@dataclass(frozen=True, slots=True)
class FieldMapping:
    """Where the fields of a task are in a table."""

    columns: Mapping[str, str]
    """Field -> the column that holds it."""
    meanings: Mapping[str, Mapping[str, str | None]]
    """Field -> what a value of it, folded, stands for; None leaves its rows out."""

    @classmethod
    def of(
        cls,
        columns: Mapping[str, str],
        values: Mapping[str, Mapping[Any, Any]],
        *,
        required: Sequence[str],
        optional: Sequence[str],
        choices: Mapping[str, Sequence[str]],
    ) -> "FieldMapping":
        """Return the mapping that a recipe's ``columns`` and ``values`` describe.

        Args:
            columns: Field -> column.
            values: Field -> value -> what it stands for, or None.
            required: Fields that need a column.
            optional: Those that may have one.
            choices: The values that a field may have, for fields that may not have any.

        Raises:
            ConfigError: If a field is unknown, or left out though required; if a value stands for nothing known.
        """
        known = [*required, *optional]
        for setting, names in (("columns", columns), ("values", values)):
            for name in names:
                if name not in known or name not in columns:
                    near = difflib.get_close_matches(name, known, n=1)
                    hint = f" Did you mean {near[0]}?" if near else ""
                    hint = f" Say in columns which column holds {name}." if name in known else hint
                    raise ConfigError(f"{setting} names the field {name!r}; known: {', '.join(known)}.{hint}")
        if missing := [name for name in required if name not in columns]:
            raise ConfigError(
                f"columns does not say which column holds {', '.join(missing)}. Add it: {missing[0]}: NAME."
            )
        return cls(columns, {name: _meanings(name, given, choices.get(name)) for name, given in values.items()})

    @property
    def needed(self) -> list[str]:
        """Columns to read."""
        return list(dict.fromkeys(self.columns.values()))

    def cells(self, by_column: Cells) -> Cells | None:
        """Return a row's fields; None if the recipe leaves it out."""
        cells = {name: by_column[column] for name, column in self.columns.items()}
        for name, meanings in self.meanings.items():
            if isinstance(cell := cells[name], list | dict | None):
                continue
            given = folded(cell)
            if isinstance(cell, bool) and given not in meanings:
                given = str(int(cell))
            if given in meanings:
                if (meaning := meanings[given]) is None:
                    return None
                cells[name] = meaning
        return cells


def _meanings(name: str, given: Mapping[Any, Any], known: Sequence[str] | None) -> dict[str, str | None]:
    meanings: dict[str, str | None] = {}
    for value, meaning in given.items():
        stands_for = None if meaning is None else str(meaning)
        if known is not None and stands_for is not None:
            stands_for = next((choice for choice in known if folded(choice) == folded(meaning)), None)
            if stands_for is None:
                raise ConfigError(
                    f"values.{name} says that {value!r} stands for {meaning!r}; known: {', '.join(known)}, "
                    "or null to leave such rows out."
                )
        for word in _YAML_WORDS[value] if isinstance(value, bool) else (folded(value),):
            if meanings.setdefault(word, stands_for) != stands_for:
                raise ConfigError(f"values.{name} says twice what {value!r} stands for, capitals aside. Remove one.")
    return meanings


def folded(value: Any) -> str:
    """Return what values that mean the same have in common: capitals, white space and ``.0`` do not count."""
    text = " ".join(_written(value).split()).casefold()
    return str(int(text.partition(".")[0])) if _INTEGRAL.fullmatch(text) else text


def _written(value: Any) -> str:
    """Return a single value as text."""
    if isinstance(value, Decimal):
        text = f"{value:f}"
        return text.rstrip("0").rstrip(".") if "." in text else text
    return value.isoformat() if isinstance(value, date) else str(value)


def text_of(cells: Cells, name: str) -> str:
    """Return a cell's text; numbers and dates are written out.

    Raises:
        BadRowError: If there is none.
    """
    cell = cells.get(name)
    if cell is None or (isinstance(cell, str) and not cell.strip()):
        raise BadRowError(BadRow.empty_text, f"{name} is {cell!r}; it must be text that is not empty.")
    finite = not isinstance(cell, float | Decimal) or math.isfinite(cell)
    if isinstance(cell, bool | list | dict) or not finite:
        raise BadRowError(BadRow.wrong_type, f"{name} is {cell!r:.80}; it must be text.")
    return _written(cell).strip()


def optional_text(cells: Cells, name: str) -> str:
    """Return a cell's text, empty where there is none."""
    cell = cells.get(name)
    return "" if cell is None or cell == "" else text_of(cells, name)


def one_of(cells: Cells, name: str, known: Sequence[str]) -> str:
    """Return the label that a cell holds.

    Raises:
        BadRowError: If it holds none.
    """
    given = text_of(cells, name)
    found = next((str(label) for label in known if folded(label) == folded(given)), None)
    if found is None:
        hint = f"Say what it stands for, such as values: {{{name}: {{{given:.40}: {known[-1]}}}}}."
        raise BadRowError(BadRow.unknown_label, f"{name} is {given!r:.80}; known: {', '.join(known)}. {hint}")
    return found


def texts_of(cells: Cells, name: str) -> tuple[str, ...]:
    """Return the texts of a list: a column of lists, a list in JSON, lines, or a text separated by semicolons.

    Raises:
        BadRowError: If an entry is no text.
    """
    cell = cells.get(name)
    if isinstance(cell, str):
        cell = cell.strip()
        items: Any = None
        if cell.startswith("[") and cell.endswith("]"):
            with suppress(ValueError, RecursionError):
                items = json.loads(cell)
            with suppress(ValueError, SyntaxError, MemoryError, RecursionError):
                items = ast.literal_eval(cell) if items is None else items  # as pandas writes lists into CSV
        if not isinstance(items, list):
            items = [item for item in cell.split("\n" if "\n" in cell else ";") if item.strip()]
    else:
        items = cell if isinstance(cell, list) else [] if cell is None else [cell]
    return tuple(text_of({name: item}, name) for item in items)


def time_of(cells: Cells, name: str) -> float:
    """Return seconds since 1970 of a number of them, a date as text, or a timestamp; without a zone it is UTC.

    A number's size says whether it is in s, ms, us or ns, or a day written as 20250301.

    Raises:
        BadRowError: If it is no time.
    """
    text = text_of(cells, name)
    with suppress(ValueError):
        if _DAY.fullmatch(text):
            return seconds(datetime.fromisoformat(text))
    number: float | None = None
    with suppress(ValueError):
        number = int(text) if text.lstrip("+-").isdecimal() else float(text)
    if number is not None:
        found = next((number / unit for limit, unit in _UNITS if abs(number) < limit), None)
        if found is not None:
            return found
    else:
        with suppress(ValueError, OverflowError):
            return seconds(datetime.fromisoformat(text.removesuffix(" UTC")))
    message = "it must be seconds (or ms, us, ns) since 1970 or a date such as 2025-03-01T12:00."
    raise BadRowError(BadRow.wrong_type, f"{name} is {text!r:.80}; {message}")


def seconds(moment: datetime) -> float:
    """Return seconds since 1970; a moment without a zone is in UTC."""
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def describe_time(moment: float) -> str:
    """Return seconds since 1970 as a date."""
    try:
        return datetime.fromtimestamp(moment, UTC).isoformat()
    except (ValueError, OverflowError, OSError):
        return f"{moment:g} s since 1970"
