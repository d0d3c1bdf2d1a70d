"""The demo checkpoint: what is in it, that transformers loads it, and that it is always the same."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from conversion import sparse_r1
from conversion.hf_folder import open_hf_folder
from conversion.names import ParameterKind, hf_aliases, parameters
from megatron_ads.architecture import GroupedQueryShape, LatentAttentionShape, YarnShape, read_model_shape
from megatron_ads.cli import main
from megatron_ads.data.chat import load_tokenizer
from megatron_ads.demo_model import CONFIGS, EMBEDDING_SPREADS, Preset


def make(folder: Path, *arguments: str) -> Path:
    assert main(["demo-model", str(folder), *arguments]) == 0
    return folder


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("demo") / "model")


def test_it_has_every_part_of_the_family(demo: Path):
    shape = read_model_shape(demo)
    assert shape.num_layers >= 6 and shape.first_dense_layers == 2 and shape.mtp_layers == 1
    assert shape.num_experts >= 16 and shape.num_shared_experts == 1
    assert 1 < shape.groups_per_token < shape.num_expert_groups
    assert isinstance(shape.attention, LatentAttentionShape)
    assert shape.attention.q_lora_rank is not None and shape.has_expert_bias
    assert isinstance(shape.rope_scaling, YarnShape) and shape.rope_scaling.mscale_all_dim == 1.0


def test_files_are_those_of_a_published_checkpoint(demo: Path):
    files = sorted(file.name for file in demo.iterdir())
    assert files == [
        "config.json",
        "generation_config.json",
        "model-00001-of-000002.safetensors",
        "model-00002-of-000002.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    index = json.loads((demo / "model.safetensors.index.json").read_text())
    tensors = tensors_of(demo)
    assert index["weight_map"].keys() == tensors.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())


def test_every_tensor_is_there_in_bf16_and_the_router_bias_in_fp32(demo: Path):
    open_hf_folder(demo)  # names and shapes against config.json
    shape, tensors = read_model_shape(demo), tensors_of(demo)
    biases = [p for p in parameters(shape).values() if p.kind is ParameterKind.ROUTER_BIAS]
    assert len(biases) == 5  # four MoE layers and the MTP layer
    for bias in biases:
        values = tensors.pop(bias.parts[0].name)
        assert values.dtype is torch.float32 and bool((values != 0).all())
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}


def test_the_mtp_layer_repeats_embedding_and_head(demo: Path):
    shape, tensors = read_model_shape(demo), tensors_of(demo)
    aliases = hf_aliases(shape)
    assert len(aliases) == 2
    for alias, canonical in aliases.items():
        assert torch.equal(tensors[alias], tensors[parameters(shape)[canonical].parts[0].name])


def test_no_two_tensors_are_equal_but_the_repeats(demo: Path):
    # Otherwise a conversion that mixes tensors up would pass unnoticed; norms of ones would be such a case.
    digests = [hashlib.sha256(t.view(torch.uint8).numpy().tobytes()).digest() for t in tensors_of(demo).values()]
    assert len(digests) - len(set(digests)) == 2


def test_same_seed_same_bytes_another_seed_other_weights(demo: Path, tmp_path: Path):
    again = make(tmp_path / "again")
    for file in demo.iterdir():
        assert (again / file.name).read_bytes() == file.read_bytes(), file.name
    other = tensors_of(make(tmp_path / "other", "--seed", "1"))
    assert not any(torch.equal(other[name], tensor) for name, tensor in tensors_of(demo).items())


def test_fp32_holds_the_values_that_bf16_rounds(demo: Path, tmp_path: Path):
    exact = tensors_of(make(tmp_path / "fp32", "--dtype", "fp32"))
    assert json.loads((tmp_path / "fp32/config.json").read_text())["torch_dtype"] == "float32"
    for name, rounded in tensors_of(demo).items():
        assert exact[name].dtype is torch.float32
        assert torch.equal(exact[name].to(rounded.dtype), rounded)


def test_fp8_is_stored_as_deepseek_does(demo: Path, tmp_path: Path):
    folder = make(tmp_path / "fp8", "--fp8")
    opened = open_hf_folder(folder)
    assert opened.is_fp8
    config = json.loads((folder / "config.json").read_text())
    assert config["quantization_config"] == {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    }
    quantized = {name for name, tensor in opened.tensors.items() if tensor.dtype is torch.float8_e4m3fn}
    linear = {
        part.name for p in parameters(opened.shape).values() if p.kind is ParameterKind.LINEAR for part in p.parts
    }
    assert quantized == linear


def test_transformers_loads_it_and_its_tokenizer(demo: Path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, report = AutoModelForCausalLM.from_pretrained(demo, dtype=torch.float32, output_loading_info=True)
    assert not report["missing_keys"]
    assert all(".6." in name for name in report["unexpected_keys"])  # transformers does not load the MTP layer
    tokenizer = AutoTokenizer.from_pretrained(demo)
    tokens = tokenizer.apply_chat_template([{"role": "user", "content": "Is it?"}], return_dict=False)
    assert tokens == load_tokenizer(demo).encode("<｜begin▁of▁sentence｜><｜User｜>Is it?")
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([tokens])).logits
    assert logits.shape == (1, len(tokens), 1536)
    assert bool(logits.isfinite().all())
    # Nothing is learned yet: the next token is nearly anyone's guess, log(1536) = 7.3 nats.
    assert logits.float().log_softmax(-1).max() < -4


def test_the_dense_one_is_loaded_by_transformers_and_has_the_same_tokenizer(demo: Path, tmp_path: Path):
    from transformers import AutoModelForCausalLM

    dense = make(tmp_path / "dense", "--preset", "dense")
    model, report = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert type(model).__name__ == "Qwen2ForCausalLM"
    assert (dense / "tokenizer.json").read_bytes() == (demo / "tokenizer.json").read_bytes()
    shape = read_model_shape(dense)
    assert isinstance(shape.attention, GroupedQueryShape) and shape.attention.num_groups == 2 and not shape.num_experts
    biases = [tensor for name, tensor in tensors_of(dense).items() if name.endswith(".bias")]
    assert len(biases) == 3 * shape.num_layers and all(bool((bias != 0).all()) for bias in biases)


def test_special_tokens_have_the_ids_that_config_json_names(demo: Path):
    config = json.loads((demo / "config.json").read_text())
    tokenizer = load_tokenizer(demo)
    assert tokenizer.fast.bos_token_id == config["bos_token_id"]
    assert tokenizer.end_token_id == config["eos_token_id"]
    assert max(tokenizer.fast.get_vocab().values()) < config["vocab_size"]


@pytest.mark.parametrize("preset", list(CONFIGS), ids=str)
def test_every_preset_is_a_valid_shape(preset: Preset, tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS[preset]))
    assert read_model_shape(tmp_path).num_layers == CONFIGS[preset]["num_hidden_layers"]


@pytest.mark.parametrize("preset", list(CONFIGS), ids=str)
def test_embeddings_have_the_spread_of_the_preset(preset: Preset, tmp_path: Path):
    embedding = tensors_of(make(tmp_path / "model", "--preset", str(preset)))["model.embed_tokens.weight"]
    assert embedding.float().std().item() == pytest.approx(EMBEDDING_SPREADS[preset], rel=0.02)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "deepseek-r1"], "give --sparse with it"),
        (["--sparse"], "--sparse goes with --preset deepseek-r1, not with tiny"),
        (["--fp8", "--dtype", "fp32"], "--fp8 and --dtype fp32 are both given"),
    ],
)
def test_contradicting_arguments_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
):
    assert main(["demo-model", str(tmp_path / "out"), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_folder_that_holds_something_is_not_touched(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "mine.txt").write_text("mine")
    assert main(["demo-model", str(tmp_path)]) == 2
    assert "not an empty folder" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["mine.txt"]


def test_sparse_deepseek_r1_is_dispatched_and_takes_no_values(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    written: list[Path] = []
    monkeypatch.setattr(sparse_r1, "write_sparse", written.append)
    make(tmp_path / "r1", "--preset", "deepseek-r1", "--sparse")
    assert written == [tmp_path / "r1"]
    assert main(["demo-model", str(tmp_path / "r1"), "--preset", "deepseek-r1", "--sparse", "--seed", "3"]) == 2
    assert "--dtype and --seed have no effect" in capsys.readouterr().err
