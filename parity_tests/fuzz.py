"""Try damaged and absurd inputs at every border of the project: each ends in a result or in one line, at once.

    python -m parity_tests.fuzz                           # 2,000 inputs a border, some minutes
    python -m parity_tests.fuzz --border headers --inputs 1 --first 1234      # one of them again

A border runs in a process of its own with bounded memory; every input has a time limit. A fault is an exception that
reaches the user, a hang, a refusal that is not one line, or anything written outside the target folder. The same seed
and number give the same input.
"""

import argparse
import contextlib
import io
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from megatron_ads.demo_model import write_demo_model
from parity_tests.damaged_inputs import BORDERS, Command, Place
from parity_tests.harness.family import MEMBERS
from parity_tests.harness.ranks import run_ranks, stop_all

SECONDS = 20
"""Longest that one input may take; a busy machine is slow."""
MEMORY = 3 << 30
"""Address space that a border may take beyond what its process has when it starts."""
_MODEL = MEMBERS["DeepSeek-R1-0528"].config | {
    "num_hidden_layers": 2,
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "intermediate_size": 64,
    "moe_intermediate_size": 16,
}
_DENSE = MEMBERS["R1-Distill-Llama-8B, tied"].config | {"num_hidden_layers": 2}


class Hang(BaseException):
    """An input took too long."""


@dataclass(slots=True)
class Found:
    """What came of the inputs of one border."""

    statuses: Counter[int] = field(default_factory=Counter)
    slowest: float = 0.0
    faults: list[str] = field(default_factory=list)


def fuzz(name: str, inputs: int, seed: int = 0, first: int = 0) -> Found:
    """Try ``inputs`` inputs at one border in this process, whose memory is bounded from now on.

    Raises:
        KeyError: If there is no such border.
    """
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, resource.RLIM_INFINITY))
    signal.signal(signal.SIGALRM, _hangs)
    found = Found()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        place = Place(Path(folder))
        write_demo_model(place.source, _DENSE if name == "dense" else _MODEL, fp8=True)
        (place.root / "outside").mkdir()
        (place.root / "outside" / "x").write_text("stays")
        (place.root / "here").mkdir()
        os.chdir(place.root / "here")
        for number in range(first, first + inputs):
            with _empty(place):
                _try(BORDERS[name](place, Random(f"{seed}/{name}/{number}")), place, f"{name} {number}", found)
    return found


def _hangs(*_: object) -> None:
    raise Hang


@contextlib.contextmanager
def _empty(place: Place) -> Iterator[None]:
    place.input.mkdir()
    try:
        yield
    finally:
        shutil.rmtree(place.input)
        if place.target.is_dir():
            shutil.rmtree(place.target)
        place.target.unlink(missing_ok=True)
        for partial in place.root.glob("target*"):
            shutil.rmtree(partial) if partial.is_dir() else partial.unlink()


def _try(command: Command, place: Place, which: str, found: Found) -> None:
    before, started = _state(place), time.monotonic()
    output, errors = io.StringIO(), io.StringIO()
    signal.alarm(SECONDS)
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
            status = command()
    except Hang:
        found.faults.append(f"{which}: no answer within {SECONDS} s")
    except (Exception, SystemExit) as error:  # noqa: BLE001 - that is what is looked for
        where = traceback.extract_tb(error.__traceback__)[-1]
        found.faults.append(f"{which}: {type(error).__name__}: {str(error)[:200]} ({where.filename}:{where.lineno})")
    else:
        found.statuses[status] += 1
        if status == 2:
            *_, last = "", *errors.getvalue().strip().splitlines()
            if not last.startswith("megatron-ads: "):
                found.faults.append(f"{which}: status 2 with {errors.getvalue()[-200:]!r}")
            if len(last) > 3000:
                found.faults.append(f"{which}: a line of {len(last)} characters")
    finally:
        signal.alarm(0)
    found.slowest = max(found.slowest, time.monotonic() - started)
    if changed := before ^ _state(place):
        found.faults.append(f"{which}: written outside the target: {min(changed)[0]}")


def _state(place: Place) -> set[tuple[str, int, int]]:
    """Return name, size and time of everything but the target."""
    found = set()
    for folder, folders, files in os.walk(place.root):
        folders[:] = [name for name in folders if not name.startswith("target")]
        for name in [*folders, *files]:
            entry = os.lstat(os.path.join(folder, name))
            if not name.startswith("target"):
                found.add((os.path.join(folder, name), entry.st_size, entry.st_mtime_ns))
    return found


def main() -> int:
    """Fuzz the borders that are asked for; return 1 if there is a fault."""
    parser = argparse.ArgumentParser(prog="parity_tests.fuzz", description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--border", nargs="+", choices=list(BORDERS), default=list(BORDERS))
    parser.add_argument("--inputs", type=int, default=2000)
    parser.add_argument("--first", type=int, default=0, help="number of the first input")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    from parity_tests.fuzz import fuzz as importable  # a rank finds it by the name of its module, not in __main__

    faults = 0
    for name in args.border:
        started = time.monotonic()
        (found,) = run_ranks(
            1, importable, name, args.inputs, args.seed, args.first, process_group=False, timeout=60 + 5.0 * args.inputs
        )
        statuses = ", ".join(f"{count} x {status}" for status, count in sorted(found.statuses.items()))
        print(
            f"{name}: {args.inputs} inputs in {time.monotonic() - started:.0f} s, slowest {found.slowest:.1f} s; "
            f"status {statuses}; {len(found.faults)} faults",
            flush=True,
        )
        print("".join(f"  {fault}\n" for fault in found.faults), end="", flush=True)
        faults += len(found.faults)
    stop_all()
    return int(faults > 0)


if __name__ == "__main__":
    sys.exit(main())
