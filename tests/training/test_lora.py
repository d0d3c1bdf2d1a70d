"""Low-rank adapters train to the same losses under every layout, and nothing but them is trained."""

from pathlib import Path
from typing import Any

import pytest

from megatron_ads.config.model import FrozenPart, LoraConfig, LoraTarget, Recompute
from parity_tests.harness.ranks import run_ranks
from parity_tests.harness.training_jobs import Losses, Recipe, run_steps, start
from tests.models.checkpoints import V3, write_checkpoint

STEPS = 5
LORA = LoraConfig(rank=4, alpha=8)
MODEL: dict[str, Any] = {"lora": LORA, "mtp_loss_weight": 0.1}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "pp2-ep2": (4, {"pp": 2, "ep": 2}),
    "dp2": (2, {}),
    "tp2-ep2": (2, {"tp": 2, "ep": 2}),
    "tp2-etp2": (2, {"tp": 2, "etp": 2}),
    "pp2-vpp2": (2, {"pp": 2, "vpp": 2}),
}


def _train(recipe: Recipe) -> Losses:
    """Train on the same rows again and again."""
    model, shards, _ = start(recipe)
    steps = [run_steps(model, shards, 0, 1) for _ in range(recipe.steps)]
    return Losses([step.loss[0] for step in steps], [step.grad_norm[0] for step in steps])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("model") / "v3", V3)


@pytest.fixture(scope="module")
def reference(folder: Path) -> Losses:
    return run_ranks(1, _train, Recipe(folder=folder, model=MODEL, steps=STEPS))[0]


@pytest.mark.parametrize("name", LAYOUTS)
def test_losses_do_not_depend_on_the_layout(name: str, folder: Path, reference: Losses) -> None:
    world, layout = LAYOUTS[name]
    for losses in run_ranks(world, _train, Recipe(folder=folder, layout=layout, model=MODEL, steps=STEPS)):
        assert losses.loss == pytest.approx(reference.loss, rel=1e-5)
        assert losses.grad_norm == pytest.approx(reference.grad_norm, rel=1e-4)


@pytest.mark.parametrize("target", [LoraTarget.dense, LoraTarget.experts])
def test_a_stage_without_adapters_passes_gradients_on(target: LoraTarget, folder: Path) -> None:
    """Dense layers are those of the first stage, experts those of the second."""
    model = MODEL | {"lora": LoraConfig(rank=4, targets=[target])}
    (alone,) = run_ranks(1, _train, Recipe(folder=folder, model=model, steps=2))
    staged = Recipe(folder=folder, model=model, steps=2, layout={"pp": 2, "ep": 2})
    for losses in run_ranks(4, _train, staged):
        assert losses.loss == pytest.approx(alone.loss, rel=1e-5)
        assert losses.grad_norm == pytest.approx(alone.grad_norm, rel=1e-4)


def test_experts_one_by_one_train_as_grouped_ones_do(folder: Path, reference: Losses) -> None:
    (losses,) = run_ranks(1, _train, Recipe(folder=folder, model=MODEL | {"layer_spec": "local"}, steps=STEPS))
    assert losses.loss == pytest.approx(reference.loss, rel=1e-5)
    assert losses.grad_norm == pytest.approx(reference.grad_norm, rel=1e-4)


# With an embedding that is not trained, the input of the first layer wants no gradient by itself.
FROZEN_EMBEDDING: dict[str, dict[str, Any]] = {
    "all adapters": MODEL,
    "adapters of experts": MODEL | {"lora": LoraConfig(rank=4, targets=[LoraTarget.experts])},
    "frozen embedding": {"frozen": [FrozenPart.embedding]},
}


@pytest.mark.parametrize("name", FROZEN_EMBEDDING)
def test_recomputing_layers_does_not_stop_their_training(name: str, folder: Path) -> None:
    kept, *computed_again = (
        run_ranks(1, _train, Recipe(folder=folder, model=FROZEN_EMBEDDING[name] | {"recompute": recompute}, steps=2))[0]
        for recompute in Recompute
    )
    assert computed_again == [kept, kept]


def test_the_first_loss_is_the_models_own_and_losses_fall(folder: Path, reference: Losses) -> None:
    plain = run_ranks(1, _train, Recipe(folder=folder, model=MODEL | {"lora": LoraConfig()}, steps=1))[0]
    # Adapters add exact zeros at first; frozen weights may run in another kernel, which rounds FP32 sums otherwise.
    assert reference.loss[0] == pytest.approx(plain.loss[0], rel=2e-7)
    assert reference.loss[1] != pytest.approx(plain.loss[0], rel=1e-4)
    assert reference.loss[-1] < reference.loss[0]
