"""The examples of one task in a simulated world, as many as asked for."""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice

from megatron_ads.config.data import AdsTask, HistoryConfig
from megatron_ads.data.simulator.examples import Example
from megatron_ads.data.simulator.pair_examples import pair_examples
from megatron_ads.data.simulator.user_examples import (
    ENDLESS,
    HISTORY_DAYS,
    UserAtAnchor,
    ad_user_examples,
    advertiser_ranking_examples,
    next_advertiser_examples,
    profile_examples,
    users_at_anchor,
)
from megatron_ads.data.simulator.world import World, draw_world
from megatron_ads.data.simulator.writing_examples import comparison_examples, query_examples, rewriting_examples
from megatron_ads.data.user_features import ViewChooser, view_chooser
from megatron_ads.tasks.user_history import HistoryView

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
    """Yield the examples of a task; without end, unless it is about users and there are so many only.

    Args:
        world: Where they live.
        task: What is asked.
        view_of: How much of a user's history prompts show.
        history_days: Days before the anchor; the next conversion is looked for in the ``LABEL_DAYS`` after it.
        users: How many there are.
    """
    if draw_freely := _WITHOUT_USERS.get(task):
        return draw_freely(world)
    return _OF_USERS[task](world, users_at_anchor(world, days=history_days, users=users), view_of)


def simulated_examples(
    task: AdsTask, count: int = DEFAULT_ROWS, *, seed: int = 0, view_of: ViewChooser = DEFAULT_VIEWS
) -> list[Example]:
    """Return the first ``count`` examples of a task; the same seed gives the same world to every task."""
    return list(islice(examples_of(draw_world(seed), task, view_of), count))
