"""Hostile programs come to nothing: each test looks at what they were after, and not only at the verdict.

A program here that makes many attempts raises if one of them goes through: that it passes means that all were refused.
"""

import os
import platform
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from megatron_ads.errors import ConfigError
from megatron_ads.regress import sandbox
from megatron_ads.regress.sandbox import Outcome, ProgramLimits, Verdict, require_sandbox, run_program
from megatron_ads.regress.sandbox_filter import ALLOWED
from tests.regress.forbidden_calls import FORBIDDEN, number_here

pytestmark = pytest.mark.usefixtures("sandboxed")
ROOT = Path(__file__).parents[2]


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder that every user may change: what keeps a program from it is its confinement, not its user."""
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        path = Path(name)
        path.chmod(0o777)
        (path / "kept.txt").write_text("precious")
        (path / "kept.txt").chmod(0o666)
        yield path


def run(source: str, **limits: float) -> Outcome:
    return run_program(source, ProgramLimits(**{"seconds": 20.0} | limits))


ATTEMPT = """
import ctypes, os, shutil, signal, socket, subprocess, sys, fcntl, resource
libc = ctypes.CDLL(None, use_errno=True)
def fails(attempt):
    try:
        result = attempt()
    except OSError:
        return
    assert result == -1, f"went through, with {result}"  # what functions of libc return
def all_fail(*attempts):
    for number, attempt in enumerate(attempts):
        try:
            fails(attempt)
        except AssertionError as error:
            raise RuntimeError(f"attempt {number} {error}")
"""

# ---- files ----


@pytest.mark.parametrize(
    "attempt",
    [
        "shutil.rmtree(folder)",
        "os.remove(file)",
        "os.rename(file, file + '.x')",
        "os.rename(file, 'mine')",
        "os.link(file, 'mine')",
        "os.truncate(file, 0)",
        "open(file, 'w')",
        "open(file, 'a').write('x')",
        "os.open(file, os.O_RDONLY | os.O_TRUNC)",
        "os.open(file, 3 | os.O_TRUNC)",
        "os.chmod(file, 0)",
        "os.chmod(folder, 0)",
        "os.chown(file, os.getuid(), -1)",
        "os.utime(file, (0, 0))",
        "os.setxattr(file, 'user.x', b'x')",
        "open(folder + '/new', 'w')",
        "os.mkdir(folder + '/new')",
        "os.symlink(file, folder + '/new')",
        "open('new', 'w') and os.link('new', folder + '/new')",
        "open('new', 'w') and os.rename('new', folder + '/new')",
        "os.mkfifo(folder + '/new')",
        "os.chdir(folder) or open('kept.txt', 'w')",
        "os.open(folder, os.O_TMPFILE | os.O_WRONLY)",
    ],
)
def test_files_elsewhere_are_neither_removed_nor_changed_nor_made(folder: Path, attempt: str) -> None:
    before = (folder / "kept.txt").stat()
    outcome = run(f"{ATTEMPT}\nfolder, file = {str(folder)!r}, {str(folder / 'kept.txt')!r}\n{attempt}\n")
    assert outcome.verdict == Verdict.refused, outcome
    assert [path.name for path in folder.iterdir()] == ["kept.txt"]
    assert (folder / "kept.txt").read_text() == "precious"
    after = (folder / "kept.txt").stat()
    assert (after.st_mode, after.st_uid, after.st_mtime) == (before.st_mode, before.st_uid, before.st_mtime)
    assert folder.stat().st_mode & 0o777 == 0o777


@pytest.mark.parametrize("mode", [0o600, 0o644])
def test_a_file_elsewhere_cannot_be_read(folder: Path, mode: int) -> None:
    file = folder / "secret.txt"
    file.write_text("hunter2")
    file.chmod(mode)
    for path in (file, f"/proc/self/root{file}", f"/proc/{os.getpid()}/root{file}"):
        outcome = run(f"raise ValueError(open({str(path)!r}).read())")
        assert outcome.verdict == Verdict.refused
        assert "hunter2" not in outcome.detail


def test_the_environment_descriptors_and_home_of_this_process_are_out_of_reach(
    monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    monkeypatch.setenv("API_KEY", "hunter2")
    with open(folder / "kept.txt") as ours:
        os.set_inheritable(ours.fileno(), True)
        outcome = run(f"""{ATTEMPT}
assert not {{"API_KEY", "HOME", "PATH"}} & set(os.environ), os.environ
all_fail(
    lambda: open("/proc/{os.getpid()}/environ").read(),
    lambda: os.listdir("/proc/{os.getpid()}/fd"),
    lambda: os.pread({ours.fileno()}, 8, 0) == b"precious",
    lambda: os.listdir({str(Path.home())!r}),
    lambda: os.listdir("/etc"),
    lambda: open("/etc/passwd").read(),
    lambda: os.listdir("/"),
)
descriptors = []
for number in range(1024):
    try:
        descriptors.append(fcntl.fcntl(number, fcntl.F_GETFD))
    except OSError:
        pass
assert len(descriptors) <= 5, descriptors  # three, the report, and the library for another user
""")
    assert outcome == Outcome(Verdict.passed, "", outcome.seconds), outcome


# ---- network ----


def _server(kind: socket.SocketKind, address: object, family: int = socket.AF_INET) -> socket.socket:
    server = socket.socket(family, kind)
    server.bind(address)
    if kind == socket.SOCK_STREAM:
        server.listen()
    server.settimeout(0.3)
    if family == socket.AF_UNIX and kind == socket.SOCK_STREAM:
        # Another user may connect, but for the sandbox.
        os.chmod(str(address), 0o777)
    return server


def _was_reached(server: socket.socket) -> bool:
    try:
        if server.type == socket.SOCK_DGRAM:
            server.recv(1)
        else:
            server.accept()[0].close()
    except TimeoutError:
        return False
    return True


@pytest.mark.parametrize("kind", ["tcp", "udp", "unix", "abstract"])
def test_no_packet_or_connection_arrives_though_it_does_without_the_sandbox(folder: Path, kind: str) -> None:
    loopback = ("127.0.0.1", 0)
    server = {
        "tcp": lambda: _server(socket.SOCK_STREAM, loopback),
        "udp": lambda: _server(socket.SOCK_DGRAM, loopback),
        "unix": lambda: _server(socket.SOCK_STREAM, str(folder / "socket"), socket.AF_UNIX),
        "abstract": lambda: _server(socket.SOCK_DGRAM, f"\0{folder}", socket.AF_UNIX),
    }[kind]()
    with server:
        program = (
            f"import socket\ns = socket.socket({int(server.family)}, {int(server.type)})\n"
            f"s.connect({server.getsockname()!r})\ns.send(b'x')\n"
        )
        subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
        assert _was_reached(server)
        assert run(program).verdict == Verdict.refused
        assert not _was_reached(server)


def test_sockets_by_other_ways_are_refused_too() -> None:
    outcome = run(f"""{ATTEMPT}
all_fail(
    lambda: libc.socket(2, 1, 0),
    lambda: libc.syscall({number_here("socket")}, 16, 3, 0),  # netlink
    lambda: socket.socketpair(),
    lambda: socket.getaddrinfo("localhost", 80, family=socket.AF_INET6, flags=socket.AI_NUMERICHOST),
    lambda: libc.syscall({number_here("io_uring_setup")}, 8, 0),
)""")
    assert outcome.verdict == Verdict.passed, outcome


# ---- processes ----


@pytest.mark.parametrize(
    "source",
    [
        "import os\nwhile True: os.fork()",
        "import os\nos.execv('/bin/sh', ['sh', '-c', 'echo > {file}'])",
        "import subprocess\nsubprocess.run(['/bin/sh', '-c', 'echo > {file}'])",
        "import os\nos.posix_spawn('/bin/sh', ['sh', '-c', 'echo > {file}'], {{}})",
        "import os\nos.system('echo > {file}') == 0 or (_ for _ in ()).throw(PermissionError())",
        "import multiprocessing as m\nm.get_context('fork').Process(target=print).start()",
        # A daemon that outlives: forks, leaves its session, forks again, and writes later.
        "import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n        os.closerange(0, 64)\n"
        "        time.sleep(60)\n    os._exit(0)\n",
    ],
    ids=["fork-bomb", "exec", "subprocess", "spawn", "system", "multiprocessing", "daemon"],
)
def test_no_other_process_is_started(folder: Path, source: str) -> None:
    outcome = run(source.format(file=folder / "new"))
    assert outcome.verdict == Verdict.refused, outcome
    assert not (folder / "new").exists()


def test_calls_past_the_library_are_refused_too() -> None:
    numbers, clone = FORBIDDEN[platform.machine()], ALLOWED[platform.machine()]["clone"]
    assert len(numbers) > 40
    outcome = run(f"""{ATTEMPT}
for name, number in {numbers}.items():
    assert libc.syscall(number, 0, 0, 0, 0, 0, 0) == -1 and ctypes.get_errno() in (1, 38), name
# A new process, by clone with the flags of fork, of vfork, and with a namespace.
for flags in (17, 0x4111, 0x10000011 | 0x10000, 0x3D0F00 | 0x40000000):
    assert libc.syscall({clone}, flags, 0, 0, 0, 0) == -1 and ctypes.get_errno() == 1, flags
""")
    assert outcome.verdict == Verdict.passed, outcome


def test_other_processes_are_neither_killed_nor_limited() -> None:
    with subprocess.Popen(["sleep", "100"]) as victim:
        limits, niceness = psutil.Process(victim.pid).rlimit(psutil.RLIMIT_NOFILE), psutil.Process(victim.pid).nice()
        outcome = run(f"""{ATTEMPT}
F_SETSIG = 10
for pid in ({victim.pid}, os.getppid()):
    all_fail(
        lambda: os.kill(pid, signal.SIGKILL),
        lambda: os.killpg(pid, signal.SIGKILL),
        lambda: os.kill(-1, signal.SIGKILL),
        lambda: signal.pidfd_send_signal(os.pidfd_open(pid), signal.SIGKILL),
        lambda: fcntl.fcntl(1, fcntl.F_SETOWN, pid),
        lambda: fcntl.fcntl(1, F_SETSIG, signal.SIGKILL),
        lambda: resource.prlimit(pid, resource.RLIMIT_NOFILE, (8, 8)),
        lambda: os.setpriority(os.PRIO_PROCESS, pid, 19),
    )""")
        try:
            assert outcome.verdict == Verdict.passed, outcome
            assert victim.poll() is None
            assert psutil.Process(victim.pid).rlimit(psutil.RLIMIT_NOFILE) == limits
            assert psutil.Process(victim.pid).nice() == niceness
        finally:
            victim.kill()


def test_a_program_of_roots_runs_as_another_user() -> None:
    change = "import os; os.setgroups([]); os.setgid(65534); os.setuid(65534)"
    if subprocess.run([sys.executable, "-c", change], capture_output=True, timeout=60).returncode:
        pytest.skip("this user cannot become another one")
    outcome = run(
        "import os\nassert 0 not in (*os.getresuid(), *os.getresgid(), *os.getgroups())\nimport sqlite3, wave"
    )
    assert outcome.verdict == Verdict.passed, outcome


def test_a_program_ends_when_the_process_that_watches_it_is_killed(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)}
    driver = (
        "from megatron_ads.regress.sandbox import *\n"
        "run_program('import time; time.sleep(100)', ProgramLimits(seconds=100))"
    )
    with subprocess.Popen([sys.executable, "-c", driver], env=environment) as watcher:
        deadline = time.monotonic() + 60
        while not (running := psutil.Process(watcher.pid).children()):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        time.sleep(1)  # it has confined itself
        watcher.kill()
    gone, alive = psutil.wait_procs(running, timeout=10)
    assert (len(gone), alive) == (1, [])
    for left in tmp_path.iterdir():  # nobody was there to remove it
        left.rmdir()


# ---- where it cannot be had ----


def test_a_trial_finds_nothing_missing_here() -> None:
    require_sandbox()


def test_a_trial_that_goes_through_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    code = struct.pack("=HBBI", 0x06, 0, 0, 0x7FFF0000)  # allows every call: BPF_RET, SECCOMP_RET_ALLOW
    monkeypatch.setattr(sandbox, "build_filter", lambda _: code)
    with pytest.raises(ConfigError, match="in a trial, RuntimeError: a program did what is forbidden"):
        require_sandbox.__wrapped__()


@pytest.mark.parametrize(("name", "value"), [("machine", "riscv64"), ("system", "Darwin")])
def test_no_program_is_run_on_another_kind_of_machine(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setattr(sandbox.platform, name, lambda: value)
    with pytest.raises(ConfigError, match=rf"cannot confine generated programs \(it is .*{value}.*or leave out"):
        run("pass")


def test_no_program_is_run_where_the_kernel_refuses_the_filter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "build_filter", lambda _: b"")
    with pytest.raises(ConfigError, match=r"\(prctl\(PR_SET_SECCOMP\) failed: Invalid argument\)"):
        run("pass")


def test_no_program_is_run_where_the_kernel_has_no_landlock() -> None:
    # A filter of our own that takes landlock_create_ruleset (444) away, as an older kernel or container does.
    driver = """
import ctypes
from megatron_ads.regress import sandbox, sandbox_child as child
from megatron_ads.regress.sandbox_filter import _step
code = b"".join([_step(0x20, 0), _step(0x15, 444, 0, 1), _step(6, 0x50000 | 38), _step(6, 0x7FFF0000)])
child._LIBC.prctl(38, 1, 0, 0, 0)
assert child._LIBC.prctl(22, 2, ctypes.byref(child._Filter(4, code)), 0, 0) == 0
try:
    print(sandbox.run_program("pass"))
except sandbox.ConfigError as error:
    print(error)
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", driver], env=environment, capture_output=True, text=True, timeout=100)
    assert "(landlock_create_ruleset failed: Function not implemented)" in done.stdout, done
