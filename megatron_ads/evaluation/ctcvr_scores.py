"""How likely users click on and convert with what a model names, by a frozen ranker: Taiji's CTCVR.

The item is the first that an answer names; an answer that cannot be read, or names no item of the pipeline, has 0.
Source: Taiji, table 1 (Preference Hit-Rate); the ranker is that of `megatron-ads downstream train`.
"""

from collections.abc import Sequence
from typing import Any

from megatron_ads.data.split import group_of
from megatron_ads.downstream.pipeline import Pipeline
from megatron_ads.downstream.words import history_of
from megatron_ads.evaluation.answer_records import Answer
from megatron_ads.metrics.intervals import ends, mean_interval
from megatron_ads.metrics.ranking import mean
from megatron_ads.rewards.frozen_pipeline import named_items, names_items, query_of
from megatron_ads.rows import ChatRow


def ctcvr_scores(answers: Sequence[Answer], pipeline: Pipeline) -> dict[str, Any] | None:
    """Return the mean CTCVR as JSON values, that of the true names beside it; None for tasks that name no items."""
    rows = [answer.row for answer in answers]
    if not names_items(rows[0]):
        return None
    values = ctcvr_by_rows(answers, pipeline)
    true = [pipeline.number_of(row.label or "") for row in rows]
    return {
        "model": mean(values),
        "model_95": ends(mean_interval(values, groups=list(map(group_of, rows)))),
        "truth": mean(_chances(rows, true, pipeline)),
        "named_share": mean([bool(named_items(answer.row, answer.text, pipeline)) for answer in answers]),
        "truth_named_share": mean([item is not None for item in true]),
        "pipeline": pipeline.digest,
    }


def ctcvr_by_rows(answers: Sequence[Answer], pipeline: Pipeline) -> list[float]:
    """Return P(click and conversion) of the first item that each answer names."""
    named = [next(iter(named_items(answer.row, answer.text, pipeline)), None) for answer in answers]
    return _chances([answer.row for answer in answers], named, pipeline)


def _chances(rows: Sequence[ChatRow], items: Sequence[int | None], pipeline: Pipeline) -> list[float]:
    known = [(row, item) for row, item in zip(rows, items, strict=True) if item is not None]
    users_NC = pipeline.users([history_of(row) for row, _ in known], [query_of(row) for row, _ in known])
    found = iter(pipeline.chances(users_NC, [item for _, item in known])[:, 1].tolist() if known else ())
    return [0.0 if item is None else next(found) for item in items]
