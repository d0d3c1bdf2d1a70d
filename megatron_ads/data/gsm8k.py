"""School mathematics (GSM8K, arXiv:2110.14168) as general-domain rows: they keep abilities that ads rows do not train.

The worked solution is the reasoning; the calculator's marks, ``<<3*4=12>>``, are left out. The published training
questions are read; the test questions are for benchmarks.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_ads.data.public_data import locate, read_rows
from megatron_ads.data.rows import ChatRow, Fact, JsonValue, Message, Role
from megatron_ads.errors import DataError

TASK = "gsm8k"
FILE = Path("gsm8k") / "train.jsonl"
ANSWER = "####"
_CALCULATOR = re.compile(r"<<[^>]*>>")


def gsm8k_file(path: str | None) -> Path:
    """Return the file of questions.

    Raises:
        DataError: If neither ``path`` nor the environment names anything.
    """
    return locate(path, FILE, kind=TASK)


def gsm8k_rows(file: Path, *, limit: int | None = None) -> list[ChatRow]:
    """Return the questions of a file, the first ``limit`` of them.

    Raises:
        DataError: With the row number, for the first record that cannot be used.
    """
    return read_rows(
        file, lambda number, record: _read_record(record, row_id=f"{TASK}-{file.stem}-{number}"), limit=limit
    )


def _read_record(record: Mapping[str, Any], *, row_id: str) -> ChatRow:
    for name in ("question", "answer"):
        if not isinstance(record.get(name), str) or not record[name].strip():
            raise DataError(f"{name} is {record.get(name)!r}; it must be text that is not empty.")
    solution, mark, number = record["answer"].rpartition(ANSWER)
    if not mark or not number.strip() or not solution.strip():
        raise DataError(f"answer is {record['answer']!r:.80}; a solution, then {ANSWER} and the result are expected.")
    result = number.strip().replace(",", "")
    question, reasoning = record["question"].strip(), _CALCULATOR.sub("", solution).strip()
    messages = (
        Message(Role.user, question),
        Message(Role.assistant, f"<think>{reasoning}</think>{ANSWER} {result}"),
    )
    facts: dict[str, JsonValue] = {Fact.question: question, Fact.ground_truth: result, Fact.reasoning: reasoning}
    return ChatRow(id=row_id, task=TASK, messages=messages, group=question, label=result, facts=facts)
