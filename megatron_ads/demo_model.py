"""Write a small random checkpoint with tokenizer, in the form its family is published, to try things on.

    megatron-ads demo-model OUT [--preset tiny|shallow|small|dense] [--dtype bf16|fp32] [--fp8] [--seed N]
    megatron-ads demo-model OUT --preset deepseek-r1 --sparse

``tiny`` learns one task on two CPU cores within minutes, and has layers enough for every layout; ``shallow`` has fewer
layers and wider latents, and learns several tasks sooner; ``small`` is about ten times as large. These are mixtures of
experts of the DeepSeek-V3 family.
``dense`` is of another family: a small Qwen2, as DeepSeek-R1-Distill-Qwen-7B is a large one.
``deepseek-r1`` has every name, shape and file of the 671B checkpoint in sparse files that take next to no disk space.
The same preset, number format and seed give the same bytes.
"""

import argparse
import json
import math
import zlib
from collections.abc import Iterator, Mapping
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conversion.published_models import published_config
from megatron_ads.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_ads.architecture import ModelShape

BYTES_PER_FILE = 4 * 2**20
"""Small enough that the checkpoint has several files and an index, as a large one has."""


class Preset(StrEnum):
    """Size of the checkpoint."""

    tiny = "tiny"
    shallow = "shallow"
    small = "small"
    dense = "dense"
    deepseek_r1 = "deepseek-r1"


_R1 = published_config("deepseek_r1")
_TINY: dict[str, Any] = {name: value for name, value in _R1.items() if name not in ("auto_map", "quantization_config")}
_TINY |= {
    "first_k_dense_replace": 2,
    "hidden_size": 128,
    "initializer_range": 0.05,
    "intermediate_size": 256,
    "kv_lora_rank": 32,
    "max_position_embeddings": 16384,
    "moe_intermediate_size": 64,
    "n_group": 4,
    "n_routed_experts": 16,
    "num_attention_heads": 4,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 6,
    "num_key_value_heads": 4,
    "q_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "rope_scaling": _R1["rope_scaling"] | {"factor": 4},
    "topk_group": 2,
    "v_head_dim": 32,
    "vocab_size": 1536,
}
_SHALLOW = _TINY | {
    "first_k_dense_replace": 1,
    "kv_lora_rank": 96,
    "moe_intermediate_size": 128,
    "n_group": 1,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 4,
    "num_nextn_predict_layers": 0,
    "q_lora_rank": 96,
    "rope_scaling": None,
    "topk_group": 1,
}
_SMALL = _TINY | {
    "hidden_size": 384,
    "intermediate_size": 1024,
    "kv_lora_rank": 96,
    "moe_intermediate_size": 192,
    "n_routed_experts": 32,
    "num_attention_heads": 8,
    "num_hidden_layers": 8,
    "num_key_value_heads": 8,
    "q_lora_rank": 192,
    "initializer_range": 0.03,
}
_DENSE = published_config("deepseek_r1_distill_qwen_7b") | {
    "bos_token_id": 0,
    "eos_token_id": 1,
    "hidden_size": 128,
    "initializer_range": 0.05,
    "intermediate_size": 384,
    "max_position_embeddings": 16384,
    "max_window_layers": 4,
    "num_attention_heads": 8,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "vocab_size": 1536,
}
CONFIGS: Mapping[Preset, dict[str, Any]] = {
    Preset.tiny: _TINY,
    Preset.shallow: _SHALLOW,
    Preset.small: _SMALL,
    Preset.dense: _DENSE,
}
"""``config.json`` of each preset that has values."""
EMBEDDING_SPREADS: Mapping[Preset, float] = {
    Preset.tiny: 1.0,
    Preset.shallow: 0.1,
    Preset.small: 1.0,
    Preset.dense: 1.0,
}
"""Standard deviation of the embeddings of each preset.

1 is torch's own default: what the layers add is then small in comparison, and rounding grows less on its way through
the model. With narrower ones a model learns sooner, but two right FP32 implementations differ by 1e-5 in its logits.
"""

_GENERATION_CONFIG = {
    "_from_model_config": True,
    "bos_token_id": 0,
    "do_sample": True,
    "eos_token_id": 1,
    "temperature": 0.6,
    "top_p": 0.95,
    "transformers_version": "4.46.3",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write; must be empty or absent")
    parser.add_argument("--preset", type=Preset, default=Preset.tiny, choices=list(Preset), help="default: tiny")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), help="number format of the weights (default bf16)")
    parser.add_argument("--fp8", action="store_true", help="FP8 with block scales, as DeepSeek publishes V3 and R1")
    parser.add_argument("--sparse", action="store_true", help="only names, shapes and files; needed for deepseek-r1")
    parser.add_argument("--seed", type=int, default=0, help="decides the random weights (default 0)")


def run(args: argparse.Namespace) -> int:
    if args.sparse != (args.preset is Preset.deepseek_r1):
        raise ConfigError(
            "--preset deepseek-r1 has no values: give --sparse with it."
            if args.preset is Preset.deepseek_r1
            else f"--sparse goes with --preset deepseek-r1, not with {args.preset}. Leave it out."
        )
    if args.sparse:
        from conversion.sparse_r1 import write_sparse

        if args.dtype is not None or args.seed:
            raise ConfigError("--sparse writes no values, so --dtype and --seed have no effect. Leave them out.")
        write_sparse(args.out)
        print(f"{args.out}: names, shapes and files of DeepSeek-R1, without values")
        return 0
    if args.fp8 and args.dtype is not None:
        raise ConfigError(f"--fp8 and --dtype {args.dtype} are both given; choose one number format.")
    config = CONFIGS[args.preset] | {"torch_dtype": "float32" if args.dtype == "fp32" else "bfloat16"}
    spread = EMBEDDING_SPREADS[args.preset]
    parameters = write_demo_model(args.out, config, fp8=args.fp8, seed=args.seed, embedding_spread=spread)
    print(f"{args.out}: {parameters:,} parameters, {'fp8' if args.fp8 else args.dtype or 'bf16'}")
    return 0


def write_demo_model(
    out: Path, config: Mapping[str, Any], *, fp8: bool = False, seed: int = 0, embedding_spread: float = 1.0
) -> int:
    """Write a checkpoint folder with random weights; it appears when it is complete.

    Args:
        out: Must be empty or absent.
        config: A ``config.json`` of any supported model; ``torch_dtype`` decides the number format.
        fp8: Store projections inside layers in FP8 with block scales.
        embedding_spread: Standard deviation of the embeddings; that of other weights is the config's, and of
            embeddings that are the output layer too.

    Returns:
        The number of parameters, repeated tensors not counted.

    Raises:
        ConfigError: If the folder holds something, or the config describes no supported model.
    """
    from conversion.names import parameters
    from megatron_ads.architecture import shape_from_config
    from megatron_ads.data.demo_tokenizer import write_tokenizer
    from megatron_ads.data.new_folder import new_folder

    shape, written = shape_from_config(config), dict(config)
    if fp8:
        from conversion.to_hf import FP8_CONFIG

        written["quantization_config"] = FP8_CONFIG
    with new_folder(out) as folder:
        for name, content in (("config.json", written), ("generation_config.json", _GENERATION_CONFIG)):
            (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        write_tokenizer(folder, config["vocab_size"])
        _write_weights(folder, _draw_tensors(shape, config["torch_dtype"], fp8, seed, embedding_spread))
    return sum(math.prod(parameter.shape) for parameter in parameters(shape).values())


def _draw_tensors(
    shape: "ModelShape", torch_dtype: str, fp8: bool, seed: int, embedding_spread: float
) -> "Iterator[tuple[str, Tensor]]":
    """Yield every HF tensor of a checkpoint in model order, the MTP layer's repeats last.

    No norm is exactly 1 and no bias 0, so that a mix-up of tensors shows.
    """
    import torch

    from conversion.fp8 import quantize
    from conversion.hf_folder import SCALE_SUFFIX
    from conversion.names import EMBEDDING, Parameter, ParameterKind, hf_aliases, parameters

    dtype: torch.dtype = getattr(torch, torch_dtype)

    def draw(parameter: Parameter, name: str, size: tuple[int, ...]) -> torch.Tensor:
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode(), seed & 0xFFFFFFFF))
        noise = torch.randn(size, generator=generator)
        if parameter.kind is ParameterKind.ROUTER_BIAS:
            return noise * 0.01
        is_input = parameter.name == EMBEDDING and not shape.tie_word_embeddings
        spread = embedding_spread if is_input else shape.initializer_range
        if name.endswith(".bias"):
            return noise * 0.1
        return 1 + noise * 0.02 if len(size) == 1 else noise * spread

    for parameter in parameters(shape).values():
        for part in parameter.parts:
            values = draw(parameter, part.name, part.shape)
            if parameter.kind is ParameterKind.ROUTER_BIAS:
                yield part.name, values
            elif fp8 and parameter.kind is ParameterKind.LINEAR:
                codes, scales = quantize(values)
                yield from ((part.name, codes), (part.name + SCALE_SUFFIX, scales))
            else:
                yield part.name, values.to(dtype)
    for alias, canonical in hf_aliases(shape).items():
        parameter = parameters(shape)[canonical]
        yield alias, draw(parameter, parameter.parts[0].name, parameter.parts[0].shape).to(dtype)


def _write_weights(folder: Path, tensors: "Iterator[tuple[str, Tensor]]") -> None:
    """Write safetensors files of about ``BYTES_PER_FILE`` and their index."""
    from safetensors.torch import save_file

    files: list[dict[str, Tensor]] = [{}]
    filled = total = 0
    for name, tensor in tensors:
        if filled and filled + tensor.nbytes > BYTES_PER_FILE:
            files.append({})
            filled = 0
        files[-1][name] = tensor.contiguous()
        filled += tensor.nbytes
        total += tensor.nbytes
    weight_map: dict[str, str] = {}
    for number, content in enumerate(files, 1):
        file = f"model-{number:05d}-of-{len(files):06d}.safetensors"
        save_file(content, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(content, file)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")
