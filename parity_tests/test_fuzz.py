"""A short form of the fuzz script, and that it finds what it is for."""

import sys
import time
from pathlib import Path
from random import Random

import pytest

from megatron_ads import cli
from parity_tests import fuzz
from parity_tests.damaged_inputs import BORDERS, Command, Place, damage_json
from parity_tests.harness.ranks import run_ranks


@pytest.mark.slow
@pytest.mark.parametrize("border", BORDERS)
def test_forty_inputs_end_in_a_result_or_in_one_line(border: str) -> None:
    (found,) = run_ranks(1, fuzz.fuzz, border, 40, process_group=False, timeout=250)
    assert found.faults == []
    assert found.statuses.total() == 40
    assert found.statuses[2] > 10, "hardly anything was damaged"


def _raise(place: Place, chance: Random) -> Command:
    return lambda: 1 // 0


def _hang(place: Place, chance: Random) -> Command:
    return lambda: time.sleep(9)  # type: ignore[func-returns-value]


def _write(place: Place, chance: Random) -> Command:
    return lambda: (place.root / "outside" / "x").write_text("another length")


def _write_here(place: Place, chance: Random) -> Command:
    return lambda: Path("relative").write_text("x")


def _say_much(place: Place, chance: Random) -> Command:
    return lambda: print("Traceback\n  of\nmany lines", file=sys.stderr) or 2


def _say_nothing(place: Place, chance: Random) -> Command:
    return lambda: 2


def _take_memory(place: Place, chance: Random) -> Command:
    return lambda: cli.exit_status("megatron-ads", lambda: len(bytearray(1 << 33)))


def _one_fault(name: str) -> list[str]:
    BORDERS["probe"], fuzz.SECONDS = globals()[name], 1
    return fuzz.fuzz("probe", 1).faults


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("_raise", "ZeroDivisionError"),
        ("_hang", "no answer within 1 s"),
        ("_write", "written outside the target"),
        ("_write_here", "written outside the target"),
        ("_say_much", "status 2 with 'Traceback"),
        ("_say_nothing", "status 2 with ''"),
    ],
)
def test_a_fault_is_found(name: str, message: str) -> None:
    ((fault,),) = run_ranks(1, _one_fault, name, process_group=False)
    assert message in fault


def test_memory_is_bounded_and_its_end_is_one_line() -> None:
    assert run_ranks(1, _one_fault, "_take_memory", process_group=False) == [[]]


def test_the_same_number_gives_the_same_input(tmp_path: Path) -> None:
    texts = [damage_json({"a": [1, {"b": "c"}]}, Random(f"0/config/{number}")) for number in [*range(50), *range(50)]]
    assert texts[:50] == texts[50:]
    assert len(set(texts)) > 20
