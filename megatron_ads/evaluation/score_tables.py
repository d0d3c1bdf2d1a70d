"""Scores of one dataset as tables, for terminal and page alike: what was measured, rankings, and another model's."""

from collections.abc import Mapping
from typing import Any

from megatron_ads.evaluation.paper_tables import paper_tables
from megatron_ads.evaluation.table_form import ScoreTable, counted, interval_range, signed, signed_range
from megatron_ads.reporting.page import fixed

RELEVANCE = "query_ad_relevance"


def score_tables(scores: Mapping[str, Any]) -> list[ScoreTable]:
    """Return all tables of a dataset: its own, rankings and a comparison if there are any, and those of the papers."""
    own = _relevance_table(scores) if scores["task"] == RELEVANCE else _metrics_table(scores)
    comparison = scores.get("comparison")
    rankings = [_ranking_table(scores["ranking"], comparison)] if "ranking" in scores else []
    compared = [_comparison_table(comparison)] if comparison and comparison["metrics"] else []
    return [own, *rankings, *compared, *paper_tables(scores)]


def _relevance_table(scores: Mapping[str, Any]) -> ScoreTable:
    baseline = f"{fixed(scores['baseline_accuracy'])} (always {scores['baseline_label']})"
    rows = [
        ["accuracy over all labels", fixed(scores["accuracy"]), baseline],
        *([name, fixed(value), ""] for name, value in scores["formats"].items()),
        ["answers that could be read", fixed(scores["readable_share"]), ""],
        ["answers that the model ended", fixed(scores["ended_share"]), ""],
    ]
    note = _not_read(scores["unreadable_because"], scores)
    return ScoreTable(RELEVANCE, ["", "model", "baseline"], rows, note, _size(scores, f"{scores['queries']} queries"))


def _size(scores: Mapping[str, Any], groups: str) -> str:
    dataset = f"{scores['dataset']}, " if scores["dataset"] else ""
    return f"{dataset}{scores['rows']} rows of {groups}"


def _metrics_table(scores: Mapping[str, Any]) -> ScoreTable:
    """Return the metrics of a task and the rates of its answers' form, but for what is in the papers' tables."""
    in_views = tuple(f"{view}/" for view in scores.get("views", ()))
    leading = scores["headline_name"]
    measured = {**scores["metrics"], **scores["formats"]}.items()
    values = {name: value for name, value in measured if not name.startswith(in_views) or name == leading}
    values["answers that could be read"] = scores["readable_share"]
    values["answers that the model ended"] = scores["ended_share"]
    rows = [
        [name, fixed(value), interval_range(scores["headline_95"]) if name == leading else ""]
        for name, value in values.items()
    ]
    head = ["", "model", "95 % of resampled groups"]
    note = _not_read(scores["failures"], scores)
    return ScoreTable(scores["task"], head, rows, note, _size(scores, f"{scores['groups']} groups"))


def _not_read(failures: Mapping[str, int], scores: Mapping[str, Any]) -> str:
    more = scores["right_but_for_case"]
    hint = f" {more} more would be right if case did not count." if more else ""
    return f"Not read: {counted(failures.items())}.{hint}" if failures else ""


def _ranking_table(ranking: Mapping[str, Any], comparison: Mapping[str, Any] | None) -> ScoreTable:
    methods = dict(ranking["methods"])
    if comparison:
        methods = {comparison["with"]: comparison["scores"]["ranking"]["methods"]["model"], **methods}
    names = [name for name in dict.fromkeys(name for of in methods.values() for name in of) if not name.endswith("_95")]
    rows = [
        [method, *(f"{fixed(values.get(name))} {interval_range(values.get(f'{name}_95'))}".strip() for name in names)]
        for method, values in methods.items()
    ]
    if comparison:
        deltas = [comparison["metrics"].get(name, {}) for name in names]
        rows.insert(2, ["Delta", *(f"{signed(of.get('delta'))} {signed_range(of.get('delta_95'))}" for of in deltas)])
    note = (
        f"Rankings are of {ranking['valid_names']} names from {ranking['names_from']}; the true one is among them in "
        f"{ranking['truth_is_valid']:.1%} of the rows."
    )
    return ScoreTable("Rankings, with 95 % of resampled users in brackets", ["method", *names], rows, note)


def _comparison_table(comparison: Mapping[str, Any]) -> ScoreTable:
    rows = [
        [
            name, fixed(of["compared"], 4), fixed(of["model"], 4), signed(of["delta"], 4),
            "–" if of["relative"] is None else f"{100 * of['relative']:+.2f} %", signed_range(of["delta_95"], 4),
        ]
        for name, of in comparison["metrics"].items()
    ]  # fmt: skip
    head = ["", comparison["with"], "model", "Delta", "relative", "95 % of resampled groups"]
    return ScoreTable(f"Compared with {comparison['with']}", head, rows)
