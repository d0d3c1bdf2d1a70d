"""Several servers asked as one: by free capacity, around a lost one, until all are lost for too long."""

import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from megatron_ads.config.generation import EndpointConfig
from megatron_ads.errors import ConfigError, DataError
from megatron_ads.inference.client import Client, Request, Unanswered
from megatron_ads.inference.engine import Completion, Failure
from megatron_ads.inference.servers import Server, Servers
from tests.inference.scripted_server import Reply, Script, scripted_server

REQUESTS = [Request(body={"model": "any", "prompt": [number]}) for number in range(12)]


def said(delay_seconds: float = 0.0) -> Script:
    return lambda body, _: Reply(content=f"to {body['prompt'][0]}", delay_seconds=delay_seconds)


def free_port() -> int:
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        return int(place.getsockname()[1])


def servers_at(
    *urls: str, wait_seconds: float = 10.0, renew: Callable[..., None] = lambda *_: None, **changes: Any
) -> Servers:
    values: dict[str, Any] = {"first_wait_seconds": 0.02, "longest_wait_seconds": 0.05, "attempts": 3, "concurrency": 2}
    configs = [EndpointConfig(model=f"m{place}", url=url, **(values | changes)) for place, url in enumerate(urls)]
    each = [Server(f"rollout.servers[{place}]", config) for place, config in enumerate(configs)]
    return Servers(each, wait_seconds=wait_seconds, renew=renew)


def ask(servers: Servers, requests: list[Request] = REQUESTS) -> list[Completion | None]:
    config = EndpointConfig(model="m", url="all", concurrency=4)
    return Client("servers", config, servers, None).ask(requests, total=len(requests), description="asking")


def texts(answers: list[Completion | None]) -> list[str]:
    return [answer.text if answer else "" for answer in answers]


ALL = [f"to {number}" for number in range(12)]


def test_requests_go_where_capacity_is_free_each_under_the_name_its_server_knows() -> None:
    others_answered = threading.Event()

    def fast_says(body: dict[str, Any], _: int) -> Reply:
        if len(fast.bodies) == 10:
            others_answered.set()
        return said()(body, 0)

    def slow_says(body: dict[str, Any], _: int) -> Reply:
        assert others_answered.wait(timeout=30)
        return said()(body, 0)

    with scripted_server(slow_says) as slow, scripted_server(fast_says) as fast:
        assert texts(ask(servers_at(slow.url, fast.url))) == ALL
        assert (len(slow.bodies), len(fast.bodies), slow.most_at_a_time) == (2, 10, 2)
        assert {body["model"] for body in slow.bodies} == {"m0"}
        assert {body["model"] for body in fast.bodies} == {"m1"}


@pytest.mark.parametrize("status", [0, 500], ids=["hangs_up", "fails"])
def test_the_requests_of_a_lost_server_go_to_the_others(status: int) -> None:
    def dies(body: dict[str, Any], _: int) -> Reply:
        return said(0.02)(body, 0) if len(dying.bodies) <= 2 else Reply(status=status)

    with scripted_server(dies) as dying, scripted_server(said(0.02)) as other:
        servers = servers_at(dying.url, other.url, attempts=20)  # one request may be the one that tries again
        assert texts(ask(servers)) == ALL
        assert servers.losses == 1
        assert sum(dying.answered.values()) == 2
        assert sum(other.answered.values()) == 10


def test_requests_wait_for_the_return_of_the_only_server_which_gets_the_current_weights_first() -> None:
    port, renewed = free_port(), list[str]()
    servers = servers_at(f"http://127.0.0.1:{port}/v1", renew=lambda server, _: renewed.append(server.url))
    found: list[Completion | None] = []
    asking = threading.Thread(target=lambda: found.extend(ask(servers)))
    asking.start()
    time.sleep(0.3)
    with scripted_server(said(), port=port):
        asking.join(timeout=10)
    assert texts(found) == ALL
    assert set(renewed) == {f"http://127.0.0.1:{port}/v1"}
    assert servers.servers[0].lost_because is None


@pytest.mark.parametrize(
    ("reply", "renewals"),
    [
        (Reply(status=502), 1),
        (Reply(status=503), 1),
        (Reply(status=0), 1),
        (Reply(delay_seconds=3.0), 1),
        (Reply(raw=b"<html>starting</html>"), 1),
        (Reply(status=429), 0),
    ],
    ids=["bad_gateway", "unavailable", "hangs_up", "times_out", "page_of_a_proxy", "busy"],
)
def test_a_server_gets_the_current_weights_after_every_loss_but_a_rate_limit(reply: Reply, renewals: int) -> None:
    """Behind a proxy it is always there, also while it is restarted on other weights."""
    events = list[str]()

    def script(body: dict[str, Any], times: int) -> Reply:
        events.append("asked")
        return said()(body, 0) if times else reply

    with scripted_server(script) as server:
        servers = servers_at(server.url, renew=lambda *_: events.append("renewed"), timeout_seconds=1.5)
        assert texts(ask(servers, REQUESTS[:1])) == ALL[:1]
        assert texts([servers.answer(Request(body=REQUESTS[0].body), threading.Event())]) == ALL[:1]
    assert events == ["asked", *["renewed"] * renewals, "asked", "asked"]
    assert (servers.losses, servers.servers[0].needs_weights) == (1, False)


def test_a_server_that_cannot_be_given_the_weights_gets_no_request() -> None:
    def renew(server: Server, _: threading.Event) -> None:
        raise DataError("it does not take them.")

    with scripted_server(said()) as stale, scripted_server(said(0.02)) as other:
        servers = servers_at(stale.url, other.url, renew=renew)
        servers.lose(servers.servers[0], "was away")
        assert texts(ask(servers)) == ALL
        assert stale.bodies == []
        assert servers.servers[0].lost_because == "it does not take them."


def test_all_servers_lost_is_one_error_that_names_each_after_a_bounded_wait() -> None:
    urls = [f"http://127.0.0.1:{free_port()}/v1" for _ in range(2)]
    started = time.monotonic()
    with pytest.raises(
        DataError, match=r"no inference server answered for 0\.3 s .*refused.*Start the servers"
    ) as error:
        ask(servers_at(*urls, wait_seconds=0.3))
    assert 0.3 <= time.monotonic() - started < 5
    assert all(url in str(error.value) for url in urls)


def test_a_request_that_fails_everywhere_is_given_up_after_its_attempts() -> None:
    def script(body: dict[str, Any], _: int) -> Reply:
        return Reply(status=500, content="no") if body["prompt"] == [3] else said()(body, 0)

    with scripted_server(script) as one, scripted_server(script) as other:
        servers = servers_at(one.url, other.url)
        assert texts(ask(servers)) == [text if text != "to 3" else "" for text in ALL]
        with pytest.raises(Unanswered, match="HTTP 500") as error:
            servers.answer(REQUESTS[3], threading.Event())
        assert error.value.failures == (Failure.server_error,) * 3 * 2  # attempts, servers


@pytest.mark.parametrize("wrong", [0, 1])
def test_a_wrong_name_of_a_model_is_an_error_that_names_the_entry(wrong: int) -> None:
    def knows_another(*_: object) -> Reply:
        return Reply(status=404, content="no such model")

    scripts = [knows_another if place == wrong else said() for place in range(2)]
    with scripted_server(scripts[0]) as first, scripted_server(scripts[1]) as second:
        message = rf"rollout\.servers\[{wrong}\]\.model = 'm{wrong}'"
        with pytest.raises(ConfigError, match=message):
            ask(servers_at(first.url, second.url))


def test_a_server_needs_the_weights_from_the_moment_it_is_lost_and_not_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise several of its places would be taken meanwhile, and each would bring it the weights."""
    servers, asked, fails = servers_at("http://127.0.0.1:9/v1"), threading.Event(), threading.Event()
    (server,), stop = servers.servers, threading.Event()

    def answer(*_: object) -> Completion:
        asked.set()
        assert fails.wait(timeout=30)
        stop.set()
        raise Unanswered("refused.", (Failure.not_connected,))

    monkeypatch.setattr(server.endpoint, "answer", answer)
    with ThreadPoolExecutor(1) as pool:
        answered = pool.submit(servers.answer, REQUESTS[0], stop)
        assert asked.wait(timeout=30)
        with servers._changed:  # as another thread holds it that takes a place
            fails.set()
            time.sleep(0.1)
            assert (server.needs_weights, server.lost_because) == (False, None)
        with pytest.raises(Unanswered):
            answered.result(timeout=30)
    assert (server.needs_weights, server.lost_because) == (True, "refused.")
