"""Sources keep their names: each is scored by itself, and stands in the same tables as the others."""

from dataclasses import replace

from megatron_ads.evaluation.answer_records import Answer
from megatron_ads.evaluation.dataset_tables import task_tables, text_tables
from megatron_ads.evaluation.datasets import dataset_names
from megatron_ads.evaluation.page import evaluation_page
from megatron_ads.evaluation.task_scores import task_scores
from megatron_ads.tasks import relevance
from megatron_ads.tasks.prompts import Ad
from megatron_ads.tasks.relevance import Label
from tests.evaluation.advertiser_rows import name_row


def _answer(row_id: str, truth: Label, said: Label, source: str) -> Answer:
    row = relevance.chat_row(row_id, row_id, Ad("a"), truth, "why")
    return Answer(replace(row, source=source), relevance.chat_row("x", "q", Ad("a"), said, "why").target, ended=True)


BAD, GOOD = Label.bad, Label.good
TWO = [
    _answer("1", BAD, BAD, "enGB"), _answer("2", GOOD, GOOD, "enGB"),
    _answer("3", BAD, GOOD, "deDE"), _answer("4", GOOD, GOOD, "deDE"), _answer("5", GOOD, GOOD, "deDE"),
]  # fmt: skip


def test_only_tasks_of_several_sources_are_told_apart() -> None:
    rows = [*(answer.row for answer in TWO[1:3]), replace(name_row("1", "A"), source="shop")]
    assert dataset_names(rows) == ["query_ad_relevance, enGB", "query_ad_relevance, deDE", "next_advertiser"]


def test_each_source_is_scored_beside_its_own_baseline() -> None:
    training = [_answer("6", BAD, BAD, "enGB").row, *(_answer(name, GOOD, BAD, "deDE").row for name in "789")]
    scores = task_scores(TWO, training)
    assert list(scores) == ["query_ad_relevance, deDE", "query_ad_relevance, enGB"]
    assert [of["dataset"] for of in scores.values()] == ["deDE", "enGB"]
    assert [of["baseline_label"] for of in scores.values()] == ["Good", "Bad"]
    assert [of["accuracy"] for of in scores.values()] == [2 / 3, 1.0]


def test_a_papers_table_has_a_line_for_each_dataset_with_its_defect_rate() -> None:
    (tables,) = task_tables(task_scores(TWO, [])).values()
    table = next(table for table in tables if table.name.startswith("AdNanny, table 1"))
    assert table.head[:3] == ["dataset", "", "Model DR"]
    # enGB: one of two is bad, and found; deDE: one of three, not found.
    assert [row[:4] for row in table.rows] == [
        ["deDE", "model", "0.00", "50.00"],
        ["DR 33.33 of 3 rows", "most frequent label", "0.00", "50.00"],
        ["enGB", "model", "50.00", "100.00"],
        ["DR 50.00 of 2 rows", "most frequent label", "100.00", "50.00"],
    ]
    assert table.title == "AdNanny, table 1: query-ad relevance, bad is a defect"
    assert table.note.splitlines()[0].startswith("deDE: ")


def test_terminal_and_page_have_them_all() -> None:
    tasks = task_scores(TWO, [])
    scores = {"rows": 5, "seconds": None, "tasks": tasks, "general": {}}
    text = text_tables(scores)
    assert text.startswith("5 held-out rows answered\n")
    assert "DR 33.33 of 3 rows" in text
    page = evaluation_page(scores, TWO, title="t", about="a")
    for dataset in tasks:
        assert f"{dataset}: confusion" in page
        assert f"{dataset}: answers" in page
