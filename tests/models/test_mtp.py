"""The multi-token-prediction loss on packed rows against one written with transformers' layers, sample by sample.

The reference knows nothing of packing or Megatron: for every sample it runs the decoder, then
h' = layer(eh_proj [enorm(embedding of the next token); hnorm(h)]) and scores the token after the next.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import cross_entropy, pad
from transformers import DeepseekV3ForCausalLM
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3DecoderLayer, DeepseekV3RMSNorm

from parity_tests.harness.model_jobs import Job, rows, train_pass
from parity_tests.harness.ranks import run_ranks
from tests.models.checkpoints import V3, write_checkpoint

WEIGHT = 0.3
TOLERANCE = 1e-5
"""Relative to the largest value of the gradient: two implementations in FP32."""
_OURS_TO_HF = {
    "embedding.word_embeddings.weight": "model.embed_tokens.weight",
    "output_layer.weight": "lm_head.weight",
    "decoder.final_layernorm.weight": "model.norm.weight",
    "decoder.layers.0.self_attention.linear_kv_up_proj.weight": "model.layers.0.self_attn.kv_b_proj.weight",
    "decoder.layers.3.mlp.router.weight": "model.layers.3.mlp.gate.weight",
    "mtp.layers.0.eh_proj.weight": "eh_proj",
    "mtp.layers.0.enorm.weight": "enorm.weight",
    "mtp.layers.0.hnorm.weight": "hnorm.weight",
    "mtp.layers.0.final_layernorm.weight": "norm.weight",
    "mtp.layers.0.transformer_layer.mlp.router.weight": "layer.mlp.gate.weight",
    "mtp.layers.0.transformer_layer.self_attention.linear_proj.weight": "layer.self_attn.o_proj.weight",
}


class Reference(torch.nn.Module):
    """The MTP layer of a checkpoint in transformers' terms, with the model it belongs to."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.model = DeepseekV3ForCausalLM.from_pretrained(folder, dtype=torch.float32)
        config = self.model.config
        self.layer = DeepseekV3DecoderLayer(config, config.num_hidden_layers)
        self.enorm, self.hnorm, self.norm = (
            DeepseekV3RMSNorm(config.hidden_size, eps=config.rms_norm_eps) for _ in range(3)
        )
        prefix = f"model.layers.{config.num_hidden_layers}."
        stored = load_file(folder / "model.safetensors")
        own = {name.removeprefix(prefix): value for name, value in stored.items() if name.startswith(prefix)}
        self.eh_proj = torch.nn.Parameter(own["eh_proj.weight"])
        norms = {"enorm": "enorm", "hnorm": "hnorm", "norm": "shared_head.norm"}
        for ours, theirs in norms.items():
            getattr(self, ours).weight.data.copy_(own[f"{theirs}.weight"])
        self.layer.load_state_dict({name: own[name] for name in own if not _is_expert(name)}, strict=False)
        _fuse_experts(self.layer.mlp.experts, own)

    def losses(self, tokens_L: Tensor, labels_L: Tensor, mask_L: Tensor) -> tuple[Tensor, Tensor]:
        """Return the sums of the main and of the multi-token loss over one sample."""
        hidden = self.model.model(tokens_L[None]).last_hidden_state
        main = cross_entropy(self.model.lm_head(hidden)[0], labels_L, reduction="none") @ mask_L
        nexts = pad(tokens_L[1:], (0, 1))
        joined = torch.cat([self.enorm(self.model.model.embed_tokens(nexts[None])), self.hnorm(hidden)], dim=-1)
        positions = torch.arange(len(tokens_L))[None]
        length = len(tokens_L)
        output = self.layer(
            joined @ self.eh_proj.t(),
            attention_mask=torch.full((1, 1, length, length), -torch.inf).triu(1),
            position_embeddings=self.model.model.rotary_emb(hidden, positions),
        )
        logits = self.model.lm_head(self.norm(output if isinstance(output, Tensor) else output[0]))[0]
        after_next = cross_entropy(logits, pad(labels_L[1:], (0, 1)), reduction="none") @ pad(mask_L[1:], (0, 1))
        return main, after_next


def _is_expert(name: str) -> bool:
    return ".experts." in name and "shared" not in name


def _fuse_experts(experts: Any, own: dict[str, Tensor]) -> None:
    for index in range(experts.num_experts):
        gate, up, down = (own[f"mlp.experts.{index}.{name}_proj.weight"] for name in ("gate", "up", "down"))
        experts.gate_up_proj.data[index].copy_(torch.cat([gate, up]))
        experts.down_proj.data[index].copy_(down)


def _reference_gradients(folder: Path, weight: float) -> dict[str, Tensor]:
    reference = Reference(folder)
    total, count = torch.zeros(()), torch.zeros(())
    for row in rows(V3["vocab_size"]):
        lengths = row["boundaries"].diff().tolist()
        for tokens, labels, mask in zip(*(row[k][0].split(lengths) for k in ("tokens", "labels", "mask")), strict=True):
            main, after_next = reference.losses(tokens, labels, mask)
            total = total + main + weight * after_next
            count += mask.sum()
    (total / count).backward()
    names = {name.removeprefix("model."): parameter for name, parameter in reference.named_parameters()}
    return {ours: names[theirs].grad for ours, theirs in _OURS_TO_HF.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("mtp") / "hf", V3)


def _largest_error(folder: Path, weight: float) -> float:
    (ours,) = run_ranks(1, train_pass, Job(folder=folder, settings={"mtp_loss_weight": WEIGHT}))
    expected = _reference_gradients(folder, weight)
    return max(float((ours.grads[name] - grad).abs().max() / grad.abs().max()) for name, grad in expected.items())


def test_gradients_with_multi_token_prediction_equal_the_reference(folder: Path) -> None:
    assert _largest_error(folder, WEIGHT) < TOLERANCE


def test_another_loss_weight_is_seen(folder: Path) -> None:
    assert _largest_error(folder, WEIGHT * 1.01) > 100 * TOLERANCE


def test_without_a_loss_weight_mtp_is_carried_along_untrained(folder: Path) -> None:
    (ours,) = run_ranks(1, train_pass, Job(folder=folder, settings={"mtp_loss_weight": 0.0}))
    assert not any(name.startswith("mtp.") for name in ours.grads)
    expected = _reference_gradients(folder, 0.0)
    compared = [name for name in expected if not name.startswith("mtp.")]
    assert len(compared) == 5
    for name in compared:
        error = (ours.grads[name] - expected[name]).abs().max() / expected[name].abs().max()
        assert float(error) < TOLERANCE, name
