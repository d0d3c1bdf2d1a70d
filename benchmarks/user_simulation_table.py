"""The tables of ``benchmarks.user_simulation``."""

from collections.abc import Mapping
from typing import Any

from megatron_ads.reporting.markdown import markdown
from megatron_ads.user_simulation.agents_run import agents_pages
from megatron_ads.user_simulation.browse_run import browse_pages
from megatron_ads.user_simulation.converse_run import converse_pages
from megatron_ads.user_simulation.reports import Pages, scored

_SHOWN = ("clicks", "satisfaction")


def tables(results: Mapping[str, Any]) -> str:
    """Return all tables as Markdown."""
    runs = results["runs"]
    parts = [_agreements(runs)] if any(name.startswith("browse") for name in runs) else []
    for name, report in runs.items():
        if name in ("browse", "browse-same-users", "browse-model"):
            parts.append(_run(name, browse_pages(report)))
        elif name.startswith("converse"):
            parts.append(_run(name, converse_pages(report)))
        elif name == "agents":
            parts.append(_run(name, agents_pages(report)))
    return "\n".join(parts)


def _agreements(runs: Mapping[str, Any]) -> str:
    """Return Kendall's tau between figures and truths, for all runs in which users browse."""
    rows = [["Kendall's tau", *(f"{figure}, {truth}" for truth in ("utility", "next conversion") for figure in _SHOWN)]]
    for name, report in runs.items():
        if name.startswith("browse"):
            taus = [report["agreement"][truth][figure] for truth in ("utility", "next_conversion") for figure in _SHOWN]
            rows.append([name, *(scored({"value": tau["tau"], "interval": tau["interval"]}, 2) for tau in taus)])
    return markdown(rows)


def _run(name: str, pages: Pages) -> str:
    parts = [f"**{name}**: {pages.lead}\n"]
    parts += [markdown([list(table.head), *map(list, table.rows)]) for table in pages.tables]
    return "\n".join([*parts, *pages.notes, ""])
