"""The scores of an evaluation as text for a terminal."""

from collections.abc import Mapping, Sequence
from typing import Any

from megatron_ads.evaluation.paper_tables import paper_tables

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
