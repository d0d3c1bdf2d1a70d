"""Slices read straight from any checkpoint are those a tensor-parallel rank owns."""

from functools import partial

import pytest
import torch

from conversion.convert import convert, to_shards
from conversion.sources import open_source
from conversion.to_torch_dist import TorchDistTarget
from megatron_ads.config.layout import LayoutConfig
from megatron_ads.errors import ConversionError
from tests.conversion.checkpoints import fp8_checkpoint


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    hf = fp8_checkpoint(folder / "hf")
    to_shards(hf, folder / "shards", LayoutConfig(pp=2, tp=2, ep=2, etp=2))
    convert(TorchDistTarget(open_source(hf), folder / "dist"))
    return {name: open_source(folder / name) for name in ("hf", "shards", "dist")}


@pytest.mark.parametrize("kind", ["hf", "shards", "dist"])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_slices_are_cut_as_megatron_cuts_them(sources, kind, size):
    source = sources[kind]
    for rank in range(size):
        read, full = partial(source.read, rank=rank, size=size), sources["hf"].read
        embedding = "embedding.word_embeddings.weight"
        assert torch.equal(read(embedding), full(embedding).chunk(size, dim=0)[rank])
        out = "decoder.layers.1.self_attention.linear_proj.weight"
        assert torch.equal(read(out), full(out).chunk(size, dim=1)[rank])
        for fc1 in ("decoder.layers.0.mlp.linear_fc1.weight", "decoder.layers.3.mlp.experts.linear_fc1.weight5"):
            gate, up = full(fc1).chunk(2, dim=0)
            expected = torch.cat((gate.chunk(size, dim=0)[rank], up.chunk(size, dim=0)[rank]))
            assert torch.equal(read(fc1), expected)
        norm = "decoder.layers.0.self_attention.q_layernorm.weight"
        assert torch.equal(read(norm), full(norm))


def test_starting_from_hf_is_bit_equal_to_converting_first(sources):
    for name in sources["hf"].names():
        for kind in ("shards", "dist"):
            a, b = sources["hf"].read(name), sources[kind].read(name)
            assert a.dtype == b.dtype and torch.equal(a, b), (kind, name)


def test_an_unknown_parameter_is_named(sources):
    with pytest.raises(ConversionError, match=r"without a parameter 'decoder\.layers\.99"):
        sources["hf"].read("decoder.layers.99.input_layernorm.weight")


def test_what_is_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(ConversionError, match="is not a checkpoint"):
        open_source(tmp_path)
    with pytest.raises(ConversionError, match="does not exist"):
        open_source(tmp_path / "absent")


def test_a_folder_of_training_checkpoints_points_to_the_latest(tmp_path):
    for step in ("step-00000010", "step-00000020", ".step-00000030.partial"):
        (tmp_path / step).mkdir()
        (tmp_path / step / ".metadata").touch()
    with pytest.raises(ConversionError, match="such as step-00000020"):
        open_source(tmp_path)
