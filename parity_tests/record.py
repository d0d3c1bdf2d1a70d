"""Write a recorded run of the ladder as a page of Markdown, with the machine and the versions it was made on.

PARITY_FIGURES=figures.jsonl pytest parity_tests
python -m parity_tests.rung_10_pipeline --record rung-10.json
python -m parity_tests.record figures.jsonl rung-10.json parity_tests/results/cpu.md
"""

import json
import sys
from pathlib import Path
from typing import Any

from megatron_ads.observability.provenance import provenance


def render(figures: list[dict[str, Any]], pipeline: dict[str, Any], measured: dict[str, Any]) -> str:
    """Return the page: the circumstances, then a row for each figure."""
    host = measured["host"]
    versions = ", ".join(f"{name} {version}" for name, version in measured["versions"].items() if version)
    lines = [
        f"# Parity on {', '.join(host['gpus']) or 'CPU'}",
        "",
        f"- machine: {host['cpu']}, {host['cores']} cores, {host['memory_bytes'] / 2**30:.0f} GiB",
        f"- versions: {versions}",
        f"- revision: {measured['revision']}",
        "- commands: `pytest parity_tests`; `python -m parity_tests.rung_10_pipeline`",
        "",
        "| rung | figure | value | limit |",
        "| ---: | --- | ---: | ---: |",
        *(_row(one["rung"], one["what"], one["value"], one["limit"]) for one in _ordered(figures)),
        *(_row(10, f"61 layers, pp 31: {what}", value, None) for what, value in pipeline["figures"].items()),
    ]
    return "\n".join(lines) + "\n"


def _ordered(figures: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return one row for each figure, the last recorded, by rung."""
    latest = {(one["rung"], one["what"]): one for one in figures}
    return sorted(latest.values(), key=lambda one: one["rung"])


def _row(rung: int, what: str, value: Any, limit: float | None) -> str:
    shown = (
        f"{value:.2g}" if isinstance(value, float) else ", ".join(map(str, value)) if isinstance(value, list) else value
    )
    return f"| {rung} | {what} | {shown} | {'exact' if limit is None and value == 0 else limit or ''} |"


def main(figures: str, pipeline: str, page: str) -> None:
    """Read both recordings and write ``page``."""
    rows = [json.loads(line) for line in Path(figures).read_text().splitlines()]
    Path(page).write_text(render(rows, json.loads(Path(pipeline).read_text()), provenance()), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
