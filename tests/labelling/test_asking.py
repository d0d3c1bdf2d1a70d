"""What a whole job asks and spends, over its epochs and its starts: limits of cost, refusals, several servers."""

from pathlib import Path
from typing import Any

import pytest

from megatron_ads.errors import ConfigError, DataError
from megatron_ads.labelling import reader_process
from megatron_ads.labelling.job import run_job
from megatron_ads.labelling.report import report_of
from tests.inference.scripted_server import Reply, scripted_server
from tests.labelling.jobs import answer, labels_in, number_in, recipe, write_pairs

ONE_AT_A_TIME = ("rows_per_epoch=3", "model.concurrency=1")


@pytest.fixture(autouse=True)
def _without_a_process_that_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes seconds to start; ``test_job`` and ``test_resuming`` have it."""
    monkeypatch.setattr(reader_process, "EPOCHS_READ_HERE", 1000)


def test_the_limit_of_cost_is_that_of_all_epochs_and_starts(tmp_path: Path) -> None:
    pairs = write_pairs(tmp_path / "pairs.jsonl", 12)
    # An answer has 100 tokens of prompt and 10 of answer: 110 at a price of a million for a million.
    prices = ("model.input_price=1000000", "model.output_price=1000000", *ONE_AT_A_TIME)
    with scripted_server(answer) as server:
        url = f"model.url={server.url}"
        for limit, asked in ((500, 5), (500, 5), (900, 9)):
            with pytest.raises(DataError, match=f"model.max_cost is {limit}"):
                run_job(recipe(tmp_path, pairs, url, *prices, f"model.max_cost={limit}"))
            assert len(server.bodies) == asked
        run_job(recipe(tmp_path, pairs, url, *prices))
        assert len(server.bodies) == 12
    with pytest.raises(ConfigError, match="no effect with runner ray"):
        recipe(tmp_path, pairs, url, *prices, "model.max_cost=1", "runner=ray")


def test_rows_that_the_server_refuses_end_no_job_in_which_others_were_answered(tmp_path: Path) -> None:
    def script(body: dict[str, Any], times: int) -> Reply:
        number = number_in(body["messages"][0]["content"])
        return answer(body, times) if number < 3 else Reply(status=400)

    pairs = write_pairs(tmp_path / "pairs.jsonl", 21)
    with scripted_server(script) as server:
        config = recipe(tmp_path, pairs, f"model.url={server.url}", "rows_per_epoch=9", "model.concurrency=1")
        run_job(config)
    labels = labels_in(Path(config.out))
    assert [row["failure"] for row in labels] == [None] * 3 + ["refused"] * 18
    assert labels[5]["text"].startswith("HTTP 400")
    with scripted_server(lambda body, times: Reply(status=400)) as server, pytest.raises(DataError, match="HTTP 400"):
        run_job(recipe(tmp_path, pairs, f"model.url={server.url}", out="other"))


def test_a_row_at_which_the_server_fails_is_counted_and_ends_no_job(tmp_path: Path) -> None:
    def script(body: dict[str, Any], times: int) -> Reply:
        return Reply(status=500) if number_in(body["messages"][0]["content"]) == 4 else answer(body, times)

    pairs = write_pairs(tmp_path / "pairs.jsonl", 7)
    with scripted_server(script) as server:
        config = recipe(tmp_path, pairs, f"model.url={server.url}", "model.attempts=2", *ONE_AT_A_TIME)
        run_job(config)
    labels = labels_in(Path(config.out))
    assert [row["failure"] for row in labels] == [None] * 4 + ["unanswered"] + [None] * 2
    assert report_of(config)["tasks"]["query_ad_relevance"]["failures"] == {"unanswered": 1}
    with scripted_server(lambda body, times: Reply(status=500)) as server:
        with pytest.raises(DataError, match="consecutive requests without an answer"):
            run_job(recipe(tmp_path, pairs, f"model.url={server.url}", "model.attempts=1", out="other"))
        assert not labels_in(tmp_path / "other")


def test_several_servers_share_the_rows_and_one_that_goes_is_done_without(tmp_path: Path) -> None:
    pairs = write_pairs(tmp_path / "pairs.jsonl", 40)
    one_after_another: list[int] = []

    def leaves(body: dict[str, Any], times: int) -> Reply:
        one_after_another.append(number_in(body["messages"][0]["content"]))
        return answer(body, times) if len(one_after_another) <= 5 else Reply(status=503)

    with scripted_server(answer) as stays, scripted_server(leaves) as goes:
        servers = f"model.servers=['{stays.url}', '{goes.url}']"
        config = recipe(tmp_path, pairs, "model.url=null", servers, "model.concurrency=2", "model.attempts=3")
        run_job(config)
        assert len(stays.bodies) + 5 == 40 and len(goes.bodies) > 5
    assert [row["row"] for row in labels_in(Path(config.out))] == list(range(40))
    assert not any(row["failure"] for row in labels_in(Path(config.out)))


def test_the_reason_of_a_row_that_was_not_asked_is_in_its_text(tmp_path: Path) -> None:
    pairs = write_pairs(tmp_path / "pairs.jsonl", 2)
    with pairs.open("a") as file:
        file.write('{"key": "empty", "search": " ", "ad": "a"}\n')
    with scripted_server(answer) as server:
        config = recipe(tmp_path, pairs, f"model.url={server.url}")
        run_job(config)
    assert "query is ' '" in labels_in(Path(config.out))[2]["text"]
    assert report_of(config)["samples"]["empty_text"][0]["id"] == "empty"
