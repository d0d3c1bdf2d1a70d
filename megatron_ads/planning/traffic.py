"""Bytes that one rank sends per step, over each of its groups, and the link they take.

Rings of n ranks send (n - 1) / n of a tensor in a reduce-scatter or all-gather; an all-to-all sends (n - 1) / n of the
tokens elsewhere when routing is balanced.
"""

from dataclasses import dataclass

from megatron_ads.config.model import Precision, Recompute
from megatron_ads.layout import Chunk
from megatron_ads.planning.hardware import Card
from megatron_ads.planning.job import Job
from megatron_ads.planning.weights import stage_weights, total


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupTraffic:
    """What one rank of a stage sends over one kind of group in a step."""

    group: str
    """``pp`` activations and their gradients, ``dp`` and ``edp`` gradients and weights, ``ep`` tokens, ``tp``."""
    ranks: int
    bytes_per_step: int
    off_node: float
    """Share of the peers that are on other nodes."""

    def seconds(self, card: Card) -> float:
        """Return how long it takes when nothing else uses the links: the slower link's share decides."""
        inside = self.bytes_per_step * (1 - self.off_node) / card.node_bytes_per_second
        outside = self.bytes_per_step * self.off_node / card.network_bytes_per_second
        return max(inside, outside) / card.link_efficiency


def stage_traffic(job: Job, stage: int, card: Card) -> tuple[GroupTraffic, ...]:
    """Return what each rank of a stage sends in one step; groups of one rank are left out."""
    sizes = job.layout
    chunks = job.placement.stage_chunks(stage)
    first = sizes.stage_ranks(stage)[0]
    per_stage = sizes.world // sizes.pp
    step = sizes.tp * sizes.cp
    traffic = (
        ("pp", [first, (first + per_stage) % sizes.world], job.microbatches * _messages(job, chunks)),
        ("dp", list(range(first, first + per_stage, step)), _replica_bytes(job, stage, sizes.dp, expert=False)),
        (
            "edp",
            list(range(first, first + per_stage, sizes.ep * sizes.etp)),
            _replica_bytes(job, stage, sizes.edp, expert=True),
        ),
        (
            "ep",
            list(range(first, first + sizes.ep * sizes.etp, sizes.etp)),
            job.microbatches * sum(dispatch_bytes(job, chunk) for chunk in chunks),
        ),
        (
            "tp",
            list(range(first, first + sizes.tp)),
            job.microbatches * sum(tensor_bytes(job, chunk) for chunk in chunks),
        ),
    )
    return tuple(
        GroupTraffic(group=name, ranks=sizes.pp if name == "pp" else len(ranks), bytes_per_step=sent, off_node=away)
        for name, ranks, sent in traffic
        if len(set(ranks)) > 1
        for away in [_off_node(ranks, card.cards_per_node)]
    )


def message_bytes(job: Job) -> int:
    """Return the size of one message between neighbouring chunks: the hidden state of a microbatch on one rank."""
    tokens = job.tokens_per_microbatch // (job.layout.tp * job.layout.cp)
    return tokens * job.shape.hidden_size * _element(job)


def dispatch_bytes(job: Job, chunk: Chunk) -> int:
    """Return what a rank sends for one microbatch, forward and backward: tokens to experts and back, each way."""
    layers = moe_layers(job, chunk)
    passes = 2 if job.recompute is Recompute.none else 3
    exchanges = 2 * passes
    tokens = job.tokens_per_microbatch // (job.layout.tp * job.layout.cp) * job.shape.experts_per_token
    away = (job.layout.ep - 1) / job.layout.ep
    return int(layers * exchanges * tokens * job.shape.hidden_size * _element(job) * away)


def tensor_bytes(job: Job, chunk: Chunk) -> int:
    """Return what a rank sends for one microbatch under sequence parallelism (arXiv:2205.05198, section 4.2.2).

    Attention and each dense or shared feed-forward gather their input and scatter their output, forward and backward,
    and gather the input once more for the weight gradient.
    """
    sizes, shape = job.layout, job.shape
    layers = len(chunk.layers) + (len(chunk.mtp_layers) if job.trains_mtp else 0)
    passes = 5 if job.recompute is Recompute.none else 7
    hidden = job.tokens_per_microbatch // sizes.cp * shape.hidden_size * _element(job)
    return int(2 * layers * passes * hidden * (sizes.tp - 1) / sizes.tp)


def moe_layers(job: Job, chunk: Chunk) -> int:
    """Return how many mixture-of-experts layers a microbatch runs through in a chunk."""
    trained_mtp = len(chunk.mtp_layers) if job.trains_mtp else 0
    return sum(job.shape.is_moe_layer(layer) for layer in chunk.layers) + trained_mtp


def _messages(job: Job, chunks: tuple[Chunk, ...]) -> int:
    """Return the bytes of one microbatch: every chunk but the last sends on, every chunk but the first sends back."""
    sent = sum((not chunk.has_loss) + (not chunk.has_embedding) for chunk in chunks)
    return sent * message_bytes(job)


def _replica_bytes(job: Job, stage: int, replicas: int, *, expert: bool) -> int:
    """Return what a step's reduce-scatter of FP32 gradients and all-gather of weights send."""
    trained = total((weight for weight in stage_weights(job, stage) if job.trains(weight.part)), expert=expert)
    shared = replicas * (job.layout.cp if not expert else 1)
    return trained * (4 + _element(job)) * (shared - 1) // shared


def _element(job: Job) -> int:
    return 2 if job.precision is Precision.bf16 else 4


def _off_node(ranks: list[int], cards_per_node: int) -> float:
    """Return the share of the first rank's peers that are on another node than it."""
    peers = ranks[1:]
    return sum(peer // cards_per_node != ranks[0] // cards_per_node for peer in peers) / len(peers) if peers else 0.0
