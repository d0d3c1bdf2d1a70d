"""Conversion as algebra: to HF and back is the source; by way of HF is the same as directly."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from conversion.convert import to_hf, to_shards
from conversion.hf_folder import INDEX
from conversion.sources import open_source
from conversion.to_hf import ExportDtype
from megatron_ads.config.model import LayoutConfig
from megatron_ads.errors import MegatronAdsError
from parity_tests.harness.hf_checkpoints import (
    EDGE,
    V2_LITE,
    V3,
    bf16_checkpoint,
    fp8_checkpoint,
    random_tensors,
    write_hf,
)

LAYOUTS = {
    "one rank": LayoutConfig(),
    "pp2 ep2": LayoutConfig(pp=2, ep=2),
    "pp4 ep8": LayoutConfig(pp=4, ep=8),
    "tp4": LayoutConfig(tp=4),
    "tp2 ep4 folded": LayoutConfig(tp=2, ep=4),
    "tp4 ep2 etp2": LayoutConfig(tp=4, ep=2, etp=2),
    "tp1 ep2 etp4": LayoutConfig(ep=2, etp=4),
    "pp2 vpp2": LayoutConfig(pp=2, vpp=2, ep=2),
    "uneven": LayoutConfig(pp=2, first_stage_layers=3, last_stage_layers=1, ep=4),
    "no decoder layer first and last": LayoutConfig(pp=4, pipeline="E|tt|tt|mL"),
    "mtp alone": LayoutConfig(pp=4, pipeline="Ett|tt|m|L"),
    "vpp by string": LayoutConfig(pp=2, vpp=2, pipeline="Et|t|t|tmL", ep=2),
}


def stored_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Return every tensor of an HF folder as the safetensors library reads it."""
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def assert_same_tensors(left: Path, right: Path) -> None:
    a, b = stored_tensors(left), stored_tensors(right)
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        assert torch.equal(a[name].view(torch.uint8), b[name].view(torch.uint8)), name


def assert_same_bytes(left: Path, right: Path) -> None:
    names = sorted(file.name for file in left.glob("*.safetensors"))
    assert names == sorted(file.name for file in right.glob("*.safetensors"))
    assert names, "nothing to compare"
    for name in names:
        assert (left / name).read_bytes() == (right / name).read_bytes(), name


@pytest.fixture(scope="module")
def bf16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bf16_checkpoint(tmp_path_factory.mktemp("bf16") / "hf")


@pytest.fixture(scope="module")
def other(bf16: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source in a layout that no test has, in "shards", and read back from it, in "hf"."""
    folder = tmp_path_factory.mktemp("other")
    to_shards(bf16, folder / "shards", LayoutConfig(pp=2, tp=2, ep=4))
    to_hf(folder / "shards", folder / "hf")
    return folder


@pytest.fixture(scope="module", params=LAYOUTS)
def layout(request: pytest.FixtureRequest) -> LayoutConfig:
    return LAYOUTS[request.param]


@pytest.fixture(scope="module")
def shards(bf16: Path, layout: LayoutConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    to_shards(bf16, target := tmp_path_factory.mktemp("direct") / "shards", layout)
    return target


def test_to_megatron_and_back_is_the_source(bf16, shards, tmp_path):
    to_hf(shards, tmp_path / "back")
    assert_same_tensors(bf16, tmp_path / "back")


@pytest.mark.parametrize("by_way_of", ["shards", "hf"])
def test_by_way_of_another_layout_is_the_same_as_directly(other, shards, tmp_path, layout, by_way_of):
    to_shards(other / by_way_of, tmp_path / "shards", layout)
    assert_same_bytes(shards, tmp_path / "shards")


@pytest.mark.parametrize(
    "config",
    [V2_LITE, EDGE, V3 | {"first_k_dense_replace": 3}, V3 | {"num_nextn_predict_layers": 0}],
    ids=["v2-lite", "edge blocks", "three dense layers", "no mtp"],
)
def test_other_members_of_the_family_come_back(tmp_path, config):
    source = bf16_checkpoint(tmp_path / "hf", config, files=2)
    to_shards(source, tmp_path / "shards", LayoutConfig(pp=2, tp=2))
    to_hf(tmp_path / "shards", tmp_path / "back")
    assert_same_tensors(source, tmp_path / "back")


def test_fp8_becomes_the_bf16_values_it_stands_for(tmp_path):
    source = fp8_checkpoint(tmp_path / "hf")
    to_shards(source, tmp_path / "shards", LayoutConfig(pp=2, ep=2, tp=2))
    fp8, shards = open_source(source), open_source(tmp_path / "shards")
    for name in fp8.names():
        assert shards.read(name).dtype == (torch.float32 if name.endswith("expert_bias") else torch.bfloat16)
        assert torch.equal(fp8.read(name), shards.read(name)), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_stored_dtypes_are_kept_and_the_router_bias_stays_fp32(tmp_path, dtype):
    source = write_hf(tmp_path / "hf", V3, random_tensors(V3, dtype))
    to_shards(source, tmp_path / "shards", LayoutConfig(ep=2))
    tensors = stored_tensors(tmp_path / "shards")
    assert {tensor.dtype for name, tensor in tensors.items() if "expert_bias" not in name} == {dtype}
    assert {tensor.dtype for name, tensor in tensors.items() if "expert_bias" in name} == {torch.float32}


def test_a_mixed_checkpoint_keeps_each_tensors_dtype(tmp_path):
    tensors = random_tensors(V3, torch.bfloat16)
    tensors["lm_head.weight"] = tensors["lm_head.weight"].float() + 1e-4
    tensors["model.layers.4.shared_head.head.weight"] = tensors["lm_head.weight"].clone()
    source = write_hf(tmp_path / "hf", V3, tensors)
    to_shards(source, tmp_path / "shards", LayoutConfig(pp=2))
    to_hf(tmp_path / "shards", tmp_path / "back")
    assert_same_tensors(source, tmp_path / "back")


def test_stages_own_what_megatron_builds_on_them(bf16, tmp_path):
    to_shards(bf16, tmp_path / "shards", LayoutConfig(pp=4, pipeline="E|tt|tt|mL", ep=2))
    stage = {
        pp: {name for file in tmp_path.glob(f"shards/pp{pp:02d}-*") for name in load_file(file)} for pp in range(4)
    }
    assert stage[0] == {"embedding.word_embeddings.weight"}
    assert not any("experts" in name for name in stage[1])  # layers 0 and 1 are dense
    # Megatron-Core puts the final norm behind the last decoder layer when an MTP layer follows it.
    assert "decoder.final_layernorm.weight" in stage[2]
    assert "embedding.word_embeddings.weight" in stage[3]
    assert "output_layer.weight" in stage[3]
    assert not any(name.startswith("decoder") for name in stage[3])


def test_derived_buffers_come_back_though_megatron_has_no_place_for_them(tmp_path):
    tensors = random_tensors(V3, torch.bfloat16)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.rand(2)
    source = write_hf(tmp_path / "hf", V3, tensors)
    to_shards(source, tmp_path / "shards", LayoutConfig(pp=2))
    to_hf(tmp_path / "shards", tmp_path / "back")
    assert_same_tensors(source, tmp_path / "back")


def test_a_checkpoint_without_the_repeats_comes_back_without_them(tmp_path):
    tensors = random_tensors(V3, torch.bfloat16)
    del tensors["model.layers.4.embed_tokens.weight"], tensors["model.layers.4.shared_head.head.weight"]
    source = write_hf(tmp_path / "hf", V3, tensors)
    to_shards(source, tmp_path / "shards", LayoutConfig())
    to_hf(tmp_path / "shards", tmp_path / "back", dtype=ExportDtype.BF16)
    assert_same_tensors(source, tmp_path / "back")


def test_workers_write_the_same_bytes_as_one_process(bf16, tmp_path):
    from conversion.convert import Execution

    to_shards(bf16, tmp_path / "one", LayoutConfig(pp=2, ep=2))
    to_shards(bf16, tmp_path / "two", LayoutConfig(pp=2, ep=2), Execution(workers=2))
    assert_same_bytes(tmp_path / "one", tmp_path / "two")
    assert (tmp_path / "one" / "manifest.json").read_text() == (tmp_path / "two" / "manifest.json").read_text()


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (LayoutConfig(tp=3), r"4 attention heads cannot be cut into layout\.tp = 3"),
        (LayoutConfig(ep=3), "8 routed experts"),
        (LayoutConfig(etp=16), "layout.etp = 16"),
        (LayoutConfig(pp=3), "4 decoder layers"),
    ],
    ids=["tp", "ep", "etp", "pp"],
)
def test_a_layout_the_model_cannot_have_is_refused_before_anything_is_written(bf16, tmp_path, layout, message):
    with pytest.raises(MegatronAdsError, match=message):
        to_shards(bf16, tmp_path / "shards", layout)
    assert not (tmp_path / "shards").exists()


def test_the_index_lists_every_tensor_in_the_file_that_holds_it(bf16, tmp_path):
    import json

    to_hf(bf16, tmp_path / "split", max_shard_bytes=10_000)
    index = json.loads((tmp_path / "split" / INDEX).read_text())
    files = sorted(tmp_path.glob("split/*.safetensors"))
    assert len(files) > 3
    held = {name: file.name for file in files for name in load_file(file)}
    assert index["weight_map"] == held
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in stored_tensors(tmp_path / "split").values())
    assert all(file.stat().st_size < 20_000 for file in files)  # 10,000 bytes of data and a header
    assert_same_tensors(bf16, tmp_path / "split")
