"""The experts' part of the gradient norm under tensor parallelism without expert tensor parallelism.

Megatron-LM #5916: megatron-core below 0.19 judges by the tensor-parallel rank whether an expert's gradient is a repeat.
From 0.19 on it judges as ours does.
"""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_ads.layout import ParallelLayout
from megatron_ads.runtime.megatron_version import megatron_core_since
from parity_tests.harness.ranks import run_ranks
from parity_tests.harness.training_jobs import Recipe, batches, start
from tests.models.checkpoints import V3, write_checkpoint
from tests.optim.stock import StockJob, StockTrainer, fused_adam_installed


def _norm_of_expert_gradients(chunks: list[torch.nn.Module]) -> float:
    """Add up the squares over ranks that all own other experts."""
    experts = [parameter for chunk in chunks for name, parameter in chunk.named_parameters() if ".experts." in name]
    trained = [parameter for parameter in experts if parameter.requires_grad]
    squares = torch.stack([parameter.main_grad.double().square().sum() for parameter in trained]).sum()
    dist.all_reduce(squares)
    return float(squares) ** 0.5


def _stock_norms(layout: ParallelLayout) -> tuple[float, float]:
    """Return the experts' gradient norm as Megatron-Core has it, and as it is."""
    with fused_adam_installed():
        trainer = StockTrainer(StockJob(layout=layout, experts_marked=False))
        trainer.backward(0)
        _, experts = trainer.members
        experts.prepare_grads()
        return float(experts.get_grad_norm()), _norm_of_expert_gradients([trainer.chunk])


def test_megatron_core_before_0_19_leaves_experts_out_of_the_norm_when_tp_is_2_and_etp_1() -> None:
    for stated, true in run_ranks(2, _stock_norms, ParallelLayout(world=2, tp=2, ep=2, etp=1)):
        if megatron_core_since("0.19"):
            assert stated == pytest.approx(true, rel=1e-6)
        else:
            assert stated < 0.9 * true


def test_megatron_core_has_the_norm_right_without_tensor_parallelism() -> None:
    for stated, true in run_ranks(2, _stock_norms, ParallelLayout(world=2, ep=2)):
        assert stated == pytest.approx(true, rel=1e-6)


def _our_norms(recipe: Recipe) -> tuple[float, float, float]:
    """Return the experts' norm as reported, as it is, and the whole norm, of the first step."""
    from megatron_ads.training.step import run_step

    model, shards, _ = start(recipe)
    rows = batches(shards.shape.vocab_size, 0, shards.layout)
    update = run_step(rows, model.chunks, model.optimizer, learning_rate=0.0).update
    return update.norm_by_kind["expert"], _norm_of_expert_gradients(model.chunks), update.grad_norm


def test_ours_counts_every_expert_once(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "v3", V3)
    optim = {"clip_grad": 0.0}  # leave the gradients as they are
    ((_, true, whole),) = run_ranks(1, _our_norms, Recipe(folder=folder, optim=optim))
    assert 0.1 * whole < true < 0.99 * whole  # both kinds matter, or this shows nothing
    for layout in ({"tp": 2, "ep": 2, "etp": 1}, {"ep": 2}):
        for stated, here, same in run_ranks(2, _our_norms, Recipe(folder=folder, layout=layout, optim=optim)):
            assert (stated, here, same) == pytest.approx((true, true, whole), rel=1e-5)
