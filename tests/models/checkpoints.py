"""Small random checkpoints of each model family in the shape that its published ``config.json`` has."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from parity_tests.harness.hf_checkpoints import V2_LITE as _V2_LITE
from parity_tests.harness.hf_checkpoints import V3 as _V3
from parity_tests.harness.hf_checkpoints import hf_shapes

_WIDTHS: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 4,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 12,
}
V3: dict[str, Any] = _V3 | _WIDTHS | {
    "q_lora_rank": 24,
    "n_routed_experts": 64,
    "n_group": 8,
    "topk_group": 4,
    "num_experts_per_tok": 8,
}  # fmt: skip
"""DeepSeek-V3 and R1: routing numbers are the published ones, a quarter of the experts."""
V2_LITE: dict[str, Any] = _V2_LITE | _WIDTHS | {"n_routed_experts": 16, "num_experts_per_tok": 6}
"""No query low rank, softmax scores that are not normalised over the chosen ones, two shared experts."""
MOONLIGHT: dict[str, Any] = {key: value for key, value in V3.items() if key != "rope_scaling"} | {
    "q_lora_rank": None,
    "n_routed_experts": 16,
    "n_group": 1,
    "topk_group": 1,
    "num_experts_per_tok": 6,
    "n_shared_experts": 2,
    "routed_scaling_factor": 2.446,
    "first_k_dense_replace": 1,
    "rope_theta": 50000.0,
    "rms_norm_eps": 1e-05,
    "num_nextn_predict_layers": 0,
}
"""No query low rank, no groups, no YaRN, norms with another epsilon than those inside attention."""
KIMI_K2: dict[str, Any] = V3 | {
    "n_routed_experts": 48,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 2.827,
    "first_k_dense_replace": 1,
    "num_nextn_predict_layers": 0,
}
"""As V3 without groups."""


def write_checkpoint(folder: Path, config: dict[str, Any], *, seed: int = 0) -> Path:
    """Write an FP32 checkpoint with weights of realistic scale: norms near 1, the rest near 0, biases that matter."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in hf_shapes(config).items():
        noise = torch.randn(shape, generator=generator) * 0.1
        tensors[name] = 1 + noise if len(shape) == 1 and "norm" in name else noise
    for name in tensors:  # an MTP layer repeats the embedding and the output layer
        if "layers" in name and name.endswith("embed_tokens.weight"):
            tensors[name] = tensors["model.embed_tokens.weight"].clone()
        if name.endswith("shared_head.head.weight"):
            tensors[name] = tensors["lm_head.weight"].clone()
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config | {"torch_dtype": "float32"}))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
