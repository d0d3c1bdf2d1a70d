"""What reinforcement learning takes besides its updates: an engine on every card, a reference on the hosts, and time.

All of it is estimated, nothing was measured. An engine in the training processes (``rollout.mode`` colocated) is the
whole model on each card, in the format that is trained, and answers its share of a step's prompts in batches. A token
of a batch takes as long as reading what it needs does, the least that is possible:

    bytes = b (weights outside routed experts and embedding + routed experts that some row chooses) + cache
    chosen experts of a layer = E (1 - (1 - k / E)^R)       for R rows under balanced routing
    cache = R (tokens so far) layers (latent + rotated key, or all keys and values) b

Every prompt fills what an answer leaves of ``data.seq_length``, and every answer is as long as it may be: real steps
are shorter. Answers are those of one draw of prompts; ``rollout.dynamic_sampling`` may take more. What servers take is
theirs.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

from conversion.names import ParameterKind, layer_parameters, outside_parameters
from megatron_ads.architecture import ModelShape
from megatron_ads.models.flops import token_flops
from megatron_ads.planning import costs
from megatron_ads.planning.hardware import Card
from megatron_ads.planning.job import PlannedJob

BUCKET_BYTES = 1 << 30
"""Of one message with new weights; as ``megatron_ads.training.weight_sync.DEFAULT_BUCKET_BYTES``."""


@dataclass(frozen=True, slots=True)
class EngineMemory:
    """Bytes on each card."""

    weights: int = 0
    cache: int = 0
    """Latents and rotated keys, or keys and values, of one batch, at its end."""
    message: int = 0
    """A bucket of new weights, and its largest parameter put together."""


def engine_memory(job: PlannedJob) -> EngineMemory:
    """Return what the engine in each training process takes; nothing where there is none."""
    rl, shape, b = job.rollouts, job.shape, job.element_bytes
    if rl is None or not rl.colocated:
        return EngineMemory()
    largest = max(shape.vocab_size, 2 * shape.dense_ffn_size) * shape.hidden_size
    return EngineMemory(
        weights=b * sum(_model_elements(shape)),
        cache=_rows(job) * job.seq_length * _cached_bytes(job),
        message=BUCKET_BYTES + b * largest,
    )


def teacher_bytes(job: PlannedJob) -> int:
    """Return the weights of a teacher on the card of rank 0."""
    return job.rollouts.teacher.nbytes if job.rollouts is not None and job.rollouts.teacher is not None else 0


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutCosts:
    """One step of reinforcement learning; seconds are estimates."""

    engine: EngineMemory
    reference_host_bytes: int
    """Of the rank with most: the initial weights, on the card only while they are exchanged with the current ones."""
    popo_host_bytes: int
    """Of the rank with most: gradients that wait for those of the other rewards."""
    generated_tokens: int
    """Most that a draw of prompts generates."""
    rollout_seconds: float | None
    """None: on servers, or read from a dump."""
    teacher_seconds: float | None
    """Rank 0 reads all answers with it, while the others wait; None: there is none, or its time is not planned."""
    passes_seconds: float
    """Log-probabilities of the policy and its reference, and POPO's gradients."""
    update_seconds: float
    sync_seconds: float
    """0 where nothing follows the training."""
    overlapped_seconds: float
    """Of a step, those in which answers to later ones are generated (``rollout.max_staleness`` above 0)."""

    @property
    def parts(self) -> dict[str, float]:
        """Seconds of what a step consists of, without the rewards."""
        perhaps = {"rollouts": self.rollout_seconds, "teacher": self.teacher_seconds}
        known = {name: seconds for name, seconds in perhaps.items() if seconds is not None}
        return known | {"passes": self.passes_seconds, "updates": self.update_seconds, "sync": self.sync_seconds}

    @property
    def bound_by(self) -> str:
        """The longest of them."""
        return max(self.parts, key=self.parts.__getitem__)

    @property
    def step_seconds(self) -> float:
        """With rollouts R, passes and updates U, and sync S: max(R, U) + S where R and U overlap, else R + U + S."""
        return sum(self.parts.values()) - min(self.rollout_seconds or 0.0, self.overlapped_seconds)


def rollout_costs(
    job: PlannedJob, card: Card, *, pipeline_seconds: float, update_seconds: float
) -> RolloutCosts | None:
    """Return what a step takes; None for a job without rollouts.

    Args:
        pipeline_seconds: Forward and backward passes of the microbatches of one update.
        update_seconds: What an update takes besides.
    """
    rl = job.rollouts
    if rl is None:
        return None
    passes = costs.forward_share(job) * (1 + rl.has_reference) + rl.gradient_passes
    passes_seconds = rl.updates * pipeline_seconds * passes
    updates_seconds = rl.updates * (pipeline_seconds + update_seconds)
    return RolloutCosts(
        engine=engine_memory(job),
        reference_host_bytes=costs.reference_bytes(job) if rl.has_reference else 0,
        popo_host_bytes=4 * max(rl.gradient_passes - 1, 0) * costs.most_trained(job)[1],
        generated_tokens=rl.answers * rl.max_new_tokens if rl.generates else 0,
        rollout_seconds=_answering_seconds(job, card) if rl.colocated else None,
        teacher_seconds=_teacher_seconds(job, card),
        passes_seconds=passes_seconds,
        update_seconds=updates_seconds,
        overlapped_seconds=passes_seconds + updates_seconds if rl.overlap else 0.0,
        sync_seconds=_sync_seconds(job, card),
    )


def _answering_seconds(job: PlannedJob, card: Card) -> float:
    """Return how long each card reads prompts and writes answers; its answers are those of the job divided evenly."""
    rl = job.rollouts
    assert rl is not None
    own, rows = -(-rl.answers // job.layout.world), _rows(job)
    prompt = job.seq_length - rl.max_new_tokens
    flops = token_flops(job.shape, range(job.shape.num_layers), outputs=0, seq_length=max(prompt, 1)).forward
    reading = own * prompt * flops / (card.flops_per_second * card.efficiency)
    batches = -(-own // rows)
    cached = rows * (prompt + rl.max_new_tokens / 2) * _cached_bytes(job)  # on average over an answer
    return reading + batches * rl.max_new_tokens * (decoded_bytes(job, rows) + cached) / card.memory_bytes_per_second


def _teacher_seconds(job: PlannedJob, card: Card) -> float | None:
    """Return how long rank 0 takes to read every answer behind its prompt with the teacher."""
    rl = job.rollouts
    if rl is None or rl.teacher is None or (shape := rl.teacher.shape) is None:
        return None
    flops = token_flops(shape, range(shape.num_layers), outputs=1, seq_length=job.seq_length).forward
    return rl.answers * job.seq_length * flops / (card.flops_per_second * card.efficiency)


def decoded_bytes(job: PlannedJob, rows: int) -> float:
    """Return the bytes of weights that one token of each of so many rows needs."""
    shape = job.shape
    _, others, experts = _model_elements(shape)
    chosen = 1 - (1 - shape.experts_per_token / max(shape.num_experts, 1)) ** rows
    return job.element_bytes * (others + chosen * experts)


def _sync_seconds(job: PlannedJob, card: Card) -> float:
    """Return how long the weights take to the engines: over the links, or through rank 0 and storage to servers."""
    rl = job.rollouts
    assert rl is not None
    if not rl.trains or not rl.generates:
        return 0.0
    rate = card.node_bytes_per_second
    if job.layout.world > card.cards_per_node:
        rate = card.network_bytes_per_second
    size = job.element_bytes * sum(_model_elements(job.shape))
    sent = size / (rate * card.link_efficiency) if job.layout.world > 1 else 0.0
    if rl.colocated:
        return sent
    written = size / min(card.writer_bytes_per_second, card.storage_bytes_per_second)
    return sent + written + size / card.storage_bytes_per_second


def _rows(job: PlannedJob) -> int:
    """Return the answers that an engine generates at once."""
    rl = job.rollouts
    assert rl is not None
    return min(rl.batch_size, -(-rl.answers // job.layout.world))


def _cached_bytes(job: PlannedJob) -> int:
    """Return what the engine remembers of one token."""
    return job.element_bytes * job.shape.num_layers * job.shape.attention.cached_width


@lru_cache(maxsize=16)
def _model_elements(shape: ModelShape) -> tuple[int, int, int]:
    """Return the parameters of embedding, all others, and routed experts, as transformers loads them: without MTP.

    An embedding that is the output layer too belongs to the others: every token needs all of it.
    """
    embedding, *outside = (math.prod(each.shape) for each in outside_parameters(shape))
    if shape.tie_word_embeddings:
        embedding, outside = 0, [embedding, *outside]
    others, experts = sum(outside), 0
    for layer in range(shape.num_layers):
        for parameter in layer_parameters(shape, layer):
            if parameter.kind is ParameterKind.ROUTER_BIAS:
                continue
            if parameter.expert is None:
                others += math.prod(parameter.shape)
            else:
                experts += math.prod(parameter.shape)
    return embedding, others, experts
