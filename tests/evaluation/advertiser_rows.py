"""Small next-advertiser rows for tests of evaluation."""

from collections.abc import Sequence

from megatron_ads.rows import ChatRow
from megatron_ads.tasks import next_advertiser
from megatron_ads.tasks.user_history import Event, EventKind, UserHistory


def buyer(user: str, past: Sequence[str]) -> UserHistory:
    """Return a user who bought from ``past``, the most recent first."""
    events = tuple(
        Event(kind=EventKind.matched_conversion, days_ago=days, text="something", advertiser=name)
        for days, name in enumerate(past, 1)
    )
    return UserHistory(user_id=user, events=events)


def name_row(row_id: str, label: str, past: Sequence[str] = (), user: str = "") -> ChatRow:
    """Return a row of a user of their own, unless one is named."""
    request = next_advertiser.AdvertiserRequest(buyer(user or f"user {row_id}", past))
    return next_advertiser.chat_row(row_id, request, label)
