"""Rollouts as rows of a batch: prompt and answer, with loss on the answer, and how they are divided.

Per label a row carries its advantage and the log-probabilities of the policies that it is compared with, 0 at the
prompt's labels.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from megatron_ads.rollouts import Rollout
from megatron_ads.rows import TokenizedRow


def policy_row(rollout: Rollout, weight: float) -> TokenizedRow:
    """Return prompt and answer with ``weight`` on each token of the answer."""
    tokens = np.array([*rollout.prompt_tokens, *rollout.answer_tokens], dtype=np.int32)
    weights = np.zeros(len(tokens), dtype=np.float32)
    weights[len(rollout.prompt_tokens) :] = weight
    return TokenizedRow(rollout.row.id, rollout.row.task, tokens, weights)


def minibatches(rollouts: Sequence[Rollout], count: int) -> list[range]:
    """Return the places of the rollouts of each update: as many consecutive groups each."""
    groups = rollouts[-1].group + 1
    ends = np.searchsorted([rollout.group for rollout in rollouts], np.arange(1, count + 1) * groups // count)
    return [range(start, end) for start, end in zip([0, *ends.tolist()], ends.tolist(), strict=False)]


def on_labels(row: TokenizedRow, of_answer: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return a number for each label of a row, given those of its answer."""
    values = np.zeros(row.predictions, dtype=np.float32)
    values[row.predictions - len(of_answer) :] = of_answer
    return values
