"""Whole conversions, from checkpoint to checkpoint: plan, check, execute, finish."""

from pathlib import Path
from typing import Protocol

from conversion.aliases import check_aliases
from conversion.atomic_file import FileRecord
from conversion.coverage import check_coverage
from conversion.errors import naming_refusals
from conversion.execute import ConversionReport, Execution, execute
from conversion.plan import ConversionPlan
from conversion.rank_files import ShardsLayout
from conversion.sources import WeightSource, open_source
from conversion.to_hf import DEFAULT_SHARD_BYTES, ExportDtype, HfTarget
from conversion.to_megatron import ShardsTarget
from megatron_ads.architecture import ModelShape
from megatron_ads.config.layout import LayoutConfig


class Target(Protocol):
    """A format that a checkpoint can be written in."""

    @property
    def source(self) -> WeightSource:
        """The checkpoint that is converted."""
        ...

    def plan(self) -> ConversionPlan:
        """Decide what is written, from headers alone."""
        ...

    def prepare(self, plan: ConversionPlan) -> None:
        """Write what accompanies the weights, before them."""
        ...

    def finish(self, plan: ConversionPlan, records: tuple[FileRecord, ...]) -> None:
        """Write what makes the result complete."""
        ...


def convert(target: Target, how: Execution | None = None) -> ConversionReport:
    """Carry out one conversion.

    Raises:
        ConversionError: If the source is damaged, or the target cannot be used.
    """
    with naming_refusals(target.source.path):
        plan = target.plan()
        check_coverage(plan, target.source)
        check_aliases(target.source)
    with naming_refusals(plan.target):
        return execute(
            plan,
            prepare=lambda: target.prepare(plan),
            finish=lambda records: target.finish(plan, records),
            how=how,
        )


def lay_out(shape: ModelShape, sizes: LayoutConfig) -> ShardsLayout:
    """Return where everything goes when ``sizes`` are laid over the smallest number of ranks.

    Raises:
        ConfigError: If the layers do not fit the stages, or heads, widths or experts do not divide.
    """
    layout = sizes.runtime(sizes.fewest_ranks())
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
