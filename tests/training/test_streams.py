"""The rows of a job: whatever is wrong with one is counted by name, once, and the job trains on the others."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from conversion.sources import open_source
from megatron_ads.config.recipes import load_recipe
from megatron_ads.errors import DataError
from megatron_ads.layout import ParallelLayout
from megatron_ads.training.streams import open_streams
from parity_tests.harness.real_job import write_small_model

LINE_LIMIT = 10_000_000


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_model(tmp_path_factory.mktemp("rows") / "model")


def row(name: str, target: str = "<think></think><Label>Good</Label>", **fields: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": f"Query: {name}"}, {"role": "assistant", "content": target}]
    return {"id": name, "task": "query_ad_relevance", "messages": messages} | fields


REJECTED: dict[str, bytes] = {
    "empty_text": json.dumps(row("empty", " ")).encode(),
    "cell_too_long": json.dumps(row("x" * LINE_LIMIT)).encode(),
    "invalid_utf8": json.dumps(row("latin")).encode().replace(b"latin", b"l\xe4tin"),
    "duplicate_id": json.dumps(row("good0")).encode(),
    "no_target": json.dumps(row("n") | {"messages": [{"role": "user", "content": "hello"}]}).encode(),
    "unreadable_row": b'{"id": ',
}
"""Found while the file is read; written aside."""
FAULTY = {
    "unknown label": row("great", "<think></think><Label>Great</Label>"),
    "off the scale": row("nine", "<think></think><Score>9</Score>", task="ad_user_relevance"),
    "another label": row("differs", label="Bad"),
}
LONG = {"target": row("t", "word " * 300, task="chat"), "prompt": row("word " * 300, "yes", task="chat")}


def write_rows(folder: Path) -> Path:
    good = [json.dumps(row(f"good{number}")).encode() for number in range(20)]
    others = [json.dumps(record).encode() for record in (*FAULTY.values(), *LONG.values())]
    file = folder / "rows.jsonl"
    file.write_bytes(b"\n".join([*good, *REJECTED.values(), *others]) + b"\n")
    return file


def streams(model: Path, source: str, *overrides: str) -> Any:
    settings = [f"model.load={model}", f"data.sources=[{source}]", "data.seq_length=128", *overrides]
    config = load_recipe("sft/quickstart", settings)
    layout = ParallelLayout(world=1)
    sections = (config.data, config.train, config.loss, config.reweight)
    return open_streams(*sections, open_source(model), layout, directory=model.parent / "prepared")


def test_every_kind_of_bad_row_is_counted_and_the_others_are_trained_on(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file, aside = write_rows(tmp_path), tmp_path / "aside.jsonl"
    training, held_out = streams(
        model,
        f"{{kind: jsonl, path: {file}, rejected: {aside}}}",
        "data.validation_rows=0",
        "train.evaluate_every=null",
    )
    assert held_out.rows == []
    assert {row.id for row in training._mixture.rows} == {f"good{number}" for number in range(20)}
    assert [json.loads(line)["reason"] for line in aside.read_text().splitlines()] == [*REJECTED]
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 3
    assert all(f"1 {reason}" in warnings[0] for reason in REJECTED)
    assert "2 unreadable_target, 1 label_differs. The first is 'great' of task query_ad_relevance" in warnings[1]
    assert warnings[2].endswith("left out: 1 target_longer_than_seq_length, 1 longer_than_seq_length")


@pytest.mark.parametrize("reason", REJECTED)
def test_without_a_file_to_write_it_to_the_first_bad_row_ends_the_job_in_one_line(
    reason: str, model: Path, tmp_path: Path
) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(json.dumps(row("good0")).encode() + b"\n" + REJECTED[reason] + b"\n")
    with pytest.raises(DataError) as caught:
        streams(model, f"{{kind: jsonl, path: {file}}}", "data.validation_rows=0", "train.evaluate_every=null")
    message = str(caught.value)
    assert message.startswith(f"{file}, row 2: {reason}: ") and "setting rejected" in message
    assert "\n" not in message and len(message) < 500


def test_held_out_rows_that_all_are_too_long_are_an_error_and_not_an_evaluation_that_never_happens(
    model: Path, tmp_path: Path
) -> None:
    file = tmp_path / "rows.jsonl"
    rows = [row(f"{number}", "word " * 300 if number % 2 else "yes", task="chat") for number in range(40)]
    file.write_text(
        "".join(json.dumps(record | {"group": f"g{index % 2}"}) + "\n" for index, record in enumerate(rows))
    )
    # Two groups, one of short rows and one, held out with this seed, of long ones.
    settings = ["data.validation_rows=20", "data.seed=0"]
    with pytest.raises(
        DataError, match=r"None of the 20 held-out rows can be used: 20 target_longer.*data\.seq_length = 128"
    ):
        streams(model, f"{{kind: jsonl, path: {file}}}", *settings)
    _, held_out = streams(model, f"{{kind: jsonl, path: {file}}}", *settings, "data.seq_length=1000")
    assert {row.id for row in held_out.rows} == {f"{number}" for number in range(1, 40, 2)}
