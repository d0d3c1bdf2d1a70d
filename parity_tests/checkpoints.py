"""Tiny random checkpoints with the proportions that decide the arithmetic: the published routing, MLA and YaRN numbers.

Only widths and the number of layers are small. Weights are drawn so that logits are of order 1, norms differ from 1
and router biases move the selection.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from parity_tests.harness.dense_checkpoints import LLAMA as LLAMA_FIELDS
from parity_tests.harness.dense_checkpoints import QWEN2 as QWEN2_FIELDS
from parity_tests.harness.hf_checkpoints import V2_LITE as V2_LITE_FIELDS
from parity_tests.harness.hf_checkpoints import V3 as V3_FIELDS
from parity_tests.harness.hf_checkpoints import hf_shapes

ORIGINAL_CONTEXT = 128
"""Positions of the original context; sequences of ``BEYOND_CONTEXT`` tokens go past it, where YaRN matters most."""
BEYOND_CONTEXT = 192

_WIDTHS: dict[str, Any] = {
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 4,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 24,
    "v_head_dim": 20,
    "max_position_embeddings": 40 * ORIGINAL_CONTEXT,
}
_YARN = {
    "type": "yarn",
    "factor": 40.0,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "original_max_position_embeddings": ORIGINAL_CONTEXT,
}
V3: dict[str, Any] = V3_FIELDS | _WIDTHS | {
    "q_lora_rank": 48,
    "n_routed_experts": 256,
    "n_group": 8,
    "topk_group": 4,
    "num_experts_per_tok": 8,
    "rope_scaling": _YARN,
}  # fmt: skip
"""DeepSeek-V3 and R1: 8 of 256 experts from 4 of 8 groups, low-rank queries, YaRN by 40, one MTP layer."""
V2_LITE: dict[str, Any] = V2_LITE_FIELDS | _WIDTHS | {
    "n_routed_experts": 64,
    "num_experts_per_tok": 6,
    "rope_scaling": _YARN | {"mscale": 0.707, "mscale_all_dim": 0.707},
}  # fmt: skip
"""DeepSeek-V2-Lite: softmax scores that are not normalised, no query low rank, two shared experts."""
MOONLIGHT: dict[str, Any] = {key: value for key, value in V3.items() if key != "rope_scaling"} | {
    "q_lora_rank": None,
    "n_routed_experts": 64,
    "n_group": 1,
    "topk_group": 1,
    "num_experts_per_tok": 6,
    "n_shared_experts": 2,
    "routed_scaling_factor": 2.446,
    "rope_theta": 50000.0,
    "rms_norm_eps": 1e-05,
    "num_nextn_predict_layers": 0,
}
"""Moonlight-16B-A3B: no groups, no YaRN, and norms whose epsilon differs from that of the latent norms."""
MIXTURES = {"v3": V3, "v2-lite": V2_LITE, "moonlight": MOONLIGHT}

_DENSE_WIDTHS: dict[str, Any] = {"vocab_size": 160, "hidden_size": 64, "intermediate_size": 96}
QWEN2: dict[str, Any] = QWEN2_FIELDS | _DENSE_WIDTHS
"""Qwen2.5 and what is distilled into it: biases of queries, keys and values, four query heads a key-value head."""
LLAMA: dict[str, Any] = LLAMA_FIELDS | _DENSE_WIDTHS
"""Llama 3.1: positions scaled by 8 beyond the original context."""
DENSE = {
    "qwen2": QWEN2,
    "qwen2-tied": QWEN2 | {"tie_word_embeddings": True},
    "llama": LLAMA,
    "llama-tied": LLAMA | {"tie_word_embeddings": True, "attention_bias": True, "num_key_value_heads": 4},
}
"""With a head of their own, as the models of 7 B and more, and tied to the embedding, as the smaller ones.

The last one also has the four biases that Llama's config may ask for, and as many key heads as query heads.
"""
FAMILIES = MIXTURES | DENSE

SMALL_V3 = V3 | {"n_routed_experts": 64}
"""For the rungs that run many passes: a quarter of the experts, everything else the same."""


def write_checkpoint(folder: Path, config: dict[str, Any], *, seed: int = 0) -> Path:
    """Write an FP32 checkpoint of ``config``; the repeats of the MTP layer equal what they repeat."""
    generator = torch.Generator().manual_seed(seed)
    embedding = 0.1 if config["tie_word_embeddings"] else 0.02
    tensors = {name: _draw(name, shape, generator, embedding) for name, shape in hf_shapes(config).items()}
    for name in tensors:
        if "layers" in name and name.endswith("embed_tokens.weight"):
            tensors[name] = tensors["model.embed_tokens.weight"].clone()
        if name.endswith("shared_head.head.weight"):
            tensors[name] = tensors["lm_head.weight"].clone()
    return _write(folder, config, tensors)


def _draw(name: str, shape: tuple[int, ...], generator: torch.Generator, embedding: float) -> Tensor:
    noise = torch.randn(shape, generator=generator)
    if len(shape) == 1 and "norm" in name:
        return 1 + 0.1 * noise
    # The published models' embedding is small, so that the epsilon of the first norm is felt; not where it is the head.
    return noise * (embedding if "embed_tokens" in name else 0.1)


def altered_copy(
    source: Path,
    target: Path,
    *,
    config: dict[str, Any] | None = None,
    weights: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None,
) -> Path:
    """Write ``source`` again with fields of its config replaced, or its tensors passed through ``weights``."""
    fields = json.loads((source / "config.json").read_text()) | (config or {})
    tensors = load_file(source / "model.safetensors")
    if weights is not None:
        tensors = {name: tensor.contiguous() for name, tensor in weights(tensors).items()}
    return _write(target, fields, tensors)


def _write(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config | {"torch_dtype": "float32"}, indent=2))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
