"""Every test here that runs programs needs a machine that can confine them, and checks that nothing is left of them."""

import ctypes
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from megatron_ads.errors import ConfigError
from megatron_ads.regress.sandbox import run_program

_PR_SET_CHILD_SUBREAPER = 36


@pytest.fixture
def sandboxed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Skip where programs cannot be confined; check that no file and no process, even an orphan, is left."""
    try:
        run_program("pass")
    except ConfigError as error:
        pytest.skip(str(error))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    libc = ctypes.CDLL(None)
    libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)  # orphans become children of this process
    before = set(psutil.Process().children(recursive=True))
    yield
    assert set(psutil.Process().children(recursive=True)) <= before
    libc.prctl(_PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)
    assert list(tmp_path.iterdir()) == []
