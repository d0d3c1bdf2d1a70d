"""The table of ``benchmarks.sft_small``: a line for each variant, then the baselines and the best reachable score."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from megatron_ads.reporting.markdown import markdown

Scores = Mapping[str, Any]
Cell = Callable[[Scores], str]

RELEVANCE, ADVERTISER = "query_ad_relevance", "next_advertiser"
_VIEWS = {"bad": "BACC, bad", "fair": "BACC, fair"}
_CUTS = ("recall@1", "recall@5", "recall@20", "ndcg@20")
_LINES = {"baseline": "commonest label", "text_baseline": "TF-IDF, logistic regression", "reachable": "best reachable"}
"""Of the relevance labels, besides the model's."""


def table(variants: Mapping[str, Any]) -> str:
    """Return a Markdown table of variants that were evaluated on the same tasks, one for each set of tasks."""
    parts: dict[tuple[str, ...], dict[str, Any]] = {}
    for name, variant in variants.items():
        tasks = tuple(sorted([*variant["scores"]["tasks"], *variant["scores"]["general"]]))
        parts.setdefault(tasks, {})[name] = variant
    return "\n".join(_table(of_part) for of_part in parts.values())


def _table(variants: Mapping[str, Any]) -> str:
    columns = _columns(next(iter(variants.values()))["scores"])
    rows = []
    for variant in variants.values():
        # Of a run that was interrupted, only the minutes since are known.
        minutes = f"{'over ' if variant['interrupted'] else ''}{variant['minutes']:.0f}"
        rows.append([variant["about"], minutes, *(cell(variant["scores"]) for _, cell, _ in columns)])
    lines = dict.fromkeys(line for _, _, more in columns for line in more)
    rows += [[line, "", *(more.get(line, "") for _, _, more in columns)] for line in lines]
    head = ["", "minutes", *(name for name, _, _ in columns)]
    return markdown([head, *rows], numbers=True)


def _columns(scores: Scores) -> list[tuple[str, Cell, dict[str, str]]]:
    """Return the name of each column, a variant's cell, and what other lines have there."""
    columns: list[tuple[str, Cell, dict[str, str]]] = []
    others = dict(scores["tasks"])
    if relevance := others.pop(RELEVANCE, None):
        for view, name in _VIEWS.items():
            found = relevance["views"][view]
            lines = {about: _shown(found[line]["balanced_accuracy"]) for line, about in _LINES.items() if line in found}
            columns.append((name, partial(_relevance, view=view), lines))
    if advertiser := others.pop(ADVERTISER, None):
        methods = {name: values for name, values in advertiser["ranking"]["methods"].items() if name != "model"}
        for cut in _CUTS:
            lines = {name: _shown(values[cut]) for name, values in methods.items()}
            columns.append((cut, partial(_ranking, cut=cut), lines))
    figures = {f"{task}: {found['headline_name']}": ("tasks", task, "headline") for task, found in others.items()}
    figures |= {f"{domain}: perplexity": ("general", domain, "perplexity") for domain in scores["general"]}
    return columns + [(name, partial(_figure, path=path), {}) for name, path in figures.items()]


def _relevance(scores: Scores, *, view: str) -> str:
    found = scores["tasks"][RELEVANCE]["views"][view]
    return _with_range(found["model"]["balanced_accuracy"], found["balanced_accuracy_95"])


def _ranking(scores: Scores, *, cut: str) -> str:
    model = scores["tasks"][ADVERTISER]["ranking"]["methods"]["model"]
    return _with_range(model[cut], model.get(f"{cut}_95"))


def _figure(scores: Scores, *, path: tuple[str, str, str]) -> str:
    section, name, metric = path
    return _shown(scores[section][name][metric])


def _with_range(value: float | None, interval: Any) -> str:
    return _shown(value) + (f" ({interval[0]:.3f} to {interval[1]:.3f})" if interval else "")


def _shown(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
