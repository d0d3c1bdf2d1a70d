"""Tensors of a running job under their Hugging Face names, on the ranks that feed an engine, and what that takes."""

from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from conversion.names import parameters
from conversion.sources import open_source
from megatron_ads.config.model import LoraConfig
from megatron_ads.errors import ConfigError
from parity_tests.checkpoints import DENSE
from parity_tests.harness.ranks import run_ranks
from parity_tests.harness.training_jobs import Recipe, start
from tests.models.checkpoints import V2_LITE, V3, write_checkpoint
from tests.training.live_bytes import LiveBytes

LAYOUTS: dict[str, tuple[int, dict[str, Any], tuple[int, ...]]] = {
    "pp2-ep2-every-rank": (4, {"pp": 2, "ep": 2}, (0, 1, 2, 3)),
    "pp2-ep2-two-ranks": (4, {"pp": 2, "ep": 2}, (1, 3)),
    "tp2-ep2-rank-1": (2, {"tp": 2, "ep": 2}, (1,)),
    "tp2-etp2-rank-0": (2, {"tp": 2, "etp": 2}, (0,)),
    "pp2-vpp2-every-rank": (2, {"pp": 2, "vpp": 2}, (0, 1)),
}
SMALL_BUCKET_BYTES = 1 << 14


def _collect(recipe: Recipe, destinations: tuple[int, ...]) -> dict[str, torch.Tensor]:
    from megatron_ads.training.weight_sync import WeightSync

    model, shards, source = start(recipe)
    sync = WeightSync(shards, source, destinations=destinations, bucket_bytes=SMALL_BUCKET_BYTES)
    return {name: tensor.clone() for name, tensor in sync.tensors(model.models, model.spec)}


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_destination_gets_every_tensor_of_the_source_bit_by_bit_and_no_other_rank_any(
    name: str, tmp_path: Path
) -> None:
    folder = write_checkpoint(tmp_path / "v3", V3)
    world, layout, destinations = LAYOUTS[name]
    stored = open_source(folder).container.tensors  # type: ignore[attr-defined]
    for rank, tensors in enumerate(run_ranks(world, _collect, Recipe(folder=folder, layout=layout), destinations)):
        assert tensors.keys() == (stored.keys() if rank in destinations else set())
        for hf_name, tensor in tensors.items():
            assert torch.equal(tensor, stored[hf_name].read()), hf_name


def test_a_model_without_low_rank_queries_comes_out_whole(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "lite", V2_LITE)
    stored = open_source(folder).container.tensors  # type: ignore[attr-defined]
    (tensors,) = run_ranks(1, _collect, Recipe(folder=folder), (0,))
    assert tensors.keys() == stored.keys()


def test_joined_queries_keys_and_values_and_a_tied_head_come_out_as_stored(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "tied", DENSE["qwen2-tied"])
    stored = open_source(folder).container.tensors  # type: ignore[attr-defined]
    recipe = Recipe(folder=folder, layout={"pp": 2, "tp": 2})
    tensors = run_ranks(4, _collect, recipe, (2,))[2]
    assert tensors.keys() == stored.keys()
    for hf_name, tensor in tensors.items():
        assert torch.equal(tensor, stored[hf_name].read()), hf_name


def _share_read_in_place(recipe: Recipe, destinations: tuple[int, ...]) -> float:
    from megatron_ads.training.weight_sync import WeightSync

    model, shards, source = start(recipe)
    own = {tensor.untyped_storage().data_ptr()
           for tensor in [*model.models[0].parameters(), *model.models[0].buffers()]}  # fmt: skip
    found = list(WeightSync(shards, source, destinations=destinations).tensors(model.models, model.spec))
    return sum(tensor.untyped_storage().data_ptr() in own for _, tensor in found) / max(1, len(found))


def test_a_single_destination_reads_what_it_owns_where_it_is(tmp_path: Path) -> None:
    recipe = Recipe(folder=write_checkpoint(tmp_path / "v3", V3))
    assert run_ranks(1, _share_read_in_place, recipe, (0,)) == [1.0]
    alone, other = run_ranks(2, _share_read_in_place, replace(recipe, layout={"pp": 2}), (0,))
    assert 0 < alone < 1 and other == 0
    assert run_ranks(2, _share_read_in_place, replace(recipe, layout={"pp": 2}), (0, 1)) == [0.0, 0.0]


def _group_timeouts(recipe: Recipe) -> set[float]:
    import torch.distributed as dist

    from megatron_ads.training.weight_sync import WeightSync

    _, shards, source = start(recipe)
    before = dist.distributed_c10d._get_default_group()._get_backend(torch.device("cpu")).options._timeout
    group = WeightSync(shards, source, destinations=(1, 3))._group
    dist.barrier()  # a rank that ended at once would break the connection that the other is still making
    members = [] if dist.get_rank() not in (1, 3) else [group._get_backend(torch.device("cpu")).options._timeout]
    return {timeout.total_seconds() for timeout in (before, *members)}


def test_the_destinations_wait_for_each_other_as_long_as_the_job_says_and_not_as_torch_does(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "v3", V3)
    found = run_ranks(4, _group_timeouts, Recipe(folder=folder, layout={"pp": 2, "ep": 2}))
    assert found == [found[0]] * 4 and len(found[0]) == 1
    assert found[0] != {1800.0}  # torch's own


def _refusal(recipe: Recipe) -> str:
    with pytest.raises(ConfigError) as caught:
        _collect(recipe, (0, 1))
    return str(caught.value)


def test_a_destination_that_is_no_rank_is_refused(tmp_path: Path) -> None:
    (message,) = run_ranks(1, _refusal, Recipe(folder=write_checkpoint(tmp_path / "v3", V3)))
    assert message == "destinations are [0, 1]; they must be ranks from 0 to 0."


def _on_a_device(tensor: torch.Tensor) -> torch.Tensor:
    """What ``cpu`` does where the model is on a device: a copy."""
    return tensor.clone()


def _peaks(recipe: Recipe) -> tuple[int, int, int]:
    """Return the most bytes held beyond the model: by a sync to rank 0, and by one copy of what this rank has.

    The third number is the largest bucket.
    """
    from megatron_ads.training.export import canonical_weights
    from megatron_ads.training.weight_sync import WeightSync

    model, shards, source = start(recipe)
    own = [*model.models[0].parameters(), *model.models[0].buffers()]
    sync = WeightSync(shards, source, bucket_bytes=SMALL_BUCKET_BYTES)
    with patch.object(torch.Tensor, "cpu", _on_a_device):
        with LiveBytes(own) as synced:
            for _ in sync.tensors(model.models, model.spec):
                pass
        with LiveBytes(own) as copied:
            canonical_weights(model.models, model.spec)
    largest = max(4 * torch.Size(parameter.shape).numel() for parameter in parameters(shards.shape).values())
    return synced.peak, copied.peak, max(largest, SMALL_BUCKET_BYTES)


@pytest.mark.parametrize("lora", [LoraConfig(), LoraConfig(rank=4)], ids=["weights", "adapters"])
def test_a_sync_holds_no_more_than_a_bucket_and_a_rank_without_a_part_in_it_nothing(
    lora: LoraConfig, tmp_path: Path
) -> None:
    recipe = Recipe(folder=write_checkpoint(tmp_path / "v3", V3), layout={"ep": 2}, model={"lora": lora})
    destination, owner, *replicas = run_ranks(4, _peaks, recipe)
    for synced, copied, bucket in (destination, owner):
        # A bucket of messages, one parameter assembled, and three FP32 temporaries of a merge.
        assert 0 < synced <= 5 * bucket
        assert copied > 20 * bucket  # the negative twin: a copy of the shard
    assert [synced for synced, _, _ in replicas] == [0, 0]
