"""The tables of `downstream evaluate --features`, for a terminal."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from megatron_ads.downstream.feature_scores import BASE, TARGETS
from megatron_ads.metrics.weighted_scores import METRICS
from megatron_ads.reporting.page import fixed, text_table

_TABLE_5 = ("predicted", "predicted, of other users")
_ABLATION = ("within the user", "across users", "both", "both, of other users")


def feature_tables(scores: Mapping[str, Any]) -> list[str]:
    """Return the lines to print."""
    return [*_ranking(scores["ranking"]), "", *_retrieval(scores["retrieval"])]


def _ranking(scores: Mapping[str, Any]) -> Iterator[str]:
    users, shown = scores["users"], scores["impressions"]
    yield (
        f"ranking: {users['learned']} users, {shown['learned']} impressions to learn from; {users['judged']} users, "
        f"{shown['judged']} impressions held out; {scores['seeds']} rankers a line"
    )
    everyone = scores["all"]["lines"]
    reachable = scores["all"]["reachable"]
    best = {target: {name: {"value": value} for name, value in of.items()} for target, of in (reachable or {}).items()}
    yield from _block("values", [*_values(BASE, everyone[BASE]), *(_values("best reachable", best) if best else [])])
    yield from _block("advertiser paper, table 5: predicted advertisers and interests", _changes(everyone, _TABLE_5))
    yield from _block("Taiji, ablation: all users", _changes(everyone, _ABLATION))
    tail = scores["long_tail"]
    title = f"Taiji, ablation: long-tail users ({tail['users']} users, {tail['conversions']} conversions)"
    yield from _block(title, _changes(tail["lines"], _ABLATION))


def _block(title: str, rows: Sequence[Sequence[str]]) -> list[str]:
    return ["", title, *text_table(rows, ["", "", *(_NAMES[metric] for metric in METRICS)], left=[""])]


_NAMES = {"loss": "loss", "auc": "AUC", "pr_auc": "PR-AUC"}


def _values(name: str, line: Mapping[str, Any]) -> list[list[str]]:
    names = [name, *[""] * (len(TARGETS) - 1)]
    return [
        [shown, target, *(fixed(line[target][metric]["value"], 4) for metric in METRICS)]
        for shown, target in zip(names, TARGETS, strict=True)
    ]


def _changes(lines: Mapping[str, Any], names: Sequence[str]) -> list[list[str]]:
    return [
        [name if target == TARGETS[0] else "", target, *(_change(lines[name][target][metric]) for metric in METRICS)]
        for name in names
        for target in TARGETS
    ]


def _change(score: Mapping[str, Any]) -> str:
    """Write a relative change with its interval, in percent."""
    low, high = score["relative_interval"] or (None, None)
    return f"{_percent(score['relative'])} [{_percent(low)}, {_percent(high)}]"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:+.2f}%"


def _retrieval(scores: Mapping[str, Any]) -> Iterator[str]:
    yield f"retrieval: {scores['users']} users who bought something, {scores['k']} candidates each"
    head = ["", f"recall@{scores['k']}", "change", "clicked", "survival", "repeated", "new", "items", "effective"]
    own = [[f"quota {quota}", *_candidates(line)] for quota, line in scores["quotas"].items()]
    yield from ["", "predicted advertisers beside the main retrieval", *text_table(own, head, left=[""])]
    if not scores["objectives"]:
        return
    trained = [[objective, *_candidates(line)] for objective, line in scores["objectives"].items()]
    title = f"objective of the channel's two towers (advertiser paper, 4.5.1), quota {scores['objective_quota']}"
    yield from ["", title, *text_table(trained, head, left=[""])]


def _candidates(line: Mapping[str, Any]) -> list[str]:
    low, high = line["change_interval"] or (None, None)
    return [
        fixed(line["recall"]),
        f"{line['change']:+.3f} [{fixed(low)}, {fixed(high)}]",
        *(fixed(line[name]) for name in ("clicked", "survival", "repeated_share", "new_share")),
        str(line["different_items"]),
        fixed(line["effective_items"], 1),
    ]
