"""The papers' own tables of one dataset, column for column, with their Delta lines where two models are compared.

AdNanny's tables 1 to 6, the advertiser paper's table 4, Taiji's CTCVR of table 1; shares are per cent where theirs are.
"""

from collections.abc import Callable, Mapping
from typing import Any

from megatron_ads.evaluation.table_form import (
    ScoreTable,
    counted,
    interval_range,
    percent,
    percent_range,
    points,
    signed,
    signed_points,
    signed_range,
)
from megatron_ads.reporting.page import fixed

_NO_INTERVAL = "Too few groups, or one class alone: no interval of the BACC."
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


def paper_tables(scores: Mapping[str, Any]) -> list[ScoreTable]:
    """Return the tables that the papers have of a task, none if they have none; shares are per cent, as theirs."""
    comparison, views = scores.get("comparison"), scores.get("views", {})
    tables = []
    if "ctcvr" in scores:
        tables.append(_ctcvr_table(scores["ctcvr"], comparison))
    if "ablation" in scores:
        tables.append(_ablation_table(scores["ablation"]))
    if scores["task"] == "ad_user_relevance":
        tables += [_view_table("AdNanny, table 5: ad-user relevance", "RR", name, scores, _USERS) for name in views]
    else:
        tables += [_view_table(f"AdNanny, table {_VIEWS[name]}", "DR", name, scores, _RELEVANCE) for name in views]
    if "generated" in scores:
        tables.append(_query_table(scores["generated"], comparison))
    if "replacement" in scores:
        tables.append(_replacement_table(scores["replacement"]))
    return tables


def _view_table(title: str, rate: str, name: str, scores: Mapping[str, Any], columns: Mapping[str, str]) -> ScoreTable:
    view, comparison = scores["views"][name], scores.get("comparison")
    rows = [
        [shown_as, *(percent(view[line].get(field)) for field in columns.values())]
        for line, shown_as in _LINES.items()
        if line in view
    ]
    if comparison:
        other = comparison["scores"]["views"][name]["model"]
        rows.insert(0, [comparison["with"], *(percent(other.get(field)) for field in columns.values())])
        rows.insert(2, ["Delta", *(points(view["model"].get(field), other.get(field)) for field in columns.values())])
    truth = f"{rate} {percent(view['model']['defect_rate'])} of {view['model']['rows']} rows"
    between = percent_range(view["balanced_accuracy_95"])
    note = f"95 % of resamples have a BACC of the model from {between}." if between else _NO_INTERVAL
    return ScoreTable(title, ["", *columns], rows, note, truth)


def _query_table(generated: Mapping[str, Any], comparison: Mapping[str, Any] | None) -> ScoreTable:
    lines = dict(generated["lines"])
    if comparison:
        lines = {comparison["with"]: comparison["scores"]["generated"]["lines"]["model"], **lines}
    rows = []
    for name, line in lines.items():
        shares = []
        for field in _QUERIES.values():
            between = percent_range(line[f"{field}_95"])
            shares.append(percent(line[field]) + (f" ({between})" if between else ""))
        rows.append([name, *shares, str(line["queries"])])
    if comparison:
        own, other = lines["model"], lines[comparison["with"]]
        metrics = comparison["metrics"]
        apart = [
            f"{points(own[field], other[field])} {signed_points(metrics[field]['delta_95'])}".strip()
            for field in _QUERIES.values()
        ]
        rows.insert(2, ["Delta", *apart, f"{own['queries'] - other['queries']:+d}"])
    note = (
        "Relevance is judged by a frozen TF-IDF model, which tells true queries of training rows from those of other "
        f"keywords with a balanced accuracy of {percent(generated['judge_balanced_accuracy'])}. In brackets: 95 % of "
        "resampled keywords."
    )
    return ScoreTable("AdNanny, table 6: query generation", ["", *_QUERIES, "queries"], rows, note)


def _replacement_table(replacement: Mapping[str, Any]) -> ScoreTable:
    lines: dict[str, Callable[[Mapping[str, Any]], str]] = {
        "advice": lambda report: str(report["advice"]),
        "comparisons": lambda report: str(report["comparisons"]),
        "not read": lambda report: counted(report["failures"].items()),
        "verdicts": lambda report: counted(report["verdicts"].items()),
        "net share of better": _net_share,
        "risks": lambda report: counted(report["risks"].items()),
        "strengths": lambda report: counted(report["strengths"]),
        "weaknesses": lambda report: counted(report["weaknesses"]),
    }
    rows = [[name, show(replacement["model"]), show(replacement["truth"])] for name, show in lines.items()]
    return ScoreTable("Replacement report: all comparisons together", ["", "model", "true answers"], rows)


def _net_share(report: Mapping[str, Any]) -> str:
    interval = report["net_share_95"]
    between = f" ({100 * interval['low']:+.2f} to {100 * interval['high']:+.2f})" if interval else ""
    return "–" if report["net_share"] is None else f"{100 * report['net_share']:+.2f}{between}"


def _ablation_table(ablation: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> ScoreTable:
    """Return the sections as the paper has them: what is lost most first, by the recall at 5 where there is one."""
    some = next(iter(ablation.values()))
    leading = "recall@5" if "recall@5" in some else next(iter(some))
    ordered = sorted(ablation.items(), key=lambda of: of[1][leading]["delta"] or 0.0)
    rows = [["everything", *(fixed(some[name]["full"], 4) for name in some)]]
    rows += [
        [
            f"without {section}",
            *(f"{signed(of[name]['delta'], 4)} {signed_range(of[name]['delta_95'], 4)}".strip() for name in some),
        ]
        for section, of in ordered
    ]
    note = "Below everything: Delta to it, with 95 % of resampled groups in brackets."
    return ScoreTable("Advertiser paper, table 4: without a section of the history", ["", *some], rows, note)


def _ctcvr_table(ctcvr: Mapping[str, Any], comparison: Mapping[str, Any] | None) -> ScoreTable:
    rows = [
        ["model", f"{fixed(ctcvr['model'], 6)} {interval_range(ctcvr['model_95'], 6)}", fixed(ctcvr["named_share"])],
        ["true answers", fixed(ctcvr["truth"], 6), fixed(ctcvr["truth_named_share"])],
    ]
    if comparison:
        delta, other = comparison["metrics"]["ctcvr"], comparison["scores"]["ctcvr"]
        rows.insert(0, [comparison["with"], fixed(other["model"], 6), fixed(other["named_share"])])
        between = f"{signed(delta['delta'], 6)} {signed_range(delta['delta_95'], 6)}"
        rows.insert(2, ["Delta", between, signed(ctcvr["named_share"] - other["named_share"])])
    return ScoreTable("Taiji, table 1: CTCVR by the frozen ranker", ["", "CTCVR", "answers that name an item"], rows)
