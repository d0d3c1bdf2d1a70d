"""New weights in a loaded model: its log-probabilities become those of the other checkpoint, exactly."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from conversion.hf_folder import open_hf_folder
from megatron_ads.config.generation import GenerationConfig
from megatron_ads.demo_model import CONFIGS, Preset, write_demo_model
from megatron_ads.errors import ConversionError
from megatron_ads.inference import weight_update
from megatron_ads.inference.engine import UnsupportedError
from megatron_ads.inference.language_model import load_model
from megatron_ads.inference.transformers_engine import TransformersEngine

PROMPTS, ANSWERS = ([5, 6, 7], [9]), ([1, 2, 3, 4], [8])


@pytest.fixture(scope="module")
def other_model(random_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same architecture, drawn with another seed."""
    torch.manual_seed(4)
    path = tmp_path_factory.mktemp("other")
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(random_model)).save_pretrained(path)
    return path


def engine_on(folder: Path) -> TransformersEngine:
    return TransformersEngine(load_model(folder), end_token=31, pad_token=0)


def weights_of(folder: Path, dtype: torch.dtype = torch.float32) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors with the names they have in the file, the last first."""
    tensors = load_file(folder / "model.safetensors")
    for name in sorted(tensors, reverse=True):
        yield name, tensors[name].to(dtype)


def test_an_updated_engine_is_one_that_was_loaded_from_the_new_weights(random_model: Path, other_model: Path) -> None:
    engine, fresh = engine_on(random_model), engine_on(other_model)
    wanted = fresh.log_probabilities(PROMPTS, ANSWERS)
    before = engine.log_probabilities(PROMPTS, ANSWERS)
    assert before != wanted
    own = {name: tensor.data_ptr() for name, tensor in engine._model.named_parameters()}
    assert any("experts" in name for name, _ in weights_of(other_model))  # which transformers keeps in one tensor
    engine.update_weights(weights_of(other_model))
    assert engine.log_probabilities(PROMPTS, ANSWERS) == wanted
    assert {name: tensor.data_ptr() for name, tensor in engine._model.named_parameters()} == own  # in place
    how = GenerationConfig(max_new_tokens=6)
    assert engine.generate(PROMPTS, how) == fresh.generate(PROMPTS, how)
    engine.update_weights(weights_of(random_model))
    assert engine.log_probabilities(PROMPTS, ANSWERS) == before


def test_another_dtype_is_converted_and_mtp_layers_are_left_out(random_model: Path, other_model: Path) -> None:
    engine = engine_on(random_model)
    spare = ("model.layers.2.eh_proj.weight", torch.ones(1))  # the model has layers 0 and 1
    engine.update_weights(iter([*weights_of(other_model, torch.bfloat16), spare]))
    for (found,), (wanted,) in zip(
        engine.log_probabilities([[5]], [[1]]), engine_on(other_model).log_probabilities([[5]], [[1]]), strict=True
    ):
        assert found != wanted
        assert found == pytest.approx(wanted, abs=0.05)  # BF16 keeps 8 bits


def test_a_model_without_shared_experts_needs_none(tmp_path: Path) -> None:
    write_demo_model(tmp_path / "model", CONFIGS[Preset.tiny] | {"n_shared_experts": 0, "torch_dtype": "float32"})
    weights = {name: tensor.read() for name, tensor in open_hf_folder(tmp_path / "model").tensors.items()}
    assert not any("shared_experts" in name for name in weights)
    engine = engine_on(tmp_path / "model")
    before = engine.log_probabilities(PROMPTS, ANSWERS)
    engine.update_weights((name, 2 * tensor) for name, tensor in weights.items())
    assert engine.log_probabilities(PROMPTS, ANSWERS) != before
    engine.update_weights(iter(weights.items()))
    assert engine.log_probabilities(PROMPTS, ANSWERS) == before


def test_weights_that_are_missing_or_unknown_are_named(random_model: Path, other_model: Path) -> None:
    weights = dict(weights_of(other_model))
    lacking = {
        name: tensor for name, tensor in weights.items() if name != "model.layers.1.mlp.experts.3.up_proj.weight"
    }
    with pytest.raises(ConversionError, match=r"lack 1 tensors, model\.layers\.1\.mlp\.experts\.3\.up_proj\.weight"):
        engine_on(random_model).update_weights(iter(lacking.items()))
    with pytest.raises(ConversionError, match=r"has no weight model\.layers\.0\.unknown"):
        engine_on(random_model).update_weights(iter([("model.layers.0.unknown", torch.ones(1))]))
    with pytest.raises(ConversionError, match=r"norm\.weight has the shape \(1,\), and the engine's \(32,\)"):
        engine_on(random_model).update_weights(iter([("model.norm.weight", torch.ones(1))]))


def test_a_tensor_without_a_place_of_its_own_is_refused(random_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def reversed_rows(_: object, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: numbers.flip(0) for name, numbers in state.items()}

    monkeypatch.setattr(weight_update, "revert_weight_conversion", reversed_rows)
    with pytest.raises(UnsupportedError, match=r"embed_tokens\.weight has no place of its own"):
        engine_on(random_model).update_weights(iter([]))


def test_a_transformers_whose_inside_is_not_known_is_refused_by_an_update_only(
    random_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_on(random_model)
    monkeypatch.delitem(sys.modules, "megatron_ads.inference.weight_update", raising=False)
    monkeypatch.setitem(sys.modules, "transformers.core_model_loading", None)
    with pytest.raises(UnsupportedError, match=r"cannot be replaced in a model of transformers \d.*constraints\.txt"):
        engine.update_weights(iter([]))
    assert engine.generate(PROMPTS, GenerationConfig(max_new_tokens=1))
