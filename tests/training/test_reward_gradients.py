"""Inner products of the rewards' gradients: as autograd computes them on another implementation, under every layout."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_ads.config.rl import Combine, PolicyConfig, RewardConfig, RewardsConfig
from megatron_ads.data.packed_batch import PackedBatch
from megatron_ads.losses.policy import ADVANTAGES, OLD, policy_loss
from megatron_ads.rewards.weights import RewardWeights
from parity_tests.harness.ranks import run_ranks
from parity_tests.harness.training_jobs import Recipe, start
from tests.models.checkpoints import V3, write_checkpoint
from tests.training.test_step import SEQ_LENGTH, samples, share_of_rank

LAYOUTS = {
    "one": (1, {}),
    "dp2": (2, {}),
    "pp2-ep2-stage-0-without-experts": (4, {"pp": 2, "ep": 2, "first_stage_layers": 2}),
    "tp2": (2, {"tp": 2, "etp": 2}),
}
NAMES = ("semantic", "ctcvr", "contrary")
MODEL = {"expert_bias_update_rate": 0.01}


def advantages() -> dict[str, list[float]]:
    """Return A of each row by reward: two that mostly agree, and one that is against the first."""
    draw = np.random.default_rng(5)
    first, other = draw.normal(size=(2, len(samples())))
    return {"semantic": [*first], "ctcvr": [*(first + 0.5 * other)], "contrary": [*(-first)]}


def _inner_products(recipe: Recipe) -> tuple[dict[str, float], bool, float]:
    """Return I_k by reward; whether anything but gradients changed; and how far the next update moves router biases."""
    from megatron_ads.data.batches import batches_of_all
    from megatron_ads.training.reward_gradients import reward_inner_products
    from megatron_ads.training.step import run_log_probabilities, run_step

    model, shards, _ = start(recipe)
    rows, share, loss = samples(), share_of_rank(shards.layout), policy_loss(PolicyConfig())
    old = [values.numpy() for values in run_log_probabilities(rows, share, model.chunks, seq_length=SEQ_LENGTH)]

    def batches_of(name: str) -> list[PackedBatch]:
        alone = [
            np.full(row.predictions, value, np.float32) for row, value in zip(rows, advantages()[name], strict=True)
        ]
        return batches_of_all(rows, share, seq_length=SEQ_LENGTH, packing=True, extra={ADVANTAGES: alone, OLD: old})

    def state() -> list[torch.Tensor]:
        return [t.detach().clone() for chunk in model.models for t in (*chunk.parameters(), *chunk.buffers())]

    before = state()
    found = reward_inner_products(NAMES, batches_of, model, loss)
    changed = not all(map(torch.equal, before, state()))
    run_step(batches_of("semantic"), model.chunks, model.optimizer, learning_rate=0.0, loss=loss)
    moved = [float((after - was).abs().max()) for was, after in zip(before, state(), strict=True)]
    return found, changed, max(moved)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    return write_checkpoint(tmp_path_factory.mktemp("model") / "v3", V3)


@pytest.fixture(scope="module")
def expected(folder: Path) -> dict[str, float]:
    """I_k of grad L_k = -1/C sum_t A grad log p_t, which is that of the clipped objective while the ratio is 1."""
    model = AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32).eval()
    weights, gradients = list(model.parameters()), {}
    for name in NAMES:
        objective = torch.zeros(())
        for row, advantage in zip(samples(), advantages()[name], strict=True):
            tokens = torch.from_numpy(row.tokens).long()[None]
            log_p = model(tokens).logits[0, :-1].float().log_softmax(-1).gather(1, tokens[0, 1:, None])[:, 0]
            objective = objective - float(advantage) * (torch.from_numpy(row.loss_weights[1:]) * log_p).sum()
        objective = objective / sum(row.target_count for row in samples())
        found = torch.autograd.grad(objective, weights, allow_unused=True, materialize_grads=True)
        gradients[name] = torch.cat([gradient.flatten().double() for gradient in found])
    together = torch.stack([*gradients.values()]).sum(dim=0)
    return {name: float(gradient @ together) for name, gradient in gradients.items()}


@pytest.mark.parametrize("name", LAYOUTS)
def test_inner_products_are_those_of_autograd_under_every_layout_and_change_nothing(
    name: str, folder: Path, expected: dict[str, float]
) -> None:
    world, layout = LAYOUTS[name]
    ranks = run_ranks(world, _inner_products, Recipe(folder=folder, layout=layout, model=MODEL))
    for found, changed, _ in ranks:
        assert found == ranks[0][0] == pytest.approx(expected, rel=1e-5)
        assert not changed, "weights and router biases stay"
    assert max(farthest for _, _, farthest in ranks) == pytest.approx(0.01, rel=1e-3), (
        "router biases follow an update again"
    )


def test_weights_move_to_the_rewards_whose_gradients_agree(expected: dict[str, float]) -> None:
    use = [RewardConfig(name=name) for name in NAMES]
    weights = RewardWeights(RewardsConfig(use=use, combine=Combine.popo))
    weights.update(expected)
    assert weights.current["semantic"] > 1 / 3 and weights.current["ctcvr"] > 1 / 3 > weights.current["contrary"]
