"""Weights that follow what was learned: the equations on numbers worked by hand, and when they are renewed."""

import math

import numpy as np
import pytest

from megatron_ads.data.adaptive_weights import InstanceWeights, instance_weights, task_shares
from megatron_ads.data.batches import HeldOut
from megatron_ads.errors import DataError
from tests.data.rows import row


def test_the_equation_of_the_instance_weight():
    # beta = 0.5: Delta = 2 -> exp(-1) = 0.367879; Delta = 0 -> 1; Delta = -1 -> exp(0.5) = 1.648721.
    weights = instance_weights(np.array([5.0, 3.0, 2.0]), np.array([3.0, 3.0, 3.0]), beta=0.5, lowest=0.1, highest=4.0)
    assert weights == pytest.approx([0.367879, 1.0, 1.648721], abs=1e-6)


def test_instance_weights_stay_within_their_bounds_whatever_the_perplexity():
    before, now = np.array([1e300, 1.0, 10.0]), np.array([1.0, 1e300, 5.0])
    weights = instance_weights(before, now, beta=1.0, lowest=0.2, highest=5.0)
    assert weights == pytest.approx([0.2, 5.0, 0.2])


@pytest.mark.parametrize(
    ("metrics", "alpha", "shares"),
    [
        # d = 0.4, 0.1 -> 0.8, 0.2; squared: 0.16, 0.01 -> 16/17, 1/17.
        ({"a": 0.6, "b": 0.9}, 1.0, {"a": 0.8, "b": 0.2}),
        ({"a": 0.6, "b": 0.9}, 2.0, {"a": 16 / 17, "b": 1 / 17}),
        ({"a": 1.0, "b": 1.0}, 1.0, {"a": 0.5, "b": 0.5}),
        ({"a": 1.0, "b": 0.5}, 1.0, {"a": 0.0, "b": 1.0}),
    ],
)
def test_the_equation_of_the_task_shares(metrics: dict[str, float], alpha: float, shares: dict[str, float]):
    assert task_shares(metrics, alpha=alpha) == pytest.approx(shares)


def test_the_metric_of_a_task_is_the_mean_inverse_perplexity_of_its_rows():
    # 4 tokens, half of them prompt: 2 targets. Losses 2 ln 2 and 2 ln 4: 1 / ppl = 0.5 and 0.25, mean 0.375.
    held_out = HeldOut([row("x", 4), row("y", 4)], [])
    assert held_out.task_metrics([2 * math.log(2), 2 * math.log(4)]) == pytest.approx({"test": 0.375})
    assert held_out.task_losses([2 * math.log(2), 2 * math.log(4)]) == pytest.approx({"test": 1.5 * math.log(2)})


def weights_of_three(interval: int = 2) -> InstanceWeights:
    return InstanceWeights(["a", "a", "b"], interval=interval, beta=1.0, lowest=0.1, highest=10.0)


def observe(weights: InstanceWeights, samples: list[int], losses: list[float], targets: list[int]) -> None:
    weights.observe(samples, losses, targets)
    if weights.due:
        weights.renew()


def test_a_sample_weighs_1_until_it_was_measured_in_two_intervals():
    weights = weights_of_three()
    observe(weights, [0], [math.log(3)], [1])
    observe(weights, [1], [math.log(3)], [1])  # ends the first interval
    assert weights.of([0, 1, 2]).tolist() == [1, 1, 1]
    observe(weights, [0], [math.log(2)], [1])
    observe(weights, [2], [math.log(2)], [1])  # ends the second; sample 0: Delta = 3 - 2
    assert weights.of([0, 1, 2]) == pytest.approx([math.exp(-1), 1, 1])


def test_visits_of_one_interval_are_pooled_over_their_tokens():
    weights = weights_of_three(interval=1)
    observe(weights, [0], [2 * math.log(3)], [2])
    observe(weights, [0, 0], [math.log(2), 3 * math.log(2)], [1, 3])
    assert weights.of([0]) == pytest.approx([math.exp(-1)])


def test_learned_samples_lose_weight_and_stagnating_ones_gain_on_them():
    weights = weights_of_three(interval=1)
    for ppl in (4.0, 3.0, 2.5):
        observe(weights, [0, 1, 2], [math.log(ppl), math.log(4.0), math.log(5.0 / ppl + 3)], [1, 1, 1])
    learned, stagnating, worse = weights.of([0, 1, 2])
    assert learned < stagnating < worse
    assert stagnating == 1


def test_weights_are_resumed_within_an_interval():
    one, other = weights_of_three(interval=3), weights_of_three(interval=3)
    losses = [[math.log(20 - step), math.log(30 - 2 * step)] for step in range(9)]
    for step in range(4):
        observe(one, [0, step % 3], losses[step], [1, 2])
    other.load_state_dict(one.state_dict())
    for step in range(4, 9):
        observe(one, [0, step % 3], losses[step], [1, 2])
        observe(other, [0, step % 3], losses[step], [1, 2])
    assert one.of([0, 1, 2]).tolist() == other.of([0, 1, 2]).tolist()
    assert one.of([0, 1, 2]).tolist() != [1, 1, 1]


def test_weights_of_other_data_are_refused():
    with pytest.raises(DataError, match="weights of 3 samples, this job has 4"):
        InstanceWeights(["a"] * 4, interval=1, beta=1, lowest=0.5, highest=2).load_state_dict(
            weights_of_three().state_dict()
        )


def test_a_measurement_of_all_samples_takes_the_place_of_those_of_the_steps():
    weights = weights_of_three()
    weights.measure_all([math.log(4), math.log(3), 0.0], [1, 1, 0])
    weights.renew()
    weights.observe([0, 1, 2], [5.0, 5.0, 5.0], [1, 1, 1])
    weights.measure_all([math.log(3), math.log(3), math.log(9)], [1, 1, 2])
    weights.renew()
    # Deltas 4 - 3 and 0; sample 2 has been measured once.
    assert weights.of([0, 1, 2]) == pytest.approx([math.exp(-1), 1, 1])


def test_the_quantiles_are_those_of_each_task():
    weights = weights_of_three(interval=1)
    for ppl in (2.0, 1.0):
        observe(weights, [0, 2], [math.log(ppl), math.log(ppl + 1)], [1, 1])
    # Task a: weights exp(-1) and 1, of which percentile q lies at exp(-1) + q (1 - exp(-1)). Task b: exp(-1) alone.
    low = math.exp(-1)
    assert weights.quantiles() == pytest.approx(
        {f"instance_weight_p{percent}/a": low + percent / 100 * (1 - low) for percent in (10, 50, 90)}
        | {f"instance_weight_p{percent}/b": low for percent in (10, 50, 90)}
    )


def test_one_loss_that_is_not_a_number_does_not_stay_in_the_weights():
    weights = weights_of_three(interval=1)
    for loss in (1.0, math.nan, 1.0, 1.0):
        observe(weights, [0], [loss], [1])
    assert weights.of([0]).tolist() == [1.0]
