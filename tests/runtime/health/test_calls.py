"""The tracer sees every collective of a real Megatron step, and names the place where ranks disagree."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from megatron_ads.layout import ParallelLayout
from megatron_ads.runtime import process_groups
from megatron_ads.runtime.health.calls import Group
from parity_tests.harness.ranks import run_ranks
from tests.collective_trace import Collective, Trace, collective, compare_traces, trace_collectives

EP = Group("expert_model_parallel", (0, 1))
WORLD = Group("default", (0, 1, 2))


def _allreduce(
    dtype: torch.dtype = torch.float32, reduction: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM
) -> Collective:
    options = dist.AllreduceOptions()
    options.reduceOp = reduction
    return collective(WORLD, "allreduce", ([torch.ones(1, dtype=dtype)], options))


def _all_to_all(rows: int, dtype: torch.dtype = torch.float32) -> Collective:
    return collective(EP, "all_to_all_single", (torch.empty(rows, 4, dtype=dtype), torch.empty(8, 4, dtype=dtype)))


NORM = _allreduce()
ZEROS = _allreduce(torch.int64)


def _every_kind_of_collective() -> Trace:
    with trace_collectives() as trace:
        ones = torch.ones(4)
        dist.all_reduce(ones, op=dist.ReduceOp.MAX)
        dist.broadcast(ones, src=1)
        dist.all_gather_into_tensor(torch.empty(8), ones)
        dist.reduce_scatter_tensor(torch.empty(2), ones)
        dist.all_to_all_single(torch.empty(4), ones)
        dist.barrier()
        dist.all_gather_object([None, None], "text")
        if dist.get_rank() == 0:
            dist.send(ones, 1)
        else:
            dist.recv(ones, 0)
    return trace


def test_calls_are_recorded_with_their_shapes_types_reduction_and_root() -> None:
    first, second = run_ranks(2, _every_kind_of_collective)
    (group,) = first.collectives
    assert str(group) == "default[0, 1]"
    assert [str(call) for call in first.collectives[group]][:6] == [
        "allreduce(float32[4]; max)",
        "broadcast(float32[4]; root 1)",
        "all_gather_single(float32[8], float32[4])",
        "reduce_scatter_single(float32[2], float32[4]; sum)",
        "all_to_all_single(float32[4], float32[4])",
        "barrier()",
    ]
    # An object is gathered by its length first, then by its bytes.
    assert [call.operation for call in first.collectives[group][6:]] == ["allgather", "allgather"]
    assert [str(call) for call in first.point_to_point[group]] == ["send(float32[4]; to rank 1)"]
    assert [str(call) for call in second.point_to_point[group]] == ["recv(float32[4]; from rank 0)"]
    assert compare_traces({0: first, 1: second}) == []


def _methods_before_and_after() -> bool:
    before = dict(ProcessGroup.__dict__)
    with pytest.raises(ValueError, match="inside"), trace_collectives():
        raise ValueError("inside")
    return before == dict(ProcessGroup.__dict__)


def test_nothing_stays_patched_after_an_error() -> None:
    assert run_ranks(1, _methods_before_and_after) == [True]


def _count_a_megatron_step(layout: ParallelLayout) -> tuple[int, int, Trace]:
    """Return how many calls of a training step the tracer saw, and how many torch's dispatcher did."""
    process_groups.start(layout)
    step = _megatron_step(layout)
    with (
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile,
        trace_collectives() as trace,
    ):
        step()
    dispatched = sum(event.count for event in profile.key_averages() if event.key.startswith("c10d::"))
    return trace.count(), dispatched, trace


def _megatron_step(layout: ParallelLayout) -> Any:
    """Build a small stock MoE model with Megatron's distributed optimizer; return a function that trains one step."""
    from megatron.core import parallel_state
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.transformer.transformer_config import TransformerConfig

    model_parallel_cuda_manual_seed(1)
    config = TransformerConfig(
        num_layers=2, hidden_size=16, num_attention_heads=2, ffn_hidden_size=16, num_moe_experts=4,
        moe_router_topk=2, moe_token_dispatcher_type="alltoall", moe_router_load_balancing_type="aux_loss",
        moe_aux_loss_coeff=1e-3, add_bias_linear=False, use_cpu_initialization=True, pipeline_dtype=torch.float32,
        pipeline_model_parallel_size=layout.pp, expert_model_parallel_size=layout.ep,
        gradient_accumulation_fusion=False, masked_softmax_fusion=False, bias_activation_fusion=False,
        finalize_model_grads_func=finalize_model_grads,
    )  # fmt: skip
    model = GPTModel(
        config, get_gpt_decoder_block_spec(config, use_transformer_engine=False), vocab_size=32, max_sequence_length=8,
        pre_process=parallel_state.is_pipeline_first_stage(), post_process=parallel_state.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=False,
    )  # fmt: skip
    chunk = DistributedDataParallel(config, DistributedDataParallelConfig(use_distributed_optimizer=True), model)
    optimizer = get_megatron_optimizer(OptimizerConfig(lr=1e-3, use_distributed_optimizer=True, clip_grad=1.0), [chunk])
    tokens, mask = torch.arange(8)[None], torch.ones(8, 8, dtype=torch.bool).triu(1)[None, None]

    def forward(_: Any, model: Any) -> Any:
        return model(tokens, tokens, mask, labels=tokens), lambda output: (output.mean(), {})

    def step() -> None:
        get_forward_backward_func()(
            forward_step_func=forward, data_iterator=None, model=[chunk], num_microbatches=2, seq_length=8,
            micro_batch_size=1, forward_only=False,
        )  # fmt: skip
        assert optimizer.step()[0]

    return step


@pytest.mark.parametrize(
    "layout", [ParallelLayout(world=2), ParallelLayout(world=4, pp=2, ep=2)], ids=["dp2", "pp2 ep2"]
)
def test_a_megatron_step_is_recorded_whole(layout: ParallelLayout) -> None:
    answers = run_ranks(layout.world, _count_a_megatron_step, layout)
    for seen, dispatched, _ in answers:
        assert seen == dispatched
        assert seen >= 5  # gradients reduced, norm summed, parameters gathered, and more
    assert compare_traces({rank: answer[2] for rank, answer in enumerate(answers)}) == []


def _trace(calls: dict[Group, list[Collective]]) -> Trace:
    return Trace(collectives=calls)


def test_equal_sequences_agree() -> None:
    assert compare_traces({rank: _trace({WORLD: [NORM, ZEROS]}) for rank in range(3)}) == []


def test_the_first_difference_is_named_with_what_every_member_called() -> None:
    traces = {0: _trace({WORLD: [NORM, ZEROS]}), 1: _trace({WORLD: [NORM, NORM]}), 2: _trace({WORLD: [NORM, ZEROS]})}
    (mismatch,) = compare_traces(traces)
    assert str(mismatch) == (
        "collective 1 of default[0, 1, 2]: rank 0: allreduce(int64[1]; sum); rank 1: allreduce(float32[1]; sum); "
        "rank 2: allreduce(int64[1]; sum)"
    )


def test_a_member_that_never_called_is_named() -> None:
    (mismatch,) = compare_traces({0: _trace({EP: [NORM]}), 1: _trace({}), 2: _trace({})})
    assert (mismatch.group, mismatch.position) == (EP, 0)
    assert mismatch.calls == {0: "allreduce(float32[1]; sum)", 1: "nothing"}


def test_another_reduction_or_root_is_a_difference() -> None:
    other = _allreduce(reduction=dist.ReduceOp.MAX)
    assert len(compare_traces({0: _trace({EP: [NORM]}), 1: _trace({EP: [other]})})) == 1


def test_uneven_token_exchange_is_no_difference_but_another_type_is() -> None:
    few, many, halves = _all_to_all(3), _all_to_all(5), _all_to_all(3, torch.bfloat16)
    assert compare_traces({0: _trace({EP: [few]}), 1: _trace({EP: [many]})}) == []
    assert len(compare_traces({0: _trace({EP: [few]}), 1: _trace({EP: [halves]})})) == 1
