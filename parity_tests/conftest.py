"""Checkpoints that several rungs share, written once for a run of the ladder."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
os.environ["NVIDIA_TF32_OVERRIDE"] = "0"  # FP32 means FP32 on a GPU too, here and in the ranks

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from parity_tests.checkpoints import FAMILIES, SMALL_V3, write_checkpoint
from parity_tests.harness import ranks


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return the folder of a family's checkpoint by name: one of ``FAMILIES``, or ``small-v3``."""
    root = tmp_path_factory.mktemp("checkpoints")
    return cache(lambda name: write_checkpoint(root / name, {**FAMILIES, "small-v3": SMALL_V3}[name]))


def pytest_sessionfinish(session: pytest.Session) -> None:
    """End the ranks, also after Ctrl-C."""
    ranks.stop_all()
