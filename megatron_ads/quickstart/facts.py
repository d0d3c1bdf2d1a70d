"""The numbers of a quickstart, gathered from the stages' records, the metrics and the machine: ``report.json``."""

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import mean, median
from typing import Any

from megatron_ads.config.run import SftConfig
from megatron_ads.parity.compare_logits import LIMIT
from megatron_ads.quickstart.stages import Stage, StageRecord
from megatron_ads.quickstart.workflow import QuickstartFolder
from megatron_ads.tasks.relevance import TASK

_ENDS = 10
"""Steps that the loss at the start and at the end is averaged over."""


def gather_facts(
    folder: QuickstartFolder,
    stages: Sequence[Stage],
    records: Mapping[str, StageRecord],
    metrics: Sequence[Mapping[str, Any]],
    *,
    config: SftConfig,
    data: Mapping[str, Any],
    provenance: Mapping[str, Any],
) -> dict[str, Any]:
    """Return everything the report says, as JSON values.

    ``data`` says what was trained on, ``provenance`` is ``observability.provenance.provenance()``.
    """
    return {
        "written": datetime.now(UTC).isoformat(timespec="seconds"),
        "data": dict(data),
        "layout": {name: getattr(config.layout, name) for name in ("tp", "cp", "pp", "vpp", "ep", "etp")},
        "training": training_facts(metrics),
        "evaluation": {
            "before": records["evaluate-before"].result["tasks"][TASK],
            "after": records["evaluate-after"].result["tasks"][TASK],
            "after_fp8": records["evaluate-fp8"].result["tasks"][TASK],
        },
        "parity": {**records["compare-logits"].result, "limit": LIMIT},
        "examples": examples(folder.answers("after")),
        "fp8_export": records["verify-fp8"].result,
        "stages": [{"name": one.name, "title": one.title, "seconds": records[one.name].seconds} for one in stages],
        "seconds": sum(record.seconds for record in records.values()),
        **provenance,
        "files": {str(path): meaning for meaning, path in folder.described()},
    }


def training_facts(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Summarise the lines of ``metrics.jsonl``: loss at both ends (mean of up to ten steps), typical speed, memory."""

    def column(name: str) -> list[float]:
        return [row[name] for row in rows if row.get(name) is not None]

    losses, validation = column("loss"), column("validation_loss")
    return {
        "steps": len(losses),
        "loss_first": mean(losses[:_ENDS]),
        "loss_last": mean(losses[-_ENDS:]),
        "loss_averaged_over_steps": min(_ENDS, len(losses)),
        "validation_loss_last": validation[-1] if validation else None,
        "tokens_per_second": median(column("tokens_per_second")),
        "tflops_per_gpu": median(column("tflops_per_gpu")),
        "step_seconds": median(column("step_seconds")),
        "max_memory_allocated": max(column("max_memory_allocated"), default=None),
    }


def examples(answers: Path) -> list[dict[str, Any]]:
    """Return the first answer to a row of each label, as the evaluation wrote them."""
    rows = [json.loads(line) for line in answers.read_text(encoding="utf-8").splitlines()]
    first = {row["expected"]: row for row in reversed(rows)}
    return [first[label] for label in sorted(first)]
