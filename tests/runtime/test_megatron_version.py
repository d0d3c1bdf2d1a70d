"""Which versions count as a given one, and where they make a difference."""

import re
from importlib.metadata import version
from pathlib import Path

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


def test_the_modules_that_know_versions_are_listed() -> None:
    package = Path(megatron_version.__file__).parents[1]
    listed = set(re.findall(r"^    (\S+\.py) ", megatron_version.__doc__ or "", re.MULTILINE))
    asking = {
        str(file.relative_to(package))
        for file in package.rglob("*.py")
        if re.search(r"^from .*megatron_version import", file.read_text(), re.MULTILINE)
    }
    assert len(asking) >= 4 and asking <= listed
    assert all((package / file).is_file() for file in listed)
