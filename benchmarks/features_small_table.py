"""The tables of ``benchmarks.features_small``."""

from collections.abc import Mapping
from typing import Any

from megatron_ads.reporting.markdown import markdown

_NAMES = {"loss": "loss", "auc": "AUC", "pr_auc": "PR-AUC"}
_SHOWN = [(target, "pr_auc") for target in ("click", "conversion", "ctcvr")] + [("ctcvr", "loss"), ("ctcvr", "auc")]
Results = Mapping[str, Mapping[str, Any]]
"""By who answered."""


def tables(results: Results) -> str:
    """Return all tables as Markdown."""
    first = next(iter(results.values()))["ranking"]
    judged = first["all"]
    head = (
        f"{first['users']['judged']} users held out with {judged['impressions']} impressions and "
        f"{judged['conversions']} conversions; {first['seeds']} rankers a line, trained on "
        f"{first['impressions']['learned']} impressions.\n"
    )
    parts = [
        head,
        _verdicts(results),
        _recalls(results),
        _lines(results, "all", "all users"),
        _lines(results, "long_tail", "long tail"),
    ]
    return "\n".join([*parts, _channel(results, "quotas", "quota"), _channel(results, "objectives", "objective")])


def _verdicts(results: Results) -> str:
    """Return whether predicted advertisers and interests lift PR-AUC of ctcvr, and those of other users do not."""
    lines = []
    for who, found in results.items():
        of_line = found["ranking"]["all"]["lines"]
        lows = [of_line[name]["ctcvr"]["pr_auc"]["relative_interval"][0] > 0 for name in _JUDGED]
        said = [f"{name}: {'a lift' if lifts else 'no lift'}" for name, lifts in zip(_JUDGED, lows, strict=True)]
        lines.append(f"- PR-AUC of ctcvr, answers of {who}: {'; '.join(said)}.")
    return "\n".join([*lines, ""])


_JUDGED = ("predicted", "predicted, of other users")


def _recalls(results: Results) -> str:
    names = ("recall@1", "recall@5", "recall@20")
    rows = [["answers of", *names, "minutes"]]
    rows += [
        [who, *(f"{found['recall'][name]:.3f}" for name in names), f"{found['minutes']:.1f}"]
        for who, found in results.items()
    ]
    return markdown(rows)


def _lines(results: Results, part: str, title: str) -> str:
    """Return PR-AUC of each target, and loss and AUC of ctcvr: without features, then the relative changes."""
    rows = [[f"{title}: answers of", "features", *(f"{_NAMES[metric]}, {target}" for target, metric in _SHOWN)]]
    for who, found in results.items():
        (base, plain), *lines = found["ranking"][part]["lines"].items()
        if len(rows) == 1:
            rows.append(["", base, *(f"{plain[target][metric]['value']:.4f}" for target, metric in _SHOWN)])
        if len(rows) == 2 and (best := found["ranking"][part]["reachable"]):
            rows.append(["", "best reachable", *(f"{best[target][metric]:.4f}" for target, metric in _SHOWN)])
        rows += [[who, name, *(_change(line[target][metric]) for target, metric in _SHOWN)] for name, line in lines]
    return markdown(rows)


def _channel(results: Results, part: str, title: str) -> str:
    measured = ("recall@20", "change", "clicked", "survival", "repeated", "new", "items", "effective items")
    rows = [["answers of", title, *measured]]
    for who, found in results.items():
        for name, line in found["retrieval"][part].items():
            low, high = line["change_interval"]
            parts = [line[key] for key in ("clicked", "survival", "repeated_share", "new_share")]
            shown = ["–" if value is None else f"{value:.3f}" for value in parts]
            change = f"{line['change']:+.3f} ({low:.3f} to {high:.3f})"
            tail = [str(line["different_items"]), f"{line['effective_items']:.1f}"]
            rows.append([who, name, f"{line['recall']:.3f}", change, *shown, *tail])
    return markdown(rows)


def _change(score: Mapping[str, Any]) -> str:
    low, high = score["relative_interval"]
    return f"{100 * score['relative']:+.2f}% ({100 * low:+.2f} to {100 * high:+.2f})"
