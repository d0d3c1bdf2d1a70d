"""The same ten steps under every layout."""

import pytest
from torch import equal
from torch.nn import Parameter

from megatron_ads.config.model import FrozenPart, Recompute
from parity_tests.harness.ranks import run_ranks
from parity_tests.harness.training_jobs import Recipe, run_steps, start, train
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


WITH_MTP = {"mtp_loss_weight": 0.3}
JOBS = {
    "only stage 0 recomputes": (
        4,
        {"pp": 2, "tp": 2, "ep": 2, "pipeline": "Ett|ttmL"},
        {"recompute": Recompute.selective, "recompute_stages": 1},
    ),
    "MTP layer on a stage of its own": (4, {"pp": 4, "pipeline": "Ett|tt|m|L"}, {"recompute": Recompute.full}),
    "MTP layer in a virtual chunk of its own": (4, {"pp": 4, "vpp": 2, "pipeline": "Et|t|t|t|||m|L"}, {}),
}


@pytest.fixture(scope="module")
def reference_with_mtp(folder):
    return run_ranks(1, train, Recipe(folder=folder, model=WITH_MTP, steps=3))[0]


@pytest.mark.parametrize("name", JOBS)
def test_losses_with_mtp_do_not_depend_on_where_it_is_and_what_is_recomputed(name, folder, reference_with_mtp):
    world, layout, model = JOBS[name]
    for losses in run_ranks(world, train, Recipe(folder=folder, layout=layout, model=WITH_MTP | model, steps=3)):
        assert losses.loss == pytest.approx(reference_with_mtp.loss, rel=1e-5)
        assert losses.grad_norm == pytest.approx(reference_with_mtp.grad_norm, rel=1e-4)


def _trained(recipe):
    """Train, and return the canonical names of this rank's parameters that have changed, and of those that have not."""
    from megatron_ads.models.weights import named_weights

    model, shards, _ = start(recipe)
    weights = [weight for weight in named_weights(model.models, model.spec) if isinstance(weight.tensor, Parameter)]
    before = [weight.tensor.detach().clone() for weight in weights]
    run_steps(model, shards, 0, 2)
    names = {True: set(), False: set()}
    for weight, old in zip(weights, before, strict=True):
        names[not equal(weight.tensor, old)] |= set(weight.canonical)
    return names[True], names[False]


def test_the_mtp_layer_is_trained_alone_where_all_else_is_frozen(folder):
    frozen = [part for part in FrozenPart if part is not FrozenPart.mtp]
    model = {"mtp_loss_weight": 1.0, "frozen": frozen, "recompute": Recompute.full}
    recipe = Recipe(folder=folder, layout={"pp": 2, "ep": 2, "pipeline": "Ett|ttmL"}, model=model)
    for rank, (changed, kept) in enumerate(run_ranks(4, _trained, recipe)):
        assert all(name.startswith("mtp.") for name in changed)
        assert not any(name.startswith("mtp.") for name in kept)
        assert (len(changed) > 10) == (rank >= 2)
        assert len(kept) > 10


def test_losses_fall(reference):
    assert reference.loss[-1] < reference.loss[0]
