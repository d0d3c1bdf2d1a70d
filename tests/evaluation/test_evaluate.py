"""How long an answer may be; with `--url`, rows go to a server, answers and scores come out, a mistake is one line."""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_ads.cli import main
from megatron_ads.data.chat import load_tokenizer
from megatron_ads.evaluation.held_out_rows import EvaluationRows, longest_answers
from megatron_ads.rows import ChatRow, Message, Role
from parity_tests.harness.real_job import FEW_ROWS
from tests.data.tokenizers import V31, model_tokenizer, tokenizer_in
from tests.inference.scripted_server import Record, Reply, scripted_server

RECIPE = ["--recipe", "sft/quickstart", FEW_ROWS, "data.validation_rows=6"]


def good(body: dict[str, Any], _: int) -> Reply:
    """Answer as a model whose chat template opens the reasoning."""
    return Reply(content="It fits.</think><Label>Good</Label>")


def _evaluate(server: Record, *arguments: str) -> int:
    common = ["evaluate", "--url", server.url, "--served-model", "m", "server.first_wait_seconds=0.01"]
    return main([*common, *RECIPE, *arguments])


def _row(task: str, target: str) -> ChatRow:
    return ChatRow(id=target, task=task, messages=(Message(Role.user, "?"), Message(Role.assistant, target)))


def test_an_answer_may_be_a_quarter_longer_than_the_longest_of_its_task_that_was_taught(tmp_path: Path) -> None:
    tokenizer_in(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    asked = [_row("a", "x"), _row("b", "x"), _row("held out only", "x")]
    training = [_row("a", "red"), _row("a", "red and blue and green"), _row("b", "red"), _row("c", "red " * 100)]
    rows = EvaluationRows(tasks=asked[:2], general=asked[2:], training=training)
    lengths = {task: len(tokenizer.encode(text)) for task, text in (("a", "red and blue and green"), ("b", "red"))}
    lengths["held out only"] = len(tokenizer.encode("red " * 100))
    expected = {task: round(1.25 * length) + 1 for task, length in lengths.items()}
    assert longest_answers(tokenizer, rows, None) == expected
    assert longest_answers(None, rows, 7) == dict.fromkeys(expected, 7)


def test_conversations_are_answered_and_scored(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, page = tmp_path / "answers.jsonl", tmp_path / "page.html"
    with scripted_server(good) as server:
        arguments = ["--answers", str(file), "--html", str(page), "--json", "--max-new-tokens", "20"]
        assert (
            _evaluate(server, *arguments, "server.concurrency=2", "server.input_price=1", "server.output_price=1") == 0
        )
    captured = capsys.readouterr()
    scores = json.loads(captured.out)
    assert (scores["rows"], scores["decoding"]) == (6, "greedy")
    assert scores["tasks"]["query_ad_relevance"]["readable_share"] == 1.0
    answers = [json.loads(line) for line in file.read_text().splitlines()]
    assert {answer["text"] for answer in answers} == {"<think>It fits.</think><Label>Good</Label>"}
    assert {answer["ended"] for answer in answers} == {True}
    for body in server.bodies:
        assert (body["model"], body["max_tokens"], body["temperature"]) == ("m", 20, 0.0)
        assert body["messages"][-1]["role"] == "user"
        assert "<Label>" not in body["messages"][-1]["content"].replace("<Label>...", "")  # not the truth
    assert server.most_at_a_time <= 2
    assert "6 requests answered, 0 before; 600 prompt and 60 answer tokens, cost 0.00066." in captured.err
    assert "Evaluation of m" in page.read_text()
    assert [path.name for path in tmp_path.glob("answers*")] == ["answers.jsonl"]


def test_an_empty_answer_is_asked_for_again_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first: list[str] = []

    def script(body: dict[str, Any], before: int) -> Reply:
        question = body["messages"][-1]["content"]
        first.append(question)
        return good(body, 0) if before == 1 and question != first[0] else Reply(content="")

    file = tmp_path / "answers.jsonl"
    with scripted_server(script) as server:
        arguments = ["--answers", str(file), "--json", "--max-new-tokens", "20"]
        assert _evaluate(server, *arguments, "server.attempts=2", "server.concurrency=1") == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["tasks"]["query_ad_relevance"]["readable_share"] == pytest.approx(5 / 6)
    assert [json.loads(line)["text"] for line in file.read_text().splitlines()].count("") == 1
    assert "1 of 6 rows of query_ad_relevance have no answer (empty after 2 attempts)." in captured.err
    assert "5 requests answered, 0 before; 500 prompt and 50 answer tokens; 7 attempts failed: empty_answer." in (
        captured.err
    )
    with scripted_server(lambda *_: Reply(content="")) as server:
        assert _evaluate(server, *arguments, "server.attempts=1", "server.concurrency=1") == 2
        assert len(server.bodies) == 5
    assert "left 5 consecutive requests without an answer, the last with: " in capsys.readouterr().err


def test_with_a_tokenizer_the_tokens_of_training_are_sent(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer_in(tmp_path)

    def vllm(body: dict[str, Any], _: int) -> Reply:
        return Reply(content="<think>a</think><Label>Bad</Label>", choice={"token_ids": [7, 1]})

    with scripted_server(vllm) as server:
        assert _evaluate(server, "--tokenizer", str(tmp_path), "--json") == 0
    tokenizer = load_tokenizer(tmp_path)
    for body in server.bodies:
        assert "Query" in tokenizer.fast.decode(body["prompt"])
        assert body["max_tokens"] > 10  # from the training targets
    assert json.loads(capsys.readouterr().out)["tasks"]["query_ad_relevance"]["readable_share"] == 1.0


@pytest.mark.parametrize("rendered_here", [True, False])
def test_what_the_template_is_given_in_training_is_given_here(tmp_path: Path, rendered_here: bool) -> None:
    tokenizer = model_tokenizer(V31, tmp_path, thinking=True)
    where = ["--tokenizer", str(tmp_path)] if rendered_here else []
    reply = Reply(content="It fits.</think><Label>Good</Label>", choice={"token_ids": [7, 1]})
    with scripted_server(lambda *_: reply) as server:
        arguments = [*where, "--max-new-tokens", "20", "data.template_arguments={thinking: true}"]
        assert _evaluate(server, *arguments) == 0
    for body in server.bodies:
        if rendered_here:
            assert tokenizer.fast.decode(body["prompt"]).endswith("<｜Assistant｜><think>")
        assert body.get("chat_template_kwargs") == (None if rendered_here else {"thinking": True})


def test_the_perplexity_of_general_rows_is_the_servers_or_is_said_not_to_be_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer_in(tmp_path)
    own = tmp_path / "own.jsonl"
    said = [[("user", f"Hello, {number}?"), ("assistant", "Hello.")] for number in range(12)]
    rows = [{"messages": [{"role": role, "content": text} for role, text in turns]} for turns in said]
    own.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = f"data.sources=[{{kind: jsonl, path: {own}}}]"

    def vllm(body: dict[str, Any], _: int) -> Reply:
        known = [{str(token): {"logprob": -2.0}} for token in body["prompt"][1:]]
        return Reply(choice={"prompt_logprobs": [None, *known]})

    found = []
    for script in (vllm, good):
        with scripted_server(script) as server:
            assert _evaluate(server, "--tokenizer", str(tmp_path), "--json", source) == 0
        captured = capsys.readouterr()
        found.append((json.loads(captured.out)["general"], "is not measured: the server at" in captured.err))
    (measured, _), (nothing, said) = found
    assert measured["chat"]["perplexity"] == pytest.approx(7.389056)  # e^2
    assert (nothing, said) == ({}, True)


def test_an_interrupted_evaluation_asks_only_for_what_it_has_no_answer_to(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "answers.jsonl"
    prices = ["server.input_price=1000", "server.output_price=5000", "server.concurrency=1"]  # 0.15 an answer
    arguments = ["--answers", str(file), "--max-new-tokens", "20", *prices]
    with scripted_server(good) as server:
        assert _evaluate(server, *arguments, "server.max_cost=0.4") == 2
        assert "max_cost is 0.4. Raise it and start again: answers that are there are kept" in capsys.readouterr().err
        assert (len(server.bodies), file.exists()) == (3, False)
        assert _evaluate(server, *arguments) == 0
        assert len(server.bodies) == 6
    assert len(file.read_text().splitlines()) == 6
    with scripted_server(good) as server:
        assert _evaluate(server, "--max-new-tokens", "20", *prices, "server.max_cost=0.4") == 2
    assert "start again: answers were not kept, as no file for them was named." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--decode constrained-beam --max-new-tokens 4", "a server cannot generate by constrained-beam"),
        ("--batch-size 4 --max-new-tokens 4", "--batch-size has no effect with --url; take server.concurrency=N."),
        ("", "--url needs --max-new-tokens N, or --tokenizer DIR"),
        ("--html . --max-new-tokens 4", ". cannot be written: it is a folder. Name a file."),
        ("server.concurency=4", "server.concurency is not a setting; did you mean server.concurrency?"),
        ("server.concurrency=0", "server.concurrency is 0; it must be at least 1."),
        ("--url localhost", "server.url is 'localhost'; it must be like http"),
        ("--api-key-env NO_SUCH_KEY --max-new-tokens 4", "server.api_key_env names NO_SUCH_KEY, which is not set"),
    ],
)
def test_a_mistake_is_one_line(options: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["evaluate", "--url", "http://127.0.0.1:1/v1", "--served-model", "m"]
    assert main([*common, *RECIPE, *options.split()]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


def test_a_model_is_a_folder_or_a_server(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "--url", "http://127.0.0.1:1/v1", *RECIPE]) == 2
    assert "--url needs --served-model NAME" in capsys.readouterr().err
    for option in ("--served-model=m", "--tokenizer=d", "--api-key-env=K", "server.concurrency=2"):
        assert main(["evaluate", "--model", "unused", option, *RECIPE]) == 2
        assert f"{option.split('=')[0]}" in capsys.readouterr().err
    with pytest.raises(SystemExit) as status:
        main(["evaluate", "--model", "a", "--url", "http://h/v1", *RECIPE])
    assert status.value.code == 2
    capsys.readouterr()
    assert main(["evaluate", *RECIPE]) == 2
    assert "evaluate needs --model DIR, --url URL, or --answers FILE" in capsys.readouterr().err


def _some_name(body: dict[str, Any], _: int) -> Reply:
    """Draw one of three names by the request's seed."""
    said = ["Acme", "Bolt", "Cord"][body["seed"] % 3]
    return Reply(content=said, choice={"logprobs": {"content": [{"token": said, "logprob": -1.5}]}})


def test_several_samples_of_a_server_are_ranked_and_each_is_a_request(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "answers.jsonl"
    names = "data.sources=[{kind: simulator, task: next_advertiser, rows: 40}]"
    with scripted_server(_some_name) as server:
        arguments = [
            "--answers",
            str(file),
            "--max-new-tokens",
            "5",
            "--decode",
            "sampled",
            "--samples",
            "20",
            "--json",
        ]
        assert _evaluate(server, "data=simulator", *arguments, names, "data.validation_rows=2") == 0
    assert len(server.bodies) == 40
    assert len({(str(body["messages"]), body["seed"]) for body in server.bodies}) == 40
    assert all(body["logprobs"] is True for body in server.bodies)
    ranking = json.loads(capsys.readouterr().out)["tasks"]["next_advertiser"]["ranking"]
    assert "recall@20" in ranking["methods"]["model"]
    for line in map(json.loads, file.read_text().splitlines()):
        counts = [beam["samples"] for beam in line["beams"]]
        assert sum(counts) == 20
        assert counts == sorted(counts, reverse=True)
        assert {beam["text"] for beam in line["beams"]} <= {"Acme", "Bolt", "Cord"}
