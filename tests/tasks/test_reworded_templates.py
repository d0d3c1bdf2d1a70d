"""Every word that prompts put around their facts may change, and nothing that is measured does."""

from collections.abc import Iterator

import pytest

from megatron_ads.config.data import AdsTask, RowVariant
from megatron_ads.config.synthesis import RejectConfig
from megatron_ads.data.simulator.simulated_rows import simulated_examples
from megatron_ads.evaluation.answer_records import Answer
from megatron_ads.evaluation.task_scores import task_scores
from megatron_ads.inference.name_answers import CollaborativeModel, names_trained_on, valid_names
from megatron_ads.rows import ChatRow
from megatron_ads.synthesis.candidates import details_in
from megatron_ads.synthesis.filters import embedder, query_fault, topic_of
from megatron_ads.tasks import prompts, user_history
from megatron_ads.tasks.prompts import Template
from megatron_ads.tasks.registry import TASKS
from megatron_ads.tasks.row_checks import check_rows
from megatron_ads.tasks.variants import ask_as
from tests.tasks.examples import rows_of_all_tasks

ROWS = 30


def rows_of_everything() -> list[ChatRow]:
    """Return rows of every task and every variant, rendered with the words of the moment."""
    drawn = {task: [example.row for example in simulated_examples(task, ROWS)] for task in AdsTask}
    asked = [
        *ask_as(drawn[AdsTask.query_ad_relevance], RowVariant.yes_no),
        *ask_as(drawn[AdsTask.ad_user_relevance], RowVariant.yes_no),
        *(
            row
            for variant in RowVariant
            if variant is not RowVariant.next_item  # which the example is of
            for row in ask_as(drawn[AdsTask.next_advertiser], variant)
        ),
    ]
    return [*rows_of_all_tasks(), *(row for rows in drawn.values() for row in rows), *asked]


@pytest.fixture(scope="module")
def plain() -> list[ChatRow]:
    return rows_of_everything()


@pytest.fixture(scope="module")
def reworded(plain: list[ChatRow]) -> Iterator[list[ChatRow]]:
    """The same rows in other words: instructions, labels of lines, headings of sections."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Template, "instruction", lambda self, wording=0: f"Kindly reply {self.name} {wording}")
        for words in (prompts.LABELS, user_history.HEADINGS):
            for name in words:
                patch.setitem(words, name, f"Fresh {name} wording")
        patch.setattr(user_history, "SEPARATOR", " | ")
        patch.setattr(user_history, "NOTHING_KNOWN", "A stranger.")
        yield rows_of_everything()


def answers_to(rows: list[ChatRow]) -> list[Answer]:
    """Answer each row with the target of the next one of its task: some right, most wrong, all readable."""
    said: dict[str, list[ChatRow]] = {}
    for row in rows:
        said.setdefault(row.task, []).append(row)
    return [
        Answer(row, others[(place + 1) % len(others)].target if place % 3 else row.target, ended=True)
        for others in said.values()
        for place, row in enumerate(others)
    ]


def test_every_prompt_is_other_words_with_the_same_facts(plain: list[ChatRow], reworded: list[ChatRow]) -> None:
    assert {row.task for row in plain} == set(TASKS)
    for before, after in zip(plain, reworded, strict=True):
        assert before.prompt[0].content != after.prompt[0].content
        assert (before.facts, before.target, before.label) == (after.facts, after.target, after.label)
        assert before.prompt[0].content.split("\n")[0] not in after.prompt[0].content
    assert not any("Bought from" in row.prompt[0].content for row in reworded)
    assert check_rows(reworded).faulty == []


def test_no_metric_view_or_baseline_changes(plain: list[ChatRow], reworded: list[ChatRow]) -> None:
    before, after = (task_scores(answers_to(rows), rows, ground=True) for rows in (plain, reworded))
    for scores in (*before.values(), *after.values()):
        for view in scores.get("views", {}).values():
            view.pop("text_baseline", None)  # reads the words of prompts, as a model does
    assert before == after


def test_no_name_or_chance_changes(plain: list[ChatRow], reworded: list[ChatRow]) -> None:
    names = [names_trained_on(rows) for rows in (plain, reworded)]
    assert names[0] == names[1]
    models = [CollaborativeModel(rows) for rows in (plain, reworded)]
    for before, after in zip(plain, reworded, strict=True):
        assert valid_names(before, names[0]) == valid_names(after, names[1])
        chances = [model.chances(row, names[0].names) for model, row in zip(models, (before, after), strict=True)]
        assert chances[0].tolist() == chances[1].tolist()


def test_no_detail_or_topic_of_synthesis_changes(plain: list[ChatRow], reworded: list[ChatRow]) -> None:
    # Common words are those of the templates as well: what is particular about a row is compared with the same ones.
    details_of = details_in(plain)
    assert [details_of(row) for row in plain] == [details_of(row) for row in reworded]
    for before, after in zip(plain, reworded, strict=True):
        if before.task == "query_generation":
            assert topic_of(before) == topic_of(after)
    queries = [[row for row in rows if row.task == "query_generation"] for rows in (plain, reworded)]
    embed = embedder(RejectConfig(), [topic_of(row) for row in queries[0]], dimensions=8)
    faults = [[query_fault(row, embed, min_similarity=0.3) for row in rows] for rows in queries]
    assert faults[0] == faults[1]
