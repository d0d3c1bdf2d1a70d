"""Ask the rows of a source another way: same records, same truth, another question."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from megatron_ads.config.data import RowVariant
from megatron_ads.data.rows import ChatRow
from megatron_ads.errors import DataError
from megatron_ads.tasks import ad_user_relevance, next_advertiser, relevance
from megatron_ads.tasks.variants import choose_one, list_ranking, several_forms, yes_no
from megatron_ads.tasks.variants.advertiser_question import AdvertiserQuestion, question_of

_OF_ADVERTISERS: dict[RowVariant, Callable[[AdvertiserQuestion], ChatRow]] = {
    RowVariant.yes_no: yes_no.advertiser_row,
    RowVariant.choose_one: choose_one.chat_row,
    RowVariant.list_ranking: list_ranking.chat_row,
    RowVariant.several_forms: several_forms.chat_row,
}


def ask_again(rows: Sequence[ChatRow], variant: RowVariant) -> list[ChatRow]:
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
