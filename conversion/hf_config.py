"""What ``config.json`` says about stored weights, dtype and quantization, and what is true."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from conversion.fp8 import BLOCK
from conversion.hf_folder import SCALE_SUFFIX, HfFolder
from conversion.names import DERIVED_BUFFER
from megatron_ads.architecture import fp8_blocks

FP8_CONFIG = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": list(BLOCK)}
"""``quantization_config`` as DeepSeek publishes it."""
_DTYPE_FIELDS = ("dtype", "torch_dtype")
_LISTS_OF_UNQUANTIZED = ("modules_to_not_convert", "ignored_layers")
_MANTISSA = 0x7FFFFF
"""Of an FP32 number; 0 in a power of two."""


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
    nbytes: dict[torch.dtype, int] = {torch.bfloat16: 0}
    for name, (dtype, size) in stored.items():
        always_fp32 = name.endswith((SCALE_SUFFIX, "e_score_correction_bias")) or DERIVED_BUFFER.fullmatch(name)
        if dtype is not torch.float8_e4m3fn and not always_fp32:
            nbytes[dtype] = nbytes.get(dtype, 0) + size
    return str(max(nbytes, key=lambda dtype: nbytes[dtype])).removeprefix("torch.")


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
                yield (
                    "quantization_config.scale_fmt",
                    f"ue8m0, but {name} in {stored.file} has scales between powers of two",
                )
                return
