"""Have one inference server use the weights in a folder: by a request of its own, or by a command that restarts it."""

import json
import os
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_ads.config.generation import EndpointConfig
from megatron_ads.errors import ConfigError, DataError
from megatron_ads.inference.endpoint import Endpoint

_VLLM = "collective_rpc"
_SGLANG = "update_weights_from_disk"
_NO_SUCH_REQUEST = (404, 405)
_OF_A_RANK = ("RANK", "WORLD_SIZE", "LOCAL_", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_", "OMP_NUM_THREADS")
"""Beginnings of variables that tell a process which rank it is; a server that reads them would wait for the others."""
_SHOWN_CHARACTERS = 300


def load_by_request(endpoint: Endpoint, url: str, folder: Path, *, seconds: float) -> None:
    """Send vLLM's request to load weights from a folder, or SGLang's to a server that does not know vLLM's.

    The answer says that the server took them, not that they are right: vLLM 0.32.0 on a CPU answers 200 and computes
    with other weights. Score a probe afterwards.

    Raises:
        DataError: If the server is not there, refuses, or does not answer in ``seconds``.
        ConfigError: If it has no such request.
    """
    vllm = {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
    if _sent(endpoint, url, _VLLM, vllm, seconds):
        _sent(endpoint, url, "reset_prefix_cache", {}, seconds)  # which holds what the old weights made of prompts
    elif not _sent(endpoint, url, _SGLANG, {"model_path": str(folder)}, seconds):
        raise ConfigError(
            f"the server at {url} has no request that loads weights from a folder (/{_VLLM}, /{_SGLANG}). Start vLLM "
            "with VLLM_SERVER_DEV_MODE=1 in its environment, or set rollout.reload_command."
        )


def _sent(endpoint: Endpoint, url: str, name: str, body: Mapping[str, Any], seconds: float) -> bool:
    """Send a request; return whether the server knows it."""
    status, said = endpoint.control(name, body, seconds=seconds)
    if status in _NO_SUCH_REQUEST:
        return False
    if status != 200 or _says_no(said):
        raise DataError(
            f"the server at {url} did not load new weights: /{name} answers HTTP {status}: "
            f"{' '.join(said.split())[:_SHOWN_CHARACTERS]}. Look into its log."
        )
    return True


def _says_no(said: str) -> bool:
    try:
        answer = json.loads(said)
    except ValueError:  # vLLM's says nothing
        return False
    return isinstance(answer, dict) and answer.get("success") is False


def load_by_command(
    command: str, server: EndpointConfig, folder: Path, *, seconds: float, stop: threading.Event
) -> None:
    """Run ``rollout.reload_command`` with MODEL, URL and SERVED_MODEL in its environment; ``stop`` ends it early.

    Raises:
        DataError: If it fails or takes longer than ``seconds``, with what it said last.
    """
    kept = {name: value for name, value in os.environ.items() if not name.startswith(_OF_A_RANK)}
    given = {"MODEL": str(folder), "URL": server.url or "", "SERVED_MODEL": server.model or ""}
    deadline = time.monotonic() + seconds
    # A file and not a pipe: the server that it starts may keep it open.
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            command,
            shell=True,
            env=kept | given,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        while process.poll() is None and time.monotonic() < deadline and not stop.wait(0.1):
            pass
        ended = f"ended with status {process.returncode}"
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            ended = "was stopped with the job" if stop.is_set() else f"did not end in {seconds:g} s"
        output.seek(0)
        said = " ".join(output.read().decode(errors="replace").split())[-_SHOWN_CHARACTERS:]
    if process.returncode:
        raise DataError(
            f"rollout.reload_command for {server.url} {ended}{f': {said}' if said else ' and said nothing'}. Run it by "
            f"hand with MODEL={folder} URL={server.url} SERVED_MODEL={server.model}, and correct it."
        )
