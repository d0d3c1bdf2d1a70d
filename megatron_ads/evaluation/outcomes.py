"""What became of each answer: read or not, right or wrong, and how sure the model was of it."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from megatron_ads.evaluation.answer_records import Answer
from megatron_ads.metrics.perplexity import MAX_EXPONENT
from megatron_ads.metrics.ranking import same_name
from megatron_ads.tasks.registry import task_named

NOT_READ = "not read"


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """One answer, judged by itself."""

    answer: Answer
    given: str | None
    """The label that was read; None: nothing could be read, or the task has no labels."""
    failure: str | None
    """Why nothing could be read; None: it could."""
    right: bool | None
    """None: the task has no labels."""
    probability: float | None
    """Share of the answer among the probabilities of its beams; None without beams."""


def judge(answers: Sequence[Answer], *, reasons: bool = True) -> list[Outcome]:
    """Return the outcome of each answer to a row of one task; without ``reasons`` none needs reasoning."""
    task = task_named(answers[0].row.task)
    outcomes = []
    for answer in answers:
        read = task.parse(answer.text, reasoning_required=task.reasons and reasons)
        failed = isinstance(read, StrEnum)
        label = answer.row.label if task.label_of else None
        given = task.label_of(read) if task.label_of and not failed else None
        outcomes.append(
            Outcome(
                answer=answer,
                given=given,
                failure=str(read) if failed else None,
                right=None if label is None else given is not None and same_name(given) == same_name(label),
                probability=_share_of_best(answer),
            )
        )
    return outcomes


def confusion(outcomes: Sequence[Outcome]) -> tuple[list[str], list[str], Counter[tuple[str, str]]]:
    """Return the true labels, the given labels and how often each pair occurs; what was not read is a label too."""
    pairs = Counter(
        (one.answer.row.label or "", one.given if one.given is not None else NOT_READ)
        for one in outcomes
        if one.right is not None
    )
    truths = sorted({truth for truth, _ in pairs})
    others = sorted({given for _, given in pairs} - {*truths, NOT_READ})
    unread = [NOT_READ] if any(given == NOT_READ for _, given in pairs) else []
    return truths, [*truths, *others, *unread], pairs


def samples(outcomes: Sequence[Outcome], most: int) -> list[tuple[str, int, list[Outcome]]]:
    """Return, for every way to fail, its name, how often it occurs and the first ``most``; frequent ones first."""
    kinds: dict[str, list[Outcome]] = {}
    for one in outcomes:
        if one.failure is not None:
            kinds.setdefault(f"{NOT_READ}: {one.failure}", []).append(one)
        elif one.right is False:
            kinds.setdefault("read, and wrong", []).append(one)
    return [
        (kind, len(of_kind), of_kind[:most]) for kind, of_kind in sorted(kinds.items(), key=lambda kind: -len(kind[1]))
    ]


def _share_of_best(answer: Answer) -> float | None:
    if len(answer.beams) < 2:
        return None
    best = answer.beams[0].log_probability
    return 1 / math.fsum(math.exp(min(beam.log_probability - best, MAX_EXPONENT)) for beam in answer.beams)
