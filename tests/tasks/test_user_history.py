"""Sections of a user's history: what they hold, in which order, within which limits."""

import pytest

from megatron_ads.tasks.user_history import (
    Demographics,
    Event,
    EventKind,
    HistoryView,
    Section,
    UserHistory,
    render_history,
    sections,
)
from tests.tasks.examples import RUNNER


def searched(days_ago: float, text: str, **more: str) -> Event:
    return Event(kind=EventKind.onsite_search, days_ago=days_ago, text=text, **more)


def bought(days_ago: float, advertiser: str, kind: EventKind = EventKind.attributed_conversion) -> Event:
    return Event(kind=kind, days_ago=days_ago, text="thing", advertiser=advertiser)


def test_sections_of_a_user_line_by_line():
    assert render_history(sections(RUNNER)).splitlines() == [
        "Bought from: Shop 2; Shop 7",
        "Profile: 25-34; core",
        "Bought after an ad: water bottle (Shop 7)",
        "Bought elsewhere: head torch (Shop 2)",
        "Searched here: beginner 5k training plan",
        "Clicked: how to choose running shoes",
        "Viewed: running socks",
        "Top categories: Running; Clothing; Outdoor",
        "Top brands: Fleet",
    ]


def test_the_newest_comes_first_whatever_the_order_of_events_and_comes_once():
    user = UserHistory(user_id="u", events=(searched(5, "old"), searched(1, "new"), searched(3, "new")))
    assert sections(user)[Section.onsite_searches] == ("new", "old")


def test_windows_are_the_papers_and_a_day_on_the_edge_is_inside():
    # Searches of the last 90 days, URLs of the last 14.
    events = [searched(90, "in"), searched(90.5, "out")]
    events += [Event(kind=EventKind.offsite_url, days_ago=days, text=f"{days}.com") for days in (14, 15)]
    shown = sections(UserHistory(user_id="u", events=tuple(events)))
    assert shown[Section.onsite_searches] == ("in",)
    assert shown[Section.offsite_urls] == ("14.com",)
    wide = HistoryView(window_days={})
    assert len(sections(UserHistory(user_id="u", events=tuple(events)), wide)[Section.offsite_urls]) == 2


@pytest.mark.parametrize("section", list(Section))
def test_every_section_can_be_left_out_and_changes_nothing_else(section: Section):
    user = UserHistory(
        user_id="u",
        demographics=Demographics(age="30"),
        events=tuple(
            Event(kind=kind, days_ago=1, text=kind, category="c", brand="b", advertiser="a", semantic_id="s")
            for kind in EventKind
        ),
    )
    full = sections(user)
    assert set(full) == set(Section)
    without = sections(user, HistoryView(without=frozenset({section})))
    assert without == {name: entries for name, entries in full.items() if name is not section}


def test_only_the_most_recent_entries_are_shown():
    user = UserHistory(user_id="u", events=tuple(searched(day, f"day {day}") for day in range(30)))
    assert sections(user, HistoryView(max_entries=3))[Section.onsite_searches] == ("day 0", "day 1", "day 2")


def test_top_lists_go_by_frequency_then_recency():
    events = (
        searched(1, "a", category="New"),
        searched(2, "b", category="Old"),
        searched(3, "c", category="Often"),
        searched(4, "d", category="Often"),
    )
    assert sections(UserHistory(user_id="u", events=events))[Section.top_categories] == ("Often", "New", "Old")


def test_past_advertisers_come_from_conversions_only():
    events = (
        bought(9, "First"),
        bought(2, "Last", EventKind.matched_conversion),
        bought(5, "First"),
        searched(1, "x", advertiser="Seen"),
        bought(3, ""),
    )
    assert sections(UserHistory(user_id="u", events=events))[Section.past_advertisers] == ("Last", "First")


def test_a_user_of_whom_nothing_is_known_has_no_sections():
    assert sections(UserHistory(user_id="u")) == {}
