"""Everything that would stop a job is found before it starts, each problem in one line."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_ads.config.recipes import load_recipe
from megatron_ads.launching.job_check import check_job, needs_gpu
from megatron_ads.observability import trackers
from megatron_ads.training.checkpoint_folder import FORMAT
from parity_tests.harness.real_job import write_small_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_model(tmp_path_factory.mktemp("check") / "model")


@pytest.fixture
def words(model: Path, tmp_path: Path) -> list[str]:
    return [f"model.load={model}", f"log.dir={tmp_path / 'run'}", "layout.first_stage_layers=2"]


def _checkpoint(folder: Path, *, listed_bytes: int) -> None:
    folder.mkdir(parents=True)
    (folder / "data").write_bytes(b"12345")
    files = {"data": {"bytes": listed_bytes, "crc32": 0}}
    (folder / "manifest.json").write_text(json.dumps({"format": FORMAT, "step": 4, "files": files}))


def test_a_job_that_can_start_has_no_problem(words: list[str]) -> None:
    found = check_job("sft/quickstart", words, 4)
    assert found.problems == ()
    assert [line.split(":")[0] for line in found.passed] == [
        "recipe", "weights", "tokenizer", "layout", "data", "checkpoint", "disk", "trackers", "folders",
    ]  # fmt: skip
    assert "4 ranks: pp 2 x dp 2 x tp 1, experts over 2" in found.passed[3]


def test_a_tracker_that_is_not_installed_is_a_problem(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    (problem,) = check_job("sft/quickstart", [*words, "log.trackers=[wandb]"], 4).problems
    assert problem.startswith("log.trackers names wandb")


def test_context_parallelism_is_planned_but_not_trained_with(words: list[str]) -> None:
    (problem,) = check_job("sft/quickstart", [*words, "layout.cp=2"], 4).problems
    assert problem.startswith("layout.cp is 2: the training step does not cut rows")


def test_all_problems_are_found_at_once(words: list[str], tmp_path: Path) -> None:
    _checkpoint(tmp_path / "run" / "checkpoints" / "step-00000004", listed_bytes=6)
    wrong = [*words, f"model.load={tmp_path}/none", "data.sources=[{kind: jsonl, path: none.jsonl}]"]
    problems = check_job("sft/quickstart", wrong, 3).problems
    for part in ("none does not exist", "does not divide the 3 ranks", "none.jsonl (data.sources)", "5 bytes long"):
        assert len([problem for problem in problems if part in problem]) == 1, part
    assert len(problems) == 4
    assert all("\n" not in problem for problem in problems)


def test_a_recipe_that_does_not_compose_is_the_only_problem(words: list[str]) -> None:
    (problem,) = check_job("sft/quickstart", [*words, "train.stepz=3"], 4).problems
    assert "train.stepz" in problem


def test_a_whole_checkpoint_is_where_the_job_goes_on(words: list[str], tmp_path: Path) -> None:
    _checkpoint(tmp_path / "run" / "checkpoints" / "step-00000004", listed_bytes=5)
    found = check_job("sft/quickstart", words, 4)
    assert any("the job continues from step 4" in line for line in found.passed)
    (problem,) = check_job("sft/quickstart", [*words, "checkpoint.resume=false"], 4).problems
    assert "checkpoint.resume is false" in problem
    few = [*words, "train.max_steps=3", "optim.warmup_steps=0"]
    (problem,) = check_job("sft/quickstart", few, 4).problems
    assert "train.max_steps is 3: the job would train nothing, and export the weights of step 4" in problem
    assert check_job("sft/quickstart", [*few, "train.max_steps=4"], 4).problems == ()


def test_checkpoints_that_the_disk_cannot_hold_are_a_problem(words: list[str]) -> None:
    (problem,) = check_job("sft/quickstart", [*words, "checkpoint.save_total_limit=100000000"], 4).problems
    assert "free, but" in problem and "checkpoint.save_total_limit = 100000000" in problem


def test_transformer_engine_layers_want_gpus_anywhere(words: list[str]) -> None:
    hidden = {"CUDA_VISIBLE_DEVICES": ""}
    assert not needs_gpu(load_recipe("sft/quickstart", words), hidden)
    assert needs_gpu(load_recipe("sft/quickstart", [*words, "model.layer_spec=te"]), hidden)


def test_the_command_prints_what_is_well_and_exits_2_over_what_is_not(words: list[str]) -> None:
    command = [sys.executable, "-m", "megatron_ads.cli", "check", "--recipe", "sft/quickstart", *words]
    well = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    if "GPU" not in well.stderr:  # a machine with fewer GPUs than ranks is told so
        assert (well.returncode, well.stderr) == (0, "")
    assert "ok    layout: 4 ranks" in well.stdout
    ill = subprocess.run([*command, "--ranks=3"], capture_output=True, text=True, timeout=120, check=False)
    assert ill.returncode == 2
    assert "megatron-ads: layout.pp" in ill.stderr
