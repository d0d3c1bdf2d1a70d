"""What a downstream pipeline is trained on, as one record: a team's tables, or a simulation.

A team's folder holds three tables, each a Parquet, JSONL, CSV or TSV file (``items.parquet``), with the columns:

    items        item, text
    events       user, time, event, text; optional: advertiser, category, brand, age, gender, state
    impressions  user, time, item, clicked, converted; optional: query, seconds

``item`` is what an answer names. Events are those of the source kind ``table``: ``event`` is a kind of
``tasks.user_history``, and a conversion is with the item that ``advertiser`` names. ``seconds`` is how long who clicked
stayed there.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_ads.data.bad_rows import BadRow, BadRowError
from megatron_ads.data.event_tables import read_event
from megatron_ads.data.table_fields import optional_text, text_of, time_of
from megatron_ads.data.table_files import Cells
from megatron_ads.data.user_features import SECONDS_PER_DAY, LoggedEvent
from megatron_ads.downstream.log_tables import flag_of, read_rows, seconds_of
from megatron_ads.errors import DataError
from megatron_ads.metrics.ranking import same_name
from megatron_ads.tasks.user_history import Demographics

_ABOUT = ("age", "gender", "state")


@dataclass(frozen=True, slots=True)
class Item:
    """What is retrieved and ranked."""

    name: str
    """What an answer calls it."""
    text: str
    """What else is known of it."""


@dataclass(frozen=True, slots=True)
class Impression:
    """One item shown to somebody."""

    user: str
    time: float
    """Seconds since 1970."""
    item: int
    query: str
    """What was searched for; empty where nothing was."""
    clicked: bool
    converted: bool
    seconds: float | None = None
    """How long who clicked stayed on the page behind it; None where it is not known."""
    chances: tuple[float, float] | None = None
    """The true probabilities of a click, and of a conversion through it, where a simulation knows them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Logs:
    """What users did and saw, and what there is to show."""

    items: Sequence[Item]
    events: Mapping[str, Sequence[LoggedEvent]]
    """By user, in order of time."""
    about: Mapping[str, Demographics]
    impressions: Sequence[Impression]

    @property
    def end(self) -> float:
        """The midnight, in UTC, after the last event or impression; seconds since 1970."""
        last = max(*(log[-1].time for log in self.events.values()), self.impressions[-1].time)
        return (last // SECONDS_PER_DAY + 1) * SECONDS_PER_DAY


def make_logs(
    items: Sequence[Item],
    events: Sequence[tuple[str, LoggedEvent]],
    about: Mapping[str, Demographics],
    impressions: Sequence[Impression],
) -> Logs:
    """Return logs with the events and impressions, given in any order, in order of time."""
    by_user: dict[str, list[LoggedEvent]] = defaultdict(list)
    for user, event in sorted(events, key=lambda pair: pair[1].time):
        by_user[user].append(event)
    shown = sorted(impressions, key=lambda impression: impression.time)
    return Logs(items=items, events=by_user, about=about, impressions=shown)


def item_numbers(items: Sequence[Item]) -> dict[str, int]:
    """Return the number of each item by its name as names are compared."""
    return {same_name(item.name): number for number, item in enumerate(items)}


def read_team_logs(folder: Path) -> Logs:
    """Return the logs in a team's folder.

    Raises:
        DataError: If a table or a column is missing, or a row cannot be used; with the file and the row.
    """
    items = read_rows(folder, "items", _item, ("item", "text"))
    numbers = item_numbers(items)
    if len(numbers) < len(items):
        raise DataError(f"{folder}: {len(items) - len(numbers)} rows of items have the name of another. Remove them.")
    about: dict[str, dict[str, str]] = defaultdict(dict)

    def event(cells: Cells) -> tuple[str, LoggedEvent]:
        user = text_of(cells, "user")
        about[user] |= {name: value for name in _ABOUT if (value := optional_text(cells, name))}
        return user, read_event(cells)

    def impression(cells: Cells) -> Impression:
        name = text_of(cells, "item")
        if same_name(name) not in numbers:
            raise BadRowError(BadRow.unknown_label, f"item is {name!r:.80}, which the table items does not have.")
        return Impression(
            user=text_of(cells, "user"),
            time=time_of(cells, "time"),
            item=numbers[same_name(name)],
            query=optional_text(cells, "query"),
            clicked=flag_of(cells, "clicked"),
            converted=flag_of(cells, "converted"),
            seconds=seconds_of(cells),
        )

    more = ("advertiser", "category", "brand", *_ABOUT)
    events = read_rows(folder, "events", event, ("user", "time", "event", "text"), more)
    shown = read_rows(
        folder, "impressions", impression, ("user", "time", "item", "clicked", "converted"), ("query", "seconds")
    )
    return make_logs(items, events, {user: Demographics(**known) for user, known in about.items()}, shown)


def _item(cells: Cells) -> Item:
    return Item(text_of(cells, "item"), optional_text(cells, "text"))
