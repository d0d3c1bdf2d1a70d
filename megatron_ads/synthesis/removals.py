"""What filters removed, counted by reason and with samples, for machines and for people."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from enum import StrEnum
from typing import Any, Protocol

from jinja2 import Environment, PackageLoader, StrictUndefined

from megatron_ads.rows import ChatRow
from megatron_ads.synthesis.prompts import drawn, question_of

_SHOWN_CHARACTERS = 600
_REASONS_SHOWN = 8


class Examined(Protocol):
    """What filters look at, one by one."""

    row: ChatRow
    text: str
    """What the model wrote."""
    reason: str
    """More on the removal, the same for many."""
    measured: str
    """What the removal was decided by, in numbers of its own."""

    @property
    def name(self) -> str:
        """Differs from all others'."""

    @property
    def removed(self) -> StrEnum | None:
        """The filter that removed it; None: it passed."""


def removals(items: Sequence[Examined], filters: Iterable[StrEnum], *, samples: int, seed: int) -> list[dict[str, Any]]:
    """Return as JSON values how many items came to each filter, in this order, and how many it removed and why.

    Args:
        samples: How many are shown of those that a filter removed.
        seed: Decides which.
    """
    entered = len(items)
    found = []
    for why in filters:
        gone = [item for item in items if item.removed is why]
        found.append(
            {
                "filter": str(why),
                "entered": entered,
                "removed": len(gone),
                "reasons": dict(Counter(item.reason for item in gone if item.reason).most_common(_REASONS_SHOWN)),
                "samples": samples_of(gone, samples, seed),
            }
        )
        entered -= len(gone)
    return found


def samples_of(items: Sequence[Examined], count: int, seed: int) -> list[dict[str, Any]]:
    """Return some items as JSON values."""
    chosen = sorted(items, key=lambda item: drawn(seed, "report", item.name))[:count]
    return [
        {
            "id": item.name,
            "task": item.row.task,
            "reason": item.reason,
            "measured": item.measured,
            "question": question_of(item.row)[:_SHOWN_CHARACTERS],
            "text": item.text[:_SHOWN_CHARACTERS],
        }
        for item in chosen
    ]


def render(template: str, **values: Any) -> str:
    """Return a report for people, by a template of this package, as Markdown."""
    templates = Environment(
        loader=PackageLoader(__package__, "."),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    templates.filters |= {"counts": counts, "one_line": _one_line, "plain": plain}
    return templates.get_template(template).render(**values)


def counts(of: Mapping[str, int], none: str = "none") -> str:
    """Write how often each name occurs."""
    return ", ".join(f"{name} {count:,}" for name, count in of.items()) or none


def plain(text: str) -> str:
    """Escape what Markdown, and HTML within it, would take for markup: the text comes from data or a model."""
    return re.sub(r"[\\`*<>&|\[\]]", r"\\\g<0>", text)


def _one_line(text: str) -> str:
    return " ".join(text.split())[:_SHOWN_CHARACTERS]
