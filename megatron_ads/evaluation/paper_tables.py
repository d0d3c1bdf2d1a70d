"""Scores in the papers' own tables, column for column, for the terminal and the HTML page alike."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_RELEVANCE = {
    "Model DR": "model_defect_rate", "BACC": "balanced_accuracy", "Acc": "accuracy", "PosAcc": "positive_accuracy",
    "PosPrec": "positive_precision", "NegAcc": "negative_accuracy", "NegPrec": "negative_precision",
    "PosF1": "positive_f1", "NegF1": "negative_f1",
}  # fmt: skip
_USERS = {
    "Model RR": "model_defect_rate", "BACC": "balanced_accuracy", "Acc": "accuracy", "PosAcc": "positive_accuracy",
    "NegAcc": "negative_accuracy", "AUC": "auc",
}  # fmt: skip
_QUERIES = {
    "Relevance": "relevance", "Diversity": "diversity", "Difficulty": "difficulty",
    "Click Attr. Ratio": "click_attribute_ratio",
}  # fmt: skip
_VIEWS = {
    "bad": "1: query-ad relevance, bad is a defect",
    "fair": "2: query-ad relevance, bad and fair are defects",
    "location": "3: location",
    "quality": "4: ad quality",
}
_LINES = {
    "model": "model", "baseline": "most frequent label", "text_baseline": "TF-IDF, logistic regression",
    "reachable": "best reachable",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class PaperTable:
    """One table; the first column names what a line is of."""

    title: str
    head: list[str]
    rows: list[list[str]]
    note: str = ""


def paper_tables(task: str, scores: Mapping[str, Any]) -> list[PaperTable]:
    """Return the tables that the papers have of a task, none if they have none; shares are per cent, as theirs."""
    if "views" in scores and task == "ad_user_relevance":
        return [_view_table("AdNanny, table 5: ad-user relevance", "RR", scores["views"]["bad"], _USERS)]
    if "views" in scores:
        return [
            _view_table(f"AdNanny, table {_VIEWS[name]}", "DR", view, _RELEVANCE)
            for name, view in scores["views"].items()
        ]
    if "generated" in scores:
        return [_query_table(scores["generated"])]
    return [_replacement_table(scores["replacement"])] if "replacement" in scores else []


def _view_table(title: str, rate: str, view: Mapping[str, Any], columns: Mapping[str, str]) -> PaperTable:
    rows = [
        [shown_as, *(percent(view[line].get(field)) for field in columns.values())]
        for line, shown_as in _LINES.items()
        if line in view
    ]
    truth = f"{rate} {percent(view['model']['defect_rate'])} of {view['model']['rows']} rows"
    between = f"95 % of resamples have a BACC of the model from {percent_range(view['balanced_accuracy_95'])}."
    return PaperTable(f"{title} ({truth})", ["", *columns], rows, between)


def _query_table(generated: Mapping[str, Any]) -> PaperTable:
    rows = [
        [name, *(_with_range(line, field) for field in _QUERIES.values()), str(line["queries"])]
        for name, line in generated["lines"].items()
    ]
    judge = percent(generated["judge_balanced_accuracy"])
    note = (
        "Relevance is judged by a frozen TF-IDF model, which tells true queries of training rows from those of other "
        f"keywords with a balanced accuracy of {judge}. In brackets: 95 % of resampled keywords."
    )
    return PaperTable("AdNanny, table 6: query generation", ["", *_QUERIES, "queries"], rows, note)


def _replacement_table(replacement: Mapping[str, Any]) -> PaperTable:
    lines: dict[str, Callable[[Mapping[str, Any]], str]] = {
        "advice": lambda report: str(report["advice"]),
        "comparisons": lambda report: str(report["comparisons"]),
        "not read": lambda report: _counts(report["failures"].items()),
        "verdicts": lambda report: _counts(report["verdicts"].items()),
        "net share of better": _net_share,
        "risks": lambda report: _counts(report["risks"].items()),
        "strengths": lambda report: _counts(report["strengths"]),
        "weaknesses": lambda report: _counts(report["weaknesses"]),
    }
    rows = [[name, show(replacement["model"]), show(replacement["truth"])] for name, show in lines.items()]
    return PaperTable("Replacement report: all comparisons together", ["", "model", "true answers"], rows)


def _net_share(report: Mapping[str, Any]) -> str:
    interval = report["net_share_95"]
    between = f" ({100 * interval['low']:+.2f} to {100 * interval['high']:+.2f})" if interval else ""
    return "–" if report["net_share"] is None else f"{100 * report['net_share']:+.2f}{between}"


def _counts(counts: Iterable[tuple[str, int]]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts) or "none"


def percent(value: float | None) -> str:
    """Return a share as the papers write it; undefined is a dash."""
    return "–" if value is None else f"{100 * value:.2f}"


def percent_range(interval: Sequence[float] | None) -> str:
    """Return an interval of shares."""
    return "–" if interval is None else f"{percent(interval[0])} to {percent(interval[1])}"


def _with_range(line: Mapping[str, Any], field: str) -> str:
    interval = line[f"{field}_95"]
    return percent(line[field]) + (f" ({percent_range(interval)})" if interval else "")
