"""Reward of answers with one item, beams or samples of one prompt: the more likely a wrong one was, the worse it is.

The G answers of a group are ranked by the log-probability that the engine gave them, i = 0 the likeliest, as a beam
search returns them:

    R_i = 1                                                         if answer i is the true one
    R_i = -(1 / log2(i + 2)) / sum_j (1 / log2(j + 2)), j = 0..G-1  if it is not, but another of the group is
    R_i = 0                                                         if none is

With ``rollout.valid_names`` every answer is an item that there is.

Source: ReRe's ranking reward as MiniOneRec (github.com/AkaliKong/MiniOneRec, rl.py: ndcg_rule_reward and rule_reward,
here in one) computes it, where the place of a beam is its rank.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from megatron_ads.rewards.answers import is_true
from megatron_ads.rewards.reward import Unit
from megatron_ads.rollouts import Rollout


@dataclass(kw_only=True, slots=True)
class ListRanking:
    """Judges rows of every task."""

    unit: ClassVar[Unit] = Unit.group

    hit: float = 1.0
    """What the true answer is worth."""
    penalty: float = 1.0
    """What the shares of a whole group would cost together."""

    def __call__(self, rollouts: Sequence[Rollout]) -> list[float | None]:
        """Return R of each answer of one group."""
        hits = [is_true(rollout.row, rollout.text) for rollout in rollouts]
        if not any(hits):
            return [0.0] * len(rollouts)
        likeliest_first = sorted(range(len(rollouts)), key=lambda place: -math.fsum(rollouts[place].log_probabilities))
        gains = [1 / math.log2(rank + 2) for rank in range(len(rollouts))]
        values: list[float | None] = [None] * len(rollouts)
        for gain, place in zip(gains, likeliest_first, strict=True):
            values[place] = self.hit if hits[place] else -self.penalty * gain / math.fsum(gains)
        return values
