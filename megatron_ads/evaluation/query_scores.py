"""How good generated queries are, as AdNanny's table 6 has it; the paper does not define its columns, so ours.

Relevance          share of queries that a frozen model calls on topic: their cosine with the row's keyword and ad, in a
                   TF-IDF embedding of training rows, is at least a threshold: the one that best tells their true
                   queries from queries written for other keywords. Simulated rows have the same judge.
Diversity          mean distance between the queries of a row, in the same embedding
Difficulty         share of queries with which BM25 does not find the row's keyword and ad among its first ten
Click Attr. Ratio  1 - total variation distance between the attributes of queries and those of the true queries of
                   training rows, which stand for what was clicked. Attributes are the words that a query adds to its
                   keyword and that true queries add to at least a tenth of all keywords: prices, places and the like.

All are over the queries that could be read, with bootstrap intervals over keywords.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_ads.data.split import group_of
from megatron_ads.evaluation.answer_records import Answer
from megatron_ads.metrics import text
from megatron_ads.metrics.intervals import ends, mean_interval, statistic_interval
from megatron_ads.rows import ChatRow
from megatron_ads.tasks.ground_truth import ground_truth, readable
from megatron_ads.tasks.query_generation import Queries, keyword_of, subject_of
from megatron_ads.tasks.registry import read_answer

_RESAMPLES = 500
_FIRST = 10
_MOST_FITTED = 4000
_MAX_WORDS = 1024
_COMMON = 0.1
_Measured = list[tuple[float, str]]
"""A value and its keyword, whose values are resampled together."""


def query_scores(answers: Sequence[Answer], training: Sequence[ChatRow]) -> dict[str, Any]:
    """Return table 6 as JSON values: a line for the model, for the true queries and for a baseline.

    The baseline adds to each keyword the words that true queries of training rows add most often.

    Args:
        answers: To rows of query generation.
        training: Rows of the same task; what is frozen is fitted to them. Without any, to the targets of ``answers``.
    """
    rows = [answer.row for answer in answers]
    fitted = list(training)[:_MOST_FITTED] or rows
    judge = TopicJudge(fitted)
    history = _history(fitted)
    frequent = [word for word, _ in Counter(history).most_common()]
    given = [readable(read_answer(answer.row, answer.text)) for answer in answers]
    true = [ground_truth(row, Queries).texts for row in rows]
    lines: dict[str, Sequence[Sequence[str]]] = {
        "model": [queries.texts if queries else () for queries in given],
        "keyword and a frequent word": [
            [f"{keyword_of(row)} {word}" for word in frequent[: len(queries)]]
            for row, queries in zip(rows, true, strict=True)
        ],
        "true queries": true,
    }
    matcher = text.LexicalMatcher([subject_of(row) for row in rows])
    return {
        "judge_balanced_accuracy": judge.balanced_accuracy,
        "lines": {name: _line(rows, queries, judge, matcher, history) for name, queries in lines.items()},
    }


class TopicJudge:
    """Whether a query is about a row's keyword and ad."""

    def __init__(self, rows: Sequence[ChatRow]) -> None:
        """Fit the embedding and the threshold to rows and their true queries."""
        subjects = [subject_of(row) for row in rows]
        queries = [ground_truth(row, Queries).texts for row in rows]
        texts = [*subjects, *(query for of_row in queries for query in of_row)]
        self.embedding = text.fit_embedding(texts, max_words=_MAX_WORDS)
        own = [self.similarities(of_row, subject) for of_row, subject in zip(queries, subjects, strict=True)]
        others = [
            self.similarities(of_row, subjects[place - 1])
            for place, of_row in enumerate(queries)
            if keyword_of(rows[place - 1]) != keyword_of(rows[place])
        ]
        self.threshold, self.balanced_accuracy = _best_cut(np.concatenate(own), np.concatenate([*others, np.empty(0)]))

    def similarities(self, queries: Sequence[str], subject: str) -> NDArray[np.float64]:
        """Return the cosine of each query with the subject."""
        cosines: NDArray[np.float64] = self.embedding.embed(queries) @ self.embedding.embed([subject])[0]
        return cosines


def _best_cut(on_N: NDArray[np.float64], off_M: NDArray[np.float64]) -> tuple[float, float | None]:
    """Return the threshold with the best balanced accuracy, and that; (lowest of ``on_N``, None) with one class."""
    if not off_M.size:
        return float(on_N.min()), None
    cuts_C = np.quantile(np.concatenate([on_N, off_M]), np.linspace(0, 1, 201))
    accuracies_C = [((on_N >= cut).mean() + (off_M < cut).mean()) / 2 for cut in cuts_C]
    best = int(np.argmax(accuracies_C))
    return float(cuts_C[best]), float(accuracies_C[best])


def _history(rows: Sequence[ChatRow]) -> list[str]:
    """Return the attributes of all true queries, as often as they occur."""
    added = [
        (keyword_of(row), word)
        for row in rows
        for query in ground_truth(row, Queries).texts
        for word in _added(query, keyword_of(row))
    ]
    keywords_with = Counter(word for _, word in set(added))
    wanted = _COMMON * len(set(map(keyword_of, rows)))
    return [word for _, word in added if keywords_with[word] >= wanted]


def _line(
    rows: Sequence[ChatRow],
    queries_of_rows: Sequence[Sequence[str]],
    judge: TopicJudge,
    matcher: text.LexicalMatcher,
    history: Sequence[str],
) -> dict[str, Any]:
    attributes = set(history)
    on_topic: _Measured = []
    apart: _Measured = []
    missed: _Measured = []
    added = []
    groups = [group_of(row) for row in rows]
    for place, (row, group, queries) in enumerate(zip(rows, groups, queries_of_rows, strict=True)):
        if queries:
            cosines = judge.similarities(queries, subject_of(row))
            on_topic += [(float(cosine >= judge.threshold), group) for cosine in cosines]
        if (distance := text.mean_pairwise_distance(judge.embedding.embed(queries))) is not None:
            apart.append((distance, group))
        missed += [(float(place not in matcher.best(query, _FIRST)), group) for query in queries]
        words = [word for query in queries for word in _added(query, keyword_of(row))]
        added.append([word for word in words if word in attributes])

    def ratio(chosen: Sequence[int] | NDArray[np.int64]) -> float | None:
        return text.click_attribute_ratio([word for place in chosen for word in added[place]], history)

    between = statistic_interval(ratio, len(rows), groups=groups, resamples=_RESAMPLES)
    scores: dict[str, Any] = {"queries": len(missed)}
    for name, measured in (("relevance", on_topic), ("diversity", apart), ("difficulty", missed)):
        values, keywords = [value for value, _ in measured], [keyword for _, keyword in measured]
        scores[name] = sum(values) / len(values) if values else None
        scores[f"{name}_95"] = ends(mean_interval(values, groups=keywords, resamples=_RESAMPLES))
    return {**scores, "click_attribute_ratio": ratio(range(len(rows))), "click_attribute_ratio_95": ends(between)}


def _added(query: str, keyword: str) -> list[str]:
    """Return the words of a query that its keyword lacks."""
    known = set(text.words_of(keyword))
    return [word for word in text.words_of(query) if word not in known]
