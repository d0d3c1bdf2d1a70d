"""Confine this process, then run one program in it; started by ``sandbox.py``, and imports nothing of this project.

Arguments: the descriptor to report to. Standard input: a JSON object, see ``sandbox.py``. Reports are JSON lines:
``["unconfined", reason]`` or ``["ready", ""]``, then a verdict and its detail. After ``ready`` any of them may be the
program's own invention, but for the token that comes with ``passed``.
"""

import ctypes
import errno
import json
import os
import pwd
import resource
import sys
import types
from contextlib import suppress
from typing import Any

_LIBC = ctypes.CDLL(None, use_errno=True)

# include/uapi/linux/prctl.h and seccomp.h
_PR_SET_PDEATHSIG, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 1, 22, 38
_SECCOMP_MODE_FILTER = 2
_CAPABILITY_VERSION_3 = 0x20080522
_SIGKILL = 9

# include/uapi/linux/landlock.h; the numbers of the calls are the same on all architectures.
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_RULE_PATH_BENEATH = 1
_WRITE_FILE, _READ_FILE, _READ_DIR, _REMOVE_FILE, _MAKE_FILE = 1 << 1, 1 << 2, 1 << 3, 1 << 5, 1 << 8
_TRUNCATE = 1 << 14
_FILE_RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15}  # how many rights over files each version knows
_ALL_FILE_RIGHTS = 16  # of version 5 and later
_TCP_VERSION, _BIND_AND_CONNECT_TCP = 4, 0b11
_SCOPE_VERSION, _ABSTRACT_SOCKETS_AND_SIGNALS = 6, 0b11


class _Ruleset(ctypes.Structure):
    _fields_ = (("files", ctypes.c_uint64), ("network", ctypes.c_uint64), ("scope", ctypes.c_uint64))


class _PathBeneath(ctypes.Structure):
    _pack_ = 1
    _fields_ = (("rights", ctypes.c_uint64), ("descriptor", ctypes.c_int32))


class _Filter(ctypes.Structure):
    _fields_ = (("steps", ctypes.c_ushort), ("code", ctypes.c_char_p))


def main(report: int) -> None:
    """Read a request from standard input, confine this process, run the program and report how it ended."""
    request = json.loads(sys.stdin.buffer.read())
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)  # the request, with its token, is out of reach
    os.close(nothing)
    write, leave, dumps = os.write, os._exit, json.dumps  # the program may replace those of the modules
    try:
        _confine(request)
    except OSError as error:
        write(report, dumps(["unconfined", error.strerror or str(error)]).encode() + b"\n")
        leave(1)
    write(report, b'["ready", ""]\n')
    verdict, detail = run(request.pop("source"), request.pop("token"))
    write(report, dumps([verdict, detail]).encode() + b"\n")
    leave(0)  # without its threads and exit handlers


def run(source: str, token: str) -> tuple[str, str]:
    """Run a program to its end. Returns ``passed`` and the token, or why it did not pass and its error, on one line.

    The module is not called ``__main__``: what a script does when it is started is no part of its tests.
    """
    sys.argv = ["program.py"]
    module = sys.modules["program"] = types.ModuleType("program")
    try:
        exec(compile(source, "program.py", "exec", dont_inherit=True), module.__dict__)
    except BaseException as error:  # noqa: BLE001  # it may raise whatever it likes
        return _verdict(error), _describe(error)
    return "passed", token


def _verdict(error: BaseException) -> str:
    if isinstance(error, MemoryError):
        return "out_of_memory"
    if isinstance(error, PermissionError):
        return "refused"
    if isinstance(error, OSError) and error.errno == errno.EFBIG:
        return "too_much_output"
    return "failed"


def _describe(error: BaseException) -> str:
    try:
        lines = f"{type(error).__name__}: {error}".strip().splitlines()
        return lines[-1][:300].removesuffix(": ").rstrip(": ")
    except BaseException:  # noqa: BLE001  # the text of an error is the program's, too
        return type(error).__name__


# ---- confinement ----


def _confine(request: dict[str, Any]) -> None:
    """Give up everything that the program is not to have. The order matters: each step needs what later ones take.

    Raises:
        OSError: If the kernel refuses a step; its text says which.
    """
    os.chdir(request["folder"])
    _check("prctl(PR_SET_NO_NEW_PRIVS)", _LIBC.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
    ruleset = _landlock_ruleset(request["readable"], request["writable"])
    if os.geteuid() == 0 and _become_nobody():
        _limit(resource.RLIMIT_NPROC, request["processes"])
    _drop_capabilities()
    _check("prctl(PR_SET_PDEATHSIG)", _LIBC.prctl(_PR_SET_PDEATHSIG, _SIGKILL, 0, 0, 0))  # a change of user clears it
    for name, value in request["limits"].items():
        _limit(getattr(resource, name), value)
    _check("landlock_restrict_self", _LIBC.syscall(_RESTRICT_SELF, ruleset, 0))
    os.close(ruleset)
    code = bytes.fromhex(request["filter"])
    program = _Filter(len(code) // 8, code)
    _check("prctl(PR_SET_SECCOMP)", _LIBC.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.byref(program), 0, 0))


def _check(call: str, result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{call} failed: {os.strerror(number)}")
    return result


def _limit(kind: int, value: int) -> None:
    """Set a limit, soft and hard, or keep a lower one."""
    spare = 1 if kind == resource.RLIMIT_CPU else 0  # the soft limit ends it by a signal of its own
    hard = resource.getrlimit(kind)[1]
    wanted = value + spare if hard == resource.RLIM_INFINITY else min(value + spare, hard)
    resource.setrlimit(kind, (min(value, wanted), wanted))


def _landlock_ruleset(readable: list[str], writable: list[str]) -> int:
    """Return a ruleset by which paths are read, and the working folder and some devices are written, and nothing else.

    In the working folder there are plain files only: a tree of folders could be made too deep to be removed.
    """
    version = _check("landlock_create_ruleset", _LIBC.syscall(_CREATE_RULESET, None, 0, 1))
    handled = (1 << _FILE_RIGHTS.get(version, _ALL_FILE_RIGHTS)) - 1
    rules = _Ruleset(
        handled,
        _BIND_AND_CONNECT_TCP if version >= _TCP_VERSION else 0,
        _ABSTRACT_SOCKETS_AND_SIGNALS if version >= _SCOPE_VERSION else 0,
    )
    # A kernel takes a longer structure than its own if the rest is zero.
    ruleset = _check(
        "landlock_create_ruleset", _LIBC.syscall(_CREATE_RULESET, ctypes.byref(rules), ctypes.sizeof(rules), 0)
    )
    for path in filter(os.path.exists, readable):
        _allow(ruleset, path, _READ_FILE | (_READ_DIR if os.path.isdir(path) else 0))
    for path in filter(os.path.exists, writable):
        _allow(ruleset, path, _READ_FILE | _WRITE_FILE)
    _allow(ruleset, ".", handled & (_READ_FILE | _READ_DIR | _WRITE_FILE | _REMOVE_FILE | _MAKE_FILE | _TRUNCATE))
    return ruleset


def _allow(ruleset: int, path: str, rights: int) -> None:
    descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    rule = _PathBeneath(rights, descriptor)
    _check("landlock_add_rule", _LIBC.syscall(_ADD_RULE, ruleset, _RULE_PATH_BENEATH, ctypes.byref(rule), 0))
    os.close(descriptor)


def _become_nobody() -> bool:
    """Change from root to the user ``nobody``; return whether that was possible, as it is not in every container."""
    try:
        entry = pwd.getpwnam("nobody")
        user, group = entry.pw_uid, entry.pw_gid
    except KeyError:
        user = group = 65534
    library = os.path.dirname(os.__file__)
    descriptor = os.open(library, os.O_PATH)
    try:
        os.setgroups([])
        os.setresgid(group, group, group)
        os.chown(".", user, group)
        os.setresuid(user, user, user)
    except OSError:
        with suppress(OSError):
            os.chown(".", 0, 0)
        os.close(descriptor)
        return False
    _find_library_at(descriptor, library)
    return True


def _find_library_at(descriptor: int, library: str) -> None:
    """Import by an open folder from now on: an interpreter below ``/root`` is out of reach of another user by name."""

    def moved(path: str) -> str:
        inside = path == library or path.startswith(library + os.sep)
        return f"/proc/self/fd/{descriptor}{path[len(library) :]}" if inside else path

    sys.path[:] = map(moved, sys.path)
    for module in list(sys.modules.values()):
        if isinstance(paths := getattr(module, "__path__", None), list):
            paths[:] = map(moved, paths)


def _drop_capabilities() -> None:
    """Give up what root has beyond its name, where the user was not changed."""
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
    _check("capset", _LIBC.capset(header, (ctypes.c_uint32 * 6)()))


if __name__ == "__main__":
    main(int(sys.argv[1]))
