import json
import os
import shutil
from pathlib import Path

import pytest

from megatron_ads.cli import main
from megatron_ads.data.public_data import DATA_ROOT
from megatron_ads.errors import ConfigError
from megatron_ads.inference.transformers_engine import TransformersEngine
from megatron_ads.regress import sandbox
from tests.regress.learned_questions import QUESTIONS, scale_expert, write_learned_model, write_questions


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("benchmarks")
    write_questions(folder)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    rows = [json.loads(line) for line in (data / "mmlu_stem" / "test.jsonl").read_text().splitlines()]
    return write_learned_model(tmp_path_factory.mktemp("learned") / "model", rows)


@pytest.fixture(autouse=True)
def _without_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.delenv("MEGATRON_ADS_DATA", raising=False)


def regress(base: Path, tuned: Path, data: Path, out: Path, *more: str) -> int:
    where = ["--base", str(base), "--tuned", str(tuned), "--data", str(data), "--out", str(out)]
    return main(["regress", *where, "--benchmark", "mmlu_stem", *more])


def test_a_copy_passes_and_one_scaled_expert_is_caught(
    model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(model, tmp_path / "copy")
    assert regress(model, tmp_path / "copy", data, tmp_path / "same", "--same") == 0
    report = json.loads((tmp_path / "same" / "regress.json").read_text())
    (line,) = report["benchmarks"]
    assert (line["base"], line["tuned"], line["questions"], line["other_answers"]) == (1.0, 1.0, QUESTIONS, 0)
    planted = scale_expert(model, tmp_path / "planted", factor=8.0)
    capsys.readouterr()
    # The scores of the base need not be made again.
    history = ["--history", str(tmp_path / "history.jsonl")]
    assert regress(model, tmp_path / "copy", data, tmp_path / "same", "--same", *history) == 0
    assert regress(tmp_path / "same" / "base.json", planted, data, tmp_path / "fallen", *history) == 1
    out = capsys.readouterr().out
    assert "FAILED: mmlu_stem fell by more than 1 points beyond noise" in out
    page = (tmp_path / "fallen" / "regress.html").read_text()
    assert "FAILED" in page
    assert "mmlu_stem" in page
    assert "<h2>Releases</h2>" in page and str(tmp_path / "copy") in page and "<svg" in page


def test_what_was_answered_is_not_asked_again(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = list[int]()
    answer = TransformersEngine.log_probabilities

    def counted(self: TransformersEngine, prompts: list[list[int]], answers: list[list[int]]) -> list[list[float]]:
        if len(asked) == 3:
            raise KeyboardInterrupt
        asked.append(len(prompts))
        return answer(self, prompts, answers)

    monkeypatch.setattr(TransformersEngine, "log_probabilities", counted)
    assert regress(model, model, data, tmp_path, "--batch-size", "8") == 130
    assert asked == [8, 8, 8]
    assert not (tmp_path / "base.json").exists()
    asked[:] = []
    monkeypatch.setattr(TransformersEngine, "log_probabilities", answer)
    whole = tmp_path / "whole"
    assert regress(model, model, data, tmp_path, "--batch-size", "8") == 0
    assert regress(model, model, data, whole, "--batch-size", "8") == 0
    assert (tmp_path / "base.json").read_text() == (whole / "base.json").read_text()


def test_the_first_questions_can_be_taken_alone(model: Path, data: Path, tmp_path: Path) -> None:
    assert regress(model, model, data, tmp_path, "--limit", "5") == 0
    (benchmark,) = json.loads((tmp_path / "base.json").read_text())["benchmarks"]
    assert [item["question"] for item in benchmark["items"]] == [f"mmlu_stem_questions:{number}" for number in range(5)]


REAL = Path(os.environ.get(DATA_ROOT, ""))


@pytest.mark.skipif(
    not (os.environ.get(DATA_ROOT) and all((REAL / name).is_dir() for name in ("gsm8k", "humaneval", "mmlu_stem"))),
    reason=f"{DATA_ROOT} names no folder with gsm8k, humaneval and mmlu_stem",
)
def test_the_real_questions_are_asked_without_a_network(model: Path, tmp_path: Path) -> None:
    # "--benchmark" again takes the place of the first one.
    sizes = ["--limit", "3", "--max-new-tokens", "8"]
    names = ["--benchmark", "gsm8k", "humaneval", "mmlu_stem"]
    assert regress(model, model, REAL, tmp_path, *sizes, "--same", *names) == 0
    report = json.loads((tmp_path / "regress.json").read_text())
    assert [(line["name"], line["questions"]) for line in report["benchmarks"]] == [
        ("gsm8k", 3), ("humaneval", 3), ("mmlu_stem", 3),
    ]  # fmt: skip
    assert report["benchmarks"][0]["unfinished"] == [3, 3]  # no answer fits eight tokens


def test_programs_are_not_asked_for_where_they_cannot_be_confined(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse() -> None:
        raise ConfigError("this machine cannot confine a program.")

    monkeypatch.setattr(sandbox, "require_sandbox", refuse)
    assert regress(model, model, data, tmp_path / "out", "--benchmark", "humaneval") == 2
    assert capsys.readouterr().err.splitlines()[-1] == "megatron-ads: this machine cannot confine a program."
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--benchmark", "mmlu"], "--benchmark mmlu is unknown; there are anli_r3"),
        (["--served-model", "m"], "--served-model has no effect without a server"),
        (["--data", "/nowhere"], "there is no folder /nowhere"),
        (["--tuned", "http://localhost:1/v1"], "needs --served-model NAME"),
        (["--benchmark", "piqa"], "the questions of piqa cannot be read"),
        (["--base", "/nowhere"], "/nowhere does not exist"),
    ],
)
def test_what_cannot_be_done_is_one_line(
    model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], message: str
) -> None:
    assert regress(model, model, data, tmp_path / "out", *more) == 2
    err = capsys.readouterr().err.strip().splitlines()[-1]
    assert err.startswith("megatron-ads: ")
    assert message in err


def test_scores_of_other_questions_are_refused(
    model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert regress(model, model, data, tmp_path / "five", "--limit", "5") == 0
    capsys.readouterr()
    assert regress(tmp_path / "five" / "base.json", model, data, tmp_path / "all") == 2
    assert f"5 questions were asked of one model, {QUESTIONS} of the other" in capsys.readouterr().err
