"""The tables of ``benchmarks.rl_small``: what each step of the path reaches, and what a step of GRPO costs."""

from collections.abc import Mapping, Sequence
from statistics import mean, median
from typing import Any

from megatron_ads.reporting.markdown import markdown

Runs = Mapping[str, Sequence[Mapping[str, Any]]]
"""By reasoning, one for each seed."""


def tables(runs: Runs, gains: Mapping[str, Mapping[str, Any] | None]) -> str:
    """Return both tables as Markdown; ``gains`` has what GRPO adds over all seeds, by reasoning."""
    return f"{_scores(runs, gains)}\n{_costs(runs)}"


def _scores(runs: Runs, gains_of_seeds: Mapping[str, Mapping[str, Any] | None]) -> str:
    first = next(iter(runs.values()))[0]["scores"]["zero-shot"]
    head = ["", "reasoning", f"{first['name']}, mean of seeds", "each seed, and 95 % of resampled groups"]
    rows = [[*head, "readable", "beside"]]
    for way, seeds in runs.items():
        for about in seeds[0]["scores"]:
            found = [seed["scores"][about] for seed in seeds]
            each = ", ".join(f"{_shown(one['value'])}{_range(one['interval'])}" for one in found)
            readable = mean(one["readable"] for one in found)
            value = _shown(mean(one["value"] or 0.0 for one in found))
            rows.append([about, way, value, each, f"{readable:.2f}", _beside(found)])
        if gains := [seed["gain"] for seed in seeds if seed.get("gain")]:
            each = ", ".join(f"{one['value']:+.3f}{_range(one['interval'])}" for one in gains)
            all_seeds = gains_of_seeds.get(way)
            whole = f"{all_seeds['value']:+.3f}{_range(all_seeds['interval'])}" if all_seeds else ""
            rows.append(["what GRPO adds, row by row", way, whole, each, "", ""])
        for about in seeds[0].get("by_length", {}):
            values = [seed["by_length"][about] for seed in seeds]
            rows.append([about, way, _shown(mean(values)), ", ".join(map(_shown, values)), "", ""])
    rows += [[line, "", _shown(value), "", "", ""] for line, value in first["lines"].items()]
    return markdown(rows)


def _beside(found: Sequence[Mapping[str, Any]]) -> str:
    """Return the means of what stands beside the headline."""
    names = found[0].get("beside", {})
    return ", ".join(f"{name} {mean(one['beside'][name] for one in found):.3g}" for name in names)


def _costs(runs: Runs) -> str:
    rows = [["of a step of GRPO", *runs]]
    phases = next(iter(runs.values()))[0]["phases"]
    seconds = {way: {name: [s for seed in seeds for s in seed["phases"][name]] for name in phases}
               for way, seeds in runs.items()}  # fmt: skip
    rows += [[f"{name}, s", *(_spread(of[name]) for of in seconds.values())] for name in phases]
    costs = [seeds[0]["cost"] for seeds in runs.values()]
    rows += [
        ["rollouts, tokens/s", *(f"{_tokens(cost) / cost['rollout_seconds']:.0f}" for cost in costs)],
        ["transformers.generate, tokens/s", *(f"{_tokens(cost) / cost['generate_seconds']:.0f}" for cost in costs)],
        ["their ratio", *(f"{cost['generate_seconds'] / cost['rollout_seconds']:.2f}" for cost in costs)],
        ["weights into the engine, s", *(f"{cost['update_weights_seconds']:.4f}" for cost in costs)],
        ["copy of the same bytes, s", *(f"{cost['copy_seconds']:.4f}" for cost in costs)],
        ["their ratio", *(f"{cost['update_weights_seconds'] / cost['copy_seconds']:.2f}" for cost in costs)],
    ]
    return markdown(rows)


def _spread(values: Sequence[float]) -> str:
    return f"{median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def _tokens(cost: Mapping[str, Any]) -> float:
    return float(cost["answers"] * cost["tokens_per_answer"])


def _range(interval: Sequence[float] | None) -> str:
    return f" ({interval[0]:.3f} to {interval[1]:.3f})" if interval else ""


def _shown(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
