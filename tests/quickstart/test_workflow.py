import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_ads.demo_model import Preset
from megatron_ads.errors import ConfigError
from megatron_ads.quickstart import command
from megatron_ads.quickstart.stages import Stage, run_stages
from megatron_ads.quickstart.workflow import QuickstartFolder, QuickstartPlan, make_plan


def _plan(root: Path, *overrides: str, **identity: str) -> QuickstartPlan:
    return make_plan(QuickstartFolder(root), overrides=["data=simulated_pairs", *overrides], identity=identity)


def _pretend(stage: Stage) -> Stage:
    """The same stage, with nothing but its outputs made."""

    def run() -> Mapping[str, Any]:
        for output in stage.outputs:
            output.mkdir(parents=True)
        return {}

    return replace(stage, run=run)


def _what_runs(plan: QuickstartPlan, root: Path, capsys: pytest.CaptureFixture[str]) -> list[str]:
    capsys.readouterr()
    run_stages([_pretend(stage) for stage in plan.stages], root, plan.commands)
    titles = {stage.title: stage.name for stage in plan.stages}
    lines = [line.split("] ", 1)[1] for line in capsys.readouterr().out.splitlines() if line.startswith("[")]
    return [titles[line] for line in lines if line in titles]


BEFORE = ["demo-model", "to-shards", "to-bf16", "evaluate-before"]
TRAINED = [
    "train",
    "export",
    "compare-logits",
    "evaluate-after",
    "export-fp8",
    "read-fp8",
    "verify-fp8",
    "evaluate-fp8",
]


@pytest.mark.parametrize(
    ("overrides", "identity", "redone"),
    [
        ([], {}, []),
        (["train.max_steps=20"], {}, TRAINED),
        (["optim.learning_rate=0.1"], {}, TRAINED),
        (["data.seed=9"], {}, ["evaluate-before", *TRAINED]),
        ([], {"code": "another"}, BEFORE + TRAINED),
    ],
    ids=["nothing changed", "steps", "learning rate", "data", "code"],
)
def test_a_second_run_redoes_what_depends_on_what_changed(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    overrides: list[str],
    identity: dict[str, str],
    redone: list[str],
) -> None:
    assert _what_runs(_plan(tmp_path, code="one"), tmp_path, capsys) == BEFORE + TRAINED
    second = _plan(tmp_path, *overrides, **{"code": "one", **identity})
    assert _what_runs(second, tmp_path, capsys) == redone


def test_the_commands_printed_are_the_ones_a_user_can_type(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = _plan(tmp_path, "train.max_steps=17")
    run_stages([_pretend(stage) for stage in plan.stages], tmp_path, plan.commands)
    out = capsys.readouterr().out
    assert f"      $ megatron-ads demo-model {tmp_path}/model --preset tiny --fp8\n" in out
    assert (
        "      $ megatron-ads train --recipe sft/quickstart data=simulated_pairs train.max_steps=17 "
        f"model.load={tmp_path}/" in out
    )
    (evaluation,) = [line for line in out.splitlines() if "evaluate" in line and "answers-after.jsonl" in line]
    assert evaluation.endswith("data=simulated_pairs")  # the training's settings are not its business


def test_a_dense_checkpoint_goes_the_same_way_without_experts(tmp_path: Path) -> None:
    plan = make_plan(
        QuickstartFolder(tmp_path), overrides=["data=simulated_pairs"], identity={}, rl_steps=5, preset=Preset.dense
    )
    assert [stage.name for stage in plan.stages] == [*BEFORE, *TRAINED, "train-rl", "evaluate-rl"]
    assert plan.stages[0].title == "make a small random Qwen2 checkpoint in FP8"
    assert plan.commands["to-shards"][-4:] == ["--tp", "2", "--pp", "2"]
    assert "layout.ep=1" in plan.commands["train"] and "layout.ep=1" in plan.commands["train-rl"]


def test_another_preset_starts_from_another_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _what_runs(_plan(tmp_path), tmp_path, capsys) == BEFORE + TRAINED
    dense = make_plan(QuickstartFolder(tmp_path), overrides=["data=simulated_pairs"], identity={}, preset=Preset.dense)
    assert _what_runs(dense, tmp_path, capsys) == BEFORE + TRAINED


def test_reinforcement_learning_begins_with_the_fine_tuned_shards_and_holds_the_same_rows_out(
    tmp_path: Path,
) -> None:
    overrides = ["data=simulated_pairs", "data.seed=3", "train.max_steps=17"]
    plan = make_plan(QuickstartFolder(tmp_path), overrides=overrides, identity={}, rl_steps=5)
    assert [stage.name for stage in plan.stages] == [*BEFORE, *TRAINED, "train-rl", "evaluate-rl"]
    assert " ".join(plan.commands["train-rl"]) == (
        "megatron-ads train --recipe rl/quickstart data.validation_rows=256 data=simulated_pairs data.seed=3 "
        f"train.max_steps=5 train.evaluate_every=5 model.load={tmp_path}/run/export log.dir={tmp_path}/rl"
    )
    with pytest.raises(ConfigError, match=r"train\.max_steps is 0"):
        make_plan(QuickstartFolder(tmp_path), overrides=["data=simulated_pairs"], identity={}, rl_steps=0)


def test_an_impossible_setting_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"train\.max_steps"):
        _plan(tmp_path, "train.stepz=7")
    with pytest.raises(ConfigError, match=r"16 routed experts cannot be spread evenly over layout\.ep = 3"):
        _plan(tmp_path, "layout.ep=3", "train.global_batch_size=18")
    with pytest.raises(ConfigError, match=r"data\.validation_rows is 0"):
        _plan(tmp_path, "data.validation_rows=0")


def test_another_layout_is_what_the_checkpoint_is_converted_for(tmp_path: Path) -> None:
    command = " ".join(
        _plan(tmp_path, "layout=pp4_ep2", "layout.first_stage_layers=1", "layout.last_stage_layers=1").commands[
            "to-shards"
        ]
    )
    assert command.endswith("/shards --pp 4 --ep 2 --first-stage-layers 1 --last-stage-layers 1"), command
    assert " ".join(_plan(tmp_path).commands["to-shards"]).endswith("/shards --recipe sft/quickstart")


def test_without_real_data_the_built_in_rows_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MEGATRON_ADS_DATA", raising=False)
    data = command.describe_data()
    assert (data["source"], "path" in data) == ("simulated_pairs", False)


def test_real_pairs_are_counted_and_fingerprinted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MEGATRON_ADS_DATA", str(tmp_path))
    (tmp_path / "esci_us").mkdir()
    file = tmp_path / "esci_us" / "pairs.jsonl"
    file.write_text("".join(json.dumps({"query": "q", "asin": str(number)}) + "\n" for number in range(1234)))
    before = command.describe_data()
    assert before["source"] == "esci"
    assert before["description"].startswith("1,234 real query-product pairs")
    assert before["path"] == str(file)
    file.write_text(file.read_text() + "{}\n")
    assert command.describe_data()["sha256"] != before["sha256"]


def test_a_data_folder_without_the_pairs_is_not_passed_over_in_silence(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MEGATRON_ADS_DATA", str(tmp_path))
    with pytest.raises(ConfigError, match=r"MEGATRON_ADS_DATA is .*pairs\.jsonl cannot be read"):
        command.describe_data()
