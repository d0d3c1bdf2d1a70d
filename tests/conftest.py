"""Settings shared by all tests, and the order they run in."""

import os

# Two cores and several ranks: one thread each, here and in whatever a test starts. Set before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")

import pytest

from megatron_ads.runtime import cpu_compat
from parity_tests.harness import ranks

cpu_compat.install()  # before a test file imports Megatron-Core


def pytest_configure(config: pytest.Config) -> None:
    """Refuse a path that does not exist: workers of pytest-xdist would collect nothing and not say why."""
    missing = [path for path in config.args if not (config.invocation_params.dir / path.split("::")[0]).exists()]
    if missing and not config.option.pyargs:
        raise pytest.UsageError(f"file or directory not found: {missing[0]}")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put files whose tests wait for other processes first, the long ones before all.

    Workers of pytest-xdist begin with a part of this order each, and take over from each other's ends: so ranks and
    single processes share the cores, and the last tests are short ones.
    """
    first = {item.path for item in items if item.get_closest_marker("first")}
    items.sort(key=lambda item: (item.path not in first, not _starts_ranks(item)))


def _starts_ranks(item: pytest.Item) -> bool:
    return not {"run_ranks", "RealJob", "Machine"}.isdisjoint(vars(getattr(item, "module", None)))


def pytest_sessionfinish(session: pytest.Session) -> None:
    """End the ranks of the distributed tests, also after Ctrl-C."""
    ranks.stop_all()
