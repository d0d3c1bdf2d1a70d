"""Write examples as chat rows that the source kind ``jsonl`` reads, with the best answers in a file beside them."""

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_ads.data.simulator.examples import Example, reachable_recall
from megatron_ads.data.simulator.tables import flush_file

REPORTED = (1, 5, 20)


def write_examples(folder: Path, name: str, examples: Iterable[Example]) -> dict[str, Any]:
    """Write ``name.jsonl`` and ``name.best.jsonl``; return how many rows there are and the best reachable scores."""
    written = list(examples)
    for suffix, records in (("", map(_row, written)), (".best", map(_best, written))):
        path = folder / f"{name}{suffix}.jsonl"
        _write_lines(path, records)
        flush_file(path)
    if not written:
        return {"rows": 0}
    return {"rows": len(written), "best_reachable": _best_scores(written)}


def _best_scores(examples: Sequence[Example]) -> dict[str, float]:
    if max(len(example.best) for example in examples) > 1:
        return {f"recall@{most}": reachable_recall(examples, most) for most in REPORTED}
    name = "accuracy" if examples[0].row.label is not None else "keeps_every_rule"
    return {name: reachable_recall(examples, 1)}


def _row(example: Example) -> dict[str, Any]:
    row = example.row
    return {
        "id": row.id,
        "task": row.task,
        "group": row.group,
        "label": None if row.label is None else str(row.label),
        "messages": [message.as_dict() for message in row.messages],
    }


def _best(example: Example) -> dict[str, Any]:
    return {"id": example.row.id, "best": example.best, "chances": example.chances}


def _write_lines(path: Path, records: Iterator[dict[str, Any]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
