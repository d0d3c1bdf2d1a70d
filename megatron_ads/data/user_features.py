"""From what users did to what a prompt shows of them: nothing from after the anchor, and no more than fits.

The record, its sections, their order and windows are those of ``tasks.user_history``; here are the settings of a recipe
that choose among them, and the way from a log of timed events to the record.

Source: the advertiser paper, section 3.2.3 (sections, anchor), 4.1 (windows), 4.3 (ablations by section).
"""

import difflib
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from megatron_ads.config.data import HistoryConfig
from megatron_ads.data.semantic_id_table import read_semantic_ids
from megatron_ads.errors import ConfigError
from megatron_ads.tasks.user_history import (
    FULL_VIEW,
    Demographics,
    Event,
    EventKind,
    HistoryView,
    Section,
    UserHistory,
    render_history,
    sections,
)

ViewChooser = Callable[[UserHistory], HistoryView]
"""How much of a history its prompt shows."""

SECONDS_PER_DAY = 24 * 60 * 60


@dataclass(frozen=True, kw_only=True, slots=True)
class LoggedEvent:
    """One line of a log of user events."""

    time: float
    """Seconds since 1970."""
    kind: EventKind
    text: str
    category: str = ""
    brand: str = ""
    advertiser: str = ""
    semantic_id: str = ""
    item_id: str = ""


def compile_history(
    user_id: str, log: Iterable[LoggedEvent], *, anchor: float, demographics: Demographics | None = None
) -> UserHistory:
    """Return what is known of a user before ``anchor``, in seconds since 1970; later events are not in it."""
    events = tuple(
        Event(
            kind=event.kind,
            days_ago=(anchor - event.time) / SECONDS_PER_DAY,
            text=event.text,
            category=event.category,
            brand=event.brand,
            advertiser=event.advertiser,
            semantic_id=event.semantic_id,
            item_id=event.item_id,
        )
        for event in log
        if event.time < anchor
    )
    return UserHistory(user_id=user_id, events=events, demographics=demographics or Demographics())


def history_view(config: HistoryConfig, default: HistoryView = FULL_VIEW) -> HistoryView:
    """Return the view that a recipe asks for; what it leaves open is as in ``default``.

    Raises:
        ConfigError: If there is no such section.
        DataError: If there is no such table of semantic IDs.
    """

    def section(name: str) -> Section:
        if name in list(Section):
            return Section(name)
        near = difflib.get_close_matches(name, list(Section), n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise ConfigError(f"history names the section {name!r}; known: {', '.join(Section)}.{hint}")

    semantic_ids = read_semantic_ids(Path(config.semantic_ids)) if config.semantic_ids is not None else {}
    left_out = default.without - {Section.semantic_ids} if semantic_ids else default.without
    return HistoryView(
        without=left_out if config.without is None else frozenset(map(section, config.without)),
        window_days={**default.window_days, **{section(name): days for name, days in config.window_days.items()}},
        max_entries=default.max_entries if config.max_entries is None else config.max_entries,
        semantic_ids=semantic_ids,
    )


def count_pieces(text: str) -> int:
    """Estimate the tokens of a text without a tokenizer: its words and signs."""
    return len(re.findall(r"\w+|[^\w\s]", text))


def fitting_view(
    history: UserHistory, view: HistoryView, *, max_tokens: int, count_tokens: Callable[[str], int] = count_pieces
) -> HistoryView:
    """Return the widest narrowing of ``view`` with which ``render_history`` takes at most ``max_tokens``.

    First all sections are allowed ever fewer entries, so that the longest give their oldest ones first; once each is
    down to one, whole sections go, the last one first. Semantic IDs are not counted: with and without them, the other
    sections are the same.
    """
    narrowed = replace(view, without=view.without | {Section.semantic_ids})
    while count_tokens(render_history(shown := sections(history, narrowed))) > max_tokens and shown:
        longest = max(len(entries) for entries in shown.values())
        if longest > 1:
            narrowed = replace(narrowed, max_entries=longest - 1)
        else:
            narrowed = replace(narrowed, without=narrowed.without | {list(shown)[-1]})
    return replace(narrowed, without=narrowed.without - ({Section.semantic_ids} - view.without))


def view_chooser(config: HistoryConfig, default: HistoryView = FULL_VIEW) -> ViewChooser:
    """Return what gives each history the view that a recipe asks for, its limit of tokens included.

    Raises:
        ConfigError: If there is no such section.
        DataError: If there is no such table of semantic IDs.
    """
    view, max_tokens = history_view(config, default), config.max_tokens
    if max_tokens is None:
        return lambda history: view
    return partial(fitting_view, view=view, max_tokens=max_tokens)
