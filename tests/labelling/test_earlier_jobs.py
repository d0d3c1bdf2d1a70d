"""Jobs after jobs: rows are spared that any earlier one has labelled, as long as they ask the same."""

import json
from pathlib import Path

import pytest

from megatron_ads.config.labelling import LabelConfig
from megatron_ads.errors import ConfigError, DataError
from megatron_ads.labelling import reader_process
from megatron_ads.labelling.job import run_job
from megatron_ads.labelling.report import report_of, summary, write
from tests.inference.scripted_server import Record, Reply, scripted_server
from tests.labelling.jobs import answer, labels_in, number_in, recipe, write_pairs


@pytest.fixture(autouse=True)
def _without_a_process_that_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes seconds to start; ``test_job`` and ``test_resuming`` have it."""
    monkeypatch.setattr(reader_process, "EPOCHS_READ_HERE", 1000)


def _day(folder: Path, server: Record, name: str, previous: list[str], *settings: str) -> LabelConfig:
    named = ", ".join(f"'{folder / each}'" for each in previous)
    url = f"model.url={server.url}"
    config = recipe(folder, folder / "pairs.jsonl", url, f"previous=[{named}]", *settings, out=name)
    run_job(config)
    return config


def test_rows_are_spared_that_jobs_before_the_previous_one_labelled(tmp_path: Path) -> None:
    with scripted_server(answer) as server:
        for day, (name, count) in enumerate([("monday", 6), ("tuesday", 8), ("wednesday", 8), ("thursday", 9)]):
            write_pairs(tmp_path / "pairs.jsonl", count)
            config = _day(tmp_path, server, name, [["monday", "tuesday", "wednesday"][day - 1]] if day else [])
            write(report_of(config))
            assert len(server.bodies) == count
    assert not labels_in(tmp_path / "wednesday") and [row["id"] for row in labels_in(tmp_path / "thursday")] == ["p8"]
    assert "9 rows read, 8 spared" in summary(report_of(config))
    (tmp_path / "monday").rename(tmp_path / "gone")
    with pytest.raises(DataError, match=r"monday holds no labels. Restore it: .* not among those of .*tuesday"):
        recipe_of_friday = recipe(
            tmp_path, tmp_path / "pairs.jsonl", "model.url=http://localhost:9/v1",
            f"previous=['{tmp_path / 'thursday'}']", out="friday",
        )  # fmt: skip
        run_job(recipe_of_friday)


def test_of_a_job_that_is_not_finished_the_labelled_rows_are_spared(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_pairs(tmp_path / "pairs.jsonl", 9)

    def breaks(body: dict[str, object], times: int) -> Reply:
        number = number_in(body["messages"][0]["content"])  # type: ignore[index]
        return Reply(status=404) if number == 4 else answer(body, times)

    with scripted_server(breaks) as server, pytest.raises(ConfigError):
        _day(tmp_path, server, "first", [], "rows_per_epoch=3")
    with scripted_server(answer) as server:
        _day(tmp_path, server, "second", ["first"], "model.model=other")
        assert len(server.bodies) == 6
    assert "first is not finished" in caplog.text and "labelled in another way (model)" in caplog.text
    assert [row["row"] for row in labels_in(tmp_path / "second")] == [3, 4, 5, 6, 7, 8]


def test_a_row_without_an_id_stays_the_same_behind_new_ones(tmp_path: Path) -> None:
    rows = [{"user": f"u{number}", "click": [f"number{number}"]} for number in range(12)]
    file = tmp_path / "pairs.jsonl"
    source = f"sources=[{{kind: table, path: '{file}', task: next_advertiser, columns: {{user: user, click: click}}}}]"
    with scripted_server(lambda body, times: Reply(content="Shoe Shop")) as server:
        file.write_text("".join(json.dumps(row) + "\n" for row in rows[4:]))
        _day(tmp_path, server, "first", [], source)
        wordings = {body["messages"][0]["content"].partition("\n")[0] for body in server.bodies}
        assert len(wordings) > 1  # by the row's id, which its place in the file makes
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        _day(tmp_path, server, "second", ["first"], source)
        assert len(server.bodies) == 12
    assert [row["user"] for row in labels_in(tmp_path / "second")] == ["u0", "u1", "u2", "u3"]


def test_epochs_of_spared_rows_alone_are_none(tmp_path: Path) -> None:
    with scripted_server(answer) as server:
        write_pairs(tmp_path / "pairs.jsonl", 50)
        _day(tmp_path, server, "first", [])
        write_pairs(tmp_path / "pairs.jsonl", 55)
        config = _day(tmp_path, server, "second", ["first"], "rows_per_epoch=4")
        assert len(server.bodies) == 55
    assert len(list((tmp_path / "second" / "labels").iterdir())) == 2
    assert report_of(config)["not_asked"] == {"spared": 50} and report_of(config)["rows_read"] == 55


def test_an_empty_table_is_a_job_without_labels(tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").write_text("")
    with scripted_server(answer) as server:
        config = _day(tmp_path, server, "first", [])
    write(report_of(config))
    assert summary(report_of(config)).splitlines()[:2] == ["0 rows read", "0 labelled"]


def test_folders_that_cannot_be_earlier_jobs_are_named(tmp_path: Path) -> None:
    write_pairs(tmp_path / "pairs.jsonl", 2)
    with scripted_server(answer) as server:
        with pytest.raises(ConfigError, match="this job's own folder"):
            _day(tmp_path, server, "first", ["first"])
        with pytest.raises(DataError, match=r"nowhere holds no labels. Correct previous"):
            _day(tmp_path, server, "first", ["nowhere"])
        damaged = tmp_path / "damaged" / "labels" / "000000.parquet"
        damaged.parent.mkdir(parents=True)
        damaged.write_bytes(b"PAR1")
        with pytest.raises(DataError, match=r"000000.parquet cannot be read"):
            _day(tmp_path, server, "first", ["damaged"])
        _day(tmp_path, server, "first", [])
        assert len(server.bodies) == 2
