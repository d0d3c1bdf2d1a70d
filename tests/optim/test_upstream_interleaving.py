"""Two stages of two chunks each: the next stage is also the previous one.

megatron-core (0.16 to 0.19) batches point-to-point messages unless told otherwise, and then pairs them up wrongly.
"""

import pytest

from parity_tests.harness.ranks import run_ranks
from parity_tests.harness.training_jobs import Losses, Recipe, run_steps, start
from tests.models.checkpoints import V3, write_checkpoint


def _train(recipe: Recipe, batched: bool) -> Losses:
    model, shards, _ = start(recipe)
    if batched:
        for chunk in model.models:
            chunk.config.overlap_p2p_comm, chunk.config.batch_p2p_comm = False, True  # Megatron-Core's defaults
    return run_steps(model, shards, 0, 1)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    folder = write_checkpoint(tmp_path_factory.mktemp("interleaving") / "v3", V3)
    return Recipe(folder=folder, layout={"pp": 2, "vpp": 2})


@pytest.fixture(scope="module")
def reference(recipe: Recipe) -> Losses:
    (losses,) = run_ranks(1, _train, Recipe(folder=recipe.folder), False)
    return losses


def test_megatron_core_computes_wrong_numbers_with_batched_messages(recipe: Recipe, reference: Losses) -> None:
    for losses in run_ranks(2, _train, recipe, True):
        assert abs(losses.loss[0] - reference.loss[0]) > 1e-4 * reference.loss[0]
        assert abs(losses.grad_norm[0] - reference.grad_norm[0]) > 0.1 * reference.grad_norm[0]


def test_ours_computes_what_one_stage_does(recipe: Recipe, reference: Losses) -> None:
    for losses in run_ranks(2, _train, recipe, False):
        assert losses.loss == pytest.approx(reference.loss, rel=1e-5)
        assert losses.grad_norm == pytest.approx(reference.grad_norm, rel=1e-4)
