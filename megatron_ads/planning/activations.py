"""How many bytes each token of a microbatch leaves behind for the backward pass, layer by layer.

The sums list what autograd keeps in the layers of ``models``, tensor by tensor; a test compares them with what it
does keep. Routing is taken to be balanced, so every rank runs ``experts_per_token`` tokens per token of its own.

    b bytes of an element (2 or 4), h hidden, a heads, q/c ranks of the query/key-value projections, n/r/v head widths
    (no position, position, value), f/g/u inner widths of a dense feed-forward/an expert/the shared experts,
    k experts per token, E experts

Under tensor parallelism a rank keeps 1/tp of it all: of the tokens (norms, projections' inputs), or of the heads and
inner widths.

Adapters keep A x besides, ``rank`` wide, and their input in the place of the weight. The inputs of projections without
adapters are counted as well, although nothing keeps them: with few targets the sums are too large.
"""

from dataclasses import dataclass

from conversion.names import layer_parameters
from megatron_ads.architecture import ModelShape
from megatron_ads.config.model import Precision, Recompute
from megatron_ads.models.adapter_shapes import Lora
from megatron_ads.planning.compute import KEPT_BY_SELECTIVE
from megatron_ads.planning.job import Job

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
    def of(cls, job: Job, *, gpu: bool) -> "Kernels":
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
    def of(cls, job: Job, *, gpu: bool) -> "ActivationModel":
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
