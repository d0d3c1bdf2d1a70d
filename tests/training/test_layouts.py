"""The same ten steps under every layout."""

import pytest

from parity_tests.harness.ranks import run_ranks
from parity_tests.harness.training_jobs import Recipe, train
from tests.models.checkpoints import V3, write_checkpoint

STEPS = 10
LAYOUTS = {
    "pp2-ep2": (4, {"pp": 2, "ep": 2}),
    "pp4": (4, {"pp": 4}),
    "ep4": (4, {"ep": 4}),
    "tp2-ep2": (2, {"tp": 2, "ep": 2, "etp": 1}),
    "tp2-etp2": (2, {"tp": 2, "etp": 2}),
    "pp2-vpp2": (2, {"pp": 2, "vpp": 2}),
    "pp2-stage-without-layers": (2, {"pp": 2, "pipeline": "E|ttttmL"}),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("model") / "v3", V3)


@pytest.fixture(scope="module")
def reference(folder):
    return run_ranks(1, train, Recipe(folder=folder, steps=STEPS))[0]


@pytest.mark.parametrize("name", LAYOUTS)
def test_losses_and_gradient_norms_do_not_depend_on_the_layout(name, folder, reference):
    world, layout = LAYOUTS[name]
    for losses in run_ranks(world, train, Recipe(folder=folder, layout=layout, steps=STEPS)):
        assert losses.loss == pytest.approx(reference.loss, rel=1e-5)
        assert losses.grad_norm == pytest.approx(reference.grad_norm, rel=1e-4)


def test_losses_fall(reference):
    assert reference.loss[-1] < reference.loss[0]
