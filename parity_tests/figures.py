"""The figures of a run of the ladder: printed with ``pytest -s``, and appended to a file where one is asked for.

``PARITY_FIGURES=FILE`` names the file, JSON lines; ``parity_tests/results`` holds recorded runs.
"""

import json
import os
from pathlib import Path

from parity_tests.tolerances import Tolerance


def record(rung: int, what: str, value: float | int | str, tolerance: Tolerance | None = None) -> None:
    """Note one measured value beside the limit it must stay below; None: it must be exact."""
    limit = None if tolerance is None else tolerance.value
    shown = f"{value:.2e}" if isinstance(value, float) else str(value)
    print(f"rung {rung}: {what}: {shown}" + (f" (limit {limit:g})" if limit is not None else ""))
    if file := os.environ.get("PARITY_FIGURES"):
        with Path(file).open("a", encoding="utf-8") as lines:
            lines.write(json.dumps({"rung": rung, "what": what, "value": value, "limit": limit}) + "\n")
