"""A team's own logs of user events as rows about users: one line an event, columns of any names.

A recipe's anchors divide time: events before one are the history that a prompt shows, and the first conversion from it
on, within the answer window, is the next advertiser. All events of the source are held in memory.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

from megatron_ads.data.bad_rows import RejectedRows
from megatron_ads.data.source_files import RowOrigin, parts_of
from megatron_ads.data.table_fields import (
    FieldMapping,
    describe_time,
    one_of,
    optional_text,
    seconds,
    text_of,
    time_of,
)
from megatron_ads.data.table_files import Cells, read_table
from megatron_ads.data.user_features import SECONDS_PER_DAY, LoggedEvent, ViewChooser, compile_history
from megatron_ads.errors import ConfigError, DataError
from megatron_ads.observability.log import get_logger
from megatron_ads.rows import ChatRow
from megatron_ads.tasks import next_advertiser
from megatron_ads.tasks.answer_format import NOTHING
from megatron_ads.tasks.user_history import CONVERSIONS, Demographics, EventKind, UserHistory

logger = get_logger(__name__)

ANSWER_DAYS = 30.0
REQUIRED = ("user", "time", "event")
OPTIONAL = ("text", "advertiser", "category", "brand", "semantic_id", "item_id", "age", "gender", "state")
CHOICES = {"event": tuple(EventKind)}


def read_anchors(dates: Sequence[str], spacing_days: float | None = None) -> list[float]:
    """Return the times of a recipe's anchors, ``2025-03-01`` or ``2025-03-01T12:00``, in seconds since 1970.

    With ``spacing_days``, ``dates`` are the first and the last possible one.

    Raises:
        ConfigError: If one is no date, or they are not in order.
    """
    anchors = []
    for text in dates:
        try:
            anchors.append(seconds(datetime.fromisoformat(text)))
        except ValueError:
            raise ConfigError(f"anchor is {text!r}; it must be a date such as 2025-03-01 (UTC).") from None
    if sorted(set(anchors)) != anchors:
        raise ConfigError(f"anchors is {', '.join(dates)}; each must be later than the one before.")
    if spacing_days is not None:
        step, (first, last) = spacing_days * SECONDS_PER_DAY, anchors
        anchors = [first + step * number for number in range(int((last - first) / step) + 1)]
    return anchors


def event_rows(
    path: Path,
    *,
    columns: Mapping[str, str],
    anchors: Sequence[float],
    view_of: ViewChooser,
    answer_days: float = ANSWER_DAYS,
    values: Mapping[str, Mapping[Any, Any]] | None = None,
    rejected: Path | None = None,
    limit: int | None = None,
    answered: bool = True,
) -> list[ChatRow]:
    """Return a next-advertiser row for every user and anchor with a history and a conversion after it.

    Users are in the order of the log; those without either give no row, and how many there are is logged. With several
    anchors the ids say which.

    Args:
        path: A JSONL, Parquet, CSV or TSV file, or a folder or glob of such parts, lines in any order.
        columns: Field -> the column that holds it.
        anchors: Where histories end, in seconds since 1970.
        view_of: How much of a history a prompt shows.
        answer_days: How long after an anchor the conversion may be.
        values: Field -> value -> what it stands for, such as an event of your own; None leaves such lines out.
        rejected: Where to write lines that cannot be used; None: the first one is an error.
        limit: Most rows; None: all.
        answered: Rows without it only ask, and need no later conversion.

    Raises:
        ConfigError: If a field is unknown or missing, or a value stands for nothing known.
        DataError: If a file cannot be read or gives no row; with the row number, for the first bad line.
    """
    mapping = FieldMapping.of(columns, values or {}, required=REQUIRED, optional=OPTIONAL, choices=CHOICES)
    logs, about = _read_logs(path, mapping, rejected)
    without: Counter[str] = Counter()
    rows: list[ChatRow] = []
    for user, log in logs.items():
        for anchor in anchors:
            history = compile_history(user, log, anchor=anchor, demographics=Demographics(**about[user]))
            answers = [event for event in log if event.kind in CONVERSIONS and event.advertiser]
            answers = [event for event in answers if 0 <= event.time - anchor < answer_days * SECONDS_PER_DAY]
            if not history.events:
                without["without history"] += 1
            elif answered and not answers:
                without["without a later conversion"] += 1
            else:
                request = next_advertiser.AdvertiserRequest(history)
                name = f"next-{user}" if len(anchors) == 1 else f"next-{user}-{_date(anchor)}"
                if answered:
                    first = min(answers, key=lambda event: event.time)
                    advertiser, told, item = first.advertiser, first.time, first.item_id
                else:
                    advertiser, told, item = NOTHING, anchor, ""
                row = next_advertiser.chat_row(name, request, advertiser, item=item, view=view_of(history))
                rows.append(replace(row, time=told))
    if without:
        reasons = ", ".join(f"{count} {why}" for why, count in sorted(without.items()))
        logger.warning("%s: users that give no row: %s", path, reasons)
    if not rows[:limit]:
        times = [event.time for log in logs.values() for event in log]
        wanted = f" and a conversion with an advertiser in the {answer_days:g} days from it" if answered else ""
        raise DataError(
            f"{path}: none of the {len(logs)} users has events before the anchor "
            f"{', '.join(map(describe_time, anchors[:3]))}{wanted}; "
            f"the events are from {describe_time(min(times))} to {describe_time(max(times))}. "
            "Choose another anchor."
        )
    return rows[:limit]


def histories_of(
    path: Path, *, columns: Mapping[str, str], values: Mapping[str, Mapping[Any, Any]], rejected: Path | None
) -> Callable[[str, float], UserHistory]:
    """Return what gives, of a user and a time, the history before it; arguments and errors as of ``event_rows``."""
    mapping = FieldMapping.of(columns, values, required=REQUIRED, optional=OPTIONAL, choices=CHOICES)
    logs, about = _read_logs(path, mapping, rejected)

    def history_of(user: str, anchor: float) -> UserHistory:
        known = Demographics(**about.get(user, {}))
        return compile_history(user, logs.get(user, ()), anchor=anchor, demographics=known)

    return history_of


def _read_logs(
    path: Path, mapping: FieldMapping, rejected: Path | None
) -> tuple[dict[str, list[LoggedEvent]], dict[str, dict[str, str]]]:
    """Return the events of each user, and what is known of them."""
    bad = RejectedRows(path, rejected)
    logs: dict[str, list[LoggedEvent]] = defaultdict(list)
    about: dict[str, dict[str, str]] = defaultdict(dict)

    def read(_: RowOrigin, by_column: Cells) -> tuple[str, LoggedEvent, dict[str, str]] | None:
        cells = mapping.cells(by_column)
        if cells is None:
            return None
        given = {part: optional_text(cells, part) for part in ("age", "gender", "state")}
        return text_of(cells, "user"), read_event(cells), {part: value for part, value in given.items() if value}

    for user, event, given in bad.usable(parts_of(path), lambda part: read_table(part, mapping.needed), read):
        logs[user].append(event)
        about[user] |= given
    bad.finish(used=sum(map(len, logs.values())))
    return logs, about


def _date(anchor: float) -> str:
    return describe_time(anchor).removesuffix("+00:00").removesuffix("T00:00:00")


def read_event(cells: Cells) -> LoggedEvent:
    """Return the event that the fields of one line describe.

    Raises:
        BadRowError: If one is missing or of another type.
    """
    kind, advertiser = EventKind(one_of(cells, "event", tuple(EventKind))), optional_text(cells, "advertiser")
    text = optional_text(cells, "text")
    if kind in CONVERSIONS:  # its advertiser alone is enough
        text = text or advertiser
    return LoggedEvent(
        time=time_of(cells, "time"),
        kind=kind,
        text=text or text_of(cells, "text"),
        advertiser=advertiser,
        category=optional_text(cells, "category"),
        brand=optional_text(cells, "brand"),
        semantic_id=optional_text(cells, "semantic_id"),
        item_id=optional_text(cells, "item_id"),
    )
