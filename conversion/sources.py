"""Read canonical parameters out of any checkpoint this project knows, slice by slice, without loading the rest."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

import torch

from conversion.atomic_file import FileRecord
from conversion.carried import DerivedBuffer, SideFiles, find_side_files
from conversion.errors import DamagedCheckpointError, naming_refusals, read_object
from conversion.hf_folder import INDEX, SINGLE, HfFolder, open_hf_folder
from conversion.journal import JOURNAL
from conversion.names import Parameter, ParameterKind, parameters, possible_aliases
from conversion.regions import Region, bands, fill, slice_rectangles, value_dtype
from conversion.shards import FORMAT, MANIFEST, ShardsFolder, open_shards
from conversion.torch_dist_folder import METADATA, TorchDistFolder, open_torch_dist
from megatron_ads.architecture import ModelShape
from megatron_ads.errors import ConversionError

_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")  # neither ./name nor ../name, which are folders
_NEEDED = ("*.safetensors", "*.json", "*.py", "*.jinja", "*.model", "*.txt", "LICENSE*")


class CheckpointFormat(StrEnum):
    """The checkpoint formats."""

    HF = "Hugging Face folder"
    SHARDS = "shards folder"
    TORCH_DIST = "torch_dist folder"


def stored_dtype(parameter: Parameter, regions: Sequence[Region]) -> torch.dtype:
    """Return the dtype a parameter's values are read in: as stored, BF16 for FP8, FP32 for the router bias."""
    return torch.float32 if parameter.kind is ParameterKind.ROUTER_BIAS else value_dtype(regions)


@dataclass(frozen=True, kw_only=True)
class WeightSource:
    """An opened checkpoint. Opening reads headers only; every read maps just the bytes it returns."""

    path: Path
    kind: CheckpointFormat
    shape: ModelShape
    config: Mapping[str, Any]
    """The model's config.json."""
    side_folder: Path
    """Where config, tokenizer and custom code are."""
    aliases: Mapping[str, str]
    """Repeated HF tensors that belong to the model: HF name -> canonical name."""
    container: HfFolder | ShardsFolder | TorchDistFolder
    derived: Mapping[str, DerivedBuffer] = field(default_factory=dict)
    """Tensors that the Hugging Face checkpoint stores although its config determines them."""
    side_file_names: tuple[str, ...] = ()
    """Which side files there were when the checkpoint was written, where that is known."""
    written: tuple[FileRecord, ...] = ()
    """Weight files, by their whole paths, as they were when they were written, where that is known."""

    def side_files(self) -> SideFiles:
        """Return what travels with the weights."""
        return find_side_files(self.side_folder, listed=self.side_file_names, weights=self.files())

    def names(self) -> tuple[str, ...]:
        """Return every canonical parameter name, in model order."""
        return tuple(parameters(self.shape))

    def parameter(self, name: str) -> Parameter:
        """Return the description of one parameter.

        Raises:
            ConversionError: If the model has no parameter of this name.
        """
        try:
            return parameters(self.shape)[name]
        except KeyError:
            raise ConversionError(f"{self.path} holds a model without a parameter {name!r}.") from None

    def regions(self, name: str) -> tuple[Region, ...]:
        """Return the stored pieces that cover a parameter once."""
        return self.container.regions(self.parameter(name))

    def replicas(self, name: str) -> tuple[tuple[Region, ...], ...]:
        """Return every stored copy of a parameter; only a shards folder has several."""
        if isinstance(self.container, ShardsFolder):
            return self.container.replicas(self.parameter(name))
        return (self.regions(name),)

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype that :meth:`read` gives: as stored, BF16 for FP8, FP32 for the router bias."""
        return stored_dtype(self.parameter(name), self.regions(name))

    def files(self) -> tuple[Path, ...]:
        """Return every weight file of the checkpoint."""
        return self.container.weight_files()

    def read(self, name: str, *, rank: int = 0, size: int = 1) -> torch.Tensor:
        """Return one tensor-parallel slice of a parameter.

        Args:
            name: Canonical name.
            rank: Tensor-parallel rank; for routed experts the expert-tensor-parallel one.
            size: Ranks the parameter is split over.

        Raises:
            ConversionError: If the name is unknown, the parameter cannot be split so, or an FP8 code is NaN.
        """
        parameter, regions = self.parameter(name), self.regions(name)
        rectangles = slice_rectangles(parameter, rank, size)
        rows, columns = sum(rectangle.rows for rectangle in rectangles), rectangles[0].columns
        out, row = torch.empty(rows, columns, dtype=self.dtype(name)), 0
        for rectangle in rectangles:
            for band in bands(rectangle):
                fill(out[row : row + band.rows], regions, band)
                row += band.rows
        return out if len(parameter.shape) > 1 else out[0]


def open_source(path: Path) -> WeightSource:
    """Open a Hugging Face, shards or torch_dist folder, whichever ``path`` is.

    Raises:
        ConversionError: If the folder is none of them, or is incomplete or damaged.
    """
    with naming_refusals(path):
        kind = _recognised(path)
        folder = _OPEN[kind](path)
        carried, repeats = folder.carried, possible_aliases(folder.shape).items()
        return WeightSource(
            path=path,
            kind=kind,
            shape=folder.shape,
            config=folder.config,
            side_folder=folder.side_folder,
            aliases={name: canonical for name, canonical in repeats if name in carried.aliases},
            container=folder,
            derived=carried.derived,
            side_file_names=carried.side_files,
            written=folder.written if isinstance(folder, ShardsFolder) else (),
        )


_OPEN: dict[CheckpointFormat, Callable[[Path], HfFolder | ShardsFolder | TorchDistFolder]] = {
    CheckpointFormat.HF: open_hf_folder,
    CheckpointFormat.SHARDS: open_shards,
    CheckpointFormat.TORCH_DIST: open_torch_dist,
}


def _recognised(path: Path) -> CheckpointFormat:
    if (path / JOURNAL).exists():
        raise ConversionError(
            f"{path} is the target of a conversion that has not finished. Wait for it, or run it again with --resume."
        )
    has_weights = (path / INDEX).exists() or (path / SINGLE).exists()
    has_metadata = (path / METADATA).exists()  # with a manifest of another kind in a job's checkpoint
    kinds = {
        CheckpointFormat.TORCH_DIST: has_metadata,
        CheckpointFormat.SHARDS: _has_manifest(path, foreign=not (has_weights or has_metadata)),
        CheckpointFormat.HF: has_weights,
    }
    found = [kind for kind, there in kinds.items() if there]
    if len(found) > 1:
        raise DamagedCheckpointError(
            f"{path} holds two checkpoints, a {found[0]} and a {found[1]}. Move one of them to a folder of its own."
        )
    if found:
        return found[0]
    if not path.is_dir():
        raise ConversionError(f"{path} does not exist or is not a folder. Give the folder of a checkpoint.")
    if inside := sorted(
        file.parent.name for file in path.glob(f"*/{METADATA}") if not file.parent.name.startswith(".")
    ):
        raise ConversionError(f"{path} holds checkpoints but is not one. Give one of them, such as {inside[-1]}.")
    if weights := len([*path.glob("*.safetensors")]):
        raise ConversionError(
            f"{path} holds {weights} safetensors files, but neither {INDEX}, which says what is in them, nor "
            f"{MANIFEST}. Copy the index too; a conversion that was interrupted is completed with --resume."
        )
    raise ConversionError(
        f"{path} is not a checkpoint: it holds neither {MANIFEST} (shards), {INDEX} or {SINGLE} (Hugging Face), "
        f"nor {METADATA} (torch_dist). A conversion that was interrupted has no manifest; run it again with --resume."
    )


def _has_manifest(path: Path, *, foreign: bool) -> bool:
    """Whether there is a manifest of this project; with ``foreign``, any manifest, to be refused with the reason."""
    file = path / MANIFEST
    if foreign:
        return file.exists()
    try:
        return file.is_file() and bool(read_object(file).get("format") == FORMAT)
    except DamagedCheckpointError:
        return False


def local_folder(source: str) -> Path:
    """Return ``source`` if it is a folder; download it if it looks like a hub id (``deepseek-ai/DeepSeek-R1``).

    Raises:
        ConversionError: If it is neither, or the download fails.
    """
    folder = Path(source)
    with naming_refusals(folder):
        if folder.exists():
            return folder
    if not _HUB_ID.fullmatch(source):
        raise ConversionError(f"{source} does not exist. Give a checkpoint folder, or a hub id such as owner/name.")
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    except ImportError:
        raise ConversionError(
            f"{source} is not a folder, and downloading it from the hub needs huggingface-hub, which is not installed."
        ) from None
    try:
        return Path(snapshot_download(source, allow_patterns=list(_NEEDED)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ConversionError(
            f"{source} is not a folder here and could not be downloaded from the hub: {reason}. "
            "Check the name and the network, or download it elsewhere and give the folder."
        ) from None
