"""Tests of the records that ranks send each other."""

import os
import pickle
import subprocess
from pathlib import Path

import pytest

from megatron_ads.layout import ParallelLayout
from megatron_ads.runtime.health.peers import LostPeer
from megatron_ads.runtime.health.rank_record import ExitStatus
from megatron_ads.runtime.records import from_bytes, to_bytes


class _Called:
    def __init__(self, function: object, *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return self.call


def test_records_and_plain_values_come_back() -> None:
    sent = ("loss", LostPeer(3, 1, None, "ValueError: x"), {ExitStatus.HUNG: (ParallelLayout(world=4, pp=2), b"x")})
    assert from_bytes(to_bytes(sent)) == sent


@pytest.mark.parametrize(
    "call",
    [
        (os.system, "touch {}"),
        (eval, "open('{}', 'w')"),
        (subprocess.Popen, ["touch", "{}"]),
        (Path.touch, "{}"),
        (ExitStatus.__class__, "x", (), {}),
    ],
    ids=["os.system", "eval", "Popen", "method", "class"],
)
def test_what_is_no_record_is_refused_and_not_called(call: tuple[object, ...], tmp_path: Path) -> None:
    made = tmp_path / "made"
    arguments = [each.format(made) if isinstance(each, str) else each for each in call[1:]]
    with pytest.raises(pickle.UnpicklingError, match="no record of a job"):
        from_bytes(pickle.dumps(_Called(call[0], *arguments)))
    assert not made.exists()


def test_a_function_that_records_modules_import_is_no_record() -> None:
    with pytest.raises(pickle.UnpicklingError, match=r"megatron_ads\.runtime\.health\.ring\.os"):
        from_bytes(b"cmegatron_ads.runtime.health.ring\nos\n.")
