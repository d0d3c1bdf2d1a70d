"""Every member of every process group makes the same collectives, with and without experts of its own."""

from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from megatron_ads.config.model import FrozenPart, LoraConfig, LoraTarget
from parity_tests.harness.ranks import run_ranks
from parity_tests.harness.training_jobs import Recipe, run_steps, save, start
from tests.collective_trace import Trace, compare_traces, trace_collectives
from tests.models.checkpoints import V3, write_checkpoint

PHASES = ("step", "save", "load", "step after load")
THREE_DENSE_LAYERS = {"first_k_dense_replace": 3}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One layout, and which of its ranks have a stub in the place of an optimizer, of the experts' above all."""

    world: int
    layout: dict[str, object]
    stubs: tuple[int, ...]
    members: int = 2
    model: tuple[tuple[str, object], ...] = ()
    optim: tuple[tuple[str, object], ...] = ()
    shape: tuple[tuple[str, object], ...] = ()


PP2_EP2 = Case(world=4, layout={"pp": 2, "ep": 2}, stubs=(0, 1))
CASES = {
    "pp2-ep2": PP2_EP2,
    "clipping off": replace(PP2_EP2, optim=(("clip_grad", 0.0),)),
    "clipping every step": replace(PP2_EP2, optim=(("clip_grad", 1e-3),)),
    "bf16": replace(PP2_EP2, model=(("precision", "bf16"),)),
    "frozen experts": replace(PP2_EP2, model=(("frozen", [FrozenPart.experts]),), members=1, stubs=()),
    "adapters": replace(PP2_EP2, model=(("lora", LoraConfig(rank=4)),)),
    "adapters of attention": replace(
        PP2_EP2, model=(("lora", LoraConfig(rank=4, targets=[LoraTarget.attention])),), members=1, stubs=()
    ),
    # Nobody trains a dense parameter, and stage 0 nothing at all.
    "adapters of experts": replace(
        PP2_EP2, model=(("lora", LoraConfig(rank=4, targets=[LoraTarget.experts])),), stubs=(0, 1, 2, 3)
    ),
    # The block is kept as loaded, so nothing on stage 1 trains experts.
    "mtp alone on its stage": replace(PP2_EP2, layout={"pp": 2, "ep": 2, "pipeline": "Etttt|mL"}, stubs=(2, 3)),
    # Two chunks a rank; stage 0 runs layers 0 and 2, both dense.
    "pp2-vpp2": replace(PP2_EP2, layout={"pp": 2, "vpp": 2, "ep": 2}, shape=tuple(THREE_DENSE_LAYERS.items())),
    "stage without layers": replace(PP2_EP2, layout={"pp": 2, "ep": 2, "pipeline": "E|ttttmL"}),
    "stage 0 dense-only of pp4-ep2": Case(
        world=8, layout={"pp": 4, "ep": 2, "pipeline": "Ett|t|t|mL"}, stubs=(0, 1, 6, 7)
    ),
}


def _traced(recipe: Recipe) -> tuple[dict[str, Trace], list[str], list[float]]:
    """Trace a second step, a save, a load and a step; return them with the kinds of members and the losses."""
    from megatron_ads.training.checkpoint import load_checkpoint

    model, shards, source = start(recipe)
    run_steps(model, shards, 0, 1)
    traces = {}
    with trace_collectives() as traces["step"]:
        run_steps(model, shards, 1, 1)
    with trace_collectives() as traces["save"]:
        folder = save(recipe, model, shards, source)
    straight = run_steps(model, shards, 2, 1).loss
    with trace_collectives() as traces["load"]:
        load_checkpoint(folder, model.chunks, model.optimizer, shards.layout, adapters=model.adapters)
    with trace_collectives() as traces["step after load"]:
        resumed = run_steps(model, shards, 2, 1).loss
    return traces, [type(member).__name__ for member in model.optimizer.members], straight + resumed


@pytest.mark.parametrize("name", CASES)
def test_members_of_a_group_make_the_same_collectives_in_step_save_and_load(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    recipe = Recipe(
        folder=write_checkpoint(tmp_path / "v3", V3 | dict(case.shape)),
        layout=case.layout,
        model=dict(case.model),
        optim=dict(case.optim),
        checkpoints=tmp_path / "checkpoints",
    )
    answers = run_ranks(case.world, _traced, recipe, timeout=240)
    members = [members for _, members, _ in answers]
    assert all(len(chain) == case.members for chain in members)
    assert tuple(rank for rank, chain in enumerate(members) if "StubOptimizer" in chain) == case.stubs
    for phase in PHASES:
        traces = {rank: traces[phase] for rank, (traces, _, _) in enumerate(answers)}
        assert compare_traces(traces) == []
        assert all(trace.count() > 0 for trace in traces.values())
        if "step" in phase:
            # One sum over the job for each kind of member: squares, non-finite values, zeros.
            assert [_reductions_of_statistics(trace) for trace in traces.values()] == [case.members] * case.world
    for _, _, (straight, resumed) in answers:
        assert straight == resumed


def _reductions_of_statistics(trace: Trace) -> int:
    whole_job = next(calls for group, calls in trace.collectives.items() if group.name == "default")
    return [str(call) for call in whole_job].count("allreduce(float64[3]; sum)")
