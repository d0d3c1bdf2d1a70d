"""Rows that are evaluated on while a job trains, and what their losses say about each task."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_ads.data.batches import losses_by_task
from megatron_ads.data.packed_batch import PackedBatch
from megatron_ads.data.rows import TokenizedRow
from megatron_ads.metrics.perplexity import perplexities


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Held-out rows, and this replica's share of them in microbatches."""

    rows: Sequence[TokenizedRow]
    batches: Sequence[PackedBatch]

    def task_losses(self, sample_losses: Sequence[float]) -> dict[str, float]:
        """Return the mean loss per target token of each task, given each row's summed loss."""
        return losses_by_task(self.rows, sample_losses)

    def task_metrics(self, sample_losses: Sequence[float]) -> dict[str, float]:
        """Return M_t of each task, in [0, 1]: the mean over its rows of 1 / ppl."""
        inverse: dict[str, list[float]] = defaultdict(list)
        counts = np.array([row.target_count for row in self.rows], dtype=np.float64)
        for row, ppl in zip(self.rows, perplexities(np.asarray(sample_losses), counts), strict=True):
            inverse[row.task].append(1.0 / float(ppl))
        return {task: sum(values) / len(values) for task, values in sorted(inverse.items())}
