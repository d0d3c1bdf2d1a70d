"""A server that is busy, breaks, is slow or says no: what is asked again, how often, and what ends the run."""

import contextlib
import itertools
import json
import logging
import re
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx2
import pytest

from megatron_ads.config.generation import AnsweringConfig
from megatron_ads.errors import ConfigError, DataError
from megatron_ads.inference.client import Request, Unanswered
from megatron_ads.inference.endpoint import Endpoint
from megatron_ads.inference.engine import Completion, Failure, Finish
from megatron_ads.synthesis.pipeline import open_models, synthesize
from megatron_ads.synthesis.report import as_report, write_report
from tests.inference.scripted_server import Record, Reply, Script, scripted_server
from tests.synthesis.scripted_recipes import good_answer, number_of, recipe


def settings(url: str, **changes: Any) -> AnsweringConfig:
    values: dict[str, Any] = {
        "model": "scripted",
        "url": url,
        "attempts": 4,
        "first_wait_seconds": 0.01,
        "longest_wait_seconds": 0.04,
        "timeout_seconds": 5.0,
    }
    return AnsweringConfig(**(values | changes))


def ask(server: Record, **changes: Any) -> Completion:
    endpoint = Endpoint("teacher", settings(server.url, **changes))
    return endpoint.answer(Request(body={"model": "scripted", "messages": []}, needs_words=True), threading.Event())


def failing(times: int, failure: Reply) -> Script:
    """Return a script that fails so many times and then answers."""
    return lambda _, before: failure if before < times else Reply(content="here")


def message(finish: str = "stop", **fields: str | None) -> bytes:
    return json.dumps({"choices": [{"message": fields, "finish_reason": finish}]}).encode()


FAILING = {
    "429": (Reply(status=429, headers={"Retry-After": "0"}), Failure.rate_limited),
    "500": (Reply(status=500), Failure.server_error),
    "503_until_a_date": (
        Reply(status=503, headers={"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}),
        Failure.server_error,
    ),
    "late": (Reply(content="late", delay_seconds=3.0), Failure.timed_out),
    "drop_by_drop": (Reply(content="slow", drops=True), Failure.timed_out),
    "hangs_up": (Reply(status=0), Failure.broken_connection),
    "hangs_up_within": (Reply(content="half", headers={"Content-Length": "9999"}), Failure.broken_connection),
    "html": (Reply(raw=b"<html>proxy error</html>"), Failure.no_completion),
    "half_json": (Reply(raw=b'{"choices": [{"message": {"cont'), Failure.no_completion),
    "other_json": (Reply(raw=b'["choices"]'), Failure.no_completion),
    "no_text": (Reply(raw=b'{"choices": [{"message": {"content": 7}}]}'), Failure.no_completion),
    "endless_nesting": (Reply(raw=b"[" * 100_000), Failure.no_completion),
    "no_choice": (Reply(raw=b'{"choices": []}'), Failure.no_choice),
    "empty": (Reply(content=" \n"), Failure.empty_answer),
    "null": (Reply(raw=message(content=None)), Failure.empty_answer),
    "tool_calls": (Reply(raw=message("tool_calls", content=None)), Failure.empty_answer),
    "no_words_at_the_limit": (Reply(raw=message("length", content=None)), Failure.empty_answer),
    "reasoning_content_alone": (Reply(raw=message(content=None, reasoning_content="It fits.")), Failure.empty_answer),
    "reasoning_alone": (Reply(raw=message(content="", reasoning="It fits.")), Failure.empty_answer),
    "thoughts_alone": (Reply(content="<think>It fits.</think>\n"), Failure.empty_answer),
}


@pytest.mark.parametrize("name", FAILING)
def test_a_failure_that_may_pass_is_named_and_tried_again(name: str) -> None:
    failure, named = FAILING[name]
    with scripted_server(failing(2, failure)) as server:
        answer = ask(server, timeout_seconds=1.0 if named is Failure.timed_out else 30.0)
        assert (answer.text, answer.failures, answer.finish) == ("here", (named, named), Finish.ended)
        assert (answer.prompt_tokens, answer.answer_tokens) == (100, 10)
        assert len(server.bodies) == 3


@pytest.mark.parametrize("name", FAILING)
def test_a_failure_that_does_not_pass_is_told_counted_and_ends_in_one_line(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("megatron_ads"), "propagate", True)
    failure, named = FAILING[name]
    seconds = 0.05 if named is Failure.timed_out else 30.0
    with scripted_server(failing(1000, failure)) as server:
        limits = ["teacher.attempts=2", f"teacher.timeout_seconds={seconds}", "teacher.concurrency=1"]
        config = recipe(tmp_path, server.url, *limits, rows=20)
        with open_models(config) as models, pytest.raises(DataError) as caught:
            synthesize(config, models)
        assert models.teacher.usage.failures == {str(named): 5 * 2}
        assert models.teacher.usage.gave_up == 5
    records = dict.fromkeys(caplog.records)  # one record comes by two ways once another test has set up the log
    assert [record.message.startswith(f"the teacher: {named} (") for record in records] == [True]
    assert "\n" not in str(caught.value)
    assert f"Check that {server.url} works, and start again" in str(caught.value)


@pytest.mark.parametrize(
    ("reply", "finish"),
    [
        (Reply(content="half", finish="length"), Finish.cut_off),
        (Reply(content="", finish="content_filter"), Finish.withheld),
        (Reply(raw=b'{"choices": [{"message": {"content": null, "refusal": "I cannot."}}]}'), Finish.withheld),
        (Reply(raw=message("length", content=None, reasoning_content="It f")), Finish.cut_off),
        (Reply(status=400, content="too long"), Finish.refused),
        (Reply(status=413, content="too long"), Finish.refused),
    ],
    ids=["length", "content_filter", "refusal", "length_in_reasoning", "400", "413"],
)
def test_an_answer_that_is_no_good_is_an_outcome_and_not_tried_again(reply: Reply, finish: Finish) -> None:
    with scripted_server(failing(100, reply)) as server:
        assert ask(server).finish is finish
        assert len(server.bodies) == 1


def test_reasoning_that_the_server_tells_apart_is_read() -> None:
    for name in ("reasoning_content", "reasoning"):
        with scripted_server(lambda *_, name=name: Reply(raw=message(content="Good", **{name: "It fits."}))) as server:
            assert ask(server).text == "<think>It fits.</think>Good"


def test_where_all_the_words_are_reasoning_the_failure_says_so() -> None:
    reply = Reply(raw=message(content=None, reasoning_content="It fits."))
    with scripted_server(failing(100, reply)) as server, pytest.raises(Unanswered) as caught:
        ask(server, attempts=2)
    assert "all 8 characters are reasoning (reasoning_content). Start the server without a" in str(caught.value)
    assert caught.value.failures == (Failure.empty_answer,) * 2


def test_every_outcome_is_counted_in_the_report(tmp_path: Path) -> None:
    # Rows 0 to 3 end so; 4 and 5 are answered at the second and third attempt, 6 never, 7 at once.
    ends = {
        0: Reply(content="half", finish="length"),
        1: Reply(finish="content_filter"),
        2: Reply(status=400),
        3: Reply(content="I cannot say."),
        8: Reply(),
    }

    def teacher(body: dict[str, Any], before: int) -> Reply:
        number = number_of(body)
        if number in ends:
            return ends[number]
        if number == 6 or before < {4: 1, 5: 2}.get(number, 0):
            return Reply(status=429 if before == 0 else 500)
        return Reply(content=good_answer(body))

    with scripted_server(teacher) as server:
        config = recipe(tmp_path, server.url, "teacher.attempts=3", rows=9)
        with open_models(config) as models:
            report = write_report(synthesize(config, models), models, config)
        assert len(server.bodies) == 4 + 2 + 3 + 3 + 1 + 3
    used = report["models"]["teacher"]
    assert used["finishes"] == {"cut_off": 1, "withheld": 1, "refused": 1, "ended": 4}
    assert used["failures"] == {"rate_limited": 3, "server_error": 3, "empty_answer": 3}
    assert (used["asked"], used["gave_up"]) == (7, 2)
    removed = {found["filter"]: found["removed"] for found in report["filters"] if found["removed"]}
    assert removed == {"no_answer": 3, "withheld": 1, "cut_off": 1, "schema": 1}
    text = (tmp_path / "out" / "report.md").read_text()
    assert "2 without answer; failed attempts:" in text
    assert (
        json.loads((tmp_path / "out" / "report.json").read_text())["models"]["teacher"]["failures"] == used["failures"]
    )


def test_attempts_and_pauses_are_bounded() -> None:
    with scripted_server(failing(100, Reply(status=500, headers={"Retry-After": "3600"}))) as server:
        started = time.monotonic()
        with pytest.raises(Unanswered, match="attempt 4 of 4: HTTP 500"):
            ask(server)
        assert time.monotonic() - started < 3  # three pauses of 0.04 s, not of an hour
        assert len(server.bodies) == 4


def test_a_pause_that_the_server_asks_for_is_kept() -> None:
    with scripted_server(failing(1, Reply(status=429, headers={"Retry-After": "0.3"}))) as server:
        started = time.monotonic()
        ask(server, longest_wait_seconds=1.0)
        assert time.monotonic() - started >= 0.3


@pytest.mark.parametrize("host", ["127.0.0.1:{port}", "no-such-host.invalid", "a..b"])
def test_a_server_that_is_not_there_is_tried_again_and_named(host: str) -> None:
    with scripted_server(failing(0, Reply())) as server:
        pass  # its port is free now
    url = f"http://{host.format(port=urlsplit(server.url).port)}/v1"
    with pytest.raises(Unanswered, match=rf"{re.escape(url)}.*attempt 4 of 4: ") as caught:
        Endpoint("teacher", settings(url)).answer(Request(body={}), threading.Event())
    assert caught.value.failures == (Failure.not_connected,) * 4


def test_a_host_that_takes_no_connection_in_time_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    def silent(*_: object, **__: object) -> None:
        raise httpx2.ConnectTimeout("timed out")

    endpoint = Endpoint("teacher", settings("http://127.0.0.1:9/v1", attempts=1))
    monkeypatch.setattr(endpoint._http, "stream", silent)
    with pytest.raises(Unanswered, match="timed out") as caught:
        endpoint.answer(Request(body={}), threading.Event())
    assert caught.value.failures == (Failure.not_connected,)


@pytest.mark.parametrize("status", [401, 403, 404, 302])
def test_what_no_request_can_get_past_ends_the_run_at_once(status: int) -> None:
    with scripted_server(failing(100, Reply(status=status, headers={"Location": "http://127.0.0.1:1/"}))) as server:
        with pytest.raises(ConfigError, match=rf"HTTP {status}.*teacher\.url, teacher\.model = 'scripted'"):
            ask(server)
        assert len(server.bodies) == 1


@pytest.mark.parametrize("head", [b"", b"HTTP/1.1 200 OK\r\nContent-Length: 9999\r\n\r\n"], ids=["head", "body"])
def test_a_request_of_the_server_s_own_ends_in_time_though_a_byte_comes_now_and_then(head: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, ThreadPoolExecutor(1) as pool:
        over = threading.Event()

        def drip() -> None:
            connection, _ = server.accept()
            with connection, contextlib.suppress(OSError):  # the client no longer waits
                for byte in itertools.chain([head], itertools.repeat(b"H")):
                    connection.sendall(byte)
                    if over.wait(0.05):
                        return

        dripping = pool.submit(drip)
        endpoint = Endpoint("servers", settings(f"http://127.0.0.1:{server.getsockname()[1]}/v1"))
        began = time.monotonic()
        try:
            with pytest.raises(DataError, match=r"/reset does not answer in 0\.3 s"):
                endpoint.control("reset", {}, seconds=0.3)
            assert time.monotonic() - began < 2
        finally:
            over.set()
        dripping.result(timeout=10)


def test_the_status_of_an_error_counts_though_its_text_breaks_off() -> None:
    lost = {"Content-Length": "9999"}
    with (
        scripted_server(failing(100, Reply(status=401, content="who?", headers=lost))) as server,
        pytest.raises(ConfigError, match=r"HTTP 401: .*who\?"),
    ):
        ask(server)
    with scripted_server(failing(100, Reply(status=400, content="too long", headers=lost))) as server:
        assert ask(server).finish is Finish.refused


def test_the_key_goes_to_the_server_and_nowhere_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key = "sk-very-secret-0123456789"
    monkeypatch.setenv("TEST_TEACHER_KEY", key)
    # A server that repeats the key in whatever it says.
    replies: Callable[[dict[str, Any], int], Reply] = lambda body, _: (  # noqa: E731
        Reply(status=400, content=f"bad key {key}")
        if "number0" in str(body)
        else Reply(content=good_answer(body) + key)
    )
    with scripted_server(replies) as server:
        config = recipe(tmp_path, server.url, "teacher.api_key_env=TEST_TEACHER_KEY")
        with open_models(config) as models:
            write_report(synthesize(config, models), models, config)
        assert {headers["Authorization"] for headers in server.headers} == {f"Bearer {key}"}
    files = [file for file in (tmp_path / "out").iterdir() if file.is_file()]
    assert {file.name for file in files} == {"journal.jsonl", "train.jsonl", "report.json", "report.md", "recipe.yaml"}
    assert [file.name for file in files if key in file.read_text()] == []
    assert "bad key ***" in (tmp_path / "out" / "report.md").read_text()


def test_no_part_of_the_key_is_shown_where_a_text_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_TEACHER_KEY", "sk-very-secret-0123456789")
    for status in (200, 500):
        said = Reply(status=status, raw=b"x" * 190 + b"sk-very-secret-0123456789")
        with scripted_server(failing(100, said)) as server, pytest.raises(Unanswered) as caught:
            ask(server, attempts=1, api_key_env="TEST_TEACHER_KEY")
        assert "xxx" in str(caught.value)
        assert "sk-" not in str(caught.value)


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("ALL_PROXY", "socks5://127.0.0.1:9"),
        ("HTTP_PROXY", "other://127.0.0.1:9"),
        ("HTTP_PROXY", "http://host:port"),
        ("SSL_CERT_FILE", "/no/such/file"),
    ],
)
def test_an_environment_that_cannot_be_used_is_named(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(ConfigError, match=f"the teacher cannot be asked as the environment says.*{variable}"):
        Endpoint("teacher", settings("http://127.0.0.1:1/v1"))


def test_a_key_that_is_named_must_be_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TEST_TEACHER_KEY", raising=False)
    with pytest.raises(ConfigError, match=r"teacher\.api_key_env names TEST_TEACHER_KEY, which is not set"):
        Endpoint("teacher", settings("http://127.0.0.1:1/v1", api_key_env="TEST_TEACHER_KEY"))


@pytest.mark.parametrize("key", ["two\nlines", "schlüssel"])
def test_a_key_that_no_header_can_carry_is_refused_without_being_shown(
    monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    monkeypatch.setenv("TEST_TEACHER_KEY", key)
    with pytest.raises(ConfigError, match="the key in TEST_TEACHER_KEY") as caught:
        Endpoint("teacher", settings("http://127.0.0.1:1/v1", api_key_env="TEST_TEACHER_KEY"))
    assert key not in str(caught.value)


def test_requests_run_side_by_side_but_no_more_than_asked_for(tmp_path: Path) -> None:
    with scripted_server(lambda body, _: Reply(content=good_answer(body), delay_seconds=0.05)) as server:
        config = recipe(tmp_path, server.url, "teacher.concurrency=3", rows=12)
        with open_models(config) as models:
            synthesize(config, models)
        assert server.most_at_a_time == 3


def test_starts_are_spread_when_the_rate_is_limited(tmp_path: Path) -> None:
    with scripted_server(lambda body, _: Reply(content=good_answer(body))) as server:
        config = recipe(tmp_path, server.url, "teacher.requests_per_minute=600", rows=5)
        started = time.monotonic()
        with open_models(config) as models:
            synthesize(config, models)
        assert time.monotonic() - started >= 0.4  # five starts, four gaps of 0.1 s
        assert len(server.bodies) == 5


def test_a_server_that_has_gone_ends_the_run_and_keeps_the_answers(tmp_path: Path) -> None:
    numbers = itertools.count()
    script: Script = lambda body, _: (  # noqa: E731
        Reply(content=good_answer(body)) if next(numbers) < 3 else Reply(status=500)
    )
    with scripted_server(script) as server:
        config = recipe(tmp_path, server.url, "teacher.concurrency=1", "teacher.attempts=2", rows=20)
        with (
            open_models(config) as models,
            pytest.raises(DataError, match="5 consecutive requests without"),
        ):
            synthesize(config, models)
        assert len(server.bodies) == 3 + 5 * 2
    assert len((tmp_path / "out" / "journal.jsonl").read_text().splitlines()) == 3


def test_the_cost_is_counted_and_ends_the_run_at_its_limit(tmp_path: Path) -> None:
    prices = ["teacher.input_price=1000", "teacher.output_price=5000"]  # 100 + 10 tokens: 0.1 + 0.05 an answer
    with scripted_server(lambda body, _: Reply(content=good_answer(body))) as server:
        config = recipe(tmp_path, server.url, "teacher.concurrency=1", "teacher.max_cost=0.4", *prices, rows=6)
        with (
            open_models(config) as models,
            pytest.raises(DataError, match=r"have cost 0\.45, and teacher\.max_cost"),
        ):
            synthesize(config, models)
        assert len(server.bodies) == 3
        config = recipe(tmp_path, server.url, "teacher.concurrency=1", "teacher.max_cost=9", *prices, rows=6)
        with open_models(config) as models:
            used = as_report(synthesize(config, models), models, config)["models"]["teacher"]
        assert len(server.bodies) == 6  # the limit is no part of a request
    assert used["cost"] == pytest.approx(0.9)
    assert (used["asked"], used["from_journal"]) == (3, 3)
