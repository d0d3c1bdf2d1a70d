"""Real purchases as next-advertiser and profile rows: office products, a brand standing in for an advertiser.

Derived from Amazon reviews of 2016 to 2018 as MiniOneRec processed them; users are those active late, so there is
selection bias. Dates are days, so purchases of one day have no order: what is known at a target is what happened on
earlier days, and the first purchase listed for the day is the target. Rows carry their target's time for a split by
time: train on targets before, evaluate on targets after.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_ads.config.data import AdsTask
from megatron_ads.data.jsonl import read_records
from megatron_ads.data.public_data import cut_at_word, some_rows
from megatron_ads.data.user_features import LoggedEvent, ViewChooser, compile_history
from megatron_ads.errors import DataError
from megatron_ads.rows import ChatRow
from megatron_ads.tasks import next_advertiser, user_profile
from megatron_ads.tasks.user_history import EventKind, HistoryView, Section, UserHistory

FILE = Path("next_brand_office") / "users.jsonl"
ITEMS = "items.jsonl"
DEFAULT_VIEW = HistoryView(without=frozenset({Section.semantic_ids}), max_entries=5)
_MAX_TITLE_CHARACTERS = 60


@dataclass(frozen=True, slots=True)
class Product:
    """One product."""

    title: str
    brand: str
    """Empty if unknown."""
    semantic_id: str
    """Its codes as one text."""


def read_items(file: Path) -> dict[int, Product]:
    """Return the items by number.

    Raises:
        DataError: With the row number, for the first record that cannot be used.
    """

    def read(_: int, record: Mapping[str, Any]) -> tuple[int, Product]:
        number, title, codes = record.get("item_id"), record.get("title"), record.get("sid")
        if not isinstance(number, int) or not isinstance(title, str) or not isinstance(codes, list):
            raise DataError("item_id, title or sid is missing or of another type.")
        return number, Product(title.strip(), (record.get("brand") or "").strip(), "".join(map(str, codes)))

    items = dict(read_records(file, read))
    if not items:
        raise DataError(f"{file} holds no rows.")
    return items


def next_brand_rows(
    file: Path, task: AdsTask, *, view_of: ViewChooser = lambda history: DEFAULT_VIEW, limit: int | None = None
) -> list[ChatRow]:
    """Return one row for every day of a user after the first, in the order of the file; the first ``limit`` of them.

    Raises:
        DataError: With the row number, for the first record that cannot be used.
    """
    items = read_items(file.with_name(ITEMS))
    kind, make = ("next", _next_brand_row) if task is AdsTask.next_advertiser else ("profile", _profile_row)

    def read(_: int, record: Mapping[str, Any]) -> tuple[str, list[LoggedEvent]]:
        user, events = record.get("user_id"), record.get("events")
        if not isinstance(user, str) or not isinstance(events, list):
            raise DataError("user_id or events is missing or of another type.")
        return user, [_read_event(event, items) for event in events]

    rows = (
        # A user's history only grows, so its length tells the rows of a user apart.
        replace(make(f"{kind}-brand-{user}-{len(history.events)}", history, target, view_of(history)), time=target.time)
        for user, events in read_records(file, read)
        for target, history in _targets(user, events)
    )
    return some_rows(file, rows, limit, what="user with purchases on two days")


def _read_event(event: Any, items: Mapping[int, Product]) -> LoggedEvent:
    if not isinstance(event, dict) or not isinstance(event.get("t"), int) or event.get("item_id") not in items:
        raise DataError(f"an event is {event!r:.80}; it needs a time t and the item_id of a known item.")
    item = items[event["item_id"]]
    return LoggedEvent(
        time=event["t"],
        kind=EventKind.matched_conversion,
        text=cut_at_word(item.title, _MAX_TITLE_CHARACTERS),
        brand=item.brand,
        advertiser=item.brand,
        semantic_id=item.semantic_id,
        item_id=str(event["item_id"]),
    )


def _targets(user_id: str, events: list[LoggedEvent]) -> Iterator[tuple[LoggedEvent, UserHistory]]:
    """Yield each target with what was known before it; a purchase of no brand is no target."""
    days = sorted({event.time for event in events})
    for time in days[1:]:
        target = next((event for event in events if event.time == time and event.advertiser), None)
        if target is not None:
            yield target, compile_history(user_id, events, anchor=time)


def _next_brand_row(row_id: str, history: UserHistory, target: LoggedEvent, view: HistoryView) -> ChatRow:
    request = next_advertiser.AdvertiserRequest(history)
    return next_advertiser.chat_row(row_id, request, target.advertiser, item=target.item_id, view=view)


def _profile_row(row_id: str, history: UserHistory, _: LoggedEvent, view: HistoryView) -> ChatRow:
    brands = [brand for brand, _ in Counter(event.brand for event in history.events if event.brand).most_common(3)]
    most = brands[0] if brands else "no known brand"
    profile = user_profile.Profile(
        summary=f"Buys office products, mostly of {most}.",
        interests=tuple(brand.replace(";", ",") for brand in brands),
        reasoning=f"Bought {len(history.events)} products, most often of {', '.join(brands) or most}.",
    )
    return user_profile.chat_row(row_id, history, profile, view=view)
