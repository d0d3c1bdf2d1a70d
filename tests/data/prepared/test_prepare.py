"""A prepared corpus holds what reading the sources into memory gives, however it is divided, interrupted and found."""

import gzip
import json
import os
import resource
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_ads.cli import main
from megatron_ads.config.data import DataConfig, SourceConfig, SourceKind, SplitBy
from megatron_ads.config.recipes import load_recipe
from megatron_ads.data.chat import load_tokenizer
from megatron_ads.data.corpus import read_corpus, tokenize
from megatron_ads.data.demo_tokenizer import write_tokenizer
from megatron_ads.data.prepared import file_content, portion, prepare
from megatron_ads.data.prepared.corpus_record import CorpusRecord
from megatron_ads.data.prepared.selection import PreparedData, open_selection, select
from megatron_ads.errors import DataError
from megatron_ads.rows import TokenizedRow

BUILTIN = SourceConfig(kind=SourceKind.builtin, rows=300)
SEQ_LENGTH = 200


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder, 1024)
    return folder


@pytest.fixture(autouse=True)
def small_portions(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (file_content, prepare):
        monkeypatch.setattr(module, "BLOCK_BYTES", 1000)
    monkeypatch.setattr(prepare, "_ROWS_OF_A_PORTION", 64)


def line(number: int, **fields: Any) -> dict[str, Any]:
    messages = [
        {"role": "user", "content": f"question {number % 90} " + "word " * (number % 50)},
        {"role": "assistant", "content": f"answer {number % 7}"},
    ]
    return {"messages": messages, "weight": 0 if number % 31 == 0 else 1 + number % 3} | fields


def write_lines(file: Path, records: list[dict[str, Any]], *, blank_every: int = 9) -> Path:
    texts = [json.dumps(record) + ("\n" if number % blank_every else "\n\n") for number, record in enumerate(records)]
    file.write_text("".join(texts), encoding="utf-8")
    return file


def own(path: Path, **fields: Any) -> SourceConfig:
    return SourceConfig(kind=SourceKind.jsonl, path=str(path), **fields)


def prepared(data: DataConfig, tokenizer: Path, folder: Path, *, by_task: bool = False, **how: Any) -> PreparedData:
    corpus = prepare.prepare(data, tokenizer, folder, **{"workers": 1, **how})
    CorpusRecord.read(corpus).tell(data.sources)
    return open_selection(select(corpus, data, by_task=by_task, evaluate=data.validation_rows > 0), data)


def as_lists(rows: Any) -> list[tuple[str, str, list[int], list[float]]]:
    return [(row.id, row.task, row.tokens.tolist(), row.loss_weights.tolist()) for row in rows]


def in_memory(data: DataConfig, folder: Path) -> tuple[list[list[TokenizedRow]], list[TokenizedRow], Counter[Any]]:
    corpus, chat = read_corpus(data), load_tokenizer(folder)
    sources = [tokenize(rows, chat, seq_length=data.seq_length) for rows in corpus.training]
    held_out = tokenize(corpus.validation, chat, seq_length=data.seq_length)
    left_out = sum((source.left_out for source in sources), Counter())
    return [source.rows for source in sources], held_out.rows, left_out


def folder_of_parts(folder: Path) -> Path:
    folder.mkdir()
    write_lines(folder / "a.jsonl", [line(number) for number in range(60)])
    with gzip.open(folder / "b.jsonl", "wt", encoding="utf-8") as file:  # by its bytes, not its name
        file.write("\n".join(json.dumps(line(number, group=f"g{number % 5}")) for number in range(60, 90)))
    (folder / "c.jsonl").write_text(json.dumps(line(91, id="last")), encoding="utf-8")  # without a newline
    return folder


@pytest.mark.parametrize(
    "settings",
    [
        {"validation_rows": 0},
        {"validation_rows": 40},
        {"validation_rows": 40, "validation_rows_per_group": 1, "seed": 3, "reasoning": False},
    ],
    ids=str,
)
def test_rows_order_and_held_out_rows_are_those_of_reading_everything(
    settings: dict[str, Any], tokenizer: Path, tmp_path: Path
) -> None:
    source = own(folder_of_parts(tmp_path / "rows"), weight=2.0)
    data = DataConfig(sources=[BUILTIN, source], seq_length=SEQ_LENGTH, **settings)
    found = prepared(data, tokenizer, tmp_path / "prepared")
    training, held_out, left_out = in_memory(data, tokenizer)
    assert len(training[1]) > 20 and left_out
    assert [as_lists(source.rows) for source in found.training] == list(map(as_lists, training))
    assert as_lists(found.held_out) == as_lists(held_out)
    assert list(found.left_out.items()) == list(left_out.items())
    assert [(source.weight, source.adaptive_task) for source in found.training] == [(1.0, None), (2.0, None)]
    assert found.training[1].name == f"chat rows ({source.path})"
    in_order = [replace(source, known_content=None) for source in found.training]
    assert [source.content for source in in_order] == [source.content for source in found.training]


def test_tables_are_read_part_by_part_and_held_out_by_time(tokenizer: Path, tmp_path: Path) -> None:
    head, cells = "prompt,target,when\n", [f"what is {n}?,it is {n},{1_700_000_000 + n}\n" for n in range(80)]
    folder = tmp_path / "table"
    folder.mkdir()
    for part in range(2):
        (folder / f"{part}.csv").write_text(head + "".join(cells[part::2]), encoding="utf-8")
    columns = {"prompt": "prompt", "target": "target", "time": "when"}
    source = SourceConfig(kind=SourceKind.table, path=str(folder), columns=columns)
    data = DataConfig(sources=[source], seq_length=SEQ_LENGTH, validation_rows=20, split_by=SplitBy.time)
    found = prepared(data, tokenizer, tmp_path / "prepared")
    training, held_out, _ = in_memory(data, tokenizer)
    assert as_lists(found.training[0].rows) == as_lists(training[0])
    assert as_lists(found.held_out) == as_lists(held_out)


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_files_made_for_verl_are_read_in_pieces(form: str, tokenizer: Path, tmp_path: Path) -> None:
    rows = [
        {"data_source": "mine", "prompt": line(n)["messages"][:1], "reward_model": {"ground_truth": f"{n}"}}
        for n in range(90)
    ]
    file = write_lines(tmp_path / "rows.jsonl", rows)
    if form == "parquet":
        file = tmp_path / "rows.parquet"
        pq.write_table(pa.Table.from_pylist(rows), file)
    data = DataConfig(sources=[SourceConfig(kind=SourceKind.verl, path=str(file))], seq_length=SEQ_LENGTH)
    training, _, _ = in_memory(data, tokenizer)
    assert len(training[0]) == 90
    assert as_lists(prepared(data, tokenizer, tmp_path / "prepared").training[0].rows) == as_lists(training[0])


def bad_lines() -> list[bytes]:
    lines = [json.dumps(line(number, id=f"r{number}")).encode() for number in range(40)]
    lines[7], lines[20] = b"{", json.dumps(line(20, id="r3")).encode()
    lines[30] = json.dumps(line(30, id="r30", weight=-1)).encode()
    lines[33] = json.dumps(line(33, id="wrong", task="query_ad_relevance")).encode()
    lines[35] = json.dumps(line(35, id="wrong")).encode()  # after one that cannot be used either
    return lines


def test_bad_rows_and_repeated_ids_are_written_aside_with_their_numbers(tokenizer: Path, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b"\n".join(bad_lines()))
    aside = {name: tmp_path / f"{name}.jsonl" for name in ("memory", "prepared", "again")}
    data = DataConfig(sources=[own(file, rejected=str(aside["memory"]))], seq_length=SEQ_LENGTH)
    training, _, _ = in_memory(data, tokenizer)
    for name in ("prepared", "again"):  # found the second time
        data.sources[0].rejected = str(aside[name])
        found = prepared(data, tokenizer, tmp_path / "prepared")
        assert as_lists(found.training[0].rows) == as_lists(training[0])
        assert aside[name].read_text() == aside["memory"].read_text()
    reasons = [(row["row"], row["reason"]) for row in map(json.loads, aside["again"].read_text().splitlines())]
    expected = {8: "unreadable_row", 21: "duplicate_id", 31: "wrong_type", 36: "duplicate_id"}
    assert reasons == list(expected.items())


@pytest.mark.parametrize("first", [7, 20, 30])
def test_the_first_bad_row_is_the_error_without_a_file_for_it(first: int, tokenizer: Path, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    good = [json.dumps(line(number, id=f"r{number}")).encode() for number in range(40)]
    file.write_bytes(b"\n".join([*good[:first], *bad_lines()[first:]]))
    data = DataConfig(sources=[own(file)], seq_length=SEQ_LENGTH)
    with pytest.raises(DataError) as in_memory_error:
        read_corpus(data)
    with pytest.raises(DataError) as error:
        prepared(data, tokenizer, tmp_path / "prepared")
    assert str(error.value) == str(in_memory_error.value)
    assert f"row {first + 1}: " in str(error.value)


def test_an_interrupted_preparation_is_continued_and_never_looks_complete(
    tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = DataConfig(sources=[own(folder_of_parts(tmp_path / "rows"))], seq_length=SEQ_LENGTH)
    made: list[str] = []
    make_row = portion.tokenize_row

    def stop_in_the_fifth(row: Any, tokenizer: Any) -> TokenizedRow:
        if len(made) == 4:
            raise KeyboardInterrupt
        return make_row(row, tokenizer)

    monkeypatch.setattr(portion, "tokenize_row", stop_in_the_fifth)
    with pytest.raises(KeyboardInterrupt):
        prepared(data, tokenizer, tmp_path / "p", on_advance=lambda advance: made.append(""))
    monkeypatch.setattr(portion, "tokenize_row", make_row)
    (folder,) = (each for each in (tmp_path / "p").iterdir() if each.is_dir())
    assert not prepare.is_complete(folder)
    kept = {file.name: file.stat().st_ino for file in folder.glob("*.arrow*")}
    assert len(kept) == 8  # four portions and their reports, and nothing of the fifth
    (folder / "rows-0-00004.arrow.1f.partial").touch()  # as a process that is killed leaves it
    found = prepared(data, tokenizer, tmp_path / "p")
    assert {name: (folder / name).stat().st_ino for name in kept} == kept
    assert not list(folder.glob("*.partial"))
    training, _, _ = in_memory(data, tokenizer)
    assert as_lists(found.training[0].rows) == as_lists(training[0])


def test_a_corpus_is_found_by_content_and_made_anew_when_something_that_matters_changes(
    tokenizer: Path, tmp_path: Path
) -> None:
    file = write_lines(tmp_path / "rows.jsonl", [line(number) for number in range(30)])
    data = DataConfig(sources=[own(file)], seq_length=SEQ_LENGTH)

    def key(changed: DataConfig) -> Path:
        return prepare.prepare(changed, tokenizer, tmp_path / "p", workers=1)

    first = key(data)
    assert prepare.find_prepared(data, tokenizer, tmp_path / "p") == first
    (tmp_path / "moved").mkdir()
    moved = (tmp_path / "moved" / "rows.jsonl").resolve()
    moved.write_bytes(file.read_bytes())
    same = [replace(data, seq_length=9, validation_rows=3, seed=5), replace(data, sources=[own(moved, weight=3.0)])]
    assert {key(each) for each in same} == {first}
    others = [replace(data, reasoning=False), replace(data, sources=[own(file), BUILTIN])]
    write_lines(moved, [line(number) for number in range(31)])
    others.append(replace(data, sources=[own(moved)]))
    assert len({key(each) for each in others} | {first}) == 4


def test_several_processes_make_the_same(tokenizer: Path, tmp_path: Path) -> None:
    data = DataConfig(sources=[own(folder_of_parts(tmp_path / "rows"))], seq_length=SEQ_LENGTH, validation_rows=9)
    one = prepared(data, tokenizer, tmp_path / "one")
    two = prepared(data, tokenizer, tmp_path / "two", workers=2)
    assert as_lists(two.training[0].rows) == as_lists(one.training[0].rows)
    assert two.training[0].content == one.training[0].content


def test_sources_can_be_divided_by_task(tokenizer: Path, tmp_path: Path) -> None:
    lines = [line(number, task="ab"[number % 3 == 0]) for number in range(30)]
    source = own(write_lines(tmp_path / "rows.jsonl", lines), weight=3.0)
    data = DataConfig(sources=[source, replace(BUILTIN, keep_share=True)], seq_length=SEQ_LENGTH)
    found = prepared(data, tokenizer, tmp_path / "p", by_task=True)
    whole = len(found.training[0].rows) + len(found.training[1].rows)
    assert [(each.adaptive_task, each.weight) for each in found.training] == [
        ("a", 3.0 * len(found.training[0].rows) / whole),
        ("b", 3.0 * len(found.training[1].rows) / whole),
        (None, 1.0),
    ]
    assert {row.task for row in found.training[1].rows} == {"b"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"seq_length": 8}, r"None of the 300 training rows of built-in .*seq_length = 8,"),
        (
            {"seq_length": 512, "validation_rows": 60},
            r"All rows of chat rows .*\) are held out.* data\.validation_rows",
        ),
    ],
)
def test_a_source_that_gives_nothing_is_named(
    settings: dict[str, Any], message: str, tokenizer: Path, tmp_path: Path
) -> None:
    file = write_lines(tmp_path / "own.jsonl", [line(number, group="q") for number in range(300)])
    with pytest.raises(DataError, match=message):
        prepared(DataConfig(sources=[BUILTIN, own(file)], **settings), tokenizer, tmp_path / "p")


def test_more_portions_than_the_process_may_open_are_prepared_and_read(tokenizer: Path, tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = 2 * len(os.listdir("/proc/self/fd")) + 20  # tests that came before may have left some open
    rows = [line(n) for n in range(max(600, 5 * most))]
    data = DataConfig(sources=[own(write_lines(tmp_path / "rows.jsonl", rows))])
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, limits[1]))
    try:
        found = prepared(replace(data, seq_length=SEQ_LENGTH), tokenizer, tmp_path / "p")
        assert len(list((tmp_path / "p").glob("*/*.arrow"))) > most
        kept = list(found.training[0].rows)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    training, _, _ = in_memory(replace(data, seq_length=SEQ_LENGTH), tokenizer)
    assert as_lists(kept) == as_lists(training[0])


def test_rows_that_are_deleted_while_they_are_used_are_named_in_one_line(tokenizer: Path, tmp_path: Path) -> None:
    found = prepared(DataConfig(sources=[BUILTIN], seq_length=SEQ_LENGTH), tokenizer, tmp_path / "p")
    first = found.training[0].rows[0]
    shutil.rmtree(tmp_path / "p")
    assert found.training[0].rows[0].tokens.tolist() == first.tokens.tolist()  # of a file that is open
    with pytest.raises(DataError, match=r"cannot be read: .*rows-0-00004\.arrow.*\. If .* was deleted"):
        found.training[0].rows[-1]


@pytest.mark.parametrize(("per_group", "told"), [(None, 1), (6, 0)])
def test_held_out_rows_of_few_groups_are_pointed_out_at_every_start(
    per_group: int | None, told: int, tokenizer: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = write_lines(tmp_path / "own.jsonl", [line(number, group=f"q{number % 30}") for number in range(1050)])
    settings = {"validation_rows": 60, "validation_rows_per_group": per_group}
    data = DataConfig(sources=[own(file)], seq_length=SEQ_LENGTH, **settings)
    for start in (1, 2):
        prepared(data, tokenizer, tmp_path / "p")
        found = [record.message for record in caplog.records if "groups such as queries" in record.message]
        assert len(found) == told * start


def test_a_folder_that_cannot_be_written_is_named_in_one_line(tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DataError, match=r"rows cannot be prepared in .*file/p: Not a directory\. Make room there"):
        prepared(DataConfig(sources=[BUILTIN]), tokenizer, tmp_path / "file" / "p")


def test_the_command_prepares_what_a_job_with_the_same_recipe_finds(
    tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_lines(tmp_path / "rows.jsonl", [line(number) for number in range(30)])
    words = ["data", "prepare", "--recipe", "sft/quickstart", "--tokenizer", str(tokenizer), "--workers", "1", "--json"]
    settings = [f"data.sources=[{{kind: jsonl, path: {file}}}]", f"data.prepared_dir={tmp_path / 'p'}"]
    assert main([*words, *settings]) == 0
    found = json.loads(capsys.readouterr().out)
    data = load_recipe("sft/quickstart", settings, sections=["data"]).data
    assert prepare.find_prepared(data, tokenizer, tmp_path / "p") == Path(found["folder"])
    assert (found["rows"], found["tokens"] > 30) == (30, True)
    assert main([*words, "--workers", "0", *settings]) == 2
