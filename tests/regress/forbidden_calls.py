"""Numbers of system calls that no generated program may make, from Linux' own headers."""

import platform

_TABLE = """
    fork 57 -, vfork 58 -, execve 59 221, execveat 322 281, ptrace 101 117, mount 165 40, umount2 166 39,
    chroot 161 51, pivot_root 155 41, setns 308 268, unshare 272 97, kill 62 129, tkill 200 130, tgkill 234 131,
    rt_sigqueueinfo 129 138, pidfd_open 434 434, pidfd_send_signal 424 424, pidfd_getfd 438 438, keyctl 250 219,
    add_key 248 217, bpf 321 280, perf_event_open 298 241, io_uring_setup 425 425, process_vm_readv 310 270,
    process_vm_writev 311 271, prctl 157 167, seccomp 317 277, memfd_create 319 279, shmget 29 194, msgget 68 186,
    semget 64 190, mq_open 240 180, setuid 105 146, setgid 106 144, setresuid 117 147, setpriority 141 140,
    sched_setaffinity 203 122, open_by_handle_at 304 265, userfaultfd 323 282, fchmodat 268 53, fchownat 260 54,
    utimensat 280 88, setxattr 188 5, mkdirat 258 34, symlinkat 266 36, linkat 265 37, mknodat 259 33, truncate 76 45,
    socket 41 198, socketpair 53 199, connect 42 203, bind 49 200, clone3 435 435, openat2 437 437, chmod 90 -,
    mkdir 83 -, symlink 88 -, link 86 -"""

FORBIDDEN = {
    architecture: {
        name: int(number) for name, *numbers in map(str.split, _TABLE.split(",")) if (number := numbers[column]) != "-"
    }
    for column, architecture in enumerate(("x86_64", "aarch64"))
}
"""By architecture and name: x86_64's asm/unistd_64.h, and asm-generic/unistd.h."""


def number_here(name: str) -> int:
    """Return a call's number on this machine."""
    return FORBIDDEN[platform.machine()][name]
