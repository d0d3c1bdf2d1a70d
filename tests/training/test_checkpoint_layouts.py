"""Saved under one layout, resumed under the same and under others."""

import pytest

from parity_tests.harness.ranks import run_ranks
from parity_tests.harness.training_jobs import Recipe, resume_and_train, train, train_and_save
from tests.models.checkpoints import V3, write_checkpoint

SAVED_STEPS, MORE_STEPS = 3, 3
SAVED_LAYOUT = {"pp": 2, "ep": 2}
"""Stage 0 has no routed experts and holds rank 0, which writes the common state."""
OTHERS = {
    "pp4-ep1": (4, {"pp": 4}),
    "pp1-ep4": (4, {"ep": 4}),
    "pp1-ep1": (1, {}),
    "tp2": (2, {"tp": 2, "ep": 2}),
    "pp2-vpp2": (2, {"pp": 2, "vpp": 2}),
}


@pytest.fixture(scope="module", params=["fp32", "bf16"])
def saved(request, tmp_path_factory):
    """A checkpoint after three steps, and the losses of six steps without interruption."""
    root = tmp_path_factory.mktemp(request.param)
    recipe = Recipe(
        folder=write_checkpoint(root / "v3", V3),
        layout=SAVED_LAYOUT,
        checkpoints=root / "checkpoints",
        steps=SAVED_STEPS,
        model={"precision": request.param},
    )
    run_ranks(4, train_and_save, recipe)
    straight = Recipe(folder=recipe.folder, layout=SAVED_LAYOUT, steps=SAVED_STEPS + MORE_STEPS, model=recipe.model)
    return recipe, run_ranks(4, train, straight)[0]


def test_resuming_on_the_same_layout_is_bit_equal(saved):
    recipe, straight = saved
    resumed = run_ranks(4, resume_and_train, recipe)
    for losses in resumed:
        assert losses.loss == straight.loss[SAVED_STEPS:]
        assert losses.grad_norm == straight.grad_norm[SAVED_STEPS:]


@pytest.mark.parametrize("name", OTHERS)
def test_resuming_on_another_layout_continues_the_curve(name, saved):
    recipe, straight = saved
    world, layout = OTHERS[name]
    other = Recipe(
        folder=recipe.folder,
        layout=layout,
        checkpoints=recipe.checkpoints,
        steps=MORE_STEPS,
        model=recipe.model,
    )
    tolerance = 1e-5 if recipe.model["precision"] == "fp32" else 2e-3
    assert run_ranks(world, resume_and_train, other)[0].loss == pytest.approx(
        straight.loss[SAVED_STEPS:], rel=tolerance
    )
