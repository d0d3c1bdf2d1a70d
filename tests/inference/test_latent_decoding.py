from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from megatron_ads.inference.language_model import RunningRows
from megatron_ads.inference.latent_decoding import attend_to_latents

PAD = 0
PROMPTS = ([5, 6, 7], [9], [3, 1, 4, 1, 5])
ROUNDING = 1e-5
"""FP32 logits of about 1; summed in another order."""


def _load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


@torch.inference_mode()
def _logits_after(model: Any, tokens: list[int]) -> Tensor:
    return model(torch.tensor([tokens])).logits[0, -1]  # type: ignore[no-any-return]


@torch.inference_mode()
def test_logits_of_prompts_and_of_each_further_token_are_those_of_transformers(random_model: Path) -> None:
    plain, fast = _load(random_model), _load(random_model)
    attend_to_latents(fast)
    rows = RunningRows(fast, PROMPTS, PAD)
    written = [list(prompt) for prompt in PROMPTS]
    # The second step reverses the rows, the third leaves two of them out.
    for order, tokens in (([0, 1, 2], [8, 2, 6]), ([2, 1, 0], [1, 7, 3]), ([2], [4])):
        for row, text in enumerate(written):
            torch.testing.assert_close(rows.logits_RV[row], _logits_after(plain, text), rtol=0, atol=ROUNDING)
        rows.go_on(order, tokens)
        written = [[*written[row], token] for row, token in zip(order, tokens, strict=True)]
    torch.testing.assert_close(rows.logits_RV[0], _logits_after(plain, written[0]), rtol=0, atol=ROUNDING)


@torch.inference_mode()
def test_a_further_token_expands_no_latents(random_model: Path) -> None:
    model = _load(random_model)
    attend_to_latents(model)
    expanded: list[int] = []
    for layer in model.model.layers:
        layer.self_attn.kv_b_proj.register_forward_hook(lambda _module, arguments, _output: expanded.append(1))
    rows = RunningRows(model, PROMPTS, PAD)
    assert len(expanded) == len(model.model.layers)
    rows.go_on([0, 1, 2], [8, 2, 6])
    assert len(expanded) == len(model.model.layers)


def test_a_model_without_latent_attention_is_left_alone() -> None:
    config = LlamaConfig(vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    model = LlamaForCausalLM(config)
    before = model.config._attn_implementation
    attend_to_latents(model)
    assert model.config._attn_implementation == before


def test_quantised_projections_are_left_alone(random_model: Path) -> None:
    class Quantised(nn.Linear):
        """Its weight is not what it multiplies with."""

    model = _load(random_model)
    before = model.config._attn_implementation
    attention = model.model.layers[0].self_attn
    attention.kv_b_proj = Quantised(attention.kv_b_proj.in_features, attention.kv_b_proj.out_features, bias=False)
    attend_to_latents(model)
    assert model.config._attn_implementation == before
