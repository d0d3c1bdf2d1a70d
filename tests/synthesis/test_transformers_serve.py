"""A real OpenAI-compatible server as teacher and verifier: `transformers serve` with a tiny model."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_ads.cli import main
from megatron_ads.data.jsonl import jsonl_rows
from megatron_ads.synthesis.candidates import Candidate
from megatron_ads.synthesis.filters import verifier_messages
from megatron_ads.synthesis.pipeline import open_models, synthesize
from megatron_ads.synthesis.prompts import LABEL_GIVEN, teacher_messages
from megatron_ads.synthesis.report import as_report
from parity_tests.harness.ranks import free_port
from tests.inference.tiny_model import write_taught_model
from tests.synthesis.scripted_recipes import recipe, write_rows

NEEDED = ("fastapi", "uvicorn", "openai", "accelerate")
MISSING = [name for name in NEEDED if importlib.util.find_spec(name) is None]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)} (pip install -e '.[serve]')"),
]


REASONING = "The wish and the offer are the same thing, and nothing else speaks against it."
VERDICT = "<Aligned>yes</Aligned><Sound>yes</Sound><Faithful>yes</Faithful>"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that was taught two things: to find every ad good, and to approve of that."""
    folder = tmp_path_factory.mktemp("taught")
    rows = jsonl_rows(write_rows(folder / "rows.jsonl", 3))
    asked = [teacher_messages(row, LABEL_GIVEN, wording) for row in rows for wording in range(3)]
    said = [(messages[0]["content"], f"<Reasoning>{REASONING}</Reasoning><Label>Good</Label>") for messages in asked]
    judged = [verifier_messages(Candidate(row=row, number=0, text="", reasoning=REASONING)) for row in rows]
    said += [(messages[0]["content"], VERDICT) for messages in judged]
    return write_taught_model(folder, said)


@pytest.fixture(scope="module")
def url(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    port = free_port()
    log = tmp_path_factory.mktemp("serve") / "log"
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(model)]
    command += ["--device", "cpu", "--host", "127.0.0.1", "--port", str(port)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
    try:
        _wait_until_healthy(process, port, log)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(timeout=30)


def _wait_until_healthy(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    deadline = time.monotonic() + 180
    while process.poll() is None and time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
                if answer.status == 200:
                    return
        except OSError:
            time.sleep(1)
    pytest.fail(f"transformers serve did not come up:\n{log.read_text()[-3000:]}")


def test_a_run_against_a_real_server_keeps_what_is_right_counts_the_rest_and_asks_once(
    model: Path, url: str, tmp_path: Path
) -> None:
    changes = [f"teacher.model='{model}'", "teacher.temperature=0", "teacher.max_tokens=128", "candidates=2"]
    changes += [f"verifier.url='{url}'", f"verifier.model='{model}'", "reject.min_details=0"]
    config = recipe(tmp_path, url, *changes, rows=3)
    # The model says Good, the labels are Bad, Fair, Good; the second candidate of each row repeats the first.
    for asked, known in ((6, 0), (0, 6)):
        with open_models(config) as models:
            report = as_report(synthesize(config, models), models, config)
        removed = {found["filter"]: found["removed"] for found in report["filters"] if found["removed"]}
        assert removed == {"label_differs": 4, "repeats_another": 1}
        used = report["models"]["teacher"]
        assert (used["asked"], used["from_journal"], used["gave_up"], used["failures"]) == (asked, known, 0, {})
        assert used["finishes"] == {"ended": 6}
        assert used["prompt_tokens"] > 6 * 200
        assert report["models"]["verifier"]["finishes"] == {"ended": 1}
    (row,) = jsonl_rows(tmp_path / "out" / "train.jsonl")
    assert row.target == f"<think>{REASONING}</think><Label>Good</Label>"


def test_an_answer_that_reaches_the_limit_is_cut_off(model: Path, url: str, tmp_path: Path) -> None:
    config = recipe(tmp_path, url, f"teacher.model='{model}'", "teacher.temperature=0", "teacher.max_tokens=8", rows=3)
    with open_models(config) as models:
        report = as_report(synthesize(config, models), models, config)
    assert report["models"]["teacher"]["finishes"] == {"cut_off": 3}
    assert report["models"]["teacher"]["answer_tokens"] == 3 * 8


def test_an_evaluation_of_the_server_gets_the_answers_of_the_checkpoint_behind_it(
    model: Path, url: str, tmp_path: Path
) -> None:
    source = write_rows(tmp_path / "rows.jsonl", 12)
    common = ["--recipe", "sft/quickstart", f"data.sources=[{{kind: jsonl, path: '{source}'}}]"]
    common += ["data.validation_rows=3", "--max-new-tokens", "12"]
    answers = []
    for name, of in (("served", ["--url", url, "--served-model", str(model)]), ("own", ["--model", str(model)])):
        file = tmp_path / f"{name}.jsonl"
        assert main(["evaluate", *of, "--answers", str(file), *common]) == 0
        answers.append(file.read_text())
    assert answers[0] == answers[1]
    texts = [json.loads(line)["text"] for line in answers[0].splitlines()]
    assert len(texts) == 3
    assert all(texts)
