"""Plan the conversion of any checkpoint into a shards folder of any layout."""

from dataclasses import dataclass
from pathlib import Path

from conversion.atomic_file import FileRecord
from conversion.carried import SIDE_FOLDER
from conversion.plan import ConversionPlan, OutputFile, Values, folder_state, offsets
from conversion.rank_files import RankFile, ShardsLayout
from conversion.regions import Region, View, slice_rectangles
from conversion.safetensors_file import HeaderEntry, header_order
from conversion.shards import MANIFEST, write_manifest
from conversion.sources import WeightSource, stored_dtype


@dataclass(frozen=True, slots=True)
class ShardsTarget:
    """A shards folder to be written: one file per distinct rank of ``layout``."""

    source: WeightSource
    target: Path
    layout: ShardsLayout

    def plan(self) -> ConversionPlan:
        """Decide what each rank's file holds.

        Raises:
            ConversionError: If a parameter cannot be divided as the layout asks.
        """
        regions = {name: self.source.regions(name) for name in self.source.names()}
        stored = self.source.files()
        return ConversionPlan(
            source=self.source.path,
            target=self.target,
            files=tuple(_plan_file(self.layout, file, regions) for file in self.layout.rank_files()),
            source_files=stored,
            source_state=folder_state(stored),
            tensor_count=len(regions),
            finishing=(MANIFEST, SIDE_FOLDER),
            side_files=(self.source.side_files(),),
        )

    def prepare(self, plan: ConversionPlan) -> None:
        """Leave everything to :func:`write_manifest`, which live jobs use too."""

    def finish(self, plan: ConversionPlan, records: tuple[FileRecord, ...]) -> None:
        """Carry the side files and write the manifest."""
        write_manifest(
            plan.target,
            layout=self.layout,
            config=self.source.config,
            records=records,
            side_files_from=self.source.side_folder,
            aliases=tuple(self.source.aliases),
            source=str(self.source.path),
            derived=self.source.derived,
        )


def _plan_file(layout: ShardsLayout, file: RankFile, regions: dict[str, tuple[Region, ...]]) -> OutputFile:
    owned = {parameter.name: parameter for parameter in layout.owned(file)}
    entries = header_order(
        [
            HeaderEntry(name, stored_dtype(parameter, regions[name]), layout.slice_shape(parameter))
            for name, parameter in owned.items()
        ]
    )
    header, offset_of, nbytes = offsets(entries, {"format": "pt"})
    items = []
    for entry in entries:
        parameter = owned[entry.name]
        rectangles = slice_rectangles(parameter, *layout.slice_of(parameter, file))
        views = tuple(View.of(entry.name, regions[entry.name], rectangle) for rectangle in rectangles)
        items.append(Values(entry.name, offset_of[entry.name], entry.dtype, views))
    return OutputFile(file.name, header, nbytes, tuple(items))
