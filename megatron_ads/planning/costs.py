"""What each rank of a stage holds, computes and sends in one step: parameters, arithmetic and traffic.

Parameters are counted from the table the conversion writes by. Rings of n ranks send (n - 1) / n of a tensor in a
reduce-scatter or all-gather; an all-to-all sends (n - 1) / n of the tokens elsewhere when routing is balanced.
"""

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache

from conversion.names import Parameter, ParameterKind, layer_parameters, outside_parameters, slice_shape
from megatron_ads.architecture import ModelShape
from megatron_ads.config.model import FrozenPart, LoraTarget, Precision, Recompute
from megatron_ads.layout import Chunk
from megatron_ads.models.flops import TokenFlops, token_flops
from megatron_ads.models.parts import Lora, part_of, target_of
from megatron_ads.planning.hardware import Card
from megatron_ads.planning.job import PlannedJob


@dataclass(frozen=True, slots=True)
class Weights:
    """Parameters of one rank that share their fate: what they belong to, and over which ranks they are replicated."""

    part: FrozenPart | LoraTarget | None
    """What of ``model.frozen`` they belong to, or of ``model.lora.targets`` their adapters; None for the norm
    before a mixture of experts, which none of the parts holds."""
    expert: bool
    """Routed experts: replicated over the expert-data-parallel ranks, not over all data-parallel ones."""
    elements: int


def stage_weights(job: PlannedJob, stage: int) -> tuple[Weights, ...]:
    """Return what each rank of a pipeline stage holds; all its ranks hold equally much.

    Router biases are not counted: they are buffers, not parameters.
    """
    return tuple(weight for chunk in job.placement.stage_chunks(stage) for weight in chunk_weights(job, chunk))


def chunk_weights(job: PlannedJob, chunk: Chunk) -> Iterator[Weights]:
    """Yield what each rank that runs ``chunk`` holds of it."""
    shape, sizes = job.shape, job.layout
    embedding, final_norm, output = outside_parameters(shape)
    if chunk.needs_embedding:
        yield Weights(FrozenPart.embedding, False, _elements([embedding], sizes.tp))
    for layer in (*chunk.layers, *(shape.num_layers + mtp for mtp in chunk.mtp_layers)):
        yield from _layer_weights(shape, _representative(shape, layer), sizes.tp, sizes.ep, sizes.etp, job.lora)
    if chunk.has_loss:
        yield Weights(FrozenPart.output, False, _elements([output], sizes.tp))
    holds_last_layer = shape.num_layers - 1 in chunk.layers
    if holds_last_layer if shape.mtp_layers else chunk.has_loss:
        yield Weights(FrozenPart.output, False, _elements([final_norm], sizes.tp))


def total(weights: Iterable[Weights], *, expert: bool | None = None) -> int:
    """Return the elements of all ``weights``, or of those that are (not) routed experts."""
    return sum(weight.elements for weight in weights if expert is None or weight.expert is expert)


def largest_tensor(job: PlannedJob, stage: int) -> int:
    """Return the elements of the largest trained parameter on a rank: stacked experts, or a vocabulary matrix."""
    shape, sizes = job.shape, job.layout
    if job.lora is not None:  # the wider factor of a feed-forward's projections
        experts = shape.num_experts // sizes.ep * max(shape.hidden_size, 2 * shape.expert_ffn_size)
        return job.lora.rank * max(experts, 2 * shape.dense_ffn_size)
    chunks = job.placement.stage_chunks(stage)
    sizes_of_tensors = [shape.dense_ffn_size * shape.hidden_size * 2 // sizes.tp]
    if any(chunk.needs_embedding or chunk.has_loss for chunk in chunks):
        sizes_of_tensors.append(shape.vocab_size * shape.hidden_size // sizes.tp)
    if stage not in job.placement.expert_less_stages(shape):
        local = shape.num_experts // sizes.ep
        sizes_of_tensors.append(local * 2 * shape.expert_ffn_size // sizes.etp * shape.hidden_size)
    return max(sizes_of_tensors)


def _representative(shape: ModelShape, layer: int) -> int:
    """Return the first layer of the same kind: dense, mixture of experts, or MTP."""
    if layer >= shape.num_layers:
        return shape.num_layers
    return shape.first_dense_layers if shape.is_moe_layer(layer) else 0


@lru_cache(maxsize=512)
def _layer_weights(shape: ModelShape, layer: int, tp: int, ep: int, etp: int, lora: Lora | None) -> tuple[Weights, ...]:
    counts: Counter[tuple[FrozenPart | None, bool]] = Counter()
    adapters: Counter[tuple[LoraTarget | None, bool]] = Counter()
    for parameter in layer_parameters(shape, layer):
        if parameter.kind is ParameterKind.ROUTER_BIAS:
            continue
        expert = parameter.expert is not None
        if parameter.expert is None or parameter.expert < shape.num_experts // ep:
            size = etp if expert else tp
            counts[part_of(parameter.name, shape), expert] += _elements([parameter], size)
            if lora is not None and lora.adapts(parameter):
                adapters[target_of(parameter.name), expert] += lora.elements(parameter, size)
    # Two counters: a part and a target of one name are equal keys.
    found = (*counts.items(), *adapters.items())
    return tuple(Weights(part, expert, count) for (part, expert), count in found)


def _elements(parameters: Iterable[Parameter], size: int) -> int:
    return sum(math.prod(slice_shape(parameter, size)) for parameter in parameters)


def chunk_flops(job: PlannedJob, chunk: Chunk) -> TokenFlops:
    """Return the operations of one token in a chunk, over all its ranks together."""
    return token_flops(
        job.shape,
        run_layers(job, [chunk]),
        outputs=chunk.has_loss + (len(chunk.mtp_layers) if job.trains_mtp else 0),
        seq_length=job.seq_length,
        recompute=job.recompute,
        lora=job.lora,
    )


def run_layers(job: PlannedJob, chunks: Iterable[Chunk]) -> list[int]:
    """Return the global numbers of the layers that are run; MTP layers follow the decoder layers."""
    chunks = list(chunks)
    mtp = [job.shape.num_layers + layer for chunk in chunks for layer in chunk.mtp_layers] if job.trains_mtp else []
    return [*(layer for chunk in chunks for layer in chunk.layers), *mtp]


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


def stage_traffic(job: PlannedJob, stage: int, card: Card) -> tuple[GroupTraffic, ...]:
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


def message_bytes(job: PlannedJob) -> int:
    """Return the size of one message between neighbouring chunks: the hidden state of a microbatch on one rank."""
    tokens = job.tokens_per_microbatch // (job.layout.tp * job.layout.cp)
    return tokens * job.shape.hidden_size * _element(job)


def dispatch_bytes(job: PlannedJob, chunk: Chunk) -> int:
    """Return what a rank sends for one microbatch, forward and backward: tokens to experts and back, each way."""
    layers = sum(map(job.shape.is_moe_layer, run_layers(job, [chunk])))
    passes = 2 if job.recompute is Recompute.none else 3
    exchanges = 2 * passes
    tokens = job.tokens_per_microbatch // (job.layout.tp * job.layout.cp) * job.shape.experts_per_token
    away = (job.layout.ep - 1) / job.layout.ep
    return int(layers * exchanges * tokens * job.shape.hidden_size * _element(job) * away)


def tensor_bytes(job: PlannedJob, chunk: Chunk) -> int:
    """Return what a rank sends for one microbatch under sequence parallelism (arXiv:2205.05198, section 4.2.2).

    Attention and each dense or shared feed-forward gather their input and scatter their output, forward and backward,
    and gather the input once more for the weight gradient.
    """
    sizes, shape = job.layout, job.shape
    layers = len(run_layers(job, [chunk]))
    passes = 5 if job.recompute is Recompute.none else 7
    hidden = job.tokens_per_microbatch // sizes.cp * shape.hidden_size * _element(job)
    return int(2 * layers * passes * hidden * (sizes.tp - 1) / sizes.tp)


def _messages(job: PlannedJob, chunks: tuple[Chunk, ...]) -> int:
    """Return the bytes of one microbatch: every chunk but the last sends on, every chunk but the first sends back."""
    sent = sum((not chunk.has_loss) + (not chunk.has_embedding) for chunk in chunks)
    return sent * message_bytes(job)


def _replica_bytes(job: PlannedJob, stage: int, replicas: int, *, expert: bool) -> int:
    """Return what a step's reduce-scatter of FP32 gradients and all-gather of weights send."""
    trained = total((weight for weight in stage_weights(job, stage) if job.trains(weight.part)), expert=expert)
    shared = replicas * (job.layout.cp if not expert else 1)
    return trained * (4 + _element(job)) * (shared - 1) // shared


def _element(job: PlannedJob) -> int:
    return 2 if job.precision is Precision.bf16 else 4


def _off_node(ranks: list[int], cards_per_node: int) -> float:
    """Return the share of the first rank's peers that are on another node than it."""
    peers = ranks[1:]
    return sum(peer // cards_per_node != ranks[0] // cards_per_node for peer in peers) / len(peers) if peers else 0.0
