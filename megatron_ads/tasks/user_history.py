"""What is known of a user before the anchor day, and how a prompt shows it: sections, newest first, within limits.

Source: the advertiser paper, sections 3.2.3 (sections) and 4.1 (windows); AdNanny, section 3.2 (clicks, page views).
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from enum import StrEnum

from megatron_ads.rows import ChatRow, Fact, JsonValue


class EventKind(StrEnum):
    """What a user did. On-site is on the platform that shows the ads."""

    onsite_search = "onsite_search"
    click = "click"
    page_view = "page_view"
    attributed_conversion = "attributed_conversion"
    """A conversion that an ad of the platform led to."""
    matched_conversion = "matched_conversion"
    """A conversion elsewhere, matched to the user."""
    offsite_search = "offsite_search"
    offsite_url = "offsite_url"


CONVERSIONS = frozenset({EventKind.attributed_conversion, EventKind.matched_conversion})


@dataclass(frozen=True, kw_only=True, slots=True)
class Event:
    """One thing a user did before the anchor day; what is unknown is empty."""

    kind: EventKind
    days_ago: float
    """Days before the anchor; 0 or more."""
    text: str
    """The search, the page's or item's title, the URL."""
    category: str = ""
    brand: str = ""
    advertiser: str = ""
    semantic_id: str = ""
    """Codes of the item, as one text."""
    item_id: str = ""
    """Id of the item, by which a table of semantic IDs has it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Demographics:
    """What a user said about themselves; empty is unknown."""

    age: str = ""
    gender: str = ""
    state: str = ""
    """How active the user is: new, casual, core."""


@dataclass(frozen=True, kw_only=True, slots=True)
class UserHistory:
    """One user at one anchor day. The order of events does not matter."""

    user_id: str
    events: tuple[Event, ...] = ()
    demographics: Demographics = field(default_factory=Demographics)


class Section(StrEnum):
    """A part of the prompt that can be left out; the value is its heading's key."""

    past_advertisers = "past_advertisers"
    profile = "profile"
    attributed_conversions = "attributed_conversions"
    matched_conversions = "matched_conversions"
    onsite_searches = "onsite_searches"
    clicks = "clicks"
    page_views = "page_views"
    offsite_searches = "offsite_searches"
    offsite_urls = "offsite_urls"
    top_categories = "top_categories"
    top_brands = "top_brands"
    semantic_ids = "semantic_ids"


HEADINGS = {
    Section.past_advertisers: "Bought from",
    Section.profile: "Profile",
    Section.attributed_conversions: "Bought after an ad",
    Section.matched_conversions: "Bought elsewhere",
    Section.onsite_searches: "Searched here",
    Section.clicks: "Clicked",
    Section.page_views: "Viewed",
    Section.offsite_searches: "Searched elsewhere",
    Section.offsite_urls: "Visited",
    Section.top_categories: "Top categories",
    Section.top_brands: "Top brands",
    Section.semantic_ids: "Recent items",
}
SEPARATOR = "; "
NOTHING_KNOWN = "Nothing is known of the user."
_KINDS = {section: kind for section in Section for kind in EventKind if section.startswith(kind)}
"""A section of events has the plural of their kind as its name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HistoryView:
    """How much of a history a prompt shows. The defaults are the paper's windows, and ours for the rest."""

    without: frozenset[Section] = frozenset()
    """Sections left out: the ablations."""
    window_days: Mapping[Section, float] = field(
        default_factory=lambda: {Section.onsite_searches: 90.0, Section.offsite_urls: 14.0}
    )
    """Events of a section that are older are not shown; a section not named here has no limit."""
    max_entries: int = 10
    """Most entries of a section; the oldest are left out, of the top lists the rarest."""
    semantic_ids: Mapping[str, str] = field(default_factory=dict)
    """Semantic ID of each item, by its id; empty: those that the events have themselves."""

    def semantic_id_of(self, event: Event) -> str:
        """Return the semantic ID of an event's item; empty if it has none."""
        return self.semantic_ids.get(event.item_id, "") if self.semantic_ids else event.semantic_id


FULL_VIEW = HistoryView()


def sections(history: UserHistory, view: HistoryView = FULL_VIEW) -> dict[Section, tuple[str, ...]]:
    """Return the entries of every section that has any, each once: the newest first, in top lists the most frequent."""
    newest_first = sorted(history.events, key=lambda event: event.days_ago)
    found = {
        section: tuple(dict.fromkeys(entries))[: view.max_entries]
        for section in Section
        if section not in view.without
        for entries in [_entries(section, newest_first, history.demographics, view)]
    }
    return {section: entries for section, entries in found.items() if entries}


def render_history(shown: Mapping[Section, Sequence[str]]) -> str:
    """Return one line per section, as the prompt has it; one that says so if there is no section."""
    lines = [f"{HEADINGS[section]}: {SEPARATOR.join(entries)}" for section, entries in shown.items()]
    return "\n".join(lines) or NOTHING_KNOWN


def user_facts(history: UserHistory, view: HistoryView = FULL_VIEW) -> dict[str, JsonValue]:
    """Return what a row says of its user: everything known, and what the prompt shows of it."""
    return {
        Fact.user: history.user_id,
        Fact.demographics: _known_fields(history.demographics),
        Fact.events: [_known_fields(event) for event in history.events],
        Fact.history: {str(section): list(entries) for section, entries in sections(history, view).items()},
    }


def _known_fields(record: Event | Demographics) -> dict[str, JsonValue]:
    values = {part.name: getattr(record, part.name) for part in fields(record)}
    return {name: value for name, value in values.items() if value != ""}


def shown_history(row: ChatRow) -> dict[Section, tuple[str, ...]]:
    """Return the sections that a row's prompt shows.

    Raises:
        DataError: If the row's facts have no history.
    """
    facts = row.object_fact(Fact.history)
    return {section: tuple(facts[section]) for section in Section if section in facts}  # type: ignore[arg-type]


def _entries(
    section: Section, newest_first: Iterable[Event], demographics: Demographics, view: HistoryView
) -> list[str]:
    oldest = view.window_days.get(section, float("inf"))
    recent = [event for event in newest_first if event.days_ago <= oldest]
    match section:
        case Section.profile:
            return [value for value in (demographics.age, demographics.gender, demographics.state) if value]
        case Section.past_advertisers:
            return [event.advertiser for event in recent if event.kind in CONVERSIONS and event.advertiser]
        case Section.top_categories:
            return _most_frequent(event.category for event in recent)
        case Section.top_brands:
            return _most_frequent(event.brand for event in recent)
        case Section.semantic_ids:
            return [known for event in recent if (known := view.semantic_id_of(event))]
        case _:
            return [
                f"{event.text} ({event.advertiser})" if event.kind in CONVERSIONS and event.advertiser else event.text
                for event in recent
                if event.kind is _KINDS[section]
            ]


def _most_frequent(values: Iterable[str]) -> list[str]:
    """Return values by frequency; of equally frequent ones the more recent first."""
    return [value for value, _ in Counter(value for value in values if value).most_common()]
