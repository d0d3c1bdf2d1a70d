"""What engine and trainer say of a few fixed rows after each update: whether they hold the same weights, and which."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ads.data.batches import ReplicaShare
from megatron_ads.errors import ConversionError
from megatron_ads.inference.server_pool import Probe
from megatron_ads.rows import TokenizedRow
from megatron_ads.runtime.device import device
from megatron_ads.training.build import TrainedModel
from megatron_ads.training.checkpoint_errors import raised_on_all_ranks
from megatron_ads.training.step import run_log_probabilities


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightProbe:
    """Rows with targets, and how a pass over them is run."""

    rows: Sequence[TokenizedRow]
    share: ReplicaShare
    seq_length: int
    max_logprob_diff: float | None
    """Largest difference in nats, the mean over target tokens; None: the engine is not asked."""

    def mark(self, model: TrainedModel, gap: Callable[[Probe], float]) -> tuple[str, float]:
        """Return a name of the current weights, as ``Rollout.weights`` has it, and how far engines differ from them.

        A collective. Two states of a job's weights have different names even after as many updates. ``gap`` says how
        far this rank's engine is; the difference is that of the worst rank, 0 where no engine is asked.

        Raises:
            MegatronAdsError: On every rank, if it is above ``max_logprob_diff``, or an engine does not answer.
        """
        said = run_log_probabilities(self.rows, self.share, model.chunks, seq_length=self.seq_length)
        digest = hashlib.sha256(b"".join(values.numpy().tobytes() for values in said)).hexdigest()[:12]
        difference = 0.0
        if self.max_logprob_diff is not None:
            with raised_on_all_ranks():
                difference = gap(self._targets(said))
            difference = _largest(difference)
            # Never of a difference that is not a number.
            if not difference <= self.max_logprob_diff:
                raise ConversionError(
                    f"after {model.optimizer.updates} updates, engine and trainer differ by {difference:.4g} nats a "
                    f"token on {len(self.rows)} fixed rows, above rollout.max_logprob_diff = {self.max_logprob_diff:g}"
                    ": the engine does not hold the trained weights, or computes something else. Compare their number "
                    "formats; raise the limit only if such a difference is to be expected."
                )
        return f"{model.optimizer.updates}-{digest}", difference

    def _targets(self, said: Sequence[Tensor]) -> Probe:
        """Return prompts and targets, with what the trainer says of the targets."""
        starts = [len(row.tokens) - row.target_count for row in self.rows]
        return Probe(
            prompts=[row.tokens[:start].tolist() for row, start in zip(self.rows, starts, strict=True)],
            answers=[row.tokens[start:].tolist() for row, start in zip(self.rows, starts, strict=True)],
            log_probabilities=[
                values[-row.target_count :].tolist() for row, values in zip(self.rows, said, strict=True)
            ],
        )


def _largest(value: float) -> float:
    """Return the largest of the ranks' values, NaN if one is."""
    table = torch.tensor(value, dtype=torch.float64, device=device())
    everywhere = [torch.zeros_like(table) for _ in range(dist.get_world_size())]
    dist.all_gather(everywhere, table)
    return float(torch.stack(everywhere).max())
