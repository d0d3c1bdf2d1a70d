"""Answers made elsewhere are matched by the ids of held-out rows, and what does not match is named in one line."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_ads.cli import main
from megatron_ads.errors import DataError
from megatron_ads.evaluation.answer_records import Answer, AnswerBeam, write_answers
from megatron_ads.evaluation.given_answers import read_given_answers
from megatron_ads.evaluation.held_out_rows import held_out
from tests.evaluation.advertiser_rows import name_row

ROWS = [name_row(str(number), name) for number, name in enumerate(["Acme", "Bolt", "Cord"])]


def _file(folder: Path, *lines: dict[str, Any]) -> Path:
    file = folder / "given.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def _said(**texts: str) -> list[dict[str, Any]]:
    return [{"id": name.removeprefix("r"), "text": text} for name, text in texts.items()]


def test_answers_come_in_the_order_of_the_rows_whatever_else_a_line_holds(tmp_path: Path) -> None:
    lines = [{"id": 2, "text": "c", "ended": False, "cost": 3}, *_said(r0="a", r1="")]
    answers = read_given_answers(_file(tmp_path, *lines), ROWS)
    assert answers == [Answer(ROWS[0], "a", None), Answer(ROWS[1], "", None), Answer(ROWS[2], "c", False)]


def test_what_an_evaluation_wrote_is_read_again(tmp_path: Path) -> None:
    beams = (AnswerBeam("x", -1.5, 0.75, 3), AnswerBeam("y", -2.0, 0.25, 1))
    answers = [Answer(ROWS[0], "x", True, beams), Answer(ROWS[1], "z", False, (AnswerBeam("z", -1.0, -1.0),))]
    write_answers(tmp_path / "a.jsonl", answers)
    assert read_given_answers(tmp_path / "a.jsonl", ROWS[:2]) == answers


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (_said(r0="a", r7="b", r8="c"), "answers 2 rows that the recipe does not hold out: 7 (line 2), 8 (line 3)"),
        ([*_said(r0="a", r1="b"), *_said(r0="c")], "has several answers to 1 rows: 0 (lines 1 and 3). Keep one"),
        (_said(r1="b"), "has no answer to 2 of 3 held-out rows: 0, 2. Add them, or leave these rows out with"),
        ([{"id": "0"}], "row 1: text is None; it must be the answer to the row"),
        ([{"text": "a"}], "row 1: id is None; it must be the id of a held-out row"),
        ([{"id": "0", "text": "a", "ended": "yes"}], "row 1: ended is 'yes'; it must be true or false"),
        ([{"id": "0", "text": "a", "beams": ["b"]}], "row 1: beams is ['b']; it must be a list of objects with text"),
        ([*_said(r1="a", r2="b"), {"id": "0", "text": "a", "expected": "Bolt"}], "is expected to be 'Bolt', and the"),
    ],
)
def test_what_does_not_match_is_named(lines: list[dict[str, Any]], message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError) as refused:
        read_given_answers(_file(tmp_path, *lines), ROWS)
    assert message in str(refused.value)
    assert str(tmp_path / "given.jsonl") in str(refused.value)


def test_rows_without_an_answer_can_be_left_out_but_not_all(tmp_path: Path) -> None:
    found = read_given_answers(_file(tmp_path, *_said(r1="b")), ROWS, allow_missing=True)
    assert [answer.row.id for answer in found] == ["1"]
    with pytest.raises(DataError, match=r"no answer to 3 of 3 held-out rows: 0, 1, 2\. Add them\."):
        read_given_answers(_file(tmp_path), ROWS, allow_missing=True)


def test_rows_of_one_id_are_told_apart_by_their_source(tmp_path: Path) -> None:
    rows = [replace(ROWS[0], source=name) for name in ("east", "west")]
    with pytest.raises(DataError, match=r"2 held-out rows have the id '0'\. Add their task, or their source"):
        read_given_answers(_file(tmp_path, {"id": "0", "text": "a"}), rows)
    lines = [{"id": "0", "text": name, "source": name} for name in ("west", "east")]
    assert [answer.text for answer in read_given_answers(_file(tmp_path, *lines), rows)] == ["east", "west"]


def test_answers_that_name_their_source_are_those_of_merged_sources_too(tmp_path: Path) -> None:
    file = _file(tmp_path, {"id": "0", "text": "a", "source": "west", "task": "next_advertiser"})
    assert [answer.text for answer in read_given_answers(file, ROWS[:1])] == ["a"]
    with pytest.raises(DataError, match="answers 1 rows that the recipe does not hold out"):
        read_given_answers(file, [replace(ROWS[0], source="east")])


RECIPE = ["--recipe", "sft/quickstart", "data.sources=[{kind: builtin, rows: 60}]", "data.validation_rows=6"]


def _held_out() -> list[dict[str, Any]]:
    from megatron_ads.config.recipes import load_job

    rows = held_out(load_job(RECIPE[1], RECIPE[2:], sections=["data"]).data).tasks
    return [{"id": row.id, "text": row.target} for row in rows]


def test_they_are_scored_without_a_model_and_the_file_stays_as_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = _held_out()
    file = _file(tmp_path, *lines[:-1], {**lines[-1], "text": "?"})
    before = file.read_bytes()
    page = tmp_path / "page.html"
    assert main(["evaluate", "--answers", str(file), "--html", str(page), "--json", *RECIPE]) == 0
    scores = json.loads(capsys.readouterr().out)
    assert (scores["rows"], scores["seconds"], scores["decoding"], scores["general"]) == (6, None, None, {})
    of_task = scores["tasks"]["query_ad_relevance"]
    assert of_task["accuracy"] == pytest.approx(5 / 6)
    assert of_task["ended_share"] is None
    assert of_task["formats"]["think_tag_presence_rate"] == pytest.approx(5 / 6)
    assert file.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["given.jsonl", "page.html"]
    assert f"Evaluation of {file}" in page.read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--answers FILE --decode greedy", "--decode has no effect with --answers alone"),
        ("--answers FILE --max-new-tokens 3", "--max-new-tokens has no effect with --answers alone"),
        ("--answers FILE server.concurrency=3", "server.concurrency=3 has no effect with --answers alone"),
        ("--answers FILE --html FILE", "FILE cannot be written: answers are read from it. Name another file."),
        ("--model FILE --answers OTHER --compare OTHER", "OTHER cannot be written: answers are read from it"),
        ("--model FILE --allow-missing", "--allow-missing has no effect without --compare"),
        ("--answers ABSENT", "ABSENT is no file of answers. Check its path; --model or --url makes answers."),
    ],
)
def test_an_option_that_cannot_be_followed_is_one_clear_line(
    options: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, other, absent = _file(tmp_path), tmp_path / "other.jsonl", tmp_path / "absent.jsonl"
    other.write_text("")
    names = {"FILE": str(file), "OTHER": str(other), "ABSENT": str(absent)}
    for name, path in names.items():
        options, message = options.replace(name, path), message.replace(name, path)
    assert main(["evaluate", *options.split(), *RECIPE]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
