"""Rotary frequencies of dense models against independent implementations, and what stock Megatron-Core lacks."""

import inspect
from typing import Any

import pytest
import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from megatron_ads.architecture import shape_from_config
from megatron_ads.models.grouped_query import rotary_angles, rotary_frequencies
from tests.published import published

LLAMA = "deepseek_r1_distill_llama_8b"


def _of_transformers(config: dict[str, Any]) -> torch.Tensor:
    frequencies, factor = ROPE_INIT_FUNCTIONS["llama3"](LlamaConfig(**config), torch.device("cpu"))
    assert factor == 1.0
    return frequencies


@pytest.mark.parametrize("scaling", [{}, {"factor": 32.0, "original_max_position_embeddings": 512}])
def test_scaled_frequencies_are_those_of_transformers(scaling: dict[str, float]) -> None:
    config = published(LLAMA)
    config["rope_scaling"] |= scaling
    torch.testing.assert_close(
        rotary_frequencies(shape_from_config(config)), _of_transformers(config), rtol=1e-6, atol=0
    )


def test_stock_frequencies_are_ours_with_the_numbers_of_llama_3_1() -> None:
    stock = RotaryEmbedding(128, 1.0, rotary_base=500000, rope_scaling=True, use_cpu_initialization=True)
    torch.testing.assert_close(stock.inv_freq, rotary_frequencies(shape_from_config(published(LLAMA))))


def test_stock_megatron_still_takes_no_other_numbers() -> None:
    # When it does, GPTModel can make the frequencies: see models/build.py.
    assert "low_freq_factor" not in inspect.signature(RotaryEmbedding.__init__).parameters


def test_angles_grow_by_the_frequency_with_each_position() -> None:
    config = published(LLAMA, rope_scaling=None, rope_theta=100.0, head_dim=4)
    angles_SD = rotary_angles(shape_from_config(config), 3, torch.device("cpu"))[:, 0, 0]
    # two pairs of channels: 100^0 = 1 and 100^(-1/2) = 0.1, each for both halves of a head
    torch.testing.assert_close(angles_SD, torch.arange(3)[:, None] * torch.tensor([1.0, 0.1, 1.0, 0.1]))
