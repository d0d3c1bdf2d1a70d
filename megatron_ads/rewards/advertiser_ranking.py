"""Reward of the next advertiser in XML: where the true one is ranked, the form, and how many entries there are.

With r the position of the true advertiser (1 is first; an entry that repeats an earlier one takes no place), n_adv
different advertisers and n_int interests:

    R        = R_rank + w_format R_format - w_length P_length
    R_rank   = b + (1 - b) / log2(1 + r) if the true advertiser is there, else 0
    R_format = 1 if the answer is well-formed XML with both lists, else 0
    P_length = min(1, |n_adv - 20| / 20 + max(0, n_int - 5) / 5)

An answer that cannot be read has no entries, so that it gets -w_length.

Source: the advertiser paper, section 3.4.2, names the terms; its formulas are missing from the text, so these are ours.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from megatron_ads.errors import DataError, require
from megatron_ads.metrics.ranking import each_once, position_of
from megatron_ads.rewards.reward import Unit
from megatron_ads.rollouts import Rollout
from megatron_ads.rows import ChatRow
from megatron_ads.tasks import next_advertiser
from megatron_ads.tasks.answer_format import ReadFailure
from megatron_ads.tasks.registry import read_answer


@dataclass(kw_only=True, slots=True)
class AdvertiserRanking:
    """Judges rows of ``next_advertiser_ranking``; the truth is their label."""

    unit: ClassVar[Unit] = Unit.sample

    hit_base: float = 0.1
    """b, what a hit at any position is worth at least."""
    format_weight: float = 0.2
    """w_format."""
    length_weight: float = 0.2
    """w_length."""
    advertisers: int = next_advertiser.RANKED
    """Different advertisers asked for."""
    most_interests: int = next_advertiser.MOST_INTERESTS
    """Interests asked for at most."""

    def __post_init__(self) -> None:
        """Refuse counts that nothing can be divided by."""
        for name in ("advertisers", "most_interests"):
            value = getattr(self, name)
            require(value > 0, f"advertiser_ranking has {name} = {value}; it must be at least 1.")

    def __call__(self, rollouts: Sequence[Rollout]) -> list[float | None]:
        """Return R of each; None for rows of other tasks."""
        return [self._value(rollout.row, rollout.text) for rollout in rollouts]

    def _value(self, row: ChatRow, text: str) -> float | None:
        if row.task != next_advertiser.RANKING_TASK:
            return None
        if row.label is None:
            raise DataError(f"row {row.id!r} of task {row.task} has no label, the true advertiser.")
        answer = read_answer(row, text)
        if isinstance(answer, ReadFailure):
            return -self.length_weight
        position = position_of(row.label, answer.advertisers)
        rank = 0.0 if position is None else self.hit_base + (1 - self.hit_base) / math.log2(1 + position)
        off = abs(len(each_once(answer.advertisers)) - self.advertisers) / self.advertisers
        too_many = max(0, len(answer.interests) - self.most_interests) / self.most_interests
        return rank + self.format_weight - self.length_weight * min(1.0, off + too_many)
