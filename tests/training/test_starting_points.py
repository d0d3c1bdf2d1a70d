"""Training starts from a Hugging Face folder, FP8 included, from converted shards or from torch_dist: the same bits."""

from pathlib import Path

import pytest
import torch

from megatron_ads.cli import main
from parity_tests.harness.hf_checkpoints import fp8_checkpoint
from parity_tests.harness.ranks import run_ranks
from parity_tests.harness.training_jobs import Recipe, start

LAYOUT = {"pp": 2, "ep": 2}
SAME_LAYOUT = ["--pp", "2", "--ep", "2"]
CONVERSIONS = {
    "shards of the job's layout": SAME_LAYOUT,
    "shards of another layout": ["--ep", "4"],
    "torch_dist": ["--format", "torch_dist"],
}


def _loaded(recipe: Recipe) -> dict[str, torch.Tensor]:
    from megatron_ads.training.export import canonical_weights

    model, _, _ = start(recipe)
    return canonical_weights(model.models, model.spec)


@pytest.fixture(scope="module")
def hf(tmp_path_factory) -> Path:
    return fp8_checkpoint(tmp_path_factory.mktemp("source") / "hf")


@pytest.fixture(scope="module")
def straight(hf) -> list[dict[str, torch.Tensor]]:
    """The weights of every rank, streamed from the HF folder."""
    return run_ranks(4, _loaded, Recipe(folder=hf, layout=LAYOUT, model={"precision": "bf16"}))


@pytest.mark.parametrize("name", CONVERSIONS)
def test_a_converted_folder_loads_the_same_bits(name, hf, straight, tmp_path):
    assert main(["convert", "to-megatron", str(hf), str(tmp_path / "out"), *CONVERSIONS[name]]) == 0
    converted = run_ranks(4, _loaded, Recipe(folder=tmp_path / "out", layout=LAYOUT, model={"precision": "bf16"}))
    for mine, theirs in zip(converted, straight, strict=True):
        assert mine.keys() == theirs.keys()
        for weight, value in theirs.items():
            assert torch.equal(mine[weight], value), weight


def test_the_router_bias_stays_fp32(straight):
    biases = [value for weights in straight for name, value in weights.items() if name.endswith("expert_bias")]
    assert biases
    assert all(bias.dtype is torch.float32 for bias in biases)
