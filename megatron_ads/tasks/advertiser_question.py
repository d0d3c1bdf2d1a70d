"""Variants of the next-advertiser question that show candidates: choose from twenty, or put a list in order.

A variant is made of a row that asks for the name. Other candidates are drawn by the row's id, and their order is as
well.

Source of the choice: S-DPO (arXiv:2406.09215), which trains and tests on 20 candidates; the 19 others are its
negatives. Source of the order: LLMRank (arXiv:2305.08845), zero-shot list-wise reranking with history and candidates in
the prompt: it says all there is to do, so it works without training. Numbers instead of names in the answer are ours.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from megatron_ads.errors import DataError
from megatron_ads.metrics.ranking import each_once, mean, ndcg_at, recall_at, reciprocal_rank, same_name
from megatron_ads.rows import ChatRow, Fact, Facts
from megatron_ads.stable_random import stable_random
from megatron_ads.tasks.answer_format import ReadFailure, Unreadable, element, read_only, strict_parser
from megatron_ads.tasks.ground_truth import Metrics, ground_truth, judged
from megatron_ads.tasks.next_advertiser import Prediction
from megatron_ads.tasks.prompts import LABELS, Template, example, filled
from megatron_ads.tasks.user_history import render_history, shown_history

CANDIDATES = 20
_OF_ITS_QUESTION = (Fact.pool, Fact.rejected, Fact.best_answers)
CHOOSE_ONE = "choose_one"
CHOOSE_ONE_TEMPLATE = Template(
    task=CHOOSE_ONE,
    version=1,
    paraphrases=(
        "From which of these candidates will the user buy next?",
        "One of these candidates is the user's next advertiser. Which?",
    ),
    answer_form="Answer with the name alone.",
)
LIST_RANKING = "list_ranking"
LIST_RANKING_TEMPLATE = Template(
    task=LIST_RANKING,
    version=1,
    paraphrases=(
        "Order the candidates by how likely the user is to buy from them next.",
        "Rank these advertisers for the user, the likeliest next purchase first.",
    ),
    answer_form="Answer with all numbers, the likeliest first: <Ranking>2, 3, 1</Ranking>.",
)


def asked_anew(
    row: ChatRow,
    row_id: str,
    template: Template,
    shown: Iterable[str],
    truth: Any,
    answer: str,
    *,
    facts: Facts | None = None,
    label: str,
    task: str = "",
) -> ChatRow:
    """Return another question over the record of ``row``, whose weight, group and time it keeps.

    ``facts`` are added to those of ``row``, without those of its own question alone; for the rest see ``example``.
    """
    known = {name: value for name, value in row.facts.items() if name not in _OF_ITS_QUESTION}
    facts = {**known, **(facts or {})}
    new = example(row_id, template, shown, truth, answer, facts=facts, group=row.group, label=label, task=task)
    return replace(new, weight=row.weight, time=row.time)


def candidates_of(row_id: str, truth: str, pool: Sequence[str], count: int = CANDIDATES) -> tuple[str, ...]:
    """Return ``count`` different names, ``truth`` among them; the others are also the negatives of a preference loss.

    Args:
        row_id: Decides which names are drawn and their order.
        truth: The true one.
        pool: Where the others come from; may hold the true one.
        count: How many, the true one included.

    Raises:
        DataError: If the pool has too few others.
    """
    others = [name for name in each_once(pool) if same_name(name) != same_name(truth)]
    if len(others) < count - 1:
        raise DataError(f"besides {truth!r} the pool has {len(others)}; {count - 1} are needed to choose from.")
    draw = stable_random(row_id)
    chosen = [truth, *draw.sample(others, count - 1)]
    draw.shuffle(chosen)
    return tuple(chosen)


def _listed(names: Iterable[str]) -> list[str]:
    return [f"{LABELS[Fact.candidates]}:", *names]


def choose_one_row(row: ChatRow, row_id: str, pool: Sequence[str], *, count: int = CANDIDATES) -> ChatRow:
    """Return the question which of some candidates is the next, from a row that asks for the name."""
    truth, history = ground_truth(row, Prediction), render_history(shown_history(row))
    candidates = candidates_of(row_id, truth.advertiser, pool, count)
    shown, answer = [history, *_listed(candidates)], filled("the advertiser", truth.advertiser)
    facts: Facts = {Fact.candidates: list(candidates)}
    return asked_anew(row, row_id, CHOOSE_ONE_TEMPLATE, shown, truth, answer, facts=facts, label=truth.advertiser)


def choose_one_metrics(rows: Sequence[ChatRow], answers: Sequence[Prediction | ReadFailure]) -> Metrics:
    """Return how often the choice is right, and how often it is one of the list; unreadable answers are neither.

    A row that says no candidates, such as one in words of its own, does not count in the second.
    """
    truths = [same_name(ground_truth(row, Prediction).advertiser) for row in rows]
    names = [same_name(answer.advertiser) if isinstance(answer, Prediction) else None for answer in answers]
    return {
        "hit_rate@1": mean([truth == name for truth, name in zip(truths, names, strict=True)]),
        "valid_rate": mean(
            [
                name in [same_name(candidate) for candidate in row.list_fact(Fact.candidates)]
                for name, row in zip(names, rows, strict=True)
                if Fact.candidates in row.facts
            ]
        ),
    }


@dataclass(frozen=True, slots=True)
class Order:
    """An answer that could be read; whether it names all candidates is for the metrics to judge."""

    numbers: tuple[int, ...]
    """Candidates from 1, the likeliest first."""
    reasoning: str


def list_ranking_row(row: ChatRow, row_id: str, pool: Sequence[str], *, count: int = CANDIDATES) -> ChatRow:
    """Return the question for an order of candidates, from a row that asks for the name.

    Its target has the true advertiser first and the others as listed: nothing orders them.
    """
    known, history = ground_truth(row, Prediction), render_history(shown_history(row))
    candidates = candidates_of(row_id, known.advertiser, pool, count)
    shown = [history, *_listed(f"{number}. {name}" for number, name in enumerate(candidates, 1))]
    best = candidates.index(known.advertiser) + 1
    truth = Order((best, *(number for number in range(1, count + 1) if number != best)), known.reasoning)
    facts: Facts = {Fact.candidates: list(candidates)}
    answer = element("Ranking", ", ".join(map(str, truth.numbers)))
    return asked_anew(row, row_id, LIST_RANKING_TEMPLATE, shown, truth, answer, facts=facts, label=str(best))


@strict_parser(reasons=False)
def parse_order(answer: str, reasoning: str) -> Order:
    """Read one list of different numbers, and nothing else."""
    words = [word.strip() for word in read_only("Ranking", answer).split(",")]
    if not all(word.isascii() and word.isdigit() and len(word) <= 4 and int(word) > 0 for word in words):
        raise Unreadable(ReadFailure.not_numbers)
    numbers = tuple(map(int, words))
    if len(set(numbers)) < len(numbers):
        raise Unreadable(ReadFailure.repeated_number)
    return Order(numbers, reasoning)


def list_ranking_metrics(rows: Sequence[ChatRow], answers: Sequence[Order | ReadFailure]) -> Metrics:
    """Return where the true candidate stands; what an answer leaves out, or all of an unreadable one, is not found.

    complete_rate is the share of answers that order exactly the candidates shown.
    """
    pairs = judged(rows, answers, Order)
    positions = [
        answer.numbers.index(truth.numbers[0]) + 1 if answer and truth.numbers[0] in answer.numbers else None
        for truth, answer in pairs
    ]
    return {
        "hit_rate@1": recall_at(positions, 1),
        "hit_rate@5": recall_at(positions, 5),
        "ndcg@5": ndcg_at(positions, 5),
        "mrr": reciprocal_rank(positions),
        "complete_rate": mean(
            [answer is not None and set(answer.numbers) == set(truth.numbers) for truth, answer in pairs]
        ),
    }
