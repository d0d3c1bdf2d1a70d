"""Jobs that were ended at any moment: what they left is taken up, tidied away, or refused in one line."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from megatron_ads.errors import ConfigError, DataError
from megatron_ads.labelling import labeller as labelling
from megatron_ads.labelling import reader_process
from megatron_ads.labelling.job import run_job
from megatron_ads.labelling.parquet_files import write_table
from megatron_ads.labelling.question_store import QuestionStore
from megatron_ads.labelling.ray_runner import EpochActor
from megatron_ads.labelling.report import report_of
from tests.inference.scripted_server import Reply, scripted_server
from tests.labelling.jobs import answer, good_answer, labels_in, number_in, recipe, write_pairs

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _without_a_process_that_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes seconds to start; jobs that are commands of their own have it."""
    monkeypatch.setattr(reader_process, "EPOCHS_READ_HERE", 1000)


class _KilledError(BaseException):
    """Ends a job as if it were killed there: nothing catches it."""


@pytest.mark.parametrize("moment", ["before the labels", "behind the labels", "behind the questions"])
def test_a_job_killed_around_the_labels_of_an_epoch_asks_nothing_twice(
    moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object, **__: object) -> None:
        raise _KilledError

    def written(*arguments: Any) -> None:
        write_table(*arguments)
        raise _KilledError

    pairs = write_pairs(tmp_path / "pairs.jsonl", 12)
    with scripted_server(answer) as server:
        config = recipe(tmp_path, pairs, f"model.url={server.url}", "rows_per_epoch=5")
        out = Path(config.out)
        with monkeypatch.context() as patched, pytest.raises(_KilledError):
            if moment == "before the labels":
                patched.setattr(labelling, "write_table", killed)
            elif moment == "behind the labels":
                patched.setattr(labelling, "write_table", written)
            else:
                patched.setattr(labelling.Journal, "delete", killed)
            run_job(config)
        assert (out / "labels" / "000000.parquet").exists() == (moment != "before the labels")
        for folder in ("questions", "labels"):
            (out / folder / "000007.parquet.1-ab.partial").write_bytes(b"half")
        run_job(config)
        assert len(server.bodies) == 12
    assert [row["row"] for row in labels_in(out)] == list(range(12))
    assert [file.name for file in (out / "questions").iterdir()] == ["complete.json"]
    assert not list((out / "journals").iterdir()) and len(list((out / "labels").iterdir())) == 3


def test_an_epoch_that_has_its_labels_is_not_labelled_again(tmp_path: Path) -> None:
    pairs = write_pairs(tmp_path / "pairs.jsonl", 3)
    with scripted_server(answer) as server:
        config = recipe(tmp_path, pairs, f"model.url={server.url}")
        run_job(config)
        out = Path(config.out)
        with labelling.open_labeller(config) as labeller:
            assert labeller.label_epoch(QuestionStore(out, config), 0) == 0
        assert len(server.bodies) == 3


def test_a_folder_out_of_which_an_epoch_was_taken_is_refused(tmp_path: Path) -> None:
    pairs = write_pairs(tmp_path / "pairs.jsonl", 12)
    with scripted_server(answer) as server:
        config = recipe(tmp_path, pairs, f"model.url={server.url}", "rows_per_epoch=5")
        run_job(config)
        labels = Path(config.out) / "labels"
        whole = (labels / "000001.parquet").read_bytes()
        (labels / "000001.parquet").write_bytes(whole[:100])
        with pytest.raises(DataError, match=r"000001.parquet cannot be read .* Restore it; or remove it"):
            report_of(config)
        (labels / "000001.parquet").unlink()
        with pytest.raises(DataError, match=r"000001.parquet is missing. Restore it, or label into a new --out"):
            run_job(config)
        (Path(config.out) / "job.json").write_text("{}")
        with pytest.raises(DataError, match=r"job.json is not what `label` wrote"):
            run_job(config)
        (Path(config.out) / "job.json").unlink()
        with pytest.raises(DataError, match="holds labels, but not their job"):
            run_job(config)
        again = recipe(tmp_path, pairs, f"model.url={server.url}", f"previous=['{config.out}']", out="again")
        run_job(again)
    assert [row["row"] for row in labels_in(Path(again.out))] == [5, 6, 7, 8, 9]


def test_a_job_of_which_nothing_was_answered_may_be_corrected_in_its_folder(tmp_path: Path) -> None:
    def script(body: dict[str, object], _: int) -> Reply:
        return Reply(status=404) if body["model"] == "scripted" else answer(body, 0)

    pairs = write_pairs(tmp_path / "pairs.jsonl", 8)
    with scripted_server(script) as server:
        url = f"model.url={server.url}"
        with pytest.raises(ConfigError, match="404"):
            run_job(recipe(tmp_path, pairs, url, "rows_per_epoch=3"))
        config = recipe(tmp_path, pairs, url, "rows_per_epoch=5", "model.model=other")
        run_job(config)
        with pytest.raises(DataError, match="another job: model changed"):
            run_job(recipe(tmp_path, pairs, url, "rows_per_epoch=5"))
    assert [row["row"] for row in labels_in(Path(config.out))] == list(range(8))


def test_sources_whose_tasks_come_first_are_read_first_under_their_own_numbers(tmp_path: Path) -> None:
    rows = [{"task": task, "messages": [{"role": "user", "content": f"{task} number{number}"}]}
            for number, task in enumerate(["chat", "query_ad_relevance", "chat", "query_ad_relevance"])]  # fmt: skip
    mixed = tmp_path / "mixed.jsonl"
    mixed.write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs = write_pairs(tmp_path / "pairs.jsonl", 3, first=10)
    table = f"{{kind: table, path: '{pairs}', task: query_ad_relevance, columns: {{query: search, title: ad}}}}"
    given = (f"sources=[{{kind: jsonl, path: '{mixed}'}},{table}]", "rows_per_epoch=2", "model.concurrency=1")

    def script(body: dict[str, object], times: int) -> Reply:
        asked.append(number_in(body["messages"][0]["content"]))  # type: ignore[index]
        return Reply(status=404) if len(asked) == 4 else answer(body, times)

    asked: list[int] = []
    with scripted_server(script) as server:
        url = f"model.url={server.url}"
        with pytest.raises(ConfigError):
            run_job(recipe(tmp_path, pairs, url, *given, "priorities={query_ad_relevance: -1}"))
        config = recipe(tmp_path, pairs, url, *given, "priorities={chat: -1}")
        run_job(config)  # what is left, in another order
    assert asked[:3] == [10, 11, 12]
    found = labels_in(Path(config.out))
    assert sorted((row["source"], row["row"]) for row in found) == [
        *((0, row) for row in range(4)),
        (1, 0),
        (1, 1),
        (1, 2),
    ]
    assert [row["source"] for row in found][:3] == [1, 1, 1]
    assert asked.index(0) < asked.index(1)  # of a source with several tasks, by row


def test_what_ends_the_reading_ends_the_job_in_one_line(tmp_path: Path) -> None:
    good = write_pairs(tmp_path / "a.jsonl", 20)
    table = pq.read_table(_parquet(tmp_path / "b.parquet", 20)).schema
    damaged = tmp_path / "b.parquet"
    data = damaged.read_bytes()
    damaged.write_bytes(data[:4] + bytes(len(data) // 2) + data[4 + len(data) // 2 :])
    assert table.names == ["search", "ad"]
    sources = ",".join(
        f"{{kind: table, path: '{file}', task: query_ad_relevance, columns: {{query: search, title: ad}}}}"
        for file in (good, damaged)
    )
    with scripted_server(answer) as server:
        config = recipe(tmp_path, good, f"sources=[{sources}]", f"model.url={server.url}", "rows_per_epoch=5")
        with pytest.raises(DataError, match=r"b.parquet .*\(.*\)"):
            run_job(config)
    assert [row["row"] for row in labels_in(Path(config.out))] == list(range(20))


def _parquet(file: Path, count: int) -> Path:
    import pyarrow as pa

    pq.write_table(pa.table({"search": [f"thing {n}" for n in range(count)], "ad": ["an ad"] * count}), file)
    return file


def test_settings_that_let_no_row_be_asked_end_the_job(tmp_path: Path) -> None:
    pairs = write_pairs(tmp_path / "pairs.jsonl", 150)
    wrong = f"sources=[{{kind: table, path: '{pairs}', task: query_ad_relevance, columns: {{query: q, title: ad}}}}]"
    with scripted_server(answer) as server:
        with pytest.raises(DataError, match=r"none of its first 100 rows can be asked.*Its column is 'q'"):
            run_job(recipe(tmp_path, pairs, f"model.url={server.url}", wrong))
        run_job(recipe(tmp_path, pairs, f"model.url={server.url}"))
        assert len(server.bodies) == 150


@pytest.mark.timeout(120)
@pytest.mark.parametrize("how", ["killed", "interrupted", "told twice"])
def test_a_job_ends_soon_and_leaves_no_process(how: str, tmp_path: Path) -> None:
    pairs = write_pairs(tmp_path / "pairs.jsonl", 400)

    def script(body: dict[str, object], _: int) -> Reply:
        number = number_in(body["messages"][0]["content"])  # type: ignore[index]
        return Reply(content=good_answer(number), delay_seconds=(60.0 if how == "told twice" else 0.02))

    with scripted_server(script) as server:
        recipe(tmp_path, pairs, f"model.url={server.url}")
        source = f"{{kind: table, path: '{pairs}', task: query_ad_relevance, columns: {{query: search, title: ad}}}}"
        command = [
            sys.executable, "-m", "megatron_ads.cli", "label", "--recipe", str(tmp_path / "own.yaml"), "--out",
            str(tmp_path / "o"), f"sources=[{source}]", f"model.url={server.url}", "model.model=m", "rows_per_epoch=20",
        ]  # fmt: skip
        process = subprocess.Popen(command, cwd=ROOT, start_new_session=True, stderr=subprocess.PIPE, text=True)
        wanted = 60 if how != "told twice" else 1
        while len(server.bodies) < wanted:
            assert process.poll() is None
            time.sleep(0.05)
        if how == "killed":
            process.kill()
        else:
            os.killpg(process.pid, signal.SIGTERM if how == "told twice" else signal.SIGINT)
        if how == "told twice":
            time.sleep(0.5)
            os.killpg(process.pid, signal.SIGTERM)
        told = time.monotonic()
        said = process.stderr.read()  # type: ignore[union-attr]  # until the last process that has it open is gone
        assert time.monotonic() - told < 15
        assert process.wait(30) == (-signal.SIGKILL if how == "killed" else 130)
        if how != "killed":
            assert said.splitlines()[-1] == "megatron-ads: interrupted" and "Traceback" not in said
        assert not list((tmp_path / "o" / "labels").glob("*.partial"))  # a kill in the middle of writing leaves one
    shutil.rmtree(tmp_path / "o")


def test_an_actor_labels_one_epoch_and_tells_what_goes_wrong(tmp_path: Path) -> None:
    pairs = write_pairs(tmp_path / "pairs.jsonl", 7)
    with scripted_server(lambda body, times: answer(body, times) if is_up else Reply(status=404)) as server:
        is_up = True
        config = recipe(tmp_path, pairs, f"model.url={server.url}", "rows_per_epoch=3")
        store = QuestionStore(Path(config.out), config)
        assert list(store.read_epochs()) == [0, 1, 2]
        actor = EpochActor(json.dumps(asdict(config)))
        assert actor({"epoch": 1}) == {"epoch": 1, "rows": 3, "failure": ""}
        assert actor({"epoch": 1}) == {"epoch": 1, "rows": 0, "failure": ""}  # told twice, as after a lost answer
        is_up = False
        assert "404" in actor({"epoch": 0})["failure"] and store.waiting() == [0, 2]
    assert [row["row"] for row in labels_in(Path(config.out))] == [3, 4, 5]
