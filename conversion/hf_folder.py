"""A Hugging Face checkpoint folder: every header is read and checked when it is opened, data tensor by tensor.

Old and transformers-5 configs, one file or many.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from conversion.atomic_file import write_small
from conversion.carried import Carried, DerivedBuffer
from conversion.errors import DamagedCheckpointError, read_object, refuse_pipe
from conversion.fp8 import BLOCK, scale_shape
from conversion.names import (
    DERIVED_BUFFER,
    HfPart,
    Parameter,
    ParameterKind,
    parameters,
    possible_aliases,
    tensors_at_least,
)
from conversion.paths import inside
from conversion.regions import Region, StoredMatrix, part_pieces
from conversion.safetensors_file import StoredTensor, read_header
from megatron_ads.architecture import GroupedQueryShape, ModelShape, fp8_blocks, shape_from_config
from megatron_ads.errors import ConversionError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SCALE_SUFFIX = "_scale_inv"
_MTP_WORDS = {
    "enorm.weight": "enorm",
    "hnorm.weight": "hnorm",
    "eh_proj.weight": "eh_proj",
    "shared_head.norm.weight": "norm",
}
_OUTSIDE_WORDS = {"model.embed_tokens.weight": "embedding", "model.norm.weight": "norm", "lm_head.weight": "head"}
_VALUE_DTYPES = (torch.float8_e4m3fn, torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True, kw_only=True)
class HfFolder:
    """A checked Hugging Face checkpoint: every tensor the config asks for is there, with its shape, and no other."""

    path: Path
    config: dict[str, Any]
    shape: ModelShape
    tensors: dict[str, StoredTensor]
    """Every stored tensor by HF name, scales and repeats included."""
    files: tuple[str, ...]
    """The safetensors files, in index order."""

    @cached_property
    def block(self) -> tuple[int, int]:
        """Rows and columns of one FP8 block."""
        blocks = fp8_blocks(self.config)
        return BLOCK if blocks is None else (blocks.rows, blocks.columns)

    def matrix(self, hf_name: str) -> StoredMatrix:
        """Return one HF tensor together with its scales."""
        return StoredMatrix(hf_name, self.tensors[hf_name], self.tensors.get(hf_name + SCALE_SUFFIX), self.block)

    def regions(self, parameter: Parameter) -> tuple[Region, ...]:
        """Return what a canonical parameter is made of."""
        matrices = {part.name: self.matrix(part.name) for part in parameter.parts}
        return tuple(
            Region(piece.at, matrices[piece.part.name], piece.row, piece.column) for piece in part_pieces(parameter)
        )

    def weight_files(self) -> tuple[Path, ...]:
        """Return every safetensors file."""
        return tuple(self.path / file for file in self.files)

    @cached_property
    def aliases(self) -> dict[str, str]:
        """The repeats that are stored: HF name -> canonical name."""
        return {name: canonical for name, canonical in possible_aliases(self.shape).items() if name in self.tensors}

    @cached_property
    def derived(self) -> tuple[str, ...]:
        """Stored tensors that the config determines and that no conversion needs."""
        return tuple(name for name in self.tensors if DERIVED_BUFFER.fullmatch(name))

    @property
    def side_folder(self) -> Path:
        """Where config, tokenizer and custom code are."""
        return self.path

    @property
    def carried(self) -> Carried:
        """The repeats and further tensors that an export must write to have the same keys."""
        return Carried(frozenset(self.aliases), {name: DerivedBuffer.of(self.tensors[name]) for name in self.derived})

    @property
    def is_fp8(self) -> bool:
        """Whether any weight is stored in FP8."""
        return any(stored.dtype is torch.float8_e4m3fn for stored in self.tensors.values())


def open_hf_folder(path: Path) -> HfFolder:
    """Read all headers of a checkpoint folder and check them against its ``config.json``.

    Raises:
        ConfigError: If ``config.json`` describes no supported model.
        ConversionError: If there is no ``config.json``.
        DamagedCheckpointError: If a tensor is missing, unknown, of another shape than the config says, FP8 without
            scales, or indexed in a file that does not hold it or is not in the folder; if there are two checkpoints.
    """
    config = read_config(path)
    tensors, files = _read_tensors(path)
    shape = shape_from_config(config, file=path / "config.json")
    folder = HfFolder(path=path, config=config, shape=shape, tensors=tensors, files=files)
    _check_names(folder)
    for parameter in parameters(folder.shape).values():
        for part in parameter.parts:
            _check_tensor(folder, part, parameter.kind)
    for name in folder.derived:
        if math.prod(tensors[name].shape) != shape.attention.rotary_dim // 2:
            raise DamagedCheckpointError(
                f"{name} in {tensors[name].file} has shape {tensors[name].shape}, but half the rotary channels are "
                f"{shape.attention.rotary_dim // 2}. Copy the file again."
            )
    for alias, canonical in folder.aliases.items():
        _check_tensor(folder, HfPart(alias, parameters(folder.shape)[canonical].shape), ParameterKind.PLAIN)
    return folder


def check_for_transformers(path: Path) -> None:
    """Check what transformers would open, allocate and list because the files of a supported model say so.

    Less than what ``open_hf_folder`` asks for: MTP layers may be missing, experts fused, and the head tied.

    Raises:
        ConfigError: If ``config.json`` describes no supported model.
        ConversionError: If it describes one that is absurdly large.
        DamagedCheckpointError: If a file is damaged or outside the folder, or tensors are too few or of another shape.
    """
    for file in path.iterdir():
        refuse_pipe(file)
    shape, (tensors, _) = shape_from_config(read_config(path), file=path / "config.json"), _read_tensors(path)
    if shape.num_layers > len(tensors):
        raise DamagedCheckpointError(
            f"{path} holds {len(tensors)} tensors, too few for the num_hidden_layers = {shape.num_layers} of its "
            "config.json. Copy the config and the files from the same revision."
        )
    for parameter in parameters(replace(shape, mtp_layers=0, tie_word_embeddings=False)).values():
        for part in parameter.parts:
            if part.name in tensors:
                _check_shape(tensors[part.name], part)


def read_config(path: Path) -> dict[str, Any]:
    """Return the parsed ``config.json`` of a checkpoint folder."""
    file = inside(path, "config.json", str(path))
    if not file.exists():
        raise ConversionError(f"{file} does not exist: {path} is not a Hugging Face checkpoint folder.")
    return read_object(file)


def write_index(folder: Path, file_of: Mapping[str, str], nbytes: int) -> None:
    """Write the index of a checkpoint in several files: the file of each tensor, and the bytes of all."""
    index = {"metadata": {"total_size": nbytes}, "weight_map": dict(sorted(file_of.items()))}
    write_small(folder / INDEX, json.dumps(index, indent=2) + "\n")


def _read_tensors(path: Path) -> tuple[dict[str, StoredTensor], tuple[str, ...]]:
    if not (path / INDEX).exists():
        if not (path / SINGLE).exists():
            raise DamagedCheckpointError(f"{path} holds neither {INDEX} nor {SINGLE}. Copy the checkpoint again.")
        return read_header(inside(path, SINGLE, str(path))).tensors, (SINGLE,)
    weight_map = read_object(inside(path, INDEX, str(path))).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise DamagedCheckpointError(f"{path / INDEX} has no weight_map from tensors to files. Copy it again.")
    files = tuple(dict.fromkeys(weight_map.values()))
    if odd := [file for file in files if not file.endswith(".safetensors")]:
        raise DamagedCheckpointError(f"{path / INDEX} names {odd[0]!r} as a file of weights; it must be .safetensors.")
    headers = {file: read_header(inside(path, file, str(path / INDEX))).tensors for file in files}
    if stray := sorted(file.name for file in path.glob("model*.safetensors") if file.name not in files):
        raise DamagedCheckpointError(
            f"{path} holds two checkpoints: {INDEX} names {len(files)} files, but not {stray[0]}, which other programs "
            "would read. Delete the one that is stale."
        )
    for name, file in weight_map.items():
        if name not in headers[file]:
            raise DamagedCheckpointError(
                f"{INDEX} says that {name} is in {file}, which does not hold it: the index is stale. "
                "Copy the index and the files from the same revision."
            )
    for file, tensors in headers.items():
        for name in tensors:
            if weight_map.get(name) != file:
                raise DamagedCheckpointError(
                    f"{file} holds {name}, which {INDEX} places in {weight_map.get(name, 'no file')}: the index is "
                    "stale. Copy the index and the files from the same revision."
                )
    return {name: headers[file][name] for name, file in weight_map.items()}, files


def _check_names(folder: HfFolder) -> None:
    """Compare the stored names with those the config asks for; counts first: listing too many would take forever."""
    shape, found = folder.shape, folder.tensors.keys()
    if tensors_at_least(shape) > len(found):
        raise DamagedCheckpointError(
            f"{folder.path} holds {len(found)} tensors, too few for the {_counts(shape)} of its config.json. "
            f"{_likely_cause(found) or 'Copy the config and the files from the same revision.'}"
        )
    expected = {part.name for parameter in parameters(shape).values() for part in parameter.parts}
    known = expected | set(folder.aliases) | set(folder.derived)
    missing, extra = sorted(expected - found), sorted(found - known - {name + SCALE_SUFFIX for name in known})
    if not missing and not extra:
        return
    what = []
    if missing:
        what.append(f"lacks {len(missing)} tensors that its config.json asks for, first {missing[0]}")
    if extra:
        what.append(f"holds {len(extra)} tensors that its config.json has no place for, first {extra[0]}")
    cause = _likely_cause(extra) or _cause_of_missing(shape, missing)
    if extra and not cause:
        cause = f"Check {_counts(shape)} in config.json."
    raise DamagedCheckpointError(f"{folder.path} {', and '.join(what)}. {cause or 'Copy the missing files.'}")


def _counts(shape: ModelShape) -> str:
    """Return the fields of ``config.json`` that say how many tensors there are, with their values."""
    layers = f"num_hidden_layers = {shape.num_layers}"
    if not shape.num_experts:
        return layers
    return f"{layers}, n_routed_experts = {shape.num_experts} and num_nextn_predict_layers = {shape.mtp_layers}"


_CAUSES = {
    r"\.mlp\.experts\.(gate_up_proj|down_proj)": "Its experts are stored fused, as transformers 5 has them in memory: "
    "save it with save_pretrained(save_original_format=True).",
    r"^base_model\.|\.lora_|\.base_layer\.": "These are names of PEFT: save what merge_and_unload() returns.",
    r"(^|\.)language_model\.|^(vision|visual|multi_modal)": "This is a multimodal checkpoint: save its language model "
    "on its own, under the names model.* and lm_head.weight.",
    r"^(layers|embed_tokens|norm)\.": "These are names of a model without its head: save the outer one.",
    r"^(module|_orig_mod|model\.model)\.": "These are names of a wrapped model: save the model inside the wrapper.",
    r"\.(weight_scale|input_scale|weight_packed|qweight|qzeros|scales|absmax)$": "It was quantized by another tool: "
    "only BF16, FP16, FP32 and FP8 with one weight_scale_inv per block are read. Convert from the original.",
    r"_proj\.bias$": "Its projections have biases: only those of Qwen2, and of Llama with attention_bias, are known.",
    r"\.self_attn\.indexer\.": "It belongs to the sparse attention of DeepSeek-V3.2, which is not supported.",
}
"""Names of tensors that no supported model has, and what they tell about the checkpoint."""


def _likely_cause(names: Iterable[str]) -> str:
    names = tuple(names)
    return next((cause for pattern, cause in _CAUSES.items() if any(re.search(pattern, name) for name in names)), "")


def _cause_of_missing(shape: ModelShape, missing: Sequence[str]) -> str:
    if missing == ["lm_head.weight"]:
        if isinstance(shape.attention, GroupedQueryShape):
            return "If its head is tied to the embedding, set tie_word_embeddings to true in config.json."
        return (
            "Its head seems to be tied to the embedding: store a copy of model.embed_tokens.weight as lm_head.weight."
        )
    if missing and all(name.endswith(".e_score_correction_bias") for name in missing):
        return "Its router has no bias: store zeros in FP32 under these names if it was trained without."
    if shape.mtp_layers and missing and missing[0].startswith(f"model.layers.{shape.num_layers}."):
        return "If the MTP layers were left out on purpose, set num_nextn_predict_layers to 0 in config.json."
    return ""


def _check_shape(stored: StoredTensor, part: HfPart) -> None:
    if stored.shape != part.shape:
        raise DamagedCheckpointError(
            f"{part.name} in {stored.file} has shape {stored.shape}, but config.json gives {part.shape}. "
            "The config belongs to another model, or the file is damaged."
        )


def _check_tensor(folder: HfFolder, part: HfPart, kind: ParameterKind) -> None:
    stored, scales = folder.tensors[part.name], folder.tensors.get(part.name + SCALE_SUFFIX)
    _check_shape(stored, part)
    if stored.dtype not in _VALUE_DTYPES:
        raise DamagedCheckpointError(
            f"{part.name} in {stored.file} is {stored.dtype}; weights are FP8, BF16, FP16 or FP32."
        )
    if (stored.dtype is torch.float8_e4m3fn) != (scales is not None):
        state = "is FP8 without" if scales is None else f"is {stored.dtype} but has"
        raise DamagedCheckpointError(f"{part.name} in {stored.file} {state} block scales ({part.name}{SCALE_SUFFIX}).")
    if scales is None:
        return
    expected = scale_shape(stored.shape, folder.block)
    if scales.shape != expected or scales.dtype is not torch.float32 or kind is ParameterKind.ROUTER_BIAS:
        raise DamagedCheckpointError(
            f"{part.name}{SCALE_SUFFIX} in {scales.file} is {scales.dtype} of shape {scales.shape}; blocks of "
            f"{folder.block[0]} x {folder.block[1]} of {stored.shape} need float32 of {expected}."
        )


@dataclass(frozen=True, slots=True)
class LayerTensors:
    """The tensors of one layer."""

    decoder: dict[str, torch.Tensor]
    """By Hugging Face name, the layer numbered 0."""
    around: dict[str, torch.Tensor]
    """Of an MTP layer: ``enorm``, ``hnorm``, ``eh_proj`` and ``norm``; else nothing."""


def layer_tensors(folder: HfFolder, layer: int) -> LayerTensors:
    """Read layer ``layer``; numbers from ``num_layers`` on are the MTP layers, whose repeats are left out."""
    prefix, decoder, around = f"model.layers.{layer}.", {}, {}
    for name in folder.tensors:
        extra = name.endswith(SCALE_SUFFIX) or name in folder.aliases or name in folder.derived
        if extra or not name.startswith(prefix):
            continue
        rest = name.removeprefix(prefix)
        if (word := _MTP_WORDS.get(rest)) is not None:
            around[word] = stored_values(folder, name)
        else:
            decoder[f"model.layers.0.{rest}"] = stored_values(folder, name)
    return LayerTensors(decoder, around)


def outside_tensors(folder: HfFolder) -> dict[str, torch.Tensor]:
    """Read the ``embedding``, the final ``norm`` and the output ``head``, which may be the embedding."""
    found = {word: stored_values(folder, name) for name, word in _OUTSIDE_WORDS.items() if name in folder.tensors}
    return {"head": found["embedding"]} | found


def stored_values(folder: HfFolder, name: str) -> torch.Tensor:
    """Return one tensor by its HF name; FP8 as BF16, dequantised in another way than :mod:`conversion.fp8` does."""
    stored = folder.tensors[name].read()
    scales = folder.tensors.get(name + SCALE_SUFFIX)
    if scales is None:
        return stored
    (rows, columns), bands = folder.block, []
    for band, scale in zip(torch.split(stored, rows), scales.read(), strict=True):
        spread = scale.repeat_interleave(columns)[: stored.size(1)]
        bands.append((band.float() * spread).bfloat16())  # one by one, so that no FP32 copy of the whole is made
    return torch.cat(bands)
