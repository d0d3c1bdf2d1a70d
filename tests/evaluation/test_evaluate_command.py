import json
from pathlib import Path

import pytest

from megatron_ads.cli import main
from megatron_ads.demo_model import CONFIGS, Preset, write_demo_model

RECIPE = ["--recipe", "sft/quickstart", "data.validation_rows=6"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("evaluate") / "model"
    write_demo_model(path, CONFIGS[Preset.tiny] | {"torch_dtype": "float32"})
    return path


def test_a_random_model_is_evaluated_on_the_held_out_rows(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = tmp_path / "answers.jsonl"
    arguments = ["evaluate", "--model", str(folder), "--max-new-tokens", "4", "--batch-size", "4", "--json"]
    assert main([*arguments, "--answers", str(answers), *RECIPE]) == 0
    result = json.loads(capsys.readouterr().out)
    scores = result["tasks"]["query_ad_relevance"]
    assert result["rows"] == scores["rows"] == 6
    assert scores["readable_share"] == 0.0  # four tokens cannot hold reasoning and label
    assert scores["views"]["bad"]["baseline"]["balanced_accuracy"] == 0.5
    written = [json.loads(line) for line in answers.read_text().splitlines()]
    assert len(written) == 6
    assert {row["expected"] for row in written} <= {"Bad", "Fair", "Good"}


def test_for_people_it_prints_model_and_baseline(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "--model", str(folder), "--max-new-tokens", "2", *RECIPE]) == 0
    out = capsys.readouterr().out
    assert "balanced accuracy, defect: bad" in out
    assert "baseline (always " in out


def test_no_held_out_rows_is_one_clear_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "--model", str(folder), *RECIPE[:-1], "data.validation_rows=0"]) == 2
    err = capsys.readouterr().err
    assert "raise data.validation_rows" in err
    assert err.count("\n") == 1
