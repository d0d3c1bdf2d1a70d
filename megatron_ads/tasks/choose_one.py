"""Choose from twenty: the next advertiser out of a list with the true one in it.

Source: S-DPO (arXiv:2406.09215), which trains and tests on 20 candidates; the 19 others are its negatives.
"""

from collections.abc import Sequence

from megatron_ads.data.rows import ChatRow, Fact
from megatron_ads.metrics.ranking import same_name
from megatron_ads.tasks.advertiser_question import CANDIDATES, AdvertiserQuestion, candidate_lines, candidates_of
from megatron_ads.tasks.answer_format import ReadFailure
from megatron_ads.tasks.ground_truth import Metrics, ground_truth, readable, share, truth_facts
from megatron_ads.tasks.next_advertiser import Prediction, parse, render_target
from megatron_ads.tasks.prompts import Template, single_turn

__all__ = ["TASK", "TEMPLATE", "chat_row", "metrics", "parse"]

TASK = "choose_one"
TEMPLATE = Template(
    task=TASK,
    version=1,
    paraphrases=(
        "From which of these candidates will the user buy next?",
        "One of these candidates is the user's next advertiser. Which?",
    ),
    answer_form="Answer with the name alone.",
)


def chat_row(question: AdvertiserQuestion, *, count: int = CANDIDATES) -> ChatRow:
    """Return one example; the others are drawn from the question's pool.

    Raises:
        DataError: If the pool has too few others.
    """
    listed = candidates_of(question.row_id, question.advertiser, question.pool, count)
    lines = [TEMPLATE.instruction_of(question.row_id), question.history, *candidate_lines(listed)]
    target = render_target(question.advertiser, question.reasoning)
    truth = truth_facts(Prediction(question.advertiser, question.reasoning))
    return single_turn(
        question.row_id,
        TASK,
        "\n".join(lines),
        target,
        facts={**question.facts, Fact.candidates: list(listed), **truth},
        group=question.group,
        label=question.advertiser,
    )


def metrics(rows: Sequence[ChatRow], answers: Sequence[Prediction | ReadFailure]) -> Metrics:
    """Return how often the choice is right, and how often it is one of the list; unreadable answers are neither."""
    truths = [same_name(ground_truth(row, Prediction).advertiser) for row in rows]
    given = [readable(answer) for answer in answers]
    names = [same_name(answer.advertiser) if answer else None for answer in given]
    listed = [{same_name(name) for name in row.list_fact(Fact.candidates)} for row in rows]
    return {
        "hit_rate@1": share([truth == name for truth, name in zip(truths, names, strict=True)]),
        "valid_rate": share([name in shown for name, shown in zip(names, listed, strict=True)]),
    }
