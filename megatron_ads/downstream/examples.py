"""Examples cut from logs at anchors: the history before one, and what was bought, shown and clicked in the days after.

The last anchor is ``answer_days`` before the end of the logs. It is evaluated on the users held out; the others are
learned from, at earlier anchors only. So neither those users nor the last days, whose answers the rows of a simulation
ask for, are in the models.
"""

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from megatron_ads.config.downstream import DownstreamConfig
from megatron_ads.data.table_fields import describe_time
from megatron_ads.data.user_features import SECONDS_PER_DAY, LoggedEvent, compile_history
from megatron_ads.downstream.logs import Impression, Logs, item_numbers
from megatron_ads.errors import DataError
from megatron_ads.metrics.ranking import same_name
from megatron_ads.stable_random import stable_integer
from megatron_ads.tasks.user_history import CONVERSIONS, EventKind, UserHistory

_SEARCHES = frozenset({EventKind.onsite_search, EventKind.offsite_search})


@dataclass(frozen=True, slots=True)
class Purchase:
    """A conversion with an item."""

    history: int
    """Number of the history that it is predicted from."""
    item: int
    query: str
    """What the user searched for shortly before; empty if nothing."""


Place = tuple[str, int]
"""A user and an anchor, in whole seconds since 1970: what features are found by."""


@dataclass(slots=True)
class Examples:
    """Histories, and what followed each within ``answer_days``."""

    histories: list[UserHistory] = field(default_factory=list)
    anchors: list[float] = field(default_factory=list)
    """When each history ends, in seconds since 1970."""
    purchases: list[Purchase] = field(default_factory=list)
    """In order of time for each history."""
    impressions: list[tuple[int, Impression]] = field(default_factory=list)
    """With the number of a history."""

    @property
    def places(self) -> list[Place]:
        """The user and the anchor of each history."""
        return [place_at(one.user_id, anchor) for one, anchor in zip(self.histories, self.anchors, strict=True)]


def place_at(user: str, anchor: float) -> Place:
    """Return what the features of a user at an anchor are found by."""
    return user, round(anchor)


def held_out(user: str, config: DownstreamConfig) -> bool:
    """Return whether nothing is learned from a user."""
    return stable_integer("downstream", config.seed, user) < config.held_out * 2**64


def training_examples(logs: Logs, config: DownstreamConfig) -> Examples:
    """Return what the users that are not held out did after each anchor but the last.

    Raises:
        DataError: If there is no purchase of an item, no click or no conversion of an impression among them.
    """
    users = [user for user in logs.events if not held_out(user, config)]
    anchors = [last_anchor(logs, config) - (back + 1) * _window(config) for back in range(config.anchors)]
    return _examples(logs, config, users, anchors, "to learn from")


def held_out_examples(logs: Logs, config: DownstreamConfig) -> Examples:
    """Return what the users held out did after the last anchor; raise as ``training_examples``."""
    users = [user for user in logs.events if held_out(user, config)]
    return _examples(logs, config, users, [last_anchor(logs, config)], "to evaluate on")


def last_anchor(logs: Logs, config: DownstreamConfig) -> float:
    """Return when the time begins that nothing is learned from, in seconds since 1970."""
    return logs.end - _window(config)


def _window(config: DownstreamConfig) -> float:
    return config.answer_days * SECONDS_PER_DAY


def _examples(
    logs: Logs, config: DownstreamConfig, users: Sequence[str], anchors: Sequence[float], purpose: str
) -> Examples:
    made, numbers = Examples(), item_numbers(logs.items)
    number_of: dict[tuple[str, float], int] = {}
    for anchor in anchors:
        for user in users:
            history = compile_history(user, logs.events[user], anchor=anchor, demographics=logs.about.get(user))
            if history.events:
                number_of[user, anchor] = len(made.histories)
                made.histories.append(history)
                made.anchors.append(anchor)
                found = _purchases(logs.events[user], anchor, numbers, config)
                made.purchases += [Purchase(len(made.histories) - 1, item, query) for item, query in found]
        first, end = (bisect_left(logs.impressions, time, key=lambda each: each.time) for time in _ends(anchor, config))
        shown = [(number_of.get((each.user, anchor)), each) for each in logs.impressions[first:end]]
        made.impressions += [(number, each) for number, each in shown if number is not None]
    _require_both(made, anchors, purpose)
    return made


def _ends(anchor: float, config: DownstreamConfig) -> tuple[float, float]:
    return anchor, anchor + _window(config)


def _purchases(
    log: Sequence[LoggedEvent], anchor: float, numbers: dict[str, int], config: DownstreamConfig
) -> Iterator[tuple[int, str]]:
    first, end = (bisect_left(log, time, key=lambda event: event.time) for time in _ends(anchor, config))
    for place in range(first, end):
        event = log[place]
        if event.kind in CONVERSIONS and (item := numbers.get(same_name(event.advertiser))) is not None:
            since = event.time - config.query_minutes * 60
            before = (each for each in reversed(log[:place]) if each.kind in _SEARCHES)
            search = next(before, None)
            yield item, search.text if search is not None and search.time >= since else ""


def _require_both(made: Examples, anchors: Sequence[float], purpose: str) -> None:
    clicks = [shown for _, shown in made.impressions if shown.clicked]
    conversions = sum(shown.converted for shown in clicks)
    found = {"purchases of items": len(made.purchases), "clicks": len(clicks), "conversions": conversions}
    for what, count in found.items():
        if not count:
            raise DataError(
                f"There are no {what} {purpose}: {len(made.histories)} histories end at "
                f"{', '.join(map(describe_time, anchors))}, with {len(made.impressions)} impressions after them. Give "
                "more users or days, or change answer_days, anchors or held_out."
            )
