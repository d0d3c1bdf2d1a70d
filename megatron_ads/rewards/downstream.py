"""Reward of a batch of answers: how much they improve a frozen pipeline that they are put into.

    R(B) = g(M_with - M_base)      g(x) = x, tanh(scale x) or sign(x)

    M = recall@k or NDCG@k of the item that each row says is the true one, or
        ctr: the mean probability of a click on the k items retrieved, by the ranker, which does not see the answer.
        On the simulator the true advertisers lowered it, where they raised recall and NDCG: prefer those

Answers are put in as lines of the query (``inject: query``), or the items they name go before all others
(``inject: filter``, as the advertiser paper's retrieval filter). One that cannot be read changes nothing; without
``unreadable_penalty`` (ours) a policy whose answers do more harm than good learned to write no other.

Every answer of a batch is worth the same. Batch i holds the i-th answer to each prompt (ours): were it all answers of a
step, those to one prompt would never differ, and a group's advantages be 0. ``per_sample`` takes each answer for a
batch of its own.

Source: AdNanny, section 4.3.1, eq. 8; tanh and sign are ours, for differences of any size.
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from statistics import fmean
from typing import ClassVar

import numpy as np
from torch import Tensor

from megatron_ads.downstream.pipeline import Pipeline
from megatron_ads.downstream.words import history_of
from megatron_ads.errors import DataError, one_line, require
from megatron_ads.metrics.ranking import ndcg_at, recall_at
from megatron_ads.rewards.frozen_pipeline import (
    can_be_read,
    named_items,
    open_pipeline,
    query_of,
    true_item,
)
from megatron_ads.rewards.reward import Fault, Outcome, RewardFailure, Unit, refuse_idle
from megatron_ads.rollouts import Rollout, groups_of
from megatron_ads.tasks.answer_texts import texts_of_answer
from megatron_ads.tasks.user_history import UserHistory


class PipelineMetric(StrEnum):
    """M."""

    recall = "recall"
    ndcg = "ndcg"
    ctr = "ctr"


class Inject(StrEnum):
    """Where answers go."""

    query = "query"
    filter = "filter"


class Transform(StrEnum):
    """g."""

    identity = "identity"
    tanh = "tanh"
    sign = "sign"


@dataclass(kw_only=True, slots=True)
class DownstreamBatch:
    """Judges rows whose true item the pipeline has; with ``ctr`` all rows."""

    unit: ClassVar[Unit] = Unit.batch

    pipeline: str = ""
    """Folder of a frozen pipeline."""
    metric: str = "recall"
    """``recall``, ``ndcg`` or ``ctr``."""
    k: int = 20
    """Items retrieved."""
    inject: str = "query"
    """``query`` or ``filter``."""
    g: str = "identity"
    """``identity``, ``tanh`` or ``sign``."""
    scale: float = 1.0
    """Of the difference, in ``tanh``."""
    per_sample: bool = False
    """Reward each answer by what it alone changes."""
    unreadable_penalty: float = 0.0
    """Taken off the reward of an answer that cannot be read; with ``g`` identity, 1 is what the truth adds at most."""

    _pipeline: Pipeline = field(init=False)

    def __post_init__(self) -> None:
        """Check the settings and load the pipeline."""
        for name, choices in (("metric", PipelineMetric), ("inject", Inject), ("g", Transform)):
            value = getattr(self, name)
            require(value in list(choices), f"downstream_batch has {name} = {value!r}; known: {', '.join(choices)}.")
        require(self.k > 0, f"downstream_batch has k = {self.k}; it must be at least 1.")
        require(
            self.unreadable_penalty >= 0,
            f"downstream_batch has unreadable_penalty = {self.unreadable_penalty}; it must be at least 0.",
        )
        require(self.scale > 0, f"downstream_batch has scale = {self.scale}; it must be above 0.")
        refuse_idle("downstream_batch", self, "scale", idle=self.g != Transform.tanh, why=f"with g {self.g}")
        self._pipeline = open_pipeline(self.pipeline, "downstream_batch")

    def __call__(self, rollouts: Sequence[Rollout]) -> list[Outcome]:
        """Return the reward of each answer; None for rows that are not judged."""
        histories, failures = self._histories(rollouts)
        changes = self._changes([rollouts[number] for number in histories], [*histories.values()])
        worth = self._worth(rollouts, dict(zip(histories, changes, strict=True)))
        for number in worth:
            if not can_be_read(rollouts[number].row, rollouts[number].text):
                worth[number] -= self.unreadable_penalty
        return [failures.get(number, worth.get(number)) for number in range(len(rollouts))]

    def _histories(self, rollouts: Sequence[Rollout]) -> tuple[dict[int, UserHistory], dict[int, RewardFailure]]:
        """Return, by number of a rollout that is judged, its user's history, or why its row does not tell it."""
        histories, failures = dict[int, UserHistory](), dict[int, RewardFailure]()
        for number, rollout in enumerate(rollouts):
            try:
                if self._judges(rollout):
                    histories[number] = history_of(rollout.row)
            except DataError as error:  # the other rows of the step are judged all the same
                failures[number] = RewardFailure(Fault.raised, one_line(error))
        return histories, failures

    def _worth(self, rollouts: Sequence[Rollout], changes: Mapping[int, float]) -> dict[int, float]:
        """Return what answers are worth, given by number what each alone adds."""
        if self.per_sample:
            return {number: self._transformed(change) for number, change in changes.items()}
        batch_N = [place for group in groups_of(rollouts) for place in range(len(group))]
        of_batch: dict[int, list[float]] = defaultdict(list)
        for number, change in changes.items():
            of_batch[batch_N[number]].append(change)
        return {number: self._transformed(fmean(of_batch[batch_N[number]])) for number in changes}

    def _judges(self, rollout: Rollout) -> bool:
        return self.metric == PipelineMetric.ctr or true_item(rollout.row, self._pipeline) is not None

    def _transformed(self, change: float) -> float:
        if self.g == Transform.tanh:
            return math.tanh(self.scale * change)
        return float(np.sign(change)) if self.g == Transform.sign else change

    def _changes(self, rollouts: Sequence[Rollout], histories: Sequence[UserHistory]) -> list[float]:
        """Return what each answer alone adds to the metric of its row, given the history of its user."""
        if not rollouts:
            return []
        base_queries = [query_of(rollout.row) for rollout in rollouts]
        base_NC = self._pipeline.users(histories, base_queries)
        base_NK = self._pipeline.retrieve(base_NC, self.k).tolist()
        if self.inject == Inject.query:
            added = [texts_of_answer(rollout.row, rollout.text) for rollout in rollouts]
            queries = ["\n".join([base, *lines]) for base, lines in zip(base_queries, added, strict=True)]
            with_NK = self._pipeline.retrieve(self._pipeline.users(histories, queries), self.k).tolist()
        else:
            named = [named_items(rollout.row, rollout.text, self._pipeline) for rollout in rollouts]
            with_NK = [list(dict.fromkeys([*one, *two]))[: len(two)] for one, two in zip(named, base_NK, strict=True)]
        measure = self._click_rates if self.metric == PipelineMetric.ctr else self._found
        before, after = (measure(rollouts, base_NC, items_NK) for items_NK in (base_NK, with_NK))
        return [new - old for new, old in zip(after, before, strict=True)]

    def _found(self, rollouts: Sequence[Rollout], _: Tensor, items_NK: Sequence[list[int]]) -> list[float]:
        """Return recall@k or NDCG@k of each row, which has one true item."""
        score = recall_at if self.metric == PipelineMetric.recall else ndcg_at
        truths = [true_item(rollout.row, self._pipeline) for rollout in rollouts]
        pairs = zip(truths, items_NK, strict=True)
        positions = [items.index(truth) + 1 if truth in items else None for truth, items in pairs]
        return [score([position], self.k) or 0.0 for position in positions]

    def _click_rates(self, _: Sequence[Rollout], user_NC: Tensor, items_NK: Sequence[list[int]]) -> list[float]:
        """Return the mean probability of a click on the items retrieved for each user."""
        shown = len(items_NK[0])
        chances = self._pipeline.chances(user_NC.repeat_interleave(shown, dim=0), np.array(items_NK).ravel())
        means: list[float] = chances[:, 0].reshape(-1, shown).mean(axis=1).tolist()
        return means
