"""The filter decides, on both architectures, as its table says: read by a small interpreter of its steps."""

import re
import struct
from pathlib import Path

import pytest

from megatron_ads.regress.sandbox_filter import ALLOWED, AUDIT_ARCH, build_filter
from tests.regress.forbidden_calls import FORBIDDEN

ALLOW, KILL, EPERM, ENOSYS = 0x7FFF0000, 0x80000000, 0x00050001, 0x00050026
HEADERS = {
    "x86_64": Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h"),
    "aarch64": Path("/usr/include/asm-generic/unistd.h"),
}


def decide(architecture: str, number: int, *arguments: int, arch: int | None = None) -> int:
    """Run the filter on one call, as linux/filter.h defines its steps."""
    padded = (*arguments, *[0] * (6 - len(arguments)))
    data = struct.pack("<IIQ6Q", number, AUDIT_ARCH[architecture] if arch is None else arch, 0, *padded)
    steps = list(struct.iter_unpack("=HBBI", build_filter(architecture)))
    at = loaded = 0
    while True:
        code, if_true, if_false, value = steps[at]
        at += 1
        if code == 0x20:  # BPF_LD | BPF_W | BPF_ABS
            loaded = struct.unpack_from("<I", data, value)[0]
        elif code == 0x54:  # BPF_ALU | BPF_AND | BPF_K
            loaded &= value
        elif code in (0x15, 0x25):  # BPF_JMP | BPF_JEQ or BPF_JGT | BPF_K
            at += if_true if (loaded == value if code == 0x15 else loaded > value) else if_false
        else:
            assert code == 0x06  # BPF_RET | BPF_K
            return value


both = pytest.mark.parametrize("architecture", ["x86_64", "aarch64"])


@both
def test_calls_of_the_table_are_allowed_and_those_of_the_forbidden_list_are_not(architecture: str) -> None:
    conditional = {"clone", "fcntl", "ioctl", "open", "openat", "prlimit64"}
    decisions = {name: decide(architecture, number) for name, number in ALLOWED[architecture].items()}
    assert {name for name, decision in decisions.items() if decision != ALLOW} <= conditional
    assert len(decisions) > 90
    refused = {name: decide(architecture, number) for name, number in FORBIDDEN[architecture].items()}
    assert {name for name, decision in refused.items() if decision != EPERM} == {"clone3"}
    assert refused["clone3"] == ENOSYS


@both
def test_numbers_that_are_not_known_yet_or_of_another_architecture_are_refused(architecture: str) -> None:
    assert decide(architecture, 463) == decide(architecture, 0x40000000 + 1) == ENOSYS  # the second: x32's write
    assert decide(architecture, 0, arch=0x40000003) == KILL  # AUDIT_ARCH_I386


@both
def test_conditions_are_on_the_right_argument(architecture: str) -> None:
    call = ALLOWED[architecture]
    assert decide(architecture, call["clone"], 0x3D0F00) == ALLOW  # glibc's pthread_create
    assert decide(architecture, call["clone"], 0x7D0F00) == ALLOW  # musl's
    for flags in (17, 0x4111, 0x10000000, 0x3D0F00 | 0x20000000, 0x3D0F00 | 0x00020000):
        assert decide(architecture, call["clone"], flags) == EPERM
    assert [decide(architecture, call["fcntl"], 9, command) for command in (1, 8, 10, 15)] == [ALLOW] + [EPERM] * 3
    assert [decide(architecture, call["ioctl"], 9, command) for command in (0x5401, 0x8901, 0x5412)] == [
        ALLOW,
        EPERM,  # FIOSETOWN
        EPERM,  # TIOCSTI
    ]
    assert [decide(architecture, call["prlimit64"], pid) for pid in (0, 1)] == [ALLOW, EPERM]
    opened = [decide(architecture, call["openat"], 9, 9, flags) for flags in (0, 0o1000, 0o1003, 0o1001, 0o1102)]
    assert opened == [ALLOW, EPERM, EPERM, ALLOW, ALLOW]


@both
def test_the_numbers_are_those_of_this_machines_headers(architecture: str) -> None:
    if not (header := HEADERS[architecture]).exists():
        pytest.skip(f"{header} is not there; it comes with linux-libc-dev")
    numbers = dict(re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)", header.read_text()))
    numbers.setdefault("newfstatat", numbers.get("fstatat"))  # the generic header's name for it
    known = {name: int(numbers[name]) for name in ALLOWED[architecture] if numbers.get(name)}
    assert len(known) > 90
    assert known == {name: ALLOWED[architecture][name] for name in known}
