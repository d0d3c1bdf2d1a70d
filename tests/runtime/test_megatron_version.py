"""Which versions count as a given one."""

from importlib.metadata import version

import pytest
from packaging.version import Version

from megatron_ads.runtime import megatron_version


@pytest.mark.parametrize(
    ("installed", "first", "answer"),
    [
        ("0.16.1", "0.17", False),
        ("0.17.0", "0.17", True),
        ("0.19.0rc1", "0.19", True),  # it has what the release has
        ("0.18.2", "0.19", False),
        ("0.19.2", "0.17", True),
    ],
)
def test_a_version_counts_from_its_first_pre_release_on(
    monkeypatch: pytest.MonkeyPatch, installed: str, first: str, answer: bool
) -> None:
    monkeypatch.setattr(megatron_version, "megatron_core", lambda: Version(installed))
    assert megatron_version.megatron_core_since(first) is answer


def test_the_installed_version_is_one_that_is_supported() -> None:
    assert megatron_version.megatron_core() == Version(version("megatron-core"))
    assert megatron_version.megatron_core_since("0.16") and not megatron_version.megatron_core_since("0.20")
