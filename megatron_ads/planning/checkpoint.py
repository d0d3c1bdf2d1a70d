"""What a training checkpoint takes: bytes, memory of a node's host, and time by its parts.

Every replica writes its own share of the optimizer's state in pieces of at most ``PIECE_ELEMENTS``, and the weights are
spread over their replicas. Nothing is gathered on a card; one piece, or one weight, at a time is in the host's memory,
but where a save goes on in the background (``checkpoint.async_save``) the whole share.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_ads.config.model import Precision
from megatron_ads.planning.costs import Weights
from megatron_ads.planning.hardware import Card
from megatron_ads.planning.job import PlannedJob

PIECE_ELEMENTS = 1 << 26
"""FP32 elements of a piece; as ``megatron_ads.optim.state.PIECE``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointCosts:
    """One save of the whole job."""

    bytes: int
    """Weights and optimizer state, each once; of adapters these alone."""
    busiest_rank_bytes: int
    """Written by the rank that writes most."""
    busiest_node_bytes: int
    """Written by the ranks of the node that writes most; in its host's memory during a save in the background."""
    host_bytes_per_node: int
    """In a host's memory at a time during a save that training waits for."""
    copy_seconds: float
    """From the cards to the host, on the busiest rank; all that training waits for a save in the background."""
    write_seconds: float
    """Checksums and writing: the slower of the busiest rank's one writer and the busiest node's link to the storage."""

    @property
    def seconds(self) -> float:
        return self.copy_seconds + self.write_seconds


def state_bytes(job: PlannedJob) -> int:
    """Return the bytes of optimizer state of a trained element: two FP32 moments, with BF16 a master copy too."""
    return 12 if job.model.precision is Precision.bf16 else 8


def checkpoint_costs(job: PlannedJob, card: Card, stages: Sequence[Sequence[Weights]]) -> CheckpointCosts:
    """Return what a save takes; ``stages`` are the weights of one rank of each pipeline stage."""
    by_stage = [sum(_written(job, weight) for weight in weights) for weights in stages]
    per_stage, per_node = job.layout.world // job.layout.pp, card.cards_per_node
    written = [by_stage[rank // per_stage] for rank in range(job.layout.world)]
    node = max(sum(written[first : first + per_node]) for first in range(0, len(written), per_node))
    vocabulary = job.element_bytes * job.shape.vocab_size * job.shape.hidden_size // job.layout.tp
    piece = max(4 * PIECE_ELEMENTS, vocabulary if job.lora is None else 0)
    return CheckpointCosts(
        bytes=sum(written),
        busiest_rank_bytes=max(written),
        busiest_node_bytes=node,
        host_bytes_per_node=min(piece, max(written)) * min(per_node, len(written)),
        copy_seconds=max(written) / card.host_bytes_per_second,
        write_seconds=max(max(written) / card.writer_bytes_per_second, node / card.storage_bytes_per_second),
    )


def _written(job: PlannedJob, weight: Weights) -> int:
    """Return a rank's share of what a checkpoint holds of some weights."""
    sizes, trained = job.layout, job.trains(weight.part)
    if job.lora is not None and not trained:
        return 0
    replicas = sizes.edp if weight.expert else sizes.dp * sizes.cp
    return -(-weight.elements // replicas) * (job.element_bytes + (state_bytes(job) if trained else 0))
