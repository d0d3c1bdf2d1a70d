"""One worked example of every task, and of every other form: the tests of all of them start from these."""

from dataclasses import replace

from megatron_ads.rows import ChatRow
from megatron_ads.tasks import (
    ad_rewriting,
    ad_user_relevance,
    advertiser_question,
    model_comparison,
    next_advertiser,
    next_item,
    query_generation,
    relevance,
    user_profile,
    variants,
)
from megatron_ads.tasks.prompts import Ad
from megatron_ads.tasks.user_history import Demographics, Event, EventKind, HistoryView, UserHistory

HOTEL = Ad(title="Luxury 5-star hotel in central Paris", description="Premium suites.", seller="www.examplehotel.com")
SHOES = Ad(title="Lightweight running shoes for new runners", description="Comfortable and cushioned.")
POOL = tuple(f"Shop {number}" for number in range(1, 25))
RUNNER = UserHistory(
    user_id="u1",
    demographics=Demographics(age="25-34", state="core"),
    events=(
        Event(kind=EventKind.onsite_search, days_ago=3, text="beginner 5k training plan", category="Running"),
        Event(kind=EventKind.click, days_ago=2, text="how to choose running shoes", category="Running"),
        Event(kind=EventKind.page_view, days_ago=1, text="running socks", category="Clothing", brand="Fleet"),
        Event(
            kind=EventKind.attributed_conversion,
            days_ago=20,
            text="water bottle",
            category="Outdoor",
            brand="Fleet",
            advertiser="Shop 7",
        ),
        Event(kind=EventKind.matched_conversion, days_ago=9, text="head torch", advertiser="Shop 2"),
    ),
)
QUERIES = (
    query_generation.GeneratedQuery("gaming notebook under 1000", "a synonym with a price"),
    query_generation.GeneratedQuery("refurbished laptops for students", "condition and target group"),
)
PROFILE = user_profile.Profile(
    summary="Starts to run and buys the first gear.",
    interests=("running", "outdoor"),
    intents=("buy running shoes",),
    constraints=("low price",),
    reasoning="Searches and clicks are about running.",
)
SHARED = model_comparison.SharedRequest("query: red shoes", current="blue hat", new="red running shoes")
ASSESSMENT = model_comparison.Assessment(
    strengths=("right category", "right colour"),
    risk=model_comparison.Risk.low,
    verdict=model_comparison.Verdict.better,
    reasoning="The new output is a shoe.",
)
BRIEF = ad_rewriting.RewriteBrief(SHOES, keywords=("running shoes",), goal="emphasise the price")
REWRITE = ad_rewriting.Rewrite(
    title="Affordable running shoes for beginners",
    text="Light, cushioned and easy on the budget.",
    rationale="same intent, emphasises price",
    keywords=("beginner running shoes", "cheap running shoes"),
    reasoning="The goal is the price.",
)
REQUEST = next_advertiser.AdvertiserRequest(RUNNER, POOL)


def question_about(row_id: str, advertiser: str, reasoning: str = "") -> tuple[ChatRow, str, tuple[str, ...]]:
    """Return what variants ask about the runner from: a row, the new one's id, other advertisers."""
    return next_advertiser.chat_row(row_id, REQUEST, advertiser, reasoning), row_id, POOL


def row_with_items(row_id: str) -> ChatRow:
    """Return the question for the runner's next advertiser, with semantic IDs: of the item sold and of those before."""
    events = (*RUNNER.events, Event(kind=EventKind.click, days_ago=4, text="red socks", item_id="socks"))
    view = HistoryView(semantic_ids={"socks": "<sid_0_1><sid_1_2>", "shoes": "<sid_0_1><sid_1_4>"})
    request = next_advertiser.AdvertiserRequest(replace(RUNNER, events=events))
    return next_advertiser.chat_row(row_id, request, "Shop 7", item="shoes", view=view)


def query_ad_row(label: relevance.Label) -> ChatRow:
    """Return the hotel for a query, with a label of choice."""
    return relevance.chat_row("a1", "cheap hotel in Paris", HOTEL, label, "The price differs.")


def ad_user_row(score: int) -> ChatRow:
    """Return the shoes for the runner, with a score of choice."""
    return ad_user_relevance.chat_row("b1", RUNNER, SHOES, score, "All activity is about running.")


def rows_of_all_tasks() -> list[ChatRow]:
    """Return at least one row of every task in the registry."""
    ranking = [f"Shop {number}" for number in range(5, 25)]
    return [
        query_ad_row(relevance.Label.fair),
        relevance.chat_row(
            "a2",
            "cheap hotel in Paris",
            HOTEL,
            relevance.Label.fair,
            "The price differs.",
            location=relevance.Flag.good,
            quality=relevance.Flag.bad,
        ),
        ad_user_row(3),
        query_generation.chat_row("c1", query_generation.KeywordBrief("laptop computer"), QUERIES, "Keep the kind."),
        next_advertiser.chat_row("d1", REQUEST, "Shop 7"),
        next_advertiser.ranking_row("d2", REQUEST, ranking, ["running", "R&B"], label="Shop 7"),
        user_profile.chat_row("e1", RUNNER, PROFILE),
        model_comparison.chat_row("f1", SHARED, ASSESSMENT),
        ad_rewriting.chat_row("g1", BRIEF, REWRITE),
        variants.query_ad_row(query_ad_row(relevance.Label.fair), "h1"),
        variants.ad_user_row(ad_user_row(1), "h2"),
        variants.advertiser_row(*question_about("h3", "Shop 7")),
        advertiser_question.choose_one_row(*question_about("i1", "Shop 7")),
        advertiser_question.list_ranking_row(*question_about("j1", "Shop 7")),
        next_item.next_item_row(row_with_items("k1"), "k1"),
    ]
