"""Whatever the source: its targets, given as answers, are all read and all right; in evaluation, and on its page."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from megatron_ads.config.data import DataConfig, HistoryConfig, RowVariant, SourceConfig, SourceKind
from megatron_ads.data.corpus import read_corpus
from megatron_ads.evaluation.answer_records import Answer
from megatron_ads.evaluation.page import judge
from megatron_ads.evaluation.task_scores import task_scores
from megatron_ads.tasks.registry import TASKS, score_answers
from tests.data.test_disjoint_sources import SOURCES
from tests.semantic_ids.tables import simulated_ids


def own_chat(folder: Path) -> SourceConfig:
    """Rows with reasoning, with an empty block and with none, by turns."""
    lines = [
        {
            "task": "query_ad_relevance",
            "messages": [
                {"role": "user", "content": f"Is the ad relevant to the query?\nQuery: q{number}\nAd: a"},
                {"role": "assistant", "content": f"{think}<Label>{('Bad', 'Fair', 'Good')[number // 3 % 3]}</Label>"},
            ],
        }
        for number in range(30)
        for think in [("<think>So.</think>", "<think></think>", "")[number % 3]]
    ]
    file = folder / "own.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return SourceConfig(kind=SourceKind.jsonl, path=str(file))


def asked_as(variant: RowVariant, folder: Path) -> SourceConfig:
    """Return simulated rows of the next advertiser, asked as a variant; items have semantic IDs where it needs them."""
    known = str(simulated_ids(folder / "sid")) if variant is RowVariant.next_item else None
    source = SOURCES["simulator next_advertiser"](folder)
    return replace(source, variant=variant, history=HistoryConfig(semantic_ids=known))


ALL = SOURCES | {"own chat": own_chat} | {variant: partial(asked_as, variant) for variant in RowVariant}


@pytest.mark.parametrize("reasoning", [True, False])
@pytest.mark.parametrize("name", ALL)
def test_every_target_is_a_right_answer_to_its_own_row(name: str, reasoning: bool, tmp_path: Path) -> None:
    data = DataConfig(sources=[ALL[name](tmp_path)], validation_rows=9, reasoning=reasoning)
    corpus = read_corpus(data)
    rows = [row for row in corpus.validation if row.task in TASKS]
    for task in {row.task for row in rows}:
        of_task = [row for row in rows if row.task == task]
        scores = score_answers(of_task, [row.target for row in of_task])
        assert scores.failures == {}
        if TASKS[task].label_of:  # elsewhere the target need not be the best there is
            assert scores.headline == pytest.approx(1.0)


@pytest.mark.parametrize("name", ["table", "own chat"])
def test_every_view_of_the_evaluation_reads_them(name: str, tmp_path: Path) -> None:
    corpus = read_corpus(DataConfig(sources=[ALL[name](tmp_path)], validation_rows=9))
    answers = [Answer(row, row.target, ended=True) for row in corpus.validation]
    scores = task_scores(answers, corpus.training[0])["query_ad_relevance"]
    assert (scores["readable_share"], scores["accuracy"]) == (1.0, 1.0)
    assert all(view["model"]["unreadable_rate"] == 0 for view in scores["views"].values())
    assert [one.failure for one in judge(answers)] == [None] * 9
