"""Many instructions over one record: the same next-advertiser example asked as one of several tasks.

Source: P5 (arXiv:2203.13366) and InstructRec (arXiv:2305.07001), which tune on many instructions over the same records
to do better under new ones. Which form a row has follows from its id, so that a corpus holds all of them.
"""

from collections.abc import Sequence
from enum import StrEnum

from megatron_ads.data.rows import ChatRow
from megatron_ads.errors import DataError
from megatron_ads.tasks import next_advertiser
from megatron_ads.tasks.next_advertiser import Request
from megatron_ads.tasks.prompt_templates import Template
from megatron_ads.tasks.user_history import FULL_VIEW, HistoryView
from megatron_ads.tasks.variants import choose_one, list_ranking, yes_no
from megatron_ads.tasks.variants.candidates import candidates_of


class Form(StrEnum):
    """How a next-advertiser record is asked."""

    name = "name"
    """The next advertiser, in free text."""
    yes_no = "yes_no"
    """Half of the rows ask about the true one, half about another."""
    choose_one = "choose_one"
    list_ranking = "list_ranking"


def form_of(row_id: str, forms: Sequence[Form] = tuple(Form)) -> Form:
    """Return the form that a row has."""
    return forms[Template(task="several_forms", version=1, paraphrases=tuple(forms)).wording_of(row_id)]


def chat_row(
    row_id: str,
    request: Request,
    advertiser: str,
    reasoning: str = "",
    *,
    forms: Sequence[Form] = tuple(Form),
    view: HistoryView = FULL_VIEW,
) -> ChatRow:
    """Return one example in the form that its id gives; the row's task is that of the form.

    Raises:
        DataError: If no form is given, or the request's pool has too few others for it.
    """
    if not forms:
        raise DataError("no form is given; at least one is needed.")
    match form_of(row_id, forms):
        case Form.name:
            return next_advertiser.chat_row(row_id, request, advertiser, reasoning, view=view)
        case Form.choose_one:
            return choose_one.chat_row(row_id, request, advertiser, reasoning, view=view)
        case Form.list_ranking:
            return list_ranking.chat_row(row_id, request, advertiser, reasoning, view=view)
        case Form.yes_no:
            asked = candidates_of(row_id, advertiser, request.pool, 2)[0]
            is_next = asked == advertiser
            return yes_no.advertiser_row(
                row_id, request, asked, is_next=is_next, reasoning=reasoning if is_next else "", view=view
            )
