"""Jobs that the tests plan."""

from collections.abc import Mapping
from functools import cache
from typing import Any

from megatron_ads.architecture import shape_from_config
from megatron_ads.config.model import LoraConfig, ModelConfig, Precision, Recompute
from megatron_ads.layout import ParallelLayout, place_layers
from megatron_ads.models.parts import Lora
from megatron_ads.planning.job import PlannedJob, load_job

SMALL: dict[str, Any] = {
    "model_type": "deepseek_v3",
    "vocab_size": 1000,
    "hidden_size": 256,
    "intermediate_size": 384,
    "moe_intermediate_size": 96,
    "num_hidden_layers": 4,
    "first_k_dense_replace": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "q_lora_rank": 72,
    "kv_lora_rank": 40,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 24,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "max_position_embeddings": 512,
    "num_nextn_predict_layers": 1,
}
DENSE: dict[str, Any] = {
    "model_type": "qwen2",
    "vocab_size": 1000,
    "hidden_size": 256,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
SEQ_LENGTH = 256


def small_job(
    *,
    pipeline: str | None = None,
    precision: Precision = Precision.fp32,
    recompute: Recompute = Recompute.none,
    microbatches: int = 4,
    mtp_loss_weight: float = 0.1,
    world: int = 1,
    lora: LoraConfig | None = None,
    others: Mapping[str, Any] | None = None,
    config: Mapping[str, Any] = SMALL,
    **sizes: int,
) -> PlannedJob:
    """Return a job of a four-layer model, two of them dense, with an MTP layer; ``others`` are of the model section."""
    shape = shape_from_config(config)
    layout = ParallelLayout(world=world, **sizes)
    mtp_loss_weight *= bool(shape.mtp_layers)
    run = {"precision": precision, "recompute": recompute, "mtp_loss_weight": mtp_loss_weight}
    model = ModelConfig(**run | {"lora": lora or LoraConfig()} | dict(others or {}))
    return PlannedJob(
        shape=shape,
        layout=layout,
        placement=place_layers(shape, layout, pipeline=pipeline),
        model=model,
        seq_length=SEQ_LENGTH,
        micro_batch_size=1,
        microbatches=microbatches,
        lora=Lora.of(model),
    )


@cache
def r1_job(*overrides: str) -> PlannedJob:
    """Return the published 248-rank layout."""
    return load_job("sft/deepseek_r1_671b_248gpu", overrides)
