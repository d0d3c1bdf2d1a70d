"""Order a list: candidates by number, the likeliest first. Works without training: the prompt says all there is to do.

Source: LLMRank (arXiv:2305.08845), zero-shot list-wise reranking with history and candidates in the prompt. Numbers
instead of names in the answer are ours.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_ads.data.rows import ChatRow, Fact
from megatron_ads.metrics.ranking import ndcg_at, recall_at, reciprocal_rank
from megatron_ads.tasks.advertiser_question import CANDIDATES, AdvertiserQuestion, candidate_lines, candidates_of
from megatron_ads.tasks.answer_format import ReadFailure, element, read_only, render_reasoned, split_reasoning
from megatron_ads.tasks.ground_truth import Metrics, ground_truth, readable, share, truth_facts
from megatron_ads.tasks.prompts import Template, single_turn

TASK = "list_ranking"
TEMPLATE = Template(
    task=TASK,
    version=1,
    paraphrases=(
        "Order the candidates by how likely the user is to buy from them next.",
        "Rank these advertisers for the user, the likeliest next purchase first.",
    ),
    answer_form="Answer with all numbers, the likeliest first: <Ranking>2, 3, 1</Ranking>.",
)


@dataclass(frozen=True, slots=True)
class Order:
    """An answer that could be read; whether it names all candidates is for the metrics to judge."""

    numbers: tuple[int, ...]
    """Candidates from 1, the likeliest first."""
    reasoning: str


def chat_row(question: AdvertiserQuestion, *, count: int = CANDIDATES) -> ChatRow:
    """Return one example. Its target has the true advertiser first and the others as listed: nothing orders them.

    Raises:
        DataError: If the question's pool has too few others.
    """
    listed = candidates_of(question.row_id, question.advertiser, question.pool, count)
    numbered = [f"{number}. {name}" for number, name in enumerate(listed, 1)]
    prompt = "\n".join([TEMPLATE.instruction_of(question.row_id), question.history, *candidate_lines(numbered)])
    best = listed.index(question.advertiser) + 1
    numbers = [best, *(number for number in range(1, count + 1) if number != best)]
    target = render_reasoned(question.reasoning, element("Ranking", ", ".join(map(str, numbers))))
    truth = truth_facts(Order(tuple(numbers), question.reasoning))
    facts = {**question.facts, Fact.candidates: list(listed), **truth}
    return single_turn(question.row_id, TASK, prompt, target, facts=facts, group=question.group, label=str(best))


def parse(text: str, *, reasoning_required: bool = False) -> Order | ReadFailure:
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


def metrics(rows: Sequence[ChatRow], answers: Sequence[Order | ReadFailure]) -> Metrics:
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
