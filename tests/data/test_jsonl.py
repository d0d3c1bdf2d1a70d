"""Chat rows of one's own: what is accepted, and what each mistake is called."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_ads.data import jsonl
from megatron_ads.data.jsonl import jsonl_rows, parse_row, read_records
from megatron_ads.errors import DataError
from megatron_ads.rows import Role
from tests.tasks.examples import rows_of_all_tasks

USER = {"role": "user", "content": "question"}
ASSISTANT = {"role": "assistant", "content": "<think>Because.</think>answer"}
SYSTEM = {"role": "system", "content": "Be brief."}


def numbered(number: int, record: dict) -> tuple[int, dict]:
    return number, record


def write(folder: Path, *rows: Any) -> Path:
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def test_a_full_row_is_read_as_it_stands(tmp_path: Path):
    named = {"id": "r1", "task": "relevance", "group": "q", "label": "Good", "weight": 0.5}
    full = named | {"messages": [SYSTEM, USER, ASSISTANT]}
    (row,) = jsonl_rows(write(tmp_path, full))
    assert (row.id, row.task, row.weight, row.group, row.label) == ("r1", "relevance", 0.5, "q", "Good")
    assert [message.role for message in row.messages] == [Role.system, Role.user, Role.assistant]
    assert row.target == "<think>Because.</think>answer"


def test_only_messages_are_required(tmp_path: Path):
    (row,) = jsonl_rows(write(tmp_path, {"messages": [USER, ASSISTANT]}))
    assert (row.id, row.task, row.weight, row.group, row.label) == ("rows.jsonl-1", "chat", 1.0, "", None)


def test_limit_reads_no_further(tmp_path: Path):
    file = write(tmp_path, {"messages": [USER, ASSISTANT]}, {"messages": [USER, ASSISTANT]}, {"broken": 1})
    assert len(jsonl_rows(file, limit=2)) == 2


def test_empty_lines_are_skipped_and_counted_in_row_numbers(tmp_path: Path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"a": 1}\n\n{"b": 2}\n', encoding="utf-8")
    assert list(read_records(file, numbered)) == [(1, {"a": 1}), (3, {"b": 2})]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "messages must be a list"),
        ({"messages": [USER]}, "at least two"),
        ({"messages": "hello"}, "messages must be a list"),
        ({"messages": [USER, USER]}, "the last message is the user's"),
        ({"messages": [ASSISTANT, USER, ASSISTANT]}, "the first message is the assistant's"),
        ({"messages": [USER, USER, ASSISTANT]}, r"messages\[1\] is the user's after the user's"),
        ({"messages": [USER, SYSTEM, ASSISTANT]}, r"messages\[1\] is the system's after the user's"),
        ({"messages": [USER, {"role": "assistant"}]}, r"messages\[1\] must have exactly the fields"),
        ({"messages": [USER, {"role": "bot", "content": "x"}]}, r"messages\[1\]\.role is 'bot'"),
        ({"messages": [{"role": "user", "content": " "}, ASSISTANT]}, r"messages\[0\]\.content is ' '"),
        ({"messages": [USER, {"role": "assistant", "content": None}]}, r"messages\[1\]\.content is None"),
        ({"messages": [USER, {"role": "assistant", "content": "a\ud800"}]}, r"half a surrogate pair at character 1"),
        ({"messages": [USER, ASSISTANT], "wieght": 1}, "unknown field 'wieght'; known: .*weight"),
        ({"messages": [USER, ASSISTANT], "weight": -1}, "weight is -1"),
        ({"messages": [USER, ASSISTANT], "weight": float("nan")}, "weight is nan"),
        ({"messages": [USER, ASSISTANT], "weight": True}, "weight is True"),
        ({"messages": [USER, ASSISTANT], "weight": "1"}, "weight is '1'"),
        ({"messages": [USER, ASSISTANT], "id": None}, "id is None"),
        ({"messages": [USER, ASSISTANT], "label": 2}, "label is 2"),
        ({"messages": [USER, ASSISTANT], "task": "a\nb"}, r"task is 'a\\nb'; it must be a name on one line"),
        ({"prompt": "?", "data_source": "a\x1b", "extra_info": {"answer": "!"}}, r"task is 'a\\x1b'; it must be"),
    ],
)
def test_each_mistake_is_named(fields: dict[str, Any], message: str):
    with pytest.raises(DataError, match=message):
        parse_row(fields, default_id="r")


@pytest.mark.parametrize(
    "text",
    [
        "1e39",
        "3.5e38",
        "1e-46",
        "1e-39",
        "1e400",
        "-1e-46",
        "-0.1",
        "NaN",
        "Infinity",
        "1" + 400 * "0",
        '"1"',
        "[1]",
        "null",
    ],
)
def test_a_weight_that_fp32_cannot_hold_is_a_bad_row(text: str, tmp_path: Path):
    file, messages = tmp_path / "rows.jsonl", json.dumps([USER, ASSISTANT])
    file.write_text(f'{{"messages": {messages}}}\n{{"messages": {messages}, "weight": {text}}}\n')
    with pytest.raises(
        DataError, match=r"row 2: wrong_type: weight is .*; it must be a number that FP32 has, 0 or from"
    ):
        jsonl_rows(file)
    (row,) = jsonl_rows(file, rejected=tmp_path / "aside.jsonl")
    assert row.weight == 1.0


@pytest.mark.parametrize("text", ["0", "1.2e-38", "3.4e38", "2", "0.25"])
def test_a_weight_that_fp32_holds_is_kept(text: str, tmp_path: Path):
    file = tmp_path / "rows.jsonl"
    file.write_text(f'{{"messages": {json.dumps([USER, ASSISTANT])}, "weight": {text}}}\n')
    (row,) = jsonl_rows(file)
    assert row.weight == float(text) and (np.float32(row.weight) > 0) == (row.weight > 0)
    assert np.isfinite(np.float32(row.weight))


def test_errors_carry_file_and_row_number(tmp_path: Path):
    file = write(tmp_path, {"messages": [USER, ASSISTANT]}, {"messages": [USER]})
    with pytest.raises(DataError, match=r"rows\.jsonl, row 2: no_target: messages must .* setting rejected"):
        jsonl_rows(file)


def test_a_repeated_id_names_both_rows(tmp_path: Path):
    row = {"id": "same", "messages": [USER, ASSISTANT]}
    with pytest.raises(DataError, match=r"row 3: duplicate_id: id 'same' was row 1's"):
        jsonl_rows(write(tmp_path, row, {"messages": [USER, ASSISTANT]}, row))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"id": \n', "row 2: not JSON"),
        (b"[1, 2]\n", "row 2: a list, not an object"),
        (b'{"id": "\xff"}\n', "row 2: not UTF-8 at byte 8"),
        (b'{"weight": 1' + 5000 * b"0" + b"}\n", "row 2: not JSON .*digits"),
        *[
            (b'{"a": 1, "%s": "\\ud800"}\n' % field, f"row 2: {field.decode()} holds half a surrogate pair")
            for field in (b"id", b"task", b"group", b"label")
        ],
        (b'{"facts": {"query": ["\\uDFFF"]}}\n', "row 2: facts holds half a surrogate pair"),
        (b'{"\\ud800": 1}\n', r"row 2: \? holds half a surrogate pair"),
        (b'["\\ud800"]\n', "row 2: a list holds half a surrogate pair"),
        (b'{"a": 1, "b": 2, "a": 1}\n', "row 2: holds 'a' more than once"),
        (b'{"facts": {"query": "a", "query": "b"}}\n', "row 2: holds 'query' more than once"),
    ],
)
def test_a_line_that_cannot_be_read_is_named(tmp_path: Path, line: bytes, message: str):
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b'{"a": 1}\n' + line)
    with pytest.raises(DataError, match=message):
        list(read_records(file, numbered))


def test_a_huge_line_is_refused_without_reading_it_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(jsonl, "MAX_LINE_BYTES", 1000)
    with pytest.raises(DataError, match="row 1: longer than 1,000 bytes"):
        list(read_records(write(tmp_path, {"a": "x" * 2000}), numbered))


def test_a_missing_or_empty_file_is_named(tmp_path: Path):
    with pytest.raises(DataError, match="is not a file"):
        jsonl_rows(tmp_path / "absent.jsonl")
    with pytest.raises(DataError, match="has no rows"):
        jsonl_rows(write(tmp_path))


def test_bad_rows_are_counted_and_written_aside_where_a_file_is_named_for_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(jsonl, "MAX_LINE_BYTES", 1000)
    good = {"id": "a", "messages": [USER, ASSISTANT]}
    bad: list[tuple[bytes, str]] = [
        (json.dumps(good | {"id": "x" * 3000}).encode(), "cell_too_long"),
        (b'{"id": "\xff"}', "invalid_utf8"),
        (b'{"id": ', "unreadable_row"),
        (json.dumps(good).encode(), "duplicate_id"),
        (json.dumps({"messages": [USER]}).encode(), "no_target"),
        (json.dumps({"messages": [USER | {"content": " "}, ASSISTANT]}).encode(), "empty_text"),
        (json.dumps(good | {"wieght": 1}).encode(), "unknown_field"),
        (json.dumps(good | {"weight": "1"}).encode(), "wrong_type"),
    ]
    lines = [json.dumps(good).encode(), *(line for line, _ in bad), json.dumps(good | {"id": "b"}).encode()]
    file, aside = tmp_path / "rows.jsonl", tmp_path / "rejected.jsonl"
    file.write_bytes(b"\n".join(lines))
    assert [row.id for row in jsonl_rows(file, rejected=aside)] == ["a", "b"]
    rejected = [json.loads(line) for line in aside.read_text().splitlines()]
    assert [(entry["row"], entry["reason"]) for entry in rejected] == [
        (number, reason) for number, (_, reason) in enumerate(bad, 2)
    ]
    assert "2 rows used" in caplog.text
    assert "1 cell_too_long, 1 duplicate_id, 1 empty_text" in caplog.text


def test_a_file_of_bad_rows_alone_is_refused_with_their_counts(tmp_path: Path):
    file = write(tmp_path, {"messages": [USER]}, {"messages": []})
    with pytest.raises(DataError, match="holds no usable row; not used: 2 no_target"):
        jsonl_rows(file, rejected=tmp_path / "rejected.jsonl")


def test_facts_are_read_and_written(tmp_path: Path) -> None:
    examples = rows_of_all_tasks()
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row.as_dict()) + "\n" for row in examples))
    assert jsonl_rows(file) == examples


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"query": 3}, "the fact query is 3; it must be a text"),
        ({"reasoning": None}, "the fact reasoning is None; it must be a text"),
        ({"ground_truth": "Good"}, "the fact ground_truth is 'Good'; it must be an object"),
        ({"ad": "shoes"}, "the fact ad is 'shoes'; it must be an object of texts"),
        ({"ad": {"title": 5}}, "the fact ad is {'title': 5}; it must be an object of texts"),
        ({"history": {"clicks": "shoes"}}, "it must be an object of lists of texts"),
        ({"events": {"kind": "click"}}, "it must be a list of objects"),
        ({"candidates": ["a", 1]}, "it must be a list of texts"),
        ({"best_answers": []}, "it must be a list of at least one text"),
        ({"queries_wanted": "3"}, "it must be a whole number"),
    ],
)
def test_a_fact_of_another_type_is_a_bad_row(tmp_path: Path, facts: dict[str, Any], message: str) -> None:
    row = {"id": "a", "task": "query_ad_relevance", "messages": [USER, ASSISTANT]}
    file = write(tmp_path, row, row | {"id": "b", "facts": facts})
    with pytest.raises(DataError, match=rf"rows\.jsonl, row 2: wrong_type: .*{re.escape(message)}"):
        jsonl_rows(file)
    assert [row.id for row in jsonl_rows(file, rejected=tmp_path / "aside.jsonl")] == ["a"]


def test_facts_of_a_task_of_ones_own_are_of_any_type(tmp_path: Path) -> None:
    facts = {"ground_truth": 72, "user": 5, "events": "many"}
    (row,) = jsonl_rows(write(tmp_path, {"task": "school", "messages": [USER, ASSISTANT], "facts": facts}))
    assert row.facts == facts


def verl(**changes: object) -> dict[str, object]:
    return {
        "data_source": "query_ad_relevance",
        "prompt": [{"role": "user", "content": "Good?"}],
        "ability": "ads",
        "reward_model": {"style": "rule", "ground_truth": {"label": "Good", "location": None, "quality": None}},
        "extra_info": {
            "answer": "<think>So.</think><Label>Good</Label>",
            "query": "shoes",
            "index": 7,
            "id": "v",
            "ad": None,
        },
        **changes,
    }


def test_rows_in_the_form_of_verl_are_read(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    number = {"style": "rule", "ground_truth": "72"}
    school = {"answer": "<think>So.</think>#### 72", "question": "How many?", "split": "train"}
    rows = [
        verl(),
        verl(data_source="openai/gsm8k", ability="math", prompt="How many?", reward_model=number, extra_info=school),
        verl(data_source="mine", ability="next_advertiser", reward_model={"ground_truth": "Acme"}, extra_info=None),
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    judged, solved, bought = jsonl_rows(file)
    assert (judged.id, judged.task, judged.target) == (
        "v",
        "query_ad_relevance",
        "<think>So.</think><Label>Good</Label>",
    )
    assert (judged.facts["query"], judged.facts["index"], judged.facts["ground_truth"]["label"]) == ("shoes", 7, "Good")
    assert judged.facts["reasoning"] == "So." and "ad" not in judged.facts
    assert (solved.task, solved.prompt[0].content, solved.label) == ("openai/gsm8k", "How many?", "72")
    told = {"data_source": "openai/gsm8k", "ability": "math", "reward_model": number, "extra_info": school}
    assert solved.facts == {"question": "How many?", "split": "train", "ground_truth": "72", **told}
    assert (bought.task, bought.target, bought.facts["ground_truth"]) == (
        "next_advertiser", "Acme", {"advertiser": "Acme"},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"extra_info": {}}, "neither extra_info.answer nor reward_model.ground_truth is the target"),
        ({"prompt": 3}, "prompt is 3; it must be text, or messages"),
        ({"rewards": 1}, "unknown field 'rewards'; known in verl's form: ability"),
        ({"extra_info": ["x"]}, "extra_info is .*; it must be an object"),
    ],
)
def test_what_is_wrong_with_a_row_of_verl_is_named(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(verl(**changes)))
    with pytest.raises(DataError, match=message):
        jsonl_rows(file)
