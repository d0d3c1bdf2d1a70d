"""A measured run sets the efficiency that its own plan then repeats."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from megatron_ads.config.recipes import load_recipe
from megatron_ads.errors import ConfigError
from megatron_ads.planning.calibrate import calibrated
from megatron_ads.planning.hardware import card_named
from megatron_ads.planning.job import load_job
from megatron_ads.planning.plan import make_plan

RECIPE = "sft/moonlight_16b_8gpu"


def write_run(folder: Path, flops_per_second: float, *, old: bool = False) -> Path:
    config = load_recipe(RECIPE, ["model.load=none", "data.sources=[{kind: jsonl, path: rows.jsonl}]"])
    (folder / "run.json").write_text(json.dumps({"recipe": asdict(config), "ranks": 8}))
    speed = {"model_flops_per_second": flops_per_second} if old else {"tflops_per_gpu": flops_per_second / 8 / 1e12}
    rows = [{"step": step} | {name: value * (step > 1) for name, value in speed.items()} for step in (1, 2, 3)]
    (folder / "metrics.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return folder


@pytest.mark.parametrize("old", [False, True], ids=["tflops_per_gpu", "model_flops_per_second"])
def test_a_run_that_reached_some_efficiency_gives_it_back(old: bool, tmp_path: Path) -> None:
    card, job = card_named("h100"), load_job(RECIPE)
    reached = make_plan(job, replace(card, efficiency=0.31))
    run = write_run(tmp_path, reached.model_flops_per_second, old=old)
    assert calibrated(card, run).efficiency == pytest.approx(0.31, rel=0.002)


def test_a_run_faster_than_the_card_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="more than 8 cards of kind a100 can"):
        calibrated(card_named("a100"), write_run(tmp_path, 8 * 312e12))


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        calibrated(card_named("a100"), tmp_path)
