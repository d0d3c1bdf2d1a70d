"""AdNanny's table 6, on rows made by hand."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from megatron_ads.evaluation.answer_records import Answer
from megatron_ads.evaluation.query_scores import TopicJudge, query_scores, subject_of
from megatron_ads.rows import ChatRow, Message, Role
from megatron_ads.tasks.prompts import Ad
from megatron_ads.tasks.query_generation import GeneratedQuery, KeywordBrief, chat_row

KEYWORDS = ("running shoes", "coffee brewer", "garden chair", "dog treats")
PRICES = ("cheap", "premium")


def _row(keyword: str, queries: Sequence[str]) -> ChatRow:
    brief = KeywordBrief(keyword, Ad(title=f"{keyword} shop"))
    return chat_row(keyword, brief, [GeneratedQuery(query, "why") for query in queries], "because")


TRAINING = [_row(keyword, [f"{price} {keyword}" for price in PRICES]) for keyword in KEYWORDS]


def _line(texts: Sequence[str | None]) -> dict[str, Any]:
    """Answer the training keywords with one query each; None cannot be read."""
    answers = [
        Answer(row, _row("x", [text]).target if text else "<think>cut", ended=True)
        for row, text in zip(TRAINING, texts, strict=True)
    ]
    scores = query_scores(answers, TRAINING)
    assert scores["judge_balanced_accuracy"] == 1.0  # the keywords share no word
    line: dict[str, Any] = scores["lines"]["model"]
    return line


def test_queries_of_the_keyword_are_on_topic_and_those_of_another_are_not() -> None:
    line = _line(["cheap running shoes", "premium coffee brewer", "cheap dog treats", "cheap coffee brewer"])
    assert (line["relevance"], line["queries"]) == (0.5, 4)
    low, high = line["relevance_95"]
    assert low < 0.5 < high
    # BM25 finds every document that shares a word with the query: the third and fourth name another keyword's words.
    assert line["difficulty"] == 0.5


def test_what_cannot_be_read_has_no_queries() -> None:
    line = _line(["cheap running shoes", None, None, None])
    assert (line["relevance"], line["queries"], line["difficulty"]) == (1.0, 1, 0.0)
    nothing = _line([None] * 4)
    assert (nothing["relevance"], nothing["diversity"], nothing["click_attribute_ratio"]) == (None, None, None)


def test_attributes_are_compared_with_those_of_true_queries() -> None:
    # True queries: cheap and premium, half each. Always cheap: half of the distribution is elsewhere.
    assert _line([f"cheap {keyword}" for keyword in KEYWORDS])["click_attribute_ratio"] == pytest.approx(0.5)
    said = [f"{PRICES[number % 2]} {keyword}" for number, keyword in enumerate(KEYWORDS)]
    assert _line(said)["click_attribute_ratio"] == pytest.approx(1.0)


def test_true_queries_and_a_baseline_stand_beside_the_model() -> None:
    answers = [Answer(row, row.target, ended=True) for row in TRAINING]
    lines = query_scores(answers, TRAINING)["lines"]
    assert lines["model"] == lines["true queries"]
    assert lines["true queries"]["diversity"] > 0
    # Two added words a keyword, both known: as good as the true queries here.
    assert lines["keyword and a frequent word"]["relevance"] == 1.0


def test_answers_without_reasoning_are_read_where_none_is_asked_for() -> None:
    silent = [row.target.replace("because", "") for row in TRAINING]
    for texts, queries in (([row.target for row in TRAINING], 0), (silent, 8)):
        rows = [
            replace(row, messages=(*row.prompt, Message(Role.assistant, text)))
            for row, text in zip(TRAINING, texts, strict=True)
        ]
        answers = [Answer(row, text, ended=True) for row, text in zip(rows, silent, strict=True)]
        assert query_scores(answers, TRAINING)["lines"]["model"]["queries"] == queries


def test_the_judge_sees_keyword_and_ad_but_not_the_instruction() -> None:
    subject = subject_of(TRAINING[0])
    assert "running shoes shop" in subject
    assert "search queries" not in subject.lower()
    judge = TopicJudge(TRAINING)
    assert judge.similarities(["running shoes"], subject) > judge.threshold > judge.similarities(["dog"], subject)
