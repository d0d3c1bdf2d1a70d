"""Reward of tasks with labels: full for the true one, less the farther away on a graded scale.

With truth i and answer j as places on a scale of L labels:

    exact    R_label = 1 if j = i, else 0
    ordinal  R_label = 1 - |i - j| / (L - 1)

    R = R_label + w_format R_format

R_format is 1 for an answer that can be read; R is 0 for one that cannot. Where a row asks for three labels, R_label is
their mean. The form of the format term is that of the advertiser paper's reward; the label term is ours.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import ClassVar

from megatron_ads.errors import DataError
from megatron_ads.metrics.ranking import same_name
from megatron_ads.rewards.reward import Unit
from megatron_ads.rollouts import Rollout
from megatron_ads.rows import ChatRow, Fact
from megatron_ads.tasks import ad_user_relevance, relevance
from megatron_ads.tasks.answer_format import ReadFailure
from megatron_ads.tasks.registry import TASKS, read_answer

SCALES: dict[str, tuple[str, ...]] = {
    relevance.TASK: tuple(relevance.Label),
    ad_user_relevance.TASK: tuple(ad_user_relevance.Score),
}
"""Labels of graded tasks, from the worst to the best."""
_FLAGS = ("location", "quality")


@dataclass(kw_only=True, slots=True)
class LabelAgreement:
    """Judges the tasks whose answers have a label, each with the strict parser of its task."""

    unit: ClassVar[Unit] = Unit.sample

    ordinal: bool = True
    """Labels near the true one count in part, where the task has a scale."""
    format_weight: float = 0.2
    """w_format."""

    def __call__(self, rollouts: Sequence[Rollout]) -> list[float | None]:
        """Return R of each; None for rows of other tasks."""
        return [self._value(rollout.row, rollout.text) for rollout in rollouts]

    def _value(self, row: ChatRow, text: str) -> float | None:
        label_of = TASKS[row.task].label_of if row.task in TASKS else None
        if label_of is None:
            return None
        if row.label is None:
            raise DataError(f"row {row.id!r} of task {row.task} has no label to compare answers with.")
        answer = read_answer(row, text)
        if isinstance(answer, ReadFailure):
            return 0.0
        shares = [self._agreement(row.task, row.label, label_of(answer))]
        if isinstance(answer, relevance.RelevanceJudgement) and Fact.ground_truth in row.facts:
            true_flags = {name: row.object_fact(Fact.ground_truth).get(name) for name in _FLAGS}
            shares += [float(flag == getattr(answer, name)) for name, flag in true_flags.items() if flag is not None]
        return fmean(shares) + self.format_weight

    def _agreement(self, task: str, truth: str, said: str) -> float:
        scale = SCALES.get(task, ())
        if not self.ordinal or truth not in scale:
            return float(same_name(truth) == same_name(said))
        return 1 - abs(scale.index(truth) - scale.index(said)) / (len(scale) - 1)
