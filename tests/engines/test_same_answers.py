"""Benchmarks and evaluations of a served checkpoint are those of its folder, answer by answer.

./tests/engines/run.sh        installs vLLM where it is missing, and runs these tests
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_ads.cli import main
from megatron_ads.demo_model import CONFIGS, Preset, write_demo_model
from parity_tests.harness.ranks import free_port
from tests.engines.vllm_server import VllmServer, why_not
from tests.regress.learned_questions import write_questions

pytestmark = [
    pytest.mark.engines,
    pytest.mark.slow,
    pytest.mark.skipif(why_not() is not None, reason=str(why_not())),
    pytest.mark.timeout(3000),  # a start takes 30 s on two idle cores, and minutes on busy ones
]
ROWS = "data.sources=[{kind: simulator, task: query_ad_relevance, rows: 300}]"
EVALUATE = ["evaluate", "--recipe", "sft/quickstart", ROWS, "data.validation_rows=12", "--max-new-tokens", "24"]
PROBLEM = {
    "task_id": "Own/0", "prompt": "def double(number):\n", "entry_point": "double",
    "canonical_solution": "    return 2 * number\n", "test": "def check(double):\n    assert double(3) == 6\n",
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("same") / "model"
    write_demo_model(folder, CONFIGS[Preset.tiny] | {"torch_dtype": "float32"})
    return folder


@pytest.fixture(scope="module")
def server(model: Path) -> Iterator[VllmServer]:
    one = VllmServer(free_port())
    one.start(model)
    yield one
    one.stop()


def regress(base: Path, server: VllmServer, out: Path) -> int:
    data = out.parent / "benchmarks"
    if not data.exists():
        write_questions(data, count=12)
        (data / "humaneval").mkdir()
        (data / "humaneval" / "test.jsonl").write_text(json.dumps(PROBLEM) + "\n", encoding="utf-8")
    where = ["--tuned", str(server.config.url), "--served-model", str(server.config.model), "--data", str(data)]
    names = ["--benchmark", "mmlu_stem", "humaneval", "--max-new-tokens", "32"]
    return main(["regress", "--base", str(base), *where, *names, "--out", str(out), "--same"])


def test_benchmarks_of_a_served_checkpoint_have_the_answers_of_its_folder(
    model: Path, server: VllmServer, tmp_path: Path
) -> None:
    assert regress(model, server, tmp_path / "same") == 0
    lines = json.loads((tmp_path / "same" / "regress.json").read_text())["benchmarks"]
    assert [(line["name"], line["questions"]) for line in lines] == [("humaneval", 1), ("mmlu_stem", 12)]
    other = tmp_path / "other"
    write_demo_model(other, CONFIGS[Preset.tiny] | {"torch_dtype": "float32"}, seed=9)
    assert regress(other, server, tmp_path / "different") == 1


def test_an_evaluation_of_a_served_checkpoint_is_that_of_its_folder(
    model: Path, server: VllmServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    served = ["--url", str(server.config.url), "--served-model", str(server.config.model), "--tokenizer", str(model)]
    found = [
        evaluated([*EVALUATE, "--json", *source, "--answers", str(tmp_path / name)], tmp_path / name, capsys)
        for name, source in (("folder.jsonl", ["--model", str(model)]), ("served.jsonl", served))
    ]
    assert found[0] == found[1]
    assert len(found[0][1]) == 12


def evaluated(
    words: list[str], answers: Path, capsys: pytest.CaptureFixture[str]
) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the scores without the seconds they took, and every answer by its row."""
    capsys.readouterr()
    assert main(words) == 0
    scores = json.loads(capsys.readouterr().out)
    scores.pop("seconds")
    said = [json.loads(line) for line in answers.read_text(encoding="utf-8").splitlines()]
    return scores, {one["id"]: one["text"] for one in said}
