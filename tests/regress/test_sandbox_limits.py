"""A program has what it needs and no more, and only one that reaches its last line has passed."""

import time

import pytest

from megatron_ads.regress.sandbox import Outcome, ProgramLimits, Verdict, run_program, run_programs

pytestmark = pytest.mark.usefixtures("sandboxed")


def run(source: str, **limits: float) -> Outcome:
    return run_program(source, ProgramLimits(**{"seconds": 20.0} | limits))


# ---- what it uses ----


IGNORES_SIGNALS = """
import signal
for number in set(range(1, 32)) - {signal.SIGKILL, signal.SIGSTOP}:
    signal.signal(number, signal.SIG_IGN)
while True: pass
"""
WRITES_REPORTS = """
import os
while True:
    for descriptor in range(3, 1024):
        try:
            os.write(descriptor, b"x" * 999)
        except OSError:
            pass
"""
FORGES_REPORTS = """
import os
for descriptor in range(3, 1024):
    try:
        os.write(descriptor, b'["passed", "00"]\\n["passed", ""]\\n')
    except OSError:
        pass
os._exit(0)
"""
LEAVES_BY_A_SIGNAL = """
import os, signal
signal.signal(signal.SIGALRM, lambda *_: os._exit(0))
signal.setitimer(signal.ITIMER_REAL, 0.01)
while True: pass
"""


@pytest.mark.parametrize(
    "source",
    [
        "while True: pass",
        "import time\ntime.sleep(100)",
        "import os, time\nos.closerange(0, 1024)\ntime.sleep(100)",
        IGNORES_SIGNALS,
        "while True:\n    try:\n        while True: pass\n    except BaseException: pass",
        "class E(Exception):\n    def __str__(self):\n        while True: pass\nraise E",
    ],
    ids=["loop", "sleep", "sleep-unheard", "signals-ignored", "exceptions-ignored", "endless-message"],
)
def test_an_endless_program_is_ended_on_time(source: str) -> None:
    begun = time.monotonic()
    outcome = run(source, seconds=0.5)
    assert outcome.verdict == Verdict.timed_out, outcome
    assert 0.5 < outcome.seconds < 5
    assert time.monotonic() - begun < 15


@pytest.mark.parametrize(
    ("source", "verdict"),
    [
        ("while True: print('x' * 999)", Verdict.too_much_output),
        ("import sys\nwhile True: sys.stderr.write('x' * 999)", Verdict.too_much_output),
        (WRITES_REPORTS, Verdict.too_much_output),
        ("open('f', 'wb').write(bytes(20_000_000))", Verdict.too_much_output),
        ("open('f', 'wb').truncate(20_000_000)", Verdict.too_much_output),
        ("for n in range(10**9): open(f'f{n}', 'wb').write(bytes(10_000_000))", Verdict.too_much_output),
        ("for n in range(10**9): open(f'f{n}', 'wb').close()", Verdict.too_much_output),
        ("data = []\nwhile True: data.append(bytearray(10**7))", Verdict.out_of_memory),
        ("data = bytearray(10**12)", Verdict.out_of_memory),
        ("data = [0]\nwhile True: data += data", Verdict.out_of_memory),
        (
            "import threading, time\nthreading.stack_size(65536)\n"
            "while True: threading.Thread(target=time.sleep, args=(100,)).start()",
            Verdict.too_many_threads,
        ),
    ],
    ids=["stdout", "stderr", "reports", "file", "hole", "files", "empty-files", "memory", "at-once", "list", "threads"],
)
def test_a_program_that_takes_too_much_is_ended(source: str, verdict: Verdict) -> None:
    outcome = run(source, memory_bytes=256 << 20)
    assert outcome.verdict == verdict, outcome
    assert outcome.seconds < 15


def test_open_files_and_core_dumps_are_limited() -> None:
    outcome = run("files = [open('f', 'w') for _ in range(100)]")
    assert (outcome.verdict, "Too many open files" in outcome.detail) == (Verdict.failed, True)
    outcome = run("import ctypes\nctypes.string_at(0)")
    assert outcome == Outcome(Verdict.failed, "ended by SIGSEGV", outcome.seconds)


# ---- forged success ----


@pytest.mark.parametrize(
    "source",
    [
        "import os\nos._exit(0)\nassert False",
        "import sys\nsys.exit(0)\nassert False",
        "raise SystemExit",
        "import os, atexit\natexit.register(os._exit, 0)\nassert False",
        'print(\'["passed", ""]\')\nassert False',
        FORGES_REPORTS,
        "import os\nos.lseek(0, 0, 0)\nassert b'token' in os.read(0, 10**6)",  # the request, with the token
        "import threading, os\nthreading.Thread(target=os._exit, args=(0,)).start()\nimport time\ntime.sleep(5)",
        LEAVES_BY_A_SIGNAL,
        "class Quiet(BaseException):\n    def __str__(self): raise SystemExit(0)\nraise Quiet",
        'import json, os\njson.dumps = lambda *_: \'["passed", ""]\'\nassert False',
        "this is no Python",
        "'\\ud800'.encode()",
        "\0",
    ],
)
def test_a_program_that_does_not_reach_its_last_line_has_not_passed(source: str) -> None:
    assert run(source).verdict == Verdict.failed


# ---- honest programs ----

HONEST = """
from __future__ import annotations
import asyncio, collections, dataclasses, datetime, decimal, functools, hashlib, heapq, itertools, json, math, random
import re, sqlite3, statistics, string, tempfile, threading, typing, unittest, xml.dom.minidom, zoneinfo, encodings.idna

@dataclasses.dataclass
class Point:
    x: int

assert typing.get_type_hints(Point) == {"x": int}
assert zoneinfo.ZoneInfo("UTC") and re.match("a", "a") and math.isclose(0.1 + 0.2, 0.3)
with open("own.txt", "w") as file:
    file.write("text")
assert open("own.txt").read() == "text"
with tempfile.TemporaryFile(dir=".") as file:
    file.write(b"x")
found = []
threads = [threading.Thread(target=found.append, args=(n,)) for n in range(4)]
for thread in threads: thread.start()
for thread in threads: thread.join()
assert sorted(found) == [0, 1, 2, 3]
random.seed(), hashlib.sha256(b"x"), datetime.datetime.now(), print("text", end="")
if __name__ == "__main__":
    raise RuntimeError("that was meant for a script")
"""


def test_an_honest_program_has_the_standard_library_a_folder_and_threads() -> None:
    outcome = run(HONEST)
    assert outcome == Outcome(Verdict.passed, "", outcome.seconds)


def test_a_failed_assertion_is_told_by_its_last_line_in_bounds() -> None:
    outcome = run(f"assert 1 == 2, 'first line\\n{'y' * 10_000}'")
    assert (outcome.verdict, len(outcome.detail)) == (Verdict.failed, 300)
    assert run("assert 1 == 2, 'one is not two'").detail == "AssertionError: one is not two"
    assert run("assert 1 == 2").detail == "AssertionError"


def test_outcomes_are_in_the_order_of_programs_that_end_in_another() -> None:
    sources = [f"import time\ntime.sleep({(5 - n) / 20})\nassert {n} % 2" for n in range(6)]
    outcomes = run_programs(sources, workers=6)
    assert [outcome.verdict for outcome in outcomes] == [Verdict.failed, Verdict.passed] * 3


def test_sets_of_words_have_one_order_so_that_a_verdict_can_be_repeated() -> None:
    source = "raise ValueError(list({'a', 'b', 'c', 'd', 'e', 'f', 'g'}))"
    assert len({outcome.detail for outcome in run_programs([source] * 4)}) == 1
