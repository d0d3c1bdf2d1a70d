"""Variants: the records of rows asked another way, with the same truth; yes or no among them.

Source: P5 (arXiv:2203.13366) and InstructRec (arXiv:2305.07001), which tune on many instructions over the same records
to do better under new ones: ``several_forms`` draws the question by the row's id, so a corpus holds all of them.

Yes or no asks whether something would be liked, over the records of relevance and of the next advertiser. Source:
TALLRec (arXiv:2305.00447), which asks whether a user will enjoy the next item. Where a grade becomes a yes is ours: an
ad that is not bad for a query, a score of 2 or 3 for a user.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from megatron_ads.config.data import RowVariant
from megatron_ads.errors import DataError
from megatron_ads.metrics.classification import DefectView, binary_metrics
from megatron_ads.rows import ChatRow, Fact, Facts
from megatron_ads.tasks import ad_user_relevance, next_advertiser, relevance
from megatron_ads.tasks.advertiser_question import (
    CHOOSE_ONE,
    LIST_RANKING,
    AdvertiserQuestion,
    candidates_of,
    choose_one_row,
    list_ranking_row,
    question_of,
    require_own_form,
)
from megatron_ads.tasks.answer_format import ReadFailure, element, read_choice, read_only, strict_parser
from megatron_ads.tasks.ground_truth import Metrics, ground_truth, judged
from megatron_ads.tasks.prompts import Template, ad_of, example, filled, line
from megatron_ads.tasks.user_history import render_history, shown_history

YES_NO = "yes_no"


class YesNo(StrEnum):
    """The two answers."""

    no = "No"
    yes = "Yes"


NO_VIEW = DefectView("no", frozenset({YesNo.no}))
_YES_NO_FORM = "Answer with <Answer>Yes</Answer> or <Answer>No</Answer>."
QUERY_AD = Template(
    task=f"{YES_NO}/query_ad",
    version=1,
    paraphrases=("Does the ad serve the query?", "Would the ad help the person who typed the query?"),
    answer_form=_YES_NO_FORM,
)
AD_USER = Template(
    task=f"{YES_NO}/ad_user",
    version=1,
    paraphrases=("Will this user like the ad?", "Given what the user did, is the ad of interest to them?"),
    answer_form=_YES_NO_FORM,
)
ADVERTISER = Template(
    task=f"{YES_NO}/advertiser",
    version=1,
    paraphrases=("Will this user buy from the advertiser next?", "Is this advertiser the user's next?"),
    answer_form=_YES_NO_FORM,
)
GOOD_SCORES = frozenset({ad_user_relevance.Score.relevant, ad_user_relevance.Score.high})


@dataclass(frozen=True, slots=True)
class YesNoAnswer:
    """An answer that could be read."""

    answer: YesNo
    reasoning: str


def query_ad_row(row: ChatRow, row_id: str) -> ChatRow:
    """Return the question whether an ad serves a query, from a row that asks how well."""
    require_own_form(row)
    truth = ground_truth(row, relevance.RelevanceJudgement)
    shown = relevance.lines_of(row.text_fact(Fact.query), ad_of(row.object_fact(Fact.ad)))
    answer = YesNo.no if truth.label in relevance.BAD_VIEW.defects else YesNo.yes
    return _yes_no_row(row_id, QUERY_AD, shown, YesNoAnswer(answer, truth.reasoning), row.group, row.facts)


def ad_user_row(row: ChatRow, row_id: str) -> ChatRow:
    """Return the question whether an ad interests a user, from a row that asks how much."""
    require_own_form(row)
    truth = ground_truth(row, ad_user_relevance.UserRelevanceJudgement)
    shown = [render_history(shown_history(row)), *ad_of(row.object_fact(Fact.ad)).lines()]
    answer = YesNo.yes if truth.score in GOOD_SCORES else YesNo.no
    return _yes_no_row(row_id, AD_USER, shown, YesNoAnswer(answer, truth.reasoning), row.group, row.facts)


def advertiser_row(question: AdvertiserQuestion) -> ChatRow:
    """Return the question whether an advertiser is the next: half of the rows, drawn by id, ask about another.

    A no has no reasoning: that of the question argues for the true one.
    """
    asked = candidates_of(question.row_id, question.advertiser, question.pool, 2)[0]
    shown = [question.history, line(Fact.advertiser, asked)]
    is_next = asked == question.advertiser
    truth = YesNoAnswer(YesNo.yes, question.reasoning) if is_next else YesNoAnswer(YesNo.no, "")
    facts = {**question.facts, Fact.advertiser: asked}
    return _yes_no_row(question.row_id, ADVERTISER, shown, truth, question.group, facts)


def _yes_no_row(
    row_id: str, template: Template, shown: Sequence[str], truth: YesNoAnswer, group: str, facts: Facts
) -> ChatRow:
    facts = {name: value for name, value in facts.items() if name != Fact.best_answers}
    answer = element("Answer", truth.answer)
    return example(row_id, template, shown, truth, answer, facts=facts, group=group, label=truth.answer, task=YES_NO)


@strict_parser(reasons=False)
def parse_yes_no(answer: str, reasoning: str) -> YesNoAnswer:
    """Read one answer, and nothing else."""
    return YesNoAnswer(read_choice(read_only("Answer", answer), YesNo, ReadFailure.unknown_answer), reasoning)


def yes_no_metrics(rows: Sequence[ChatRow], answers: Sequence[YesNoAnswer | ReadFailure]) -> Metrics:
    """Return the binary metrics, yes being the positive class. For an AUC see ``metrics.classification``."""
    pairs = judged(rows, answers, YesNoAnswer)
    given = [answer.answer if answer else None for _, answer in pairs]
    return binary_metrics([truth.answer for truth, _ in pairs], given, NO_VIEW)


def name_row(question: AdvertiserQuestion) -> ChatRow:
    """Return the question for the name."""
    return example(
        question.row_id,
        next_advertiser.TEMPLATE,
        [question.history],
        next_advertiser.Prediction(question.advertiser, question.reasoning),
        filled("the advertiser", question.advertiser),
        facts=question.facts,
        group=question.group,
        label=question.advertiser,
    )


FORMS: dict[str, Callable[[AdvertiserQuestion], ChatRow]] = {
    next_advertiser.TASK: name_row,
    YES_NO: advertiser_row,
    CHOOSE_ONE: choose_one_row,
    LIST_RANKING: list_ranking_row,
}
_DRAW = Template(task="several_forms", version=1, paraphrases=tuple(FORMS))


def several_forms_row(question: AdvertiserQuestion) -> ChatRow:
    """Return one example in the form that its id gives; the row's task is that of the form."""
    return tuple(FORMS.values())[_DRAW.wording_of(question.row_id)](question)


def ask_as(rows: Sequence[ChatRow], variant: RowVariant) -> list[ChatRow]:
    """Return every row asked as ``variant``; ids get the variant's name, so that both can be in one corpus.

    Other candidates are the true advertisers of the other rows.

    Raises:
        DataError: If a row is of a task that the variant does not apply to, not in its task's own form, or there are
            too few advertisers to choose from.
    """
    pool = sorted({row.label for row in rows if row.task == next_advertiser.TASK and row.label})
    asked = [_ask(row, variant, pool) for row in rows]
    return [
        replace(row, id=new.id, task=new.task, messages=new.messages, label=new.label, facts=new.facts)
        for row, new in zip(rows, asked, strict=True)
    ]


def _ask(row: ChatRow, variant: RowVariant, pool: Sequence[str]) -> ChatRow:
    row_id = f"{row.id}/{variant}"
    if row.task == next_advertiser.TASK:
        form = several_forms_row if variant is RowVariant.several_forms else FORMS[variant]
        return form(question_of(row, row_id, pool))
    if variant is RowVariant.yes_no and row.task == relevance.TASK:
        return query_ad_row(row, row_id)
    if variant is RowVariant.yes_no and row.task == ad_user_relevance.TASK:
        return ad_user_row(row, row_id)
    raise DataError(f"row {row.id!r} is of task {row.task}, which cannot be asked as {variant}.")
