"""What a checkpoint takes, by its parts, and what else a plan sets memory aside for."""

from dataclasses import replace

import pytest

from megatron_ads.config.model import FrozenPart
from megatron_ads.models.parts import parameters_by_part
from megatron_ads.planning.checkpoint import PIECE_ELEMENTS
from megatron_ads.planning.hardware import card_named
from megatron_ads.planning.job import load_job
from megatron_ads.planning.plan import make_plan
from tests.planning.jobs import r1_job, small_job

H100 = card_named("h100")
EXPERTS = 2_818_572_288
"""Elements on each rank of a stage with two MoE layers, which no other rank has."""
DENSE = 3_068_559_360 - EXPERTS


def test_a_checkpoint_is_written_by_all_replicas_together() -> None:
    saved = make_plan(r1_job(), H100).checkpoint
    # BF16 weights and 12 bytes of state; dense ones are spread over 4 replicas.
    assert saved.busiest_rank_bytes == 14 * (EXPERTS + DENSE // 4)
    assert saved.busiest_node_bytes == 8 * saved.busiest_rank_bytes
    assert saved.copy_seconds == saved.busiest_rank_bytes / 10e9
    assert saved.write_seconds == saved.busiest_node_bytes / 2e9  # one rank at 1.5 GB/s is done before
    slow = make_plan(r1_job(), replace(H100, writer_bytes_per_second=1e8)).checkpoint
    assert slow.write_seconds == slow.busiest_rank_bytes / 1e8


def test_a_checkpoint_holds_every_weight_and_its_state_once() -> None:
    counted = parameters_by_part(r1_job().shape)
    trained = counted.total() - counted[FrozenPart.mtp]
    once = 14 * trained + 2 * counted[FrozenPart.mtp]
    # Counted twice: norms, routers and down-projections, which tp does not divide, and the MTP layer's embedding.
    assert once < make_plan(r1_job(), H100).checkpoint.bytes < 1.005 * once
    adapters = load_job("sft/deepseek_r1_lora")
    held = make_plan(adapters, H100).checkpoint.bytes
    assert held == pytest.approx(14 * adapters.lora.parameters(adapters.shape), rel=1e-3)  # type: ignore[union-attr]


def test_a_save_holds_a_piece_or_a_weight_of_each_rank_in_a_nodes_memory() -> None:
    assert make_plan(r1_job(), H100).checkpoint.host_bytes_per_node == 8 * 2 * 129280 * 7168 // 2  # tp 2
    assert make_plan(load_job("sft/deepseek_r1_lora"), H100).checkpoint.host_bytes_per_node == 8 * 4 * PIECE_ELEMENTS
    small = make_plan(small_job(), H100).checkpoint
    assert small.host_bytes_per_node == small.bytes  # smaller than a piece


@pytest.mark.parametrize("factor", [1.0, 3.0, 100.0])
def test_unbalanced_routing_takes_memory_where_experts_are_on_several_ranks(factor: float) -> None:
    def activations(ep: int, imbalance: float) -> int:
        job = replace(small_job(world=ep, ep=ep), routing_imbalance=imbalance)
        return make_plan(job, H100).fullest.memory.activations

    assert (activations(2, factor) > activations(2, 1.0)) == (factor > 1)
    assert activations(2, factor) <= activations(2, 2.0)  # one of two ranks cannot get more than all tokens
    assert activations(1, factor) == activations(1, 1.0)


def test_every_process_group_of_several_ranks_takes_its_share_of_a_card() -> None:
    one, two = (make_plan(small_job(world=world, ep=world), H100).fullest.memory.reserved for world in (1, 2))
    assert two - one == 3 * H100.communicator_bytes  # the job, its replicas, its experts
