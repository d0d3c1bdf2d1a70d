"""Small random Hugging Face checkpoints, written with torch and safetensors alone; the DeepSeek family's configs."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from parity_tests.harness.dense_checkpoints import dense_shapes, is_dense
from parity_tests.harness.fp8_reference import quantize

V3: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 32,
    "moe_intermediate_size": 8,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_shared_experts": 1,
    "n_routed_experts": 8,
    "routed_scaling_factor": 2.5,
    "kv_lora_rank": 8,
    "q_lora_rank": 12,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "qk_nope_head_dim": 8,
    "n_group": 4,
    "topk_group": 2,
    "num_experts_per_tok": 4,
    "first_k_dense_replace": 2,
    "norm_topk_prob": True,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "hidden_act": "silu",
    "max_position_embeddings": 1024,
    "num_nextn_predict_layers": 1,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000.0,
    "rope_scaling": {
        "type": "yarn",
        "factor": 4.0,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 256,
    },
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
"""Two dense and two MoE layers and an MTP layer; group-limited routing."""

V2_LITE: dict[str, Any] = V3 | {
    "architectures": ["DeepseekV2ForCausalLM"],
    "model_type": "deepseek_v2",
    "q_lora_rank": None,
    "num_nextn_predict_layers": 0,
    "first_k_dense_replace": 1,
    "n_shared_experts": 2,
    "scoring_func": "softmax",
    "topk_method": "greedy",
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": False,
    "routed_scaling_factor": 1.0,
}
"""No query low rank, no router bias, two shared experts, no MTP layer."""

EDGE: dict[str, Any] = V3 | {
    "hidden_size": 192,
    "intermediate_size": 320,
    "moe_intermediate_size": 136,
    "kv_lora_rank": 128,
    "q_lora_rank": 144,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
    "n_routed_experts": 8,
}
"""Widths that leave partial 128 x 128 blocks: kv_a_proj_with_mqa has 144 rows, hidden is one block and a half."""


def hf_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return every HF tensor of a config with its shape, repeats included, written down apart from the product."""
    if is_dense(config):
        return dense_shapes(config)
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    nope, rope, value = config["qk_nope_head_dim"], config["qk_rope_head_dim"], config["v_head_dim"]
    kv, q = config["kv_lora_rank"], config["q_lora_rank"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], hidden)}
    mtp = config["num_nextn_predict_layers"]
    for layer in range(config["num_hidden_layers"] + mtp):
        p = f"model.layers.{layer}."
        shapes[p + "input_layernorm.weight"] = shapes[p + "post_attention_layernorm.weight"] = (hidden,)
        if q is None:
            shapes[p + "self_attn.q_proj.weight"] = (heads * (nope + rope), hidden)
        else:
            shapes[p + "self_attn.q_a_proj.weight"] = (q, hidden)
            shapes[p + "self_attn.q_a_layernorm.weight"] = (q,)
            shapes[p + "self_attn.q_b_proj.weight"] = (heads * (nope + rope), q)
        shapes[p + "self_attn.kv_a_proj_with_mqa.weight"] = (kv + rope, hidden)
        shapes[p + "self_attn.kv_a_layernorm.weight"] = (kv,)
        shapes[p + "self_attn.kv_b_proj.weight"] = (heads * (nope + value), kv)
        shapes[p + "self_attn.o_proj.weight"] = (hidden, heads * value)
        blocks = [("mlp", config["intermediate_size"])]
        if layer >= config["first_k_dense_replace"]:
            width = config["moe_intermediate_size"]
            blocks = [(f"mlp.experts.{expert}", width) for expert in range(config["n_routed_experts"])]
            blocks.append(("mlp.shared_experts", width * config["n_shared_experts"]))
            shapes[p + "mlp.gate.weight"] = (config["n_routed_experts"], hidden)
            if config["topk_method"] == "noaux_tc":
                shapes[p + "mlp.gate.e_score_correction_bias"] = (config["n_routed_experts"],)
        for block, width in blocks:
            shapes[p + block + ".gate_proj.weight"] = shapes[p + block + ".up_proj.weight"] = (width, hidden)
            shapes[p + block + ".down_proj.weight"] = (hidden, width)
        if layer >= config["num_hidden_layers"]:
            for name in ("enorm", "hnorm", "shared_head.norm"):
                shapes[p + name + ".weight"] = (hidden,)
            shapes[p + "eh_proj.weight"] = (hidden, 2 * hidden)
            shapes[p + "embed_tokens.weight"] = shapes[p + "shared_head.head.weight"] = (config["vocab_size"], hidden)
    shapes["model.norm.weight"] = (hidden,)
    shapes["lm_head.weight"] = (config["vocab_size"], hidden)
    return shapes


def is_fp8_weight(name: str) -> bool:
    """Whether DeepSeek publishes this tensor in FP8."""
    return ("_proj" in name and "eh_proj" not in name) and name.endswith(".weight")


def random_tensors(config: dict[str, Any], dtype: torch.dtype, seed: int = 0) -> dict[str, torch.Tensor]:
    """Return random values for every tensor; repeats equal what they repeat; the router bias is FP32."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in hf_shapes(config).items():
        values = torch.randn(shape, generator=generator) * 0.1
        tensors[name] = values if name.endswith("e_score_correction_bias") else values.to(dtype)
    for name in tensors:
        if name.endswith(".embed_tokens.weight") and "layers" in name:
            tensors[name] = tensors["model.embed_tokens.weight"].clone()
        if name.endswith("shared_head.head.weight"):
            tensors[name] = tensors["lm_head.weight"].clone()
    return tensors


def to_fp8(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Quantise as published: codes and ``weight_scale_inv``."""
    result = {}
    for name, tensor in tensors.items():
        if is_fp8_weight(name):
            result[name], result[name + "_scale_inv"] = quantize(tensor.float())
        else:
            result[name] = tensor
    return result


def write_hf(folder: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor], *, files: int = 1) -> Path:
    """Write a checkpoint folder with side files; with ``files`` > 1 the tensors are dealt round robin.

    Dealing by name puts most scales into another file than their weight.
    """
    folder.mkdir(parents=True)
    fp8 = any(name.endswith("_scale_inv") for name in tensors)
    written = dict(config)
    if "torch_dtype" in config:
        written["torch_dtype"] = str(tensors["model.embed_tokens.weight"].dtype).removeprefix("torch.")
    if fp8:
        written["quantization_config"] = {
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "quant_method": "fp8",
            "weight_block_size": [128, 128],
        }
    (folder / "config.json").write_text(json.dumps(written, indent=2))
    (folder / "generation_config.json").write_text('{"temperature": 0.6, "do_sample": true}')
    (folder / "tokenizer.json").write_text('{"model": {"type": "BPE"}}')
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "modeling_deepseek.py").write_text("# custom code\n")
    if files == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    names = sorted(tensors)
    weight_map = {}
    for index in range(files):
        file = f"model-{index + 1:05d}-of-{files:06d}.safetensors"
        mine = {name: tensors[name] for name in names[index::files]}
        save_file(mine, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(mine, file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    index_text = json.dumps({"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})
    (folder / "model.safetensors.index.json").write_text(index_text)
    return folder


def fp8_checkpoint(folder: Path, config: dict[str, Any] = EDGE, *, files: int = 3, seed: int = 0) -> Path:
    """Write a random FP8 checkpoint."""
    return write_hf(folder, config, to_fp8(random_tensors(config, torch.bfloat16, seed)), files=files)


def bf16_checkpoint(folder: Path, config: dict[str, Any] = V3, *, files: int = 1, seed: int = 0) -> Path:
    """Write a random BF16 checkpoint."""
    return write_hf(folder, config, random_tensors(config, torch.bfloat16, seed), files=files)
