"""The system calls that a generated program may make, as a seccomp filter.

A list of what is allowed, so that a call which is not thought of here, or is new in a kernel, is not allowed. There is
no socket, no new process (``clone`` only for threads), no ``execve``, no signal to anyone, no ``ptrace``, no change of
owners, permissions or times (Landlock does not cover those), no shared memory, no keyring, no ``prctl``.

What is not allowed fails with EPERM, so that a program sees ``PermissionError``. ``clone3``, whose flags a filter
cannot read, and calls newer than the table fail with ENOSYS: the C library then takes an older call. A foreign
architecture (32-bit calls on x86_64) ends the program.

Source: Linux, Documentation/userspace-api/seccomp_filter.rst and landlock.rst.
"""

import errno
import struct
from dataclasses import dataclass

AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
"""include/uapi/linux/audit.h"""

# "name x86_64 aarch64", a dash where an architecture has none. Sources: arch/x86/entry/syscalls/syscall_64.tbl and
# include/uapi/asm-generic/unistd.h.
_MEMORY = "mmap 9 222, mprotect 10 226, munmap 11 215, brk 12 214, mremap 25 216, mincore 27 232, madvise 28 233"
_FILES = """
    read 0 63, write 1 64, open 2 -, close 3 57, stat 4 -, fstat 5 80, lstat 6 -, lseek 8 62, ioctl 16 29,
    pread64 17 67, pwrite64 18 68, readv 19 65, writev 20 66, access 21 -, dup 32 23, dup2 33 -, sendfile 40 71,
    fcntl 72 25, flock 73 32, fsync 74 82, fdatasync 75 83, ftruncate 77 46, getcwd 79 17, chdir 80 49, fchdir 81 50,
    rename 82 -, unlink 87 -, readlink 89 -, umask 95 166, getdents64 217 61, fadvise64 221 223, openat 257 56,
    newfstatat 262 79, unlinkat 263 35, renameat 264 38, readlinkat 267 78, faccessat 269 48, fallocate 285 47,
    dup3 292 24, preadv 295 69, pwritev 296 70, renameat2 316 276, copy_file_range 326 285, statx 332 291,
    close_range 436 436, faccessat2 439 439"""
_WAITING = """
    poll 7 -, pipe 22 -, select 23 -, pause 34 -, nanosleep 35 101, getitimer 36 102, alarm 37 -, setitimer 38 103,
    clock_nanosleep 230 115, epoll_wait 232 -, epoll_ctl 233 21, pselect6 270 72, ppoll 271 73, epoll_pwait 281 22,
    eventfd2 290 19, epoll_create1 291 20, pipe2 293 59, epoll_pwait2 441 441, wait4 61 260, waitid 247 95"""
_THREADS = """
    clone 56 220, exit 60 93, exit_group 231 94, futex 202 98, sched_yield 24 124, sched_getaffinity 204 123,
    set_tid_address 218 96, set_robust_list 273 99, rseq 334 293, membarrier 324 283,
    getcpu 309 168, arch_prctl 158 -"""
_OWN_SIGNALS = """
    rt_sigaction 13 134, rt_sigprocmask 14 135, rt_sigreturn 15 139, rt_sigpending 127 136, rt_sigtimedwait 128 137,
    rt_sigsuspend 130 133, sigaltstack 131 132, restart_syscall 219 128"""
_QUESTIONS = """
    getpid 39 172, uname 63 160, gettimeofday 96 169, getrlimit 97 163, getrusage 98 165, sysinfo 99 179, times 100 153,
    getuid 102 174, getgid 104 176, geteuid 107 175, getegid 108 177, getppid 110 173, getpgrp 111 -, getgroups 115 158,
    getresuid 118 148, getresgid 120 150, getpgid 121 155, getsid 124 156, gettid 186 178, time 201 -,
    clock_gettime 228 113, clock_getres 229 114, prlimit64 302 261, getrandom 318 278"""
_NO_SUCH_CALL = {"clone3": 435}
_LAST_KNOWN = 462  # mseal, of Linux 6.10; the same on both


def _rows() -> list[tuple[str, str, str]]:
    groups = (_MEMORY, _FILES, _WAITING, _THREADS, _OWN_SIGNALS, _QUESTIONS)
    rows = (entry.split() for group in groups for entry in group.split(","))
    return [(name, x86_64, aarch64) for name, x86_64, aarch64 in rows]


ALLOWED = {
    "x86_64": {name: int(number) for name, number, _ in _rows()},
    "aarch64": {name: int(number) for name, _, number in _rows() if number != "-"},
}
"""Numbers of the allowed calls, by architecture and name."""


@dataclass(frozen=True, slots=True)
class _Argument:
    """A condition on one argument: after the mask, it is one of these values (or, inverted, none of them)."""

    index: int
    values: tuple[int, ...]
    mask: int = 0xFFFFFFFF
    inverted: bool = False


_CLONE_THREAD = 0x00010000
_NAMESPACES = 0x7E020000  # CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET
_O_ACCMODE, _O_TRUNC = 0o3, 0o1000
# Before its version 3, Landlock lets a file that may only be read be cut to nothing while it is opened. The access mode
# 3 asks for no right at all.
_CUTS_UNWRITTEN = (_O_TRUNC, _O_TRUNC | _O_ACCMODE)
_CONDITIONS = {
    "clone": _Argument(0, (_CLONE_THREAD,), mask=_CLONE_THREAD | _NAMESPACES),
    # Duplicates, flags and locks; not F_SETOWN and F_SETSIG, which send any signal to any process of the same user.
    "fcntl": _Argument(1, (0, 1, 2, 3, 4, 5, 6, 7, 1030)),
    # TCGETS (isatty), TIOCGWINSZ, FIONREAD, FIONBIO, FIONCLEX, FIOCLEX; not FIOSETOWN, and no device's own.
    "ioctl": _Argument(1, (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)),
    "open": _Argument(1, _CUTS_UNWRITTEN, mask=_O_ACCMODE | _O_TRUNC, inverted=True),
    "openat": _Argument(2, _CUTS_UNWRITTEN, mask=_O_ACCMODE | _O_TRUNC, inverted=True),
    "prlimit64": _Argument(0, (0,)),  # its own limits, of no other process
}

# include/uapi/linux/bpf_common.h: class, size or operation, and source, added up.
_LOAD, _AND, _IF_EQUAL, _IF_ABOVE, _RETURN = 0x20, 0x54, 0x15, 0x25, 0x06
# include/uapi/linux/seccomp.h: return values, and offsets in struct seccomp_data.
_ALLOW, _KILL, _ERROR = 0x7FFF0000, 0x80000000, 0x00050000
_NUMBER, _ARCHITECTURE, _ARGUMENTS = 0, 4, 16


def build_filter(architecture: str) -> bytes:
    """Return the filter as an array of ``struct sock_filter``; the architecture is one of ``AUDIT_ARCH``."""
    code = [
        _step(_LOAD, _ARCHITECTURE),
        _step(_IF_EQUAL, AUDIT_ARCH[architecture], 1, 0),
        _step(_RETURN, _KILL),
        _step(_LOAD, _NUMBER),
    ]
    for name, number in ALLOWED[architecture].items():
        body = _check(_CONDITIONS[name]) if name in _CONDITIONS else [_step(_RETURN, _ALLOW)]
        code += [_step(_IF_EQUAL, number, 0, len(body)), *body]
    for number in _NO_SUCH_CALL.values():
        code += [_step(_IF_EQUAL, number, 0, 1), _step(_RETURN, _ERROR | errno.ENOSYS)]
    code += [_step(_IF_ABOVE, _LAST_KNOWN, 0, 1), _step(_RETURN, _ERROR | errno.ENOSYS)]  # the x32 calls, too
    return b"".join([*code, _step(_RETURN, _ERROR | errno.EPERM)])


def _check(argument: _Argument) -> list[bytes]:
    """Return the steps that end in a verdict by an argument's lower half; the kernel ignores the upper one of these."""
    found, otherwise = _ALLOW, _ERROR | errno.EPERM
    if argument.inverted:
        found, otherwise = otherwise, found
    steps = [_step(_LOAD, _ARGUMENTS + 8 * argument.index), _step(_AND, argument.mask)]
    for value in argument.values:
        steps += [_step(_IF_EQUAL, value, 0, 1), _step(_RETURN, found)]
    return [*steps, _step(_RETURN, otherwise)]


def _step(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("=HBBI", code, if_true, if_false, value)
