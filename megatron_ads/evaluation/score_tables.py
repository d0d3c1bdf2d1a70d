"""Scores as tables: the papers' own, column for column, for terminal and page alike, and all of them as text."""

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
        [name, *(_percent_with_range(line, field) for field in _QUERIES.values()), str(line["queries"])]
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


def _percent_with_range(line: Mapping[str, Any], field: str) -> str:
    interval = line[f"{field}_95"]
    return percent(line[field]) + (f" ({percent_range(interval)})" if interval else "")


RELEVANCE = "query_ad_relevance"
_WIDTH = 36


def text_tables(scores: Mapping[str, Any]) -> str:
    """Return one table a task."""
    tables = [
        _relevance_table(of_task) if task == RELEVANCE else _task_table(of_task)
        for task, of_task in scores["tasks"].items()
    ]
    general = [
        f"{domain}: perplexity {of_domain['perplexity']:.3f} of the targets of {of_domain['rows']} rows"
        for domain, of_domain in scores["general"].items()
    ]
    return "\n\n".join([f"{scores['rows']} held-out rows answered, {scores['seconds']:.0f} s", *tables, *general])


def _relevance_table(scores: Mapping[str, Any]) -> str:
    lines = [
        f"{RELEVANCE}: {scores['rows']} rows of {scores['queries']} queries",
        f"{'':<{_WIDTH}}  model  baseline (always {scores['baseline_label']})",
        f"{'accuracy over all labels':<{_WIDTH}}  {shown(scores['accuracy'])}  {shown(scores['baseline_accuracy'])}",
        f"{'answers that could be read':<{_WIDTH}}  {shown(scores['readable_share'])}",
        *_paper_lines(RELEVANCE, scores),
    ]
    return "\n".join(lines)


def _task_table(scores: Mapping[str, Any]) -> str:
    lines = [f"{scores['task']}: {scores['rows']} rows of {scores['groups']} groups"]
    for name, value in plain_metrics(scores).items():
        between = _between(scores["headline_95"], "groups") if name == scores["headline_name"] else ""
        lines.append(f"{name:<{_WIDTH}}  {shown(value)}{between}")
    lines.append(f"{'answers that could be read':<{_WIDTH}}  {shown(scores['readable_share'])}")
    if unread := ", ".join(f"{reason} {count}" for reason, count in scores["failures"].items()):
        lines.append(f"  not read: {unread}")
    lines += _ranking_lines(scores["ranking"]) if "ranking" in scores else []
    return "\n".join([*lines, *_paper_lines(scores["task"], scores)])


def plain_metrics(scores: Mapping[str, Any]) -> dict[str, float | None]:
    """Return the metrics of a task and the rates of its answers' form, but for what is in the papers' tables."""
    in_views = tuple(f"{view}/" for view in scores.get("views", ()))
    return {
        name: value
        for name, value in {**scores["metrics"], **scores["formats"]}.items()
        if not name.startswith(in_views) or name == scores["headline_name"]
    }


def _paper_lines(task: str, scores: Mapping[str, Any]) -> list[str]:
    lines: list[str] = []
    for table in paper_tables(task, scores):
        widths = [max(map(len, column)) for column in zip(table.head, *table.rows, strict=True)]
        cells = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in (table.head, *table.rows)
        ]
        lines += ["", table.title, *cells, *([f"  {table.note}"] if table.note else [])]
    return lines


def _ranking_lines(ranking: Mapping[str, Any]) -> list[str]:
    methods = ranking["methods"]
    columns = dict.fromkeys(name for of_method in methods.values() for name in of_method)
    names = [name for name in columns if not name.endswith("_95")]
    head = f"{'(95 % of resampled users)':<{_WIDTH}}" + "".join(f"  {name:<22}" for name in names)
    lines = [
        f"{method:<{_WIDTH}}" + "".join(f"  {_with_range(of_method, name):<22}" for name in names)
        for method, of_method in methods.items()
    ]
    truth = f"of {ranking['valid_names']} names from {ranking['names_from']}; the true one is among them in"
    return [head, *(line.rstrip() for line in lines), f"  {truth} {ranking['truth_is_valid']:.1%} of the rows"]


def _with_range(values: Mapping[str, Any], name: str) -> str:
    if values.get(name) is None:
        return "–"
    interval = values.get(f"{name}_95")
    return f"{values[name]:.3f}" + (f" ({interval[0]:.3f} to {interval[1]:.3f})" if interval else "")


def shown(value: float | None) -> str:
    """Return a number as tables have it; undefined is a dash."""
    return "   –" if value is None else f"{value:.3f}"


def _between(interval: Sequence[float] | None, what: str) -> str:
    return f"  (95 % of resampled {what}: {interval[0]:.3f} to {interval[1]:.3f})" if interval else ""
