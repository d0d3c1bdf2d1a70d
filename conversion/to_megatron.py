"""Plan the conversion of any checkpoint into a shards folder of any layout."""

from pathlib import Path

from conversion.atomic_file import FileRecord
from conversion.names import Parameter
from conversion.plan import ConversionPlan, OutputFile, Values, folder_state, offsets
from conversion.rank_files import RankFile, ShardsLayout
from conversion.regions import Region, View
from conversion.safetensors_file import HeaderEntry, header_order
from conversion.shards import MANIFEST, SIDE_FOLDER, write_manifest
from conversion.sources import WeightSource, stored_dtype
from conversion.tensor_parallel import slice_rectangles


def plan_shards(source: WeightSource, target: Path, layout: ShardsLayout) -> ConversionPlan:
    """Plan one file per distinct rank of ``layout``.

    Raises:
        ConversionError: If a parameter cannot be divided as the layout asks.
    """
    regions: dict[str, tuple[Region, ...]] = {name: source.regions(name) for name in source.names()}
    files = tuple(_plan_file(layout, file, regions) for file in layout.rank_files())
    stored = source.files()
    return ConversionPlan(
        source=source.path,
        target=target,
        files=files,
        source_state=folder_state(stored),
        source_bytes=sum(file.stat().st_size for file in stored),
        tensor_count=len(regions),
        finishing=(MANIFEST, SIDE_FOLDER),
    )


def _plan_file(layout: ShardsLayout, file: RankFile, regions: dict[str, tuple[Region, ...]]) -> OutputFile:
    owned: dict[str, Parameter] = {parameter.name: parameter for parameter in layout.owned(file)}
    entries = header_order(
        [
            HeaderEntry(name, stored_dtype(parameter, regions[name]), layout.slice_shape(parameter))
            for name, parameter in owned.items()
        ]
    )
    header, offset_of, nbytes = offsets(entries, {"format": "pt"})
    items = tuple(
        Values(entry.name, offset_of[entry.name], entry.dtype, _views(layout, file, owned[entry.name], regions))
        for entry in entries
    )
    return OutputFile(file.name, header, nbytes, items)


def _views(
    layout: ShardsLayout, file: RankFile, parameter: Parameter, regions: dict[str, tuple[Region, ...]]
) -> tuple[View, ...]:
    rectangles = slice_rectangles(parameter, *layout.slice_of(parameter, file))
    return tuple(
        View(tuple(region for region in regions[parameter.name] if rectangle.overlap(region.covers)), rectangle)
        for rectangle in rectangles
    )


def finish_shards(source: WeightSource, target: Path, layout: ShardsLayout, records: tuple[FileRecord, ...]) -> None:
    """Carry the side files and write the manifest."""
    write_manifest(
        target,
        layout=layout,
        config=source.config,
        records=records,
        side_files_from=source.side_folder,
        aliases=tuple(source.aliases),
        source=str(source.path),
    )
