"""Parameters per rank are those of the real layouts, and belong to the parts that training freezes."""

from dataclasses import replace

import pytest

from conversion.names import Kind, parameters
from megatron_ads.config.model import FrozenPart
from megatron_ads.parameter_count import parameters_by_component
from megatron_ads.planning.weights import part_of, stage_weights, total
from tests.planning.jobs import r1_job, small_job


# Built for real by Megatron-Core 0.16.1 under pp 31 x ep 8: billions on one rank of each stage.
@pytest.mark.parametrize(
    ("stage", "billions"), [(0, "2.0936"), (1, "2.2258"), (2, "3.2846"), (29, "3.2846"), (30, "5.2407")]
)
def test_r1_stages_hold_what_megatron_builds(stage: int, billions: str) -> None:
    assert f"{total(stage_weights(r1_job(), stage)) / 1e9:.4f}" == billions


def test_the_stages_of_r1_add_up_to_the_whole_model_and_a_second_embedding() -> None:
    job = r1_job()
    held = sum(
        weight.elements * (job.layout.ep if weight.expert else 1)
        for stage in range(31)
        for weight in stage_weights(job, stage)
    )
    counted = parameters_by_component(job.shape)
    biases = (58 + 1) * 256  # router biases are no parameters
    assert held == sum(counted.values()) - biases + counted["embedding"]


@pytest.mark.parametrize("sizes", [{"tp": 2}, {"tp": 4, "etp": 2}, {"ep": 4}], ids=str)
def test_tensor_and_expert_parallelism_divide_what_they_should(sizes: dict[str, int]) -> None:
    whole = small_job()
    cut = small_job(world=8, **sizes)
    experts = total(stage_weights(whole, 0), expert=True)
    assert total(stage_weights(cut, 0), expert=True) * cut.layout.ep * cut.layout.etp == experts
    dense, cut_dense = (total(stage_weights(job, 0), expert=False) for job in (whole, cut))
    assert dense // cut.layout.tp <= cut_dense <= dense  # norms, routers and down-projections are on every rank
    assert (cut_dense == dense) == (cut.layout.tp == 1)


def test_parts_are_those_that_training_freezes() -> None:
    from megatron_ads.training.frozen import part_of as trained_part_of

    shape = small_job().shape
    named = parameters(shape)
    assert len(named) > 100
    assert {name for name in named if part_of(name, shape) != trained_part_of(name, shape)} == set()
    assert any(parameter.kind is Kind.ROUTER_BIAS for parameter in named.values())


def test_untrained_mtp_and_frozen_parts_are_not_trained() -> None:
    job = replace(small_job(mtp_loss_weight=0), frozen=frozenset([FrozenPart.experts]))
    untrained = {part for part in FrozenPart if not job.trains(part)}
    assert untrained == {FrozenPart.experts, FrozenPart.mtp}
    assert not job.trains_experts
