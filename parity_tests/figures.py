"""The figures of a run of the ladder: printed with ``pytest -s``, and appended to a file where one is asked for.

``PARITY_FIGURES=FILE`` names the file, JSON lines; ``parity_tests/results`` holds recorded runs.
"""

import json
import os
from pathlib import Path

from parity_tests.machines import CPU_FP32, Machine
from parity_tests.tolerances import Tolerance


def record(
    rung: int, what: str, value: float | int | str, tolerance: Tolerance | None = None, machine: Machine = CPU_FP32
) -> None:
    """Note one value measured on ``machine`` beside the limit it must stay below; None: it must be exact."""
    limit = None if tolerance is None else tolerance.value
    shown = f"{value:.2e}" if isinstance(value, float) else str(value)
    print(f"rung {rung}, {machine}: {what}: {shown}" + (f" (limit {limit:g})" if limit is not None else ""))
    if file := os.environ.get("PARITY_FIGURES"):
        with Path(file).open("a", encoding="utf-8") as lines:
            figure = {"rung": rung, "machine": str(machine), "what": what, "value": value, "limit": limit}
            lines.write(json.dumps(figure) + "\n")
