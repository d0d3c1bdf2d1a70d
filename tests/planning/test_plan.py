"""Plans of the shipped recipes: what fits, what a step takes, what is sent, and which mistakes are refused."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from megatron_ads.cli import main
from megatron_ads.config.model import Recompute
from megatron_ads.config.recipes import load_recipe, recipes_folder
from megatron_ads.errors import ConfigError
from megatron_ads.layout import ParallelLayout, place_layers
from megatron_ads.models.flops import flops_per_token
from megatron_ads.planning.build_ranks import BuiltRanks
from megatron_ads.planning.costs import chunk_flops, stage_traffic
from megatron_ads.planning.hardware import CARDS, card_named
from megatron_ads.planning.job import PlannedJob, load_job
from megatron_ads.planning.plan import calibrated, make_plan
from megatron_ads.planning.search import even_pipeline, interleaved, search
from megatron_ads.planning.table import plan_page
from tests.planning.jobs import r1_job, small_job

H100 = card_named("h100")


# ---- recipes ----


@pytest.mark.parametrize(
    ("recipe", "card", "ranks"),
    [
        ("deepseek_r1_671b_248gpu", "h100", 248),
        ("deepseek_r1_671b_256h100", "h100", 256),
        ("deepseek_r1_671b_32xh20", "h20", 256),
        ("deepseek_r1_lora", "h100", 32),
        ("deepseek_v2_lite_8gpu", "h100", 8),
        ("moonlight_16b_8gpu", "h100", 8),
    ],
)
def test_a_recipe_for_a_real_machine_fits_it(recipe: str, card: str, ranks: int) -> None:
    plan = make_plan(load_job(f"sft/{recipe}"), card_named(card))
    assert plan.job.layout.world == ranks
    assert plan.fits, f"lacks {-plan.spare_bytes / 1e9:.2f} GB"
    assert 0.05 < plan.model_flops_utilization < plan.card.efficiency
    assert f"# Ranks: {ranks}" in (recipes_folder() / "sft" / f"{recipe}.yaml").read_text()


def test_the_published_layout_leaves_stage_0_without_experts_and_vpp_2_does_not() -> None:
    plan = make_plan(r1_job(), H100)
    twin_job = interleaved(plan.job, 2)
    assert twin_job is not None
    twin = make_plan(twin_job, H100)
    assert (plan.expert_less_stages, twin.expert_less_stages) == ((0,), ())
    assert twin_job.placement.string == "Et|" + "t|" * 60 + "mL"
    assert twin.timeline.bubble < plan.timeline.bubble
    assert twin.fullest.memory.peak > plan.fullest.memory.peak  # more microbatches in flight


def test_the_last_stage_of_r1_is_the_bottleneck() -> None:
    plan = make_plan(r1_job(), H100)
    # Two passes through the output layer, an MTP layer and a layer against two layers.
    assert max(plan.stages, key=lambda stage: stage.flops_per_step).stage == 30
    assert plan.imbalance > 1.8


# ---- arithmetic ----


def sum_over_chunks(job: PlannedJob) -> int:
    flops = [chunk_flops(job, chunk) for chunk in job.placement.chunks]
    return sum(each.forward + each.backward for each in flops)


@pytest.mark.parametrize("recipe", ["deepseek_r1_671b_248gpu", "deepseek_v2_lite_8gpu", "moonlight_16b_8gpu"])
def test_chunks_add_up_to_the_arithmetic_of_the_model(recipe: str) -> None:
    job = load_job(f"sft/{recipe}")
    assert sum_over_chunks(job) == flops_per_token(job.shape, job.seq_length, with_mtp=job.trains_mtp)


@pytest.mark.parametrize("targets", ["[attention]", "[dense,shared_experts,experts]"])
def test_chunks_with_adapters_add_up_to_the_arithmetic_of_the_model(targets: str) -> None:
    job = load_job("sft/deepseek_r1_lora", [f"model.lora.targets={targets}"])
    counted = flops_per_token(job.shape, job.seq_length, with_mtp=job.trains_mtp, lora=job.lora)
    assert sum_over_chunks(job) == counted


def test_recomputing_whole_layers_costs_a_third_forward_pass_of_them() -> None:
    full, none = (small_job(recompute=recompute) for recompute in (Recompute.full, Recompute.none))
    full_flops, flops = (make_plan(job, H100).stages[0].flops_per_step for job in (full, none))
    outputs = 3 * 2 * 2 * 256 * 1000 * 256 * 4  # two output layers, not computed again; 4 microbatches of 256 tokens
    eh_proj = 0  # computed again with its layer
    assert (full_flops - outputs) * 3 == (flops - outputs + eh_proj) * 4


def test_bytes_sent_per_step() -> None:
    job = small_job(world=4, pp=2, ep=2, pipeline="Ett|ttmL", microbatches=4)
    sent = {group.group: group.bytes_per_step for group in stage_traffic(job, 1, CARDS["cpu"])}
    hidden = 256 * 256 * 4  # tokens * width * FP32
    assert sent["pp"] == 4 * hidden  # gradients of four microbatches, back to stage 0
    # three MoE layers, tokens there and back in both passes, two experts each, half of them on the other rank
    assert sent["ep"] == 4 * 3 * 4 * 2 * hidden // 2
    assert "edp" not in sent
    dense = sum(weight.elements for weight in make_plan(job, H100).stages[1].weights if not weight.expert)
    assert sent["dp"] == dense * 8 // 2  # FP32 gradients scattered, FP32 weights gathered, half of each elsewhere


def test_groups_that_leave_the_node_are_told_apart() -> None:
    traffic = {
        group.group: group.off_node for group in stage_traffic(load_job("sft/deepseek_r1_671b_256h100"), 1, H100)
    }
    # 16 consecutive ranks are two nodes of 8: of 15 peers, 8 are on the other one
    assert traffic == {"pp": 1.0, "dp": pytest.approx(8 / 15), "ep": pytest.approx(8 / 15)}


# ---- search ----


@pytest.mark.parametrize("chunks", [1, 2, 16, 31, 32, 62])
def test_even_pipelines_place_every_layer(chunks: int) -> None:
    shape = r1_job().shape
    layout = ParallelLayout(world=chunks, pp=chunks)
    placement = place_layers(shape, layout, pipeline=even_pipeline(shape, chunks))
    counts = [len(chunk.layers) for chunk in placement.chunks]
    assert sum(counts) == 61
    assert max(counts[:-1] or counts) - min(counts[:-1] or counts) <= 1


def test_a_search_ranks_what_fits_by_speed_and_is_not_slower_than_the_recipe() -> None:
    job = small_job(world=4, pp=2, ep=2, pipeline="Ett|ttmL", microbatches=8)
    card = replace(CARDS["cpu"], reserved_bytes=0)
    found = search(job, card)
    steps = [plan.step_seconds for plan in found.best]
    assert found.tried > 20
    assert steps == sorted(steps)
    assert steps[0] <= make_plan(job, card).step_seconds
    assert {plan.job.tokens_per_step for plan in found.best} == {job.tokens_per_step}
    assert all(plan.fits for plan in found.best)


def test_a_search_without_success_says_by_how_much() -> None:
    found = search(small_job(), replace(CARDS["cpu"], memory_bytes=1_000_000, reserved_bytes=0))
    assert found.best == ()
    assert found.nearest is not None
    assert found.nearest.spare_bytes < 0


# ---- calibration ----


def write_run(folder: Path, flops_per_second: float, *, old: bool = False) -> Path:
    config = load_recipe(
        "sft/moonlight_16b_8gpu", ["model.load=none", "data.sources=[{kind: jsonl, path: rows.jsonl}]"]
    )
    (folder / "run.json").write_text(json.dumps({"recipe": asdict(config), "ranks": 8}))
    speed = {"model_flops_per_second": flops_per_second} if old else {"tflops_per_gpu": flops_per_second / 8 / 1e12}
    rows = [{"step": step} | {name: value * (step > 1) for name, value in speed.items()} for step in (1, 2, 3)]
    (folder / "metrics.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return folder


@pytest.mark.parametrize("old", [False, True], ids=["tflops_per_gpu", "model_flops_per_second"])
def test_a_run_that_reached_some_efficiency_gives_it_back(old: bool, tmp_path: Path) -> None:
    card, job = card_named("h100"), load_job("sft/moonlight_16b_8gpu")
    reached = make_plan(job, replace(card, efficiency=0.31))
    run = write_run(tmp_path, reached.model_flops_per_second, old=old)
    assert calibrated(card, run).efficiency == pytest.approx(0.31, rel=0.002)


def test_a_run_faster_than_the_card_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="more than 8 cards of kind a100 can"):
        calibrated(card_named("a100"), write_run(tmp_path, 8 * 312e12))


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        calibrated(card_named("a100"), tmp_path)


# ---- mistakes ----


@pytest.mark.parametrize(
    ("overrides", "gpus", "message"),
    [
        (["layout.ep=7"], None, "256 routed experts cannot be spread evenly over layout.ep = 7"),
        (["layout.pp=30", "layout.last_stage_layers=null"], None, "61 decoder layers = 61, which 30 chunks"),
        (
            ["layout.pipeline='Ettt||(tt|)*28ttmL'", "layout.last_stage_layers=null"],
            None,
            "leaves chunk 1 .stage 1. wi",
        ),
        ([], 247, "does not divide the 247 ranks"),
        ([], 0, "--gpus is 0"),
    ],
    ids=["ep 7", "pp 30", "stage without layers", "247 ranks", "no ranks"],
)
def test_a_wrong_layout_gets_one_clear_error(overrides: list[str], gpus: int | None, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_job("sft/deepseek_r1_671b_248gpu", overrides, ranks=gpus)


def test_a_recipe_without_a_model_says_how_to_name_one() -> None:
    with pytest.raises(ConfigError, match="deepseek_r1, deepseek_v2_lite, moonlight_16b_a3b"):
        load_job("sft/quickstart")
    with pytest.raises(ConfigError, match="There is no model 'gpt'"):
        load_job("sft/quickstart", model="gpt")


# ---- the command ----


def test_the_command_prints_the_plan_and_says_by_exit_status_whether_it_fits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "plan.html"
    assert main(["plan", "--recipe", "sft/deepseek_r1_671b_248gpu", "--html", str(page)]) == 0
    printed = capsys.readouterr().out
    for expected in (
        "2.0936",
        "2.2258",
        "3.2846",
        "5.2407",
        "fits:",
        "no routed experts on stage 0: ranks 0-7",
        "vpp 2",
    ):
        assert expected in printed
    assert max(map(len, printed.splitlines())) <= 120
    assert "\x1b" not in printed  # no colour in a log
    html = page.read_text()
    assert html.count("<rect") == 248 + 31 * 62 * 2  # every rank, and both passes of every microbatch on every stage
    assert main(["plan", "--recipe", "sft/deepseek_r1_671b_248gpu", "--gpu-memory", "64GB"]) == 1
    assert "DOES NOT FIT by 14.96 GB" in capsys.readouterr().out


def test_the_command_prints_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--recipe", "sft/moonlight_16b_8gpu", "--gpu", "h200", "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert (values["ranks"], values["fits"], len(values["stages"])) == (8, True, 1)
    assert values["stages"][0]["memory"]["peak"] == values["peak_bytes"]


def test_the_former_name_of_an_option_still_works_and_names_the_new_one(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    built = BuiltRanks(
        world=8, parameters_by_rank={0: 1}, tensors_of_checkpoint=1, shards=None, faults=(), seconds=0.0, peak_bytes=0
    )
    monkeypatch.setattr("megatron_ads.planning.build_ranks.build_ranks", lambda *_, **__: built)
    for option, key, note in (("--build-ranks", "built_ranks", ""), ("--rehearse", "rehearsal", "now called --build")):
        assert main(["plan", "--recipe", "sft/moonlight_16b_8gpu", "--json", option]) == 0
        captured = capsys.readouterr()
        assert json.loads(captured.out)[key]["world"] == 8
        assert note in captured.err


def test_a_page_that_cannot_be_written_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "absent" / "plan.html"
    assert main(["plan", "--recipe", "sft/moonlight_16b_8gpu", "--html", str(page)]) == 2
    assert capsys.readouterr().err == (
        f"megatron-ads: {page} cannot be read or written (No such file or directory). "
        "Check the path and its permissions.\n"
    )


def test_unknown_cards_and_stray_options_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--recipe", "sft/moonlight_16b_8gpu", "--gpu", "v100"]) == 2
    assert main(["plan", "--recipe", "sft/moonlight_16b_8gpu", "--every-rank"]) == 2
    assert "add --build-ranks" in capsys.readouterr().err


def test_a_recipes_path_cannot_become_markup() -> None:
    script = "<script>x</script>"
    plan = make_plan(load_job("sft/moonlight_16b_8gpu"), H100)
    page = plan_page(f"recipes/{script}.yaml", replace(plan, card=replace(plan.card, name=script)))
    assert "<script" not in page
    for shown in ("Plan of recipes/", 'class="lead">8 x '):
        assert f"{shown}&lt;script&gt;" in page
