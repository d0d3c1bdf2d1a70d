"""What Megatron-Core's optimizer does on a rank without experts and between ep 1 and ep > 1, and what ours does.

Each ``test_megatron_core_...`` fails once upstream is right: then what ours has in its place can go.
"""

from dataclasses import replace
from pathlib import Path

import pytest
import torch.distributed as dist

from megatron_ads.layout import ParallelLayout
from parity_tests.harness.ranks import run_ranks
from parity_tests.harness.training_jobs import Recipe, resume_and_train, run_steps, save, start, train_and_save
from tests.models.checkpoints import V3, write_checkpoint
from tests.optim.stock import FORMAT, StockJob, StockTrainer, fused_adam_installed

PP2_EP2 = ParallelLayout(world=4, pp=2, ep=2)
EP2 = ParallelLayout(world=2, ep=2)
STEPS = 3


def _recipe(root: Path, **layout: int) -> Recipe:
    return Recipe(
        folder=write_checkpoint(root / "v3", V3), layout=layout, checkpoints=root / "checkpoints", steps=STEPS
    )


def _stock_train_and_save(job: StockJob) -> list[float]:
    """Take three steps, save, take three more; return the losses of the latter."""
    with fused_adam_installed(job.fused_adam):
        trainer = StockTrainer(job)
        for step in range(STEPS):
            trainer.step(step)
        trainer.save()
        return [trainer.step(step) for step in range(STEPS, 2 * STEPS)]


# An expert-less rank has nothing to save


def _stock_state_after_a_step(layout: ParallelLayout) -> str:
    trainer = StockTrainer(StockJob(layout=layout, fused_adam=False))
    trainer.step(0)
    try:
        trainer.optimizer.state_dict()
    except AssertionError:
        return "AssertionError"
    return "saved"


@pytest.mark.slow
def test_megatron_core_asserts_at_the_first_save_of_a_rank_without_experts() -> None:
    assert run_ranks(4, _stock_state_after_a_step, PP2_EP2) == ["AssertionError"] * 2 + ["saved"] * 2


def _save_before_and_after_the_first_step(recipe: Recipe) -> list[str]:
    model, shards, source = start(recipe)
    first = save(recipe, model, shards, source)
    run_steps(model, shards, 0, 1)
    return [first.name, save(recipe, model, shards, source).name]


def test_ours_saves_on_every_rank_before_and_after_the_first_step(tmp_path: Path) -> None:
    names = run_ranks(4, _save_before_and_after_the_first_step, _recipe(tmp_path, pp=2, ep=2))
    assert names == [["step-00000000", "step-00000001"]] * 4


# The experts' step count after a resume


def _stock_resume(job: StockJob) -> tuple[list[float], list[int | None], str]:
    """Load and take three steps; return the losses, the experts' step counts as loaded, and how the next save ends."""
    with fused_adam_installed():
        trainer = StockTrainer(job)
        trainer.load()
        counts = [group.get("step") for group in trainer.members[1].optimizer.param_groups]
        losses = [trainer.step(step) for step in range(STEPS, 2 * STEPS)]
        try:
            trainer.optimizer._synchronize_steps()  # the first thing that a save does
        except AssertionError as error:
            return losses, counts, str(error)
        return losses, counts, ""


@pytest.mark.slow
def test_megatron_core_loses_the_step_of_the_experts_when_rank_0_has_none(tmp_path: Path) -> None:
    job = StockJob(layout=PP2_EP2, folder=tmp_path)
    straight = run_ranks(4, _stock_train_and_save, job)
    resumed = run_ranks(4, _stock_resume, job)
    for rank in (2, 3):
        losses, counts, next_save = resumed[rank]
        assert counts == [None]  # lost
        assert losses[0] == straight[rank][0]  # the weights are right
        assert losses[1:] != straight[rank][1:]  # the bias correction began again
        assert next_save.startswith("steps: [")


def _resumed_counts(recipe: Recipe) -> tuple[list[int], list[int], list[float]]:
    """Resume; return the members' updates and their groups' steps as loaded, and the losses from there."""
    from megatron_ads.optim.members import ShardedMember
    from megatron_ads.training.checkpoint import complete_checkpoints, load_checkpoint

    model, shards, _ = start(recipe)
    load_checkpoint(complete_checkpoints(recipe.checkpoints)[-1][1], model.chunks, model.optimizer, shards.layout)
    members = model.optimizer.members
    sharded = [member for member in members if isinstance(member, ShardedMember)]
    steps = [group["step"] for member in sharded for group in member.groups]
    return [member.updates for member in members], steps, run_steps(model, shards, STEPS, STEPS).loss


def _straight(recipe: Recipe) -> list[float]:
    model, shards, source = start(recipe)
    run_steps(model, shards, 0, STEPS)
    save(recipe, model, shards, source)
    return run_steps(model, shards, STEPS, STEPS).loss


def test_ours_keeps_the_step_of_every_member_on_every_rank(tmp_path: Path) -> None:
    recipe = _recipe(tmp_path, pp=2, ep=2)
    straight = run_ranks(4, _straight, recipe)
    for rank, (updates, steps, losses) in enumerate(run_ranks(4, _resumed_counts, recipe)):
        assert updates == [STEPS, STEPS]
        assert set(steps) == {STEPS}
        assert losses == straight[rank]


# torch's Adam keeps a step for every parameter, which the format has no place for


def _stock_load_into_a_stepped_optimizer(job: StockJob) -> str:
    trainer = StockTrainer(job)
    trainer.step(0)  # without any state, the assertion above comes first
    try:
        trainer.load()
    except KeyError as error:
        return repr(error)
    return "loaded"


@pytest.mark.slow
def test_megatron_core_misses_a_step_when_it_loads_into_torch_adam(tmp_path: Path) -> None:
    job = StockJob(layout=EP2, folder=tmp_path, fused_adam=False)
    run_ranks(2, _stock_train_and_save, job)
    assert run_ranks(2, _stock_load_into_a_stepped_optimizer, job) == ["KeyError('step')"] * 2


def _load_into_a_stepped_optimizer(recipe: Recipe) -> list[float]:
    from megatron_ads.training.checkpoint import complete_checkpoints, load_checkpoint

    model, shards, _ = start(recipe)
    run_steps(model, shards, 0, 1)
    load_checkpoint(complete_checkpoints(recipe.checkpoints)[-1][1], model.chunks, model.optimizer, shards.layout)
    return run_steps(model, shards, STEPS, STEPS).loss


def test_ours_loads_into_a_fresh_and_into_a_stepped_optimizer_alike(tmp_path: Path) -> None:
    recipe = _recipe(tmp_path, ep=2)
    straight = run_ranks(2, _straight, recipe)
    assert [losses.loss for losses in run_ranks(2, resume_and_train, recipe)] == straight
    assert run_ranks(2, _load_into_a_stepped_optimizer, recipe) == straight


# ep decides whether there is a chain, and so what the keys are


def _stock_load(job: StockJob) -> str:
    from torch.distributed.checkpoint import CheckpointException

    with fused_adam_installed():
        trainer = StockTrainer(job)
        try:
            trainer.load()
        except (CheckpointException, KeyError) as error:
            return f"{type(error).__name__}: {error}"
    return "loaded"


@pytest.mark.slow
@pytest.mark.parametrize("avoid_prefix", [False, True])
def test_megatron_core_cannot_load_a_checkpoint_of_ep_2_with_ep_1(tmp_path: Path, avoid_prefix: bool) -> None:
    job = StockJob(layout=EP2, folder=tmp_path, metadata=FORMAT | {"chained_optim_avoid_prefix": avoid_prefix})
    run_ranks(2, _stock_train_and_save, job)
    assert run_ranks(2, _stock_load, job) == ["loaded"] * 2
    (ending,) = run_ranks(1, _stock_load, replace(job, layout=ParallelLayout(world=1)))
    # Without prefixes the tensors' keys agree, and the parameter groups are still those of a chain.
    said = "KeyError: 'optimizer'" if avoid_prefix else "not in state dict: ['chained_0.optimizer.state"
    assert said in ending


def _saved_keys(recipe: Recipe) -> set[str]:
    from megatron.core import dist_checkpointing

    from megatron_ads.training.checkpoint import complete_checkpoints

    train_and_save(recipe)
    dist.barrier()
    _, folder = complete_checkpoints(recipe.checkpoints)[-1]
    return {key for key in dist_checkpointing.load_tensors_metadata(str(folder)) if not key.startswith("rng.")}


def test_ours_has_the_same_keys_with_ep_1_and_ep_2(tmp_path: Path) -> None:
    with_ep_2 = replace(_recipe(tmp_path, ep=2), steps=1)
    alone = replace(with_ep_2, layout={}, checkpoints=tmp_path / "alone")
    (keys,) = run_ranks(1, _saved_keys, alone)
    assert run_ranks(2, _saved_keys, with_ep_2) == [keys] * 2
    assert "optimizer.state.exp_avg.decoder.layers.2.mlp.experts.experts.linear_fc1.weight" in keys
