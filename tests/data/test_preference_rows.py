"""Files of preferences: the project's form and TRL's, JSONL and Parquet, and rows that tell no preference."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_ads.config.data import SourceConfig, SourceKind
from megatron_ads.data.bad_rows import BadRow, BadRowError
from megatron_ads.data.preference_rows import from_preference
from megatron_ads.data.sources import divided, read_source
from megatron_ads.errors import DataError
from megatron_ads.rows import Fact

ASKED = {"role": "user", "content": "Which ad?"}


def _said(*texts: str) -> Any:
    return [[{"role": "assistant", "content": text}] for text in texts]


FORMS: dict[str, dict[str, Any]] = {
    "texts": {"prompt": "Which ad?", "chosen": "A", "rejected": ["B", "C"]},
    "messages": {"prompt": [ASKED], "chosen": _said("A")[0], "rejected": _said("B", "C")},
    "prompt in the answers": {
        "chosen": [ASKED, *_said("A")[0]],
        "rejected": [[ASKED, *each] for each in _said("B", "C")],
    },
}


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_row(form: str, suffix: str, tmp_path: Path) -> None:
    file, row = tmp_path / f"rows{suffix}", FORMS[form] | {"weight": 2.0, "score_chosen": 7}
    if suffix == ".jsonl":
        file.write_text(json.dumps(row) + "\n")
    else:
        pq.write_table(pa.Table.from_pylist([row]), file)
    source = SourceConfig(kind=SourceKind.preference, path=str(file))
    (read,) = read_source(source, seed=0)
    assert [(str(message.role), message.content) for message in read.messages] == [
        ("user", "Which ad?"),
        ("assistant", "A"),
    ]
    assert read.facts == {Fact.rejected: ["B", "C"]} and read.weight == 2
    assert divided(source) is not None


def test_one_rejected_answer_may_stand_alone() -> None:
    for rejected in ("B", _said("B")[0]):
        fields = from_preference({"prompt": "p", "chosen": "A", "rejected": rejected})
        assert fields["facts"] == {Fact.rejected: ["B"]}


ROW = {"prompt": "p", "chosen": "A", "rejected": "B"}
BAD: list[tuple[dict[str, Any], BadRow, str]] = [
    ({"rejected": ["B", "A"]}, BadRow.no_preference, "has the chosen answer among its rejected ones"),
    ({"rejected": []}, BadRow.no_preference, "has no rejected answer"),
    ({"rejected": [[ASKED, *_said("B")[0]]]}, BadRow.no_preference, "do not continue the same messages"),
    ({"rejected": None}, BadRow.no_preference, "has no rejected answer"),
    ({"rejected": 3}, BadRow.wrong_type, "rejected is 3; it must be text, or messages"),
    ({"chosen": [ASKED]}, BadRow.wrong_type, "chosen is [{"),
    ({"chosen": " "}, BadRow.empty_text, "chosen is ' '"),
    ({"prompt": 3}, BadRow.no_target, "prompt is 3; it must be text or messages"),
    ({"prompt": []}, BadRow.no_target, "prompt is []"),
]


@pytest.mark.parametrize(("changes", "reason", "message"), BAD)
def test_a_row_that_tells_no_preference_is_named(changes: dict[str, Any], reason: BadRow, message: str) -> None:
    with pytest.raises(BadRowError) as caught:
        from_preference(ROW | changes)
    assert (caught.value.reason, message in str(caught.value)) == (reason, True)


def test_bad_rows_end_the_reading_or_are_written_aside(tmp_path: Path) -> None:
    file, aside = tmp_path / "rows.jsonl", tmp_path / "aside.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in (ROW, ROW | {"rejected": "A"})))
    with pytest.raises(DataError, match="row 2: no_preference: has the chosen answer among its rejected ones"):
        read_source(SourceConfig(kind=SourceKind.preference, path=str(file)), seed=0)
    assert len(read_source(SourceConfig(kind=SourceKind.preference, path=str(file), rejected=str(aside)), seed=0)) == 1
    assert json.loads(aside.read_text())["reason"] == "no_preference"


def test_a_file_without_the_column_is_refused(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist([{"prompt": "p", "chosen": "A"}]), tmp_path / "rows.parquet")
    with pytest.raises(DataError, match="has no column 'rejected'; kind preference reads prompt, chosen, rejected"):
        read_source(SourceConfig(kind=SourceKind.preference, path=str(tmp_path / "rows.parquet")), seed=0)
