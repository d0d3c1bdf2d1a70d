"""How far two sets of short texts agree; case and white space do not count."""

from collections.abc import Iterable
from dataclasses import dataclass

from megatron_ads.metrics.ranking import same_name


@dataclass(frozen=True, slots=True)
class Overlap:
    """Precision and recall of a predicted set."""

    precision: float
    recall: float

    @property
    def f1(self) -> float:
        """Harmonic mean; 0 if both are 0."""
        total = self.precision + self.recall
        return 2 * self.precision * self.recall / total if total else 0.0


def overlap(truth: Iterable[str], predicted: Iterable[str]) -> Overlap:
    """Compare a predicted set with the true one. Two empty sets agree; an empty one against another does not."""
    true_set, predicted_set = {same_name(text) for text in truth}, {same_name(text) for text in predicted}
    if not true_set and not predicted_set:
        return Overlap(1.0, 1.0)
    shared = len(true_set & predicted_set)
    return Overlap(
        precision=shared / len(predicted_set) if predicted_set else 0.0,
        recall=shared / len(true_set) if true_set else 0.0,
    )
