"""Plan the conversion of any checkpoint into a Hugging Face folder, in FP32, BF16 or FP8."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

import torch

from conversion.atomic_file import FileRecord, write_small
from conversion.carried import DerivedBuffer, copy_side_files
from conversion.errors import read_object
from conversion.fp8 import BLOCK, scale_shape
from conversion.hf_folder import INDEX, SCALE_SUFFIX, SINGLE, HfFolder, write_index
from conversion.names import DERIVED_BUFFER, HfPart, Parameter, ParameterKind, parameters
from conversion.plan import ConversionPlan, OutputFile, Quantized, Values, Verbatim, folder_state, in_groups, offsets
from conversion.regions import Region, View
from conversion.safetensors_file import DTYPES, HeaderEntry, header_order
from conversion.sources import WeightSource, stored_dtype
from megatron_ads.architecture import Fp8Blocks, fp8_blocks
from megatron_ads.errors import ConversionError

DEFAULT_SHARD_BYTES = 5 * 10**9
FP8_CONFIG = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": list(BLOCK)}
"""``quantization_config`` as DeepSeek publishes it."""
_DTYPE_FIELDS = ("dtype", "torch_dtype")
_LISTS_OF_UNQUANTIZED = ("modules_to_not_convert", "ignored_layers")
_MANTISSA = 0x7FFFFF
"""Of an FP32 number; 0 in a power of two."""


class ExportDtype(StrEnum):
    """What an export stores. The router bias is FP32 in all of them."""

    STORED = "stored"
    """Whatever the source's values are."""
    FP32 = "fp32"
    BF16 = "bf16"
    FP8 = "fp8"
    """Projections inside layers in FP8 with block scales, the rest in BF16."""


@dataclass(frozen=True, slots=True)
class HfTensor:
    """One tensor of the export, with what of a canonical parameter it is."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    view: View
    blocks: Fp8Blocks
    """How it is quantised, if it is."""

    @property
    def entries(self) -> tuple[HeaderEntry, ...]:
        """What the export stores for it: one tensor, or codes and scales."""
        weight = HeaderEntry(self.name, self.dtype, self.shape)
        if self.dtype is not torch.float8_e4m3fn:
            return (weight,)
        return weight, HeaderEntry(self.name + SCALE_SUFFIX, torch.float32, scale_shape(self.shape, self.block))

    @property
    def block(self) -> tuple[int, int]:
        """Rows and columns of one FP8 block."""
        return self.blocks.rows, self.blocks.columns

    @property
    def nbytes(self) -> int:
        """Bytes of all its entries."""
        return sum(entry.nbytes for entry in self.entries)


@dataclass(frozen=True, slots=True)
class HfTarget:
    """A Hugging Face folder to be written, in files of at most ``max_shard_bytes`` (a larger tensor gets its own)."""

    source: WeightSource
    target: Path
    dtype: ExportDtype
    max_shard_bytes: int = DEFAULT_SHARD_BYTES

    def plan(self) -> ConversionPlan:
        """Decide which tensor goes into which file.

        Raises:
            ConversionError: If a file may not hold a single byte.
        """
        if self.max_shard_bytes < 1:
            raise ConversionError(f"The largest file is {self.max_shard_bytes} bytes; give at least 1, such as 5GB.")
        tensors = hf_tensors(self.source, self.dtype, self.source.aliases)
        groups = in_groups(tensors, lambda tensor: tensor.nbytes, self.max_shard_bytes)
        count = len(groups)
        names = [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
        derived = [self.source.derived, *[{}] * (count - 1)]
        files = tuple(map(_plan_file, names if count > 1 else [SINGLE], groups, derived))
        stored, carried = self.source.files(), self.source.side_files()
        return ConversionPlan(
            source=self.source.path,
            target=self.target,
            files=files,
            source_files=stored,
            source_state=folder_state(stored),
            tensor_count=len(self.source.names()),
            finishing=(INDEX, "config.json", *carried.names),
            side_files=(carried,),
        )

    def prepare(self, plan: ConversionPlan) -> None:
        """Carry the side files and write a config that fits the weights: a single weight file is itself the last."""
        copy_side_files(self.source.side_folder, plan.target, skip=("config.json",))
        write_config(self.source.config, plan, self.source.side_folder)

    def finish(self, plan: ConversionPlan, records: tuple[FileRecord, ...]) -> None:
        """Write the index, if there are several files."""
        if len(records) == 1:
            return
        stored = list(planned_tensors(plan))
        write_index(plan.target, {name: file for file, name, *_ in stored}, sum(nbytes for *_, nbytes in stored))


def hf_tensors(source: WeightSource, dtype: ExportDtype, aliases: Mapping[str, str]) -> list[HfTensor]:
    """Return the tensors, with these repeats, in reading order: embedding, layers, norm, head."""
    model, found = parameters(source.shape), []
    blocks = fp8_blocks(source.config) or Fp8Blocks(rows=BLOCK[0], columns=BLOCK[1], power_of_two_scales=False)
    repeated = ((alias, model[canonical]) for alias, canonical in aliases.items())
    repeats = [replace(parameter, parts=(HfPart(alias, parameter.shape),)) for alias, parameter in repeated]
    for parameter in (*model.values(), *repeats):
        regions = source.regions(parameter.name)
        stored = _dtype(parameter, regions, dtype)
        for number, part in enumerate(parameter.parts):
            view = View.of_part(parameter, regions, number)
            found.append(HfTensor(part.name, part.shape, stored, view, blocks))
    return sorted(found, key=lambda tensor: _reading_order(tensor.name))


def _dtype(parameter: Parameter, regions: Sequence[Region], dtype: ExportDtype) -> torch.dtype:
    if parameter.kind is ParameterKind.ROUTER_BIAS or dtype is ExportDtype.FP32:
        return torch.float32
    if dtype is ExportDtype.STORED:
        return stored_dtype(parameter, regions)
    return torch.float8_e4m3fn if (dtype, parameter.kind) == (ExportDtype.FP8, ParameterKind.LINEAR) else torch.bfloat16


def _reading_order(hf_name: str) -> tuple[int, int]:
    """Sort key; names that compare equal keep the table's order."""
    words = hf_name.split(".")
    if words[1] == "layers":
        return 1, int(words[2])
    return {"embed_tokens": 0, "norm": 2}.get(words[1], 3), 0


def _plan_file(name: str, tensors: Sequence[HfTensor], derived: Mapping[str, DerivedBuffer]) -> OutputFile:
    entries = [entry for tensor in tensors for entry in tensor.entries]
    entries += [HeaderEntry(name, buffer.dtype, buffer.shape) for name, buffer in derived.items()]
    header, offset_of, nbytes = offsets(_writing_order(entries), {"format": "pt"})
    items: list[Values | Quantized | Verbatim] = []
    for tensor in tensors:
        offset = offset_of[tensor.name]
        if tensor.dtype is torch.float8_e4m3fn:
            scales, powers = offset_of[tensor.name + SCALE_SUFFIX], tensor.blocks.power_of_two_scales
            items.append(Quantized(tensor.name, offset, scales, tensor.view, tensor.block, powers))
        else:
            items.append(Values(tensor.name, offset, tensor.dtype, (tensor.view,)))
    items += [Verbatim(name, offset_of[name], buffer.data) for name, buffer in derived.items()]
    items.sort(key=lambda item: item.offset)
    return OutputFile(name, header, nbytes, tuple(items))


def _writing_order(entries: Sequence[HeaderEntry]) -> tuple[HeaderEntry, ...]:
    """Return the order in which a file can be written front to back: scales, known last, after the codes.

    That is safetensors' own order, except that scales come last unless they would not be aligned there.
    """
    others = header_order([entry for entry in entries if not entry.name.endswith(SCALE_SUFFIX)])
    scales = header_order([entry for entry in entries if entry.name.endswith(SCALE_SUFFIX)])
    aligned = sum(entry.nbytes for entry in others) % torch.float32.itemsize == 0
    return (*others, *scales) if aligned else header_order(entries)


def planned_tensors(plan: ConversionPlan) -> Iterator[tuple[str, str, torch.dtype, int]]:
    """Yield file, name, dtype and bytes of everything that a plan for a Hugging Face folder stores."""
    for file in plan.files:
        entries = json.loads(file.header[8:])
        entries.pop("__metadata__", None)
        for name, entry in entries.items():
            begin, end = entry["data_offsets"]
            yield file.name, name, DTYPES[entry["dtype"]], end - begin


def write_config(config: Mapping[str, Any], plan: ConversionPlan, published: Path) -> None:
    """Write config.json as the planned weights are; as ``published`` has it, to the byte, if that is true of them."""
    stored = {name: (dtype, nbytes) for _, name, dtype, nbytes in planned_tensors(plan)}
    true, file = true_config(config, stored), published / "config.json"
    text = file.read_bytes() if file.exists() and read_object(file) == true else json.dumps(true, indent=2) + "\n"
    write_small(plan.target / "config.json", text)


def true_config(config: Mapping[str, Any], stored: Mapping[str, tuple[torch.dtype, int]]) -> dict[str, Any]:
    """Return ``config`` with the dtype and ``quantization_config`` of these tensors.

    Args:
        config: As parsed; blocks and scale format of FP8 are taken from it.
        stored: Dtype and bytes of every tensor, by its Hugging Face name.
    """
    result = dict(config)
    quantized = [name for name, (dtype, _) in stored.items() if dtype is torch.float8_e4m3fn]
    if quantized:
        result["quantization_config"] = dict(config.get("quantization_config") or FP8_CONFIG)
        for field in _LISTS_OF_UNQUANTIZED:
            if isinstance(modules := result["quantization_config"].get(field), list):
                kept = [one for one in modules if not any(f".{one}." in f".{name}." for name in quantized)]
                result["quantization_config"][field] = kept
    else:
        result.pop("quantization_config", None)
    for field in _DTYPE_FIELDS:
        if field in result:
            result[field] = _main_dtype(stored)
    return result


def _main_dtype(stored: Mapping[str, tuple[torch.dtype, int]]) -> str:
    """Return the dtype of most bytes, apart from FP8 codes and what is FP32 in any checkpoint."""
    nbytes = Counter({torch.bfloat16: 0})
    for name, (dtype, size) in stored.items():
        always_fp32 = name.endswith((SCALE_SUFFIX, "e_score_correction_bias")) or DERIVED_BUFFER.fullmatch(name)
        if dtype is not torch.float8_e4m3fn and not always_fp32:
            nbytes[dtype] += size
    return str(nbytes.most_common(1)[0][0]).removeprefix("torch.")


def untrue_fields(folder: HfFolder) -> Iterator[tuple[str, str]]:
    """Yield every field of a folder's config that contradicts its weights, and how."""
    true = true_config(folder.config, {name: (each.dtype, each.nbytes) for name, each in folder.tensors.items()})
    for field in (*_DTYPE_FIELDS, "quantization_config"):
        claimed = folder.config.get(field)
        if claimed != true.get(field) and not (claimed is None and field in _DTYPE_FIELDS):
            yield field, f"{folder.path / 'config.json'} says {claimed}; by its weights it is {true.get(field)}"
    blocks = fp8_blocks(folder.config)
    if blocks is not None and blocks.power_of_two_scales:
        for name, stored in folder.tensors.items():
            if name.endswith(SCALE_SUFFIX) and bool((stored.read().view(torch.int32) & _MANTISSA).any()):
                reason = f"ue8m0, but {name} in {stored.file} has scales between powers of two"
                yield "quantization_config.scale_fmt", reason
                return
