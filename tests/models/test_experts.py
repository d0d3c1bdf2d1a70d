"""Grouped experts against Megatron-Core's sequential ones: values, gradients, checkpoints, speed."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_ads.layout import ParallelLayout
from megatron_ads.runtime import process_groups
from megatron_ads.runtime.device import seed_everything
from parity_tests.harness.ranks import run_ranks

TOLERANCE = 1e-5
"""FP32, values near 1: the same products, summed in another order."""
EXPERTS, HIDDEN, INNER = 4, 16, 8


def _config(dtype: torch.dtype, **sizes: int) -> Any:
    from megatron.core.transformer.transformer_config import TransformerConfig

    widths = {"hidden_size": HIDDEN, "moe_ffn_hidden_size": INNER, "num_moe_experts": EXPERTS} | sizes
    return TransformerConfig(
        num_layers=1,
        num_attention_heads=2,
        ffn_hidden_size=widths["moe_ffn_hidden_size"],
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        use_cpu_initialization=True,
        perform_initialization=False,
        gradient_accumulation_fusion=False,
        params_dtype=dtype,
        **widths,
    )


def _both(dtype: torch.dtype = torch.float32, **sizes: int) -> tuple[Any, Any]:
    """Return sequential and grouped experts with the same random weights."""
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.mlp import MLPSubmodules
    from megatron.core.transformer.moe.experts import SequentialMLP
    from megatron.core.transformer.moe.moe_utils import get_default_pg_collection

    from megatron_ads.models.experts import GroupedExperts

    config, groups = _config(dtype, **sizes), get_default_pg_collection()
    count = config.num_moe_experts // config.expert_model_parallel_size
    linears = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    sequential = SequentialMLP(count, config, linears, pg_collection=groups)
    grouped = GroupedExperts(count, config, pg_collection=groups)
    with torch.no_grad():
        for parameter in sequential.parameters():
            parameter.normal_(0, 0.5)
        for index, expert in enumerate(sequential.local_experts):
            grouped.weight1[index].copy_(expert.linear_fc1.weight)
            grouped.weight2[index].copy_(expert.linear_fc2.weight)
    return sequential, grouped


def _run(experts: Any, counts: list[int], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    width = experts.config.hidden_size
    tokens = torch.randn(sum(counts), width, generator=generator).to(dtype).requires_grad_()
    weights = torch.rand(sum(counts), generator=generator).requires_grad_()
    output, bias = experts(tokens, torch.tensor(counts), weights)
    assert bias is None
    output.backward(torch.randn(output.shape, generator=generator).to(output.dtype))
    assert tokens.grad is not None and weights.grad is not None
    return output.detach(), tokens.grad, weights.grad


def _compare(counts: list[int], dtype: torch.dtype) -> list[float]:
    """Return the largest differences of outputs, input gradients, routing gradients and both weight gradients."""
    process_groups.start(ParallelLayout(world=1))
    seed_everything(1)
    sequential, grouped = _both(dtype)
    pairs = list(zip(_run(sequential, counts, dtype), _run(grouped, counts, dtype), strict=True))
    for name, stacked in (("linear_fc1", grouped.weight1), ("linear_fc2", grouped.weight2)):
        one_by_one = [getattr(expert, name).weight.grad for expert in sequential.local_experts]
        assert stacked.grad is not None
        pairs.append((torch.stack(one_by_one), stacked.grad))
    return [float((ours - theirs).abs().max()) if ours.numel() else 0.0 for theirs, ours in pairs]


@pytest.mark.parametrize("counts", [[3, 5, 2, 6], [0, 7, 0, 1], [9, 0, 0, 0], [0, 0, 0, 0]], ids=str)
def test_grouped_experts_equal_sequential_ones(counts: list[int]) -> None:
    (differences,) = run_ranks(1, _compare, counts, torch.float32)
    assert max(differences) < TOLERANCE


def test_grouped_experts_equal_sequential_ones_in_bf16() -> None:
    (differences,) = run_ranks(1, _compare, [3, 5, 2, 6], torch.bfloat16)
    assert max(differences) < 0.07  # BF16 has 8 bits: values up to 16 are rounded to 1/16


def _cleared() -> list[Tensor]:
    """Return both weight gradients after a kernel that leaves those of experts without tokens unwritten."""
    from megatron_ads.models import experts as module

    class Unwritten(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, weight: Tensor, empty_E: Tensor) -> Tensor:
            ctx.save_for_backward(empty_E)
            return weight.view_as(weight)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
            return grad.masked_fill(ctx.saved_tensors[0][:, None, None], float("nan")), None

    def as_on_blackwell(x: Tensor, weight: Tensor, *, offs: Tensor) -> Tensor:
        empty_E = offs.diff(prepend=offs.new_zeros(1)) == 0
        return torch.nn.functional.grouped_mm(x, Unwritten.apply(weight, empty_E), offs=offs)

    process_groups.start(ParallelLayout(world=1))
    _, grouped = _both()
    grouped.clears_empty_experts = True
    module.grouped_mm = as_on_blackwell
    _run(grouped, [0, 7, 0, 1], torch.float32)
    return [grouped.weight1.grad, grouped.weight2.grad]


def test_gradients_of_experts_without_tokens_are_zero_where_the_kernel_leaves_them_unwritten() -> None:
    (gradients,) = run_ranks(1, _cleared)
    for grad in gradients:
        assert grad[[0, 2]].eq(0).all() and grad[[1, 3]].ne(0).any()


def _swiglu(dtype: torch.dtype) -> list[float]:
    """Return how far the fused function's output and gradients are from the plain one's."""
    process_groups.start(ParallelLayout(world=1))
    from megatron_ads.models.experts import weighted_swiglu

    found = []
    for fused in (False, True):
        generator = torch.Generator().manual_seed(0)
        gate_up = torch.randn(9, 12, generator=generator).to(dtype).requires_grad_()
        weights = torch.rand(9, generator=generator).requires_grad_()
        output = weighted_swiglu(gate_up, weights, fused=fused)
        assert output.dtype is dtype and output.shape == (9, 6)
        output.backward(torch.randn(9, 6, generator=generator).to(dtype))
        found.append((output.detach(), gate_up.grad, weights.grad))
    return [float((fused.float() - plain.float()).abs().max()) for plain, fused in zip(*found, strict=True)]  # type: ignore[union-attr]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, TOLERANCE), (torch.bfloat16, 0.07)], ids=str)
def test_the_activation_of_gpus_is_that_of_cpus(dtype: torch.dtype, tolerance: float) -> None:
    (differences,) = run_ranks(1, _swiglu, dtype)
    assert max(differences) < tolerance


def _wrong_order() -> float:
    process_groups.start(ParallelLayout(world=1))
    sequential, grouped = _both()
    with torch.no_grad():
        grouped.weight1.copy_(grouped.weight1.flip(0))
    theirs, ours = (_run(experts, [3, 5, 2, 6], torch.float32)[0] for experts in (sequential, grouped))
    return float((theirs - ours).abs().max())


def test_exchanged_experts_are_seen() -> None:
    (difference,) = run_ranks(1, _wrong_order)
    assert difference > 100 * TOLERANCE


def _checkpoint_entries(layout: ParallelLayout) -> tuple[dict[str, Any], dict[str, Any]]:
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedObject, apply_factories
    from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group

    def entries(experts: Any) -> dict[str, Any]:
        metadata = ensure_metadata_has_dp_cp_group({"singleton_local_shards": False})
        state = experts.sharded_state_dict("mlp.experts.", (), metadata)
        apply_factories(state)
        found: dict[str, Any] = {}
        for entry in nested_values(state):
            if isinstance(entry, ShardedObject):
                found[entry.unique_key] = (entry.global_shape, entry.replica_id)
            else:
                values = found.setdefault(entry.key, torch.zeros(entry.global_shape))
                part = entry.data[None] if entry.prepend_axis_num else entry.data
                values[entry.global_slice()] = part.reshape(values[entry.global_slice()].shape)
        return found

    process_groups.start(layout)
    seed_everything(1)
    sizes = {"expert_model_parallel_size": layout.ep, "expert_tensor_parallel_size": layout.etp}
    if layout.tp > 1:
        sizes |= {"tensor_model_parallel_size": layout.tp, "sequence_parallel": True}
    sequential, grouped = _both(**sizes)
    return entries(sequential), entries(grouped)


@pytest.mark.parametrize(
    "layout",
    [ParallelLayout(world=1), ParallelLayout(world=2, ep=2), ParallelLayout(world=2, tp=2, etp=2)],
    ids=["alone", "ep2", "etp2"],
)
def test_checkpoints_of_grouped_and_sequential_experts_are_the_same(layout: ParallelLayout) -> None:
    for theirs, ours in run_ranks(layout.world, _checkpoint_entries, layout):
        assert set(ours) == set(theirs) and len(ours) == 2 + 2 * EXPERTS // layout.ep
        assert ours["mlp.experts.experts.linear_fc1.weight"].shape == (EXPERTS, 2 * INNER, HIDDEN)
        for key, value in theirs.items():
            assert torch.equal(ours[key], value) if isinstance(value, Tensor) else ours[key] == value, key


def _layers_of_routers() -> list[int]:
    from megatron_ads.models.experts import _layer_index

    config = SimpleNamespace(num_layers=4)
    before_0_17 = SimpleNamespace(config=config, layer_number=5)
    since = SimpleNamespace(config=config, layer_number=1, is_mtp_layer=True)
    decoder = SimpleNamespace(config=config, layer_number=4, is_mtp_layer=False)
    return [_layer_index(router) for router in (before_0_17, since, decoder)]


def test_mtp_layers_come_after_the_decoder_however_megatron_core_numbers_them() -> None:
    assert run_ranks(1, _layers_of_routers) == [[4, 4, 3]]
