"""Whatever the source, what is held out shares no query, user or question with what is trained on, nor a time."""

import json
import os
from datetime import date, timedelta
from pathlib import Path

import pytest

from megatron_ads.config.data import AdsTask, DataConfig, SourceConfig, SourceKind, SplitBy
from megatron_ads.data.corpus import Corpus, read_corpus
from megatron_ads.data.public_data import DATA_ROOT

EVENT_COLUMNS = {"user": "uid", "time": "ts", "event": "what", "text": "words", "advertiser": "shop"}


def read_table(folder: Path) -> SourceConfig:
    """Sixty pairs of twenty queries."""
    file = folder / "pairs.jsonl"
    rows = [{"q": f"query {number % 20}", "ad": f"ad {number}", "grade": "Good"} for number in range(60)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = {"query": "q", "title": "ad", "label": "grade"}
    return SourceConfig(kind=SourceKind.table, path=str(file), columns=columns, task=AdsTask.query_ad_relevance)


def read_chat(folder: Path) -> SourceConfig:
    """Sixty rows of twenty groups."""
    file = folder / "chat.jsonl"
    lines = []
    for number in range(60):
        question = {"role": "user", "content": f"query {number % 20}: ad {number}"}
        messages = [question, {"role": "assistant", "content": "yes"}]
        lines.append(json.dumps({"task": "chat", "group": f"query {number % 20}", "messages": messages}) + "\n")
    file.write_text("".join(lines))
    return SourceConfig(kind=SourceKind.jsonl, path=str(file))


def read_events(folder: Path) -> SourceConfig:
    """Thirty users who buy on one of the days after the anchor."""
    file = folder / "events.jsonl"
    lines = []
    for number in range(30):
        search = {"uid": f"u{number}", "ts": "2025-02-27", "what": "onsite_search", "words": f"tent {number}"}
        day = str(date(2025, 3, 1) + timedelta(days=number % 6))
        sale = {"uid": f"u{number}", "ts": day, "what": "matched_conversion", "shop": "Acme"}
        lines += [json.dumps(search) + "\n", json.dumps(sale) + "\n"]
    file.write_text("".join(lines))
    return SourceConfig(
        kind=SourceKind.table, path=str(file), columns=EVENT_COLUMNS, task=AdsTask.next_advertiser, anchor="2025-03-01"
    )


def public(kind: SourceKind) -> SourceConfig:
    if not os.environ.get(DATA_ROOT):
        pytest.skip(f"{DATA_ROOT} names no folder")
    return SourceConfig(kind=kind, rows=400)


SOURCES = {
    "builtin": lambda folder: SourceConfig(kind=SourceKind.builtin, rows=300),
    "table": read_table,
    "chat": read_chat,
    "events": read_events,
    "esci": lambda folder: public(SourceKind.esci),
    "gsm8k": lambda folder: public(SourceKind.gsm8k),
    "next_brand": lambda folder: public(SourceKind.next_brand),
} | {
    f"simulator {task}": lambda folder, task=task: SourceConfig(kind=SourceKind.simulator, task=task, rows=200)
    for task in AdsTask
}
QUERY_IN_PROMPT = {
    "builtin",
    "table",
    "chat",
    "esci",
    "simulator query_ad_relevance",
    "simulator query_ad_three_labels",
}
"""Sources whose rows are held apart by a text that their prompts show; users are anonymous there."""


def split_of(name: str, folder: Path, **settings: object) -> Corpus:
    return read_corpus(DataConfig(sources=[SOURCES[name](folder)], validation_rows=9, **settings))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", SOURCES)
def test_no_query_user_or_question_is_on_both_sides(name: str, tmp_path: Path) -> None:
    corpus = split_of(name, tmp_path)
    (training,) = corpus.training
    assert len(corpus.validation) == 9 and training
    held_out = {row.group for row in corpus.validation}
    assert all(held_out)  # every row says what it must not share
    assert held_out.isdisjoint(row.group for row in training)
    assert {row.prompt for row in corpus.validation}.isdisjoint(row.prompt for row in training)
    assert {row.id for row in corpus.validation}.isdisjoint(row.id for row in training)
    if name in QUERY_IN_PROMPT:
        assert all(row.group in row.prompt[-1].content for row in (*training, *corpus.validation))


@pytest.mark.parametrize("name", ["events", "next_brand"])
def test_split_by_time_everything_held_out_is_later(name: str, tmp_path: Path) -> None:
    corpus = split_of(name, tmp_path, split_by=SplitBy.time)
    (training,) = corpus.training
    assert len(corpus.validation) == 9
    assert max(row.time for row in training if row.time) < min(row.time for row in corpus.validation if row.time)


def test_what_one_source_holds_out_no_other_trains_on(tmp_path: Path) -> None:
    """A user of the simulator has rows of several tasks, and another source may ask about the same query."""
    users = [AdsTask.ad_user_relevance, AdsTask.next_advertiser, AdsTask.user_profile]
    sources = [SourceConfig(kind=SourceKind.simulator, task=task, rows=100) for task in users]
    corpus = read_corpus(DataConfig(sources=[*sources, read_table(tmp_path), read_chat(tmp_path)], validation_rows=60))
    held_out = {row.group for row in corpus.validation}
    trained = {row.group for rows in corpus.training for row in rows}
    assert held_out.isdisjoint(trained)
    assert len({row.task for row in corpus.validation}) >= 4
    for groups in (held_out, trained):  # the queries of both files, each on one side
        assert any(group.startswith("query ") for group in groups)
