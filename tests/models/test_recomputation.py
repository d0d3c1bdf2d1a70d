"""Recomputing activations changes no gradient, not by one bit."""

from pathlib import Path

import pytest
import torch

from conversion.layer_specs import LayerSpec
from megatron_ads.config.model import Recompute
from megatron_ads.layout import ParallelLayout
from parity_tests.harness.model_jobs import Job, train_pass
from parity_tests.harness.ranks import run_ranks
from tests.models.checkpoints import V3, write_checkpoint


@pytest.mark.parametrize("spec", [LayerSpec.LOCAL, LayerSpec.GROUPED])
@pytest.mark.parametrize(
    "layout", [ParallelLayout(world=1), ParallelLayout(world=2, tp=2, etp=2)], ids=["alone", "tp2"]
)
def test_gradients_do_not_depend_on_recomputation(tmp_path: Path, spec: LayerSpec, layout: ParallelLayout) -> None:
    folder = write_checkpoint(tmp_path / "hf", V3)
    results = {}
    for recompute in Recompute:
        settings = {"spec": spec, "recompute": recompute, "mtp_loss_weight": 0.3, "expert_bias_update_rate": 0.01}
        results[recompute] = run_ranks(layout.world, train_pass, Job(folder=folder, layout=layout, settings=settings))
    for recompute in (Recompute.selective, Recompute.full):
        for ours, plain in zip(results[recompute], results[Recompute.none], strict=True):
            assert (ours.loss_sum, ours.load) == (plain.loss_sum, plain.load)
            assert len(ours.grads) > 100
            for name, grad in plain.grads.items():
                assert torch.equal(ours.grads[name], grad), f"{recompute}: {name}"
            for name, bias in plain.expert_bias.items():
                assert torch.equal(ours.expert_bias[name], bias), f"{recompute}: {name}"
