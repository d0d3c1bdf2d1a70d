"""The weights that a job started from, swapped in and out of a model that has been trained since."""

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ads.config.model import LoraConfig
from megatron_ads.layout import ParallelLayout, rank
from parity_tests.harness.ranks import run_ranks
from parity_tests.harness.training_jobs import Recipe, run_steps, start
from tests.models.checkpoints import V3, write_checkpoint
from tests.training.test_step import SEQ_LENGTH, samples


def _log_probabilities(model: Any, layout: ParallelLayout) -> list[float]:
    from megatron_ads.data.batches import ReplicaShare
    from megatron_ads.training.step import run_log_probabilities

    share = ReplicaShare(4, 1, layout.coordinates(rank()).dp, layout.dp)
    found = run_log_probabilities(samples(), share, model.chunks, seq_length=SEQ_LENGTH)
    return [value for row in found for value in row.tolist()]


def _state(model: Any) -> list[torch.Tensor]:
    return [tensor.clone() for chunk in model.models for tensor in (*chunk.parameters(), *chunk.buffers())]


def _swapped(recipe: Recipe) -> tuple[dict[str, list[float]], bool, bool, int]:
    """Train from the reference; return log-probabilities by moment, and whether each swap was bit-exact."""
    from megatron_ads.training.reference import ReferenceWeights

    model, shards, _ = start(recipe)
    reference, initial = ReferenceWeights(model), _state(model)
    found = {"initial": _log_probabilities(model, shards.layout)}
    run_steps(model, shards, 0, 2)
    trained = _state(model)
    found["trained"] = _log_probabilities(model, shards.layout)
    with reference.in_place():
        found["reference"] = _log_probabilities(model, shards.layout)
        is_initial = all(map(torch.equal, initial, _state(model)))
    is_trained = all(map(torch.equal, trained, _state(model)))
    found["behind"] = _log_probabilities(model, shards.layout)
    run_steps(model, shards, 2, 1)  # the optimizer's views of the weights are still theirs
    found["trained on"] = _log_probabilities(model, shards.layout)
    return found, is_initial, is_trained, reference.host_bytes


MODELS: dict[str, dict[str, Any]] = {
    "fp32": {"expert_bias_update_rate": 0.01},
    "bf16": {"precision": "bf16"},
    "lora": {"lora": LoraConfig(rank=4, alpha=8)},
}


@pytest.mark.parametrize("name", MODELS)
def test_the_reference_is_the_model_at_the_start_and_the_swap_leaves_no_trace(name: str, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "v3", V3)
    recipe = Recipe(folder=folder, layout={"pp": 2}, model=MODELS[name])
    ranks = run_ranks(2, _swapped, recipe)
    for found, is_initial, is_trained, held in ranks:
        assert found["reference"] == found["initial"]
        assert found["behind"] == found["trained"]
        assert len({tuple(found[moment]) for moment in ("initial", "trained", "trained on")}) == 3
        assert is_trained
        assert is_initial == (held > 0) == (name != "lora")  # adapters are switched off, not swapped
