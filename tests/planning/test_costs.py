"""Parameters per rank are those of the real layouts, and belong to the parts that training freezes."""

import pytest

from megatron_ads.config.model import FrozenPart, LoraConfig, LoraTarget
from megatron_ads.models.parts import parameters_by_part
from megatron_ads.planning.costs import stage_weights, total
from megatron_ads.planning.job import load_job
from megatron_ads.planning.memory import stage_memory
from tests.planning.jobs import r1_job, small_job


# Built for real by Megatron-Core 0.16.1 under pp 31 x ep 8, without and with tp 2: billions on one rank of each stage.
@pytest.mark.parametrize(
    ("stage", "billions", "halved"),
    [
        (0, "2.0936", "1.0620"),
        (1, "2.2258", "1.8336"),
        (2, "3.2846", "3.0686"),
        (29, "3.2846", "3.0686"),
        (30, "5.2407", "4.0466"),
    ],
)
def test_r1_stages_hold_what_megatron_builds(stage: int, billions: str, halved: str) -> None:
    for job, expected in ((r1_job("layout=pp31_ep8"), billions), (r1_job(), halved)):
        assert f"{total(stage_weights(job, stage)) / 1e9:.4f}" == expected


def test_the_stages_of_r1_add_up_to_the_whole_model_and_a_second_embedding() -> None:
    job = r1_job("layout=pp31_ep8")
    held = sum(
        weight.elements * (job.layout.ep if weight.expert else 1)
        for stage in range(31)
        for weight in stage_weights(job, stage)
    )
    counted = parameters_by_part(job.shape)
    assert held == counted.total() + counted[FrozenPart.embedding]


@pytest.mark.parametrize("sizes", [{"tp": 2}, {"tp": 4, "etp": 2}, {"ep": 4}], ids=str)
def test_tensor_and_expert_parallelism_divide_what_they_should(sizes: dict[str, int]) -> None:
    whole = small_job()
    cut = small_job(world=8, **sizes)
    experts = total(stage_weights(whole, 0), expert=True)
    assert total(stage_weights(cut, 0), expert=True) * cut.layout.ep * cut.layout.etp == experts
    dense, cut_dense = (total(stage_weights(job, 0), expert=False) for job in (whole, cut))
    assert dense // cut.layout.tp <= cut_dense <= dense  # norms, routers and down-projections are on every rank
    assert (cut_dense == dense) == (cut.layout.tp == 1)


ALL = LoraConfig(rank=4)
EXPERTS = LoraConfig(rank=4, targets=[LoraTarget.experts])


@pytest.mark.parametrize("lora", [ALL, EXPERTS], ids=["all", "experts"])
def test_adapters_are_all_that_trains_and_are_counted_beside_the_weights(lora: LoraConfig) -> None:
    plain, job = (small_job(lora=settings, world=4, ep=2, tp=2, etp=2) for settings in (None, lora))
    adapters = [weight for weight in stage_weights(job, 0) if job.trains(weight.part)]
    assert {weight.part for weight in adapters} == set(lora.targets)
    assert [weight for weight in stage_weights(job, 0) if weight not in adapters] == list(stage_weights(plain, 0))
    # An expert of (2 * 96, 256) and (256, 96): A (4, 256) and (4, 96), B (192, 4) and (256, 4). etp 2 halves the B of
    # the first and the A of the second; a rank has 4 of the 8 experts of each of 2 + 1 layers.
    assert total(adapters, expert=True) == 3 * 4 * 4 * (256 + 96 + 48 + 256)
    # and over all ranks, where nothing is divided, what one rank would have
    assert total(
        weight for weight in stage_weights(small_job(lora=lora), 0) if isinstance(weight.part, LoraTarget)
    ) == job.lora.parameters(job.shape)  # type: ignore[union-attr]


def test_adapters_take_no_more_than_their_own_gradients_and_optimizer_state() -> None:
    plain, job = (stage_memory(small_job(lora=lora), 0, gpu=True) for lora in (None, ALL))
    adapters = small_job(lora=ALL).lora.parameters(small_job().shape)  # type: ignore[union-attr]
    assert (job.gradients, job.optimizer, job.weights - plain.weights) == (4 * adapters, 8 * adapters, 4 * adapters)
    assert plain.gradients > 20 * job.gradients


def test_layers_of_mtp_have_adapters_if_they_are_run() -> None:
    run, left_out = (
        small_job(lora=ALL, mtp_loss_weight=weight).lora.parameters(small_job().shape)  # type: ignore[union-attr]
        for weight in (0.1, 0.0)
    )
    assert left_out < run


def test_untrained_mtp_and_frozen_parts_are_not_trained() -> None:
    job = small_job(mtp_loss_weight=0, others={"frozen": [FrozenPart.experts]})
    untrained = {part for part in (*FrozenPart, None) if not job.trains(part)}
    assert untrained == {FrozenPart.experts, FrozenPart.mtp}
    assert not job.trains_experts


def test_the_norm_before_experts_is_kept_where_all_it_feeds_is() -> None:
    alone = load_job("sft/deepseek_r1_671b_248gpu_mtp_only")
    weights = [weight for stage in range(31) for weight in stage_weights(alone, stage)]
    assert {weight.part for weight in weights if alone.trains(weight.part)} == {FrozenPart.mtp}
    fed = [FrozenPart.router, FrozenPart.experts]
    assert small_job(others={"frozen": fed}).trains(None)  # the shared experts are fed by it too
