"""Plans of reinforcement learning: numbers worked out by hand for a small model, and the shipped recipes."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from conversion.convert import to_shards
from megatron_ads.cli import main
from megatron_ads.config.generation import ModelKind
from megatron_ads.config.model import LayoutConfig, LoraConfig
from megatron_ads.config.recipes import recipes_folder
from megatron_ads.config.rl import RolloutMode
from megatron_ads.config.teacher import TeacherConfig
from megatron_ads.demo_model import write_demo_model
from megatron_ads.models.flops import flops_per_token
from megatron_ads.planning.hardware import CARDS, card_named
from megatron_ads.planning.job import PlannedJob, PlannedRollouts, PlannedTeacher, load_job
from megatron_ads.planning.memory import stage_memory
from megatron_ads.planning.plan import make_plan
from megatron_ads.planning.rollout import BUCKET_BYTES, RolloutCosts, decoded_bytes, engine_memory, rollout_costs
from tests.planning.jobs import DENSE, SMALL, small_job

# Of the small model: attention and norms 128,112 a layer, dense feed-forward 294,912, an expert 73,728, a router 2,048.
EMBEDDING = 1000 * 256
OTHERS = EMBEDDING + 256 + 4 * 128_112 + 2 * 294_912 + 2 * (2_048 + 73_728)  # output layer, final norm, shared experts
EXPERTS = 2 * 8 * 73_728
CACHED = 4 * 4 * (40 + 16)
"""Bytes of one token: FP32, 4 layers, latent and rotated key."""
CARD = replace(
    CARDS["cpu"],
    flops_per_second=1e30,  # reading prompts takes no time
    memory_bytes_per_second=1e6,
    node_bytes_per_second=2e6,
    network_bytes_per_second=1e6,
    link_efficiency=0.5,
    writer_bytes_per_second=1e6,
    storage_bytes_per_second=4e6,
)
ROLLOUTS = PlannedRollouts(
    mode=RolloutMode.colocated, answers=8, max_new_tokens=64, batch_size=1, updates=2, has_reference=True
)


def job_with(rollouts: PlannedRollouts = ROLLOUTS, lora: LoraConfig | None = None) -> PlannedJob:
    """Return a job on 4 ranks: dp 4, and the experts of a rank are replicated on one other."""
    return replace(small_job(world=4, ep=2, mtp_loss_weight=0, lora=lora), rollouts=rollouts)


def costs_of(job: PlannedJob) -> RolloutCosts:
    found = rollout_costs(job, CARD, pipeline_seconds=30.0, update_seconds=1.0)
    assert found is not None
    return found


@pytest.mark.parametrize(("rows", "chosen"), [(1, 2 / 8), (2, 1 - 0.75**2), (1000, 1.0)])
def test_a_token_reads_the_experts_that_some_row_chooses_and_all_else_but_the_embedding(
    rows: int, chosen: float
) -> None:
    assert decoded_bytes(job_with(), rows) == pytest.approx(4 * (OTHERS + chosen * EXPERTS))


def test_an_engine_is_the_whole_model_on_every_card_beside_what_training_keeps() -> None:
    job = job_with(replace(ROLLOUTS, batch_size=64))
    engine = engine_memory(job)
    assert engine.weights == 4 * (EMBEDDING + OTHERS + EXPERTS)
    assert engine.cache == 2 * 256 * CACHED, "of 8 answers, each of 4 ranks has 2"
    assert engine.message == BUCKET_BYTES + 4 * EMBEDDING
    with_it, without = stage_memory(job, 0, gpu=False), stage_memory(replace(job, rollouts=None), 0, gpu=False)
    assert with_it.training == without.training + engine.weights
    assert with_it.peak == with_it.weights + with_it.gradients + with_it.optimizer + engine.weights + engine.message


def test_seconds_of_a_step_are_those_of_reading_memory_and_of_the_links() -> None:
    costs = costs_of(job_with())
    assert costs.generated_tokens == 8 * 64
    # Two batches of one row, each 64 tokens; behind a prompt of 192 there are 32 more on average.
    a_token = 4 * (OTHERS + EXPERTS / 4) + (192 + 32) * CACHED
    assert costs.rollout_seconds == pytest.approx(2 * 64 * a_token / 1e6)
    # A forward pass is a third of 30 s: of policy and reference, for each of two updates.
    assert costs.passes_seconds == pytest.approx(2 * 2 * 10)
    assert costs.update_seconds == 2 * 31
    assert costs.sync_seconds == pytest.approx(4 * (EMBEDDING + OTHERS + EXPERTS) / (2e6 * 0.5))
    assert costs.bound_by == "rollouts" and costs.step_seconds == pytest.approx(sum(costs.parts.values()))


def test_servers_take_weights_through_rank_0_and_storage_and_no_memory_of_the_cards() -> None:
    job = job_with(replace(ROLLOUTS, mode=RolloutMode.servers))
    costs, size = costs_of(job), 4 * (EMBEDDING + OTHERS + EXPERTS)
    assert costs.rollout_seconds is None and "rollouts" not in costs.parts
    assert costs.sync_seconds == pytest.approx(size / 1e6 + size / 1e6 + size / 4e6)  # sent, written, read
    assert stage_memory(job, 0, gpu=False) == stage_memory(replace(job, rollouts=None), 0, gpu=False)


@pytest.mark.parametrize(("overlap", "seconds"), [(False, (202, 302)), (True, (102, 200))])
def test_a_step_takes_the_longer_of_rollouts_and_updates_where_they_overlap(
    overlap: bool, seconds: tuple[int, int]
) -> None:
    costs = costs_of(job_with(replace(ROLLOUTS, mode=RolloutMode.servers, overlap=overlap)))
    assert costs.passes_seconds + costs.update_seconds == pytest.approx(102)
    costs = replace(costs, sync_seconds=0.0)
    for rollouts, wanted in zip((100.0, 200.0), seconds, strict=True):
        assert replace(costs, rollout_seconds=rollouts).step_seconds == pytest.approx(wanted)


def test_a_plan_says_what_part_of_the_servers_time_does_not_lengthen_a_step(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--recipe", "rl/deepseek_r1_671b", "rollout.max_staleness=1"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert re.search(r"on servers, whose time is not planned; \d+\.\d s of it overlap with passes and updates", printed)


@pytest.mark.parametrize(
    ("mode", "seconds"), [(RolloutMode.train_only, 62.0), (RolloutMode.rollout_only, 0.0)], ids=lambda value: str(value)
)
def test_what_a_mode_leaves_out_takes_no_time(mode: RolloutMode, seconds: float) -> None:
    costs = costs_of(job_with(replace(ROLLOUTS, mode=mode, updates=int(seconds > 0) * 2)))
    assert (costs.update_seconds, costs.sync_seconds) == (seconds, 0.0)
    assert (costs.rollout_seconds is None) == (costs.generated_tokens == 0) == (mode is RolloutMode.train_only)


def test_a_reference_and_popo_are_kept_on_the_host() -> None:
    job = job_with(replace(ROLLOUTS, gradient_passes=3))
    costs = costs_of(job)
    dense, experts = EMBEDDING + OTHERS, EXPERTS // 2  # the MTP layer is not trained
    assert costs.reference_host_bytes == 4 * (dense + experts)
    # Two of three gradients wait; a rank has a quarter of what is replicated on 4, half of what is on 2.
    assert costs.popo_host_bytes == 2 * 4 * (dense // 4 + experts // 2)
    assert costs.passes_seconds == pytest.approx(2 * (2 * 10 + 3 * 30))
    assert costs_of(job_with(replace(ROLLOUTS, has_reference=False))).reference_host_bytes == 0
    assert costs_of(job_with(lora=LoraConfig(rank=4, alpha=8))).reference_host_bytes == 0, "adapters are switched off"


@pytest.mark.parametrize(
    ("recipe", "ranks", "bound"), [("deepseek_v2_lite_8gpu", 8, "rollouts"), ("deepseek_r1_671b", 248, "sync")]
)
def test_a_recipe_for_a_real_machine_fits_it_and_says_what_bounds_a_step(
    recipe: str, ranks: int, bound: str, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = make_plan(load_job(f"rl/{recipe}"), card_named("h100"))
    assert plan.job.layout.world == ranks and plan.spare_bytes > 5e9
    assert plan.rollouts is not None and plan.rollouts.bound_by == bound
    assert f"# Ranks: {ranks}" in (recipes_folder() / "rl" / f"{recipe}.yaml").read_text()
    assert main(["plan", "--recipe", f"rl/{recipe}"]) == 0
    printed = capsys.readouterr().out
    assert f"bound by {bound} (" in " ".join(printed.split()) and max(map(len, printed.splitlines())) <= 120
    assert ("engine: on every card 31.41 GB" in printed) == (recipe == "deepseek_v2_lite_8gpu")
    assert main(["plan", "--recipe", f"rl/{recipe}", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rollouts"]["bound_by"] == bound


def test_a_teacher_is_on_the_card_of_rank_0_which_reads_all_answers_alone(tmp_path: Path) -> None:
    settings = ["train.global_batch_size=8", "train.micro_batch_size=2", f"teacher.model={tmp_path}"]
    write_demo_model(tmp_path, SMALL | {"torch_dtype": "float32"})
    job = load_job("rl/on_policy_distillation", settings, model=str(tmp_path), ranks=2)
    without = replace(job, rollouts=replace(job.rollouts, teacher=None)) if job.rollouts else job
    nbytes = sum(file.stat().st_size for file in tmp_path.glob("model*.safetensors"))
    with_it, beside = stage_memory(job, 0, gpu=True), stage_memory(without, 0, gpu=True)
    assert with_it.teacher == nbytes > 4 * (EMBEDDING + OTHERS + EXPERTS), "the MTP layer's are in the file, too"
    assert with_it.training - beside.training == with_it.kept - beside.kept == nbytes
    loading = replace(with_it, loading=10 * with_it.training)
    assert loading.peak == loading.loading + loading.reserved + nbytes, "the teacher is opened before weights are read"
    plan, plan_without = make_plan(job, CARDS["h100"]), make_plan(without, CARDS["h100"])
    assert plan.rollouts is not None and plan_without.rollouts is not None
    reading = 8 * 512 * flops_per_token(job.shape, 512) / 3  # a forward pass is a third of a step
    rate = plan.card.flops_per_second * plan.card.efficiency
    assert plan.rollouts.parts["teacher"] == pytest.approx(reading / rate)
    gained = plan.rollouts.step_seconds - plan_without.rollouts.step_seconds
    assert gained == pytest.approx(reading / rate)
    assert "teacher" not in plan_without.rollouts.parts


def test_a_teacher_of_any_format_is_planned_as_the_model_that_rank_0_loads(tmp_path: Path) -> None:
    write_demo_model(tmp_path / "hf", DENSE | {"torch_dtype": "float32"})
    to_shards(tmp_path / "hf", tmp_path / "shards", LayoutConfig(tp=2))
    stored, divided = (
        PlannedTeacher.of(TeacherConfig(kind=ModelKind.local, model=str(tmp_path / name))) for name in ("hf", "shards")
    )
    weights = [file.stat().st_size for file in (tmp_path / "hf").glob("*.safetensors")]
    assert stored.nbytes == sum(weights) and stored.shape == divided.shape is not None
    # Files have headers, too; what both ranks have is counted once.
    assert 0 < stored.nbytes - divided.nbytes < 0.01 * stored.nbytes


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        (["teacher.model=NOWHERE"], "teacher: there is no checkpoint yet; what it takes of the card of rank 0 is not"),
        (
            ["teacher.kind=endpoint", "teacher.url=http://x/v1", "teacher.model=m", "teacher.tokenizer=t"],
            "teacher: a server, whose time is not planned",
        ),
        (["teacher.model=NOWHERE", "rollout.mode=train_only", "rollout.dump=runs/dump"], None),
    ],
)
def test_what_is_not_known_of_a_teacher_is_said(
    settings: list[str], line: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["plan", "--recipe", "rl/on_policy_distillation", "--model", "deepseek_v2_lite", *settings])
    told = [each for each in capsys.readouterr().out.splitlines() if each.startswith("teacher: ")]
    assert [each.startswith(line) for each in told] == [True] if line else not told


def test_a_plan_of_fine_tuning_has_no_rollouts(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--recipe", "sft/moonlight_16b_8gpu", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rollouts"] is None


def test_a_draw_may_be_repeated_and_what_trains_nothing_has_no_reference(capsys: pytest.CaptureFixture[str]) -> None:
    recipe, settings = "rl/deepseek_v2_lite_8gpu", ["policy.kl_coef=0.1", "rollout.dynamic_sampling=true"]
    modes = [f"rollout.mode={mode}" for mode in (RolloutMode.colocated, RolloutMode.rollout_only)]
    found = [load_job(recipe, [*settings, mode]).rollouts for mode in modes]
    assert [(each.has_reference, each.draws) for each in found if each] == [(True, 3), (False, 3)]
    assert main(["plan", "--recipe", recipe, *settings, modes[1]]) == 0
    lines = capsys.readouterr().out.splitlines()
    printed = " ".join(" ".join(lines).split())
    assert "reference: none, nothing is trained" in printed and "tokens a draw of prompts, of at most 3 in" in printed
    assert max(map(len, lines)) <= 120
