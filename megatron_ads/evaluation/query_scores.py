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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_ads.data.split import group_of
from megatron_ads.evaluation.answer_records import Answer
from megatron_ads.metrics import text
from megatron_ads.metrics.intervals import ends, percentile_interval, resampled_rows
from megatron_ads.metrics.ranking import mean
from megatron_ads.rows import ChatRow
from megatron_ads.tasks.ground_truth import ground_truth, readable
from megatron_ads.tasks.query_generation import Queries, keyword_of, subject_of
from megatron_ads.tasks.registry import read_answer

_RESAMPLES = 500
_FIRST = 10
_MOST_FITTED = 4000
_MAX_WORDS = 1024
_COMMON = 0.1


def query_scores(answers: Sequence[Answer], training: Sequence[ChatRow]) -> dict[str, Any]:
    """Return table 6 as JSON values: a line for the model, for the true queries and for a baseline.

    The baseline adds to each keyword the words that true queries of training rows add most often.

    Args:
        answers: To rows of query generation.
        training: Rows of the same task; what is frozen is fitted to them. Without any, to the targets of ``answers``.
    """
    rows = [answer.row for answer in answers]
    measure = _Measure(rows, training)
    frequent = [word for word, _ in Counter(measure.history).most_common()]
    true = [ground_truth(row, Queries).texts for row in rows]
    lines: dict[str, Sequence[Sequence[str]]] = {
        "model": _given(answers),
        "keyword and a frequent word": [
            [f"{keyword_of(row)} {word}" for word in frequent[: len(queries)]]
            for row, queries in zip(rows, true, strict=True)
        ],
        "true queries": true,
    }
    groups = list(map(group_of, rows))
    return {
        "judge_balanced_accuracy": measure.judge.balanced_accuracy,
        "lines": {name: measure.line(measure.of(queries), groups) for name, queries in lines.items()},
    }


def query_values(
    answers: Sequence[Answer], training: Sequence[ChatRow]
) -> Callable[[NDArray[np.int64]], dict[str, float | None]]:
    """Return what computes the columns of table 6 for some of the answers, given their numbers; as ``query_scores``."""
    measure = _Measure([answer.row for answer in answers], training)
    measured = measure.of(_given(answers))
    return lambda numbers: measure.values([measured[number] for number in numbers.tolist()])


def _given(answers: Sequence[Answer]) -> list[Sequence[str]]:
    given = [readable(read_answer(answer.row, answer.text)) for answer in answers]
    return [queries.texts if queries else () for queries in given]


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


@dataclass(frozen=True, slots=True)
class _Measured:
    """The queries of one row."""

    on_topic: list[bool]
    distance: float | None
    missed: list[bool]
    attributes: list[str]


class _Measure:
    """What is fitted once and measures the queries of any model to the same rows."""

    def __init__(self, rows: Sequence[ChatRow], training: Sequence[ChatRow]) -> None:
        fitted = list(training)[:_MOST_FITTED] or rows
        self.judge, self.history = TopicJudge(fitted), _history(fitted)
        self._rows, self._matcher = rows, text.LexicalMatcher([subject_of(row) for row in rows])

    def of(self, queries_of_rows: Sequence[Sequence[str]]) -> list[_Measured]:
        """Measure the queries of each row."""
        known, measured = set(self.history), []
        for place, (row, queries) in enumerate(zip(self._rows, queries_of_rows, strict=True)):
            cosines = self.judge.similarities(queries, subject_of(row)) if queries else ()
            words = [word for query in queries for word in _added(query, keyword_of(row))]
            measured.append(
                _Measured(
                    on_topic=[bool(cosine >= self.judge.threshold) for cosine in cosines],
                    distance=text.mean_pairwise_distance(self.judge.embedding.embed(queries)),
                    missed=[place not in self._matcher.best(query, _FIRST) for query in queries],
                    attributes=[word for word in words if word in known],
                )
            )
        return measured

    def values(self, measured: Sequence[_Measured]) -> dict[str, float | None]:
        """Return the columns of the table over the queries of some rows."""
        return {
            "relevance": mean([float(each) for of_row in measured for each in of_row.on_topic]),
            "diversity": mean([of_row.distance for of_row in measured if of_row.distance is not None]),
            "difficulty": mean([float(each) for of_row in measured for each in of_row.missed]),
            "click_attribute_ratio": text.click_attribute_ratio(
                [word for of_row in measured for word in of_row.attributes], self.history
            ),
        }

    def line(self, measured: Sequence[_Measured], groups: Sequence[str]) -> dict[str, Any]:
        """Return a line of the table, with a bootstrap interval over keywords for each column."""
        values = self.values(measured)
        drawn: dict[str, list[float]] = {name: [] for name in values}
        for numbers in resampled_rows(len(measured), groups=groups, resamples=_RESAMPLES):
            for name, value in self.values([measured[number] for number in numbers.tolist()]).items():
                drawn[name] += [] if value is None else [value]
        between = {f"{name}_95": ends(percentile_interval(np.asarray(drawn[name]))) for name in values}
        return {"queries": sum(len(of_row.missed) for of_row in measured), **values, **between}


def _added(query: str, keyword: str) -> list[str]:
    """Return the words of a query that its keyword lacks."""
    known = set(text.words_of(keyword))
    return [word for word in text.words_of(query) if word not in known]
