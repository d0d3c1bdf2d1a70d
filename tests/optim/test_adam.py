"""The group-step AdamW against torch's own, and learning rates worked out by hand."""

import copy

import pytest
import torch

from megatron_ads.config.training import OptimConfig, Schedule
from megatron_ads.optim.adam import GroupStepAdamW, LearningRateSchedule

SETTINGS = {"betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def _parameters(seed: int) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((4, 3), (5,), (2, 2, 2))]


def _train(optimizer: torch.optim.Optimizer, parameters: list[torch.nn.Parameter], steps: int) -> None:
    generator = torch.Generator().manual_seed(1)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 0.01 / (step + 1)
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()


def test_updates_equal_torch_adamw():
    ours, reference = _parameters(0), _parameters(0)
    _train(GroupStepAdamW(ours, **SETTINGS), ours, steps=5)
    _train(torch.optim.AdamW(reference, lr=0.0, fused=True, **SETTINGS), reference, steps=5)
    for mine, theirs in zip(ours, reference, strict=True):
        assert torch.equal(mine, theirs)


def test_first_update_is_the_learning_rate_against_the_sign_after_decay():
    # step 1: m / (1 - b1) = g and v / (1 - b2) = g^2, so the update is lr * g / |g|;
    # decoupled decay first: 2 - 0.5 * 0.1 * 2 = 1.9, then 1.9 - 0.5 = 1.4
    parameter = torch.nn.Parameter(torch.tensor([2.0]))
    parameter.grad = torch.tensor([3.0])
    optimizer = GroupStepAdamW([parameter], **SETTINGS)
    optimizer.param_groups[0]["lr"] = 0.5
    optimizer.step()
    assert torch.allclose(parameter.data, torch.tensor([1.4]), atol=1e-6)


def test_an_empty_group_counts_its_steps():
    filled, empty = _parameters(0), []
    optimizer = GroupStepAdamW([{"params": filled}, {"params": empty}], **SETTINGS)
    _train(optimizer, filled, steps=3)
    assert [group["step"] for group in optimizer.param_groups] == [3, 3]


def test_state_holds_moments_and_no_step_per_parameter():
    parameters = _parameters(0)
    optimizer = GroupStepAdamW(parameters, **SETTINGS)
    _train(optimizer, parameters, steps=1)
    assert {name for state in optimizer.state.values() for name in state} == {"exp_avg", "exp_avg_sq"}


def test_a_restored_count_continues_the_bias_correction():
    straight, resumed = _parameters(0), _parameters(0)
    first, second = GroupStepAdamW(straight, **SETTINGS), GroupStepAdamW(resumed, **SETTINGS)
    _train(first, straight, steps=4)
    _train(second, resumed, steps=4)
    second.param_groups[0]["step"] = 0  # what a checkpoint that loses the count does
    for optimizer, parameters in ((first, straight), (second, resumed)):
        _train(optimizer, parameters, steps=1)
    assert not any(torch.equal(mine, theirs) for mine, theirs in zip(straight, resumed, strict=True))


def test_a_loaded_state_continues_bit_for_bit():
    straight, resumed = _parameters(0), _parameters(0)
    first, second = GroupStepAdamW(straight, **SETTINGS), GroupStepAdamW(resumed, **SETTINGS)
    _train(first, straight, steps=3)
    for mine, theirs in zip(resumed, straight, strict=True):
        mine.data.copy_(theirs.data)
    second.load_state_dict(copy.deepcopy(first.state_dict()))  # not the same tensors
    for optimizer, parameters in ((first, straight), (second, resumed)):
        _train(optimizer, parameters, steps=2)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(straight, resumed, strict=True))


# ---- learning rates ----


def _schedule(shape: Schedule) -> LearningRateSchedule:
    settings = OptimConfig(learning_rate=1.0, min_learning_rate=0.2, warmup_steps=3, schedule=shape)
    return LearningRateSchedule(settings, total_steps=8)


@pytest.mark.parametrize("shape", list(Schedule))
def test_warm_up_rises_in_equal_steps_and_reaches_the_peak(shape):
    # 3 warm-up updates of 1/4 each, then the peak at update 3
    assert [_schedule(shape).at(step) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]


def test_linear_decay_reaches_the_floor_at_the_last_step():
    # steps 3 to 7: four equal steps of (1.0 - 0.2) / 4 = 0.2 down
    assert [_schedule(Schedule.linear).at(step) for step in range(3, 8)] == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2])


def test_cosine_decay_is_halfway_in_the_middle():
    # step 5 is halfway from 3 to 7: 0.2 + 0.8 * (1 + cos(pi / 2)) / 2 = 0.6
    cosine = _schedule(Schedule.cosine)
    assert [cosine.at(3), cosine.at(5), cosine.at(7)] == pytest.approx([1.0, 0.6, 0.2])


def test_constant_stays_at_the_peak():
    assert _schedule(Schedule.constant).at(100) == 1.0


def test_steps_behind_the_last_stay_at_the_floor():
    assert _schedule(Schedule.cosine).at(50) == pytest.approx(0.2)


# ---- moments in BF16 ----


def _moved(moments: torch.dtype) -> list[torch.Tensor]:
    parameters = _parameters(0)
    optimizer = GroupStepAdamW(parameters, **SETTINGS, moments=moments)
    _train(optimizer, parameters, steps=5)
    assert {value.dtype for state in optimizer.state.values() for value in state.values()} == {moments}
    return [after.data - before.data for after, before in zip(parameters, _parameters(0), strict=True)]


def test_updates_with_bf16_moments_are_those_of_fp32_moments_rounded(monkeypatch: pytest.MonkeyPatch):
    # Each step rounds each moment by up to 2^-9 of itself, up and down; an update is their quotient. Over the five, 0.3
    # of this tolerance is used; moments with three bits, off by up to 2^-4, would need 16 times as much.
    exact, rounded = _moved(torch.float32), _moved(torch.bfloat16)
    for fp32, bf16 in zip(exact, rounded, strict=True):
        assert not torch.equal(fp32, bf16)
        torch.testing.assert_close(bf16, fp32, rtol=2**-8, atol=0)
    monkeypatch.setattr("megatron_ads.optim.adam._PIECE", 3)
    assert all(map(torch.equal, _moved(torch.bfloat16), rounded))
