"""Two models on the same rows: Delta, relative change, and the interval of a paired bootstrap."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_ads.cli import main
from megatron_ads.errors import DataError
from megatron_ads.evaluation.answer_records import Answer
from megatron_ads.evaluation.comparison import add_comparisons, deltas, on_the_same_rows
from megatron_ads.evaluation.dataset_tables import task_tables
from megatron_ads.evaluation.table_form import ScoreTable
from megatron_ads.evaluation.task_scores import task_scores
from megatron_ads.rows import ChatRow
from megatron_ads.tasks import query_generation, relevance
from megatron_ads.tasks.prompts import Ad
from megatron_ads.tasks.query_generation import GeneratedQuery, KeywordBrief
from megatron_ads.tasks.relevance import Label
from tests.evaluation.advertiser_rows import name_row


def _judged(truths: list[Label], said: list[Label]) -> list[Answer]:
    answers = []
    for number, (truth, guess) in enumerate(zip(truths, said, strict=True)):
        row = relevance.chat_row(f"r{number}", f"q{number // 2}", Ad("a"), truth, "why")
        answers.append(Answer(row, relevance.chat_row("x", "q", Ad("a"), guess, "why").target, ended=True))
    return answers


def _beside(answers: list[Answer], said: list[Label]) -> list[Answer]:
    targets = [relevance.chat_row("x", "q", Ad("a"), guess, "why").target for guess in said]
    return [replace(answer, text=text) for answer, text in zip(answers, targets, strict=True)]


BAD, FAIR, GOOD = Label.bad, Label.fair, Label.good


def test_delta_and_relative_change_are_the_models_over_the_others() -> None:
    answers = _judged([BAD, BAD, GOOD, GOOD], [BAD, BAD, GOOD, GOOD])
    found = deltas(answers, _beside(answers, [BAD, GOOD, GOOD, GOOD]))
    # Of two bad ads the other model finds one: BACC 0.75 against 1, accuracy 3/4 against 1.
    assert found["bad/balanced_accuracy"] | {"delta_95": None} == {
        "model": 1.0, "compared": 0.75, "delta": 0.25, "relative": pytest.approx(1 / 3), "delta_95": None,
    }  # fmt: skip
    assert found["accuracy"]["delta"] == 0.25


def test_resamples_draw_the_same_groups_for_both_models() -> None:
    truths = [BAD, GOOD, BAD, FAIR] * 25
    said = [GOOD if number % 7 == 0 else truth for number, truth in enumerate(truths)]
    answers = _judged(truths, said)
    # The same answers: whatever is drawn, the difference is 0, as it would not be with groups drawn for each model.
    assert deltas(answers, list(answers))["accuracy"]["delta_95"] == [0.0, 0.0]
    found = deltas(answers, _beside(answers, truths))["accuracy"]
    assert found["delta_95"][0] < found["delta"] < found["delta_95"][1] < 0


def test_a_paired_interval_is_that_of_the_mean_difference_of_groups() -> None:
    draw = np.random.default_rng(0)
    rows = [name_row(str(number), "A") for number in range(400)]
    ours = [Answer(row, "A" if draw.random() < 0.6 else "B", True) for row in rows]
    others = [Answer(row, "A" if draw.random() < 0.5 else "B", True) for row in rows]
    apart = np.array([(a.text == "A") - (b.text == "A") for a, b in zip(ours, others, strict=True)], dtype=float)
    found = deltas(ours, others)["recall@1"]
    assert found["delta"] == pytest.approx(apart.mean())
    half = 1.96 * apart.std() / 400**0.5  # the normal approximation
    assert found["delta_95"] == pytest.approx([apart.mean() - half, apart.mean() + half], abs=0.015)


def _table(tables: list[ScoreTable], begins: str) -> ScoreTable:
    return next(table for table in tables if table.name.startswith(begins))


def test_the_papers_tables_have_delta_lines() -> None:
    answers = _judged([BAD, BAD, GOOD, GOOD], [BAD, BAD, GOOD, GOOD])
    others = _beside(answers, [BAD, GOOD, GOOD, GOOD])
    scores = task_scores(answers, [])
    add_comparisons(scores, task_scores(others, []), answers, others, name="4o")
    (tables,) = task_tables(scores).values()
    bad = _table(tables, "AdNanny, table 1")
    assert [row[0] for row in bad.rows] == ["4o", "model", "Delta", "most frequent label"]
    # Model DR 25 and 50, BACC 75 and 100.
    assert [row[1:3] for row in bad.rows[:3]] == [["25.00", "75.00"], ["50.00", "100.00"], ["+25.00", "+25.00"]]
    compared = _table(tables, "Compared with 4o")
    assert compared.head == ["", "4o", "model", "Delta", "relative", "95 % of resampled groups"]
    line = next(row for row in compared.rows if row[0] == "bad/balanced_accuracy")
    assert line[1:5] == ["0.7500", "1.0000", "+0.2500", "+33.33 %"]


def test_rankings_have_a_delta_line() -> None:
    answers = [Answer(name_row(str(number), "A"), "A", True) for number in range(4)]
    others = [replace(answer, text="B" if number else "A") for number, answer in enumerate(answers)]
    scores = task_scores(answers, [answer.row for answer in answers])
    add_comparisons(scores, task_scores(others, []), answers, others, name="before")
    (tables,) = task_tables(scores).values()
    rows = _table(tables, "Rankings").rows
    assert [row[0] for row in rows[:3]] == ["before", "model", "Delta"]
    assert rows[2][1].startswith("+0.750 (")


def test_generated_queries_have_deltas_of_table_6_with_intervals() -> None:
    def row(keyword: str, query: str) -> ChatRow:
        brief = KeywordBrief(keyword, Ad(title=f"{keyword} shop"))
        return query_generation.chat_row(keyword, brief, [GeneratedQuery(query, "why")], "because")

    keywords = ["running shoes", "coffee brewer", "garden chair", "dog treats"]
    training = [row(keyword, f"cheap {keyword}") for keyword in keywords]
    answers = [Answer(one, one.target, True) for one in training]
    off = row("x", "cheap coffee brewer").target
    others = [replace(answer, text=off if number % 2 == 0 else answer.text) for number, answer in enumerate(answers)]
    scores = task_scores(answers, training)
    add_comparisons(scores, task_scores(others, training), answers, others, name="r1", training=training)
    relevance_delta = scores["query_generation"]["comparison"]["metrics"]["relevance"]
    # All queries are of their keyword; of the other model's, the first and the third are of coffee brewers.
    assert (relevance_delta["model"], relevance_delta["compared"], relevance_delta["delta"]) == (1.0, 0.5, 0.5)
    low, high = relevance_delta["delta_95"]
    assert 0 <= low < 0.5 < high <= 1
    (tables,) = task_tables(scores).values()
    delta = _table(tables, "AdNanny, table 6").rows[2]
    assert delta[0] == "Delta"
    assert delta[1] == f"+50.00 ({100 * low:+.2f} to {100 * high:+.2f})"


def test_models_are_compared_on_the_rows_that_both_answered() -> None:
    rows = [name_row(str(number), "A") for number in range(3)]
    ours, others = [Answer(row, "A", True) for row in rows[:2]], [Answer(row, "B", True) for row in rows[:0:-1]]
    both = on_the_same_rows(ours, others)
    assert [[answer.row.id for answer in of] for of in both] == [["1"], ["1"]]
    with pytest.raises(DataError, match="answered no row in common"):
        on_the_same_rows(ours[:1], others)


RECIPE = ["--recipe", "sft/quickstart", "data.sources=[{kind: builtin, rows: 60}]", "data.validation_rows=6"]


def test_two_files_are_compared_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from megatron_ads.config.recipes import load_job
    from megatron_ads.evaluation.held_out_rows import held_out

    rows = held_out(load_job(RECIPE[1], RECIPE[2:], sections=["data"]).data).tasks
    good, none = tmp_path / "good.jsonl", tmp_path / "none.jsonl"
    good.write_text("".join(json.dumps({"id": row.id, "text": row.target}) + "\n" for row in rows))
    none.write_text("".join(json.dumps({"id": row.id, "text": ""}) + "\n" for row in rows[:-1]))
    page = tmp_path / "page.html"
    command = ["evaluate", "--answers", str(good), "--compare", str(none), "--html", str(page)]
    assert main([*command, *RECIPE]) == 2
    assert f"{none} has no answer to 1 of 6 held-out rows" in capsys.readouterr().err
    assert main([*command, "--allow-missing", *RECIPE]) == 0
    out = capsys.readouterr().out
    assert "5 held-out rows answered" in out
    assert "Compared with none" in out
    assert "+1.0000" in out
    assert "<td>Delta</td>" in page.read_text()
