"""The tables of ``benchmarks.sid_small``."""

from collections.abc import Mapping
from typing import Any

from megatron_ads.reporting.markdown import markdown

_CUTS = ("recall@1", "recall@5", "recall@20")
_ABOUT = {"text": "text alone", "sid": "text and semantic IDs", "item": "next item by its ID"}


def tables(results: Mapping[str, Any]) -> str:
    """Return all tables as Markdown."""
    parts = [_recalls(results["arms"]), _general(results["general"])]
    if results["codebook"]:
        parts.insert(0, _codebook(results["codebook"]))
    return "\n".join(parts)


def _codebook(report: Mapping[str, Any]) -> str:
    levels = "; ".join(
        f"level {number}: {level['used']} of {level['codes']} codes, perplexity {level['perplexity']:.1f}"
        for number, level in enumerate(report["levels"])
    )
    return (
        f"{report['items']} items, of which {report['collision_rate']:.1%} share the codes of all levels with another; "
        f"reconstruction error {report['reconstruction_error']:.3f}. {levels}.\n"
    )


def _recalls(arms: Mapping[str, Any]) -> str:
    rows = [["", *_CUTS, "rows"]]
    for arm, scores in arms.items():
        (found,) = scores["tasks"].values()
        methods = found["ranking"]["methods"]
        rows.append([_ABOUT[arm], *(_with_interval(methods["model"], cut) for cut in _CUTS), str(found["rows"])])
        if comparison := found.get("comparison"):
            deltas = comparison["metrics"]
            rows.append([f"{_ABOUT[arm]}, minus {_ABOUT['text']}", *(_delta(deltas[cut]) for cut in _CUTS), ""])
        others = {name: values for name, values in methods.items() if name != "model"}
        rows += [
            [f"{_ABOUT[arm]}: {name}", *(f"{values[cut]:.3f}" for cut in _CUTS), ""] for name, values in others.items()
        ]
    return markdown(rows)


def _with_interval(scores: Mapping[str, Any], cut: str) -> str:
    if scores.get(cut) is None:
        return ""
    low, high = scores[f"{cut}_95"] or (None, None)
    return f"{scores[cut]:.3f}" + ("" if low is None else f" ({low:.3f} to {high:.3f})")


def _delta(found: Mapping[str, Any]) -> str:
    low, high = found["delta_95"] or (None, None)
    relative = "" if found["relative"] is None else f", {found['relative']:+.1%}"
    return f"{found['delta']:+.3f}" + ("" if low is None else f" ({low:+.3f} to {high:+.3f}{relative})")


def _general(general: Mapping[str, Any]) -> str:
    domains = sorted({domain for found in general.values() for domain in found})
    rows = [["after", *(f"{domain}: perplexity" for domain in domains)]]
    rows += [[stage, *(f"{found[domain]['perplexity']:.2f}" for domain in domains)] for stage, found in general.items()]
    return markdown(rows)
