"""Large files: whichever way past or through the page cache, the bytes, the hash and the name are right."""

import errno
import fcntl
import hashlib
import os
import random
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from conversion import atomic_file, direct_writer
from conversion.atomic_file import PreallocatedFile
from conversion.direct_writer import DirectWriter
from megatron_ads.errors import DiskFullError

BLOCK = 1 << 16
"""Instead of 8 MB, so that small files have many."""
NBYTES = 11 * BLOCK + 12345


@pytest.fixture(params=["past the page cache", "through it"], autouse=True)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    monkeypatch.setattr(direct_writer, "BLOCK_BYTES", BLOCK)
    if request.param == "past the page cache":
        monkeypatch.setattr(atomic_file, "_DIRECT_FROM_BYTES", 1)
        (tmp_path / "probe").touch()
        writer = DirectWriter.open(tmp_path / "probe")
        if writer is None:
            pytest.skip(f"{tmp_path} is on a file system without O_DIRECT; set TMPDIR to a disk")
        writer.close()
    return str(request.param)


def pieces(data: bytes, sizes: tuple[int, ...]) -> list[tuple[int, bytes]]:
    cut, position = [], 0
    while position < len(data):
        size = sizes[len(cut) % len(sizes)]
        cut.append((position, data[position : position + size]))
        position += size
    return cut


def write(path: Path, parts: list[tuple[int, bytes]], nbytes: int = NBYTES) -> str:
    with PreallocatedFile(path, nbytes) as file:
        for offset, data in parts:
            assert file.write_at(offset, data) == offset + len(data)
        return file.commit().sha256


DATA = random.Random(0).randbytes(NBYTES)


@pytest.mark.parametrize("sizes", [(NBYTES,), (BLOCK,), (1, 4095, 3 * BLOCK, 77)], ids=["whole", "blocks", "odd"])
def test_front_to_back(tmp_path: Path, sizes: tuple[int, ...]) -> None:
    assert write(tmp_path / "file", pieces(DATA, sizes)) == hashlib.sha256(DATA).hexdigest()
    assert (tmp_path / "file").read_bytes() == DATA


@pytest.mark.parametrize("seed", range(3))
def test_in_any_order(tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(atomic_file, "_EARLY_BYTES", 2 * BLOCK)  # so that some pieces can wait and some cannot
    parts = pieces(DATA, (BLOCK // 3, 100, 2 * BLOCK))
    random.Random(seed).shuffle(parts)
    assert write(tmp_path / "file", parts) == hashlib.sha256(DATA).hexdigest()
    assert (tmp_path / "file").read_bytes() == DATA


def test_small_pieces_that_come_early_wait_for_their_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    end = NBYTES - 50
    parts = [*((end + 5 * number, DATA[end + 5 * number : end + 5 * number + 5]) for number in range(10))]
    monkeypatch.setattr(PreallocatedFile, "_leave_direct", _only_at_the_end(PreallocatedFile._leave_direct))
    assert write(tmp_path / "file", [*parts, *pieces(DATA[:end], (BLOCK,))]) == hashlib.sha256(DATA).hexdigest()
    assert (tmp_path / "file").read_bytes() == DATA


def _only_at_the_end(leave: object) -> object:
    def checked(file: PreallocatedFile) -> None:
        assert file._hashed == NBYTES, "the way past the page cache was left before the end"
        leave(file)  # type: ignore[operator]

    return checked


def held() -> tuple[int, int]:
    """Return how many descriptors and threads this process has."""
    return len(os.listdir("/proc/self/fd")), threading.active_count()


def test_what_is_not_committed_leaves_nothing(tmp_path: Path) -> None:
    before = held()
    with pytest.raises(RuntimeError), PreallocatedFile(tmp_path / "file", NBYTES) as file:
        file.write_at(0, DATA)
        raise RuntimeError
    assert list(tmp_path.glob("file*")) == []
    assert held() == before


def test_a_name_that_cannot_be_given_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").mkdir()
    before = held()
    with pytest.raises(IsADirectoryError):
        write(tmp_path / "file", pieces(DATA, (BLOCK,)))
    assert list(tmp_path.glob("file?*")) == []
    assert held() == before


def test_an_error_of_the_disk_reaches_the_caller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    before = held()
    with pytest.raises(DiskFullError, match="full"):
        write(tmp_path / "file", pieces(DATA, (BLOCK,)))
    assert list(tmp_path.glob("file*")) == []
    assert held() == before


def _never_direct() -> Callable[..., int]:
    """Return a ``pwrite`` of a file system that opens with ``O_DIRECT`` and does not write so."""
    pwrite = os.pwrite

    def refusing(descriptor: int, view: memoryview, offset: int) -> int:
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return pwrite(descriptor, view, offset)

    return refusing


def _once_short() -> Callable[..., int]:
    """Return a ``pwrite`` whose first write ends short of a block; the kernel itself refuses to go on from there."""
    pwrite, writes = os.pwrite, []

    def short(descriptor: int, view: memoryview, offset: int) -> int:
        writes.append(offset)
        if len(writes) > 1:
            return pwrite(descriptor, view, offset)
        cached = os.open(f"/proc/self/fd/{descriptor}", os.O_WRONLY)
        try:
            return pwrite(cached, view[:1000], offset)
        finally:
            os.close(cached)

    return short


@pytest.mark.parametrize("pwrite", [_never_direct, _once_short], ids=["never", "once"])
def test_a_write_that_is_refused_past_the_cache_goes_through_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pwrite: Callable[[], Callable[..., int]]
) -> None:
    monkeypatch.setattr(os, "pwrite", pwrite())
    assert write(tmp_path / "file", pieces(DATA, (BLOCK // 2,))) == hashlib.sha256(DATA).hexdigest()
    assert (tmp_path / "file").read_bytes() == DATA


def test_a_file_system_without_direct_access_is_written_through_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain_open = os.open

    def refusing(path: Path, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return plain_open(path, flags, mode)

    monkeypatch.setattr(os, "open", refusing)
    assert write(tmp_path / "file", pieces(DATA, (BLOCK,))) == hashlib.sha256(DATA).hexdigest()
    assert (tmp_path / "file").read_bytes() == DATA
