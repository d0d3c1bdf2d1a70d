"""Questions become general-domain rows; the real file is used where it is."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from megatron_ads.data.gsm8k import FILE, gsm8k_rows
from megatron_ads.data.public_data import DATA_ROOT
from megatron_ads.errors import DataError

RECORD = {"question": "What is 3 times 400?", "answer": "It is 3 * 400 = <<3*400=1200>>1,200.\n#### 1,200"}


def write(folder: Path, *records: dict[str, Any]) -> Path:
    file = folder / "train.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return file


def test_a_question_becomes_a_row(tmp_path: Path) -> None:
    (row,) = gsm8k_rows(write(tmp_path, RECORD))
    assert (row.id, row.task, row.label, row.group) == ("gsm8k-train-1", "gsm8k", "1200", RECORD["question"])
    assert row.messages[0].content == RECORD["question"]
    assert row.target == "<think>It is 3 * 400 = 1,200.</think>#### 1200"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"question": " "}, "row 2: question is ' '"),
        ({"answer": None}, "row 2: answer is None"),
        ({"answer": "12"}, "row 2: answer is '12'; a solution, then ####"),
        ({"answer": "Easy.\n####"}, "row 2: answer is"),
    ],
)
def test_a_record_that_cannot_be_used_is_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        gsm8k_rows(write(tmp_path, RECORD, RECORD | change))


def test_limit_reads_no_further(tmp_path: Path) -> None:
    assert len(gsm8k_rows(write(tmp_path, RECORD, RECORD, {}), limit=2)) == 2


REAL = Path(os.environ.get(DATA_ROOT, "")) / FILE


@pytest.mark.skipif(
    not (os.environ.get(DATA_ROOT) and REAL.exists()), reason=f"{DATA_ROOT} names no folder with {FILE}"
)
def test_the_real_questions_are_all_read() -> None:
    rows = gsm8k_rows(REAL)
    assert len(rows) > 7000
    assert all("<<" not in row.target and row.target.endswith(f"#### {row.label}") for row in rows)
