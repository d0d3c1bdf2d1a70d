"""Ranks are built as Megatron-Core builds them; the checks find nothing where all is right, and name what is wrong."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

from conversion.layer_specs import LayerSpec
from megatron_ads.config.model import LayerSpecChoice, LoraConfig, LoraTarget, Recompute
from megatron_ads.planning.build_ranks import (
    RankFacts,
    _build_rank,
    build_ranks,
    check_ranks,
    checkpoint_keys,
    coverage_faults,
    expected_groups,
)
from megatron_ads.planning.costs import stage_weights, total
from megatron_ads.planning.job import PlannedJob, load_job
from tests.planning.jobs import r1_job, small_job


def expert_less_job() -> PlannedJob:
    """Stage 0 has the two dense layers only."""
    return small_job(world=4, pp=2, ep=2, pipeline="Ett|ttmL")


@cache
def built() -> tuple[RankFacts, ...]:
    return tuple(_build_rank(expert_less_job(), rank) for rank in range(4))


@pytest.mark.parametrize(
    "job",
    [
        expert_less_job(),
        small_job(world=8, pp=2, vpp=2, ep=2, pipeline="Et|t|t|tmL"),
        small_job(world=8, pp=2, tp=2, ep=2, pipeline="Ett|ttmL"),
        small_job(world=8, pp=4, ep=2, pipeline="Ett|tt|m|L"),
        small_job(world=4, tp=2, ep=2, etp=2),
        small_job(world=2, ep=2, others={"layer_spec": LayerSpecChoice.local}),
        small_job(world=4, pp=2, ep=2, pipeline="Ett|ttmL", lora=LoraConfig(rank=4)),
        # Stage 0 trains nothing.
        small_job(world=4, pp=2, ep=2, pipeline="Ett|ttmL", lora=LoraConfig(rank=4, targets=[LoraTarget.experts])),
    ],
    ids=["expert-less", "vpp 2", "tp 2", "MTP alone", "etp 2", "local layers", "adapters", "adapters of experts"],
)
def test_every_rank_of_a_small_job_is_what_the_layout_says(job: PlannedJob) -> None:
    ranks = build_ranks(job, every_rank=True)
    assert ranks.faults == ()
    counted = [total(stage_weights(job, job.layout.coordinates(rank).pp)) for rank in range(job.layout.world)]
    assert list(ranks.parameters_by_rank.values()) == counted


def test_the_model_that_is_built_is_the_recipes(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = []

    def stop(*arguments: object) -> None:
        settings.append(arguments[3])
        raise InterruptedError

    monkeypatch.setattr("megatron_ads.models.build.build_chunks", stop)
    overrides = ["model.layer_spec=local", "model.recompute=none", "model.aux_loss_coefficient=0.01"]
    bias = ["model.expert_bias_update_rate=0.001", "train.deterministic=true"]
    with pytest.raises(InterruptedError):
        build_ranks(load_job("sft/moonlight_16b_8gpu", [*overrides, *bias]))
    (built,) = settings
    assert (built.spec, built.recompute, built.deterministic) == (LayerSpec.LOCAL, Recompute.none, True)
    assert (built.aux_loss_coefficient, built.expert_bias_update_rate) == (0.01, 0.001)


def test_all_stages_of_r1_in_seconds_and_little_memory() -> None:
    command = [sys.executable, "-W", "ignore", "-m", "megatron_ads.cli", "plan", "--build-ranks", "--json"]
    done = subprocess.run(
        [*command, "--recipe", "sft/deepseek_r1_671b_248gpu"], capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
    ranks = json.loads(done.stdout)["built_ranks"]
    assert ranks["faults"] == []
    assert ranks["tensors_of_checkpoint"] == 46_183  # of the published repository
    figures = {f"{count / 1e9:.4f}" for count in ranks["parameters_by_rank"].values()}
    assert (len(ranks["parameters_by_rank"]), figures) == (31, {"1.0620", "1.8336", "3.0686", "4.0466"})
    assert ranks["peak_bytes"] < 1.5e9
    assert ranks["seconds"] < 60  # 5 s where nothing else runs


@pytest.mark.parametrize(
    "recipe",
    [
        "deepseek_r1_671b_248gpu_mtp",
        "deepseek_r1_671b_248gpu_mtp_only",
        "deepseek_r1_671b_248gpu_vpp2",
        "deepseek_r1_671b_256h100",
        "deepseek_r1_671b_32xh20",
        "deepseek_r1_lora",
        "deepseek_v2_lite_8gpu",
        "moonlight_16b_8gpu",
        "deepseek_r1_distill_qwen_7b_8gpu",
    ],
)
def test_the_other_recipes_for_real_machines_build_ranks(recipe: str) -> None:
    assert build_ranks(load_job(f"sft/{recipe}")).faults == ()


# ---- faults ----


def _without_a_tensor(facts: RankFacts) -> RankFacts:
    kept = {name: shape for name, shape in facts.tensors.items() if name != "decoder.final_layernorm.weight"}
    return replace(facts, tensors=kept)


def _with_a_wider_tensor(facts: RankFacts) -> RankFacts:
    return replace(facts, tensors={**facts.tensors, "output_layer.weight": (1000, 257)})


def _without_experts_optimizer(facts: RankFacts) -> RankFacts:
    return replace(facts, record=replace(facts.record, members={"dense": facts.record.members["dense"]}))


def _with_another_group(facts: RankFacts) -> RankFacts:
    return replace(facts, groups={**facts.groups, "ep": (2, 3, 1)})


def _with_another_message(facts: RankFacts) -> RankFacts:
    return replace(facts, message=((256, 1, 128), facts.message[1]))


def _with_another_peer(facts: RankFacts) -> RankFacts:
    return replace(facts, next_rank=3)


def _with_more_parameters(facts: RankFacts) -> RankFacts:
    grown = {"dense": tuple((name, count + 1) for name, count in facts.record.members["dense"])}
    return replace(facts, record=replace(facts.record, members={**facts.record.members, **grown}))


@pytest.mark.parametrize(
    ("spoil", "rank", "message"),
    [
        (_without_a_tensor, 3, "rank 3: decoder.final_layernorm.weight is missing in the model"),
        (_with_a_wider_tensor, 2, "rank 2: output_layer.weight is (1000, 257) in the model, (1000, 256)"),
        (_without_experts_optimizer, 0, "rank 0 (stage 0, ep 0): optimizer members [dense], without 'expert'"),
        (_with_another_group, 2, "rank 2: its ep group is (2, 3, 1), the layout says (2, 3)"),
        (_with_another_message, 3, "expects ((256, 1, 128), "),
        (_with_another_peer, 0, "rank 0: sends to rank 3, the layout says 2"),
        (_with_more_parameters, 2, "parameters of optimizer member 'dense' on stage 1"),
    ],
)
def test_a_rank_that_differs_is_named(spoil: Callable[[RankFacts], RankFacts], rank: int, message: str) -> None:
    shards = expert_less_job().shards
    assert check_ranks(shards, built()) == []
    faults = check_ranks(shards, [spoil(facts) if facts.rank == rank else facts for facts in built()])
    assert any(message in fault for fault in faults), faults


def test_an_expert_that_two_ranks_hold_and_one_that_none_does_are_found() -> None:
    shards = expert_less_job().shards
    swapped = {name.replace("weight4", "weight0"): shape for name, shape in built()[3].tensors.items()}
    faults = coverage_faults(shards, {3: swapped})
    layers = ("decoder.layers.2", "decoder.layers.3", "mtp.layers.0.transformer_layer")
    expected = {f"{layer}.mlp.experts.linear_fc{n}.weight{e}" for layer in layers for n in (1, 2) for e in (0, 4)}
    assert {fault.partition(":")[0] for fault in faults} == expected


def test_groups_of_the_published_layout() -> None:
    groups = expected_groups(r1_job("layout=pp31_ep8").layout, 8)
    assert groups["ep"] == groups["dp"] == tuple(range(8, 16))
    assert groups["pp"] == tuple(range(0, 248, 8))
    assert groups["edp"] == groups["tp"] == (8,)


def test_the_checkpoint_of_r1_has_its_published_number_of_tensors() -> None:
    assert checkpoint_keys(r1_job().shards) == 46_183


def test_shards_are_checked_for_layout_and_completeness(tmp_path: Path) -> None:
    from megatron_ads.cli import main

    model, shards = tmp_path / "model", tmp_path / "shards"
    assert main(["demo-model", str(model)]) == 0
    assert main(["convert", "to-megatron", str(model), str(shards), "--recipe", "sft/quickstart"]) == 0
    job = load_job("sft/quickstart", [f"model.load={model}"])
    assert build_ranks(job, shards=shards).faults == ()
    other = load_job("sft/quickstart", [f"model.load={model}", "layout=pp1_ep1"])
    assert any(
        "was converted for layout.pp 2, the recipe has 1" in fault for fault in build_ranks(other, shards=shards).faults
    )
    (shards / "pp01-tp0-ep01.safetensors").unlink()
    assert any("pp01-tp0-ep01.safetensors" in fault for fault in build_ranks(job, shards=shards).faults)
