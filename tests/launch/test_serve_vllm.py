"""launch/serve_vllm.sh with a stand-in for vLLM: it waits until the server answers, replaces it, and ends it."""

import os
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from parity_tests.harness.ranks import free_port

SCRIPT = Path(__file__).parents[2] / "launch" / "serve_vllm.sh"
STAND_IN = """#!{python}
import http.server, os, pathlib, subprocess, sys
arguments = sys.argv[1:]
if os.environ.get("BROKEN"):
    sys.exit("no such device")
if os.environ.get("SLOW"):
    import time
    time.sleep(60)
subprocess.Popen(["sleep", "60"])  # its worker
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()
        self.wfile.write(" ".join(arguments).encode())
http.server.HTTPServer(("127.0.0.1", int(arguments[arguments.index("--port") + 1])), Handler).serve_forever()
"""


@dataclass(frozen=True)
class Place:
    """Where the stand-in is, and the port that it is asked to serve on."""

    folder: Path
    port: int

    def run(self, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        given = {"MEGATRON_ADS_VLLM": str(self.folder), "MEGATRON_ADS_VLLM_SECONDS": "20"} | variables
        return subprocess.run(
            [str(SCRIPT), *arguments], env=os.environ | given, capture_output=True, text=True, timeout=60, check=False
        )

    def said(self) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=10) as answer:
            return str(answer.read().decode())

    def processes(self) -> int:
        pid = (self.folder / "run" / f"{self.port}.pid").read_text().split()[0]
        listed = subprocess.run(["ps", "-o", "pid=", "--sid", pid], capture_output=True, text=True, check=False)
        return len(listed.stdout.split())


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    vllm = tmp_path / "bin" / "vllm"
    vllm.parent.mkdir()
    vllm.write_text(STAND_IN.format(python=sys.executable))
    vllm.chmod(0o755)
    for model in ("one", "other"):
        (tmp_path / model).mkdir()
        (tmp_path / model / "config.json").write_text("{}")
    found = Place(tmp_path, free_port())
    yield found
    found.run("--stop", str(found.port))


def test_a_server_is_replaced_by_what_a_job_asks_for_and_ended_with_its_workers(place: Place) -> None:
    assert place.run(str(place.folder / "one"), str(place.port)).returncode == 0
    assert f"serve {place.folder / 'one'} --host 127.0.0.1" in place.said() and place.processes() == 2
    asked = {"MODEL": str(place.folder / "other"), "URL": f"http://127.0.0.1:{place.port}/v1", "SERVED_MODEL": "name"}
    assert place.run(**asked).returncode == 0
    assert f"serve {place.folder / 'other'}" in place.said() and "--served-model-name name" in place.said()
    pid = int((place.folder / "run" / f"{place.port}.pid").read_text().split()[0])
    os.kill(pid, 9)  # its worker outlives it
    assert place.run("--stop", str(place.port)).returncode == 0
    listed = subprocess.run(["ps", "-o", "pid=", "--sid", str(pid)], capture_output=True, text=True, check=False)
    assert listed.stdout.split() == []
    with pytest.raises(urllib.error.URLError):
        place.said()


def test_a_server_that_was_started_otherwise_is_not_taken_for_the_new_one(place: Place) -> None:
    elsewhere = {"MEGATRON_ADS_VLLM_RUN": str(place.folder / "elsewhere")}
    assert place.run(str(place.folder / "one"), str(place.port), **elsewhere).returncode == 0
    done = place.run(str(place.folder / "other"), str(place.port))
    assert place.run("--stop", str(place.port), **elsewhere).returncode == 0
    assert done.returncode == 4 and f"another server answers on port {place.port}" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "variables", "status", "said"),
    [
        (("one", "PORT"), {"BROKEN": "1"}, 4, "the server on one ended: no such device"),
        (("one", "PORT"), {"SLOW": "1", "MEGATRON_ADS_VLLM_SECONDS": "0"}, 4, "did not answer in 0 s"),
        (("one",), {}, 2, "a model's folder and a port are needed"),
        (("missing", "PORT"), {}, 2, "missing is no Hugging Face folder"),
        (
            ("one", "PORT"),
            {"MEGATRON_ADS_VLLM": "/nowhere"},
            3,
            "there is no vLLM in /nowhere; run launch/setup_vllm.sh",
        ),
    ],
    ids=["ends", "hangs", "no_port", "no_model", "no_vllm"],
)
def test_what_is_wrong_is_one_line(
    place: Place,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    variables: dict[str, str],
    status: int,
    said: str,
) -> None:
    monkeypatch.chdir(place.folder)
    done = place.run(*(str(place.port) if word == "PORT" else word for word in arguments), **variables)
    assert done.returncode == status
    (line,) = done.stderr.splitlines()
    assert line.startswith("vLLM: ") and said in line
