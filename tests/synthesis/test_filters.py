"""Every filter, with a teacher whose script says which rows fall into it, and queries that break the rules."""

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from megatron_ads.config.data import AdsTask, SourceConfig, SourceKind
from megatron_ads.config.synthesis import SynthesisConfig
from megatron_ads.data.jsonl import jsonl_rows
from megatron_ads.data.sources import read_source
from megatron_ads.errors import ConfigError, DataError
from megatron_ads.metrics.text import fit_embedding
from megatron_ads.rows import ChatRow, Fact
from megatron_ads.synthesis.candidates import Candidate
from megatron_ads.synthesis.filters import TOPICS, QueryFault, query_fault, topic_of
from megatron_ads.synthesis.pipeline import SynthesisResult, open_models, synthesize, synthesized_row
from megatron_ads.synthesis.prompts import LABEL_GIVEN, teacher_messages
from megatron_ads.synthesis.report import as_report, render_report, write_report
from megatron_ads.tasks import query_generation
from megatron_ads.tasks.ground_truth import ground_truth
from megatron_ads.tasks.prompts import Ad
from megatron_ads.tasks.query_generation import GeneratedQuery, KeywordBrief, Queries
from megatron_ads.tasks.row_checks import check_rows
from tests.inference.scripted_server import Reply, scripted_server
from tests.synthesis.scripted_recipes import good_answer, good_reasoning, label_in, number_of, recipe

OTHER = {"Bad": "Good", "Fair": "Bad", "Good": "Fair"}


def run(config: SynthesisConfig) -> tuple[SynthesisResult, dict[str, Any]]:
    with open_models(config) as models:
        result = synthesize(config, models)
        return result, as_report(result, models, config)


def removed(report: dict[str, Any]) -> dict[str, int]:
    return {found["filter"]: found["removed"] for found in report["filters"] if found["removed"]}


def reasoned(reasoning: str, body: dict[str, Any]) -> str:
    return f"<Reasoning>{reasoning}</Reasoning>{label_in(body)}"


def faulty_teacher(body: dict[str, Any], _: int) -> Reply:
    """Rows 0 to 11 have each a fault of their own; the others are answered well."""
    number, label = number_of(body), label_in(body)
    wrong = f"<Label>{OTHER[label[7:-8]]}</Label>"
    reasoning = good_reasoning(number)
    texts = {
        0: "",
        1: reasoning + label,
        2: f"<Reasoning>{reasoning}</Reasoning>",
        3: f"<Reasoning>{reasoning}</Reasoning>{label}{label}",
        4: f"<Reasoning>{reasoning}</Reasoning>{label} I hope this helps.",
        5: f"<Reasoning>{reasoning}</Reasoning>{wrong}",
        6: reasoned(f"As the given label says, {reasoning}", body),
        7: reasoned("The crimson7 wish is met.", body),
        8: reasoned("What the person asks for and what is offered here compare as one would expect of such.", body),
        9: f"Sure! <Reasoning>{reasoning}</Reasoning>{label}",
    }
    if number == 10:
        return Reply(content=f"<Reasoning>{reasoning}", finish="length")
    if number == 11:
        return Reply(status=400, content="this prompt is too long")
    # A teacher that thinks: its own thoughts are no part of what it was asked for.
    thoughts = "<think>I was told the answer is known.</think>" if number == 12 else ""
    return Reply(content=texts.get(number, thoughts + good_answer(body)))


def test_each_filter_removes_its_own_and_the_rest_is_the_corpus(tmp_path: Path) -> None:
    with scripted_server(faulty_teacher) as server:
        config = recipe(tmp_path, server.url, rows=20)
        with open_models(config) as models:
            report = write_report(synthesize(config, models), models, config)
    assert removed(report) == {
        "no_answer": 2,  # rows 0 and 11
        "cut_off": 1,  # row 10
        "schema": 5,  # rows 1 to 4 and 9
        "label_differs": 1,
        "tells_the_answer_was_given": 1,
        "too_short": 1,
        "boilerplate": 1,
    }
    (schema,) = (found for found in report["filters"] if found["filter"] == "schema")
    assert schema["reasons"] == {
        "no_reasoning": 1,
        "no_label": 1,
        "several_labels": 1,
        "text_around_label": 1,
        "text_before_reasoning": 1,
    }
    assert schema["entered"] == 17  # without rows 0, 10 and 11
    assert len(schema["samples"]) == config.samples == 3
    assert report["candidates"] == 20
    assert report["kept"] == report["corpus"]["training_rows"] == 8
    rows = jsonl_rows(tmp_path / "out" / "train.jsonl")
    assert {row.id for row in rows} == {f"r{number}/0" for number in range(12, 20)}
    assert check_rows(rows).faulty == []
    row = next(row for row in rows if row.id == "r12/0")
    assert row.target == f"<think>{good_reasoning(12)}</think><Label>Bad</Label>"
    assert (row.label, row.group) == ("Bad", "q12")
    alone = synthesized_row(Candidate(row=replace(row, group=""), number=0, text=""))
    assert alone.group == ""  # what it asks still says what it belongs to
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == report
    text = (tmp_path / "out" / "report.md").read_text()
    assert "| schema | 17 | 5 |" in text
    assert "this prompt is too long" in text


def test_candidates_unlike_the_others_and_repetitions_go(tmp_path: Path) -> None:
    config = recipe(tmp_path, "http://unused/v1", "candidates=3", "reject.min_similarity=0.2", rows=2)
    wordings = {
        teacher_messages(row, LABEL_GIVEN, wording)[0]["content"]: wording
        for row in jsonl_rows(tmp_path / "rows.jsonl")
        for wording in range(3)
    }
    elsewhere = "crimson0 shop0 zebra lagoon marimba quartz fjord yeti oboe"

    def teacher(body: dict[str, Any], _: int) -> Reply:
        number, wording = number_of(body), wordings[body["messages"][0]["content"]]
        good = good_reasoning(number)
        texts = {0: (good, f"{good} Clearly so.", elsewhere), 1: (good, good, good)}
        return Reply(content=reasoned(texts[number][wording], body))

    with scripted_server(teacher) as server:
        config.teacher.url = server.url
        result, report = run(config)
    assert removed(report) == {"unlike_the_others": 1, "repeats_another": 2}
    assert [item.name for item in result.candidates if item.removed is None] == ["r0/0", "r0/1", "r1/0"]
    assert report["rows_by_kept_candidates"] == {"1": 1, "2": 1}


def test_the_verifier_has_the_last_word_on_the_text(tmp_path: Path) -> None:
    def both(body: dict[str, Any], _: int) -> Reply:
        if body["model"] == "scripted":
            return Reply(content=good_answer(body))
        verdicts = {
            0: "<Aligned>yes</Aligned><Sound>yes</Sound><Faithful>yes</Faithful>",
            1: "<Aligned>no</Aligned><Sound>Yes</Sound><Faithful>no</Faithful>",
            2: "<Aligned>yes</Aligned><Sound>perhaps</Sound><Faithful>yes</Faithful>",
            3: "It is fine.",
        }
        return Reply(content=verdicts[number_of(body)])

    with scripted_server(both) as server:
        config = recipe(tmp_path, server.url, f"verifier.url='{server.url}'", "verifier.model=judge")
        result, report = run(config)
    assert removed(report) == {"verifier_rejects": 1, "verifier_unreadable": 2}
    assert [item.reason for item in result.candidates] == [
        "",
        "not aligned, not faithful",
        "neither yes nor no",
        "missing_part",
    ]
    assert report["models"]["verifier"]["asked"] == 4


@pytest.mark.parametrize(("pass_rate", "rows_cooked"), [(0.5, 4), (0.75, 0)])
def test_a_template_that_fails_on_the_golden_set_is_not_used(
    tmp_path: Path, pass_rate: float, rows_cooked: int
) -> None:
    # Of the golden rows 0 to 3, which are all there are, the even ones are answered well: a rate of 0.5.
    def teacher(body: dict[str, Any], _: int) -> Reply:
        return Reply(content=good_answer(body) if number_of(body) % 2 == 0 else "I cannot say.")

    with scripted_server(teacher) as server:
        config = recipe(tmp_path, server.url, "golden.rows=10", f"golden.pass_rate={pass_rate}")
        result, report = run(config)
        requests = len(server.bodies)
    (golden,) = result.golden
    assert golden.pass_rates == (0.5, 0.5, 0.5)
    assert golden.failures == {"schema (no_reasoning)": 6}
    (reported,) = report["golden"]
    assert {(sample["reason"], sample["text"]) for sample in reported["failed"]} == {("no_reasoning", "I cannot say.")}
    assert "I cannot say." in render_report(report).partition("## Filters")[0]
    assert golden.passed is (rows_cooked > 0)
    # 4 rows in 3 wordings; candidate 0 of each row is the first of them, and is not asked for again.
    assert requests == 12
    assert sum(result.rows_by_task.values()) == rows_cooked
    assert report["rows"]["left_out"] == ({} if rows_cooked else {"golden_check_failed": 4})
    assert (report["corpus"] is None) == (rows_cooked == 0)


def test_candidates_are_spread_over_the_templates_that_pass(tmp_path: Path) -> None:
    def teacher(body: dict[str, Any], _: int) -> Reply:
        content = body["messages"][0]["content"]
        return Reply(content="I cannot say." if "BAD" in content else good_answer(body))

    wordings = {"a/1": "[PLAIN, FANCY]", "b/1": "[BAD]", "c/1": "[OTHER]"}
    own = f"templates=[{', '.join(f'{{name: {name}, wordings: {texts}}}' for name, texts in wordings.items())}]"
    with scripted_server(teacher) as server:
        config = recipe(tmp_path, server.url, "golden.rows=2", "candidates=4", own)
        result, report = run(config)
        asked = [body["messages"][0]["content"] for body in server.bodies]
    assert [(result.template, result.passed) for result in result.golden] == [
        ("a/1", True),
        ("b/1", False),
        ("c/1", True),
    ]
    # Golden: 2 rows. Candidates: 4 rows; 0 and 2 by a/1 (PLAIN, FANCY), 1 and 3 by c/1. What golden rows were asked
    # is not asked again.
    words = ("PLAIN", "FANCY", "BAD", "OTHER")
    assert {word: sum(word in text for text in asked) for word in words} == {
        "PLAIN": 4,
        "FANCY": 4,
        "BAD": 2,
        "OTHER": 8,
    }
    assert report["candidates"] == 16


def test_a_template_for_a_task_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    own = "templates=[{name: a/1, wordings: [x], tasks: [query_ad_relevanse]}]"
    config = recipe(tmp_path, "http://unused/v1", own)
    with open_models(config) as models, pytest.raises(DataError, match="Did you mean query_ad_relevance"):
        synthesize(config, models)


@pytest.mark.skipif(find_spec("sentence_transformers") is not None, reason="sentence-transformers is installed")
def test_an_embedding_that_is_not_installed_is_named_before_anything_is_asked(tmp_path: Path) -> None:
    config = recipe(tmp_path, "http://unused/v1", "reject.embedding=all-MiniLM-L6-v2")
    refused = pytest.raises(ConfigError, match=r"'all-MiniLM-L6-v2', but sentence-transformers is not installed")
    with refused, open_models(config):
        pass
    assert not (tmp_path / "out").exists()


def test_text_that_no_file_can_hold_is_removed_and_reported(tmp_path: Path) -> None:
    raw = b'{"choices": [{"message": {"content": "<Reasoning>half a pair \\ud83d</Reasoning>"}}]}'
    with scripted_server(lambda *_: Reply(raw=raw)) as server:
        config = recipe(tmp_path, server.url, rows=2)
        with open_models(config) as models:
            report = write_report(synthesize(config, models), models, config)
    (schema,) = (found for found in report["filters"] if found["filter"] == "schema")
    assert schema["reasons"] == {"broken_characters": 2}
    assert report["corpus"]["training_rows"] == 0


class Scores:
    """A judge whose perplexity of row n is n + 1, so that the median over rows 0 to 4 is 3."""

    def perplexities(self, candidates: Sequence[Candidate]) -> list[float | None]:
        numbers = [int(candidate.row.id[1:]) for candidate in candidates]
        return [None if number == 5 else float(number + 1) for number in numbers]


def test_answers_that_do_not_follow_are_removed_at_the_median(tmp_path: Path) -> None:
    with scripted_server(lambda body, _: Reply(content=good_answer(body))) as server:
        config = recipe(tmp_path, server.url, rows=6)
        with open_models(config) as models:
            result = synthesize(config, replace(models, scorer=Scores()))
            report = as_report(result, models, config)
    assert result.threshold == 3.0
    assert removed(report) == {"high_perplexity": 3, "too_long_to_measure": 1}  # 3, 4, 5 are not below 3
    assert [item.row.id for item in result.candidates if item.removed is None] == ["r0", "r1"]


def test_held_out_rows_share_no_query_with_those_to_train_on(tmp_path: Path) -> None:
    with scripted_server(lambda body, _: Reply(content=good_answer(body))) as server:
        config = recipe(tmp_path, server.url, "validation_rows=3", rows=12)
        _, report = run(config)
    sides = [jsonl_rows(tmp_path / "out" / name) for name in ("train.jsonl", "validation.jsonl")]
    assert [len(rows) for rows in sides] == [9, 3]
    assert not {row.group for row in sides[0]} & {row.group for row in sides[1]}
    assert report["corpus"] == {"training_rows": 9, "validation_rows": 3, "left_out_by_split": 0}
    assert [row.id for row in sides[0]] != sorted(row.id for row in sides[0])


def row_of(keyword: str, queries: list[str], ad: Ad | None = None) -> ChatRow:
    brief = KeywordBrief(keyword, ad=ad)
    return query_generation.chat_row("q", brief, [GeneratedQuery(text, "why") for text in queries], "r")


# Texts from which the embedding knows that notebooks are laptops, and garden sets are not.
TEXTS = ["laptop notebook", "laptop computer notebook", "gaming notebook", "garden furniture set", "garden set chairs"]


@pytest.mark.parametrize(
    ("queries", "fault"),
    [
        (["gaming laptop computer", "cheap laptop computer"], None),
        (["refurbished Corvo machine"], None),  # the ad's name is on topic
        (["gaming notebook"], None),  # a synonym
        (["laptop"], QueryFault.broader_query),
        (["computer laptop"], QueryFault.broader_query),  # it says nothing that the keyword does not
        (["cheap laptop computer", "laptop computer cheap"], QueryFault.repeated_query),
        (["cheap laptop computer", "garden furniture set"], QueryFault.off_topic_query),
    ],
)
def test_queries_that_break_the_rules_are_no_material(queries: list[str], fault: QueryFault | None) -> None:
    row = row_of("laptop computer", queries, Ad(title="Corvo 13"))
    assert query_fault(row, fit_embedding(TEXTS, dimensions=2).embed, min_similarity=0.1) == fault


def test_of_simulated_rows_most_are_kept_and_few_that_have_the_queries_of_another_keyword() -> None:
    source = SourceConfig(kind=SourceKind.simulator, task=AdsTask.query_generation, rows=300)
    rows = read_source(source, seed=0)
    for index in range(0, 300, 10):
        truth = rows[(index + 37) % 300].facts[Fact.ground_truth]
        rows[index] = replace(rows[index], facts={**rows[index].facts, Fact.ground_truth: truth})
    texts = [text for row in rows for text in (topic_of(row), " ".join(ground_truth(row, Queries).texts))]
    embed = fit_embedding(texts, dimensions=TOPICS).embed
    kept = [query_fault(row, embed, min_similarity=0.1) is None for row in rows]
    assert sum(kept[index] for index in range(0, 300, 10)) <= 5  # of 30
    assert sum(kept[index] for index in range(300) if index % 10) >= 256  # of 270


def test_text_of_rows_and_models_cannot_become_markup(tmp_path: Path) -> None:
    script = "<script>x</script>"

    def teacher(body: dict[str, Any], _: int) -> Reply:
        return Reply(content=good_answer(body) if number_of(body) % 2 == 0 else f"{script}\n\n{script}")

    with scripted_server(teacher) as server:
        config = recipe(tmp_path, server.url, "golden.rows=10", "golden.pass_rate=0.5", f"teacher.model='{script}'")
        _, report = run(config)
    samples = [
        *report["samples_of_kept"],
        *(sample for found in report["filters"] for sample in found["samples"]),
        *(sample for found in report["golden"] for sample in found["failed"]),
    ]
    assert samples
    for sample in samples:
        sample |= {"id": script, "task": script, "reason": script}
    for found in report["golden"]:
        found |= {"template": script, "sample": script}
    report["filters"][0]["reasons"] = {f"{script} | {script}": 1}
    text = render_report({**report, "sources": [script]})
    # Lines that begin with four columns, six below an item of a list, are code; elsewhere every sign is escaped.
    prose = [line for line in text.splitlines() if not line.startswith("    ")]
    assert not [line for line in prose if re.search(r"(?<!\\)<", line)]
    assert f"\n      {script}\n" in text
    assert r"| \<script\>x\</script\> \| \<script\>x\</script\> 1 |" in text
