"""A real OpenAI-compatible server as teacher and verifier: `transformers serve` with a tiny random model."""

import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_ads.cooking.cook import cook, open_kitchen
from megatron_ads.cooking.report import as_report
from tests.cooking.kitchens import recipe
from tests.cooking.tiny_model import write_tiny_model

NEEDED = ("fastapi", "uvicorn", "openai", "accelerate")
MISSING = [name for name in NEEDED if importlib.util.find_spec(name) is None]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)} (pip install -e '.[serve]')"),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def url(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
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


def test_a_run_against_a_real_server_counts_every_candidate_and_asks_once(
    model: Path, url: str, tmp_path: Path
) -> None:
    changes = [f"teacher.model='{model}'", "teacher.max_tokens=8", "candidates=2", "golden.rows=0"]
    config = recipe(tmp_path, url, *changes, rows=3)
    for asked, known in ((6, 0), (0, 6)):
        with open_kitchen(config) as kitchen:
            report = as_report(cook(config, kitchen), kitchen, config)
        used = report["models"]["teacher"]
        assert (used["asked"], used["from_journal"], used["gave_up"], used["failures"]) == (asked, known, 0, {})
        assert used["prompt_tokens"] > 6 * 50
        assert 6 <= used["answer_tokens"] <= 6 * 8
        # A random model says nothing that could be kept: every candidate is counted as removed, by its form or length.
        removed = {found["filter"]: found["removed"] for found in report["filters"] if found["removed"]}
        assert set(removed) <= {"schema", "cut_off"}
        assert sum(removed.values()) == report["candidates"] == 6
