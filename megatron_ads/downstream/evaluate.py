"""How well a frozen pipeline retrieves and ranks for users it was not trained on, next to simple baselines.

Retrieval is asked for the first purchase after the last anchor; ranking is judged on every impression after it.
Intervals are bootstrapped over users.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_ads.downstream.examples import Examples, Purchase, held_out_examples
from megatron_ads.downstream.logs import Logs
from megatron_ads.downstream.pipeline import Pipeline
from megatron_ads.errors import DataError
from megatron_ads.metrics.classification import auc, average_precision, log_loss
from megatron_ads.metrics.intervals import ends, mean_and_interval, statistic_interval
from megatron_ads.metrics.ranking import RECALLS, most_popular, ndcg_at, position_of, recall_at, recent_then_popular
from megatron_ads.tasks.user_history import CONVERSIONS, UserHistory

NDCG_AT = 20
_RESAMPLES = 200
Score = dict[str, Any]
"""``value`` and ``interval``."""


def evaluate_pipeline(pipeline: Pipeline, logs: Logs) -> dict[str, Any]:
    """Return scores on the held-out users of the logs it was trained on, as JSON values.

    Raises:
        DataError: If the logs have other items, or too few held-out users.
    """
    require_items(pipeline, logs)
    examples = held_out_examples(logs, pipeline.config)
    first: dict[int, Purchase] = {}
    for purchase in examples.purchases:
        first.setdefault(purchase.history, purchase)
    return {
        "digest": pipeline.digest,
        "users": len(first),
        "impressions": len(examples.impressions),
        "retrieval": _retrieval(pipeline, examples, list(first.values())),
        "ranking": _ranking(pipeline, examples),
    }


def require_items(pipeline: Pipeline, logs: Logs) -> None:
    """Refuse logs with other items than those of a pipeline.

    Raises:
        DataError: If they have.
    """
    names = [item.name for item in pipeline.items]
    if [item.name for item in logs.items] != names:
        raise DataError(
            f"The logs have {len(logs.items)} items, which are not the {len(names)} of the pipeline in its order. "
            "Name the logs that it was trained on."
        )


def _retrieval(pipeline: Pipeline, examples: Examples, purchases: Sequence[Purchase]) -> dict[str, dict[str, Score]]:
    names = [item.name for item in pipeline.items]
    histories = [examples.histories[purchase.history] for purchase in purchases]

    def retrieved(queries: Sequence[str]) -> list[list[str]]:
        user_NC = pipeline.users(histories, queries)
        return [[names[item] for item in best] for best in pipeline.retrieve(user_NC, max(*RECALLS, NDCG_AT))]

    bought = zip(names, pipeline.counts.bought, strict=True)
    popular = most_popular([name for name, count in bought for _ in range(count)], len(names))
    rankings = {
        "two towers": retrieved([""] * len(histories)),
        "two towers, with the search before": retrieved([purchase.query for purchase in purchases]),
        "most popular": [popular] * len(histories),
        "recent, then popular": [recent_then_popular(_recent(each), popular, len(names)) for each in histories],
    }
    truths = [names[purchase.item] for purchase in purchases]
    return {name: _retrieval_scores(truths, ranked) for name, ranked in rankings.items()}


def _recent(history: UserHistory) -> list[str]:
    newest_first = sorted(history.events, key=lambda event: event.days_ago)
    return [event.advertiser for event in newest_first if event.kind in CONVERSIONS and event.advertiser]


def _retrieval_scores(truths: Sequence[str], rankings: Sequence[Sequence[str]]) -> dict[str, Score]:
    positions = [position_of(truth, ranking) for truth, ranking in zip(truths, rankings, strict=True)]
    measured = {f"recall@{k}": [recall_at([each], k) or 0.0 for each in positions] for k in RECALLS}
    measured[f"ndcg@{NDCG_AT}"] = [ndcg_at([each], NDCG_AT) or 0.0 for each in positions]
    return {name: mean_and_interval(values) for name, values in measured.items()}


def _ranking(pipeline: Pipeline, examples: Examples) -> dict[str, dict[str, Score]]:
    shown = [each for _, each in examples.impressions]
    histories = [examples.histories[number] for number, _ in examples.impressions]
    item_N, users = np.array([each.item for each in shown]), [each.user for each in shown]
    happened_N2 = np.array([(each.clicked, each.clicked and each.converted) for each in shown])
    chances = {
        "DCN-v2, with the query": pipeline.chances(pipeline.users(histories, [each.query for each in shown]), item_N),
        "DCN-v2, history alone": pipeline.chances(pipeline.users(histories, [""] * len(shown)), item_N),
        "the item's own rates": _own_rates(pipeline)[item_N],
    }
    if all(each.chances is not None for each in shown):
        chances["best reachable"] = np.array([each.chances for each in shown])
    return {
        name: {
            f"{target}_{score}": _with_interval(compute, happened_N2[:, column], given_N2[:, column], users)
            for column, target in enumerate(("click", "ctcvr"))
            for score, compute in _SCORES.items()
        }
        for name, given_N2 in chances.items()
    }


def _own_rates(pipeline: Pipeline) -> NDArray[np.float64]:
    """Return (J, 2): each item's rates of clicks and conversions, drawn to the mean by 20 impressions of it."""
    counts, prior = pipeline.counts, 20.0
    shown_J = np.array(counts.shown, dtype=np.float64)
    happened_J2 = np.array([counts.clicked, counts.converted], dtype=np.float64).T
    rates: NDArray[np.float64] = (happened_J2 + prior * happened_J2.sum(0) / shown_J.sum()) / (shown_J + prior)[:, None]
    return rates


Compute = Callable[[Any, Any], float | None]
_SCORES: dict[str, Compute] = {"auc": auc, "pr_auc": average_precision, "log_loss": log_loss}


def _with_interval(
    compute: Compute, truth_N: NDArray[np.bool_], chance_N: NDArray[np.float64], users: Sequence[str]
) -> Score:
    def of_rows(rows: NDArray[np.int64]) -> float | None:
        return compute(truth_N[rows], chance_N[rows])

    interval = statistic_interval(of_rows, len(users), groups=users, resamples=_RESAMPLES)
    return {"value": compute(truth_N, chance_N), "interval": ends(interval)}
