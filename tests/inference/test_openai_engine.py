"""The engine behind a server: tokens in and out as vLLM has them, one clear error where a server lacks something."""

from pathlib import Path
from typing import Any

import pytest

from megatron_ads.config.generation import EndpointConfig, GenerationConfig, Method
from megatron_ads.errors import DataError
from megatron_ads.inference.engine import Finish, UnsupportedError
from megatron_ads.inference.openai_engine import OpenAIEngine
from megatron_ads.journal import Journal
from megatron_ads.rows import Message, Role
from tests.inference.scripted_server import Record, Reply, scripted_server

SAMPLED = GenerationConfig(method=Method.sampled, temperature=0.7, max_new_tokens=8, samples=3)


def engine_for(server: Record, journal: Journal | None = None, **changes: Any) -> OpenAIEngine:
    values: dict[str, Any] = {"first_wait_seconds": 0.01, "longest_wait_seconds": 0.02, "attempts": 2, "concurrency": 4}
    return OpenAIEngine("server", EndpointConfig(model="m", url=server.url, **(values | changes)), journal)


def vllm(body: dict[str, Any], _: int) -> Reply:
    """Continue any prompt with its length and the end token; -0.5 and -1 are their log-probabilities."""
    prompt = body["prompt"]
    choice: dict[str, Any] = {"token_ids": [len(prompt), 1]} if body.get("return_token_ids") else {}
    if "logprobs" in body:
        choice["logprobs"] = {"token_logprobs": [-0.5, -1.0], "tokens": ["a", ""]}
    if "prompt_logprobs" in body:
        known = [{str(token): {"logprob": -float(token), "rank": 1}} for token in prompt[1:]]
        choice["prompt_logprobs"] = [None, *known]
    return Reply(content="said", choice=choice)


def test_token_ids_go_in_and_come_out_with_their_log_probabilities() -> None:
    with scripted_server(vllm) as server:
        how = GenerationConfig(max_new_tokens=8, log_probabilities=True)
        found = engine_for(server).generate([[5, 6, 7], [9]], how)
    assert [[one.token_ids for one in completions] for completions in found] == [[(3, 1)], [(1, 1)]]
    ((first,), _) = found
    assert (first.log_probabilities, first.log_probability, first.finish) == ((-0.5, -1.0), -1.5, Finish.ended)
    assert (first.text, first.prompt_tokens, first.answer_tokens) == ("said", 100, 10)
    (body,) = (body for body in server.bodies if body["prompt"] == [5, 6, 7])
    assert body == {
        "model": "m", "prompt": [5, 6, 7], "return_token_ids": True, "logprobs": 1, "temperature": 0.0, "top_p": 1.0,
        "max_tokens": 8, "seed": 0,
    }  # fmt: skip


def test_log_probabilities_of_answers_are_those_of_the_last_tokens_of_the_prompt() -> None:
    with scripted_server(vllm) as server:
        found = engine_for(server).log_probabilities([[5, 6], [9]], [[1, 2], [3]])
    assert found == [[-1.0, -2.0], [-3.0]]
    assert sorted(body["prompt"] for body in server.bodies) == [[5, 6, 1, 2], [9, 3]]


def test_samples_have_seeds_of_their_own_that_depend_on_prompt_and_seed_only() -> None:
    conversations = [[Message(Role.user, text)] for text in ("a", "b", "a")]

    def seeds_of(server: Record) -> dict[str, set[int]]:
        found: dict[str, set[int]] = {}
        for body in server.bodies:
            found.setdefault(body["messages"][0]["content"], set()).add(body["seed"])
        return found

    with scripted_server(lambda *_: Reply(content="said")) as server:
        found = engine_for(server).generate(conversations, SAMPLED)
        assert [len(completions) for completions in found] == [3, 3, 3]
        first = seeds_of(server)
    assert {text: len(seeds) for text, seeds in first.items()} == {"a": 6, "b": 3}
    with scripted_server(lambda *_: Reply(content="said")) as server:
        engine_for(server).generate(conversations[::-1][:2], SAMPLED)
        assert seeds_of(server)["b"] == first["b"]
        assert seeds_of(server)["a"] < first["a"]


def test_what_a_journal_holds_is_not_asked_again(tmp_path: Path) -> None:
    how = GenerationConfig(max_new_tokens=8, log_probabilities=True)
    with scripted_server(vllm) as server:
        found = []
        for _ in range(2):
            with Journal(tmp_path / "journal") as journal:
                found.append(engine_for(server, journal).generate([[5], [6]], how))
        assert len(server.bodies) == 2
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("prompts", "how", "lacking"),
    [
        ([[5, 6]], GenerationConfig(max_new_tokens=1), r"the token ids of completions \(return_token_ids\)"),
        ([[5, 6]], GenerationConfig(max_new_tokens=1, log_probabilities=True), r"log-probabilities \(logprobs\)"),
        (
            [[Message(Role.user, "a")]],
            GenerationConfig(max_new_tokens=1, log_probabilities=True),
            r"log-probabilities \(logprobs\)",
        ),
    ],
    ids=["tokens", "log_probabilities", "of_a_conversation"],
)
def test_what_a_server_does_not_report_is_one_clear_error(prompts: Any, how: GenerationConfig, lacking: str) -> None:
    with scripted_server(lambda *_: Reply(content="said")) as server:
        with pytest.raises(UnsupportedError, match=rf"the server at {server.url} does not report {lacking}\. Use"):
            engine_for(server).generate(prompts, how)
        with pytest.raises(UnsupportedError, match=r"does not report the log-probabilities of a prompt"):
            engine_for(server).log_probabilities([[5]], [[6]])


@pytest.mark.parametrize("method", [Method.beam, Method.constrained_beam])
def test_beams_and_new_weights_are_refused_with_the_engine_that_can(method: Method) -> None:
    engine = OpenAIEngine("server", EndpointConfig(model="m", url="http://127.0.0.1:1/v1"))
    with pytest.raises(UnsupportedError, match=f"cannot generate by {method}: .*transformers engine"):
        engine.generate([[5]], GenerationConfig(method=method))
    with pytest.raises(UnsupportedError, match=r"cannot take weights: .*restart the server on them"):
        engine.update_weights(iter([]))


def test_a_refused_prompt_is_an_outcome_and_a_missing_answer_an_error() -> None:
    def script(body: dict[str, Any], _: int) -> Reply:
        return {5: Reply(status=400, content="too long"), 6: Reply(status=500)}.get(body["prompt"][0], vllm(body, 0))

    with scripted_server(script) as server:
        ((refused,), (fine,)) = engine_for(server).generate([[5], [7]], GenerationConfig(max_new_tokens=1))
        assert (refused.finish, fine.finish) == (Finish.refused, Finish.ended)
        with pytest.raises(DataError, match="1 of 2 requests to the server have no answer after 2 attempts each"):
            engine_for(server).generate([[6], [7]], GenerationConfig(max_new_tokens=1))


def test_log_probabilities_that_are_not_those_of_the_tokens_are_refused() -> None:
    choice = {"token_ids": [4, 5, 1], "logprobs": {"token_logprobs": [-0.5, -1.0]}}
    with (
        scripted_server(lambda *_: Reply(content="said", choice=choice)) as server,
        pytest.raises(UnsupportedError, match="one log-probability a token, but 2 of 3 tokens"),
    ):
        engine_for(server).generate([[5]], GenerationConfig(max_new_tokens=4, log_probabilities=True))
