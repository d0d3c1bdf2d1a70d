"""Rows that only ask: the same prompts as rows with answers, of which nothing is left, from every kind of source."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from megatron_ads.config.data import AdsTask, RowVariant, SourceConfig, SourceKind
from megatron_ads.data.own_tables import FORMS, QUERIES_WANTED
from megatron_ads.data.questions import BadQuestion, count_rows, questions
from megatron_ads.data.sources import read_source
from megatron_ads.errors import ConfigError, DataError
from megatron_ads.rows import ChatRow, Fact
from megatron_ads.tasks.answer_format import NOTHING
from megatron_ads.tasks.registry import TASKS
from tests.data import tables

SECRET = "zyx"
"""In every text of an answer, and nowhere else."""
USER = {"user": "u7", "onsite_search": ["tent", "lamp"], "past_advertisers": ["Acme"], "age": "25-34"}
AD = {"title": "Tent", "description": "For two", "seller": "Acme"}
EXAMPLES: dict[AdsTask | None, tuple[dict[str, Any], dict[str, Any]]] = {
    None: ({"prompt": "2 + 2?", "group": "g"}, {"target": SECRET, "label": SECRET, "weight": 2}),
    AdsTask.query_ad_relevance: (
        {"query": "tent", **AD}, {"label": "Good", "location": None, "quality": None, "reasoning": SECRET}),
    AdsTask.query_ad_three_labels: (
        {"query": "tent", **AD}, {"label": "Good", "location": "Good", "quality": "Good", "reasoning": SECRET}),
    AdsTask.ad_user_relevance: ({**USER, **AD}, {"score": 3, "reasoning": SECRET}),
    AdsTask.query_generation: (
        {"keyword": "tent", **AD},
        {"queries": [f"{SECRET} {number}" for number in range(QUERIES_WANTED)], "reasons": [SECRET] * QUERIES_WANTED,
         "reasoning": SECRET}),
    AdsTask.next_advertiser: ({**USER, "pool": ["Acme", "Bolt"]}, {"advertiser": SECRET, "reasoning": SECRET}),
    AdsTask.next_advertiser_ranking: (
        {**USER, "pool": ["Acme", "Bolt"]},
        {"advertiser": SECRET, "advertisers": [SECRET, "Acme"], "interests": [SECRET], "reasoning": SECRET}),
    AdsTask.user_profile: (
        USER, {"summary": SECRET, "interests": [SECRET], "intents": [SECRET], "constraints": [SECRET],
               "avoid": [SECRET], "reasoning": SECRET}),
    AdsTask.model_comparison: (
        {"request": "r", "current": "c", "new": "n"},
        {"strengths": [SECRET], "weaknesses": [SECRET], "risk": "none", "verdict": "better", "reasoning": SECRET}),
    AdsTask.ad_rewriting: (
        {**AD, "keywords": ["k"], "goal": "more clicks"},
        {"new_title": SECRET, "new_text": SECRET, "rationale": SECRET, "new_keywords": [SECRET], "reasoning": SECRET}),
}  # fmt: skip


def _table(folder: Path, task: AdsTask | None, record: dict[str, Any], *, name: str = "rows") -> SourceConfig:
    texts = pa.list_(pa.string())
    columns = {key: pa.array([cell], texts if isinstance(cell, list) else None) for key, cell in record.items()}
    file = tables.write(folder, "parquet", pa.table(columns), name=name)
    source = SourceConfig(kind=SourceKind.table, path=str(file), task=task, columns={key: key for key in record})
    source.check("sources[0]")
    return source


def _asked(source: SourceConfig, first: int = 0, *, seed: int = 0) -> list[ChatRow]:
    found = list(questions(source, "sources[0]", seed=seed, first=first))
    assert all(isinstance(row, ChatRow) for row in found), found
    return found  # type: ignore[return-value]


def _jsonl(file: Path, *rows: Any) -> SourceConfig:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    file.write_text("".join(f"{line}\n" for line in lines))
    return SourceConfig(kind=SourceKind.jsonl, path=str(file))


def test_there_is_an_example_of_every_form_and_of_every_field_of_its_answer() -> None:
    assert EXAMPLES.keys() == FORMS.keys()
    for task, form in FORMS.items():
        asked, answered = EXAMPLES[task]
        assert answered.keys() == form.answer.keys() and not asked.keys() & answered.keys()


@pytest.mark.parametrize("task", list(FORMS), ids=str)
def test_a_table_without_answers_asks_what_the_same_table_with_answers_asks(
    task: AdsTask | None, tmp_path: Path
) -> None:
    asked, answered = EXAMPLES[task]
    record = asked | {name: cell for name, cell in answered.items() if cell is not None} | {"id": "a"}
    whole = _table(tmp_path, task, record)
    (truth,) = read_source(whole, seed=0)
    for source in (_table(tmp_path, task, asked | {"id": "a"}, name="asking"), whole):
        (row,) = _asked(source)
        assert row.prompt == truth.prompt and (row.id, row.task, row.group) == ("a", truth.task, truth.group)
        assert row.target == NOTHING and row.label is None
        assert SECRET not in repr(row)
        kept = {name: value for name, value in truth.facts.items() if name in row.facts}
        assert row.facts == kept and not row.facts.keys() & {Fact.ground_truth, Fact.reasoning}


@pytest.mark.parametrize("task", list(FORMS), ids=str)
def test_an_answer_that_is_none_of_the_tasks_hinders_no_question(task: AdsTask | None, tmp_path: Path) -> None:
    asked, answered = EXAMPLES[task]
    (row,) = _asked(_table(tmp_path, task, asked | dict.fromkeys(answered, "\u00bf?")))
    assert row.target == NOTHING


def test_columns_that_no_form_has_are_refused_with_the_nearest(tmp_path: Path) -> None:
    source = _table(tmp_path, AdsTask.query_ad_relevance, {"query": "q", "titel": "t"})
    with pytest.raises(ConfigError, match=r"field 'titel'.*Did you mean title"):
        _asked(source)
    with pytest.raises(ConfigError, match=r"does not say which column holds title"):
        _asked(_table(tmp_path, AdsTask.query_ad_relevance, {"query": "q"}))


@pytest.mark.parametrize("task", sorted(TASKS))
def test_a_conversation_may_end_with_a_question_or_with_any_answer(task: str, tmp_path: Path) -> None:
    question = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Which?"}]
    ends = [[], [{"role": "assistant", "content": SECRET}], [{"role": "assistant", "content": ""}]]
    rows = [
        {"task": task, "messages": question + end, "label": label}
        for end, label in zip(ends, (None, SECRET, 7), strict=True)
    ]
    found = _asked(_jsonl(tmp_path / "rows.jsonl", *rows))
    assert {row.prompt for row in found} == {found[0].prompt} and len(found) == 3
    assert [message.content for message in found[0].prompt] == ["Be brief.", "Which?"]
    assert SECRET not in repr(found) and {row.label for row in found} == {None}


@pytest.mark.parametrize("kind", [SourceKind.verl, SourceKind.jsonl])
def test_prompts_of_verl_ask_with_and_without_an_answer(kind: SourceKind, tmp_path: Path) -> None:
    rows = [
        {"data_source": "query_ad_relevance", "prompt": "Relevant?"},
        {"data_source": "query_ad_relevance", "prompt": [{"role": "user", "content": "Relevant?"}],
         "reward_model": {"ground_truth": {"label": SECRET}},
         "extra_info": {"answer": f"<think>{SECRET}</think>", "label": SECRET}},
    ]  # fmt: skip
    found = _asked(replace(_jsonl(tmp_path / "rows.jsonl", *rows), kind=kind))
    assert found[0].prompt == found[1].prompt and SECRET not in repr(found)


def test_of_a_preference_the_prompt_is_left(tmp_path: Path) -> None:
    row = {"prompt": "Which?", "chosen": SECRET, "rejected": [f"{SECRET}!"]}
    (found,) = _asked(replace(_jsonl(tmp_path / "rows.jsonl", row), kind=SourceKind.preference))
    assert found.prompt[0].content == "Which?" and SECRET not in repr(found)


@pytest.mark.parametrize("task", list(AdsTask))
def test_generated_rows_ask_without_their_answers(task: AdsTask) -> None:
    source = SourceConfig(kind=SourceKind.simulator, task=task, rows=6)
    truths, found = read_source(source, seed=3), _asked(source, seed=3)
    assert [row.prompt for row in found] == [row.prompt for row in truths]
    assert {row.target for row in found} == {NOTHING}
    assert not any(row.facts.keys() & {Fact.ground_truth, Fact.reasoning} for row in found)
    assert [row.id for row in _asked(source, first=4, seed=3)] == [row.id for row in truths[4:]]


def test_reading_goes_on_at_any_row_and_ends_at_the_limit(tmp_path: Path) -> None:
    lines: list[Any] = [{"q": f"query {number}", "t": "T"} for number in range(9)]
    lines[2], lines[5] = "no json", {"q": "", "t": "T"}
    source = replace(
        _jsonl(tmp_path / "rows.jsonl", *lines), kind=SourceKind.table, task=AdsTask.query_ad_relevance,
        columns={"query": "q", "title": "t"}, values={"query": {"query 7": None}},
    )  # fmt: skip
    whole = list(questions(source, "sources[0]", seed=0))
    assert [row.reason if isinstance(row, BadQuestion) else row and "asked" for row in whole] == [
        "asked", "asked", "unreadable_row", "asked", "asked", "empty_text", "asked", None, "asked",
    ]  # fmt: skip
    assert isinstance(whole[2], BadQuestion) and whole[2].id == "rows.jsonl-3" and "not JSON" in whole[2].message
    for first in range(11):
        assert list(questions(source, "sources[0]", seed=0, first=first)) == whole[first:]
        assert list(questions(replace(source, rows=4), "sources[0]", seed=0, first=first)) == whole[first:4]
    assert (count_rows(source), count_rows(replace(source, rows=4))) == (9, 4)


def test_a_source_without_rows_asks_nothing(tmp_path: Path) -> None:
    source = _jsonl(tmp_path / "rows.jsonl")
    assert _asked(source) == [] and count_rows(source) == 0


def test_rows_of_all_parts_are_asked_in_order(tmp_path: Path) -> None:
    for name, numbers in (("b", (3, 4)), ("a", (1, 2))):
        table = pa.table({"q": [f"query {number}" for number in numbers], "t": ["T", "T"]})
        tables.write(tmp_path / "parts", "parquet", table, name=name)
    source = SourceConfig(
        kind=SourceKind.table, path=str(tmp_path / "parts"), task=AdsTask.query_ad_relevance,
        columns={"query": "q", "title": "t"},
    )  # fmt: skip
    assert [row.facts[Fact.query] for row in _asked(source)] == [f"query {number}" for number in range(1, 5)]
    assert [row.id for row in _asked(source, 3)] == ["b.parquet-2"] and count_rows(source) == 4
    replaced = replace(source, path=str(tmp_path / "parts" / "[b].parquet"))
    assert len(_asked(replaced)) == 2


def test_logs_of_events_need_no_later_conversion(tmp_path: Path) -> None:
    kinds = ["onsite_search", "matched_conversion", "matched_conversion"]
    events = tables.log([20250101, 20250110, 20250305], kinds, ["tent", None, None], [None, "Acme", SECRET])
    file = tables.write(tmp_path, "jsonl", events)
    source = SourceConfig(
        kind=SourceKind.table, path=str(file), task=AdsTask.next_advertiser, columns=tables.EVENTS, anchor="2025-03-01"
    )
    source.check("sources[0]")
    (truth,), (row,) = read_source(source, seed=0), _asked(source)
    assert truth.label == SECRET and row.prompt == truth.prompt and row.id == truth.id and SECRET not in repr(row)
    later = replace(source, anchor="2025-04-01")
    with pytest.raises(DataError, match="and a conversion with an advertiser"):
        read_source(later, seed=0)
    (row,) = _asked(later)
    assert SECRET in row.prompt[0].content  # it is history by then
    several = replace(source, anchor=None, anchors=["2025-01-05", "2025-03-01"])
    assert len(_asked(several)) == 2 and len(_asked(several, 1)) == 1


@pytest.mark.parametrize("task", [AdsTask.ad_user_relevance, AdsTask.user_profile, AdsTask.next_advertiser])
def test_tables_with_a_log_of_events_show_it_without_answers(task: AdsTask, tmp_path: Path) -> None:
    events = tables.log([20250101, 20250110], ["onsite_search", "click"], ["tent", "sofa"], [None, None])
    log = tables.write(tmp_path, "csv", events, name="log")
    asked, answered = EXAMPLES[task]
    record = {name: cell for name, cell in asked.items() if name not in USER}
    record |= {"id": "a", "user": "5", "time": "2025-01-05"}
    of_events = {"events": str(log), "event_columns": tables.EVENTS}
    whole = replace(_table(tmp_path, task, record | answered), **of_events)
    asking = replace(_table(tmp_path, task, record, name="asking"), **of_events)
    asking.check("sources[0]")
    (truth,), (row,) = read_source(whole, seed=0), _asked(asking)
    assert row.prompt == truth.prompt and SECRET not in repr(row)
    assert "tent" in row.prompt[0].content and "sofa" not in row.prompt[0].content


def test_settings_without_effect_are_refused(tmp_path: Path) -> None:
    source = _jsonl(tmp_path / "rows.jsonl", {"messages": [{"role": "user", "content": "?"}]})
    with pytest.raises(ConfigError, match=r"sources\[0\].rejected is .* no effect here"):
        _asked(replace(source, rejected=str(tmp_path / "r.jsonl")))
    with pytest.raises(ConfigError, match=r"sources\[0\].variant is .* no effect here"):
        _asked(replace(source, variant=RowVariant.yes_no))
