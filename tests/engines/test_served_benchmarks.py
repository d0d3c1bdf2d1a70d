"""`evaluate`, `label` and `regress` of a checkpoint behind vLLM: its answers and scores are those of the folder.

./tests/engines/run.sh        installs vLLM where it is missing, and runs these tests
"""

import json
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch

from megatron_ads.cli import main
from megatron_ads.data.chat import load_tokenizer
from megatron_ads.errors import ConfigError
from megatron_ads.inference.openai_engine import OpenAIEngine
from megatron_ads.inference.transformers_engine import open_engine
from megatron_ads.regress.sandbox import run_program
from parity_tests.harness.ranks import free_port
from tests.engines.answering_model import PROGRAMS, SUMS, write_answering_model, write_benchmarks
from tests.engines.vllm_server import VllmServer, why_not
from tests.labelling.jobs import labels_in
from tests.regress.learned_questions import QUESTIONS, prompt_of, scale_expert

pytestmark = [
    pytest.mark.engines,
    pytest.mark.slow,
    pytest.mark.skipif(why_not() is not None, reason=str(why_not())),
    pytest.mark.timeout(3000),  # a start takes 30 s on two idle cores, and minutes on busy ones
]
WITHIN = 1e-4
"""Nats: FP32 on both sides, sums in another order. A doubled expert moves a small random model by 0.04."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("benchmarks")
    write_benchmarks(folder)
    return folder


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Settings of ads rows, and of conversations, of which perplexity is measured."""
    own = tmp_path_factory.mktemp("rows") / "own.jsonl"
    said = {"role": "assistant", "content": "Hello."}
    chats = [{"messages": [{"role": "user", "content": f"Hello {number}?"}, said]} for number in range(24)]
    own.write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    pairs = "{kind: simulator, task: query_ad_relevance, rows: 60}"
    return [f"data.sources=[{pairs}, {{kind: jsonl, path: {own}}}]", "data.validation_rows=16"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, data: Path, rows: list[str]) -> Path:
    return write_answering_model(tmp_path_factory.mktemp("answering") / "model", data, rows)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[VllmServer]:
    monkeypatch.setenv(
        "MEGATRON_ADS_VLLM_ARGUMENTS", "--max-model-len 4096 --max-num-seqs 16 --enable-prompt-tokens-details"
    )
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    one = VllmServer(free_port())
    yield one
    one.stop()


def items_of(file: Path) -> dict[str, list[dict[str, Any]]]:
    return {one["name"]: one["items"] for one in json.loads(file.read_text())["benchmarks"]}


def test_choices_are_as_probable_as_in_the_folder(server: VllmServer, model: Path, data: Path) -> None:
    tokenizer = load_tokenizer(model)
    lines = (data / "mmlu_stem" / "test.jsonl").read_text().splitlines()
    prompts = [tokenizer.encode(prompt_of(json.loads(line))) for line in lines for _ in "ABCD"]
    letters = [tokenizer.encode(f" {letter}") for _ in lines for letter in "ABCD"]
    assert len(prompts) == 4 * QUESTIONS
    ours = open_engine(model, dtype=torch.float32).log_probabilities(prompts, letters)
    server.start(model)
    with closing(OpenAIEngine("server", server.config)) as engine:
        theirs = engine.log_probabilities(prompts, letters)
    assert [sum(one) for one in theirs] == pytest.approx([sum(one) for one in ours], abs=WITHIN)
    assert min(map(sum, ours)) < max(map(sum, ours)) - 1  # it prefers some: equal numbers would say nothing


def test_regress_finds_the_folders_answers_behind_a_server_and_other_weights_at_the_same_address(
    server: VllmServer, model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        run_program("pass")
    except ConfigError as error:
        pytest.skip(str(error))
    where = ["--tuned", str(server.config.url), "--served-model", "policy", "--data", str(data), "--out", str(tmp_path)]
    asked = ["--benchmark", "gsm8k", "humaneval", "mmlu_stem", "--max-new-tokens", "48", "--same"]
    command = ["regress", "--base", str(model), *where, *asked]
    server.start(model)
    assert main(command) == 0, capsys.readouterr().out
    before, after = items_of(tmp_path / "base.json"), items_of(tmp_path / "tuned.json")
    assert after == before
    assert {name: len(items) for name, items in after.items()} == {
        "gsm8k": len(SUMS), "humaneval": len(PROGRAMS), "mmlu_stem": QUESTIONS,
    }  # fmt: skip
    written = [item for name in ("gsm8k", "humaneval") for item in after[name]]
    assert all(item["answer"] for item in written)
    assert len({item["answer"] for item in written}) > 1
    assert sum(item["finished"] for item in written) > len(written) / 2
    server.start(scale_expert(model, tmp_path / "planted", factor=8.0, layer=1))
    assert main(command) == 1
    assert "FAILED: other answers" in capsys.readouterr().out


def test_evaluate_gets_the_folders_answers_and_scores_from_a_server(
    server: VllmServer, model: Path, rows: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def scores_of(name: str, *who: str) -> dict[str, Any]:
        capsys.readouterr()
        command = ["evaluate", *who, "--answers", str(tmp_path / name), "--json", "--recipe", "sft/quickstart", *rows]
        assert main([*command, "--max-new-tokens", "80"]) == 0
        return {key: value for key, value in json.loads(capsys.readouterr().out).items() if key != "seconds"}

    folder = scores_of("folder", "--model", str(model))
    server.start(model)
    served = ("--url", str(server.config.url), "--served-model", "policy")
    by_tokens = scores_of("tokens", *served, "--tokenizer", str(model))
    by_conversations = scores_of("conversations", *served)
    answers = [json.loads(line) for line in (tmp_path / "folder").read_text().splitlines()]
    assert len(answers) == folder["rows"] > 4
    assert sum(answer["ended"] for answer in answers) > len(answers) / 2
    for name in ("tokens", "conversations"):
        assert (tmp_path / name).read_text() == (tmp_path / "folder").read_text(), name
    general, of_server = folder.pop("general")["chat"], by_tokens.pop("general")["chat"]
    assert of_server["rows"] == general["rows"] > 0
    assert of_server["perplexity"] == pytest.approx(general["perplexity"], rel=WITHIN)
    assert by_conversations.pop("general") == {}  # needs the tokenizer
    assert by_tokens == by_conversations == folder


def test_label_gets_the_folders_labels_from_a_server_that_is_killed_and_started_again(
    server: VllmServer, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def labelled(name: str, *settings: str) -> list[dict[str, Any]]:
        own = ["sources=[{kind: simulator, task: query_ad_relevance, rows: 60}]", "rows_per_epoch=20", "draws=1"]
        own += ["log_probabilities=true", "model.max_tokens=80", "model.concurrency=16", *settings]
        assert main(["label", "--recipe", "label/relevance", "--out", str(tmp_path / name), *own]) == 0
        return labels_in(tmp_path / name)

    folder = labelled("folder", "model.kind=local", "model.url=null", f"model.model={model}")
    server.start(model)

    def kill_and_start() -> None:
        while not (tmp_path / "served" / "labels" / "000000.parquet").exists():
            time.sleep(0.1)
        server.kill()
        server.start(model)

    violence = Thread(target=kill_and_start)
    violence.start()
    url = f"model.url={server.config.url}"
    served = labelled("served", url, "model.model=policy", f"model.tokenizer={model}", "model.longest_wait_seconds=2")
    violence.join()
    assert len(folder) == 60 and sum(row["label"] is not None for row in folder) > 30
    said = ("row", "id", "label", "text", "failure", "finish", "answer_tokens")
    assert [[row[name] for name in said] for row in served] == [[row[name] for name in said] for row in folder]
    for theirs, ours in zip(served, folder, strict=True):
        assert theirs["log_probability"] == pytest.approx(ours["log_probability"], abs=WITHIN)
    report = json.loads((tmp_path / "served" / "report.json").read_text())
    assert report["cost"]["cached_share"] is not None  # what it is depends on the build
    with capsys.disabled():
        print(f"rows/s {report['cost']['rows_per_second']}, cached {report['cost']['cached_share']}")
