"""Settings shared by all tests."""

import os

# Two cores and several ranks: one thread each, here and in whatever a test starts. Set before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")

import pytest

from parity_tests.harness import ranks


def pytest_sessionfinish(session: pytest.Session) -> None:
    """End the ranks of the distributed tests, also after Ctrl-C."""
    ranks.stop_all()
