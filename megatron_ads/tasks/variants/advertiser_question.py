"""What the next-advertiser variants are made of, from a record or from a row that asks for the name."""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_ads.data.rows import ChatRow
from megatron_ads.tasks.next_advertiser import POOL_LINE, TASK, TEMPLATE, Request, parse, render_prompt
from megatron_ads.tasks.truths import truth_of
from megatron_ads.tasks.user_history import FULL_VIEW, HistoryView
from megatron_ads.tasks.variants.context import context_of


@dataclass(frozen=True, kw_only=True, slots=True)
class AdvertiserQuestion:
    """One user, the advertiser who came next, and others who could have."""

    row_id: str
    context: str
    """What a prompt shows of the user, below its instruction; without the pool."""
    advertiser: str
    pool: tuple[str, ...]
    """Where other candidates come from; may hold the true one."""
    group: str
    """The user."""
    reasoning: str = ""


def question_about(
    row_id: str, request: Request, advertiser: str, reasoning: str = "", *, view: HistoryView = FULL_VIEW
) -> AdvertiserQuestion:
    """Return the question of a record."""
    context = render_prompt(Request(request.user), "", view=view).removeprefix("\n")
    return AdvertiserQuestion(
        row_id=row_id,
        context=context,
        advertiser=advertiser,
        pool=request.pool,
        group=request.user.user_id,
        reasoning=reasoning,
    )


def question_of(row: ChatRow, row_id: str, pool: Sequence[str]) -> AdvertiserQuestion:
    """Return the question of a row that asks for the name.

    Raises:
        DataError: If the row is not of that task or not in its template's form.
    """
    truth = truth_of(row, parse)
    lines = context_of(row, TASK, (TEMPLATE,)).splitlines()
    context = "\n".join(lines[:-1] if lines[-1].startswith(POOL_LINE) else lines)
    return AdvertiserQuestion(
        row_id=row_id,
        context=context,
        advertiser=truth.advertiser,
        pool=tuple(pool),
        group=row.group,
        reasoning=truth.reasoning,
    )
