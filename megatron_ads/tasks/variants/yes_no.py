"""Yes or no: would this be liked? Over the records of relevance and of the next advertiser.

Source: TALLRec (arXiv:2305.00447), which asks whether a user will enjoy the next item. Where a grade becomes a yes is
ours: an ad that is not bad for a query, a score of 2 or 3 for a user.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from megatron_ads.data.rows import ChatRow
from megatron_ads.metrics.classification import DefectView, binary_metrics
from megatron_ads.tasks import ad_user_relevance, relevance
from megatron_ads.tasks.conversation import single_turn
from megatron_ads.tasks.elements import element, read_only
from megatron_ads.tasks.prompt_templates import Template
from megatron_ads.tasks.reasoning import ReasoningFailure, render_reasoned, split_reasoning
from megatron_ads.tasks.truths import Metrics, readable, truth_of
from megatron_ads.tasks.variants.advertiser_question import AdvertiserQuestion
from megatron_ads.tasks.variants.candidates import candidates_of
from megatron_ads.tasks.variants.context import context_of

TASK = "yes_no"


class Answer(StrEnum):
    """The two answers."""

    no = "No"
    yes = "Yes"


NO_VIEW = DefectView("no", frozenset({Answer.no}))
_FORM = "Answer with <Answer>Yes</Answer> or <Answer>No</Answer>."
QUERY_AD = Template(
    task=f"{TASK}/query_ad",
    version=1,
    paraphrases=("Does the ad serve the query?", "Would the ad help the person who typed the query?"),
    answer_form=_FORM,
)
AD_USER = Template(
    task=f"{TASK}/ad_user",
    version=1,
    paraphrases=("Will this user like the ad?", "Given what the user did, is the ad of interest to them?"),
    answer_form=_FORM,
)
ADVERTISER = Template(
    task=f"{TASK}/advertiser",
    version=1,
    paraphrases=("Will this user buy from the advertiser next?", "Is this advertiser the user's next?"),
    answer_form=_FORM,
)
GOOD_SCORES = frozenset({ad_user_relevance.Score.relevant, ad_user_relevance.Score.high})


class Failure(StrEnum):
    """Why an answer cannot be read; the first that applies is reported."""

    empty = "empty"
    no_reasoning = "no_reasoning"
    unclosed_reasoning = "unclosed_reasoning"
    no_answer = "no_answer"
    several_answers = "several_answers"
    unknown_answer = "unknown_answer"
    text_around_answer = "text_around_answer"


@dataclass(frozen=True, slots=True)
class Judgement:
    """An answer that could be read."""

    answer: Answer
    reasoning: str


def query_ad_row(row: ChatRow, row_id: str) -> ChatRow:
    """Return the question whether an ad serves a query, from a row that asks how well.

    Raises:
        DataError: If the row is not of that task or not in its templates' form.
    """
    context = context_of(row, relevance.TASK, (relevance.TEMPLATE, relevance.THREE_LABELS_TEMPLATE))
    truth = truth_of(row, relevance.parse)
    prompt = f"{QUERY_AD.instruction_of(row_id)}\n{context}"
    return _row(row_id, prompt, truth.label not in relevance.BAD_VIEW.defects, truth.reasoning, row.group)


def ad_user_row(row: ChatRow, row_id: str) -> ChatRow:
    """Return the question whether an ad interests a user, from a row that asks how much.

    Raises:
        DataError: If the row is not of that task or not in its template's form.
    """
    context = context_of(row, ad_user_relevance.TASK, (ad_user_relevance.TEMPLATE,))
    truth = truth_of(row, ad_user_relevance.parse)
    prompt = f"{AD_USER.instruction_of(row_id)}\n{context}"
    return _row(row_id, prompt, truth.score in GOOD_SCORES, truth.reasoning, row.group)


def advertiser_row(question: AdvertiserQuestion) -> ChatRow:
    """Return the question whether an advertiser is the next: half of the rows, drawn by id, ask about another.

    A no has no reasoning: that of the question argues for the true one.

    Raises:
        DataError: If the question's pool has no other.
    """
    asked = candidates_of(question.row_id, question.advertiser, question.pool, 2)[0]
    prompt = f"{ADVERTISER.instruction_of(question.row_id)}\n{question.context}\nAdvertiser: {asked}"
    is_next = asked == question.advertiser
    return _row(question.row_id, prompt, is_next, question.reasoning if is_next else "", question.group)


def _row(row_id: str, prompt: str, yes: bool, reasoning: str, group: str) -> ChatRow:
    answer = Answer.yes if yes else Answer.no
    target = render_reasoned(reasoning, element("Answer", answer))
    return single_turn(row_id, TASK, prompt, target, group=group, label=answer)


def parse(text: str, *, reasoning_required: bool = False) -> Judgement | Failure:
    """Read an answer strictly: reasoning, which may be missing, then one answer, and nothing else."""
    parts = split_reasoning(text, required=reasoning_required)
    if isinstance(parts, ReasoningFailure):
        return Failure(parts.value)
    answer = read_only("Answer", parts.answer, Failure.no_answer, Failure.several_answers, Failure.text_around_answer)
    if isinstance(answer, Failure):
        return answer
    return Judgement(Answer(answer), parts.reasoning) if answer in set(Answer) else Failure.unknown_answer


def metrics(rows: Sequence[ChatRow], answers: Sequence[Judgement | Failure]) -> Metrics:
    """Return the binary metrics, yes being the positive class. For an AUC see ``metrics.probabilities``."""
    truths = [truth_of(row, parse).answer for row in rows]
    given = [readable(answer) for answer in answers]
    return {**binary_metrics(truths, [answer.answer if answer else None for answer in given], NO_VIEW).as_dict()}
