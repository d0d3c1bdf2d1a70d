"""Read what a model looks like from a Hugging Face ``config.json``, as published or as transformers 5 writes it.

Only what is understood is accepted: a field that is unknown, unsupported or contradicts another one is an error that
names it. Standard library only.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ads.errors import ConfigError, require
from megatron_ads.json_fields import JsonFields
from megatron_ads.model_shape.deepseek import DEEPSEEK_TYPES, read_deepseek
from megatron_ads.model_shape.dense import read_llama, read_qwen2
from megatron_ads.model_shape.records import (
    GroupedQueryShape,
    LatentAttentionShape,
    Llama3Shape,
    ModelShape,
    YarnShape,
)

__all__ = [
    "DEEPSEEK_TYPES",
    "MODEL_TYPES",
    "Fp8Blocks",
    "GroupedQueryShape",
    "LatentAttentionShape",
    "Llama3Shape",
    "ModelShape",
    "YarnShape",
    "fp8_blocks",
    "read_model_shape",
    "shape_from_config",
]

_READERS: dict[str, Callable[[JsonFields], ModelShape]] = {
    **dict.fromkeys(DEEPSEEK_TYPES, read_deepseek),
    "qwen2": read_qwen2,
    "llama": read_llama,
}
MODEL_TYPES = tuple(_READERS)


@dataclass(frozen=True, kw_only=True, slots=True)
class Fp8Blocks:
    """How an FP8 checkpoint stores its matrices: e4m3 codes, one FP32 scale per block."""

    rows: int
    """Rows of a block; the last block of a matrix may have fewer."""
    columns: int
    """Columns of a block; the last may have fewer."""
    power_of_two_scales: bool
    """Scales are rounded up to powers of two (``scale_fmt: ue8m0``, DeepSeek-V3.1)."""


def read_model_shape(path: Path) -> ModelShape:
    """Read ``config.json``, given the file or the folder that holds it.

    Raises:
        ConfigError: If there is no such file, or it does not describe a supported model.
    """
    file = path / "config.json" if path.is_dir() else path
    if file.exists() and not file.is_file():  # a pipe would be waited for
        raise ConfigError(f"{file} is not a file. Give a Hugging Face checkpoint folder.")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{file} does not exist: {path} is not a Hugging Face checkpoint folder.") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{file} is not JSON ({error}); copy it again from the checkpoint's repository.") from None
    if not isinstance(config, dict):
        raise ConfigError(f"{file} holds a {type(config).__name__}, not an object with the model's settings.")
    return shape_from_config(config, file=file)


def shape_from_config(config: Mapping[str, Any], *, file: Path | None = None) -> ModelShape:
    """Build a ModelShape from a parsed ``config.json``, of the published or the transformers-5 style.

    Raises:
        ConfigError: If a field is missing, unknown, unsupported or contradicts another one; it names ``file``.
    """
    try:
        return _shape_from_config(config)
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}" if file else str(error)) from None


def _shape_from_config(config: Mapping[str, Any]) -> ModelShape:
    fields = JsonFields(config)
    shape = _READERS[fields.choice("model_type", MODEL_TYPES)](fields)
    fp8_blocks(config)
    if indexer := sorted(name for name in config if name.startswith("index_") and name in fields):
        raise ConfigError(
            f"{indexer[0]} = {config[indexer[0]]!r} is not a known field: it belongs to the sparse attention of "
            "DeepSeek-V3.2, which is not supported."
        )
    fields.refuse_unread(harmless=_HARMLESS)
    return shape


def fp8_blocks(config: Mapping[str, Any]) -> Fp8Blocks | None:
    """Return how a checkpoint's FP8 matrices are stored; None if it is not quantized.

    Raises:
        ConfigError: If it is quantized in another way.
    """
    quantization = JsonFields(config).section("quantization_config")
    if quantization is None:
        return None
    quantization.choice("quant_method", ("fp8",))
    quantization.choice("fmt", ("e4m3",), "e4m3")
    quantization.choice("activation_scheme", ("dynamic",), "dynamic")
    scale_format = quantization.choice("scale_fmt", ("float", "ue8m0"), "float")
    blocks = config["quantization_config"].get("weight_block_size")
    require(
        isinstance(blocks, list)
        and len(blocks) == 2
        and all(type(size) is int and 0 < size < 1 << 31 for size in blocks),
        f"quantization_config.weight_block_size is {blocks!r}; it must be two whole numbers, [128, 128] in DeepSeek's "
        "checkpoints.",
    )
    return Fp8Blocks(rows=blocks[0], columns=blocks[1], power_of_two_scales=scale_format == "ue8m0")


# Fields that say nothing about tensors or arithmetic of a forward pass: bookkeeping of transformers and of training.
_HARMLESS = frozenset((
    "_attn_implementation", "_name_or_path", "added_token_ids", "architectures", "auto_map", "aux_loss_alpha",
    "bos_token_id", "dtype", "eos_token_id", "ep_size", "id2label", "is_decoder", "is_encoder_decoder", "label2id",
    "output_attentions", "output_hidden_states", "output_router_logits", "pad_token_id", "pretraining_tp",
    "problem_type", "quantization_config", "return_dict", "router_aux_loss_coef", "seq_aux", "tokenizer_class",
    "torch_dtype", "transformers_version", "unsloth_fixed", "unsloth_version", "use_cache",
))  # fmt: skip
