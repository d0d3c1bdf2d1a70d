"""Cells are the same whatever writes the file; text that is none and missing cells are found one by one."""

import gzip
import json
import uuid
from decimal import Decimal
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_ads.data.jsonl import jsonl_rows
from megatron_ads.data.own_tables import table_rows
from megatron_ads.errors import DataError
from tests.data.tables import COLUMNS, PAIR, PAIRS, pairs, write

UUIDS = [uuid.UUID(int=1), uuid.UUID(int=2)]
PARQUET_TYPES: dict[str, tuple[pa.Array, list[str]]] = {
    "categories": (pa.array(["tent", "sofa"]).dictionary_encode(), ["tent", "sofa"]),
    "large text": (pa.array(["tent", "sofa"], pa.large_string()), ["tent", "sofa"]),
    "views of text": (pa.array(["tent", "sofa"], pa.string_view()), ["tent", "sofa"]),
    "bytes": (pa.array([b"tent", b"sofa"], pa.binary()), ["tent", "sofa"]),
    "broken categories": (pa.array([b"tent", b"\xff"]).view(pa.string()).dictionary_encode(), ["tent"]),
    "decimals of BigQuery": (pa.array([Decimal("12"), Decimal("3.5")], pa.decimal128(38, 9)), ["12", "3.5"]),
    "UUIDs": (
        pa.ExtensionArray.from_storage(pa.uuid(), pa.array([each.bytes for each in UUIDS], pa.binary(16))),
        list(map(str, UUIDS)),
    ),
}


@pytest.mark.parametrize("name", PARQUET_TYPES)
def test_types_that_parquet_alone_has_are_text(tmp_path: Path, name: str) -> None:
    column, wanted = PARQUET_TYPES[name]
    file = write(tmp_path, "parquet", pairs(q=column))
    rows = table_rows(file, columns=COLUMNS, task=PAIRS, rejected=tmp_path / "r.jsonl")
    assert [row.group for row in rows] == wanted


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_nan_is_missing_and_never_a_word(tmp_path: Path, form: str) -> None:
    table = pairs(d=[float("nan"), 2.5], l=["Good", "Good"])
    first, second = table_rows(write(tmp_path, form, table), columns=COLUMNS | {"description": "d"}, task=PAIRS)
    assert "nan" not in first.messages[0].content
    assert "Text: 2.5" in second.messages[0].content
    for column, value in (("q", float("nan")), ("q", float("inf")), ("l", float("nan"))):
        broken = write(tmp_path, form, pairs(**{column: [value, value]}))
        with pytest.raises(DataError, match=r"row 1: (empty_text: \w+ is None|wrong_type: query is inf)"):
            table_rows(broken, columns=COLUMNS, task=PAIRS)


def test_nan_in_a_chat_row_is_null(tmp_path: Path) -> None:
    row = {"label": float("nan"), "messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    assert jsonl_rows(tmp_path / "rows.jsonl")[0].label is None


GOOD_FILES: dict[str, tuple[str, bytes]] = {
    "semicolons": ("a.csv", b"q;t;l\ntent;Big, red;Good\n"),
    "semicolons as Excel says": ("a.csv", b"sep=;\nq;t;l\ntent;Big, red;Good\n"),
    "tabs in .csv": ("a.csv", b"q\tt\tl\ntent\tBig, red\tGood\n"),
    "byte order mark": ("a.csv", b'\xef\xbb\xbfq,t,l\ntent,"Big, red",Good\n'),
    "gzip without its suffix": ("a.csv", gzip.compress(b'q,t,l\ntent,"Big, red",Good\n')),
    "empty lines first": ("a.csv", b'\n\nq,t,l\ntent,"Big, red",Good\n'),
    "a quoted head": ("a.csv", b'"q","t","two\nlines","l"\ntent,"Big, red",x,Good\n'),
    "another column twice": ("a.csv", b'q,t,l,x,x\ntent,"Big, red",Good,1,2\n'),
    "CR LF": ("a.csv", b'q,t,l\r\ntent,"Big, red",Good\r\n'),
    "JSON with a mark": ("a.jsonl", b'\xef\xbb\xbf{"q": "tent", "t": "Big, red", "l": "Good"}\n'),
}


@pytest.mark.parametrize("name", GOOD_FILES)
def test_common_habits_of_writing_tables_are_read(tmp_path: Path, name: str) -> None:
    file, content = GOOD_FILES[name]
    (tmp_path / file).write_bytes(content)
    (row,) = table_rows(tmp_path / file, columns=PAIR, task=PAIRS)
    assert (row.id, row.group, row.label, row.facts["ad"]["title"]) == (f"{file}-1", "tent", "Good", "Big, red")  # type: ignore[call-overload, index]


def test_rows_have_their_numbers_below_a_mark_of_excel(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("sep=;\nq;t;l\ntent;x;Good\ntent;Good\n")
    with pytest.raises(DataError, match="row 2: unreadable_row: 2 cells; the head has 3"):
        table_rows(tmp_path / "a.csv", columns=PAIR, task=PAIRS)


def test_a_row_that_is_broken_in_two_ways_spoils_no_other(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.csv").write_bytes("größe,t,l\nzelt,für,Good\n\xff\n".encode("latin-1").replace(b"\xfc", "ü".encode())
                                     .replace("größe".encode("latin-1"), "größe".encode()))  # fmt: skip
    columns = {"query": "größe", "title": "t", "label": "l"}
    (row,) = table_rows(tmp_path / "a.csv", columns=columns, task=PAIRS, rejected=tmp_path / "r.jsonl")
    assert "Ad: für" in row.messages[0].content
    assert json.loads((tmp_path / "r.jsonl").read_text())["message"] == "1 cells; the head has 3."
    assert "Exception ignored" not in capfd.readouterr().err


def test_a_cell_of_many_lines_is_pointed_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    lines = ["", *["sofa,Sofa,Good"] * 21, ""]
    lines[0] = 'tent,"24 inch screen,Good'
    (tmp_path / "a.csv").write_text("q,t,l\n" + "\n".join([*lines[:-1], 'lamp,12",Bad']) + "\n")
    for _ in range(2):  # a preview reads a table twice
        table_rows(tmp_path / "a.csv", columns=PAIR, task=PAIRS)
    assert caplog.text.count("row 1: t has 23 lines. Is a quote sign not closed") == 1


def test_a_column_twice_in_parquet_is_refused(tmp_path: Path) -> None:
    column = pa.array(["x"])
    pq.write_table(pa.Table.from_arrays([column] * 4, names=["q", "t", "l", "q"]), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="has the column 'q' 2 times"):
        table_rows(tmp_path / "a.parquet", columns=PAIR, task=PAIRS)
