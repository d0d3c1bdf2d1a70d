"""The rows that ``benchmarks.sid_small`` trains on: none of those that are answered later, in whatever form."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_ads.config.data import RowVariant
from megatron_ads.errors import DataError
from megatron_ads.rows import ChatRow, Fact

TEXT, IDS, ITEM = "text", "ids", "item"
"""The next advertiser without and with semantic IDs in the prompt, and the next item."""


def write_training_rows(out: Path, sections: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """Write ``train-VIEW.jsonl`` for each view of the same records; ``sections`` are settings of their data.

    Raises:
        DataError: If other rows are held out with IDs than without.
    """
    from megatron_ads.config.recipes import load_recipe
    from megatron_ads.data.corpus import read_corpus

    corpora = {
        view: read_corpus(load_recipe("sft/small", section, sections=["data"]).data)
        for view, section in sections.items()
    }
    held_out = {view: [_record(row) for row in corpus.validation] for view, corpus in corpora.items()}
    if IDS in held_out and held_out[IDS] != held_out[TEXT]:
        raise DataError("Other rows are held out with semantic IDs than without: their answers cannot be paired.")
    never = {record for records in held_out.values() for record in records}
    written = {}
    for view, corpus in corpora.items():
        rows = [row for of_source in corpus.training for row in of_source if _record(row) not in never]
        _write(out / f"train-{view}.jsonl", rows)
        written[view] = len(rows)
    return {"rows": written, "held_out": {view: len(records) for view, records in held_out.items()}}


def _record(row: ChatRow) -> str:
    """Return what a row is about, whatever it asks."""
    return row.id.removesuffix(f"/{RowVariant.next_item}")


def _write(file: Path, rows: Iterable[ChatRow]) -> None:
    from conversion.atomic_file import write_small

    lines = []
    for row in rows:
        facts = {name: value for name, value in row.facts.items() if name != Fact.events}  # long, and not needed here
        lines.append(json.dumps(replace(row, facts=facts).as_dict(), ensure_ascii=False))
    write_small(file, "".join(f"{line}\n" for line in lines))
