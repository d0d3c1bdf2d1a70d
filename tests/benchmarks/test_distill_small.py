"""The benchmark of distillation: stages build on earlier ones, and nobody is judged on what anybody learned from."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.distill_small import TASKS, DistillPath, parse, right_labels, tables
from megatron_ads.config.distillation import load_distill_recipe
from megatron_ads.config.recipes import load_job
from megatron_ads.data.jsonl import jsonl_rows
from megatron_ads.data.split import group_of
from megatron_ads.distillation.questions import write_rows
from megatron_ads.evaluation.held_out_rows import held_out


def path(out: Path, *given: str) -> DistillPath:
    return DistillPath(out, parse(["--out", str(out), "--rows", "60", "--judged", "10", *given]))


@pytest.mark.parametrize("student", [(), ("--student", "elsewhere")])
def test_every_stage_builds_on_earlier_ones(tmp_path: Path, student: tuple[str, ...]) -> None:
    stages = list(path(tmp_path, *student, "draws=5").stages())
    names = [stage.name for stage in stages]
    assert len(set(names)) == len(names) == (8 if student else 10)
    for number, stage in enumerate(stages):
        assert set(stage.after) <= set(names[:number]), stage.name
    (command,) = (stage.settings["command"] for stage in stages if stage.name == "distilled")
    config = load_distill_recipe(command[2], command[5:], out=command[4])
    assert config.draws == 5 and config.teacher.model == str(tmp_path / "teacher" / "export")
    assert config.student.load == str(
        Path("elsewhere").resolve() if student else tmp_path / "student-start-language" / "export"
    )
    assert config.judged_settings == path(tmp_path).judged


def test_no_judged_row_is_learned_from(tmp_path: Path) -> None:
    small = path(tmp_path)
    small._write_rows()
    data = load_job("sft/small", small.judged, sections=["data"]).data
    judged, others = held_out(data), jsonl_rows(small.untaught)
    assert {row.task for row in judged.tasks} <= set(TASKS) == {row.task for row in others}
    groups = [set(map(group_of, rows)) for rows in (judged.tasks, judged.training, others)]
    assert len(judged.tasks) >= 10 and all(groups)
    assert not groups[0] & groups[1] and not (groups[0] | groups[1]) & groups[2]


def test_labels_are_right_where_they_are_those_of_the_true_rows(tmp_path: Path) -> None:
    small = path(tmp_path)
    small._write_rows()
    labelled = [row for row in jsonl_rows(small.untaught) if row.label is not None]
    flipped = [replace(row, label="Bad" if row.label != "Bad" else "Good") for row in labelled[:6]]
    write_rows(tmp_path / "said.jsonl", [*flipped, *labelled[6:24]])
    assert right_labels(tmp_path / "said.jsonl", small.untaught) == {"rows": 24, "right": 0.75}


def test_tables_have_a_line_for_each_model(tmp_path: Path) -> None:
    def model(value: float) -> dict[str, Any]:
        line: dict[str, Any] = dict.fromkeys(("relevance", "diversity", "difficulty", "click_attribute_ratio"), value)
        line |= {f"{name}_95": [value - 0.125, value + 0.125] for name in tuple(line)} | {"queries": 7}
        scores = {
            "task": "query_generation", "headline_name": "follow_rules", "headline": value, "headline_95": None,
            "readable_share": 1.0, "generated": {"lines": {"model": line}},
        }  # fmt: skip
        rows = {"answers": 20, "kept": 10, "removed": {"improbable": 10}}
        agrees = {"query_ad_relevance": {"agreement": value, "agreement_95": None}}
        return {"rows": rows, "minutes": 1.5, "agreement": agrees, "scores": {"tasks": {"query_generation": scores}}}

    models = {"teacher": model(0.5) | {"rows": None}, "checked": model(0.5), "unchecked": model(0.25)}
    models |= {"true answers": model(0.75), "on_policy": model(0.625) | {"rows": None}}
    delta = {"model": 0.5, "compared": 0.25, "delta": 0.25, "delta_95": [0.125, 0.375]}
    difference = {"metrics": {"query_generation": {"relevance": delta}}, "agreement": {"query_ad_relevance": delta}}
    report = {"models": models, "difference": difference, "parameters": {"student-start": 1234}}
    report["on_policy_difference"] = {"of": "checked", **difference}
    text = tables(json.loads(json.dumps(report)))
    assert "| student-start | 1,234 |" in text
    assert "| checked | 20 | 10 | improbable 10 | 1.5 |" in text
    assert "| query_generation | true answers | follow_rules | 0.750 | – | 1.000 |" in text
    share = "75.00 (62.50 to 87.50)"
    assert f"| true answers | {share} | {share} | {share} | {share} | 7 |" in text
    assert "| query_generation | relevance | 0.250 | 0.500 | +0.250 (+0.125 to +0.375) |" in text
    agrees = "| query_ad_relevance | agreement with the teacher |"
    assert f"{agrees} 0.250 | 0.500 | +0.250 (+0.125 to +0.375) |" in text
    assert f"{agrees} 0.500 | 0.625 | +0.250 (+0.125 to +0.375) |" in text
