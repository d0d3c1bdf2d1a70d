"""Bytes on each rank at the worst moment of a step, by kind.

Weights have 2 bytes (BF16) or 4 (FP32) an element. What trains has a 4-byte gradient, accumulated in FP32 over the
microbatches, and optimizer state that Megatron's distributed optimizer divides among the replicas: two moments,
with BF16 weights an FP32 copy too. ``schedule`` says how many microbatches are held.

Activations are listed as autograd keeps them in the layers of ``models``, tensor by tensor; a test compares the sums.
A rank's experts run ``experts_per_token`` tokens per token of its own, times ``expert_tokens`` of the job: memory is
set aside for unbalanced routing.

    b bytes of an element (2 or 4), h hidden, a heads, q/c ranks of the query/key-value projections, n/r/v head widths
    (no position, position, value), f/g/u inner widths of a dense feed-forward/an expert/the shared experts,
    k experts per token, E experts

Under tensor parallelism a rank keeps 1/tp of it all: of the tokens (norms, projections' inputs), or of the heads and
inner widths. Adapters also keep A x, ``rank`` wide, and their input in the place of the weight. The inputs of
projections without adapters are counted too, although nothing keeps them: with few targets the sums are too large.
"""

from dataclasses import dataclass

from conversion.names import layer_parameters
from megatron_ads.architecture import GroupedQueryShape
from megatron_ads.config.model import FrozenPart, Precision, Recompute
from megatron_ads.layout import Chunk
from megatron_ads.models.flops import KEPT_BY_SELECTIVE
from megatron_ads.planning.checkpoint import state_bytes
from megatron_ads.planning.costs import largest_tensor, outputs, run_layers, stage_weights, total
from megatron_ads.planning.job import PlannedJob
from megatron_ads.planning.rollout import engine_memory, teacher_bytes
from megatron_ads.planning.schedule import peak_held, stage_order

_BLOCK = 128
"""Queries per block of ``models.attention.BlockedAttention``, which keeps its probabilities."""
_LONGEST_BLOCKED = 1024
LOSS_TOKENS = 1024
"""Tokens of a piece of the loss; as ``megatron_ads.models.specs.LOSS_TOKENS``."""


class ActivationModel:
    """Bytes per token that a job keeps. Divide by tp; a sample is as long as its row."""

    def __init__(self, job: PlannedJob, *, gpu: bool) -> None:
        """Choose the kernels that the models of this project run on such a machine; they differ in what they keep."""
        self.shape, self.lora, self.element_bytes = job.shape, job.lora, job.element_bytes
        self._expert_runs = job.shape.experts_per_token * job.expert_tokens
        self._sample_length, self._etp = job.seq_length, job.layout.etp
        # Keeps output and one number per row; else probabilities are kept (short FP32 samples on a CPU).
        self._flash_attention = gpu or job.model.precision is Precision.bf16 or job.seq_length > _LONGEST_BLOCKED
        # Keeps the gate and up projections only; else the factors of the product too.
        self._fused_swiglu = gpu
        # Keeps the logits, and computes FP32 probabilities of a piece at a time; else those of all tokens are kept.
        self.loss_in_pieces = gpu and job.model.precision is Precision.bf16

    def layer(self, layer: int, recompute: Recompute) -> int:
        """Return what one decoder layer keeps until its backward pass; its number counts MTP layers on."""
        h, b = self.shape.hidden_size, self.element_bytes
        if recompute is Recompute.full:
            return b * h
        attention = self.shape.attention
        kept = 2 * self._norm(h) + self._before_heads() + b * self.shape.num_heads * attention.v_head_dim
        if recompute is Recompute.selective:
            heads = self._heads() if isinstance(attention, GroupedQueryShape) else 0
            return kept + heads + b * h + self._beside(layer, *KEPT_BY_SELECTIVE[type(attention)])
        return kept + self._heads() + self._feed_forward(self.shape.is_moe_layer(layer)) + self._beside(layer)

    def mtp(self, recompute: Recompute) -> int:
        """Return what one MTP layer keeps besides its decoder layer: three norms and eh_proj's input of 2 h."""
        h, b = self.shape.hidden_size, self.element_bytes
        if recompute is Recompute.full:
            return 2 * b * h  # the hidden state and the next token's embedding
        return 3 * self._norm(h) + (2 * b * h if self.lora is None else 0)

    def head(self) -> int:
        """Return what one pass through final norm, output layer and loss keeps: b h, and what the loss keeps."""
        h = self.shape.hidden_size
        return self._norm(h) + (self.element_bytes * h if self.lora is None else 0) + self.logits()

    def logits(self) -> int:
        """Return what the loss keeps of the vocabulary: FP32 probabilities, or logits where it is taken in pieces."""
        return (self.element_bytes if self.loss_in_pieces else 4) * self.shape.vocab_size

    def widest_gradients(self, layers: list[int]) -> int:
        """Return the gradients alive at once in the widest place of a backward pass: a feed-forward's 3 widths."""
        b, h = self.element_bytes, self.shape.hidden_size
        widths = [2 * h]
        for layer in layers:
            if self.shape.is_moe_layer(layer):
                widths.append(int(self._expert_runs * (3 * self.shape.expert_ffn_size + h)) + h)
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
        return self.element_bytes * width + 4

    def _before_heads(self) -> int:
        """h to the first projections, and the rotation of every position.

        Of latent attention also the latent norms and their outputs.
        """
        attention, b = self.shape.attention, self.element_bytes
        kept = b * self.shape.hidden_size + 4 * attention.rotary_dim
        if isinstance(attention, GroupedQueryShape):
            return kept
        if attention.q_lora_rank is not None:
            kept += self._norm(attention.q_lora_rank) + b * attention.q_lora_rank
        # The norm's input is part of the down-projection's output, which holds the positions' channels too.
        return kept + self._norm(attention.kv_lora_rank + attention.qk_rope_head_dim) + b * attention.kv_lora_rank

    def _heads(self) -> int:
        """Queries, keys, values and output of every head, and what the kernel keeps of the scores.

        A flash kernel takes values as wide as keys and keeps one FP32 number per query. Keys and values that a group
        of query heads shares are repeated for each of them.
        """
        attention, heads, b = self.shape.attention, self.shape.num_heads, self.element_bytes
        width = attention.qk_head_dim
        if self._flash_attention:
            return heads * (4 * b * width + 4)
        seen = min(self._sample_length, self._sample_length / 2 + _BLOCK / 2)
        return int(heads * (2 * b * width + 2 * b * attention.v_head_dim + b * seen))

    def _feed_forward(self, moe: bool) -> int:
        shape, b = self.shape, self.element_bytes
        if not moe:
            return b * shape.hidden_size + self._swiglu(shape.dense_ffn_size)
        k, h, g = shape.experts_per_token, shape.hidden_size, shape.expert_ffn_size
        # h to the router and the shared experts; dispatched copies of h, one inner pass for each; unfused experts
        routed = int(self._expert_runs * (self._etp * b * h + 5 * b * g + 8))
        router = 10 * shape.num_experts + 24 * k + 24  # FP32 scores, masks of every expert, indices of the chosen ones
        return b * h + self._swiglu(shape.shared_ffn_size) + routed + router

    def _swiglu(self, width: int) -> int:
        """Gate and up, their product; unfused also silu(gate) and the product's other factor."""
        return (3 if self._fused_swiglu else 5) * self.element_bytes * width


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
    engine: int = 0
    """Weights of the engine that generates in the same process."""
    answering: int = 0
    """The wider of its cache while it generates, and of what it receives new weights in."""
    teacher: int = 0
    """Weights of a teacher; rank 0 alone has them, of all ranks of its stage."""

    @property
    def kept(self) -> int:
        """What is there between two steps."""
        return self.weights + self.gradients + self.optimizer + self.reserved + self.engine + self.teacher

    @property
    def training(self) -> int:
        """The worst moment of an update."""
        return self.kept + self.activations + self.buffers

    @property
    def peak(self) -> int:
        """A save takes nothing on top: it copies what training holds between two steps to the host, piece by piece."""
        return max(self.training, self.kept + self.answering, self.loading + self.teacher + self.reserved)


def stage_memory(job: PlannedJob, stage: int, *, gpu: bool, reserved_bytes: int = 0) -> RankMemory:
    sizes, element = job.layout, job.element_bytes
    weights = stage_weights(job, stage)
    trained = [weight for weight in weights if job.trains(weight.part)]
    dense, expert = total(trained, expert=False), total(trained, expert=True)
    state = state_bytes(job)
    model, engine = ActivationModel(job, gpu=gpu), engine_memory(job)
    kept = [job.tokens_per_rank * _kept_by_chunk(job, chunk, model) for chunk in job.placement.stage_chunks(stage)]
    return RankMemory(
        weights=element * total(weights),
        gradients=4 * (dense + expert),
        optimizer=state * (-(-dense // (sizes.dp * sizes.cp)) - (-expert // sizes.edp)),
        activations=peak_held(stage_order(sizes.pp, sizes.vpp, stage, job.microbatches), kept),
        buffers=_buffers(job, stage, model),
        # Weights of a kind are moved into one buffer after its gradients are allocated: dense first, then experts.
        loading=element * total(weights) + max((4 + element) * dense, 4 * dense + (4 + element) * expert),
        reserved=reserved_bytes,
        engine=engine.weights,
        answering=max(engine.cache, engine.message),
        teacher=teacher_bytes(job) if stage == 0 else 0,
    )


def _kept_by_chunk(job: PlannedJob, chunk: Chunk, model: ActivationModel) -> int:
    """Return the bytes a token leaves in a chunk; the loss is counted with the buffers, it goes as it comes."""
    recompute = job.model.recompute_on(chunk.stage)
    kept = sum(model.layer(layer, recompute) for layer in chunk.layers)
    if job.trains_mtp:
        for layer in chunk.mtp_layers:
            kept += model.mtp(recompute)
            if recompute is not Recompute.full:
                kept += model.layer(job.shape.num_layers + layer, recompute)
    if chunk.has_loss:
        kept += outputs(job, chunk) * (model.head() - model.logits())
    elif job.layout.vpp > 1:  # else the output is deallocated once it is sent
        kept += model.element_bytes * job.shape.hidden_size
    return kept


def _buffers(job: PlannedJob, stage: int, model: ActivationModel) -> int:
    """Return the wider of two moments: the backward pass of the loss, and that of the widest layer."""
    chunks = job.placement.stage_chunks(stage)
    loss = 0
    if last := next((chunk for chunk in chunks if chunk.has_loss), None):
        # What all losses keep, one gradient of logits, and the output layer's weight gradient if it is trained.
        logits = model.element_bytes * job.shape.vocab_size
        gradient = logits if job.model.precision is Precision.bf16 else 0
        weight = logits * job.shape.hidden_size // job.layout.tp if job.trains(FrozenPart.output) else 0
        piece = min(job.tokens_per_microbatch, LOSS_TOKENS) * logits // job.layout.tp if model.loss_in_pieces else 0
        loss = job.tokens_per_rank * (outputs(job, last) * model.logits() + gradient) + piece + weight
    layers = run_layers(job, chunks)
    recompute = job.model.recompute_on(stage)
    again = (model.layer(layer, Recompute.none) - model.layer(layer, recompute) for layer in layers)
    weight_gradient = model.element_bytes * largest_tensor(job, stage)
    return max(loss, job.tokens_per_rank * (max(again, default=0) + model.widest_gradients(layers)) + weight_gradient)
