"""The group-step AdamW against torch's own."""

import copy

import torch

from megatron_ads.optim.adam import GroupStepAdamW

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
