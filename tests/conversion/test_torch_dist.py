"""torch_dist: stock Megatron-Core loads what we write, we read what it saves, and nothing foreign is unpickled."""

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch

from conversion.convert import convert, to_hf, to_shards
from conversion.errors import DamagedCheckpointError
from conversion.layer_specs import LayerSpec, canonical_names, extra_state_keys, keyed_tensors
from conversion.names import parameters
from conversion.sources import open_source
from conversion.to_hf import ExportDtype
from conversion.to_torch_dist import TorchDistTarget
from conversion.torch_dist_pickle import read_metadata
from conversion.verify import verify
from megatron_ads.architecture import shape_from_config
from megatron_ads.config.model import LayoutConfig
from megatron_ads.errors import ConversionError
from megatron_ads.layout import ParallelLayout, place_layers
from parity_tests.harness.hf_checkpoints import V3, bf16_checkpoint, random_tensors, write_hf
from parity_tests.harness.ranks import run_ranks


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_hf(tmp_path_factory.mktemp("source") / "hf", V3, random_tensors(V3, torch.float32))


@pytest.fixture(scope="module")
def dist(source, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("dist") / "dist"
    convert(TorchDistTarget(open_source(source), folder))
    return folder


@pytest.mark.parametrize("spec", [LayerSpec.LOCAL, LayerSpec.TE])
def test_hf_to_torch_dist_and_back_is_the_source(source, tmp_path, spec):
    convert(TorchDistTarget(open_source(source), tmp_path / "dist", spec))
    to_hf(tmp_path / "dist", tmp_path / "back")
    assert verify(source, tmp_path / "back").equal
    to_shards(tmp_path / "dist", tmp_path / "shards", LayoutConfig(pp=2, tp=2, ep=2))
    assert verify(source, tmp_path / "shards").equal


def _load_and_save_with_stock_megatron(folder: str, saved: str, spec: LayerSpec) -> dict[str, torch.Tensor]:
    """On a rank: load the folder into an emptied GPTModel, save that, return the weights by canonical name."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing import ShardedTensor

    from megatron_ads.models.build import build_chunks
    from megatron_ads.models.settings import ModelSettings
    from megatron_ads.runtime import process_groups

    layout, shape = ParallelLayout(world=1), open_source(Path(folder)).shape
    process_groups.start(layout)
    try:
        (model,) = build_chunks(shape, layout, place_layers(shape, layout), ModelSettings(spec=spec))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        model.load_state_dict(dist_checkpointing.load(model.sharded_state_dict(), folder), strict=False)
        os.mkdir(saved)
        moment = ShardedTensor.from_rank_offsets("optimizer.state.exp_avg.output_layer.weight", torch.ones(64, 16))
        dist_checkpointing.save({"model": model.sharded_state_dict(), "moment": moment, "iteration": 5}, saved)
    finally:
        process_groups.stop()
    held = dict(model.named_parameters()) | {n: b for n, b in model.named_buffers() if n.endswith("expert_bias")}
    weights: dict[str, torch.Tensor] = {}
    for name, tensor in held.items():
        names = canonical_names(name, spec=spec, first_layer=0, local_experts=range(shape.num_experts))
        pieces = tensor.detach().unbind() if len(names) > 1 else (tensor.detach(),)
        weights |= dict(zip(names, pieces, strict=True))
    return weights


@pytest.mark.parametrize("spec", [LayerSpec.LOCAL, LayerSpec.GROUPED])
def test_stock_megatron_loads_it_and_what_megatron_saves_is_read(source, dist, tmp_path, spec):
    saved = tmp_path / "saved"
    (weights,) = run_ranks(1, _load_and_save_with_stock_megatron, str(dist), str(saved), spec, timeout=120)
    expected = open_source(source)
    assert weights.keys() == set(expected.names())
    for name, tensor in weights.items():
        assert torch.equal(tensor, expected.read(name)), name
    shutil.copytree(dist / "hf", saved / "hf")
    assert verify(source, saved).equal
    to_hf(saved, tmp_path / "hf", dtype=ExportDtype.BF16)


def test_transformer_engine_keys_carry_the_norms_in_front_of_a_projection():
    model = parameters(shape_from_config(V3))
    keys = {tensor.key for tensor in keyed_tensors(model, LayerSpec.TE)}
    assert "decoder.layers.0.self_attention.linear_q_up_proj.layer_norm_weight" in keys
    assert "decoder.layers.0.self_attention.linear_kv_up_proj.layer_norm_weight" in keys
    assert "decoder.layers.0.mlp.linear_fc1.layer_norm_weight" in keys  # dense
    assert "decoder.layers.2.pre_mlp_layernorm.weight" in keys  # MoE: the norm stays a module of its own
    assert "decoder.layers.0.pre_mlp_layernorm.weight" not in keys


def test_every_expert_linear_has_an_extra_state():
    keys = list(extra_state_keys(parameters(shape_from_config(V3)), LayerSpec.LOCAL))
    assert len(keys) == len(set(keys))
    assert "decoder.layers.3.mlp.experts.experts.linear_fc2._extra_state/shard_7_8" in keys
    assert "mtp.layers.0.eh_proj._extra_state/shard_0_1" in keys
    assert not any("router" in key or "layernorm" in key for key in keys)


class Malicious:
    """Runs a command when unpickled by the standard loader."""

    def __reduce__(self):
        return os.mkdir, ("pwned",)


def test_nothing_is_reached_through_a_module_of_the_format(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # What unpickling looks up may have dots: a function of a module that a module of the format imports.
    module, name = b"torch.distributed.checkpoint.planner", b"torch.os.mkdir"
    names = b"".join(pickle.SHORT_BINUNICODE + bytes([len(text)]) + text for text in (module, name))
    call = pickle.SHORT_BINUNICODE + b"\x05pwned" + pickle.TUPLE1 + pickle.REDUCE
    content = pickle.PROTO + b"\x04" + names + pickle.STACK_GLOBAL + call + pickle.STOP
    (tmp_path / ".metadata").write_bytes(content)
    with pytest.raises(
        DamagedCheckpointError, match=r"it refers to torch\.distributed\.checkpoint\.planner\.torch\.os\.mkdir"
    ):
        read_metadata(tmp_path / ".metadata")
    assert not (tmp_path / "pwned").exists()
    pickle.loads(content)  # the negative twin: it would have run
    assert (tmp_path / "pwned").exists()


def test_foreign_classes_are_never_unpickled(dist, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(dist, tmp_path / "dist")
    (tmp_path / "dist" / ".metadata").write_bytes(pickle.dumps({"x": Malicious()}))
    with pytest.raises(DamagedCheckpointError, match=r"cannot be read safely: it refers to posix\.mkdir"):
        open_source(tmp_path / "dist")
    assert not (tmp_path / "pwned").exists()
    pickle.loads((tmp_path / "dist" / ".metadata").read_bytes())  # the negative twin: it would have run
    assert (tmp_path / "pwned").exists()


@pytest.mark.parametrize("cut", [1, 20_000, None], ids=["a byte", "extra states", "half"])
def test_a_truncated_data_file_is_named(dist, tmp_path, cut):
    shutil.copytree(dist, tmp_path / "dist")
    file = tmp_path / "dist" / "__0_0.distcp"
    file.write_bytes(file.read_bytes()[: -(cut or file.stat().st_size // 2)])
    with pytest.raises(DamagedCheckpointError, match=r"__0_0\.distcp is missing or truncated"):
        open_source(tmp_path / "dist")


def _norm(metadata):
    return metadata.state_dict_metadata["decoder.final_layernorm.weight"]


def _damage_archive(metadata, folder, place, skip, new):
    info = next(info for index, info in metadata.storage_data.items() if index.fqn == "decoder.final_layernorm.weight")
    data = bytearray((folder / info.relative_path).read_bytes())
    start = data.index(place, info.offset) + skip
    data[start : start + len(new)] = new
    (folder / info.relative_path).write_bytes(data)


@pytest.mark.parametrize(
    "damage",
    [
        lambda metadata, folder: delattr(metadata, "state_dict_metadata"),
        lambda metadata, folder: delattr(metadata, "storage_data"),
        lambda metadata, folder: delattr(_norm(metadata), "size"),
        lambda metadata, folder: delattr(_norm(metadata).chunks[0], "sizes"),
        lambda metadata, folder: setattr(_norm(metadata).chunks[0], "sizes", int),
        lambda metadata, folder: setattr(_norm(metadata).chunks[0], "offsets", torch.Size([7])),
        lambda metadata, folder: _damage_archive(metadata, folder, b"PK\x01\x02", 6, b"\xff"),
        lambda metadata, folder: _damage_archive(metadata, folder, b"data.pkl", 4, b"\xff"),
    ],
    ids=["no list", "no places", "no size", "no sizes", "a type", "elsewhere", "zip version", "zip name"],
)
def test_a_damaged_index_is_one_line(dist, tmp_path, damage):
    shutil.copytree(dist, tmp_path / "dist")
    metadata = read_metadata(tmp_path / "dist/.metadata")
    damage(metadata, tmp_path / "dist")
    (tmp_path / "dist/.metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(DamagedCheckpointError, match=r"\.metadata|__0_0"):
        open_source(tmp_path / "dist")


def test_a_checkpoint_of_another_model_is_refused(dist, tmp_path):
    shutil.copytree(dist, tmp_path / "dist")
    config = json.loads((dist / "hf" / "config.json").read_text())
    (tmp_path / "dist" / "hf" / "config.json").write_text(json.dumps(config | {"kv_lora_rank": 16}))
    with pytest.raises(DamagedCheckpointError, match="but its config gives"):
        open_source(tmp_path / "dist")


def test_a_missing_config_is_asked_for(dist, tmp_path):
    shutil.copytree(dist, tmp_path / "dist")
    shutil.rmtree(tmp_path / "dist" / "hf")
    with pytest.raises(ConversionError, match=r"has no hf/config\.json"):
        open_source(tmp_path / "dist")


def test_large_tensors_are_written_in_pieces(source, tmp_path, monkeypatch):
    from conversion import to_torch_dist

    monkeypatch.setattr(to_torch_dist, "_CHUNK_BYTES", 1000)
    monkeypatch.setattr(to_torch_dist, "_FILE_BYTES", 100_000)
    convert(TorchDistTarget(open_source(source), tmp_path / "dist"))
    assert len(list(tmp_path.glob("dist/*.distcp"))) > 3
    described = read_metadata(tmp_path / "dist" / ".metadata").state_dict_metadata
    # 64 x 16 FP32 values: 1000 bytes hold 15 rows of 64 bytes, so 4 full pieces and one of 4 rows
    assert [tuple(chunk.sizes) for chunk in described["output_layer.weight"].chunks] == [(15, 16)] * 4 + [(4, 16)]
    assert verify(source, tmp_path / "dist").equal


def test_vocabulary_padding_is_passed_over(tmp_path):
    # A model whose vocabulary Megatron padded from 60 to 64 rows.
    padded = bf16_checkpoint(tmp_path / "padded", V3)
    convert(TorchDistTarget(open_source(padded), tmp_path / "dist"))
    config = json.loads((tmp_path / "dist" / "hf" / "config.json").read_text())
    (tmp_path / "dist" / "hf" / "config.json").write_text(json.dumps(config | {"vocab_size": 60}))
    read = open_source(tmp_path / "dist").read("output_layer.weight")
    assert torch.equal(read, open_source(padded).read("output_layer.weight")[:60])
