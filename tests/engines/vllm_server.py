"""A server of launch/serve_vllm.sh on a port of its own, and the violence that tests do to it."""

import os
import signal
import subprocess
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from megatron_ads.config.generation import EndpointConfig

ROOT = Path(__file__).resolve().parents[2]
VLLM = Path(os.environ.get("MEGATRON_ADS_VLLM", ROOT / ".venv-vllm"))
RELOAD = str(ROOT / "launch" / "serve_vllm.sh")
"""As ``rollout.reload_command``."""


def why_not() -> str | None:
    """Return why these tests cannot run, and what to do; None if they can."""
    if os.environ.get("MEGATRON_ADS_ENGINES") != "1":
        return "real inference servers take minutes: run tests/engines/run.sh"
    return None if (VLLM / "bin" / "vllm").exists() else f"there is no vLLM in {VLLM}: run launch/setup_vllm.sh"


@dataclass(frozen=True, slots=True)
class VllmServer:
    """Its port; whether it runs is another matter."""

    port: int

    @property
    def config(self) -> EndpointConfig:
        return EndpointConfig(model="policy", url=f"http://127.0.0.1:{self.port}/v1", longest_wait_seconds=2.0)

    @property
    def pid_file(self) -> Path:
        return Path(os.environ.get("MEGATRON_ADS_VLLM_RUN", VLLM / "run")) / f"{self.port}.pid"

    def start(self, model: Path) -> None:
        """Start it, in place of one that runs; return when it answers."""
        done = subprocess.run([RELOAD, str(model), str(self.port)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr

    def stop(self) -> None:
        subprocess.run([RELOAD, "--stop", str(self.port)], check=True)

    def pid(self) -> int:
        return int(self.pid_file.read_text().split()[0])

    def kill(self) -> None:
        """Kill it and its workers at once, as a node that fails does."""
        said = subprocess.run(
            ["ps", "-o", "pid=", "--sid", str(self.pid())], capture_output=True, text=True, check=False
        )
        for pid in map(int, said.stdout.split()):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
