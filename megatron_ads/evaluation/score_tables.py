"""Scores of one dataset as tables, for terminal and page alike: what was measured, rankings, a comparison with another
model, and the papers' own column for column, their Delta included."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_ads.reporting.page import fixed

_NO_INTERVAL = "Too few groups, or one class alone: no interval of the BACC."
RELEVANCE = "query_ad_relevance"

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
class ScoreTable:
    """One table; the first column names what a line is of."""

    name: str
    """The same for all datasets."""
    head: list[str]
    rows: list[list[str]]
    note: str = ""
    of: str = ""
    """What is told of the dataset, such as its number of rows."""

    labels: int = 1
    """How many columns, from the first on, hold names and no numbers."""

    @property
    def numbers(self) -> range:
        """The columns of numbers."""
        return range(self.labels, len(self.head))

    @property
    def title(self) -> str:
        """What stands above the table."""
        return f"{self.name} ({self.of})" if self.of else self.name


def score_tables(scores: Mapping[str, Any]) -> list[ScoreTable]:
    """Return all tables of a dataset: its own, rankings and a comparison if there are any, and those of the papers."""
    own = _relevance_table(scores) if scores["task"] == RELEVANCE else _metrics_table(scores)
    comparison = scores.get("comparison")
    rankings = [_ranking_table(scores["ranking"], comparison)] if "ranking" in scores else []
    compared = [_comparison_table(comparison)] if comparison and comparison["metrics"] else []
    ctcvr = [_ctcvr_table(scores["ctcvr"], comparison)] if "ctcvr" in scores else []
    ablation = [_ablation_table(scores["ablation"])] if "ablation" in scores else []
    return [own, *rankings, *compared, *ctcvr, *ablation, *paper_tables(scores)]


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
        [name, fixed(value), _range(scores["headline_95"]) if name == leading else ""] for name, value in values.items()
    ]
    head = ["", "model", "95 % of resampled groups"]
    note = _not_read(scores["failures"], scores)
    return ScoreTable(scores["task"], head, rows, note, _size(scores, f"{scores['groups']} groups"))


def _not_read(failures: Mapping[str, int], scores: Mapping[str, Any]) -> str:
    more = scores["right_but_for_case"]
    hint = f" {more} more would be right if case did not count." if more else ""
    return f"Not read: {_counts(failures.items())}.{hint}" if failures else ""


def _ranking_table(ranking: Mapping[str, Any], comparison: Mapping[str, Any] | None) -> ScoreTable:
    methods = dict(ranking["methods"])
    if comparison:
        methods = {comparison["with"]: comparison["scores"]["ranking"]["methods"]["model"], **methods}
    names = [name for name in dict.fromkeys(name for of in methods.values() for name in of) if not name.endswith("_95")]
    rows = [
        [method, *(f"{fixed(values.get(name))} {_range(values.get(f'{name}_95'))}".strip() for name in names)]
        for method, values in methods.items()
    ]
    if comparison:
        deltas = [comparison["metrics"].get(name, {}) for name in names]
        rows.insert(2, ["Delta", *(f"{signed(of.get('delta'))} {_signed_range(of.get('delta_95'))}" for of in deltas)])
    note = (
        f"Rankings are of {ranking['valid_names']} names from {ranking['names_from']}; the true one is among them in "
        f"{ranking['truth_is_valid']:.1%} of the rows."
    )
    return ScoreTable("Rankings, with 95 % of resampled users in brackets", ["method", *names], rows, note)


def _ablation_table(ablation: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> ScoreTable:
    """Return the sections as the paper has them: what is lost most first, by the recall at 5 where there is one."""
    some = next(iter(ablation.values()))
    leading = "recall@5" if "recall@5" in some else next(iter(some))
    ordered = sorted(ablation.items(), key=lambda of: of[1][leading]["delta"] or 0.0)
    rows = [["everything", *(fixed(some[name]["full"], 4) for name in some)]]
    rows += [
        [
            f"without {section}",
            *(f"{signed(of[name]['delta'], 4)} {_signed_range(of[name]['delta_95'], 4)}".strip() for name in some),
        ]
        for section, of in ordered
    ]
    note = "Below everything: Delta to it, with 95 % of resampled groups in brackets."
    return ScoreTable("Advertiser paper, table 4: without a section of the history", ["", *some], rows, note)


def _ctcvr_table(ctcvr: Mapping[str, Any], comparison: Mapping[str, Any] | None) -> ScoreTable:
    rows = [
        ["model", f"{fixed(ctcvr['model'], 6)} {_range(ctcvr['model_95'], 6)}", fixed(ctcvr["named_share"])],
        ["true answers", fixed(ctcvr["truth"], 6), fixed(ctcvr["truth_named_share"])],
    ]
    if comparison:
        delta, other = comparison["metrics"]["ctcvr"], comparison["scores"]["ctcvr"]
        rows.insert(0, [comparison["with"], fixed(other["model"], 6), fixed(other["named_share"])])
        between = f"{signed(delta['delta'], 6)} {_signed_range(delta['delta_95'], 6)}"
        rows.insert(2, ["Delta", between, signed(ctcvr["named_share"] - other["named_share"])])
    return ScoreTable("Taiji, table 1: CTCVR by the frozen ranker", ["", "CTCVR", "answers that name an item"], rows)


def _comparison_table(comparison: Mapping[str, Any]) -> ScoreTable:
    rows = [
        [
            name, fixed(of["compared"], 4), fixed(of["model"], 4), signed(of["delta"], 4),
            "–" if of["relative"] is None else f"{100 * of['relative']:+.2f} %", _signed_range(of["delta_95"], 4),
        ]
        for name, of in comparison["metrics"].items()
    ]  # fmt: skip
    head = ["", comparison["with"], "model", "Delta", "relative", "95 % of resampled groups"]
    return ScoreTable(f"Compared with {comparison['with']}", head, rows)


def paper_tables(scores: Mapping[str, Any]) -> list[ScoreTable]:
    """Return the tables that the papers have of a task, none if they have none; shares are per cent, as theirs."""
    if "views" in scores and scores["task"] == "ad_user_relevance":
        return [_view_table("AdNanny, table 5: ad-user relevance", "RR", "bad", scores, _USERS)]
    if "views" in scores:
        return [
            _view_table(f"AdNanny, table {_VIEWS[name]}", "DR", name, scores, _RELEVANCE) for name in scores["views"]
        ]
    if "generated" in scores:
        return [_query_table(scores["generated"], scores.get("comparison"))]
    return [_replacement_table(scores["replacement"])] if "replacement" in scores else []


def _view_table(title: str, rate: str, name: str, scores: Mapping[str, Any], columns: Mapping[str, str]) -> ScoreTable:
    view, comparison = scores["views"][name], scores.get("comparison")
    rows = [
        [shown_as, *(_percent(view[line].get(field)) for field in columns.values())]
        for line, shown_as in _LINES.items()
        if line in view
    ]
    if comparison:
        other = comparison["scores"]["views"][name]["model"]
        rows.insert(0, [comparison["with"], *(_percent(other.get(field)) for field in columns.values())])
        rows.insert(2, ["Delta", *(_points(view["model"].get(field), other.get(field)) for field in columns.values())])
    truth = f"{rate} {_percent(view['model']['defect_rate'])} of {view['model']['rows']} rows"
    between = _percent_range(view["balanced_accuracy_95"])
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
            between = _percent_range(line[f"{field}_95"])
            shares.append(_percent(line[field]) + (f" ({between})" if between else ""))
        rows.append([name, *shares, str(line["queries"])])
    if comparison:
        own, other = lines["model"], lines[comparison["with"]]
        apart = [_points(own[field], other[field]) for field in _QUERIES.values()]
        rows.insert(2, ["Delta", *apart, f"{own['queries'] - other['queries']:+d}"])
    note = (
        "Relevance is judged by a frozen TF-IDF model, which tells true queries of training rows from those of other "
        f"keywords with a balanced accuracy of {_percent(generated['judge_balanced_accuracy'])}. In brackets: 95 % of "
        "resampled keywords."
    )
    return ScoreTable("AdNanny, table 6: query generation", ["", *_QUERIES, "queries"], rows, note)


def _replacement_table(replacement: Mapping[str, Any]) -> ScoreTable:
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
    return ScoreTable("Replacement report: all comparisons together", ["", "model", "true answers"], rows)


def _net_share(report: Mapping[str, Any]) -> str:
    interval = report["net_share_95"]
    between = f" ({100 * interval['low']:+.2f} to {100 * interval['high']:+.2f})" if interval else ""
    return "–" if report["net_share"] is None else f"{100 * report['net_share']:+.2f}{between}"


def _counts(counts: Iterable[tuple[str, int]]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts) or "none"


def _percent(share: float | None) -> str:
    return fixed(None if share is None else 100 * share, 2)


def _percent_range(interval: Sequence[float] | None) -> str:
    return f"{_percent(interval[0])} to {_percent(interval[1])}" if interval else ""


def signed(value: float | None, digits: int = 3) -> str:
    """Write a difference with its sign."""
    return "–" if value is None else f"{value:+.{digits}f}"


def _points(value: float | None, other: float | None) -> str:
    return "–" if value is None or other is None else signed(100 * (value - other), 2)


def _signed_range(interval: Sequence[float] | None, digits: int = 3) -> str:
    return f"({signed(interval[0], digits)} to {signed(interval[1], digits)})" if interval else ""


def _range(interval: Sequence[float] | None, digits: int = 3) -> str:
    return f"({fixed(interval[0], digits)} to {fixed(interval[1], digits)})" if interval else ""
