"""The examples of each task in a simulated world, as many as asked for; those about users are made here.

What is asked about users: how well an ad fits, which advertiser they convert with next, and their profiles.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from megatron_ads.config.data import AdsTask, HistoryConfig
from megatron_ads.data.simulator.histories import SHOPPER, HistoryReader, SimulatedUser, draw_pieces
from megatron_ads.data.simulator.judging import SLIP, Example, judge_for_user, slip
from megatron_ads.data.simulator.population import next_advertiser
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
from megatron_ads.tasks.user_history import EventKind, HistoryView

HISTORY_DAYS = 28
LABEL_DAYS = 7
"""The next conversion counts within so many days."""
ENDLESS = 2**40
SCORES = tuple(Score)


@dataclass(frozen=True, slots=True)
class UserAtAnchor:
    """A user, and how likely each advertiser is to be the next one, as far as the history can tell."""

    user: SimulatedUser
    chance_A: NDArray[np.float64]


def users_at_anchor(world: World, *, days: int = HISTORY_DAYS, users: int = ENDLESS) -> Iterator[UserAtAnchor]:
    """Yield the users of a world after ``days`` days."""
    for piece in draw_pieces(world, users=users, days=days + LABEL_DAYS, anchor=days - 1):
        known = piece.behaviour.known
        assert known is not None, "the anchor is one of the days"
        chance_UA = next_advertiser(known, world, window_days=LABEL_DAYS)
        for user in HistoryReader(world, piece.people, piece.behaviour, anchor=days - 1).users():
            yield UserAtAnchor(user, chance_UA[user.place_in_piece])


def ad_user_examples(world: World, users: Iterator[UserAtAnchor], view_of: ViewChooser) -> Iterator[Example]:
    """Yield one example a user; the ad is chosen so that all scores are frequent."""
    draw = np.random.default_rng([world.seed, 4])
    for known in users:
        ad, score, reasoning = _choose_ad(known.user, world, draw)
        written = SCORES[slip(score, len(SCORES), draw)]
        user = known.user.history
        row_id = f"simulated-ad-{user.user_id}"
        row = ad_user_relevance.chat_row(row_id, user, shown_ad(ad, world), written, reasoning, view=view_of(user))
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


def next_advertiser_examples(world: World, users: Iterator[UserAtAnchor], view_of: ViewChooser) -> Iterator[Example]:
    """Yield one example for each user who does convert after the anchor day."""
    for known in users:
        label = known.user.next_advertiser
        if label is not None:
            user = known.user.history
            request = advertiser_task.AdvertiserRequest(user)
            name = world.advertisers[label].name
            row = advertiser_task.chat_row(f"simulated-next-{user.user_id}", request, name, view=view_of(user))
            yield Example(row, *_ranking(known, world))


def advertiser_ranking_examples(world: World, users: Iterator[UserAtAnchor], view_of: ViewChooser) -> Iterator[Example]:
    """Yield one example for each user who does convert; the target is the best ranking, the label who it was."""
    for known in users:
        label = known.user.next_advertiser
        if label is not None:
            user = known.user.history
            best, chances = _ranking(known, world)
            row = advertiser_task.ranking_row(
                f"simulated-ranking-{user.user_id}",
                advertiser_task.AdvertiserRequest(user),
                best[: advertiser_task.RANKED],
                _interests(known.user)[: advertiser_task.MOST_INTERESTS],
                label=world.advertisers[label].name,
                view=view_of(user),
            )
            yield Example(row, best, chances)


def _ranking(known: UserAtAnchor, world: World) -> tuple[tuple[str, ...], tuple[float, ...]]:
    order = np.argsort(-known.chance_A, kind="stable")[: advertiser_task.RANKED]
    return tuple(world.advertisers[number].name for number in order), tuple(known.chance_A[order].tolist())


def profile_examples(world: World, users: Iterator[UserAtAnchor], view_of: ViewChooser) -> Iterator[Example]:
    """Yield one example a user; the profile follows from the history, so the target itself is the best answer."""
    for known in users:
        user = known.user.history
        row = user_profile.chat_row(f"simulated-profile-{user.user_id}", user, _profile(known.user), view=view_of(user))
        yield Example(row, best=(row.target,), chances=(1.0,))


def _interests(user: SimulatedUser) -> tuple[str, ...]:
    """Return the kinds searched for, the most frequent first, of equally frequent ones the more recent."""
    return tuple(KINDS[kind].name for kind, _ in Counter(kind for _, kind in user.needs).most_common())


def _profile(user: SimulatedUser) -> user_profile.Profile:
    interests = _interests(user)
    bought = {
        event.category
        for event in user.history.events
        if event.kind in (EventKind.attributed_conversion, EventKind.matched_conversion)
    }
    price, place = PRICES[user.price], PLACES[user.place]
    pending = tuple(kind for kind in interests if kind not in bought)[:2]
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
_OF_USERS: dict[AdsTask, Callable[[World, Iterator[UserAtAnchor], ViewChooser], Iterator[Example]]] = {
    AdsTask.ad_user_relevance: ad_user_examples,
    AdsTask.next_advertiser: next_advertiser_examples,
    AdsTask.next_advertiser_ranking: advertiser_ranking_examples,
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

    Args:
        world: Where they live.
        task: What is asked.
        view_of: How much of a user's history prompts show.
        history_days: Days before the anchor; the next conversion is looked for in the ``LABEL_DAYS`` after it.
        users: Number of users.
    """
    if draw_freely := _WITHOUT_USERS.get(task):
        return draw_freely(world)
    return _OF_USERS[task](world, users_at_anchor(world, days=history_days, users=users), view_of)


def simulated_examples(
    task: AdsTask, count: int = DEFAULT_ROWS, *, seed: int = 0, view_of: ViewChooser = DEFAULT_VIEWS
) -> list[Example]:
    """Return the first ``count`` examples of a task; the same seed gives the same world to every task."""
    return list(islice(examples_of(draw_world(seed), task, view_of), count))
