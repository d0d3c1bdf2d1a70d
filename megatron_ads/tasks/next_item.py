"""Next item: which item a user acts on next, answered with its semantic ID.

A variant of the rows of the next advertiser whose conversion is of a known item. Beams over the IDs that exist make it
a retriever of items. Source: the advertiser paper, section 3.5, phase 3; TIGER (arXiv:2305.05065); the words are ours.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_ads.metrics.ranking import position_of, recall_at
from megatron_ads.rows import ChatRow, Fact
from megatron_ads.tasks.advertiser_question import asked_anew
from megatron_ads.tasks.answer_format import ReadFailure, Unreadable, strict_parser
from megatron_ads.tasks.ground_truth import Metrics, judged
from megatron_ads.tasks.prompts import Template
from megatron_ads.tasks.semantic_id import is_semantic_id
from megatron_ads.tasks.user_history import render_history, shown_history

TASK = "next_item"
TEMPLATE = Template(
    task=TASK,
    version=1,
    paraphrases=(
        "Which item will this user buy next?",
        "Predict the next item that this user converts with.",
    ),
    answer_form="Answer with its semantic ID alone.",
)


@dataclass(frozen=True, slots=True)
class ItemPrediction:
    """A readable answer."""

    semantic_id: str
    reasoning: str


def next_item_row(row: ChatRow, row_id: str) -> ChatRow:
    """Return the question for the item, from a row that asks for the advertiser and knows the item's ID."""
    truth = ItemPrediction(row.text_fact(Fact.next_semantic_id), "")
    shown = [render_history(shown_history(row))]
    return asked_anew(row, row_id, TEMPLATE, shown, truth, truth.semantic_id, label=truth.semantic_id)


@strict_parser(reasons=False)
def parse(answer: str, reasoning: str) -> ItemPrediction:
    """Read one semantic ID, and nothing else; whether there is such an item is not asked."""
    if not is_semantic_id(answer):
        raise Unreadable(ReadFailure.no_semantic_id)
    return ItemPrediction(answer, reasoning)


def metrics(rows: Sequence[ChatRow], answers: Sequence[ItemPrediction | ReadFailure]) -> Metrics:
    """Return how often the item is the right one."""
    pairs = judged(rows, answers, ItemPrediction)
    given = [[answer.semantic_id] if answer else [] for _, answer in pairs]
    positions = [position_of(truth.semantic_id, said) for (truth, _), said in zip(pairs, given, strict=True)]
    return {"recall@1": recall_at(positions, 1)}
