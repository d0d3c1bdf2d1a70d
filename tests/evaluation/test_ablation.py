"""The same rows are answered again, each time without one section of the users' histories."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_ads.cli import main
from megatron_ads.config.data import AdsTask, DataConfig, HistoryConfig, SourceConfig, SourceKind
from megatron_ads.demo_model import CONFIGS, Preset, write_demo_model
from megatron_ads.errors import ConfigError
from megatron_ads.evaluation.ablation import add_ablations, rows_without_sections
from megatron_ads.evaluation.answer_records import Answer
from megatron_ads.evaluation.dataset_tables import task_tables
from megatron_ads.evaluation.held_out_rows import held_out
from megatron_ads.evaluation.task_scores import task_scores
from megatron_ads.tasks.user_history import HEADINGS, Section, shown_history

SOURCE = SourceConfig(kind=SourceKind.simulator, task=AdsTask.next_advertiser, rows=60)
DATA = DataConfig(sources=[SOURCE], validation_rows=8)


def test_rows_that_show_a_section_are_the_same_but_for_it() -> None:
    rows = held_out(DATA).tasks
    without = rows_without_sections(DATA, rows)
    assert Section.past_advertisers in without
    assert Section.semantic_ids not in without  # the simulator's prompts show none
    by_id = {row.id: row for row in rows}
    for section, of_section in without.items():
        assert [row.id for row in of_section] == [row.id for row in rows if section in shown_history(row)]
        for row in of_section:
            full = by_id[row.id]
            lines = full.prompt[-1].content.splitlines()
            kept = [line for line in lines if not line.startswith(f"{HEADINGS[section]}:")]
            assert len(kept) == len(lines) - 1
            assert row.prompt[-1].content.splitlines() == kept
            assert (row.target, row.source) == (full.target, full.source)


def test_what_a_recipe_leaves_out_stays_out() -> None:
    source = replace(SOURCE, history=HistoryConfig(without=["profile", "semantic_ids"]))
    data = replace(DATA, sources=[source])
    without = rows_without_sections(data, held_out(data).tasks)
    assert Section.profile not in without
    assert not any(Section.profile in shown_history(row) for rows in without.values() for row in rows)


def test_rows_without_a_history_are_refused() -> None:
    data = replace(DATA, sources=[SourceConfig(kind=SourceKind.builtin, rows=60)])
    with pytest.raises(ConfigError, match="--ablate-history has no effect: no held-out row shows a user's history"):
        rows_without_sections(data, held_out(data).tasks)


def test_the_table_has_what_is_lost_most_first() -> None:
    rows = held_out(DATA).tasks
    answers = [Answer(row, row.target, True) for row in rows]
    wrong = [replace(answer, text="Nobody") for answer in answers]
    scores = task_scores(answers, rows)
    add_ablations(scores, answers, {Section.profile: wrong[:2], Section.past_advertisers: wrong[:4]})
    (tables,) = task_tables(scores).values()
    table = next(table for table in tables if table.name.startswith("Advertiser paper, table 4"))
    # Of eight right ones two and four become wrong; the answers to the other rows stay.
    assert [[cell.split(" ")[0] for cell in row[1:2]] for row in table.rows] == [["1.0000"], ["-0.5000"], ["-0.2500"]]
    assert [row[0] for row in table.rows] == ["everything", "without past_advertisers", "without profile"]


def test_one_command_answers_without_each_section(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, file = tmp_path / "model", tmp_path / "answers.jsonl"
    write_demo_model(model, CONFIGS[Preset.tiny] | {"torch_dtype": "float32"})
    recipe = ["--recipe", "sft/quickstart", "data=simulator", "data.validation_rows=4"]
    recipe.append("data.sources=[{kind: simulator, task: next_advertiser, rows: 40}]")
    command = ["evaluate", "--model", str(model), "--answers", str(file), "--max-new-tokens", "2", "--json"]
    assert main([*command, "--ablate-history", *recipe]) == 0
    ablation = json.loads(capsys.readouterr().out)["tasks"]["next_advertiser"]["ablation"]
    assert set(ablation["past_advertisers"]["recall@1"]) == {"without", "full", "delta", "relative", "delta_95"}
    files = {path.name for path in tmp_path.glob("*.jsonl")}
    assert files == {"answers.jsonl", *(f"answers.without-{section}.jsonl" for section in ablation)}
    assert main(["evaluate", "--answers", str(file), "--ablate-history", *recipe]) == 2
    assert "--ablate-history has no effect with --answers alone" in capsys.readouterr().err
