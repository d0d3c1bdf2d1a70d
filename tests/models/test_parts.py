"""Every parameter belongs to the part that freezes it, and what a job trains is counted as it is built."""

from typing import Any

import pytest

from conversion.names import parameters
from megatron_ads.architecture import shape_from_config
from megatron_ads.config.model import FrozenPart, LoraConfig, LoraTarget, ModelConfig, TrainOnly
from megatron_ads.models.parts import frozen_parts, is_trained, parameters_by_part, part_of, trained_parameters
from parity_tests.harness.ranks import run_ranks
from parity_tests.harness.training_jobs import Recipe, start
from tests.models.checkpoints import V3, write_checkpoint
from tests.published import published

SHAPE = shape_from_config(V3)
# The checkpoint has two dense layers, then two with experts.
PARTS = {
    "embedding.word_embeddings.weight": FrozenPart.embedding,
    "decoder.final_layernorm.weight": FrozenPart.output,
    "output_layer.weight": FrozenPart.output,
    "decoder.layers.0.input_layernorm.weight": FrozenPart.attention,
    "decoder.layers.3.self_attention.kv_layernorm.weight": FrozenPart.attention,
    "decoder.layers.3.self_attention.linear_proj.weight": FrozenPart.attention,
    "decoder.layers.1.pre_mlp_layernorm.weight": FrozenPart.dense,
    "decoder.layers.1.mlp.linear_fc1.weight": FrozenPart.dense,
    "decoder.layers.2.pre_mlp_layernorm.weight": None,
    "decoder.layers.2.mlp.router.weight": FrozenPart.router,
    "decoder.layers.2.mlp.shared_experts.linear_fc2.weight": FrozenPart.shared_experts,
    "decoder.layers.2.mlp.experts.linear_fc2.weight63": FrozenPart.experts,
    "mtp.layers.0.eh_proj.weight": FrozenPart.mtp,
    "mtp.layers.0.transformer_layer.mlp.experts.linear_fc1.weight0": FrozenPart.mtp,
}


@pytest.mark.parametrize("name", PARTS)
def test_a_parameter_belongs_to_its_part(name: str) -> None:
    assert name in parameters(SHAPE)
    assert part_of(name, SHAPE) == PARTS[name]


def _built(recipe: Recipe) -> int:
    model, _, _ = start(recipe)
    return sum(weight.numel() for chunk in model.models for weight in chunk.parameters() if weight.requires_grad)


@pytest.mark.parametrize(
    "settings",
    [
        {"mtp_loss_weight": 0.1},
        {"frozen": [FrozenPart.experts, FrozenPart.embedding]},
        {"lora": LoraConfig(rank=3)},
        {"lora": LoraConfig(rank=2, targets=[LoraTarget.dense]), "mtp_loss_weight": 0.1},
    ],
    ids=["all", "frozen", "adapters", "adapters of dense layers"],
)
def test_what_is_counted_is_what_is_trained(settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = write_checkpoint(tmp_path_factory.mktemp("parts") / "v3", V3)
    trained, weights = trained_parameters(ModelConfig(**settings), SHAPE)
    assert run_ranks(1, _built, Recipe(folder=folder, model=settings)) == [trained]
    assert (trained < weights) == (settings != {"mtp_loss_weight": 0.1})


def test_of_new_tokens_the_rows_count_in_embedding_and_output_layer() -> None:
    settings = ModelConfig(train_only=TrainOnly.new_tokens)
    assert trained_parameters(settings, SHAPE, 10) == (2 * 10 * 64, trained_parameters(ModelConfig(), SHAPE)[1])
    trained = {name for name in parameters(SHAPE) if is_trained(name, settings, SHAPE)}
    assert trained == {"embedding.word_embeddings.weight", "output_layer.weight"}
    assert {FrozenPart.embedding, FrozenPart.output}.isdisjoint(frozen_parts(settings, SHAPE))


def test_r1_has_the_published_number_of_parameters() -> None:
    parts = parameters_by_part(shape_from_config(published("deepseek_r1")))
    biases = 58 * 256  # of the routers: buffers, which the published numbers include
    # 58 layers * 256 experts * 3 matrices * 7168 * 2048
    assert parts[FrozenPart.experts] == 58 * 256 * 3 * 7168 * 2048 == 653_908_770_816
    assert parts.total() - parts[FrozenPart.mtp] + biases == 671_026_419_200
    # The published repository stores 684,489,845,504 values: the embedding and the output layer once more, for MTP.
    twice = 2 * 129280 * 7168
    assert parts.total() + biases + 256 + twice == 684_489_845_504


def test_the_parameters_of_moonlight_are_those_transformers_builds() -> None:
    torch = pytest.importorskip("torch")
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    config = published("moonlight_16b_a3b", architectures=..., auto_map=..., torch_dtype=..., transformers_version=...)
    with torch.device("meta"):
        model = DeepseekV3ForCausalLM(DeepseekV3Config(**config))
    built = sum(parameter.numel() for parameter in model.parameters())
    assert parameters_by_part(shape_from_config(published("moonlight_16b_a3b"))).total() == built
