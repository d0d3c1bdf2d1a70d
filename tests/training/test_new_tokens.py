"""Training new tokens alone changes their rows and not one bit of anything else, on every layout."""

from pathlib import Path

import pytest
import torch

from conversion.grow_vocabulary import added_token_ids
from conversion.names import TOKEN_TABLES
from conversion.sources import WeightSource, open_source
from megatron_ads.config.model import FrozenPart, LoraConfig, ModelConfig, TrainOnly
from megatron_ads.config.run import validate
from megatron_ads.errors import ConfigError
from parity_tests.harness.growing import WORDS, grow, write_tokenizer
from parity_tests.harness.ranks import run_ranks
from parity_tests.harness.training_jobs import Recipe, train_and_export
from tests.models.checkpoints import V3, write_checkpoint

TOKENS = 60  # of 184 rows, so that with tp 2 the first rank has old rows alone, and those of the second are divided
END = WORDS + TOKENS
LAYOUTS = {
    "tp2": (2, {"tp": 2, "etp": 1, "ep": 2}, {}),
    "pp2 with MTP": (2, {"pp": 2}, {"mtp_loss_weight": 0.3}),
}
ONLY = {"train_only": TrainOnly.new_tokens}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("tokens")
    grow(write_tokenizer(write_checkpoint(place / "v3", V3)), place / "grown", tokens=TOKENS)
    return place / "grown"


def weights(source: WeightSource) -> dict[str, torch.Tensor]:
    return {name: source.read(name) for name in source.names()}


@pytest.mark.parametrize("name", LAYOUTS)
def test_only_the_rows_of_new_tokens_change(name: str, folder: Path, tmp_path: Path) -> None:
    world, layout, model = LAYOUTS[name]
    recipe = Recipe(folder=folder, layout=layout, model=model | ONLY, optim={"weight_decay": 0.0}, steps=3)
    losses = run_ranks(world, train_and_export, recipe, tmp_path / "export")
    assert losses[0].loss[-1] != losses[0].loss[0]
    before, after = weights(open_source(folder)), weights(open_source(tmp_path / "export"))
    assert before.keys() == after.keys()
    for weight, old in before.items():
        if weight in TOKEN_TABLES:
            changed = (after[weight] != old).any(1).nonzero().flatten().tolist()
            assert set(changed) <= set(range(WORDS, END))
            assert len(changed) > TOKENS // 2
        else:
            assert torch.equal(after[weight].view(torch.uint8), old.view(torch.uint8)), weight


def test_a_checkpoint_without_new_tokens_is_refused(tmp_path: Path) -> None:
    plain = open_source(write_checkpoint(tmp_path / "v3", V3))
    with pytest.raises(ConfigError, match=r"added_token_ids in the config .* is None: it names no new tokens"):
        added_token_ids(plain)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"frozen": [FrozenPart.experts]}, r"model\.frozen is .* keeps everything else as loaded already"),
        ({"expert_bias_update_rate": 0.001}, r"model\.expert_bias_update_rate is 0\.001"),
        ({"lora": LoraConfig(rank=4)}, r"model\.lora\.rank is 4"),
    ],
    ids=["frozen", "bias", "lora"],
)
def test_settings_that_contradict_it_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ModelConfig(load="x", **ONLY, **settings).check()


def test_weight_decay_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"optim\.weight_decay is 0\.1, which would change the rows"):
        validate(Recipe(folder=folder, model=ONLY).config(), 1)
