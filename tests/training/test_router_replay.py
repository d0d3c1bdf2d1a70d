"""Router replay: an update repeats the recorded experts, whatever its router would choose, and still trains it."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock, Mock

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_ads.config.model import LoraConfig
from megatron_ads.config.recipes import load_job
from megatron_ads.data.batches import ReplicaShare, batches_of_all
from megatron_ads.data.packed_batch import PLACE, PackedBatch, places
from megatron_ads.rollouts import Rollout
from megatron_ads.rows import TokenizedRow
from megatron_ads.training.rollout.dump import ScoredStep
from parity_tests.harness.ranks import run_ranks
from parity_tests.harness.training_jobs import Recipe, start
from tests.models.checkpoints import V2_LITE, V3, write_checkpoint
from tests.training.test_step import SEQ_LENGTH, samples, share_of_rank

BIASES = {"recompute": "full", "expert_bias_update_rate": 0.01}
LORA = {"recompute": "selective", "lora": LoraConfig(rank=4)}
CASES: dict[str, tuple[int, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "pp2-ep2-stage-0-without-experts": (4, {"pp": 2, "ep": 2, "first_stage_layers": 2}, V3, BIASES),
    "pp2-vpp2-lora": (2, {"pp": 2, "vpp": 2}, V3, LORA),
    "tp2-aux-loss": (2, {"tp": 2, "etp": 2}, V2_LITE, {"aux_loss_coefficient": 0.1}),
}
"""Ranks, layout, model, and what else the recipe says of it."""

Choices = dict[tuple[int, int], tuple[int, ...]]
"""The experts of each token, by layer and place."""


@dataclass(frozen=True, slots=True)
class Step:
    """What a step used and reported on one rank."""

    used: Choices
    reported: tuple[float, float]
    """Loss and gradient norm."""


@dataclass(frozen=True, slots=True)
class Found:
    """What one rank saw."""

    recorded: Choices
    unchanged: Step
    unchanged_replayed: Step
    changed: Step
    changed_replayed: Step
    biases_moved: bool
    router_gradients: list[float]
    """Largest of each router that is trained, in the last of the steps."""


def _routers(models: Sequence[Any]) -> list[Any]:
    return [module for model in models for name, module in model.named_modules() if name.endswith("mlp.router")]


@contextmanager
def _seen(models: Sequence[Any], batches: Sequence[PackedBatch], *, gradients: bool) -> Iterator[Choices]:
    """Yield what gets the experts that this rank's routers use for each token in a pass of one kind."""
    from megatron_ads.layout import rank

    found, calls = Choices(), dict[Any, int]()

    def see(router: Any, inputs: Any, output: tuple[Tensor, Tensor]) -> None:
        if torch.is_grad_enabled() is not gradients:
            return
        calls[router] = calls.get(router, -1) + 1
        size = router.config.tensor_model_parallel_size
        mine = batches[calls[router]].extra[PLACE].view(-1).chunk(size)[rank() % size]
        for place, experts in zip(mine.tolist(), output[1], strict=True):
            if place:
                found[router.layer_number, place] = tuple(experts.nonzero().view(-1).tolist())

    hooks = [router.register_forward_hook(see) for router in _routers(models)]
    yield found
    for hook in hooks:
        hook.remove()


def _perturb(models: Sequence[Any]) -> None:
    """Change routers as large updates might, those of all replicas alike."""
    for router in _routers(models):
        noise = torch.randn(router.weight.shape, generator=torch.Generator().manual_seed(router.layer_number))
        router.weight.data.add_(noise)


def _passes(recipe: Recipe) -> Found:
    """Record a pass over packed rows; step on them with the same routers, and unpacked with changed ones."""
    from megatron_ads.training.router_replay import ExpertChoices
    from megatron_ads.training.step import run_log_probabilities_and_entropies, run_step

    model, shards, _ = start(recipe)
    rows, share = samples(), share_of_rank(shards.layout)
    choices = ExpertChoices(model.models, rows)

    def cut(packing: bool) -> list[PackedBatch]:
        extra = {PLACE: places(rows)}
        return batches_of_all(rows, share, seq_length=SEQ_LENGTH, packing=packing, extra=extra)

    def step(packing: bool, **routing: Any) -> Step:
        batches = cut(packing)
        with _seen(model.models, batches, gradients=True) as used:
            report = run_step(batches, model.chunks, model.optimizer, learning_rate=0.0, **routing)
        assert report.update is not None
        return Step(used, (report.loss, report.update.grad_norm))

    def biases() -> list[Tensor]:
        return [router.expert_bias.clone() for router in _routers(model.models) if router.expert_bias is not None]

    with _seen(model.models, cut(True), gradients=False) as recorded:
        run_log_probabilities_and_entropies(rows, share, model.chunks, seq_length=SEQ_LENGTH, routing=choices.recorded)
    before = biases()
    unchanged, unchanged_replayed = step(True), step(True, routing=choices.replayed)
    moved = not all(map(torch.equal, before, biases()))
    _perturb(model.models)
    changed, changed_replayed = step(False), step(False, routing=choices.replayed)
    trained = [router.weight for router in _routers(model.models) if router.weight.requires_grad]
    return Found(
        recorded=recorded,
        unchanged=unchanged,
        unchanged_replayed=unchanged_replayed,
        changed=changed,
        changed_replayed=changed_replayed,
        biases_moved=moved,
        router_gradients=[float(weight.main_grad.abs().max()) for weight in trained],
    )


def _told(row: int) -> Rollout:
    """Return an answer of three tokens, in groups of two."""
    given: Any = SimpleNamespace(id=f"r{row}", task="task", weight=1.0)
    return Rollout(
        row=given,
        group=row // 2,
        prompt_tokens=(1,) * (row + 1),
        answer_tokens=(2, 3, 4),
        text="",
        cut_off=False,
        log_probabilities=(-1.0, -1.0, -1.0),
        weights="",
    )


@pytest.mark.parametrize(("mode", "routed"), [("R2", ["recorded", "replayed"]), ("disabled", ["nullcontext"] * 2)])
def test_each_update_repeats_what_was_recorded_of_its_own_rows(
    mode: str, routed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron_ads.training import policy_update

    passes, updates = list[Any](), list[Any]()

    def run_pass(rows: Sequence[TokenizedRow], *others: Any, routing: Any, **settings: Any) -> Any:
        passes.append(routing)
        return ([torch.zeros(row.predictions) for row in rows],) * 2

    def run_update(*others: Any, routing: Any, **settings: Any) -> Any:
        updates.append(routing)
        return Mock()

    monkeypatch.setattr(policy_update, "run_log_probabilities_and_entropies", run_pass)
    monkeypatch.setattr(policy_update, "run_step", run_update)
    monkeypatch.setattr(policy_update, "policy_metrics", lambda *given: {"actor/ratio": 1, "actor/ppo_kl": 0})
    monkeypatch.setattr(policy_update, "_together", Mock())
    config: Any = load_job("rl/quickstart", ["model.load=x", "policy.minibatches=2", f"policy.router_replay={mode}"])
    update = policy_update.PolicyUpdate(
        config=config, session=MagicMock(), share=ReplicaShare(4, 1, 0, 1), reference=MagicMock(host_bytes=0)
    )
    monkeypatch.setattr(policy_update.PolicyUpdate, "_batches", Mock())
    rewards = {"label_agreement": np.arange(4.0)}
    found = ScoredStep(rollouts=[*map(_told, range(4))], rewards=rewards)
    update.run(found, Mock(current={"label_agreement": 1.0}), weights=None)
    names = [each.__name__ for each in (*passes[:2], *updates)]
    assert names == [routed[0]] * 2 + [routed[1]] * 2
    assert passes[2:] == [nullcontext] * 2, "the reference routes for itself"
    if mode == "R2":
        assert [each.__self__ for each in passes[:2]] == [each.__self__ for each in updates]
        assert [each.__self__._tokens for each in updates] == [3 + 4, 5 + 6]


def _of_all(ranks: Sequence[Choices]) -> Choices:
    return {key: experts for rank in ranks for key, experts in rank.items()}


@pytest.mark.parametrize("name", CASES)
def test_an_update_uses_the_recorded_experts_and_trains_the_router(name: str, tmp_path: Path) -> None:
    world, layout, config, model = CASES[name]
    recipe = Recipe(folder=write_checkpoint(tmp_path / "model", config), layout=layout, model=model)
    ranks: list[Found] = run_ranks(world, _passes, recipe)
    recorded = _of_all([rank.recorded for rank in ranks])
    layers = config["num_hidden_layers"] - config["first_k_dense_replace"]
    assert len(recorded) == layers * sum(row.predictions for row in samples())
    assert _of_all([rank.unchanged_replayed.used for rank in ranks]) == recorded
    assert _of_all([rank.changed_replayed.used for rank in ranks]) == recorded
    assert _of_all([rank.changed.used for rank in ranks]) != recorded  # the negative twin
    for rank in ranks:
        assert rank.unchanged_replayed.reported == rank.unchanged.reported, "to the bit"
        assert rank.changed_replayed.reported != rank.changed.reported
        assert all(rank.router_gradients)
    trained = sum(len(rank.router_gradients) for rank in ranks)
    assert trained == (0 if "lora" in model else layers * world // layout.get("pp", 1))
    assert any(rank.biases_moved for rank in ranks) is ("expert_bias_update_rate" in model)
