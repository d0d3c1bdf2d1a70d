"""What a prompt shows of a user: nothing from after the anchor, the sections and windows asked for, within limits."""

from dataclasses import replace

import pytest

from megatron_ads.config.data import HistoryConfig
from megatron_ads.data.user_features import (
    LoggedEvent,
    compile_history,
    count_pieces,
    fitting_view,
    history_view,
    view_chooser,
)
from megatron_ads.errors import ConfigError
from megatron_ads.tasks.user_history import (
    FULL_VIEW,
    Demographics,
    EventKind,
    HistoryView,
    Section,
    UserHistory,
    render_history,
    sections,
)

DAY = 86_400
ANCHOR = 100 * DAY
LOG = [
    LoggedEvent(time=ANCHOR - day * DAY, kind=kind, text=f"{kind} {day}", category="c", brand="b", advertiser="a")
    for kind in EventKind
    for day in (1, 20, 95)
]  # fmt: skip


def history() -> UserHistory:
    return compile_history("u", LOG, anchor=ANCHOR, demographics=Demographics(age="25-34"))


def test_events_from_the_anchor_on_are_not_in_a_history() -> None:
    log = [LoggedEvent(time=t, kind=EventKind.click, text=str(t)) for t in (ANCHOR - 1, ANCHOR, ANCHOR + DAY)]
    (event,) = compile_history("u", log, anchor=ANCHOR).events
    assert event.text == str(ANCHOR - 1)
    assert event.days_ago == pytest.approx(1 / DAY)


def test_windows_of_the_paper_hold_unless_a_recipe_says_otherwise() -> None:
    shown = sections(history(), history_view(HistoryConfig()))
    assert shown[Section.onsite_searches] == ("onsite_search 1", "onsite_search 20")  # 90 days
    assert shown[Section.offsite_urls] == ("offsite_url 1",)  # 14 days
    assert shown[Section.offsite_searches] == ("offsite_search 1", "offsite_search 20", "offsite_search 95")
    wider = history_view(HistoryConfig(window_days={"offsite_urls": 30, "clicks": 5}))
    assert sections(history(), wider)[Section.offsite_urls] == ("offsite_url 1", "offsite_url 20")
    assert sections(history(), wider)[Section.clicks] == ("click 1",)
    assert sections(history(), wider)[Section.onsite_searches] == shown[Section.onsite_searches]


@pytest.mark.parametrize("section", [section for section in Section if section is not Section.semantic_ids])
def test_each_section_can_be_left_out_alone(section: Section) -> None:
    whole = sections(history())
    without = sections(history(), history_view(HistoryConfig(without=[str(section)])))
    assert section in whole
    assert without == {name: entries for name, entries in whole.items() if name is not section}


def test_a_source_may_leave_sections_out_and_a_recipe_may_bring_them_back() -> None:
    default = HistoryView(without=frozenset({Section.clicks}))
    assert history_view(HistoryConfig(), default).without == {Section.clicks}
    assert history_view(HistoryConfig(without=[]), default).without == frozenset()


def test_an_unknown_section_is_named_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"'onsite_search'; known: .* Did you mean onsite_searches\?"):
        history_view(HistoryConfig(without=["onsite_search"]))


@pytest.mark.parametrize("limit", [200, 60, 20, 5, 0])
def test_a_history_is_shortened_to_its_limit_and_no_further(limit: int) -> None:
    view = fitting_view(history(), FULL_VIEW, max_tokens=limit)
    shown = sections(history(), view)
    assert not shown or count_pieces(render_history(shown)) <= limit
    if view != FULL_VIEW:  # one step wider is too long
        wider = HistoryView(without=FULL_VIEW.without, max_entries=view.max_entries + 1)
        assert count_pieces(render_history(sections(history(), wider))) > limit


def test_the_oldest_entries_go_first() -> None:
    whole = count_pieces(render_history(sections(history())))
    shown = sections(history(), fitting_view(history(), FULL_VIEW, max_tokens=whole - 1))
    assert shown[Section.offsite_searches] == ("offsite_search 1", "offsite_search 20")


def test_a_recipe_may_count_with_a_tokenizer_of_its_own() -> None:
    view = fitting_view(history(), FULL_VIEW, max_tokens=300, count_tokens=len)
    assert 200 < len(render_history(sections(history(), view))) <= 300


def test_the_chooser_narrows_long_histories_only() -> None:
    choose = view_chooser(HistoryConfig(max_tokens=20))
    short = compile_history("u", LOG[:1], anchor=ANCHOR)
    assert choose(short) == FULL_VIEW
    assert choose(history()) != FULL_VIEW


def test_semantic_ids_leave_the_words_of_a_limited_prompt_alone() -> None:
    events = tuple(replace(event, item_id=str(number)) for number, event in enumerate(history().events))
    user = replace(history(), events=events)
    known = {str(number): f"<sid_0_{number}>" for number in range(len(events))}
    plain = replace(FULL_VIEW, without=frozenset({Section.semantic_ids}))
    for most in (8, 20, 40):
        with_ids, without = (
            sections(user, fitting_view(user, view, max_tokens=most))
            for view in (replace(FULL_VIEW, semantic_ids=known), plain)
        )
        assert with_ids.pop(Section.semantic_ids)
        assert with_ids == without
