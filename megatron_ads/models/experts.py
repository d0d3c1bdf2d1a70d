"""Routed experts, stacked and applied by one grouped matrix product, and how evenly the router loads them.

Shape suffixes: E = experts on this rank (in ``ExpertLoad``: of the whole model), T = tokens routed to them, sorted by
expert, H = hidden width, F = inner width of one expert on this expert-tensor-parallel rank (gate and up make 2F),
L = layers of the whole model with MTP.
"""

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensorFactory
from megatron.core.fusions.fused_bias_swiglu import weighted_bias_swiglu_impl
from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.distributed import all_reduce
from torch.nn.functional import grouped_mm, silu

from megatron_ads.models.lora import Adapter


class GroupedExperts(MegatronModule):
    """SwiGLU experts as two stacked weights, in place of Megatron-Core's ``SequentialMLP``.

    ``weight1`` is (E, 2F, H), gate over up; ``weight2`` is (E, H, F). Its part of a distributed checkpoint has the
    keys and global shapes of every stock implementation, so checkpoints do not depend on which one wrote them.
    """

    applies_adapters = True
    """``forward`` adds what the adapters compute; linears need a hook for that."""

    def __init__(
        self,
        num_local_experts: int,
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection,
        name: str | None = None,
    ) -> None:
        """Allocate the weights; ``name``, which megatron-core 0.18 and later give every module, is not used."""
        super().__init__(config)
        self.num_local_experts = num_local_experts
        self.ep_group = pg_collection.ep
        self.tp_group = pg_collection.expt_tp
        self.dp_group = pg_collection.expt_dp
        inner = config.moe_ffn_hidden_size // self.tp_group.size()
        device = None if config.use_cpu_initialization else torch.cuda.current_device()

        def stacked(rows: int, columns: int) -> torch.nn.Parameter:
            shape = (num_local_experts, rows, columns)
            return torch.nn.Parameter(torch.empty(shape, dtype=config.params_dtype, device=device))

        self.weight1 = stacked(2 * inner, config.hidden_size)
        self.weight2 = stacked(config.hidden_size, inner)
        # torch's grouped product leaves the weight gradients of experts without tokens unwritten on Blackwell.
        self.clears_empty_experts = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (10, 0)
        self.adapter1: Adapter | None = None
        self.adapter2: Adapter | None = None

    def forward(self, tokens_TH: Tensor, tokens_per_expert: Tensor, weights_T: Tensor) -> tuple[Tensor, None]:
        """Return each token's output, times its routing weight, and no bias.

        Args:
            tokens_TH: Sorted by local expert.
            tokens_per_expert: (E,) counts, on any device; zeros are allowed.
            weights_T: Routing weight of each token for its expert.
        """
        ends_E: Tensor | None = None  # no tokens: nothing is computed, but every weight gets a gradient: of zero
        if tokens_TH.size(0):
            ends_E = tokens_per_expert.to(tokens_TH.device).cumsum(0).to(torch.int32)

        def product(x: Tensor, weight: Tensor, adapter: Adapter | None) -> Tensor:
            if ends_E is None:
                output = x @ weight[0].t()
            else:
                if self.clears_empty_experts and weight.requires_grad:
                    weight = _ClearEmptyExperts.apply(weight, ends_E)
                output = grouped_mm(x, weight.transpose(1, 2), offs=ends_E)
            return output if adapter is None else adapter(x, output, ends_E)

        gate_up_TF = product(tokens_TH, self.weight1, self.adapter1)
        inner_TF = weighted_swiglu(gate_up_TF, weights_T, fused=gate_up_TF.is_cuda and ends_E is not None)
        return product(inner_TF, self.weight2, self.adapter2), None

    def backward_dw(self) -> None:
        """Do nothing: weight gradients are not deferred."""

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """Describe the weights as part of the global ``(experts, rows, columns)`` tensors."""
        ep = (len(sharded_offsets), self.ep_group.rank(), self.ep_group.size())
        etp, etp_size, replica = self.tp_group.rank(), self.tp_group.size(), (0, 0, self.dp_group.rank())
        rows, columns = ep[0] + 1, ep[0] + 2

        def gate_up(key: str, data: Tensor, replica_id: Any, flattened_range: Any) -> list[ShardedTensor]:
            return [
                ShardedTensor.from_rank_offsets(
                    key,
                    half,  # a view: a copy would be held on the device for the whole save
                    *sharded_offsets,
                    ep,
                    (rows, etp + number * etp_size, 2 * etp_size),
                    replica_id=replica_id,
                    prepend_axis_num=len(sharded_offsets),
                )
                for number, half in enumerate(data.chunk(2, dim=1))
            ]

        state: dict[str, Any] = {
            f"{prefix}weight1": ShardedTensorFactory(
                f"{prefix}experts.linear_fc1.weight", self.weight1, gate_up, _concatenate_rows, replica
            ),
            f"{prefix}weight2": ShardedTensor.from_rank_offsets(
                f"{prefix}experts.linear_fc2.weight",
                self.weight2,
                *sharded_offsets,
                ep,
                (columns, etp, etp_size),
                replica_id=replica,
                prepend_axis_num=len(sharded_offsets),
            ),
        }
        return state | self._extra_states(prefix, sharded_offsets)

    def _extra_states(self, prefix: str, sharded_offsets: tuple) -> dict[str, ShardedObject]:
        """The empty extra state that each expert's linears have in stock checkpoints, and that stock loading wants."""
        count = self.ep_group.size() * self.num_local_experts
        shape, before = (*(size for *_, size in sharded_offsets), count), tuple(at for _, at, _ in sharded_offsets)
        replica = (0, self.tp_group.rank(), self.dp_group.rank())
        first = self.ep_group.rank() * self.num_local_experts
        return {
            f"{prefix}{linear}._extra_state{expert}": ShardedObject(
                f"{prefix}experts.{linear}._extra_state", None, shape, (*before, expert), replica
            )
            for linear in ("linear_fc1", "linear_fc2")
            for expert in range(first, first + self.num_local_experts)
        }

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        for key in [key for key in state_dict if key.startswith(prefix) and "._extra_state" in key]:
            del state_dict[key]
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def weighted_swiglu(gate_up_TF: Tensor, weights_T: Tensor, *, fused: bool) -> Tensor:
    """Return ``silu(gate) * up * weight`` in the dtype of ``gate_up_TF`` (T, 2F): gate, then up; weights are FP32.

    ``fused``: by Megatron-Core's compiled function, one kernel instead of five, for a GPU.
    """
    if fused:
        return weighted_bias_swiglu_impl(gate_up_TF, None, weights_T.unsqueeze(-1))
    gate_TF, up_TF = gate_up_TF.chunk(2, dim=-1)
    return (silu(gate_TF) * up_TF * weights_T.unsqueeze(-1)).to(gate_TF.dtype)


class _ClearEmptyExperts(torch.autograd.Function):
    """Pass a stacked weight on; in the backward pass, make the gradients of experts without tokens zero.

    They are whatever was in that memory, on Blackwell with torch up to 2.13 (pytorch #172439; Hopper writes zeros).
    """

    @staticmethod
    def forward(ctx: Any, weight_EFH: Tensor, ends_E: Tensor) -> Tensor:
        ctx.save_for_backward(ends_E)
        return weight_EFH.view_as(weight_EFH)

    @staticmethod
    def backward(ctx: Any, grad_EFH: Tensor) -> tuple[Tensor, None]:
        (ends_E,) = ctx.saved_tensors
        empty_E = ends_E.diff(prepend=ends_E.new_zeros(1)) == 0
        return grad_EFH.masked_fill(empty_E[:, None, None], 0), None


@torch.no_grad()
def _concatenate_rows(halves: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(halves), dim=1)


class ExpertLoad:
    """Counts the tokens each routed expert gets, from when it is made until ``measure``.

    Megatron-Core's own counters exist only with a router bias, and are cleared before a step can be reported.
    """

    def __init__(self, chunks: Sequence[GPTModel]) -> None:
        """Watch the routers of this rank's chunks, wrapped or not; ranks without any take part all the same."""
        config = chunks[0].config
        layers = config.num_layers + (config.mtp_num_layers or 0)
        device = torch.device("cpu") if not torch.cuda.is_available() else torch.cuda.current_device()
        self._tokens_LE = torch.zeros(layers, config.num_moe_experts or 1, device=device)
        for chunk in chunks:
            for module in chunk.modules():
                if isinstance(module, TopKRouter):
                    module.register_forward_hook(self._count)

    def _count(self, router: TopKRouter, inputs: Any, output: tuple[Tensor, Tensor]) -> None:
        # Without gradients it is an evaluation, or the first of two passes of a recomputed layer.
        if torch.is_grad_enabled():
            self._tokens_LE[_layer_index(router)] += output[1].sum(0)

    def measure(self) -> float:
        """Return the busiest expert's tokens over the average expert's, averaged over layers; then start again.

        1.0 is a perfect balance, the number of experts over those chosen per token the worst. A collective over the
        whole job: every rank calls it, and gets the same number (1.0 when no token was routed).
        """
        all_reduce(self._tokens_LE)
        routed_LE = self._tokens_LE[self._tokens_LE.sum(1) > 0]
        self._tokens_LE = torch.zeros_like(self._tokens_LE)
        if not len(routed_LE):
            return 1.0
        return float((routed_LE.amax(1) / routed_LE.mean(1)).mean())


def _layer_index(router: TopKRouter) -> int:
    """Return the router's layer, counted from 0 over the whole model; megatron-core 0.17 counts MTP layers anew."""
    before = router.config.num_layers if getattr(router, "is_mtp_layer", False) else 0
    return int(before + router.layer_number - 1)
