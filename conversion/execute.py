"""Carry out a conversion plan: parallel workers, each file complete before it gets its name, journalled."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from conversion.atomic_file import FileRecord, PreallocatedFile
from conversion.encode import append_saved, write_quantized, write_values
from conversion.journal import open_journal
from conversion.plan import ConversionPlan, OutputFile, Quantized, Values, Verbatim, folder_state
from conversion.workers import Advance, run_all
from megatron_ads.disk import free_bytes
from megatron_ads.errors import ConversionError
from megatron_ads.progress import Progress


@dataclass(frozen=True, kw_only=True, slots=True)
class Execution:
    """How to carry out a plan."""

    workers: int = 1
    resume: bool = False
    progress: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class ConversionReport:
    """What a conversion did."""

    files: int
    files_kept: int
    """Finished by an earlier, interrupted run."""
    written_bytes: int
    seconds: float
    requantized: dict[str, float] = field(default_factory=dict)
    """With a reference: weights that were quantised anew, and the largest relative error of each."""


@dataclass(frozen=True, slots=True)
class _Written:
    record: FileRecord
    requantized: dict[str, float]


def execute(
    plan: ConversionPlan,
    *,
    prepare: Callable[[], None],
    finish: Callable[[tuple[FileRecord, ...]], None],
    how: Execution | None = None,
) -> ConversionReport:
    """Call ``prepare``, write every file of a plan, call ``finish``, which writes what makes the target complete.

    Raises:
        ConversionError: If the target cannot be used, the disk is too small, or the source turns out damaged.
        DataError: If another process is writing the target, or the journal of what is finished is damaged.
    """
    how = how or Execution()
    with open_journal(plan, resume=how.resume) as journal:
        todo = [file for file in plan.files if file.name not in journal.finished]
        kept = len(plan.files) - len(todo)
        check_free_space(plan.target, sum(file.nbytes for file in todo))
        prepare()
        requantized: dict[str, float] = {}
        total = sum(file.nbytes for file in todo)
        with Progress(total, description=f"writing {plan.target.name}", unit="B", shown=how.progress) as progress:
            write = partial(_write_output_file, plan.target)
            for written in run_all(write, todo, workers=how.workers, advance=progress.update):
                journal.add(written.record)
                requantized |= written.requantized
            check_source_unchanged(plan)
            finish(tuple(journal.finished[file.name] for file in plan.files))
            journal.close_for_good()
    return ConversionReport(
        files=len(plan.files),
        files_kept=kept,
        written_bytes=total,
        seconds=progress.seconds,
        requantized=requantized,
    )


def _write_output_file(folder: Path, file: OutputFile, advance: Advance) -> _Written:
    requantized: dict[str, float] = {}
    extents: list[tuple[int, int]] = []
    with PreallocatedFile(folder / file.name, file.nbytes) as out:
        position = out.write_at(0, file.header)
        for item in file.items:
            if isinstance(item, Values):
                write_values(out, item, advance)
            elif isinstance(item, Quantized):
                error = write_quantized(out, item, advance)
                if error is not None:
                    requantized[item.name] = error
            elif isinstance(item, Verbatim):
                out.write_at(item.offset, item.data)
            else:
                end = append_saved(out, item, position, advance)
                extents.append((position, end - position))
                position = end
        return _Written(out.commit(extents=tuple(extents)), requantized)


def check_source_unchanged(plan: ConversionPlan) -> None:
    """Refuse to complete what was read from files that changed meanwhile.

    Raises:
        ConversionError: If a source file's size or modification time is not what it was when the plan was made.
    """
    if folder_state(plan.source_files) != plan.source_state:
        raise ConversionError(
            f"The source {plan.source} was changed while it was converted. Delete {plan.target} and convert again."
        )


def check_free_space(target: Path, nbytes: int) -> None:
    """Refuse to begin what cannot fit.

    Raises:
        ConversionError: If the disk has less room than ``nbytes``.
    """
    free = free_bytes(target)
    if free < nbytes:
        raise ConversionError(
            f"Writing to {target} takes {nbytes / 1e9:.1f} GB, but its disk has {free / 1e9:.1f} GB free. "
            f"Free {(nbytes - free) / 1e9:.1f} GB, or choose another disk."
        )
