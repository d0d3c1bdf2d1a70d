"""Variants: the records of rows asked another way, with the same truth.

Source: P5 (arXiv:2203.13366) and InstructRec (arXiv:2305.07001), which tune on many instructions over the same records
to do better under new ones: ``several_forms`` draws the question by the row's id, so a corpus holds all of them.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

from megatron_ads.config.data import RowVariant
from megatron_ads.data.rows import ChatRow
from megatron_ads.errors import DataError
from megatron_ads.tasks import ad_user_relevance, choose_one, list_ranking, next_advertiser, relevance, yes_no
from megatron_ads.tasks.advertiser_question import AdvertiserQuestion, question_of
from megatron_ads.tasks.prompts import Template, single_turn


def name_row(question: AdvertiserQuestion) -> ChatRow:
    """Return the question for the name."""
    return single_turn(
        question.row_id,
        next_advertiser.TASK,
        f"{next_advertiser.TEMPLATE.instruction_of(question.row_id)}\n{question.history}",
        next_advertiser.render_target(question.advertiser, question.reasoning),
        facts=question.facts,
        group=question.group,
        label=question.advertiser,
    )


FORMS: dict[str, Callable[[AdvertiserQuestion], ChatRow]] = {
    next_advertiser.TASK: name_row,
    yes_no.TASK: yes_no.advertiser_row,
    choose_one.TASK: choose_one.chat_row,
    list_ranking.TASK: list_ranking.chat_row,
}
_DRAW = Template(task="several_forms", version=1, paraphrases=tuple(FORMS))


def several_forms_row(question: AdvertiserQuestion) -> ChatRow:
    """Return one example in the form that its id gives; the row's task is that of the form.

    Raises:
        DataError: If the question's pool has too few others for the form.
    """
    return tuple(FORMS.values())[_DRAW.wording_of(question.row_id)](question)


_OF_ADVERTISERS: dict[RowVariant, Callable[[AdvertiserQuestion], ChatRow]] = {
    RowVariant.yes_no: yes_no.advertiser_row,
    RowVariant.choose_one: choose_one.chat_row,
    RowVariant.list_ranking: list_ranking.chat_row,
    RowVariant.several_forms: several_forms_row,
}


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
        return _OF_ADVERTISERS[variant](question_of(row, row_id, pool))
    if variant is RowVariant.yes_no and row.task == relevance.TASK:
        return yes_no.query_ad_row(row, row_id)
    if variant is RowVariant.yes_no and row.task == ad_user_relevance.TASK:
        return yes_no.ad_user_row(row, row_id)
    raise DataError(f"row {row.id!r} is of task {row.task}, which cannot be asked as {variant}.")
