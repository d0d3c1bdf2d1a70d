"""What is known of items once they have semantic IDs: a table of them, and texts that tie IDs and texts together."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from conversion.atomic_file import write_small
from megatron_ads.data.semantic_id_table import CODES, ITEM, SEMANTIC_ID, TABLE, TEXT, VERSION, read_columns
from megatron_ads.errors import DataError
from megatron_ads.rows import ChatRow, Message, Role
from megatron_ads.semantic_ids.disambiguation import Codes
from megatron_ads.stable_random import stable_integer
from megatron_ads.tasks.semantic_id import text_of

ALIGNMENT = "alignment.jsonl"
NAMES = "semantic_ids.txt"
"""Every ID, one a line: what may be answered."""
ALIGNMENT_TASK = "semantic_id_alignment"
"""No ads task: evaluations report its perplexity."""
_TO_TEXT = ("What is {id}?", "Describe the item {id}.", "Which item has the semantic ID {id}?")
_TO_ID = ("Semantic ID of: {text}", "Which semantic ID has this item: {text}", "Name the semantic ID of {text}")


@dataclass(frozen=True, slots=True)
class KnownItems:
    """Items of an earlier table, by id."""

    codes: dict[str, Codes]
    texts: dict[str, str]


def write_item_table(folder: Path, codes: Mapping[str, Codes], texts: Mapping[str, str], *, version: str) -> None:
    """Write the table and, of items with a text, the rows of ``alignment_rows`` into a folder that exists."""
    semantic_ids = list(map(text_of, codes.values()))
    columns = {
        ITEM: list(codes),
        SEMANTIC_ID: semantic_ids,
        CODES: list(map(list, codes.values())),
        TEXT: [texts[name] for name in codes],
    }
    schema = pa.schema(
        [(ITEM, pa.string()), (SEMANTIC_ID, pa.string()), (CODES, pa.list_(pa.int32())), (TEXT, pa.string())],
        metadata={VERSION: version},
    )
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns, schema=schema), sink)
    write_small(folder / NAMES, "".join(f"{each}\n" for each in semantic_ids))
    write_small(folder / TABLE, memoryview(sink.getvalue()).tobytes())
    lines = (json.dumps(row.as_dict(), ensure_ascii=False) for row in alignment_rows(codes, texts))
    write_small(folder / ALIGNMENT, "".join(f"{line}\n" for line in lines))


def alignment_rows(codes: Mapping[str, Codes], texts: Mapping[str, str]) -> Iterator[ChatRow]:
    """Yield two rows of each item with a text: from ID to text, and from text to ID.

    Source: the advertiser paper, section 3.5, phase 1, which has them of billions of tokens; the words are ours.
    """
    for name, own in codes.items():
        if text := texts[name]:
            known = {"id": text_of(own), "text": text}
            for kind, wordings, answer in (("text", _TO_TEXT, text), ("id", _TO_ID, known["id"])):
                row_id = f"{kind}-of-{name}"
                asked = wordings[stable_integer(ALIGNMENT_TASK, row_id) % len(wordings)].format(**known)
                messages = (Message(Role.user, asked), Message(Role.assistant, answer))
                yield ChatRow(id=row_id, task=ALIGNMENT_TASK, messages=messages, group=name)


def read_known_items(folder: Path, *, version: str) -> KnownItems:
    """Return the items of an earlier table.

    Raises:
        DataError: If there is none, or it is of another codebook.
    """
    table = read_columns(folder, [ITEM, CODES, TEXT])
    found = (table.schema.metadata or {}).get(VERSION, b"none").decode()
    if found != version:
        raise DataError(f"{folder / TABLE} is of the codebook {found}, not of {version}. Encode with that one.")
    names, codes, texts = (table[column].to_pylist() for column in (ITEM, CODES, TEXT))
    return KnownItems(dict(zip(names, map(tuple, codes), strict=True)), dict(zip(names, texts, strict=True)))
