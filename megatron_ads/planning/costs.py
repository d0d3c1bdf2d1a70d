"""What each rank of a stage holds, computes and sends in one step: parameters, arithmetic and traffic.

Parameters are counted from the table the conversion writes by. Rings of n ranks send (n - 1) / n of a tensor in a
reduce-scatter or all-gather; an all-to-all sends (n - 1) / n of the tokens elsewhere when routing is balanced.
"""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from conversion.names import Parameter, ParameterKind, layer_parameters, outside_parameters, slice_shape
from megatron_ads.architecture import GroupedQueryShape, ModelShape
from megatron_ads.config.model import FrozenPart, LoraTarget, Recompute
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
    """Return what each rank of a pipeline stage holds; router biases are buffers, not parameters."""
    shape, sizes = job.shape, job.layout
    embedding, final_norm, *output = outside_parameters(shape)
    found: list[Weights] = []
    for chunk in job.placement.stage_chunks(stage):
        if chunk.needs_embedding:
            found.append(Weights(FrozenPart.embedding, False, _elements(embedding, sizes.tp)))
        for layer in (*chunk.layers, *(shape.num_layers + mtp for mtp in chunk.mtp_layers)):
            # All layers of a kind are like its first: dense, mixture of experts, or MTP.
            first = shape.first_dense_layers if shape.is_moe_layer(layer) else 0
            kind = shape.num_layers if layer >= shape.num_layers else first
            found += _layer_weights(shape, kind, sizes.tp, sizes.ep, sizes.etp, job.lora)
        if chunk.has_loss:
            found += [Weights(FrozenPart.output, False, _elements(weight, sizes.tp)) for weight in output]
        holds_last_layer = shape.num_layers - 1 in chunk.layers
        if holds_last_layer if shape.mtp_layers else chunk.has_loss:
            found.append(Weights(FrozenPart.output, False, _elements(final_norm, sizes.tp)))
    return tuple(found)


def total(weights: Iterable[Weights], *, expert: bool | None = None) -> int:
    """Return the elements of all ``weights``, or of those that are (not) routed experts."""
    return sum(weight.elements for weight in weights if expert is None or weight.expert is expert)


def most_trained(job: PlannedJob) -> tuple[int, int]:
    """Return the most elements that a rank trains, and the most that it updates, each replica its share."""
    trained, own = [], []
    for stage in range(job.layout.pp):
        weights = [weight for weight in stage_weights(job, stage) if job.trains(weight.part)]
        dense, expert = (total(weights, expert=kind) for kind in (False, True))
        trained.append(dense + expert)
        own.append(-(-dense // (job.layout.dp * job.layout.cp)) - (-expert // job.layout.edp))
    return max(trained), max(own)


def reference_bytes(job: PlannedJob) -> int:
    """Return the most that a rank keeps of a reference: what it trains; with adapters, which are switched off, 0."""
    return job.element_bytes * most_trained(job)[0] if job.lora is None else 0


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
            counts[part_of(parameter.name, shape), expert] += _elements(parameter, size)
            if lora is not None and lora.adapts(parameter):
                adapters[target_of(parameter.name), expert] += lora.elements(parameter, size)
    # Two counters: a part and a target of one name are equal keys.
    found = (*counts.items(), *adapters.items())
    return tuple(Weights(part, expert, count) for (part, expert), count in found)


def _elements(parameter: Parameter, size: int) -> int:
    return math.prod(slice_shape(parameter, size))


def chunk_flops(job: PlannedJob, chunk: Chunk) -> TokenFlops:
    """Return the operations of one token in a chunk, over all its ranks together."""
    return token_flops(
        job.shape,
        run_layers(job, [chunk]),
        outputs=outputs(job, chunk),
        seq_length=job.seq_length,
        recompute=job.model.recompute_on(chunk.stage),
        lora=job.lora,
    )


def forward_share(job: PlannedJob) -> float:
    """Return the arithmetic of forward passes over that of whole microbatches."""
    flops = [chunk_flops(job, chunk) for chunk in job.placement.chunks]
    return sum(each.forward for each in flops) / sum(each.forward + each.backward + each.recomputed for each in flops)


def outputs(job: PlannedJob, chunk: Chunk) -> int:
    """Return how many losses a chunk computes: the model's and those of its MTP layers."""
    return chunk.has_loss * (1 + (job.shape.mtp_layers if job.trains_mtp else 0))


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
    sizes, chunks = job.layout, job.placement.stage_chunks(stage)
    first, per_stage, experts = sizes.stage_ranks(stage)[0], sizes.world // sizes.pp, sizes.ep * sizes.etp
    # Every chunk but the last sends on, every chunk but the first sends back.
    messages = sum((not chunk.has_loss) + (not chunk.has_embedding) for chunk in chunks)
    dispatched, gathered = (sum(sent(job, chunk) for chunk in chunks) for sent in (dispatch_bytes, tensor_bytes))
    traffic: tuple[tuple[str, Sequence[int], int], ...] = (
        ("pp", (first, (first + per_stage) % sizes.world), job.microbatches * messages * message_bytes(job)),
        ("dp", range(first, first + per_stage, sizes.tp * sizes.cp), _replica_bytes(job, stage, expert=False)),
        ("edp", range(first, first + per_stage, experts), _replica_bytes(job, stage, expert=True)),
        ("ep", range(first, first + experts, sizes.etp), job.microbatches * dispatched),
        ("tp", range(first, first + sizes.tp), job.microbatches * gathered),
    )
    found = []
    for name, ranks, sent in traffic:
        if len(set(ranks)) > 1:
            nodes = [rank // card.cards_per_node for rank in ranks]
            off_node = sum(node != nodes[0] for node in nodes) / (len(nodes) - 1)
            size = sizes.pp if name == "pp" else len(ranks)
            found.append(GroupTraffic(group=name, ranks=size, bytes_per_step=sent, off_node=off_node))
    return tuple(found)


def communicators(job: PlannedJob, stage: int) -> int:
    """Return in how many process groups of several ranks a rank of a stage communicates."""
    sizes = job.layout
    axes = (sizes.world, sizes.pp, sizes.dp * sizes.cp, sizes.tp, sizes.cp, sizes.ep, sizes.edp, sizes.etp)
    shared_embedding = sizes.pp > 1 and (job.shape.mtp_layers > 0 or job.shape.tie_word_embeddings)
    holds_it = any(chunk.needs_embedding for chunk in job.placement.stage_chunks(stage))
    return sum(size > 1 for size in axes) + (shared_embedding and holds_it)


def message_bytes(job: PlannedJob) -> int:
    """Return the size of one message between neighbouring chunks: the hidden state of a microbatch on one rank."""
    return job.tokens_per_rank * job.shape.hidden_size * job.element_bytes


def dispatch_bytes(job: PlannedJob, chunk: Chunk) -> int:
    """Return what a rank sends for one microbatch, forward and backward: tokens to experts and back, each way."""
    layers = sum(map(job.shape.is_moe_layer, run_layers(job, [chunk])))
    passes = 2 if job.model.recompute_on(chunk.stage) is Recompute.none else 3
    away = (job.layout.ep - 1) / job.layout.ep
    return int(layers * 2 * passes * job.shape.experts_per_token * message_bytes(job) * away)


_GATHERED = {Recompute.none: (7, 3, 2), Recompute.selective: (9, 4, 2), Recompute.full: (10, 4, 3)}
"""All-gathers and reduce-scatters of a layer with latent attention for one microbatch: of the hidden state, of the
latents of queries, keys and values, and of the keys' rotated channels; as Megatron-Core 0.16.1 makes them."""
_GATHERED_HIDDEN = {Recompute.none: 10, Recompute.selective: 12, Recompute.full: 14}
"""Those of the hidden state of a layer with grouped-query attention, which has no others."""


def tensor_bytes(job: PlannedJob, chunk: Chunk) -> int:
    """Return what a rank sends for one microbatch under sequence parallelism (arXiv:2205.05198, section 4.2.2).

    A feed-forward gathers its input and scatters its output, forward and backward, and gathers the input once more for
    the weight gradient. So does grouped-query attention; latent attention gathers its latents instead of its input.
    """
    shape, sizes, attention = job.shape, job.layout, job.shape.attention
    recompute = job.model.recompute_on(chunk.stage)
    if isinstance(attention, GroupedQueryShape):
        width = _GATHERED_HIDDEN[recompute] * shape.hidden_size
    else:
        hidden, latents, rotated = _GATHERED[recompute]
        width = hidden * shape.hidden_size + rotated * attention.qk_rope_head_dim
        width += latents * ((attention.q_lora_rank or shape.hidden_size) + attention.kv_lora_rank)
    outside = (3 * outputs(job, chunk) + 2 * chunk.has_embedding) * shape.hidden_size
    sent = len(run_layers(job, [chunk])) * width + outside
    return int(sent * job.tokens_per_microbatch // sizes.cp * job.element_bytes * (sizes.tp - 1) / sizes.tp)


def _replica_bytes(job: PlannedJob, stage: int, *, expert: bool) -> int:
    """Return what a step's reduce-scatter of FP32 gradients and all-gather of weights send."""
    trained = total((weight for weight in stage_weights(job, stage) if job.trains(weight.part)), expert=expert)
    replicas = job.layout.edp if expert else job.layout.dp * job.layout.cp
    return trained * (4 + job.element_bytes) * (replicas - 1) // replicas
