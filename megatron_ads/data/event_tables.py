"""A team's own logs of user events as rows about users: one line an event, columns of any names.

A recipe's anchor divides time: events before it are the history that a prompt shows, and the first conversion from it
on, within ``LABEL_DAYS``, is the next advertiser. All events of the file are held in memory.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from megatron_ads.data.bad_rows import BadRow, BadRowError, RejectedRows
from megatron_ads.data.own_tables import Cell, Cells, check_columns, optional_text, read_table, text_of
from megatron_ads.data.user_features import SECONDS_PER_DAY, LoggedEvent, ViewChooser, compile_history
from megatron_ads.errors import ConfigError, DataError
from megatron_ads.observability.log import get_logger
from megatron_ads.rows import ChatRow
from megatron_ads.tasks import next_advertiser
from megatron_ads.tasks.user_history import CONVERSIONS, Demographics, EventKind

logger = get_logger(__name__)

LABEL_DAYS = 30
REQUIRED = ("user", "time", "event")
OPTIONAL = ("text", "advertiser", "category", "brand", "semantic_id", "age", "gender", "state")


def read_anchor(text: str) -> float:
    """Return the time of a recipe's anchor, ``2025-03-01`` or ``2025-03-01T12:00``, in seconds since 1970.

    Raises:
        ConfigError: If it is no date.
    """
    try:
        return _seconds(datetime.fromisoformat(text))
    except ValueError:
        raise ConfigError(f"anchor is {text!r}; it must be a date such as 2025-03-01 (UTC).") from None


def event_rows(
    file: Path,
    *,
    columns: Mapping[str, str],
    anchor: float,
    view_of: ViewChooser,
    rejected: Path | None = None,
    limit: int | None = None,
) -> list[ChatRow]:
    """Return a next-advertiser row for every user with a history and a conversion after it, in the order of the log.

    Users without either give no row; how many there are is logged.

    Args:
        file: A JSONL, Parquet, CSV or TSV file, its lines in any order.
        columns: Field -> the column that holds it.
        anchor: Where histories end, in seconds since 1970.
        view_of: How much of a history a prompt shows.
        rejected: Where to write lines that cannot be used; None: the first one is an error.

    Raises:
        ConfigError: If a field is unknown or missing.
        DataError: If the file cannot be read or gives no row; with the row number, for the first bad line.
    """
    check_columns(columns, required=REQUIRED, optional=OPTIONAL)
    bad = RejectedRows(file, rejected)
    logs: dict[str, list[LoggedEvent]] = defaultdict(list)
    about: dict[str, dict[str, str]] = defaultdict(dict)

    def read(_: int, by_column: Cells) -> tuple[str, LoggedEvent, dict[str, str]]:
        cells = {name: by_column[column] for name, column in columns.items()}
        given = {part: optional_text(cells, part) for part in ("age", "gender", "state")}
        return text_of(cells, "user"), _read_event(cells), {part: value for part, value in given.items() if value}

    for user, event, given in bad.usable(read_table(file, list(dict.fromkeys(columns.values()))), read):
        logs[user].append(event)
        about[user] |= given
    bad.finish(used=sum(map(len, logs.values())))
    without: Counter[str] = Counter()
    rows: list[ChatRow] = []
    for user, log in logs.items():
        history = compile_history(user, log, anchor=anchor, demographics=Demographics(**about[user]))
        answers = [event for event in log if event.kind in CONVERSIONS and event.advertiser]
        answers = [event for event in answers if 0 <= event.time - anchor < LABEL_DAYS * SECONDS_PER_DAY]
        if not history.events:
            without["without history"] += 1
        elif not answers:
            without["without a later conversion"] += 1
        else:
            first = min(answers, key=lambda event: event.time)
            request = next_advertiser.AdvertiserRequest(history)
            row = next_advertiser.chat_row(f"next-{user}", request, first.advertiser, view=view_of(history))
            rows.append(replace(row, time=first.time))
    if without:
        reasons = ", ".join(f"{count} {why}" for why, count in sorted(without.items()))
        logger.warning("%s: users that give no row: %s", file, reasons)
    if not rows[:limit]:
        raise DataError(
            f"{file}: none of the {len(logs)} users has events before the anchor "
            f"{datetime.fromtimestamp(anchor, UTC).isoformat()} and a conversion with an advertiser in the "
            f"{LABEL_DAYS} days from it. Choose another anchor."
        )
    return rows[:limit]


def _read_event(cells: Cells) -> LoggedEvent:
    given = text_of(cells, "event")
    if given not in set(EventKind):
        raise BadRowError(BadRow.unknown_label, f"event is {given!r:.80}; known: {', '.join(EventKind)}.")
    kind, advertiser = EventKind(given), optional_text(cells, "advertiser")
    text = optional_text(cells, "text")
    if kind in CONVERSIONS:  # its advertiser alone is enough
        text = text or advertiser
    return LoggedEvent(
        time=_time(cells["time"]),
        kind=kind,
        text=text or text_of(cells, "text"),
        advertiser=advertiser,
        category=optional_text(cells, "category"),
        brand=optional_text(cells, "brand"),
        semantic_id=optional_text(cells, "semantic_id"),
    )


def _time(cell: Cell) -> float:
    """Return seconds since 1970 of a number of them, a date as text, or a timestamp; without a zone it is UTC."""
    if isinstance(cell, datetime):
        return _seconds(cell)
    text = text_of({"time": cell}, "time")
    with suppress(ValueError):
        return float(text)
    with suppress(ValueError):
        return _seconds(datetime.fromisoformat(text))
    message = f"time is {text!r:.80}; it must be seconds since 1970 or a date such as 2025-03-01T12:00."
    raise BadRowError(BadRow.wrong_type, message)


def _seconds(moment: datetime) -> float:
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
