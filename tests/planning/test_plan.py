"""Plans of the shipped recipes: what fits, what a step takes, what is sent, and which mistakes are refused."""

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from conversion.published_models import published_file
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
from megatron_ads.planning.search import pipelines, ranking_seconds, search
from megatron_ads.planning.switches import switches
from megatron_ads.planning.table import plan_page
from tests.planning.jobs import r1_job, small_job

H100 = card_named("h100")


# ---- recipes ----


@pytest.mark.parametrize(
    ("recipe", "card", "ranks"),
    [
        ("deepseek_r1_671b_248gpu", "h100", 248),
        ("deepseek_r1_671b_248gpu_vpp2", "h100", 248),
        ("deepseek_r1_671b_248gpu_mtp", "h100", 248),
        ("deepseek_r1_671b_248gpu_mtp_only", "h100", 248),
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


def test_the_dense_recipe_fits_a_node_of_8_and_has_the_arithmetic_of_its_model() -> None:
    recipe = "sft/deepseek_r1_distill_qwen_7b_8gpu"
    plan = make_plan(load_job(recipe, ranks=8), card_named("h100"))
    assert plan.fits
    assert (plan.expert_less_stages, plan.job.layout.dp, plan.job.layout.tp) == ((), 4, 2)
    # 7,615,616,512 parameters less the embedding's 152,064 * 3584, 2 operations each; times 3 for the backward pass.
    # Scores: 4097 / 2 keys on average * 28 layers * 28 heads * (128 + 128) channels, 2 operations each, times 3.
    vectors = 28 * (3584 + 2 * 512 + 2 * 3584) + 3584  # biases of queries, keys and values, and norms: no products
    products = 7_615_616_512 - 152_064 * 3584 - vectors
    assert sum_over_chunks(plan.job) == 3 * (2 * products + 4097 * 28 * 28 * 256)
    # 16 bytes a parameter, 12 of them divided by 4 replicas, on half of the model: 9 bytes * 3.8 B, and activations.
    assert 34e9 < plan.stages[0].memory.peak < 55e9


FORMER = ("layout=pp31_ep8", "model.mtp_loss_weight=0.1", "model.recompute=full", "model.recompute_stages=null")
"""The R1 job with attention on single ranks and MTP trained beside layer 60."""


def test_the_r1_recipe_is_twice_as_fast_as_with_mtp_beside_layer_60_and_leaves_6_gb_of_80() -> None:
    plan, former = (make_plan(r1_job(*overrides), H100) for overrides in ((), FORMER))
    assert plan.expert_less_stages == former.expert_less_stages == (0,)
    assert plan.job.tokens_per_step == former.job.tokens_per_step == 496 * 4096
    assert former.step_seconds > 2 * plan.step_seconds
    assert plan.fullest.memory.peak < 74e9 < former.fullest.memory.peak


def test_virtual_chunks_are_faster_still_with_experts_everywhere() -> None:
    plan, twin = (make_plan(load_job(f"sft/deepseek_r1_671b_248gpu{end}"), H100) for end in ("", "_vpp2"))
    assert twin.expert_less_stages == ()
    assert twin.step_seconds < plan.step_seconds
    assert twin.fullest.memory.peak < 74e9


def test_a_last_stage_that_trains_mtp_is_the_bottleneck_and_less_so_where_it_has_no_other_layer() -> None:
    former = make_plan(r1_job(*FORMER), H100)
    # Two passes through the output layer, an MTP layer and a layer against two layers.
    assert max(former.stages, key=lambda stage: stage.flops_per_step).stage == 30
    assert former.imbalance > 1.8
    moved = make_plan(load_job("sft/deepseek_r1_671b_248gpu_mtp"), H100)
    assert moved.expert_less_stages == (0,)
    assert moved.imbalance < 1.6


@pytest.mark.parametrize(("stages", "kept"), [(None, 0), (29, 2), (1, 30)])
def test_stages_that_keep_everything_compute_nothing_again(stages: int | None, kept: int) -> None:
    job = r1_job(f"model.recompute_stages={stages or 'null'}")
    again = [
        sum(chunk_flops(job, each).recomputed for each in job.placement.stage_chunks(stage)) for stage in range(31)
    ]
    assert [stage for stage in range(31) if not again[stage]] == list(range(31 - kept, 31))


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


@pytest.mark.parametrize("trains_mtp", [False, True])
@pytest.mark.parametrize("chunks", [1, 2, 16, 31, 32, 62])
def test_pipelines_to_try_place_every_layer(chunks: int, trains_mtp: bool) -> None:
    shape = r1_job().shape
    layout = ParallelLayout(world=chunks, pp=chunks)
    found = pipelines(shape, chunks, trains_mtp=trains_mtp)
    assert found
    for pipeline in found:
        placement = place_layers(shape, layout, pipeline=pipeline)
        counts = [len(chunk.layers) for chunk in placement.chunks]
        assert sum(counts) == 61
        equal = counts[:-2] or [0]
        assert max(equal) - min(equal) <= 1


def test_the_pipelines_of_the_r1_recipes_are_among_those_that_are_tried() -> None:
    shape = r1_job().shape
    for end in ("", "_vpp2", "_mtp"):
        job = load_job(f"sft/deepseek_r1_671b_248gpu{end}")
        assert job.placement.string in pipelines(shape, 31 * job.layout.vpp, trains_mtp=job.trains_mtp)


def test_one_setting_at_a_time_says_what_it_buys() -> None:
    plan = make_plan(small_job(world=4, pp=2, ep=2, pipeline="Ett|ttmL", microbatches=8), CARDS["cpu"])
    found = {switch.setting: switch.plan for switch in switches(plan)}
    assert set(found) == {
        "model.mtp_loss_weight=0",
        "3 layers on stage 0",
        "1 layer on stage 0",
        "layout.vpp=2",
        "layout.tp=2",
        "model.recompute=selective",
        "model.recompute=full",
    }
    assert (
        found["model.mtp_loss_weight=0"].step_seconds < plan.step_seconds < found["model.recompute=full"].step_seconds
    )
    assert found["3 layers on stage 0"].job.placement.string == "Ettt|tmL"


def test_a_search_ranks_what_fits_by_speed_and_is_not_slower_than_the_recipe() -> None:
    job = small_job(world=4, pp=2, ep=2, pipeline="Ett|ttmL", microbatches=8)
    card = replace(CARDS["cpu"], context_bytes=0)
    found = search(job, card)
    seconds = [ranking_seconds(plan) for plan in found.best]
    assert found.tried > 20
    assert seconds == sorted(seconds)
    assert seconds[0] <= ranking_seconds(make_plan(job, card))
    assert {plan.job.tokens_per_step for plan in found.best} == {job.tokens_per_step}
    assert all(plan.fits for plan in (*found.best, *found.expert_less))
    assert {plan.expert_less_stages[:1] for plan in found.expert_less} == {(0,)}


def test_a_search_without_success_says_by_how_much() -> None:
    found = search(small_job(), replace(CARDS["cpu"], memory_bytes=1_000_000, context_bytes=0))
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
        (["layout.pp=30", "layout.pipeline=null"], None, "61 decoder layers = 61, which 30 chunks"),
        (["layout.pipeline='Ettt||(tt|)*28ttmL'"], None, "leaves chunk 1 .stage 1. wi"),
        ([], 247, "does not divide the 247 ranks"),
        ([], 0, "--gpus is 0"),
    ],
    ids=["ep 7", "pp 30", "stage without layers", "247 ranks", "no ranks"],
)
def test_a_wrong_layout_gets_one_clear_error(overrides: list[str], gpus: int | None, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_job("sft/deepseek_r1_671b_248gpu", overrides, ranks=gpus)


def test_a_recipe_without_a_model_says_how_to_name_one() -> None:
    with pytest.raises(
        ConfigError, match="deepseek_r1_distill_llama_8b, deepseek_r1_distill_qwen_7b, deepseek_v2_lite"
    ):
        load_job("sft/quickstart")
    for model in ("gpt", "runs/DeepSeek-R1", "deepseek-ai/gpt"):
        with pytest.raises(ConfigError, match=f"There is no model '{model}'"):
            load_job("sft/quickstart", model=model)


@pytest.mark.parametrize("name", ["deepseek_v2_lite", "DeepSeek-V2-Lite", "deepseek-ai/DeepSeek-V2-Lite"])
def test_a_published_model_is_known_by_its_name_on_the_hub(name: str) -> None:
    assert load_job("sft/quickstart", ["model.mtp_loss_weight=0"], model=name).shape.num_layers == 27


def test_a_folder_is_taken_before_a_model_of_the_hub_that_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "DeepSeek-R1"
    folder.mkdir()
    shutil.copy(published_file("moonlight_16b_a3b"), folder / "config.json")
    assert load_job("sft/quickstart", ["model.mtp_loss_weight=0"], model="DeepSeek-R1").shape.vocab_size == 163_840


# ---- the command ----


def test_the_command_prints_the_plan_and_says_by_exit_status_whether_it_fits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "plan.html"
    assert main(["plan", "--recipe", "sft/deepseek_r1_671b_248gpu", "--html", str(page)]) == 0
    printed = capsys.readouterr().out
    for expected in (
        "1.0620",
        "1.8336",
        "3.0686",
        "4.0466",
        "fits:",
        "no routed experts on stage 0: ranks 0-7",
        "1.5 times their",
    ):
        assert expected in printed
    assert max(map(len, printed.splitlines())) <= 120
    assert "\x1b" not in printed  # no colour in a log
    html = page.read_text()
    assert html.count("<rect") == 248 + 31 * 124 * 2  # every rank, and both passes of every microbatch on every stage
    assert main(["plan", "--recipe", "sft/deepseek_r1_671b_248gpu", "--gpu-memory", "64GB"]) == 1
    assert "DOES NOT FIT by 8.04 GB" in capsys.readouterr().out


def test_the_command_searches_and_says_what_one_setting_buys(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["plan", "--recipe", "sft/moonlight_16b_8gpu", "--search"]
    assert main(command) == 0
    printed = capsys.readouterr().out
    for expected in ("arrangements tried; fastest of those that fit", "one setting changed", "model.recompute=none"):
        assert expected in printed
    assert max(map(len, printed.splitlines())) <= 120
    assert main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["search"]
    assert found["best"][0]["recompute"] == "none"
    assert "layout.tp=2" in [switch["setting"] for switch in found["switches"]]


def test_routing_better_than_balanced_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--recipe", "sft/moonlight_16b_8gpu", "--routing-imbalance", "0.9"]) == 2
    assert "--routing-imbalance is 0.9; it must be at least 1" in capsys.readouterr().err


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
