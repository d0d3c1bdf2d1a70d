"""Variants: the records of rows asked another way, with the same truth; yes or no among them.

Source: P5 (arXiv:2203.13366) and InstructRec (arXiv:2305.07001), which tune on many instructions over the same records
to do better under new ones: ``several_forms`` draws the question by the row's id, so a corpus holds all of them.

Yes or no asks whether something would be liked, over the records of relevance and of the next advertiser. Source:
TALLRec (arXiv:2305.00447), which asks whether a user will enjoy the next item. Where a grade becomes a yes is ours: an
ad that is not bad for a query, a score of 2 or 3 for a user.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from megatron_ads.config.data import RowVariant
from megatron_ads.errors import DataError
from megatron_ads.metrics.classification import DefectView, binary_metrics
from megatron_ads.observability.log import get_logger
from megatron_ads.rows import ChatRow, Fact, Facts
from megatron_ads.tasks import ad_user_relevance, next_advertiser, relevance
from megatron_ads.tasks.advertiser_question import (
    CHOOSE_ONE,
    LIST_RANKING,
    asked_anew,
    candidates_of,
    choose_one_row,
    list_ranking_row,
)
from megatron_ads.tasks.answer_format import ReadFailure, element, read_choice, read_only, strict_parser
from megatron_ads.tasks.ground_truth import Metrics, ground_truth, judged
from megatron_ads.tasks.next_item import next_item_row
from megatron_ads.tasks.prompts import Template, ad_of, filled, line
from megatron_ads.tasks.user_history import render_history, shown_history

logger = get_logger(__name__)

YES_NO = "yes_no"


class YesNo(StrEnum):
    """The two answers."""

    no = "No"
    yes = "Yes"


NO_VIEW = DefectView("no", frozenset({YesNo.no}))


def _yes_no_template(kind: str, *paraphrases: str) -> Template:
    form = "Answer with <Answer>Yes</Answer> or <Answer>No</Answer>."
    return Template(task=f"{YES_NO}/{kind}", version=1, paraphrases=paraphrases, answer_form=form)


QUERY_AD = _yes_no_template(
    "query_ad", "Does the ad serve the query?", "Would the ad help the person who typed the query?"
)
AD_USER = _yes_no_template(
    "ad_user", "Will this user like the ad?", "Given what the user did, is the ad of interest to them?"
)
ADVERTISER = _yes_no_template(
    "advertiser", "Will this user buy from the advertiser next?", "Is this advertiser the user's next?"
)
GOOD_SCORES = frozenset({ad_user_relevance.Score.relevant, ad_user_relevance.Score.high})


@dataclass(frozen=True, slots=True)
class YesNoAnswer:
    """An answer that could be read."""

    answer: YesNo
    reasoning: str


def query_ad_row(row: ChatRow, row_id: str) -> ChatRow:
    """Return the question whether an ad serves a query, from a row that asks how well."""
    truth = ground_truth(row, relevance.RelevanceJudgement)
    shown = relevance.lines_of(row.text_fact(Fact.query), ad_of(row.object_fact(Fact.ad)))
    answer = YesNo.no if truth.label in relevance.BAD_VIEW.defects else YesNo.yes
    return _yes_no_row(row, row_id, QUERY_AD, shown, YesNoAnswer(answer, truth.reasoning))


def ad_user_row(row: ChatRow, row_id: str) -> ChatRow:
    """Return the question whether an ad interests a user, from a row that asks how much."""
    truth = ground_truth(row, ad_user_relevance.UserRelevanceJudgement)
    shown = [render_history(shown_history(row)), *ad_of(row.object_fact(Fact.ad)).lines()]
    answer = YesNo.yes if truth.score in GOOD_SCORES else YesNo.no
    return _yes_no_row(row, row_id, AD_USER, shown, YesNoAnswer(answer, truth.reasoning))


def advertiser_row(row: ChatRow, row_id: str, pool: Sequence[str]) -> ChatRow:
    """Return the question whether an advertiser is the next: half of the rows, drawn by id, ask about another.

    A no has no reasoning: that of the row argues for the true one.
    """
    known, history = ground_truth(row, next_advertiser.Prediction), render_history(shown_history(row))
    asked = candidates_of(row_id, known.advertiser, pool, 2)[0]
    is_next = asked == known.advertiser
    truth = YesNoAnswer(YesNo.yes, known.reasoning) if is_next else YesNoAnswer(YesNo.no, "")
    shown = [history, line(Fact.advertiser, asked)]
    return _yes_no_row(row, row_id, ADVERTISER, shown, truth, {Fact.advertiser: asked})


def _yes_no_row(
    row: ChatRow,
    row_id: str,
    template: Template,
    shown: Sequence[str],
    truth: YesNoAnswer,
    facts: Facts | None = None,
) -> ChatRow:
    answer = element("Answer", truth.answer)
    return asked_anew(row, row_id, template, shown, truth, answer, facts=facts, label=truth.answer, task=YES_NO)


@strict_parser(reasons=False)
def parse_yes_no(answer: str, reasoning: str) -> YesNoAnswer:
    """Read one answer, and nothing else."""
    return YesNoAnswer(read_choice(read_only("Answer", answer), YesNo, ReadFailure.unknown_answer), reasoning)


def yes_no_metrics(rows: Sequence[ChatRow], answers: Sequence[YesNoAnswer | ReadFailure]) -> Metrics:
    """Return the binary metrics, yes being the positive class. For an AUC see ``metrics.classification``."""
    pairs = judged(rows, answers, YesNoAnswer)
    given = [answer.answer if answer else None for _, answer in pairs]
    return binary_metrics([truth.answer for truth, _ in pairs], given, NO_VIEW)


def name_row(row: ChatRow, row_id: str, _: Sequence[str]) -> ChatRow:
    """Return the question for the name."""
    truth, shown = ground_truth(row, next_advertiser.Prediction), [render_history(shown_history(row))]
    answer = filled("the advertiser", truth.advertiser)
    return asked_anew(row, row_id, next_advertiser.TEMPLATE, shown, truth, answer, label=truth.advertiser)


FORMS: dict[str, Callable[[ChatRow, str, Sequence[str]], ChatRow]] = {
    next_advertiser.TASK: name_row,
    YES_NO: advertiser_row,
    CHOOSE_ONE: choose_one_row,
    LIST_RANKING: list_ranking_row,
}
_DRAW = Template(task="several_forms", version=1, paraphrases=tuple(FORMS))


def several_forms_row(row: ChatRow, row_id: str, pool: Sequence[str]) -> ChatRow:
    """Return one example in the form that its id gives; the row's task is that of the form."""
    return tuple(FORMS.values())[_DRAW.wording_of(row_id)](row, row_id, pool)


def ask_as(rows: Sequence[ChatRow], variant: RowVariant) -> list[ChatRow]:
    """Return every row asked as ``variant``; ids get the variant's name, so that both can be in one corpus.

    Other candidates are the true advertisers of the other rows. Rows whose next item has no semantic ID cannot be asked
    for it and are left out; how many is logged.

    Raises:
        DataError: If a row is of a task that the variant does not apply to, not in its task's own form, or there are
            too few advertisers to choose from.
    """
    if variant is RowVariant.next_item:
        return _next_items(rows)
    pool = sorted({row.label for row in rows if row.task == next_advertiser.TASK and row.label})
    return [_ask(row, variant, pool) for row in rows]


def _next_items(rows: Sequence[ChatRow]) -> list[ChatRow]:
    known = [row for row in rows if Fact.next_semantic_id in row.facts]
    if not known:
        raise DataError(
            f"none of {len(rows)} rows says which item with a semantic ID is the next. {RowVariant.next_item} needs "
            "rows of next_advertiser with items, and history.semantic_ids: a folder of `megatron-ads sid`."
        )
    if left_out := len(rows) - len(known):
        logger.warning("%d of %d rows are left out: their next item has no semantic ID", left_out, len(rows))
    return [next_item_row(row, f"{row.id}/{RowVariant.next_item}") for row in known]


def _ask(row: ChatRow, variant: RowVariant, pool: Sequence[str]) -> ChatRow:
    graded = {relevance.TASK: query_ad_row, ad_user_relevance.TASK: ad_user_row}
    is_graded = variant is RowVariant.yes_no and row.task in graded
    if row.task != next_advertiser.TASK and not is_graded:
        raise DataError(f"row {row.id!r} is of task {row.task}, which cannot be asked as {variant}.")
    if Fact.text in row.facts:  # nothing says what of it another question may show
        raise DataError(
            f"row {row.id!r} begins with {row.prompt[-1].content!r:.60}, and its facts do not say what it shows; a "
            f"variant asks anew, so it is made from rows with facts or with a prompt of {row.task}."
        )
    row_id = f"{row.id}/{variant}"
    if is_graded:
        return graded[row.task](row, row_id)
    form = several_forms_row if variant is RowVariant.several_forms else FORMS[variant]
    return form(row, row_id, pool)
