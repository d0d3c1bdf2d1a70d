"""Variants of the next-advertiser question that show candidates: choose from twenty, or put a list in order.

A variant is made of a row that asks for the name. Other candidates are drawn by the row's id, and their order is as
well.

Source of the choice: S-DPO (arXiv:2406.09215), which trains and tests on 20 candidates; the 19 others are its
negatives. Source of the order: LLMRank (arXiv:2305.08845), zero-shot list-wise reranking with history and candidates in
the prompt: it says all there is to do, so it works without training. Numbers instead of names in the answer are ours.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from megatron_ads.errors import DataError
from megatron_ads.metrics.ranking import ndcg_at, recall_at, reciprocal_rank, same_name
from megatron_ads.rows import ChatRow, Fact, Facts
from megatron_ads.stable_random import stable_random
from megatron_ads.tasks.answer_format import ReadFailure, element, read_only, render_reasoned, split_reasoning
from megatron_ads.tasks.ground_truth import Metrics, ground_truth, readable, share, truth_facts
from megatron_ads.tasks.next_advertiser import Prediction, render_target
from megatron_ads.tasks.prompts import LABELS, Template, single_turn
from megatron_ads.tasks.user_history import render_history, shown_history

CANDIDATES = 20
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


@dataclass(frozen=True, kw_only=True, slots=True)
class AdvertiserQuestion:
    """One user, the advertiser who came next, and others who could have."""

    row_id: str
    history: str
    """What a prompt shows of the user."""
    facts: Facts
    """What is known of the user."""
    advertiser: str
    pool: tuple[str, ...]
    """Where other candidates come from; may hold the true one."""
    group: str
    """The user."""
    reasoning: str = ""


def question_of(row: ChatRow, row_id: str, pool: Sequence[str]) -> AdvertiserQuestion:
    """Return the question of a row that asks for the name.

    Raises:
        DataError: If the row's facts do not tell it.
    """
    require_own_form(row)
    truth = ground_truth(row, Prediction)
    left_out = {Fact.pool, Fact.best_answers}
    return AdvertiserQuestion(
        row_id=row_id,
        history=render_history(shown_history(row)),
        facts={name: value for name, value in row.facts.items() if name not in left_out},
        advertiser=truth.advertiser,
        pool=tuple(pool),
        group=row.group,
        reasoning=truth.reasoning,
    )


def require_own_form(row: ChatRow) -> None:
    """Refuse a row whose prompt is a text in a form of its own: nothing says what of it another question may show.

    Raises:
        DataError: If it is.
    """
    if Fact.text in row.facts:
        raise DataError(
            f"row {row.id!r} begins with {row.prompt[-1].content!r:.60}, and its facts do not say what it shows; a "
            f"variant asks anew, so it is made from rows with facts or with a prompt of {row.task}."
        )


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
    others = [name for name in dict.fromkeys(pool) if name != truth]
    if len(others) < count - 1:
        raise DataError(f"the pool has {len(others)} others than {truth!r}; {count - 1} are needed to choose from.")
    draw = stable_random(row_id)
    chosen = [truth, *draw.sample(others, count - 1)]
    draw.shuffle(chosen)
    return tuple(chosen)


def candidate_lines(names: Iterable[str]) -> list[str]:
    """Return the lines of a prompt that list candidates."""
    return [f"{LABELS[Fact.candidates]}:", *names]


def choose_one_row(question: AdvertiserQuestion, *, count: int = CANDIDATES) -> ChatRow:
    """Return one example; the others are drawn from the question's pool.

    Raises:
        DataError: If the pool has too few others.
    """
    listed = candidates_of(question.row_id, question.advertiser, question.pool, count)
    lines = [CHOOSE_ONE_TEMPLATE.instruction_of(question.row_id), question.history, *candidate_lines(listed)]
    target = render_target(question.advertiser, question.reasoning)
    truth = truth_facts(Prediction(question.advertiser, question.reasoning))
    return single_turn(
        question.row_id,
        CHOOSE_ONE,
        "\n".join(lines),
        target,
        facts={**question.facts, Fact.candidates: list(listed), **truth},
        group=question.group,
        label=question.advertiser,
    )


def choose_one_metrics(rows: Sequence[ChatRow], answers: Sequence[Prediction | ReadFailure]) -> Metrics:
    """Return how often the choice is right, and how often it is one of the list; unreadable answers are neither.

    A row that says no candidates, such as one in words of its own, does not count in the second.
    """
    truths = [same_name(ground_truth(row, Prediction).advertiser) for row in rows]
    given = [readable(answer) for answer in answers]
    names = [same_name(answer.advertiser) if answer else None for answer in given]
    listed = [
        (name, {same_name(candidate) for candidate in row.list_fact(Fact.candidates)})
        for name, row in zip(names, rows, strict=True)
        if Fact.candidates in row.facts
    ]
    return {
        "hit_rate@1": share([truth == name for truth, name in zip(truths, names, strict=True)]),
        "valid_rate": share([name in shown for name, shown in listed]),
    }


@dataclass(frozen=True, slots=True)
class Order:
    """An answer that could be read; whether it names all candidates is for the metrics to judge."""

    numbers: tuple[int, ...]
    """Candidates from 1, the likeliest first."""
    reasoning: str


def list_ranking_row(question: AdvertiserQuestion, *, count: int = CANDIDATES) -> ChatRow:
    """Return one example. Its target has the true advertiser first and the others as listed: nothing orders them.

    Raises:
        DataError: If the question's pool has too few others.
    """
    listed = candidates_of(question.row_id, question.advertiser, question.pool, count)
    numbered = [f"{number}. {name}" for number, name in enumerate(listed, 1)]
    prompt = "\n".join(
        [LIST_RANKING_TEMPLATE.instruction_of(question.row_id), question.history, *candidate_lines(numbered)]
    )
    best = listed.index(question.advertiser) + 1
    numbers = [best, *(number for number in range(1, count + 1) if number != best)]
    target = render_reasoned(question.reasoning, element("Ranking", ", ".join(map(str, numbers))))
    truth = truth_facts(Order(tuple(numbers), question.reasoning))
    facts = {**question.facts, Fact.candidates: list(listed), **truth}
    return single_turn(
        question.row_id, LIST_RANKING, prompt, target, facts=facts, group=question.group, label=str(best)
    )


def parse_order(text: str, *, reasoning_required: bool = False) -> Order | ReadFailure:
    """Read an answer strictly: reasoning, which may be missing, one list of different numbers, nothing else."""
    parts = split_reasoning(text, required=reasoning_required)
    if isinstance(parts, ReadFailure):
        return parts
    ranking = read_only(
        "Ranking", parts.answer, ReadFailure.no_ranking, ReadFailure.several_rankings, ReadFailure.text_around_ranking
    )
    if isinstance(ranking, ReadFailure):
        return ranking
    words = [word.strip() for word in ranking.split(",")]
    if not all(word.isascii() and word.isdigit() and len(word) <= 4 and int(word) > 0 for word in words):
        return ReadFailure.not_numbers
    numbers = tuple(int(word) for word in words)
    return Order(numbers, parts.reasoning) if len(set(numbers)) == len(numbers) else ReadFailure.repeated_number


def list_ranking_metrics(rows: Sequence[ChatRow], answers: Sequence[Order | ReadFailure]) -> Metrics:
    """Return where the true candidate stands; what an answer leaves out, or all of an unreadable one, is not found.

    complete_rate is the share of answers that order exactly the candidates shown.
    """
    truths = [ground_truth(row, Order).numbers for row in rows]
    given = [readable(answer) for answer in answers]
    positions = [
        answer.numbers.index(truth[0]) + 1 if answer and truth[0] in answer.numbers else None
        for truth, answer in zip(truths, given, strict=True)
    ]
    complete = [
        answer is not None and set(answer.numbers) == set(truth) for truth, answer in zip(truths, given, strict=True)
    ]
    return {
        "hit_rate@1": recall_at(positions, 1),
        "hit_rate@5": recall_at(positions, 5),
        "ndcg@5": ndcg_at(positions, 5),
        "mrr": reciprocal_rank(positions),
        "complete_rate": share(complete),
    }
