"""Sources of a recipe, split over all of them and tokenized; what is left out is counted."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_ads.config.data import DataConfig, RowVariant, SourceConfig, SourceKind
from megatron_ads.data.corpus import LeftOut, read_corpus, tokenize
from megatron_ads.data.sources import describe_source, read_source, source_names
from megatron_ads.errors import ConfigError, DataError
from tests.data.tokenizers import tokenizer_in

BUILTIN = SourceConfig(kind=SourceKind.builtin, rows=300)


def own_rows(file: Path, queries: list[str]) -> SourceConfig:
    lines = [
        json.dumps({"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": "a"}], "group": q})
        for q in queries
    ]
    file.write_text("\n".join(lines), encoding="utf-8")
    return SourceConfig(kind=SourceKind.jsonl, path=str(file), weight=2.0)


def test_a_query_of_two_sources_is_on_one_side(tmp_path: Path):
    built_in = read_source(BUILTIN, seed=0)
    own = own_rows(tmp_path / "own.jsonl", sorted({row.group for row in built_in}))
    corpus = read_corpus(DataConfig(sources=[BUILTIN, own], validation_rows=60))
    assert len(corpus.validation) == 60
    held_out = {row.group for row in corpus.validation}
    assert {row.task for row in corpus.validation} == {"query_ad_relevance", "chat"}
    for rows in corpus.training:
        assert rows
        assert held_out.isdisjoint(row.group for row in rows)
    assert [source.weight for source in corpus.sources] == [1.0, 2.0]


def test_ads_rows_can_be_without_reasoning_and_others_are_left_alone(tmp_path: Path):
    own = own_rows(tmp_path / "own.jsonl", ["q"])
    with_it, without = (
        read_corpus(DataConfig(sources=[BUILTIN, own], validation_rows=60, reasoning=reasoning))
        for reasoning in (True, False)
    )
    assert [row.id for row in without.validation] == [row.id for row in with_it.validation]
    for before, after in zip(with_it.training[0], without.training[0], strict=True):
        assert before.prompt == after.prompt
        assert after.target == f"<think></think><Label>{before.label}</Label>" != before.target
    assert without.training[1] == with_it.training[1]


def test_rows_that_do_not_fit_or_have_no_weight_are_counted(tmp_path: Path):
    tokenizer = tokenizer_in(tmp_path)
    rows = read_source(BUILTIN, seed=0)
    everything = tokenize(rows, tokenizer, seq_length=512)
    assert (len(everything.rows), everything.left_out.total()) == (300, 0)
    median = sorted(row.predictions for row in everything.rows)[150]
    rows[0] = replace(rows[0], weight=0.0)
    some = tokenize(rows, tokenizer, seq_length=median)
    assert some.left_out[LeftOut.zero_weight] == 1
    assert 100 < some.left_out[LeftOut.longer_than_seq_length] < 150
    assert len(some.rows) + some.left_out.total() == 300
    assert max(row.predictions for row in some.rows) == median


def test_a_target_that_is_too_long_by_itself_is_counted_apart(tmp_path: Path):
    tokenizer = tokenizer_in(tmp_path)
    row = read_source(BUILTIN, seed=0)[0]
    target = len(tokenizer.encode(row.target)) + 1  # with the end token
    whole = tokenize([row], tokenizer, seq_length=512).rows[0].predictions
    for seq_length, reason in (
        (target - 1, LeftOut.target_longer_than_seq_length),
        (target, LeftOut.longer_than_seq_length),
        (whole - 1, LeftOut.longer_than_seq_length),
    ):
        assert tokenize([row], tokenizer, seq_length=seq_length).left_out == {reason: 1}
    assert tokenize([row], tokenizer, seq_length=whole).left_out == {}


def ads_row(row_id: str, label: str, target: str) -> dict[str, object]:
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": target}]
    return {"id": row_id, "task": "query_ad_relevance", "label": label, "messages": messages}


def test_rows_with_an_unknown_or_contradicting_label_are_left_out_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    file = tmp_path / "rows.jsonl"
    rows = [
        ads_row("good", "Good", "<think>So.</think><Label>Good</Label>"),
        ads_row("unknown", "Great", "<think>So.</think><Label>Great</Label>"),
        ads_row("differs", "Bad", "<think>So.</think><Label>Good</Label>"),
    ]
    file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    corpus = read_corpus(DataConfig(sources=[SourceConfig(kind=SourceKind.jsonl, path=str(file))]))
    assert [(row.row_id, row.reason) for row in corpus.faulty] == [
        ("unknown", "unknown_label"),
        ("differs", "'Bad', but the target says 'Good'"),
    ]
    assert [len(rows) for rows in corpus.training] == [1]
    assert "cannot be used: 1 unreadable_target, 1 label_differs. The first is 'unknown' of task" in caplog.text


def test_a_misspelt_task_is_pointed_out_and_one_of_ones_own_is_not(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    file = tmp_path / "rows.jsonl"
    rows = [ads_row(task, "Good", "<Label>Good</Label>") | {"task": task} for task in ("relevance", "chat", "gsm8k")]
    file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    read_corpus(DataConfig(sources=[SourceConfig(kind=SourceKind.jsonl, path=str(file))]))
    (record,) = (record for record in caplog.records if record.levelname == "WARNING")
    assert "'relevance' is no ads task" in record.message
    assert record.message.endswith("Did you mean ad_user_relevance or query_ad_relevance?")


def test_a_misspelt_fact_is_pointed_out_and_one_of_ones_own_is_not(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    file = tmp_path / "rows.jsonl"
    facts = {"qurey": "shoes", "split": "train", "index": 7}
    rows = [ads_row(name, "Good", "<Label>Good</Label>") | {"facts": facts} for name in ("r1", "r2")]
    file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    read_corpus(DataConfig(sources=[SourceConfig(kind=SourceKind.jsonl, path=str(file))]))
    (record,) = (record for record in caplog.records if record.levelname == "WARNING")
    assert record.message.endswith("'qurey' is no fact, so nothing reads it. Did you mean query?")


def test_a_source_can_be_asked_another_way_beside_itself():
    asked = SourceConfig(kind=SourceKind.builtin, rows=300, variant=RowVariant.yes_no)
    corpus = read_corpus(DataConfig(sources=[BUILTIN, asked], validation_rows=60))
    assert [describe_source(source) for source in corpus.sources] == [
        "built-in query-ad pairs",
        "built-in query-ad pairs, asked as yes_no",
    ]
    assert {row.task for row in corpus.training[1]} == {"yes_no"}
    assert {row.label for row in corpus.training[1]} == {"Yes", "No"}
    held_out = {row.group for row in corpus.validation}
    assert all(held_out.isdisjoint(row.group for row in rows) for rows in corpus.training)
    ids = [row.id for rows in corpus.training for row in rows]
    assert len(ids) == len(set(ids))


def test_rows_that_declare_no_group_stay_with_the_same_ones_asked_another_way(tmp_path: Path):
    file = tmp_path / "rows.jsonl"
    prompts = [f"Is the ad relevant to the query?\nQuery: q{number}\nAd: a" for number in range(40)]
    rows = [ads_row(f"r{number}", "Good", "<think>So.</think><Label>Good</Label>") for number in range(40)]
    for row, prompt in zip(rows, prompts, strict=True):
        row["messages"][0]["content"] = prompt
    file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    own = SourceConfig(kind=SourceKind.jsonl, path=str(file))
    corpus = read_corpus(DataConfig(sources=[own, replace(own, variant=RowVariant.yes_no)], validation_rows=20))
    held_out = {row.id.removesuffix("/yes_no") for row in corpus.validation}
    assert len(held_out) >= 10
    assert all(row.id.removesuffix("/yes_no") not in held_out for rows in corpus.training for row in rows)


def test_repeats_and_targets_without_reasoning_are_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    file = tmp_path / "rows.jsonl"
    rows = [ads_row(f"r{number}", label, f"<Label>{label}</Label>") for number, label in enumerate(["Good", "Bad"])]
    file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    corpus = read_corpus(DataConfig(sources=[SourceConfig(kind=SourceKind.jsonl, path=str(file))]))
    assert "1 rows ask what an earlier one asks, 1 of them with another answer." in caplog.text
    assert "2 of 2 targets give no reasoning, so answers need none." in caplog.text
    assert (corpus.repeats.rows, corpus.repeats.contradicting) == (1, 1)


def test_a_source_without_a_usable_row_is_named_with_the_first_reason(tmp_path: Path):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(ads_row("r1", "Great", "<Label>Great</Label>")), encoding="utf-8")
    with pytest.raises(DataError, match=r"None of the 1 rows of chat rows .*'r1'.*unreadable_target \(unknown_label\)"):
        read_corpus(DataConfig(sources=[SourceConfig(kind=SourceKind.jsonl, path=str(file))]))


def test_a_task_that_the_split_leaves_nothing_of_is_pointed_out(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    own = own_rows(tmp_path / "own.jsonl", ["q"] * 300)
    corpus = read_corpus(DataConfig(sources=[BUILTIN, own], validation_rows=60))
    lost = {row.task for row in corpus.validation} - {row.task for rows in corpus.training for row in rows}
    warned = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert [message.partition(":")[0] for message in warned] == sorted(lost)
    assert len(lost) == 1


@pytest.mark.parametrize(("per_group", "groups"), [(None, 2), (8, 8), (6, 10)])
def test_held_out_rows_of_few_groups_are_pointed_out(
    per_group: int | None, groups: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    own = own_rows(tmp_path / "own.jsonl", [f"q{number % 30}" for number in range(30 * 35)])
    corpus = read_corpus(DataConfig(sources=[own], validation_rows=60, validation_rows_per_group=per_group))
    assert len({row.group for row in corpus.validation}) == groups
    told = f"the 60 held-out rows are of {groups} groups such as queries, so scores say little about others. "
    assert (f"{told}data.validation_rows_per_group=6 holds out" in caplog.text) is (groups < 10)


def test_sources_are_described_for_people(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MEGATRON_ADS_DATA", "/data")
    assert describe_source(SourceConfig(kind=SourceKind.esci)) == (
        "ESCI query-product pairs (/data/esci_us/pairs.jsonl)"
    )
    assert describe_source(own_rows(tmp_path / "own.jsonl", ["q"])) == f"chat rows ({tmp_path}/own.jsonl)"


def test_each_row_has_the_name_of_its_source_which_is_no_part_of_it(tmp_path: Path):
    own = own_rows(tmp_path / "queries.jsonl", ["a", "b"])
    corpus = read_corpus(DataConfig(sources=[BUILTIN, replace(own, name="shop"), replace(own, path=own.path)]))
    assert [{row.source for row in rows} for rows in corpus.training] == [{"builtin"}, {"shop"}, {"queries"}]
    assert corpus.training[1] == corpus.training[2]


def test_sources_without_a_name_are_called_by_file_or_kind_and_numbered():
    named = [SourceConfig(kind=SourceKind.jsonl, path="in/a.jsonl.gz"), SourceConfig(kind=SourceKind.jsonl, path="a")]
    given = [SourceConfig(kind=SourceKind.simulator), SourceConfig(kind=SourceKind.esci, name="a 2")]
    assert source_names([*named, *given]) == ["a", "a 3", "simulator", "a 2"]
    with pytest.raises(ConfigError, match=r"x is the name of several of data\.sources"):
        DataConfig(sources=[replace(source, name="x") for source in (BUILTIN, BUILTIN)]).check()
