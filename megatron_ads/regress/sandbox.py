"""Run a Python program that a model wrote, so that it can neither reach nor harm anything outside its own process.

The program runs in a process of its own: another user where this one is root, its system calls filtered
(``sandbox_filter.py``), its files held by Landlock to an own folder and to the standard library, no network, no further
process, limits on time, memory, files, threads and output, an environment with nothing of ours. What cannot be had
without privileges is not needed: no user namespaces, so it works in an ordinary Docker container. Where the kernel
lacks something, no program is run at all.

What it does not do: a program that passes says so by a token that it is not given, so leaving early, or printing
success, is no pass. But the tests run in the interpreter of the program, as in the benchmarks' own code, and code that
was written to deceive could find the token in the frames below its own, or change what the tests call. It also sees
names, sizes and times of files elsewhere, and it takes its share of the processor.
"""

import json
import math
import os
import platform
import secrets
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from enum import StrEnum
from functools import cache, partial
from itertools import islice
from pathlib import Path
from typing import Self

from megatron_ads.errors import ConfigError, require
from megatron_ads.regress.sandbox_filter import AUDIT_ARCH, build_filter

_CHILD = Path(__file__).with_name("sandbox_child.py")
_START_SECONDS = 120.0  # of an interpreter, on a machine that has much else to do
_END_SECONDS = 30.0  # of a process that was killed
_LOOK_SECONDS = 0.05  # between two looks at threads and files, which no limit of the kernel counts
_DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")
_SYSTEM_LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache")
_TIME_ZONES = ("/etc/localtime", "/usr/share/zoneinfo")


@dataclass(frozen=True, kw_only=True, slots=True)
class ProgramLimits:
    """What one program may use."""

    seconds: float = 10.0
    """By the clock, from its first line on."""
    memory_bytes: int = 1 << 30
    """Of address space, with the interpreter's own (about 30 MB)."""
    file_bytes: int = 16 << 20
    """In one file, and about as much in all of them."""
    files: int = 256
    """In its folder."""
    output_bytes: int = 1 << 20
    open_files: int = 64
    threads: int = 64


class Verdict(StrEnum):
    """How a program ended."""

    passed = "passed"
    failed = "failed"
    """An exception, an exit of any status before its last line, or a crash."""
    timed_out = "timed_out"
    out_of_memory = "out_of_memory"
    refused = "refused"
    """It tried what is forbidden, and did not go on without it."""
    too_much_output = "too_much_output"
    """Printed, or written to files."""
    too_many_threads = "too_many_threads"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one program."""

    verdict: Verdict
    detail: str
    """The last line of its error, cut; empty if it passed."""
    seconds: float
    """By the clock, from its first line on."""


_DEFAULT = ProgramLimits()
_BY_SIGNAL: Mapping[int, Verdict] = {
    signal.SIGXCPU: Verdict.timed_out,
    signal.SIGSYS: Verdict.refused,
    signal.SIGKILL: Verdict.out_of_memory,  # the machine's, which kills; over its own limit, a program sees an error
}


def run_programs(sources: Sequence[str], limits: ProgramLimits = _DEFAULT, workers: int | None = None) -> list[Outcome]:
    """Run programs side by side, by default one a core; outcomes are in the order of the programs.

    Raises:
        ConfigError: If this machine cannot confine a program.
    """
    with ThreadPoolExecutor(workers or len(os.sched_getaffinity(0))) as pool:
        return list(pool.map(partial(run_program, limits=limits), sources))


def run_program(source: str, limits: ProgramLimits = _DEFAULT) -> Outcome:
    """Run one program to its last line, confined; whatever it does, it is gone when this returns.

    Raises:
        ConfigError: If this machine cannot confine a program; then it is not run.
    """
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="megatron-ads-program-")))
        token = secrets.token_hex(16)
        request = stack.enter_context(tempfile.TemporaryFile())
        request.write(json.dumps({"source": source, "token": token, **_confinement(folder, limits)}).encode())
        request.seek(0)
        run = stack.enter_context(_Run(request.fileno(), folder, limits))
        run.watch()
        return run.outcome(token)


@cache
def require_sandbox() -> None:
    """Check, by trial, that this machine can confine a program.

    Raises:
        ConfigError: If it cannot; the message says what is missing.
    """
    outcome = run_program(_TRIAL.format(file=str(_CHILD)))
    require(outcome.verdict == Verdict.passed, _cannot_confine(f"in a trial, {outcome.detail or outcome.verdict}"))


_TRIAL = """
import os, socket
for forbidden in (socket.socket, os.fork, lambda: open({file!r}), lambda: open("/tmp/megatron-ads-trial", "w")):
    try:
        forbidden()
    except PermissionError:
        continue
    raise RuntimeError("a program did what is forbidden")
"""


def _cannot_confine(reason: str) -> str:
    return (
        f"This machine cannot confine generated programs ({reason}), and they are not run otherwise. Use Linux 5.13 or "
        "newer on x86_64 or aarch64 with Landlock (cat /sys/kernel/security/lsm) and, in a container, a runtime that "
        "lets its calls through; or leave out the benchmarks that run programs."
    )


# ---- one run ----


def _confinement(folder: Path, limits: ProgramLimits) -> Mapping[str, object]:
    """Return what the child needs in order to confine itself, as JSON values.

    Raises:
        ConfigError: If there is no filter for this kind of machine.
    """
    system, machine = platform.system(), platform.machine()
    require(system == "Linux" and machine in AUDIT_ARCH, _cannot_confine(f"it is {system} on {machine}"))
    libraries = [os.path.join(sys.base_prefix, name) for name in dict.fromkeys(("lib", sys.platlibdir))]
    return {
        "folder": str(folder),
        "readable": [*libraries, *_SYSTEM_LIBRARIES, *_TIME_ZONES, *_DEVICES],
        "writable": ["/dev/null"],
        "filter": build_filter(machine).hex(),
        "processes": 4096,  # and threads, of all programs at once
        "limits": {
            "RLIMIT_AS": limits.memory_bytes,
            "RLIMIT_CPU": math.ceil(limits.seconds) + 5,  # should nobody be there to watch the clock
            "RLIMIT_FSIZE": limits.file_bytes,
            "RLIMIT_NOFILE": limits.open_files,
            "RLIMIT_CORE": 0,
        },
    }


class _Run:
    """The process of one program, with what it has said so far; gone, with its pipes, at the end of the context."""

    def __init__(self, request: int, folder: Path, limits: ProgramLimits) -> None:
        """Start the process; ``request`` is the descriptor it reads its orders from."""
        self._folder, self._limits = folder, limits
        self._output, self._report = bytearray(), bytearray()
        self._started: float | None = None
        self._stopped: tuple[Verdict, str] | None = None
        self._seconds = 0.0
        output, its_output = os.pipe()
        report, its_report = os.pipe()
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-B", "-P", "-s", "-S", str(_CHILD), str(its_report)],
                stdin=request,
                stdout=its_output,
                stderr=its_output,
                cwd="/",
                env={"PYTHONHASHSEED": "0", "PYTHONUTF8": "1"},  # the same verdict each time
                pass_fds=[its_report],
                start_new_session=True,
            )
        except BaseException:
            os.close(output)
            os.close(report)
            raise
        finally:
            os.close(its_output)
            os.close(its_report)
        self._pipes = {output: self._output, report: self._report}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.returncode is None:  # else its number may be another's by now
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait(_END_SECONDS)
        for descriptor in self._pipes:
            os.close(descriptor)

    def watch(self) -> None:
        """Wait until the process has ended or is over a limit.

        Raises:
            ConfigError: If it could not confine itself; then it has run nothing.
        """
        end = os.pidfd_open(self._process.pid)
        with selectors.DefaultSelector() as selector:
            try:
                for descriptor in (end, *self._pipes):
                    selector.register(descriptor, selectors.EVENT_READ)
                self._watch(selector, end)
            finally:
                os.close(end)
        for descriptor in self._pipes:  # what is left in those of a process that has ended
            while self._stopped is None and self._read(descriptor):
                pass
        if self._started is None and self._stopped is None:
            self._require_confined()

    def _watch(self, selector: selectors.BaseSelector, end: int) -> None:
        born = looked = time.monotonic()
        ended = False
        while not ended and self._stopped is None:
            ready = {key.fd for key, _ in selector.select(_LOOK_SECONDS)}
            ended = end in ready
            for descriptor in ready - {end}:
                if not self._read(descriptor):
                    selector.unregister(descriptor)
            now = time.monotonic()
            if self._started is None:
                require(now < born + _START_SECONDS, _cannot_confine(f"no interpreter in {_START_SECONDS:g} s"))
                if b"\n" in self._report:
                    self._require_confined()
                    self._started = now
            elif now > self._started + self._limits.seconds and not ended:
                self._stopped = Verdict.timed_out, f"not at its end after {self._limits.seconds:g} s"
            if now > looked + _LOOK_SECONDS:
                looked = now
                self._look()
        self._seconds = 0.0 if self._started is None else time.monotonic() - self._started

    def _read(self, descriptor: int) -> bool:
        """Take what a pipe holds, at most 64 KiB; False at its end."""
        data = os.read(descriptor, 1 << 16)
        self._pipes[descriptor] += data
        if len(self._pipes[descriptor]) > self._limits.output_bytes:
            self._stopped = Verdict.too_much_output, f"printed more than {self._limits.output_bytes} bytes"
        return bool(data)

    def _look(self) -> None:
        """Stop the process if it has too many threads or files."""
        limits = self._limits
        with suppress(OSError), os.scandir(self._folder) as found:
            entries = list(islice(found, limits.files + 1))
            if len(entries) > limits.files:
                self._stopped = Verdict.too_much_output, f"made more than {limits.files} files"
            elif sum(entry.stat(follow_symlinks=False).st_size for entry in entries) > limits.file_bytes:
                self._stopped = Verdict.too_much_output, f"wrote more than {limits.file_bytes} bytes to files"
        with suppress(OSError):  # it has ended
            status = Path(f"/proc/{self._process.pid}/status").read_text()
            if int(status.partition("Threads:")[2].split()[0]) > limits.threads:
                self._stopped = Verdict.too_many_threads, f"had more than {limits.threads} threads"

    # ---- what it says ----

    def _require_confined(self) -> None:
        reports = self._reports()
        if not reports or reports[0][0] != "ready":
            said = reports[0][1] if reports else self._output.decode(errors="replace").strip().rpartition("\n")[2]
            raise ConfigError(_cannot_confine(_cut(said) or "the interpreter ended before it was confined"))

    def _reports(self) -> list[tuple[str, str]]:
        """Return all reports in the order they came; what is no report, the program has written there."""
        reports = []
        for line in self._report.splitlines():
            with suppress(ValueError, TypeError, RecursionError):
                kind, text = json.loads(line)
                reports.append((str(kind), str(text)))
        return reports

    def outcome(self, token: str) -> Outcome:
        """Judge a run that was watched to its end."""
        if self._stopped is not None:
            return Outcome(*self._stopped, self._seconds)
        reports = self._reports()[1:]
        if (Verdict.passed, token) in reports:
            return Outcome(Verdict.passed, "", self._seconds)
        for kind, text in reversed(reports):
            if kind in set(Verdict) - {Verdict.passed}:
                return Outcome(Verdict(kind), _cut(text), self._seconds)
        return Outcome(*self._silent_end(), self._seconds)

    def _silent_end(self) -> tuple[Verdict, str]:
        """Say how a process ended whose runner reported nothing."""
        status = self._process.wait(_END_SECONDS)
        if status >= 0:
            return Verdict.failed, f"left with status {status} before its last line"
        name = signal.Signals(-status).name if -status in set(signal.Signals) else f"signal {-status}"
        return _BY_SIGNAL.get(-status, Verdict.failed), f"ended by {name}"


def _cut(text: str) -> str:
    return " ".join(text.split())[:300]
