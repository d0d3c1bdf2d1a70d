"""What variants of the next-advertiser question are made of: a row that asks for the name, and lists to choose from.

Other candidates are drawn by the row's id, and their order is as well.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from megatron_ads.data.rows import ChatRow, Fact, Facts
from megatron_ads.errors import DataError
from megatron_ads.stable_random import stable_random
from megatron_ads.tasks.ground_truth import ground_truth
from megatron_ads.tasks.next_advertiser import Prediction
from megatron_ads.tasks.prompts import LABELS
from megatron_ads.tasks.user_history import render_history, shown_history


@dataclass(frozen=True, kw_only=True, slots=True)
class AdvertiserQuestion:
    """One user, the advertiser who came next, and others who could have."""

    row_id: str
    history: str
    """What a prompt shows of the user."""
    facts: Facts
    """What is known of the user."""
    advertiser: str
    pool: tuple[str, ...]
    """Where other candidates come from; may hold the true one."""
    group: str
    """The user."""
    reasoning: str = ""


def question_of(row: ChatRow, row_id: str, pool: Sequence[str]) -> AdvertiserQuestion:
    """Return the question of a row that asks for the name.

    Raises:
        DataError: If the row's facts do not tell it.
    """
    require_own_form(row)
    truth = ground_truth(row, Prediction)
    left_out = {Fact.pool, Fact.best_answers}
    return AdvertiserQuestion(
        row_id=row_id,
        history=render_history(shown_history(row)),
        facts={name: value for name, value in row.facts.items() if name not in left_out},
        advertiser=truth.advertiser,
        pool=tuple(pool),
        group=row.group,
        reasoning=truth.reasoning,
    )


def require_own_form(row: ChatRow) -> None:
    """Refuse a row whose prompt is a text in a form of its own: nothing says what of it another question may show.

    Raises:
        DataError: If it is.
    """
    if Fact.text in row.facts:
        raise DataError(
            f"row {row.id!r} begins with {row.prompt[-1].content!r:.60}, and its facts do not say what it shows; a "
            f"variant asks anew, so it is made from rows with facts or with a prompt of {row.task}."
        )


CANDIDATES = 20


def candidates_of(row_id: str, truth: str, pool: Sequence[str], count: int = CANDIDATES) -> tuple[str, ...]:
    """Return ``count`` different names, ``truth`` among them; the others are also the negatives of a preference loss.

    Args:
        row_id: Decides which names are drawn and their order.
        truth: The true one.
        pool: Where the others come from; may hold the true one.
        count: How many, the true one included.

    Raises:
        DataError: If the pool has too few others.
    """
    others = [name for name in dict.fromkeys(pool) if name != truth]
    if len(others) < count - 1:
        raise DataError(f"the pool has {len(others)} others than {truth!r}; {count - 1} are needed to choose from.")
    draw = stable_random(row_id)
    chosen = [truth, *draw.sample(others, count - 1)]
    draw.shuffle(chosen)
    return tuple(chosen)


def candidate_lines(names: Iterable[str]) -> list[str]:
    """Return the lines of a prompt that list candidates."""
    return [f"{LABELS[Fact.candidates]}:", *names]
