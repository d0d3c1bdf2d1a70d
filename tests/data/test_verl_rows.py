"""Files that were made for verl are read as they are, rows that are a prompt alone included."""

import json
from datetime import date
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_ads.config.data import DataConfig, SourceConfig, SourceKind
from megatron_ads.data.corpus import read_corpus
from megatron_ads.data.sources import describe_source, divided, files_of, read_source
from megatron_ads.data.verl_rows import verl_rows
from megatron_ads.errors import ConfigError, DataError
from megatron_ads.rows import ChatRow, Fact
from megatron_ads.tasks.next_advertiser import ranking_answer
from megatron_ads.tasks.row_checks import RowFault, check_rows
from tests.rewards.rollouts import answers, values

ROWS: list[dict[str, Any]] = [
    {
        "data_source": "openai/gsm8k",
        "prompt": [{"role": "system", "content": "Be short."}, {"role": "user", "content": "3 + 4?"}],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": "7"},
        "extra_info": {"split": "train", "index": 0, "answer": "3 and 4 are 7 #### 7"},
    },
    {
        "data_source": "mine",
        "prompt": [{"role": "user", "content": "Name two primes."}],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": "2, 3"},
        "extra_info": {"split": "train", "index": 1},
    },
]


def parquet(folder: Path, rows: list[dict[str, Any]]) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), folder / "rows.parquet")
    return folder / "rows.parquet"


def jsonl(folder: Path, rows: list[dict[str, Any]]) -> Path:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "rows.jsonl"


def fields_of(row: ChatRow) -> dict[str, Any]:
    """Return the fields of verl that a row was read from, without the prompt."""
    return {name: row.facts[name] for name in ("data_source", "ability", "reward_model", "extra_info")}


@pytest.mark.parametrize("write", [parquet, jsonl])
def test_rows_are_read_as_they_are(tmp_path: Path, write: Any) -> None:
    first, second = verl_rows(write(tmp_path, ROWS))
    assert [(message.role, message.content) for message in first.prompt] == [
        ("system", "Be short."),
        ("user", "3 + 4?"),
    ]
    assert (first.task, first.target, first.label) == ("openai/gsm8k", "3 and 4 are 7 #### 7", "7")
    assert (second.task, second.target, second.label) == ("mine", "2, 3", None)
    assert fields_of(first) == {name: value for name, value in ROWS[0].items() if name != "prompt"}
    filled = {"answer": None} if write is parquet else {}  # Parquet's rows have the same fields, as verl reads them too
    assert second.facts["extra_info"] == ROWS[1]["extra_info"] | filled
    assert [row.facts["index"] for row in (first, second)] == [0, 1]


@pytest.mark.parametrize(
    ("truth", "target"),
    [(["a", "b"], '["a", "b"]'), (42, "42"), ({"day": date(2025, 3, 1)}, '{"day": "2025-03-01"}'), (None, "none")],
)
def test_a_prompt_alone_has_the_ground_truth_for_a_target(tmp_path: Path, truth: Any, target: str) -> None:
    (row,) = verl_rows(parquet(tmp_path, [{**ROWS[1], "reward_model": {"style": "rule", "ground_truth": truth}}]))
    assert (row.target, row.facts.get("ground_truth"), row.prompt[0].content) == (target, truth, "Name two primes.")
    assert row.facts["reward_model"] == {"style": "rule", "ground_truth": truth}


def test_columns_may_be_missing_and_others_are_not_read(tmp_path: Path) -> None:
    (row,) = verl_rows(parquet(tmp_path, [{"prompt": "Hello?", "embedding": [1.0], "data_source": "mine"}]))
    assert (row.id, row.task, row.prompt[0].content) == ("rows.parquet-1", "mine", "Hello?")
    with pytest.raises(DataError, match=r"has no column 'prompt'; kind verl reads data_source, prompt"):
        verl_rows(parquet(tmp_path, [{"question": "Hello?"}]))


def test_rows_that_cannot_be_used_are_named_and_written_aside(tmp_path: Path) -> None:
    wrong = [{**ROWS[0], "prompt": [{"role": "robot", "content": "x"}]}, {**ROWS[0], "extra_info": {"id": "a"}}]
    file = jsonl(tmp_path, wrong)
    with pytest.raises(DataError, match=r"row 1: wrong_type: messages\[0\]\.role is 'robot'"):
        verl_rows(file)
    assert [row.id for row in verl_rows(file, rejected=tmp_path / "aside.jsonl")] == ["a"]
    assert json.loads((tmp_path / "aside.jsonl").read_text())["row"] == 1


@pytest.mark.parametrize("prompt", [None, [], 7])
def test_a_row_without_a_prompt_is_told_of_the_field_that_it_lacks(tmp_path: Path, prompt: Any) -> None:
    with pytest.raises(DataError, match=r"row 1: wrong_type: prompt is (None|\[\]|7); it must be text, or messages"):
        verl_rows(jsonl(tmp_path, [{**ROWS[0], "prompt": prompt}]))


def ads_row(task: str, truth: Any = None, **extra: Any) -> dict[str, Any]:
    """Return a row of an ads task without an answer."""
    rule = {"style": "rule"} | ({} if truth is None else {"ground_truth": truth})
    return {"data_source": task, "prompt": "Which?", "ability": "ads", "reward_model": rule, "extra_info": extra}


def read_one(folder: Path, row: dict[str, Any], write: Any = jsonl) -> ChatRow:
    """Return a row as a job has it, read and checked."""
    (read,) = check_rows(verl_rows(write(folder, [row]))).rows
    return read


@pytest.mark.parametrize("write", [parquet, jsonl])
@pytest.mark.parametrize(
    ("task", "truth", "label"),
    [
        ("query_ad_relevance", "Good", "Good"),
        ("query_ad_relevance", {"label": "Good"}, "Good"),
        ("query_ad_relevance", {"label": "Good", "location": "Bad", "quality": "Good"}, "Good"),
        ("query_ad_relevance", "<think>So.</think><Label>Good</Label>", "Good"),
        ("ad_user_relevance", 3, "3"),
        ("ad_user_relevance", {"score": "3"}, "3"),
        ("next_advertiser", "Acme", "Acme"),
        ("next_advertiser", {"advertiser": "Acme"}, "Acme"),
        ("next_advertiser_ranking", "Acme & Sons", "Acme & Sons"),
        ("user_profile", {"interests": ["running"]}, None),
        ("query_generation", {"queries": ["red shoes"]}, None),
        ("query_ad_relevance", None, None),
        ("next_advertiser", None, None),
    ],
    ids=str,
)
def test_a_row_of_an_ads_task_needs_no_answer(
    task: str, truth: Any, label: str | None, write: Any, tmp_path: Path
) -> None:
    row = read_one(tmp_path, ads_row(task, truth, index=0), write)
    assert (row.task, row.label, row.facts["reward_model"].get("ground_truth")) == (task, label, truth)
    assert (row.facts.get(Fact.prompt_alone) is True) == (truth is None or isinstance(truth, dict))


def test_a_ground_truth_is_what_the_tasks_own_rewards_compare_answers_with(tmp_path: Path) -> None:
    for truth in ("Good", {"label": "Good"}):
        row = read_one(tmp_path, ads_row("query_ad_relevance", truth))
        given = answers(row, [f"<Label>{label}</Label>" for label in ("Good", "Fair", "Bad")])
        assert values("label_agreement", given) == pytest.approx([1.2, 0.7, 0.2])
    row = read_one(tmp_path, ads_row("next_advertiser_ranking", "Acme"))
    given = answers(row, [ranking_answer(names, []) for names in (["Acme", "Other"], ["Other", "Acme"], ["Other"])])
    first, second, absent = values("advertiser_ranking", given)
    assert first > second > absent


@pytest.mark.parametrize(
    ("truth", "extra", "fault"),
    [
        ("Excellent", {}, RowFault.unreadable_target),
        ({"label": "Excellent"}, {}, RowFault.unreadable_ground_truth),
        ({"score": 3}, {}, RowFault.unreadable_ground_truth),
        ({"label": "Good"}, {"label": "Bad"}, RowFault.label_differs),
        ("Good", {"label": "Bad"}, RowFault.label_differs),
    ],
    ids=str,
)
def test_a_ground_truth_that_is_no_label_of_the_task_is_a_fault(
    truth: Any, extra: dict[str, Any], fault: RowFault, tmp_path: Path
) -> None:
    checked = check_rows(verl_rows(jsonl(tmp_path, [ads_row("query_ad_relevance", truth, **extra)])))
    assert [row.fault for row in checked.faulty] == [fault]


@pytest.mark.parametrize("task", ["mine", "query_ad_relevance"])
@pytest.mark.parametrize(
    "extra",
    [
        {"label": 0.5},
        {"label": True},
        {"weight": "heavy"},
        {"weight": True},
        {"group": {}},
        {"id": ["a"]},
        {"answer": 5},
        {"query": 5, "ad": "a text", "user": 7},
    ],
    ids=str,
)
def test_what_extra_info_holds_of_other_types_is_carried_along(
    extra: dict[str, Any], task: str, tmp_path: Path
) -> None:
    row = read_one(tmp_path, ads_row(task, "Good", **extra))
    assert row.facts["extra_info"] == extra
    assert (row.id, row.weight, row.group) == ("rows.jsonl-1", 1.0, "")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reward_model": "rule"}, "reward_model is 'rule'; it must be an object"),
        ({"extra_info": [1]}, r"extra_info is \[1\]; it must be an object"),
        ({"ability": 0.5}, "ability is 0.5; it must be text"),
        ({"data_source": ["a"]}, r"data_source is \['a'\]; it must be text"),
        ({"extra_info": {"weight": -1}}, "weight is -1; it must be a number that FP32 has"),
        ({"reward_model": {"ground_truth": ["Good"]}}, "the fact ground_truth is .*; it must be an object"),
    ],
    ids=str,
)
def test_a_field_of_another_type_is_named(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"row 1: wrong_type: {message}"):
        verl_rows(jsonl(tmp_path, [ads_row("query_ad_relevance", "Good") | changes]))


def test_they_are_a_source_of_a_recipe(tmp_path: Path) -> None:
    file = parquet(tmp_path, ROWS)
    source = SourceConfig(kind=SourceKind.verl, path=str(file))
    source.check("data.sources[0]")
    rows = read_source(source, seed=0)
    assert [row.id for row in rows] == ["rows.parquet-1", "rows.parquet-2"]
    assert divided(source) is not None and [part.file for part in files_of(source)] == [file]
    assert describe_source(source) == f"rows in verl's form ({file})"
    with pytest.raises(ConfigError, match=r"data.sources\[0\].path is missing; kind verl reads a file of rows"):
        SourceConfig(kind=SourceKind.verl).check("data.sources[0]")


def test_they_take_part_in_a_corpus(tmp_path: Path) -> None:
    corpus = read_corpus(DataConfig(sources=[SourceConfig(kind=SourceKind.verl, path=str(jsonl(tmp_path, ROWS)))]))
    assert (len(corpus.training[0]), corpus.faulty) == (2, [])
