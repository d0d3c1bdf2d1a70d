"""The rows that a model answers so that a pipeline can have its answers as features: one for a user and an anchor.

Histories end at the anchors that the pipeline's examples have, and hold nothing later: training users at the earlier
anchors, users held out at the last one. Users to fine-tune the model on can be set apart: a model that has seen what a
user bought says it again, and a ranker that learns from such answers trusts all others too much.

Ours; the papers say only that features are made before the days that they are used in.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace

from megatron_ads.config.data import AdsTask
from megatron_ads.config.downstream import DownstreamConfig
from megatron_ads.data.questions import without_answer
from megatron_ads.data.table_fields import describe_time
from megatron_ads.data.user_features import ViewChooser
from megatron_ads.downstream.examples import Examples, Purchase, held_out_examples, training_examples
from megatron_ads.downstream.logs import Logs
from megatron_ads.errors import DataError
from megatron_ads.rows import ChatRow, Fact
from megatron_ads.stable_random import stable_integer
from megatron_ads.tasks import next_advertiser
from megatron_ads.tasks.answer_format import NOTHING
from megatron_ads.tasks.next_advertiser import AdvertiserRequest
from megatron_ads.tasks.user_history import HistoryView, UserHistory

ANCHOR = "anchor"
"""Fact: when the history of a row's user ends, as ``describe_time`` writes it."""


def _name_alone(row_id: str, history: UserHistory, view: HistoryView) -> ChatRow:
    return next_advertiser.chat_row(row_id, AdvertiserRequest(history), NOTHING, view=view)


def _ranking(row_id: str, history: UserHistory, view: HistoryView) -> ChatRow:
    return next_advertiser.ranking_row(row_id, AdvertiserRequest(history), [NOTHING], [], label=NOTHING, view=view)


ASKED: dict[AdsTask, Callable[[str, UserHistory, HistoryView], ChatRow]] = {
    AdsTask.next_advertiser: _name_alone,
    AdsTask.next_advertiser_ranking: _ranking,
}
"""The tasks that rows can ask for."""


def set_apart(user: str, config: DownstreamConfig, share: float) -> bool:
    """Return whether a user is one of those to fine-tune on; of users held out none is."""
    return stable_integer("downstream rows", config.seed, user) < share * 2**64


def question_rows(
    logs: Logs, config: DownstreamConfig, task: AdsTask, view_of: ViewChooser, *, apart: float = 0.0
) -> Iterator[ChatRow]:
    """Yield a row without an answer for each history that an example is made of, training users first.

    Args:
        logs: What the pipeline was trained on.
        config: Of the pipeline.
        task: One of ``ASKED``.
        view_of: How much of a history the prompt shows.
        apart: Share of the training users that are set apart, and have no row.

    Raises:
        DataError: As ``training_examples``.
    """
    for examples, share in ((training_examples(logs, config), apart), (held_out_examples(logs, config), 0.0)):
        followed = {number for number, _ in examples.impressions} | {each.history for each in examples.purchases}
        for number in sorted(followed):
            history, anchor = examples.histories[number], examples.anchors[number]
            if not set_apart(history.user_id, config, share):
                row = ASKED[task](_row_id(task, history, anchor), history, view_of(history))
                yield _anchored(without_answer(row), anchor)


def labelled_rows(logs: Logs, config: DownstreamConfig, view_of: ViewChooser, *, apart: float) -> Iterator[ChatRow]:
    """Yield a row to fine-tune on for each history of a user set apart that a purchase followed: the first one.

    Raises:
        DataError: If there is none; as ``training_examples``.
    """
    examples, task, count = training_examples(logs, config), AdsTask.next_advertiser, 0
    for number, purchase in sorted(_first_purchases(examples).items()):
        history, anchor = examples.histories[number], examples.anchors[number]
        if set_apart(history.user_id, config, apart):
            count, label = count + 1, logs.items[purchase.item].name
            row_id, view = _row_id(task, history, anchor), view_of(history)
            yield _anchored(next_advertiser.chat_row(row_id, AdvertiserRequest(history), label, view=view), anchor)
    if not count:
        raise DataError(f"No user of the share {apart:g} that is set apart bought anything. Raise the share.")


def _first_purchases(examples: Examples) -> dict[int, Purchase]:
    found: dict[int, Purchase] = {}
    for purchase in examples.purchases:  # in order of time
        found.setdefault(purchase.history, purchase)
    return found


def _row_id(task: AdsTask, history: UserHistory, anchor: float) -> str:
    return f"{task}-{history.user_id}-{describe_time(anchor)}"


def _anchored(row: ChatRow, anchor: float) -> ChatRow:
    """Return a row that says its anchor; the prompt shows what counts of the events, which are left out."""
    facts = {name: value for name, value in row.facts.items() if name != Fact.events}
    return replace(row, facts={**facts, ANCHOR: describe_time(anchor)})
