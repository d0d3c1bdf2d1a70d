"""The ``shards`` format: one safetensors file per distinct rank, the side files in ``hf/``, and ``manifest.json`` last.

A folder without a manifest is an unfinished folder. Each rank of a job can write its own file
(:func:`write_rank_file`); one of them then writes the manifest (:func:`write_manifest`), which checks all files.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from conversion.atomic_file import FileRecord, write_small
from conversion.carried import SIDE_FOLDER, Carried, DerivedBuffer, copy_side_files, find_side_files
from conversion.errors import DamagedCheckpointError, read_object
from conversion.names import Parameter, Split, parameters, tensors_at_least
from conversion.paths import inside
from conversion.rank_files import RankFile, ShardsLayout
from conversion.regions import Region, StoredMatrix, slice_rectangles
from conversion.safetensors_file import CODES, StoredTensor, read_header, write_tensors
from megatron_ads import __version__
from megatron_ads.architecture import ModelShape, shape_from_config
from megatron_ads.errors import ConversionError
from megatron_ads.layout import ParallelLayout, place_layers

MANIFEST = "manifest.json"
FORMAT = "megatron-ads shards"
VERSION = 1


@dataclass(frozen=True, kw_only=True)
class ShardsFolder:
    """A checked shards folder: every file of the layout is there and holds what that rank owns."""

    path: Path
    config: dict[str, Any]
    """The model's config.json."""
    layout: ShardsLayout
    carried: Carried
    pieces: dict[str, tuple[tuple[RankFile, StoredTensor], ...]]
    """Every stored copy of every slice, by canonical name."""
    written: tuple[FileRecord, ...]
    """Every rank file, by its whole path, as the manifest says that it was written."""

    @property
    def shape(self) -> ModelShape:
        """The model."""
        return self.layout.shape

    @property
    def side_folder(self) -> Path:
        """Where config, tokenizer and custom code are."""
        return self.path / SIDE_FOLDER

    def replicas(self, parameter: Parameter) -> tuple[tuple[Region, ...], ...]:
        """Return every stored copy of a parameter; each covers it once."""
        by_rank: dict[int, list[list[Region]]] = {}
        for file, stored in self.pieces[parameter.name]:
            rank, size = self.layout.slice_of(parameter, file)
            if parameter.split is Split.REPLICATED:
                rank = 0
            matrix, row, regions = StoredMatrix(parameter.name, stored), 0, []
            for rectangle in slice_rectangles(parameter, rank, size):
                regions.append(Region(rectangle, matrix, row=row))
                row += rectangle.rows
            by_rank.setdefault(rank, []).append(regions)
        return tuple(tuple(chain.from_iterable(copy)) for copy in zip(*by_rank.values(), strict=True))

    def weight_files(self) -> tuple[Path, ...]:
        """Return every rank file."""
        return tuple(self.path / file.name for file in self.layout.rank_files())

    def regions(self, parameter: Parameter) -> tuple[Region, ...]:
        """Return what a canonical parameter is made of."""
        return self.replicas(parameter)[0]


def write_rank_file(
    folder: Path, file: RankFile, tensors: Mapping[str, torch.Tensor], layout: ShardsLayout
) -> FileRecord:
    """Write what one rank owns: canonical names, that rank's slices.

    Raises:
        ConversionError: If a tensor is missing, not that rank's, or of another shape than its slice.
    """
    expected = {parameter.name: layout.slice_shape(parameter) for parameter in layout.owned(file)}
    _compare_names(file.name, expected.keys(), tensors.keys())
    for name, shape in expected.items():
        if tuple(tensors[name].shape) != shape:
            raise ConversionError(f"{name} for {file.name} has shape {tuple(tensors[name].shape)}, not {shape}.")
    folder.mkdir(parents=True, exist_ok=True)
    return write_tensors(folder / file.name, tensors)


def write_manifest(
    folder: Path,
    *,
    layout: ShardsLayout,
    config: Mapping[str, Any],
    records: Sequence[FileRecord],
    side_files_from: Path,
    aliases: Sequence[str],
    source: str,
    derived: Mapping[str, DerivedBuffer] | None = None,
) -> None:
    """Carry the side files, check all rank files, and write ``manifest.json``, which makes the folder complete.

    Args:
        config: The model's config.json, verbatim.
        records: What each :func:`write_rank_file` returned.
        side_files_from: Hugging Face folder, or another shards folder's ``hf/``.
        aliases: HF names of the repeated tensors that an export must write (``WeightSource.aliases``).
        source: Where the weights came from, for the reader of the manifest.
        derived: Tensors to carry for an export (``WeightSource.derived``).
    """
    copy_side_files(side_files_from, folder / SIDE_FOLDER)
    pieces = _read_pieces(folder, layout)
    nbytes_of: Counter[str] = Counter()
    for copies in pieces.values():
        nbytes_of[CODES[copies[0][1].dtype]] += copies[0][1].nbytes
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "tool": f"megatron-ads {__version__}",
        "source": source,
        "layout": {axis: getattr(layout.layout, axis) for axis in ("tp", "pp", "vpp", "ep", "etp")},
        "pipeline": layout.placement.string,
        "dtype": nbytes_of.most_common(1)[0][0],
        "config": dict(config),
        "aliases": list(aliases),
        "side_files": find_side_files(folder / SIDE_FOLDER).names,
        "derived": {name: buffer.as_json() for name, buffer in (derived or {}).items()},
        "files": {record.name: {"bytes": record.nbytes, "sha256": record.sha256} for record in records},
        "tensors": {
            name: {
                "shape": list(parameters(layout.shape)[name].shape),
                "dtype": CODES[copies[0][1].dtype],
                "files": [file.name for file, _ in copies],
            }
            for name, copies in pieces.items()
        },
    }
    _compare_names(MANIFEST, [file.name for file in layout.rank_files()], manifest["files"])
    write_small(folder / MANIFEST, json.dumps(manifest, indent=1) + "\n")


def open_shards(path: Path) -> ShardsFolder:
    """Read a shards folder's manifest and headers and check that they agree.

    Raises:
        DamagedCheckpointError: If a file or tensor is missing, extra, truncated or of another shape than the layout
            gives it.
    """
    manifest = read_object(path / MANIFEST)
    try:
        if (manifest["format"], manifest["version"]) != (FORMAT, VERSION):
            raise DamagedCheckpointError(
                f"{path / MANIFEST} is {manifest['format']} version {manifest['version']}; this program reads "
                f"{FORMAT} version {VERSION}."
            )
        layout = _layout(manifest)
        files = manifest["files"].items()
        written = tuple(FileRecord(str(path / name), record["bytes"], str(record["sha256"])) for name, record in files)
        carried = Carried.parse(manifest)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise DamagedCheckpointError(f"{path / MANIFEST} is damaged ({error}). Convert again.") from None
    _compare_names(MANIFEST, [file.name for file in layout.rank_files()], manifest["files"])
    for record in written:
        file = Path(record.name)
        if file.exists() and (nbytes := file.stat().st_size) != record.nbytes:
            raise DamagedCheckpointError(
                f"{file} has {nbytes} bytes, but {MANIFEST} says {record.nbytes}. Copy it again, or convert again."
            )
    return ShardsFolder(
        path=path,
        config=manifest["config"],
        layout=layout,
        carried=carried,
        pieces=_read_pieces(path, layout),
        written=written,
    )


def _layout(manifest: Mapping[str, Any]) -> ShardsLayout:
    sizes, files, tensors = manifest["layout"], len(manifest["files"]), len(manifest["tensors"])
    world = sizes["pp"] * sizes["tp"] * sizes["ep"] * sizes["etp"]
    shape = shape_from_config(manifest["config"])
    if max(sizes["pp"], sizes["tp"], sizes["ep"] * sizes["etp"]) > files or tensors_at_least(shape) > tensors:
        raise ValueError(f"it lists {files} files and {tensors} tensors, too few for its layout and config")
    layout = ParallelLayout(world=world, **sizes)
    return ShardsLayout(
        shape=shape, layout=layout, placement=place_layers(shape, layout, pipeline=manifest["pipeline"])
    )


def _read_pieces(path: Path, layout: ShardsLayout) -> dict[str, tuple[tuple[RankFile, StoredTensor], ...]]:
    pieces: dict[str, list[tuple[RankFile, StoredTensor]]] = {}
    for file in layout.rank_files():
        tensors = read_header(inside(path, file.name, MANIFEST)).tensors
        owned = list(layout.owned(file))
        _compare_names(file.name, [parameter.name for parameter in owned], tensors)
        for parameter in owned:
            stored = tensors[parameter.name]
            if stored.shape != layout.slice_shape(parameter):
                raise DamagedCheckpointError(
                    f"{parameter.name} in {file.name} has shape {stored.shape}, but the layout gives this rank "
                    f"{layout.slice_shape(parameter)}. Convert again."
                )
            pieces.setdefault(parameter.name, []).append((file, stored))
    return {name: tuple(copies) for name, copies in pieces.items()}


def _compare_names(where: str, expected: Any, found: Any) -> None:
    missing, extra = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    if missing or extra:
        what = f"lacks {len(missing)} (first {missing[0]})" if missing else ""
        more = f"has {len(extra)} too many (first {extra[0]})" if extra else ""
        raise DamagedCheckpointError(f"{where} {' and '.join(filter(None, (what, more)))}. Convert again.")
