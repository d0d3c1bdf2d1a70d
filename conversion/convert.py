"""Whole conversions, from checkpoint to checkpoint: plan, check, carry out in parallel workers, finish."""

from dataclasses import dataclass, field, replace
from functools import partial
from itertools import combinations
from pathlib import Path

from conversion.atomic_file import FileRecord, PreallocatedFile
from conversion.encode import append_saved, write_quantized, write_values
from conversion.errors import naming_refusals
from conversion.grow_vocabulary import GrownTarget
from conversion.journal import open_journal
from conversion.new_rows import copy_bytes, write_new_rows
from conversion.paths import inside
from conversion.plan import ConversionPlan, Copied, NewRows, OutputFile, Quantized, Values, Verbatim, folder_state
from conversion.rank_files import ShardsLayout
from conversion.regions import Rectangle, whole
from conversion.sources import WeightSource, open_source
from conversion.to_hf import DEFAULT_SHARD_BYTES, ExportDtype, HfTarget
from conversion.to_reference import ReferenceTarget
from conversion.to_shards import ShardsTarget
from conversion.to_torch_dist import TorchDistTarget
from conversion.verify import check_aliases
from conversion.workers import Advance, run_all
from megatron_ads.architecture import ModelShape
from megatron_ads.config.model import LayoutConfig
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
    """With a reference: weights that were quantised again, and the largest relative error of each."""
    left_behind: tuple[str, ...] = ()
    """Files that seem to belong to the checkpoint and could not be carried, each with the reason."""


Target = HfTarget | ReferenceTarget | ShardsTarget | TorchDistTarget | GrownTarget
"""A format that a checkpoint can be written in: planned from headers alone, then prepared and, last, finished."""


def convert(target: Target, how: Execution | None = None) -> ConversionReport:
    """Carry out one conversion.

    Raises:
        ConversionError: If the source is damaged, the target cannot be used, or its disk is too small.
        DataError: If another process is writing the target, or the journal of what is finished is damaged.
    """
    with naming_refusals(target.source.path):
        plan = target.plan()
        if not isinstance(target, GrownTarget):  # which copies bytes, whatever parameters they are of
            check_coverage(plan, target.source)
        check_aliases(target.source)
    with naming_refusals(plan.target):
        return _execute(target, plan, how or Execution())


def lay_out(shape: ModelShape, sizes: LayoutConfig, ranks: int | None = None) -> ShardsLayout:
    """Return where everything goes when ``sizes`` are laid over so many ranks, or over the smallest number of them.

    Raises:
        ConfigError: If the ranks or the layers do not fit the stages, or heads, widths or experts do not divide.
    """
    layout = sizes.runtime(ranks or sizes.fewest_ranks())
    return ShardsLayout(shape=shape, layout=layout, placement=sizes.placement(shape, layout))


def to_shards(source: Path, target: Path, sizes: LayoutConfig, how: Execution | None = None) -> ConversionReport:
    """Convert any checkpoint into a shards folder for one layout; errors as :func:`convert`."""
    opened = open_source(source)
    return convert(ShardsTarget(opened, target, lay_out(opened.shape, sizes)), how)


def to_hf(
    source: Path,
    target: Path,
    *,
    dtype: ExportDtype = ExportDtype.STORED,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    how: Execution | None = None,
) -> ConversionReport:
    """Convert any checkpoint into a Hugging Face folder; errors as :func:`convert`."""
    return convert(HfTarget(open_source(source), target, dtype, max_shard_bytes), how)


def _execute(target: Target, plan: ConversionPlan, how: Execution) -> ConversionReport:
    with open_journal(plan, resume=how.resume) as journal:
        todo = [file for file in plan.files if file.name not in journal.finished]
        total = sum(file.nbytes for file in todo)
        _check_free_space(plan.target, total + sum(carried.nbytes for carried in plan.side_files))
        target.prepare(plan)
        requantized: dict[str, float] = {}
        with Progress(total, description=f"writing {plan.target.name}", unit="B", shown=how.progress) as progress:
            write = partial(_write_output_file, plan.target)
            for record, errors in run_all(write, todo, workers=how.workers, advance=progress.update):
                journal.add(record)
                requantized |= errors
            if folder_state(plan.source_files) != plan.source_state:
                raise ConversionError(
                    f"The source {plan.source} was changed while it was converted. Delete {plan.target} and convert "
                    "again."
                )
            target.finish(plan, tuple(journal.finished[file.name] for file in plan.files))
    return ConversionReport(
        files=len(plan.files),
        files_kept=len(plan.files) - len(todo),
        written_bytes=total,
        seconds=progress.seconds,
        requantized=requantized,
        left_behind=plan.left_behind,
    )


def _write_output_file(folder: Path, file: OutputFile, advance: Advance) -> tuple[FileRecord, dict[str, float]]:
    """Return the finished file, and the largest relative error of each of its weights that was quantised again."""
    requantized: dict[str, float] = {}
    extents: list[tuple[int, int]] = []
    path = inside(folder, file.name, "The plan")
    path.parent.mkdir(parents=True, exist_ok=True)
    with PreallocatedFile(path, file.nbytes) as out:
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
            elif isinstance(item, Copied):
                copy_bytes(out, item, advance)
            elif isinstance(item, NewRows):
                write_new_rows(out, item, advance)
            else:
                end = append_saved(out, item, position, advance)
                extents.append((position, end - position))
                position = end
        return replace(out.commit(extents=tuple(extents)), name=file.name), requantized


def _check_free_space(target: Path, nbytes: int) -> None:
    free = free_bytes(target)
    if free < nbytes:
        raise ConversionError(
            f"Writing to {target} takes {nbytes / 1e9:.1f} GB, but its disk has {free / 1e9:.1f} GB free. "
            f"Free {(nbytes - free) / 1e9:.1f} GB, or choose another disk."
        )


def check_coverage(plan: ConversionPlan, source: WeightSource) -> None:
    """Check that the planned pieces of every parameter, copies counted once, tile it without gap or overlap.

    Raises:
        ConversionError: If they do not; the plan is wrong, and nothing has been written.
    """
    pieces: dict[str, dict[int | None, set[Rectangle]]] = {}
    for file in plan.files:
        for item in file.items:
            for view in item.views:
                pieces.setdefault(view.parameter, {}).setdefault(view.part, set()).add(view.rectangle)
    for name in source.names():
        parts, full = pieces.pop(name, {}).values(), whole(source.parameter(name).shape)
        covered = sum(rectangle.rows * rectangle.columns for rectangles in parts for rectangle in rectangles)
        overlap = any(one.overlap(other) for rectangles in parts for one, other in combinations(rectangles, 2))
        if overlap or covered != full.rows * full.columns:
            raise ConversionError(
                f"The plan writes {covered} of the {full.rows * full.columns} elements of {name}"
                f"{', some of them twice' if overlap else ''}. Nothing was written; please report this layout."
            )
    if pieces:
        raise ConversionError(f"The plan writes parameters that the source does not have, first {min(pieces)}.")
