from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from megatron_ads.errors import ConversionError
from megatron_ads.evaluation.greedy import GreedyGenerator, left_padded

PAD = 0
PROMPTS = ([5, 6, 7], [9], [3, 1, 4, 1, 5], [8, 8])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer DeepSeek-V3, one layer dense and one with experts."""
    config = DeepseekV3Config(
        vocab_size=32, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, n_shared_experts=1, n_routed_experts=4, n_group=2, topk_group=1,
        num_experts_per_tok=2, first_k_dense_replace=1, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8,
        qk_nope_head_dim=8, v_head_dim=8, initializer_range=0.3, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(3)
    path = tmp_path_factory.mktemp("model")
    DeepseekV3ForCausalLM(config).save_pretrained(path)
    return path


def _one_by_one(folder: Path, prompt: list[int], new_tokens: int) -> list[int]:
    """Greedy decoding without batch, padding or cache: the whole sequence again for every token."""
    model = DeepseekV3ForCausalLM.from_pretrained(folder).eval()
    tokens = list(prompt)
    with torch.inference_mode():
        for _ in range(new_tokens):
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


def test_batched_generation_equals_one_by_one(folder: Path) -> None:
    generator = GreedyGenerator(folder, end_token=31, pad_token=PAD)
    completions = generator.complete(PROMPTS, max_new_tokens=6, batch_size=3)
    for prompt, completion in zip(PROMPTS, completions, strict=True):
        expected = _one_by_one(folder, list(prompt), 6)
        assert completion.tokens == (expected[: expected.index(31)] if 31 in expected else expected)


def test_generation_stops_at_the_end_token(folder: Path) -> None:
    first, second, third, *_ = _one_by_one(folder, [5, 6, 7], 3)
    assert third not in (first, second)  # or this prompt could not show where it stops
    (stopped,) = GreedyGenerator(folder, end_token=third, pad_token=PAD).complete([[5, 6, 7]], max_new_tokens=6)
    assert (stopped.tokens, stopped.ended) == ([first, second], True)
    (cut_off,) = GreedyGenerator(folder, end_token=third, pad_token=PAD).complete([[5, 6, 7]], max_new_tokens=2)
    assert (cut_off.tokens, cut_off.ended) == ([first, second], False)


def test_padding_is_on_the_left_and_masked() -> None:
    tokens_BS, mask_BS = left_padded([[7], [8, 9]], PAD)
    assert tokens_BS.tolist() == [[PAD, 7], [8, 9]]
    assert mask_BS.tolist() == [[0, 1], [1, 1]]


def test_a_folder_that_is_no_checkpoint_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match="transformers cannot load"):
        GreedyGenerator(tmp_path, end_token=1, pad_token=0)


def test_weights_that_are_missing_are_not_made_up(folder: Path, tmp_path: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(ConversionError, match=r"lacks 1 weights .* model\.norm\.weight"):
        GreedyGenerator(tmp_path, end_token=1, pad_token=0)
