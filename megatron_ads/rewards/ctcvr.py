"""Reward of a named item: how likely the user clicks on it and converts, by a frozen ranking model.

    CTCVR(u, i) = P(click and conversion | u, i)
    R = (CTCVR - lowest) / (highest - lowest)      of a table of users times items, kept with the model

i is the first item that the answer names. A name that is no item, or an answer that cannot be read, is worth 0 (ours).

Source: Taiji, eq. 4 and the normalisation after it; the table stands for its offline simulation environment.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from megatron_ads.downstream.pipeline import Pipeline
from megatron_ads.downstream.words import history_of
from megatron_ads.rewards.frozen_pipeline import named_items, names_items, open_pipeline, query_of
from megatron_ads.rewards.reward import Unit
from megatron_ads.rollouts import Rollout


@dataclass(kw_only=True, slots=True)
class Ctcvr:
    """Judges rows whose answers name an item or rank items."""

    unit: ClassVar[Unit] = Unit.group

    pipeline: str = ""
    """Folder of a frozen pipeline."""

    _pipeline: Pipeline = field(init=False)

    def __post_init__(self) -> None:
        """Load the pipeline."""
        self._pipeline = open_pipeline(self.pipeline, "ctcvr")

    def __call__(self, rollouts: Sequence[Rollout]) -> list[float | None]:
        """Return the normalised CTCVR of each answer to one prompt; None for rows of other tasks."""
        row = rollouts[0].row
        if not names_items(row):
            return [None] * len(rollouts)
        user_1C = self._pipeline.users([history_of(row)], [query_of(row)])
        named = [named_items(row, rollout.text, self._pipeline)[:1] for rollout in rollouts]
        items = [item for first in named for item in first]
        worth = iter(self._pipeline.chances(user_1C.expand(len(items), -1), items)[:, 1].tolist())
        return [self._pipeline.normalized_ctcvr(next(worth)) if first else 0.0 for first in named]
