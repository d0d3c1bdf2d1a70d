"""Low-rank adapters of frozen linears: what they compute, how they are divided among ranks, where they are saved.

``W' = W + scale * B A`` (arXiv:2106.09685, section 4.1). A factor whose side of W is divided over tensor-parallel ranks
is divided with it; the other is whole on each of them. Which is which, and what the ranks exchange:

    W divided by rows     out = W x: A x of a rank's own tokens, gathered over the sequence; then B's own rows
    W divided by columns  A's own columns, summed and scattered over the sequence; then B of a rank's own tokens
    W whole               both, of a rank's own tokens
    an expert             as W is; its tokens are gathered and its outputs summed by the dispatcher already

Shape suffixes: N = weights that one adapter belongs to, the experts of a stack or 1, R = rank, I = inputs,
O = outputs of each of P parts of a weight (2 for gate over up), T = tokens, E = experts on this rank.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from torch import Tensor
from torch.nn.functional import grouped_mm, linear, pad

from conversion.layer_specs import LayerSpec
from conversion.names import Parameter, Split, parameters
from megatron_ads.architecture import ModelShape
from megatron_ads.models.parts import Lora
from megatron_ads.models.weights import named_weights
from megatron_ads.stable_random import stable_integer

_GROUPED_ALIGNMENT_BYTES = 16
"""Of the rows that torch's grouped product takes: a smaller rank is filled up with zeros there."""
_WEIGHT = re.compile(r"(.+)\.weight(\d*)")


class Adapter(torch.nn.Module):
    """The factors of one linear, or of the linears of a stack of experts."""

    def __init__(self, weights: Sequence[Parameter], lora: Lora, like: Tensor, *, num_experts: int) -> None:
        """Allocate the factors, on the device and in the dtype of the weight that they are ``like``.

        Args:
            weights: What the adapter belongs to: one weight, or consecutive experts.
            num_experts: Routed experts of a layer, on all ranks.
        """
        super().__init__()
        self.weights = tuple(weights)
        self.scale = lora.scale
        self.enabled = True
        """Switched off, the model computes what it does without adapters."""
        first = weights[0]
        self.split = first.split
        self._is_expert = first.expert is not None
        stacks = num_experts // len(weights) if self._is_expert else 1
        self._place_among_stacks = ((first.expert or 0) // len(weights), stacks)
        a_RI, b_POR = lora.factor_shapes(first, self._tensor_group.size())
        self.a_NRI = torch.nn.Parameter(like.new_empty(len(weights), *a_RI))
        self.b_NPOR = torch.nn.Parameter(like.new_empty(len(weights), *b_POR))
        self._a_is_divided = self.split is Split.COLUMNS
        self._b_is_divided = self.split in (Split.ROWS, Split.GATE_UP)
        # How a factor is divided, for Megatron's gradient reduction and the gradient norm. The gradient of a whole one
        # is the sum of what the tensor-parallel ranks have, each from its own tokens: Megatron sums it once a step.
        # Experts have no sequence parallelism; see ``_whole_gradient``.
        for factor, divided in ((self.a_NRI, self._a_is_divided), (self.b_NPOR, self._b_is_divided)):
            set_tensor_model_parallel_attributes(factor, is_parallel=divided, dim=2 if divided else -1, stride=1)
            factor.allreduce = not self._is_expert  # type: ignore[attr-defined]
            factor.sequence_parallel = not (divided or self._is_expert)  # type: ignore[attr-defined]

    @property
    def _tensor_group(self) -> torch.distributed.ProcessGroup:
        if self._is_expert:
            return parallel_state.get_expert_tensor_parallel_group()
        return parallel_state.get_tensor_model_parallel_group()

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        """Draw A uniformly from +-1 / sqrt(inputs), as the paper's published code does, and set B to zero.

        Every expert's A has a stream of its own, from ``seed`` and the weight's name, so that no layout changes it.
        """
        for weight, own_RI in zip(self.weights, self.a_NRI, strict=True):
            rank, inputs = own_RI.size(0), weight.shape[1]
            # 56 bits, because the generator takes a signed number.
            generator = torch.Generator().manual_seed(stable_integer(seed, weight.name, separator=" ") >> 8)
            whole_RI = torch.rand(rank, inputs, generator=generator).mul_(2).sub_(1).mul_(inputs**-0.5)
            parts = whole_RI.chunk(inputs // own_RI.size(1), dim=1)
            own_RI.copy_(parts[self._tensor_group.rank() % len(parts)])
        self.b_NPOR.zero_()

    def forward(self, x: Tensor, output: Tensor, ends_E: Tensor | None = None) -> Tensor:
        """Return ``output``, which is W x, plus scale B A x.

        Args:
            x: The linear's input, as this rank has it: (..., I).
            ends_E: For a stack of experts: behind which token of (T, I) each expert's tokens end.
        """
        if not self.enabled:
            return output
        a_NRI = self._whole_gradient(self.a_NRI, self._a_is_divided)
        b_NOR = self._whole_gradient(self.b_NPOR, self._b_is_divided).flatten(1, 2)
        if ends_E is not None:
            if spare := -a_NRI.size(1) % (_GROUPED_ALIGNMENT_BYTES // a_NRI.itemsize):
                a_NRI, b_NOR = pad(a_NRI, (0, 0, 0, spare)), pad(b_NOR, (0, spare))
            inner_TR = grouped_mm(x, a_NRI.transpose(1, 2), offs=ends_E)
            return output.add(grouped_mm(inner_TR, b_NOR.transpose(1, 2), offs=ends_E), alpha=self.scale)
        inner = self._exchange(linear(x, a_NRI[0]))
        added = torch.addmm(output.flatten(0, -2), inner.flatten(0, -2), b_NOR[0].t(), alpha=self.scale)
        return added.view(output.shape)

    def _whole_gradient(self, factor: Tensor, divided: bool) -> Tensor:
        """Sum the gradient of an expert's whole factor over the ranks that share the expert: each has a part of it."""
        if not self._is_expert or divided or self._tensor_group.size() == 1:
            return factor
        return tensor_parallel.copy_to_tensor_model_parallel_region(factor, group=self._tensor_group)

    def _exchange(self, inner: Tensor) -> Tensor:
        """Do for A x, which is narrow, what the linear does for its input or output under sequence parallelism."""
        group = self._tensor_group
        if self._is_expert or self.split is Split.REPLICATED or group.size() == 1:
            return inner
        if self.split is Split.COLUMNS:
            return tensor_parallel.reduce_scatter_to_sequence_parallel_region(inner, group=group)
        return tensor_parallel.gather_from_sequence_parallel_region(inner, group=group)

    @torch.no_grad()
    def merged(self, name: str, weight: Tensor) -> Tensor:
        """Return this rank's slice of ``W + scale B A`` for one of the weights, computed in FP32, in W's dtype."""
        index = next(index for index, parameter in enumerate(self.weights) if parameter.name == name)
        product = self.b_NPOR[index].flatten(0, 1).float() @ self.a_NRI[index].float()
        return (weight.float() + self.scale * product).to(weight.dtype)

    def sharded_factors(self, prefix: str) -> dict[str, ShardedTensor]:
        """Describe the factors to a distributed checkpoint, by parameter name; keys and shapes depend on no layout.

        The stacked experts of a layer are one tensor, whichever ranks and modules hold them.
        """
        group = self._tensor_group
        replica = (
            parallel_state.get_expert_data_parallel_rank()
            if self._is_expert
            else parallel_state.get_data_parallel_rank(with_context_parallel=True)
        )
        base = self.weights[0].name.rpartition(".weight")[0]
        described = {}
        for name, divided in (("a_NRI", self._a_is_divided), ("b_NPOR", self._b_is_divided)):
            offsets = [(0, *self._place_among_stacks)]
            if divided:
                offsets.append((2, group.rank(), group.size()))
            described[f"{prefix}.{name}"] = ShardedTensor.from_rank_offsets(
                f"{base}.lora_{name[0]}",
                getattr(self, name),
                *offsets,
                replica_id=(0, 0 if divided else group.rank(), replica),
            )
        return described


def named_adapters(chunk: torch.nn.Module) -> Iterator[tuple[str, Adapter]]:
    for name, module in chunk.named_modules():
        if isinstance(module, Adapter):
            yield name, module


def add_to_output(module: Any, inputs: tuple[Any, ...], output: Any) -> Any:
    """Forward hook of a linear that has an ``adapter``: add what it computes; a bias behind the output is passed on."""
    x = inputs[0]
    if hasattr(module, "layer_norm_weight"):  # Transformer Engine's linears may normalise their input first
        x = torch.nn.functional.rms_norm(x, (x.size(-1),), module.layer_norm_weight, module.eps)
    ends_E = None
    if len(module.adapter.weights) > 1:  # its grouped linears take the tokens of each expert
        ends_E = torch.as_tensor(inputs[1], device=x.device).cumsum(0).to(torch.int32)
    if isinstance(output, tuple):
        return module.adapter(x, output[0], ends_E), *output[1:]
    return module.adapter(x, output, ends_E)


def add_adapters(chunks: Sequence[GPTModel], lora: Lora, shape: ModelShape, spec: LayerSpec) -> None:
    """Freeze every weight of this rank's chunks and give an adapter to those that ``lora`` names.

    Call it before the gradient buffers are made. The factors hold nothing yet: see ``initialise_adapters``.
    """
    for chunk in chunks:
        chunk.requires_grad_(False)
        begin_gradients_at_embedding(chunk)
        chunk.trains_adapters = True
        # Where adapters belong in the chunk, by module name, each with a tensor like its weights and those.
        places: dict[str, tuple[Tensor, list[Parameter]]] = {}
        for weight in named_weights([chunk], spec):
            adapted = [parameters(shape)[name] for name in weight.canonical if lora.adapts(parameters(shape)[name])]
            if adapted:
                match = _WEIGHT.fullmatch(weight.name)
                assert match is not None  # every linear's weight is called so
                number = match[2] if spec is LayerSpec.GROUPED else ""  # of its two; Transformer Engine counts experts
                places.setdefault(f"{match[1]}.adapter{number}", (weight.tensor, []))[1].extend(adapted)
        for place, (like, weights) in places.items():
            owner_name, _, name = place.rpartition(".")
            owner = chunk.get_submodule(owner_name)
            setattr(owner, name, Adapter(weights, lora, like, num_experts=shape.num_experts))
            if not getattr(owner, "applies_adapters", False):
                owner.register_forward_hook(add_to_output)


def initialise_adapters(chunks: Iterable[GPTModel], seed: int) -> None:
    """Fill every adapter so that the model computes what it did without them."""
    for chunk in chunks:
        for _, adapter in named_adapters(chunk):
            adapter.initialise(seed)


def begin_gradients_at_embedding(chunk: GPTModel) -> None:
    """Have gradients flow through every layer of a chunk whose embedding is frozen.

    Layers that are computed again in the backward pass get gradients only if their input wants one, in megatron-core
    0.16.1 and in torch: without this, a frozen embedding silently stops the training of its whole pipeline stage.
    """

    def want_gradient(_module: Any, _inputs: Any, output: Tensor) -> None:
        if torch.is_grad_enabled():
            output.requires_grad_()

    if chunk.pre_process or chunk.mtp_process:
        chunk.embedding.register_forward_hook(want_gradient)
