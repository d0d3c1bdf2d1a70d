"""Every answer as one JSON line, for people and for other programs."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from conversion.atomic_file import write_small
from megatron_ads.evaluation.answer import Answer


def write_answers(file: Path, answers: Sequence[Answer]) -> None:
    """Write all answers; the file appears when it is complete."""
    write_small(file, "".join(json.dumps(_line(answer), ensure_ascii=False) + "\n" for answer in answers))


def _line(answer: Answer) -> dict[str, Any]:
    line: dict[str, Any] = {
        "id": answer.row.id,
        "task": answer.row.task,
        "prompt": answer.row.prompt[-1].content,
        "target": answer.row.target,
        "expected": answer.row.label,
        "ended": answer.ended,
        "text": answer.text,
    }
    if answer.beams:
        line["beams"] = [
            {"text": beam.text, "log_probability": beam.log_probability, "score": beam.score} for beam in answer.beams
        ]
    return line
