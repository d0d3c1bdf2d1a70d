"""Interrupted conversions continue where they were; every target that must not be overwritten is refused."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from conversion import atomic_file, journal, to_torch_dist
from conversion.convert import Execution, convert, to_hf, to_shards
from conversion.errors import DamagedCheckpointError
from conversion.journal import JOURNAL
from conversion.sources import open_source
from conversion.to_hf import ExportDtype, HfTarget
from conversion.to_reference import reference_target
from conversion.to_torch_dist import TorchDistTarget
from conversion.verify import verify
from megatron_ads.config.model import LayoutConfig
from megatron_ads.errors import ConversionError, DataError
from parity_tests.harness.hf_checkpoints import EDGE, bf16_checkpoint, fp8_checkpoint, random_tensors, to_fp8, write_hf

LAYOUT = LayoutConfig(pp=4, ep=2)
RESUME = Execution(resume=True)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bf16_checkpoint(tmp_path_factory.mktemp("source") / "hf", files=3)


class Interrupted(BaseException):
    """Stands for a kill: nothing in the product may catch it."""


@pytest.fixture
def interrupt_after(monkeypatch):
    """Make the n-th file's commit fail as if the process had been killed there."""

    def arm(count: int) -> None:
        commit = atomic_file.PreallocatedFile.commit
        seen = []

        def commit_or_die(self, **extents):
            if self.path.suffix in (".safetensors", ".distcp"):
                if len(seen) == count:
                    raise Interrupted
                seen.append(self.path.name)
            return commit(self, **extents)

        monkeypatch.setattr(atomic_file.PreallocatedFile, "commit", commit_or_die)

    yield arm


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize("finished", [0, 1, 5, 7])
def test_an_interrupted_conversion_resumes_without_writing_finished_files_again(
    source, tmp_path, interrupt_after, monkeypatch, finished
):
    to_shards(source, tmp_path / "undisturbed", LAYOUT)
    interrupt_after(finished)
    with pytest.raises(Interrupted):
        to_shards(source, tmp_path / "shards", LAYOUT)
    assert not (tmp_path / "shards" / "manifest.json").exists()
    before = {file.name: file.stat().st_mtime_ns for file in tmp_path.glob("shards/*.safetensors")}
    assert len(before) == finished
    monkeypatch.undo()
    report = to_shards(source, tmp_path / "shards", LAYOUT, RESUME)
    assert report.files_kept == finished
    assert {name: (tmp_path / "shards" / name).stat().st_mtime_ns for name in before} == before
    assert contents(tmp_path / "shards") == contents(tmp_path / "undisturbed")


def test_an_interrupted_export_resumes(source, tmp_path, interrupt_after, monkeypatch):
    export = partial(to_hf, source, max_shard_bytes=10_000)
    export(tmp_path / "undisturbed")
    interrupt_after(2)
    with pytest.raises(Interrupted):
        export(tmp_path / "hf")
    assert not (tmp_path / "hf" / "model.safetensors.index.json").exists()
    monkeypatch.undo()
    assert export(tmp_path / "hf", how=RESUME).files_kept == 2
    assert contents(tmp_path / "hf") == contents(tmp_path / "undisturbed")


def test_an_interrupted_torch_dist_resumes(source, tmp_path, interrupt_after, monkeypatch):
    monkeypatch.setattr(to_torch_dist, "_FILE_BYTES", 200_000)
    opened = open_source(source)
    convert(TorchDistTarget(opened, tmp_path / "undisturbed"))
    interrupt_after(2)
    with pytest.raises(Interrupted):
        convert(TorchDistTarget(opened, tmp_path / "dist"))
    assert not (tmp_path / "dist" / ".metadata").exists()
    monkeypatch.undo()
    monkeypatch.setattr(to_torch_dist, "_FILE_BYTES", 200_000)
    assert convert(TorchDistTarget(opened, tmp_path / "dist"), RESUME).files_kept == 2
    data, expected = (contents(tmp_path / folder) for folder in ("dist", "undisturbed"))
    assert data.keys() == expected.keys()
    assert {name for name in data if data[name] != expected[name]} <= {"common.pt"}  # holds a serialisation id
    assert verify(source, tmp_path / "dist").equal


def test_a_single_file_export_is_not_whole_before_its_weights_are(source, tmp_path, interrupt_after, monkeypatch):
    interrupt_after(0)
    with pytest.raises(Interrupted):
        to_hf(source, tmp_path / "hf")
    assert {file.name for file in (tmp_path / "hf").iterdir()} >= {"config.json", "tokenizer.json"}
    assert not (tmp_path / "hf" / "model.safetensors").exists()
    with pytest.raises(ConversionError, match="has not finished"):
        open_source(tmp_path / "hf")
    monkeypatch.undo()
    to_hf(source, tmp_path / "hf", how=RESUME)
    assert verify(source, tmp_path / "hf").equal


@pytest.fixture
def unfinished(source, tmp_path, interrupt_after, monkeypatch) -> Path:
    """A folder with three of eight files done."""
    interrupt_after(3)
    with pytest.raises(Interrupted):
        to_shards(source, tmp_path / "shards", LAYOUT)
    monkeypatch.undo()
    return tmp_path / "shards"


def test_a_file_that_got_its_name_but_no_journal_line_is_kept(source, unfinished):
    journal = unfinished / JOURNAL
    journal.write_text("".join(journal.read_text().splitlines(keepends=True)[:-1]))
    assert to_shards(source, unfinished, LAYOUT, RESUME).files_kept == 3


def test_a_torn_last_journal_line_is_forgiven(source, unfinished):
    with (unfinished / JOURNAL).open("a") as journal:
        journal.write('{"name": "pp0')
    assert to_shards(source, unfinished, LAYOUT, RESUME).files_kept == 3


@pytest.mark.parametrize(
    ("whole", "damaged"), [("{", "["), ('"mtime_ns"', '"time"'), ('"extents": []', '"extents": 1')]
)
def test_a_journal_line_that_somebody_damaged_is_named(source, unfinished, whole, damaged):
    lines = (unfinished / JOURNAL).read_text().splitlines(keepends=True)
    lines[2] = lines[2].replace(whole, damaged)
    (unfinished / JOURNAL).write_text("".join(lines))
    with pytest.raises(DataError, match=r"line (3|of pp\d.*safetensors) is not a record of this journal"):
        to_shards(source, unfinished, LAYOUT, RESUME)
    (unfinished / JOURNAL).write_text("".join([*lines[:2], *lines[3:]]))
    assert to_shards(source, unfinished, LAYOUT, RESUME).files_kept == 3


def test_files_are_not_kept_where_the_journal_no_longer_tells_of_what(source, unfinished):
    lines = (unfinished / JOURNAL).read_text().splitlines(keepends=True)
    (unfinished / JOURNAL).write_text("".join(lines[1:]))
    assert to_shards(source, unfinished, LAYOUT, RESUME).files_kept == 0


def test_a_resume_that_is_killed_at_once_forgets_nothing(source, unfinished, monkeypatch):
    lines = (unfinished / JOURNAL).read_text()

    def die(self):
        raise Interrupted

    monkeypatch.setattr(journal.ConversionJournal, "recover", die)
    with pytest.raises(Interrupted):
        to_shards(source, unfinished, LAYOUT, RESUME)
    assert (unfinished / JOURNAL).read_text() == lines


def test_a_finished_file_that_was_changed_since_is_written_again(source, unfinished, tmp_path):
    file = next(iter(sorted(unfinished.glob("*.safetensors"))))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert to_shards(source, unfinished, LAYOUT, RESUME).files_kept == 2
    to_shards(source, tmp_path / "undisturbed", LAYOUT)
    assert contents(unfinished) == contents(tmp_path / "undisturbed")


def test_a_touched_but_unchanged_file_is_kept(source, unfinished):
    os.utime(next(iter(unfinished.glob("*.safetensors"))))
    assert to_shards(source, unfinished, LAYOUT, RESUME).files_kept == 3


def test_an_unfinished_target_is_not_resumed_unasked(source, unfinished):
    with pytest.raises(ConversionError, match=r"unfinished conversion\. Continue with --resume"):
        to_shards(source, unfinished, LAYOUT)


def test_resuming_with_another_layout_is_refused(source, unfinished):
    with pytest.raises(ConversionError, match="other settings"):
        to_shards(source, unfinished, LayoutConfig(pp=4, ep=2, tp=2), RESUME)


def test_a_source_that_changed_since_is_refused(tmp_path, interrupt_after, monkeypatch):
    source = bf16_checkpoint(tmp_path / "hf")
    interrupt_after(2)
    with pytest.raises(Interrupted):
        to_shards(source, tmp_path / "shards", LAYOUT)
    monkeypatch.undo()
    os.utime(source / "model.safetensors")
    with pytest.raises(ConversionError, match="has changed since the conversion"):
        to_shards(source, tmp_path / "shards", LAYOUT, RESUME)


def test_a_source_that_changes_meanwhile_is_noticed_before_the_target_is_complete(tmp_path, monkeypatch):
    source = bf16_checkpoint(tmp_path / "hf")
    commit = atomic_file.PreallocatedFile.commit

    def commit_and_touch(self, **extents):
        os.utime(source / "model.safetensors")
        return commit(self, **extents)

    monkeypatch.setattr(atomic_file.PreallocatedFile, "commit", commit_and_touch)
    with pytest.raises(ConversionError, match="was changed while it was converted"):
        to_shards(source, tmp_path / "shards", LAYOUT)
    assert not (tmp_path / "shards" / "manifest.json").exists()


@pytest.mark.parametrize("how", [Execution(), RESUME], ids=["new", "resumed"])
def test_foreign_files_are_never_written_over(source, tmp_path, how):
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "thesis.tex").write_text("years of work")
    with pytest.raises(ConversionError, match=r"unrelated files, such as thesis\.tex"):
        to_shards(source, tmp_path / "shards", LAYOUT, how)
    assert contents(tmp_path / "shards") == {"thesis.tex": b"years of work"}


@pytest.mark.parametrize("how", [Execution(), RESUME], ids=["new", "resumed"])
def test_a_complete_target_is_never_written_over(source, tmp_path, how):
    to_shards(source, tmp_path / "shards", LAYOUT)
    before = contents(tmp_path / "shards")
    with pytest.raises(ConversionError, match="already holds a complete checkpoint"):
        to_shards(source, tmp_path / "shards", LAYOUT, how)
    assert contents(tmp_path / "shards") == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_may_not_be_written_is_one_clear_error(source, tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(ConversionError, match="cannot be read or written"):
        to_shards(source, tmp_path / "shards", LAYOUT)


@pytest.mark.parametrize("how", [RESUME, None], ids=["resume", "anew"])
def test_two_conversions_into_one_folder_exclude_each_other(source, unfinished, how):
    with (unfinished / JOURNAL).open("a") as journal:
        fcntl.flock(journal, fcntl.LOCK_EX)
        with pytest.raises(DataError, match="another process is writing"):
            to_shards(source, unfinished, LAYOUT, how)


def test_a_target_inside_what_is_read_or_behind_a_dead_link_is_refused(source, tmp_path):
    reference = bf16_checkpoint(tmp_path / "reference", files=3)
    with pytest.raises(ConversionError, match="is inside the reference"):
        convert(reference_target(open_source(source), reference / "new/out", reference, ExportDtype.STORED))
    assert not (reference / "new").exists()
    with pytest.raises(ConversionError, match="is inside the source"):
        to_hf(reference, reference / "out")
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    with pytest.raises(ConversionError, match="is a link that leads nowhere"):
        to_hf(source, tmp_path / "link")


def test_side_files_count_where_the_disk_is_small(source, tmp_path, monkeypatch):
    weights = sum(
        file.nbytes for file in HfTarget(open_source(source), tmp_path / "hf", ExportDtype.STORED).plan().files
    )
    monkeypatch.setattr("conversion.convert.free_bytes", lambda _: weights)
    with pytest.raises(ConversionError, match="GB free"):
        to_hf(source, tmp_path / "hf")


def test_too_little_disk_is_noticed_before_writing(source, tmp_path, monkeypatch):
    monkeypatch.setattr("conversion.convert.free_bytes", lambda _: 1000)
    with pytest.raises(ConversionError, match=r"disk has 0\.0 GB free"):
        to_shards(source, tmp_path / "shards", LAYOUT)
    assert not list(tmp_path.glob("shards/*.safetensors"))


def test_a_disk_that_fills_up_is_one_clear_error_and_can_be_resumed(source, tmp_path, monkeypatch):
    calls = []

    def fallocate(descriptor, offset, length):
        calls.append(length)
        if len(calls) > 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", fallocate)
    with pytest.raises(ConversionError, match=r"disk is full at .* again, a conversion with --resume"):
        to_shards(source, tmp_path / "shards", LAYOUT)
    assert not list(tmp_path.glob("shards/*.partial"))
    monkeypatch.undo()
    to_shards(source, tmp_path / "shards", LAYOUT, RESUME)


def test_nan_codes_stop_the_conversion_and_leave_nothing_that_looks_whole(tmp_path):
    tensors = to_fp8(random_tensors(EDGE, torch.bfloat16))
    tensors["model.layers.3.mlp.experts.5.down_proj.weight"].view(torch.uint8)[1, 1] = 0xFF
    source = write_hf(tmp_path / "hf", EDGE, tensors)
    with pytest.raises(DamagedCheckpointError, match=r"experts\.5\.down_proj\.weight .* NaN codes"):
        to_shards(source, tmp_path / "shards", LAYOUT)
    assert not (tmp_path / "shards" / "manifest.json").exists()
    assert not list(tmp_path.glob("shards/*.partial"))


_KILLED = """
import sys
from pathlib import Path
from conversion.convert import Execution, to_shards
from megatron_ads.config.model import LayoutConfig
if __name__ == "__main__":
    workers = int(sys.argv[3])
    to_shards(Path(sys.argv[1]), Path(sys.argv[2]), LayoutConfig(pp=4, ep=2), Execution(workers=workers, resume=True))
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that takes long enough to be killed at, in "hf", and what it becomes, in "shards"."""
    folder = tmp_path_factory.mktemp("large")
    to_shards(fp8_checkpoint(folder / "hf", EDGE | {"n_routed_experts": 64}), folder / "shards", LAYOUT)
    return folder


@pytest.mark.parametrize("workers", [1, 2])
def test_kill_9_then_resume_gives_the_undisturbed_result(large, tmp_path, workers):
    source = large / "hf"
    script = tmp_path / "convert.py"
    script.write_text(_KILLED)
    target = tmp_path / "shards"
    command = [sys.executable, str(script), str(source), str(target), str(workers)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment)
    deadline = time.monotonic() + 200
    while len(list(target.glob("*.safetensors"))) < 2 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = {file.name: file.stat().st_mtime_ns for file in target.glob("*.safetensors")}
    if (target / JOURNAL).exists() or not target.exists():
        to_shards(source, target, LAYOUT, RESUME)
    assert {name: (target / name).stat().st_mtime_ns for name in done} == done
    assert contents(target) == contents(large / "shards")
