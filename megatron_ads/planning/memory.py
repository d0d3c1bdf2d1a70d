"""Bytes on each rank at the worst moment of a step, by kind.

Weights have 2 bytes (BF16) or 4 (FP32) an element. What trains has a 4-byte gradient, accumulated in FP32 over the
microbatches, and optimizer state that Megatron's distributed optimizer divides among the replicas: two FP32 moments,
with BF16 weights an FP32 copy too. Activations are counted in ``activations``, and how many microbatches are held in
``schedule``.
"""

from dataclasses import dataclass

from megatron_ads.config.model import FrozenPart, Precision, Recompute
from megatron_ads.layout import Chunk
from megatron_ads.planning.activations import ActivationModel
from megatron_ads.planning.job import Job
from megatron_ads.planning.schedule import most_held, stage_order
from megatron_ads.planning.weights import Weights, largest_tensor, stage_weights, total


@dataclass(frozen=True, kw_only=True, slots=True)
class RankMemory:
    """Bytes on one rank; all ranks of a stage hold equally much."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    """Kept between forward and backward passes, over all microbatches in flight."""
    buffers: int
    """Alive for a moment: a layer computed again, gradients of activations and of the largest weight, logits."""
    loading: int
    """Peak while the gradient buffers are made: weights are moved into them, so a part exists twice."""
    reserved: int
    """Taken by the driver, communication buffers and the allocator, whatever the model."""

    @property
    def training(self) -> int:
        """The worst moment of a step."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.buffers + self.reserved

    @property
    def peak(self) -> int:
        """The worst moment of the job."""
        return max(self.training, self.loading + self.reserved)


def stage_memory(job: Job, stage: int, *, gpu: bool, reserved_bytes: int = 0) -> RankMemory:
    """Return what each rank of a pipeline stage holds."""
    weights = stage_weights(job, stage)
    trained = tuple(weight for weight in weights if job.trains(weight.part))
    element = _element_bytes(job)
    activations = ActivationModel.of(job, gpu=gpu)
    return RankMemory(
        weights=element * total(weights),
        gradients=4 * total(trained),
        optimizer=_optimizer_bytes(job, trained),
        activations=_held(job, stage, activations),
        buffers=_buffers(job, stage, activations),
        loading=_loading(element, weights, trained),
        reserved=reserved_bytes,
    )


def _element_bytes(job: Job) -> int:
    return 2 if job.precision is Precision.bf16 else 4


def _optimizer_bytes(job: Job, trained: tuple[Weights, ...]) -> int:
    each = 12 if job.precision is Precision.bf16 else 8
    sizes = job.layout
    dense, expert = total(trained, expert=False), total(trained, expert=True)
    return each * (-(-dense // (sizes.dp * sizes.cp)) - (-expert // sizes.edp))


def _loading(element: int, weights: tuple[Weights, ...], trained: tuple[Weights, ...]) -> int:
    """Weights of a kind are moved into one buffer after its gradients are allocated: dense first, then experts."""
    dense, expert = total(trained, expert=False), total(trained, expert=True)
    first = (4 + element) * dense
    second = 4 * dense + (4 + element) * expert
    return element * total(weights) + max(first, second)


def _tokens(job: Job) -> int:
    """Tokens of a microbatch whose activations one rank keeps."""
    return job.tokens_per_microbatch // (job.layout.tp * job.layout.cp)


def _held(job: Job, stage: int, model: ActivationModel) -> int:
    sizes = job.layout
    chunks = job.placement.stage_chunks(stage)
    bytes_by_virtual = [_tokens(job) * _kept_by_chunk(job, chunk, model) for chunk in chunks]
    return most_held(stage_order(sizes.pp, sizes.vpp, stage, job.microbatches), bytes_by_virtual)


def _kept_by_chunk(job: Job, chunk: Chunk, model: ActivationModel) -> int:
    """Return the bytes a token leaves in a chunk; the loss is counted with the buffers, it goes as it comes."""
    hidden = model.element_bytes * job.shape.hidden_size
    kept = sum(model.layer(layer, job.recompute) for layer in chunk.layers)
    if chunk.mtp_layers and job.trains_mtp:
        kept += sum(
            model.mtp(job.recompute)
            + (0 if job.recompute is Recompute.full else model.layer(job.shape.num_layers + layer, job.recompute))
            for layer in chunk.mtp_layers
        )
    if chunk.has_loss:
        kept += _losses(job, chunk) * (model.head() - model.logits())
    else:
        kept += hidden  # the output that was sent on
    return kept


def _losses(job: Job, chunk: Chunk) -> int:
    return 1 + (len(chunk.mtp_layers) if job.trains_mtp else 0)


def _buffers(job: Job, stage: int, model: ActivationModel) -> int:
    """The wider of two moments: the backward pass of the loss, and that of the widest layer."""
    chunks = job.placement.stage_chunks(stage)
    loss = max((_loss_moment(job, chunk, model) for chunk in chunks if chunk.has_loss), default=0)
    return max(loss, _layer_moment(job, stage, model))


def _loss_moment(job: Job, chunk: Chunk, model: ActivationModel) -> int:
    """All losses' probabilities, one gradient of logits, and the output layer's weight gradient if it is trained."""
    gradient = model.element_bytes * job.shape.vocab_size if job.precision is Precision.bf16 else 0
    weight = 0
    if job.trains(FrozenPart.output):
        weight = model.element_bytes * job.shape.vocab_size * job.shape.hidden_size // job.layout.tp
    return _tokens(job) * (_losses(job, chunk) * model.logits() + gradient) + weight


def _layer_moment(job: Job, stage: int, model: ActivationModel) -> int:
    layers = [layer for chunk in job.placement.stage_chunks(stage) for layer in chunk.layers]
    if job.trains_mtp:
        layers += [
            job.shape.num_layers + layer for chunk in job.placement.stage_chunks(stage) for layer in chunk.mtp_layers
        ]
    again = max((model.layer(layer, Recompute.none) - model.layer(layer, job.recompute) for layer in layers), default=0)
    weight_gradient = model.element_bytes * largest_tensor(job, stage)
    return _tokens(job) * (again + model.widest_gradients(layers)) + weight_gradient
