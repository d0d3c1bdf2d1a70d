"""Jobs from rows to labels over a real server: every row once, whatever happens on the way."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_ads.errors import ConfigError, DataError
from megatron_ads.labelling.job import run_job
from megatron_ads.labelling.report import report_of, summary, write
from tests.inference.scripted_server import Reply, scripted_server
from tests.labelling.jobs import LABELS, answer, good_answer, labels_in, number_in, recipe, write_pairs

ROOT = Path(__file__).parents[2]


def test_every_row_comes_out_once_with_what_the_model_said(tmp_path: Path) -> None:
    pairs = write_pairs(tmp_path / "pairs.jsonl", 25)
    with scripted_server(answer) as server:
        config = recipe(tmp_path, pairs, f"model.url={server.url}", "rows_per_epoch=10")
        run_job(config)
    labels = labels_in(Path(config.out))
    assert [row["id"] for row in labels] == [f"p{number}" for number in range(25)]
    assert [row["label"] for row in labels] == [LABELS[number % 3] for number in range(25)]
    assert labels[7]["reasoning"] == "thing 7 is asked for and sold"
    assert json.loads(labels[7]["answer"]) == {"label": "Fair", "location": None, "quality": None}
    assert [file.name for file in sorted((Path(config.out) / "labels").iterdir())] == [
        "000000.parquet", "000001.parquet", "000002.parquet",
    ]  # fmt: skip
    assert not list((Path(config.out) / "questions").glob("*.parquet"))
    assert not list((Path(config.out) / "journals").iterdir())
    assert all("Bad" not in body["messages"][0]["content"].split("Query")[1] for body in server.bodies)


def test_requests_are_in_the_order_of_their_texts_and_equal_rows_share_one(tmp_path: Path) -> None:
    pairs = tmp_path / "pairs.jsonl"
    rows = [{"key": f"k{number}", "search": f"thing {number % 4}", "ad": f"number{number % 4}"} for number in range(12)]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in reversed(rows)))
    with scripted_server(answer) as server:
        config = recipe(tmp_path, pairs, f"model.url={server.url}", "model.concurrency=1")
        run_job(config)
    sent = [body["messages"][0]["content"] for body in server.bodies]
    assert sent == sorted(set(sent)) and len(sent) < 12
    labels = labels_in(Path(config.out))
    assert Counter(row["draws"] for row in labels) == {1: len(sent), 0: 12 - len(sent)}
    assert [row["label"] for row in labels] == [LABELS[number % 4 % 3] for number in reversed(range(12))]


def test_what_cannot_be_read_is_drawn_again_and_then_counted(tmp_path: Path) -> None:
    def script(body: dict[str, object], _: int) -> Reply:
        number = number_in(body["messages"][0]["content"])  # type: ignore[index]
        if number == 2 or (number == 1 and body["temperature"] == 0):
            return Reply(content="<think>hm</think>who knows", finish="length")
        return Reply(content=good_answer(number)) if number != 3 else Reply(status=400)

    pairs = write_pairs(tmp_path / "pairs.jsonl", 4)
    with scripted_server(script) as server:
        config = recipe(tmp_path, pairs, f"model.url={server.url}", "draws=3", "draw_temperature=0.5")
        run_job(config)
    labels = labels_in(Path(config.out))
    assert [row["label"] for row in labels] == ["Bad", "Fair", None, None]
    assert [row["draws"] for row in labels] == [1, 2, 3, 1]
    assert [row["failure"] for row in labels] == [None, None, "no_label", "refused"]
    assert labels[2]["finish"] == "cut_off" and labels[2]["text"] == "<think>hm</think>who knows"
    drawn = [body for body in server.bodies if number_in(body["messages"][0]["content"]) == 2]
    assert [body["temperature"] for body in drawn] == [0.0, 0.5, 0.5]
    assert len({body["seed"] for body in drawn}) == 3
    report = report_of(config)
    assert (report["labelled"], report["failed"]) == (2, 2)
    assert report["tasks"]["query_ad_relevance"]["failures"] == {"no_label": 1, "refused": 1}
    assert report["samples"]["no_label"][0]["text"] == "<think>hm</think>who knows"


def test_rows_that_cannot_be_asked_are_among_the_labels(tmp_path: Path) -> None:
    pairs = write_pairs(tmp_path / "pairs.jsonl", 3)
    with pairs.open("a") as file:
        file.write('no json\n{"key": "empty", "search": " ", "ad": "a"}\n')
    with scripted_server(answer) as server:
        config = recipe(tmp_path, pairs, f"model.url={server.url}")
        run_job(config)
    labels = labels_in(Path(config.out))
    assert [row["failure"] for row in labels] == [None, None, None, "unreadable_row", "empty_text"]
    assert labels[3]["id"] == "pairs.jsonl-4" and len(server.bodies) == 3


def test_a_later_job_labels_what_is_new_or_has_changed(tmp_path: Path) -> None:
    pairs = write_pairs(tmp_path / "pairs.jsonl", 20)
    with scripted_server(answer) as server:
        first = recipe(tmp_path, pairs, f"model.url={server.url}", out="first")
        run_job(first)
        text = pairs.read_text().replace('"thing 5"', '"another thing"')
        pairs.write_text(text)
        with pairs.open("a") as file:
            file.write('{"key": "new", "search": "new thing", "ad": "number77"}\n')
        before = len(server.bodies)
        second = recipe(tmp_path, pairs, f"model.url={server.url}", f"previous=['{first.out}']", out="second")
        run_job(second)
        assert len(server.bodies) == before + 2
    assert {row["id"] for row in labels_in(Path(second.out))} == {"p5", "new"}
    report = report_of(second)
    assert report["rows_read"] == 21 and report["not_asked"] == {"spared": 19}
    assert report["tasks"]["query_ad_relevance"]["before"] == {"Bad": 7, "Fair": 7, "Good": 6}
    assert report["tasks"]["query_ad_relevance"]["drift"] > 0.25
    write(report)
    assert "spared" in (Path(second.out) / "report.html").read_text()
    assert "19 spared" in summary(report)


def test_a_folder_of_another_job_is_refused(tmp_path: Path) -> None:
    pairs = write_pairs(tmp_path / "pairs.jsonl", 2)
    with scripted_server(answer) as server:
        run_job(recipe(tmp_path, pairs, f"model.url={server.url}"))
        run_job(recipe(tmp_path, pairs, f"model.url={server.url}", "draws=1"))
        assert len(server.bodies) == 2
        with pytest.raises(DataError, match=r"labels of another job: reasoning changed"):
            run_job(recipe(tmp_path, pairs, f"model.url={server.url}", "reasoning=false", "model.tokenizer=x"))
        assert "first_draw" not in (tmp_path / "out" / "job.json").read_text()  # 0 is what jobs have always done
        with pytest.raises(DataError, match=r"labels of another job: first_draw changed"):
            run_job(recipe(tmp_path, pairs, f"model.url={server.url}", "first_draw=3"))
        write_pairs(pairs, 3)
        with pytest.raises(DataError, match=r"labels of another job: files changed"):
            run_job(recipe(tmp_path, pairs, f"model.url={server.url}"))


def test_users_are_selected_by_what_they_did_lately(tmp_path: Path) -> None:
    log = tmp_path / "events.jsonl"
    day, now = 86400, 1_700_000_000
    events = [
        ("buyer", 3, "matched_conversion", "Shoe Shop"), ("buyer", 2, "click", ""),
        ("reader", 1, "click", ""),
        ("sleeper", 60, "matched_conversion", "Shoe Shop"),
    ]  # fmt: skip
    lines = [
        {"user": user, "time": now - days * day, "event": kind, "text": "a text", "advertiser": name}
        for user, days, kind, name in events
    ]
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    columns = "{user: user, time: time, event: event, text: text, advertiser: advertiser}"
    anchor = time.strftime("%Y-%m-%dT%H:%M", time.gmtime(now))
    source = f"{{kind: table, path: '{log}', task: next_advertiser, anchor: '{anchor}', columns: {columns}}}"
    with scripted_server(lambda body, times: Reply(content="Shoe Shop")) as server:
        config = recipe(
            tmp_path, log, f"sources=[{source}]", f"model.url={server.url}", "select.active_days=30",
            "select.conversion_days=90",
        )  # fmt: skip
        run_job(config)
    labels = labels_in(Path(config.out))
    assert [(row["user"], row["label"]) for row in labels] == [("buyer", "Shoe Shop")]
    assert report_of(config)["not_asked"] == {"users without a recent conversion": 1, "inactive users": 1}


ROWS = int(os.environ.get("MEGATRON_ADS_LABEL_ROWS", "300"))
"""20000 takes some minutes."""
KILLS = 1 if ROWS < 1000 else 2


@pytest.mark.timeout(900)
def test_killed_jobs_and_a_server_that_goes_away_lose_nothing_and_repeat_nothing(tmp_path: Path) -> None:
    pairs = write_pairs(tmp_path / "pairs.jsonl", ROWS)
    recipe(tmp_path, pairs, "model.url=http://localhost:9/v1")
    columns = "{id: key, query: search, title: ad}"
    source = f"sources=[{{kind: table, path: '{pairs}', task: query_ad_relevance, columns: {columns}}}]"
    settings = [source, "model.model=scripted", f"rows_per_epoch={ROWS // 3}", "model.concurrency=4"]
    label = [sys.executable, "-m", "megatron_ads.cli", "label", "--recipe", str(tmp_path / "own.yaml")]

    def slow(body: dict[str, object], _: int) -> Reply:
        return Reply(content=good_answer(number_in(body["messages"][0]["content"])), delay_seconds=3.0 / ROWS)  # type: ignore[index]

    def start(url: str) -> "subprocess.Popen[bytes]":
        command = [*label, "--out", str(tmp_path / "o"), *settings, f"model.url={url}"]
        return subprocess.Popen(command, cwd=ROOT, start_new_session=True)

    asked: list[str] = []
    port = 0
    for kills in range(1, KILLS + 1):
        with scripted_server(slow, port=port) as server:
            port = int(server.url.rsplit(":", 1)[1].split("/")[0])
            killed = start(server.url)
            _wait_for(lambda seen=server.bodies: len(seen) > ROWS // 5, killed)
            os.killpg(killed.pid, signal.SIGKILL)
            killed.wait(30)
        asked += [json.dumps(body["messages"]) for body in server.bodies]
        assert len(set(asked)) > kills * ROWS // 6
    with scripted_server(slow, port=port) as server:
        last = start(server.url)
        _wait_for(lambda: len(server.bodies) > ROWS // 5, last)
    time.sleep(1)  # nobody listens
    with scripted_server(slow, port=port) as again:
        assert last.wait(300) == 0
    asked += [json.dumps(body["messages"]) for each in (server, again) for body in each.bodies]
    labels = labels_in(tmp_path / "o")
    assert sorted(row["row"] for row in labels) == list(range(ROWS))
    assert all(row["label"] == LABELS[int(row["id"].removeprefix("p")) % 3] for row in labels)
    # What was in flight when a job was killed, or the server went away, had no answer that anybody could note.
    assert len(set(asked)) == ROWS and len(asked) - ROWS <= 3 * 4


def _wait_for(happened: Callable[[], bool], process: "subprocess.Popen[bytes]") -> None:
    end = time.monotonic() + 60
    while not happened():
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.02)


def test_settings_without_effect_are_refused(tmp_path: Path) -> None:
    pairs = write_pairs(tmp_path / "pairs.jsonl", 2)
    for words, said in (
        ("log_probabilities=true", "needs the tokenizer of the served model"),
        ("reasoning=false", "needs the tokenizer of the served model"),
        ("gpus=8", "gpus is 8 and gpu_price_per_second None"),
        ("model.servers=[http://a/v1]", "give one of them"),
        ("draws=0", "draws is 0"),
    ):
        with pytest.raises(ConfigError, match=said):
            recipe(tmp_path, pairs, "model.url=http://localhost:9/v1", words)
