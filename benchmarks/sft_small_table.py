"""The table of ``benchmarks.sft_small``: a line for each variant, then the baselines and the best reachable score."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

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
    first: Scores = next(iter(variants.values()))["scores"]
    columns = [*_relevance_columns(first), *_ranking_columns(first), *_other_columns(first), *_general_columns(first)]
    rows = [
        [variant["about"], _minutes(variant), *(cell(variant["scores"]) for _, cell, _ in columns)]
        for variant in variants.values()
    ]
    lines = dict.fromkeys(line for _, _, more in columns for line in more)
    rows += [[line, "", *(more.get(line, "") for _, _, more in columns)] for line in lines]
    head = ["", "minutes", *(name for name, _, _ in columns)]
    ruler = ["---", *["---:"] * (len(head) - 1)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (head, ruler, *rows))


def _minutes(variant: Mapping[str, Any]) -> str:
    """Return how long it took; of a run that was interrupted, only the minutes since are known."""
    return f"{'over ' if variant['interrupted'] else ''}{variant['minutes']:.0f}"


_Column = tuple[str, Cell, dict[str, str]]
"""Name, a variant's cell, and what other lines have here."""


def _relevance_columns(scores: Scores) -> list[_Column]:
    if RELEVANCE not in scores["tasks"]:
        return []

    def cell(view: str) -> Cell:
        def value(of: Scores) -> str:
            found = of["tasks"][RELEVANCE]["views"][view]
            return _with_range(found["model"]["balanced_accuracy"], found["balanced_accuracy_95"])

        return value

    lines = {view: scores["tasks"][RELEVANCE]["views"][view] for view in _VIEWS}
    return [
        (
            name,
            cell(view),
            {
                about: _shown(lines[view][line]["balanced_accuracy"])
                for line, about in _LINES.items()
                if line in lines[view]
            },
        )
        for view, name in _VIEWS.items()
    ]


def _ranking_columns(scores: Scores) -> list[_Column]:
    if ADVERTISER not in scores["tasks"]:
        return []
    methods = scores["tasks"][ADVERTISER]["ranking"]["methods"]

    def cell(cut: str) -> Cell:
        def value(of: Scores) -> str:
            model = of["tasks"][ADVERTISER]["ranking"]["methods"]["model"]
            return _with_range(model[cut], model.get(f"{cut}_95"))

        return value

    return [
        (cut, cell(cut), {name: _shown(values[cut]) for name, values in methods.items() if name != "model"})
        for cut in _CUTS
    ]


def _other_columns(scores: Scores) -> list[_Column]:
    others = {task: found for task, found in scores["tasks"].items() if task not in (RELEVANCE, ADVERTISER)}
    return [
        (f"{task}: {found['headline_name']}", partial(_figure, "tasks", task, "headline"), {})
        for task, found in others.items()
    ]


def _general_columns(scores: Scores) -> list[_Column]:
    return [
        (f"{domain}: perplexity", partial(_figure, "general", domain, "perplexity"), {}) for domain in scores["general"]
    ]


def _figure(section: str, name: str, metric: str, of: Scores) -> str:
    return _shown(of[section][name][metric])


def _with_range(value: float | None, interval: Any) -> str:
    return _shown(value) + (f" ({interval[0]:.3f} to {interval[1]:.3f})" if interval else "")


def _shown(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
