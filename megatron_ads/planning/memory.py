"""Bytes on each rank at the worst moment of a step, by kind.

Weights have 2 bytes (BF16) or 4 (FP32) an element. What trains has a 4-byte gradient, accumulated in FP32 over the
microbatches, and optimizer state that Megatron's distributed optimizer divides among the replicas: two FP32 moments,
with BF16 weights an FP32 copy too. ``schedule`` says how many microbatches are held.

Activations are listed as autograd keeps them in the layers of ``models``, tensor by tensor; a test compares the sums.
Routing is taken to be balanced, so every rank runs ``experts_per_token`` tokens per token of its own.

    b bytes of an element (2 or 4), h hidden, a heads, q/c ranks of the query/key-value projections, n/r/v head widths
    (no position, position, value), f/g/u inner widths of a dense feed-forward/an expert/the shared experts,
    k experts per token, E experts

Under tensor parallelism a rank keeps 1/tp of it all: of the tokens (norms, projections' inputs), or of the heads and
inner widths. Adapters also keep A x, ``rank`` wide, and their input in the place of the weight. The inputs of
projections without adapters are counted too, although nothing keeps them: with few targets the sums are too large.
"""

from dataclasses import dataclass

from conversion.names import layer_parameters
from megatron_ads.architecture import ModelShape
from megatron_ads.config.model import FrozenPart, Precision, Recompute
from megatron_ads.layout import Chunk
from megatron_ads.models.flops import KEPT_BY_SELECTIVE
from megatron_ads.models.parts import Lora
from megatron_ads.planning.costs import Weights, largest_tensor, run_layers, stage_weights, total
from megatron_ads.planning.job import PlannedJob
from megatron_ads.planning.schedule import peak_held, stage_order

_BLOCK = 128
"""Queries per block of ``models.attention.BlockedAttention``, which keeps its probabilities."""
_LONGEST_BLOCKED = 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class Kernels:
    """Which kernels run; they differ in what they keep."""

    flash_attention: bool
    """Keeps output and one number per row; else probabilities are kept (short FP32 samples on a CPU)."""
    fused_swiglu: bool
    """Keeps the gate and up projections only; else the factors of the product too."""

    @classmethod
    def of(cls, job: PlannedJob, *, gpu: bool) -> "Kernels":
        """Return what the models of this project choose on such a machine."""
        blocked = not gpu and job.precision is Precision.fp32 and job.seq_length <= _LONGEST_BLOCKED
        return cls(flash_attention=not blocked, fused_swiglu=gpu)


@dataclass(frozen=True, kw_only=True, slots=True)
class ActivationModel:
    """Bytes per token of one model. Divide by tp; a sample is as long as its row."""

    shape: ModelShape
    element_bytes: int
    kernels: Kernels
    sample_length: int
    etp: int = 1
    lora: Lora | None = None

    @classmethod
    def of(cls, job: PlannedJob, *, gpu: bool) -> "ActivationModel":
        """Return the model of a job."""
        return cls(
            shape=job.shape,
            element_bytes=2 if job.precision is Precision.bf16 else 4,
            kernels=Kernels.of(job, gpu=gpu),
            sample_length=job.seq_length,
            etp=job.layout.etp,
            lora=job.lora,
        )

    def layer(self, layer: int, recompute: Recompute) -> int:
        """Return what one decoder layer keeps until its backward pass; its number counts MTP layers on."""
        h, b = self.shape.hidden_size, self.element_bytes
        if recompute is Recompute.full:
            return b * h
        norms = 2 * self._norm(h)
        moe = self.shape.is_moe_layer(layer)
        if recompute is Recompute.selective:
            return norms + self._latents() + self._attention_output() + b * h + self._beside(layer, *KEPT_BY_SELECTIVE)
        kept = norms + self._latents() + self._heads() + self._attention_output() + self._feed_forward(moe)
        return kept + self._beside(layer)

    def mtp(self, recompute: Recompute) -> int:
        """Return what one MTP layer keeps besides its decoder layer: three norms and eh_proj's input of 2 h."""
        h, b = self.shape.hidden_size, self.element_bytes
        if recompute is Recompute.full:
            return 2 * b * h  # the hidden state and the next token's embedding
        return 3 * self._norm(h) + (2 * b * h if self.lora is None else 0)

    def head(self) -> int:
        """Return what one pass through final norm, output layer and loss keeps: b h, and FP32 probabilities."""
        inputs = self.element_bytes * self.shape.hidden_size if self.lora is None else 0
        return self._norm(self.shape.hidden_size) + inputs + self.logits()

    def logits(self) -> int:
        """Return the FP32 probabilities of the vocabulary that the loss keeps."""
        return 4 * self.shape.vocab_size

    def widest_gradients(self, layers: list[int]) -> int:
        """Return the gradients alive at once in the widest place of a backward pass: a feed-forward's 3 widths."""
        b, h = self.element_bytes, self.shape.hidden_size
        widths = [2 * h]
        for layer in layers:
            if self.shape.is_moe_layer(layer):
                widths.append(self.shape.experts_per_token * (3 * self.shape.expert_ffn_size + h) + h)
            else:
                widths.append(3 * self.shape.dense_ffn_size + h)
        return b * max(widths)

    def _beside(self, layer: int, *names: str) -> int:
        """Return what the adapters of a layer, or of these projections, keep of A x."""
        if self.lora is None:
            return 0
        runs = sum(
            1 if weight.expert is None else self.shape.experts_per_token
            for weight in layer_parameters(self.shape, layer)
            if weight.expert in (None, 0) and self.lora.adapts(weight)
            if not names or any(name in weight.name for name in names)
        )
        return runs * self.lora.rank * self.element_bytes

    def _norm(self, width: int) -> int:
        """Return the bytes of the input and one FP32 factor."""
        return self.element_bytes * width + 4

    def _latents(self) -> int:
        """h to the down-projections, the latent norms, their outputs, and the rotation of every position."""
        shape, b = self.shape, self.element_bytes
        query = 0
        if shape.q_lora_rank is not None:
            query = self._norm(shape.q_lora_rank) + b * shape.q_lora_rank
        # The norm's input is part of the down-projection's output, which holds the positions' channels too.
        key = self._norm(shape.kv_lora_rank + shape.qk_rope_head_dim) + b * shape.kv_lora_rank
        return b * shape.hidden_size + query + key + 4 * shape.qk_rope_head_dim

    def _heads(self) -> int:
        """Queries, keys, values and output of every head, and what the kernel keeps of the scores.

        A flash kernel takes values as wide as keys and keeps one FP32 number per query.
        """
        shape, b = self.shape, self.element_bytes
        width = shape.qk_head_dim
        if self.kernels.flash_attention:
            return shape.num_heads * (4 * b * width + 4)
        seen = min(self.sample_length, self.sample_length / 2 + _BLOCK / 2)
        return int(shape.num_heads * (2 * b * width + 2 * b * shape.v_head_dim + b * seen))

    def _attention_output(self) -> int:
        return self.element_bytes * self.shape.num_heads * self.shape.v_head_dim

    def _feed_forward(self, moe: bool) -> int:
        shape, b = self.shape, self.element_bytes
        if not moe:
            return b * shape.hidden_size + self._swiglu(shape.dense_ffn_size)
        k, h, g = shape.experts_per_token, shape.hidden_size, shape.expert_ffn_size
        # h to the router and the shared experts; dispatched copies of h, one inner pass for each; unfused experts
        routed = k * (self.etp * b * h + 5 * b * g + 8)
        return b * h + self._swiglu(shape.shared_ffn_size) + routed + self._router()

    def _swiglu(self, width: int) -> int:
        """Gate and up, their product; unfused also silu(gate) and the product's other factor."""
        return (3 if self.kernels.fused_swiglu else 5) * self.element_bytes * width

    def _router(self) -> int:
        """FP32 scores and masks of every expert, and indices of the chosen ones."""
        return 10 * self.shape.num_experts + 24 * self.shape.experts_per_token + 24


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


def stage_memory(job: PlannedJob, stage: int, *, gpu: bool, reserved_bytes: int = 0) -> RankMemory:
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


def _element_bytes(job: PlannedJob) -> int:
    return 2 if job.precision is Precision.bf16 else 4


def _optimizer_bytes(job: PlannedJob, trained: tuple[Weights, ...]) -> int:
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


def _tokens(job: PlannedJob) -> int:
    """Tokens of a microbatch whose activations one rank keeps."""
    return job.tokens_per_microbatch // (job.layout.tp * job.layout.cp)


def _held(job: PlannedJob, stage: int, model: ActivationModel) -> int:
    sizes = job.layout
    chunks = job.placement.stage_chunks(stage)
    bytes_by_virtual = [_tokens(job) * _kept_by_chunk(job, chunk, model) for chunk in chunks]
    return peak_held(stage_order(sizes.pp, sizes.vpp, stage, job.microbatches), bytes_by_virtual)


def _kept_by_chunk(job: PlannedJob, chunk: Chunk, model: ActivationModel) -> int:
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


def _losses(job: PlannedJob, chunk: Chunk) -> int:
    return 1 + (len(chunk.mtp_layers) if job.trains_mtp else 0)


def _buffers(job: PlannedJob, stage: int, model: ActivationModel) -> int:
    """The wider of two moments: the backward pass of the loss, and that of the widest layer."""
    chunks = job.placement.stage_chunks(stage)
    loss = max((_loss_moment(job, chunk, model) for chunk in chunks if chunk.has_loss), default=0)
    return max(loss, _layer_moment(job, stage, model))


def _loss_moment(job: PlannedJob, chunk: Chunk, model: ActivationModel) -> int:
    """All losses' probabilities, one gradient of logits, and the output layer's weight gradient if it is trained."""
    gradient = model.element_bytes * job.shape.vocab_size if job.precision is Precision.bf16 else 0
    weight = 0
    if job.trains(FrozenPart.output):
        weight = model.element_bytes * job.shape.vocab_size * job.shape.hidden_size // job.layout.tp
    return _tokens(job) * (_losses(job, chunk) * model.logits() + gradient) + weight


def _layer_moment(job: PlannedJob, stage: int, model: ActivationModel) -> int:
    layers = run_layers(job, job.placement.stage_chunks(stage))
    again = max((model.layer(layer, Recompute.none) - model.layer(layer, job.recompute) for layer in layers), default=0)
    weight_gradient = model.element_bytes * largest_tensor(job, stage)
    return _tokens(job) * (again + model.widest_gradients(layers)) + weight_gradient
