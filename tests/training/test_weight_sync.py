"""Tensors of a running job under their Hugging Face names."""

import pytest
import torch

from conversion.sources import open_source
from tests.distributed import run_ranks
from tests.models.checkpoints import V2_LITE, V3, write_checkpoint
from tests.training.jobs import Recipe, start

LAYOUTS = {
    "pp2-ep2": (4, {"pp": 2, "ep": 2}),
    "tp2-ep2": (2, {"tp": 2, "ep": 2}),
    "tp2-etp2": (2, {"tp": 2, "etp": 2}),
    "pp2-vpp2": (2, {"pp": 2, "vpp": 2}),
}
SMALL_BUCKET_BYTES = 1 << 14


def _collect(recipe: Recipe) -> dict[str, torch.Tensor]:
    from megatron_ads.training.weight_sync import iterate_hf_tensors

    model, shards, source = start(recipe)
    tensors = iterate_hf_tensors(model.models, model.spec, source, shards, bucket_bytes=SMALL_BUCKET_BYTES)
    return {name: tensor.clone() for name, tensor in tensors}


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_rank_gets_every_tensor_of_the_source_bit_by_bit(name, tmp_path):
    folder = write_checkpoint(tmp_path / "v3", V3)
    world, layout = LAYOUTS[name]
    stored = open_source(folder).container.tensors
    for tensors in run_ranks(world, _collect, Recipe(folder=folder, layout=layout)):
        assert tensors.keys() == stored.keys()
        for hf_name, tensor in tensors.items():
            assert torch.equal(tensor, stored[hf_name].read()), hf_name


def test_a_model_without_low_rank_queries_comes_out_whole(tmp_path):
    folder = write_checkpoint(tmp_path / "lite", V2_LITE)
    stored = open_source(folder).container.tensors
    (tensors,) = run_ranks(1, _collect, Recipe(folder=folder))
    assert tensors.keys() == stored.keys()
