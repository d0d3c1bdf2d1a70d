"""Every task by name, with what all of them have: templates, a strict parser, metrics, one of which leads."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from enum import StrEnum
from typing import Any

from megatron_ads.errors import DataError
from megatron_ads.metrics.text import format_rates
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
from megatron_ads.tasks.answer_format import Parser, ReadFailure, Reasoned, split_reasoning
from megatron_ads.tasks.ground_truth import Metrics
from megatron_ads.tasks.prompts import Template


class Scoring(StrEnum):
    """What an evaluation reports of a task."""

    metrics = "metrics"
    """The task's metrics, as of every task but those with ``labels``."""
    labels = "labels"
    """The papers' binary views of every label, with baselines, in a form of its own."""
    user_views = "user_views"
    """One binary view, with baselines."""
    queries = "queries"
    """How good generated queries are."""
    rankings = "rankings"
    """Rankings of names, with baselines."""
    replacement = "replacement"
    """Whether one system may replace another."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """One task."""

    name: str
    summary: str
    templates: tuple[Template, ...]
    parse: Parser[Any]
    answer: type[Any]
    """The record that ``parse`` returns."""
    metrics: Callable[[Sequence[ChatRow], Sequence[Any]], Metrics]
    """Takes rows and what ``parse`` made of the answers to them."""
    label_of: Callable[[Any], str] | None = None
    """The label of an answer that was read; None: a row's label, if any, is not part of its target."""
    label_in: str | None = None
    """Name of the element that the label stands in, at its beginning; None: at that of the answer, if there is one."""
    headline: tuple[str, ...]
    """Metric in [0, 1] that stands for the task, as in adaptive task weights; the first that is defined."""
    reasons: bool = True
    """An answer must reason where its row's target does; False: none need, as names that beams write never do."""
    scoring: Scoring = Scoring.metrics


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskScores:
    """How a model did on rows of one task."""

    task: str
    rows: int
    readable_share: float
    failures: dict[str, int]
    """Answers that could not be read, by reason, the most frequent first."""
    formats: Metrics
    metrics: Metrics
    headline: float | None
    headline_name: str | None


TASKS = {
    task.name: task
    for task in (
        Task(
            name=relevance.TASK,
            summary="how well an ad answers a query: bad, fair or good, with place and quality",
            templates=(relevance.TEMPLATE, relevance.THREE_LABELS_TEMPLATE),
            parse=relevance.parse,
            answer=relevance.RelevanceJudgement,
            scoring=Scoring.labels,
            metrics=relevance.metrics,
            label_of=lambda answer: str(answer.label),
            label_in="Label",
            headline=("bad/balanced_accuracy", "accuracy"),
        ),
        Task(
            name=ad_user_relevance.TASK,
            summary="how well an ad fits what a user did, from 0 to 3",
            templates=(ad_user_relevance.TEMPLATE,),
            parse=ad_user_relevance.parse,
            answer=ad_user_relevance.UserRelevanceJudgement,
            scoring=Scoring.user_views,
            metrics=ad_user_relevance.metrics,
            label_of=lambda answer: str(answer.score),
            label_in="Score",
            headline=("bad/balanced_accuracy", "accuracy"),
        ),
        Task(
            name=query_generation.TASK,
            summary="queries narrower than a keyword, each with its reason",
            templates=(query_generation.TEMPLATE,),
            parse=query_generation.parse,
            answer=query_generation.Queries,
            scoring=Scoring.queries,
            metrics=query_generation.metrics,
            headline=("follow_rules",),
        ),
        Task(
            name=next_advertiser.TASK,
            summary="whom a user buys from next: one name",
            templates=(next_advertiser.TEMPLATE,),
            parse=next_advertiser.parse,
            answer=next_advertiser.Prediction,
            scoring=Scoring.rankings,
            metrics=next_advertiser.metrics,
            label_of=lambda answer: answer.advertiser,
            headline=("recall@1",),
            reasons=False,
        ),
        Task(
            name=next_advertiser.RANKING_TASK,
            summary="whom a user buys from next: 20 ranked, with 5 interests, in XML",
            templates=(next_advertiser.RANKING_TEMPLATE,),
            parse=next_advertiser.parse_ranking,
            answer=next_advertiser.Ranking,
            scoring=Scoring.rankings,
            metrics=next_advertiser.ranking_metrics,
            headline=("recall@5",),
            reasons=False,
        ),
        Task(
            name=user_profile.TASK,
            summary="interests, intents, constraints and what to avoid, from what a user did",
            templates=(user_profile.TEMPLATE,),
            parse=user_profile.parse,
            answer=user_profile.Profile,
            metrics=user_profile.metrics,
            headline=("interests/f1",),
        ),
        Task(
            name=model_comparison.TASK,
            summary="strengths, weaknesses, risk and verdict of a new system's output",
            templates=(model_comparison.TEMPLATE,),
            parse=model_comparison.parse,
            answer=model_comparison.Assessment,
            scoring=Scoring.replacement,
            metrics=model_comparison.metrics,
            label_of=lambda answer: str(answer.verdict),
            label_in="Verdict",
            headline=("verdict/macro_recall",),
        ),
        Task(
            name=ad_rewriting.TASK,
            summary="an ad reworded towards a goal, and further keywords",
            templates=(ad_rewriting.TEMPLATE,),
            parse=ad_rewriting.parse,
            answer=ad_rewriting.Rewrite,
            metrics=ad_rewriting.metrics,
            headline=("quality",),
        ),
        Task(
            name=variants.YES_NO,
            summary="variant: would it be liked, yes or no",
            templates=(variants.QUERY_AD, variants.AD_USER, variants.ADVERTISER),
            parse=variants.parse_yes_no,
            answer=variants.YesNoAnswer,
            metrics=variants.yes_no_metrics,
            label_of=lambda answer: str(answer.answer),
            label_in="Answer",
            headline=("balanced_accuracy", "accuracy"),
            reasons=False,
        ),
        Task(
            name=advertiser_question.CHOOSE_ONE,
            summary="variant: the next advertiser out of 20",
            templates=(advertiser_question.CHOOSE_ONE_TEMPLATE,),
            parse=next_advertiser.parse,
            answer=next_advertiser.Prediction,
            metrics=advertiser_question.choose_one_metrics,
            label_of=lambda answer: answer.advertiser,
            headline=("hit_rate@1",),
            reasons=False,
        ),
        Task(
            name=advertiser_question.LIST_RANKING,
            summary="variant: 20 candidates put in order",
            templates=(advertiser_question.LIST_RANKING_TEMPLATE,),
            parse=advertiser_question.parse_order,
            answer=advertiser_question.Order,
            metrics=advertiser_question.list_ranking_metrics,
            label_of=lambda answer: str(answer.numbers[0]),
            label_in="Ranking",
            headline=("ndcg@5",),
            reasons=False,
        ),
        Task(
            name=next_item.TASK,
            summary="variant: the next item, by its semantic ID",
            templates=(next_item.TEMPLATE,),
            parse=next_item.parse,
            answer=next_item.ItemPrediction,
            scoring=Scoring.rankings,
            metrics=next_item.metrics,
            label_of=lambda answer: answer.semantic_id,
            headline=("recall@1",),
            reasons=False,
        ),
    )
}


def task_named(name: str) -> Task:
    """Return a task.

    Raises:
        DataError: If there is none of that name; the nearest is offered.
    """
    if name in TASKS:
        return TASKS[name]
    near = get_close_matches(name, TASKS, n=1)
    offer = f"Did you mean {near[0]}?" if near else f"Known: {', '.join(TASKS)}."
    raise DataError(f"there is no task {name!r}. {offer}")


def reasoning_required(row: ChatRow) -> bool:
    """Return whether an answer to a row must reason: in a task that reasons, exactly where the row's target does."""
    target = split_reasoning(row.target, required=False)
    return task_named(row.task).reasons and isinstance(target, Reasoned) and bool(target.reasoning)


def read_answer(row: ChatRow, text: str) -> Any:
    """Return what an answer to a row says, or a ``ReadFailure``: the one rule for answers, and for targets.

    Raises:
        DataError: If the row is of no task of the registry.
    """
    return task_named(row.task).parse(text, reasoning_required=reasoning_required(row))


def score_answers(rows: Sequence[ChatRow], texts: Sequence[str]) -> TaskScores:
    """Parse and score a model's answers to rows of one task.

    Args:
        rows: Their facts hold the true answers.
        texts: One answer a row.

    Raises:
        DataError: If there are no rows, they are of several tasks, or a row says no answer.
    """
    tasks = sorted({row.task for row in rows})
    if len(tasks) != 1:
        raise DataError(f"{len(rows)} rows of the tasks {tasks}; rows of one task are scored together.")
    task = task_named(tasks[0])
    answers = [read_answer(row, text) for row, text in zip(rows, texts, strict=True)]
    failures = Counter(str(answer) for answer in answers if isinstance(answer, ReadFailure))
    found = task.metrics(rows, answers)
    leading = next((name for name in task.headline if found.get(name) is not None), None)
    return TaskScores(
        task=task.name,
        rows=len(rows),
        readable_share=1 - failures.total() / len(rows),
        failures=dict(failures.most_common()),
        formats=format_rates(texts),
        metrics=found,
        headline=found[leading] if leading else None,
        headline_name=leading,
    )
