"""The examples of each task in a simulated world, as many as asked for; those about users are made here.

What is asked about users: how well an ad fits, which advertiser they convert with next, and their profiles.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice

import numpy as np

from megatron_ads.config.data import AdsTask, HistoryConfig
from megatron_ads.data.simulator.histories import LABEL_DAYS, SHOPPER, SimulatedUser, draw_pieces, read_users
from megatron_ads.data.simulator.judging import SLIP, Example, judge_for_user, slip
from megatron_ads.data.simulator.text_examples import (
    comparison_examples,
    pair_examples,
    query_examples,
    rewriting_examples,
    shown_ad,
)
from megatron_ads.data.simulator.vocabulary import KINDS, PLACES, PRICES
from megatron_ads.data.simulator.world import AdFacts, World, department_of, draw_world
from megatron_ads.data.user_features import ViewChooser, view_chooser
from megatron_ads.tasks import ad_user_relevance, user_profile
from megatron_ads.tasks import next_advertiser as advertiser_task
from megatron_ads.tasks.ad_user_relevance import Score
from megatron_ads.tasks.user_history import CONVERSIONS, HistoryView

HISTORY_DAYS = 28
ENDLESS = 2**40
SCORES = tuple(Score)


def users_at_anchor(world: World, *, days: int = HISTORY_DAYS, users: int = ENDLESS) -> Iterator[SimulatedUser]:
    """Yield the users of a world after ``days`` days."""
    for piece in draw_pieces(world, users=users, days=days + LABEL_DAYS, anchor=days - 1):
        yield from read_users(world, piece, anchor=days - 1)


def ad_user_examples(world: World, users: Iterator[SimulatedUser], view_of: ViewChooser) -> Iterator[Example]:
    """Yield one example a user; the ad is chosen so that all scores are frequent."""
    draw = np.random.default_rng([world.seed, 4])
    for user in users:
        ad, score, reasoning = _choose_ad(user, world, draw)
        written, history = SCORES[slip(score, len(SCORES), draw)], user.history
        row_id, view = f"simulated-ad-{history.user_id}", view_of(history)
        row = ad_user_relevance.chat_row(row_id, history, shown_ad(ad, world), written, reasoning, view=view)
        yield Example(row, best=(str(SCORES[score]),), chances=(1 - SLIP,))


def _choose_ad(user: SimulatedUser, world: World, draw: np.random.Generator) -> tuple[AdFacts, int, str]:
    """Draw a score, then ads of several kinds until one has that score; the last one if none has."""
    wanted = int(draw.integers(len(SCORES)))
    searched = sorted({kind for _, kind in user.needs})
    for _ in range(12):
        kind = int(draw.choice(searched))
        if wanted < 2:
            first = department_of(kind) * 4
            kind = int(draw.integers(len(KINDS))) if wanted == 0 else first + int(draw.integers(4))
        ads = [number for number in np.flatnonzero(world.auction_KD[kind] > 0) if world.ads[number].kind == kind]
        ad = world.ads[int(draw.choice(ads))]
        score, reasoning = judge_for_user(user, ad)
        if score == wanted:
            break
    return ad, score, reasoning


def next_advertiser_examples(
    world: World, users: Iterator[SimulatedUser], view_of: ViewChooser, *, ranking: bool = False
) -> Iterator[Example]:
    """Yield one example for each user who does convert after the anchor day.

    The label is who it was. With ``ranking`` the target is the best ranking, else it is the label.
    """
    for user in users:
        if user.next_advertiser is None:
            continue
        order = np.argsort(-user.chance_A, kind="stable")[: advertiser_task.RANKED]
        best = tuple(world.advertisers[number].name for number in order)
        label, view = world.advertisers[user.next_advertiser].name, view_of(user.history)
        name, request = user.history.user_id, advertiser_task.AdvertiserRequest(user.history)
        if ranking:
            interests = _interests(user)[: advertiser_task.MOST_INTERESTS]
            row = advertiser_task.ranking_row(
                f"simulated-ranking-{name}", request, best, interests, label=label, view=view
            )
        else:
            row = advertiser_task.chat_row(f"simulated-next-{name}", request, label, item=user.next_item, view=view)
        yield Example(row, best, tuple(user.chance_A[order].tolist()))


def profile_examples(world: World, users: Iterator[SimulatedUser], view_of: ViewChooser) -> Iterator[Example]:
    """Yield one example a user; the profile follows from the history, so the target itself is the best answer."""
    for user in users:
        history, view = user.history, view_of(user.history)
        row = user_profile.chat_row(f"simulated-profile-{history.user_id}", history, _profile(user), view=view)
        yield Example(row, best=(row.target,), chances=(1.0,))


def _interests(user: SimulatedUser) -> tuple[str, ...]:
    """Return the kinds searched for, the most frequent first, of equally frequent ones the more recent."""
    return tuple(KINDS[kind].name for kind, _ in Counter(kind for _, kind in user.needs).most_common())


def _profile(user: SimulatedUser) -> user_profile.Profile:
    interests = _interests(user)
    bought = {event.category for event in user.history.events if event.kind in CONVERSIONS}
    price, place = PRICES[user.price], PLACES[user.place]
    pending = [kind for kind in interests if kind not in bought][:2]
    return user_profile.Profile(
        summary=f"A {SHOPPER[price]} in {place}, mostly after {interests[0]}.",
        interests=interests[:3],
        intents=tuple(f"buy {kind}" for kind in pending),
        constraints=(f"{price} price level", f"in {place}"),
        avoid=("luxury offers" if price == "low" else "discount offers", f"shops outside {place}"),
        reasoning=f"Searched most: {', '.join(interests[:3])}. Bought: {', '.join(sorted(bought)) or 'nothing'}.",
    )


DEFAULT_ROWS = 4000
DEFAULT_VIEW = HistoryView(max_entries=3)
"""Shorter than the paper's, so that rows fit 512 tokens of the demo tokenizer. Who knows the whole history ranks the
next advertiser no better than 0.01 above who knows so much of it (recall@5)."""
DEFAULT_VIEWS = view_chooser(HistoryConfig(), DEFAULT_VIEW)

_WITHOUT_USERS: dict[AdsTask, Callable[[World], Iterator[Example]]] = {
    AdsTask.query_ad_relevance: partial(pair_examples, three_labels=False),
    AdsTask.query_ad_three_labels: partial(pair_examples, three_labels=True),
    AdsTask.query_generation: query_examples,
    AdsTask.model_comparison: comparison_examples,
    AdsTask.ad_rewriting: rewriting_examples,
}
_OF_USERS: dict[AdsTask, Callable[[World, Iterator[SimulatedUser], ViewChooser], Iterator[Example]]] = {
    AdsTask.ad_user_relevance: ad_user_examples,
    AdsTask.next_advertiser: next_advertiser_examples,
    AdsTask.next_advertiser_ranking: partial(next_advertiser_examples, ranking=True),
    AdsTask.user_profile: profile_examples,
}

TASKS_OF_USERS = frozenset(_OF_USERS)


def examples_of(
    world: World,
    task: AdsTask,
    view_of: ViewChooser = DEFAULT_VIEWS,
    *,
    history_days: int = HISTORY_DAYS,
    users: int = ENDLESS,
) -> Iterator[Example]:
    """Yield the examples of a task: endlessly, unless the task is about users, of whom there are ``users``.

    Histories hold the ``history_days`` before the anchor; the next conversion is one of the ``LABEL_DAYS`` after it.
    """
    if draw_freely := _WITHOUT_USERS.get(task):
        return draw_freely(world)
    return _OF_USERS[task](world, users_at_anchor(world, days=history_days, users=users), view_of)


def simulated_examples(
    task: AdsTask, count: int = DEFAULT_ROWS, *, seed: int = 0, view_of: ViewChooser = DEFAULT_VIEWS
) -> list[Example]:
    """Return the first ``count`` examples of a task; the same seed gives the same world to every task."""
    return list(islice(examples_of(draw_world(seed), task, view_of), count))
