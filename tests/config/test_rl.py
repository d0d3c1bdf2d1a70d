"""Recipes of reinforcement learning: what is impossible, or would have no effect, is refused with the numbers."""

import pytest

from megatron_ads.config.recipes import load_job
from megatron_ads.config.rl import RlConfig, validate
from megatron_ads.errors import ConfigError

POPO = ("rewards.combine=popo", "rewards.use=[{name: a}, {name: b}]")


def recipe(*overrides: str) -> RlConfig:
    config = load_job("rl/quickstart", ["model.load=runs/quickstart/export", *overrides])
    assert isinstance(config, RlConfig)
    return config


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["rollout.samples=1"], r"rollout\.samples is 1; it must be at least 2"),
        (["rollout.max_new_tokens=256"], r"max_new_tokens = 256 leaves no room for a prompt in data\.seq_length = 256"),
        (["rollout.overlong=shape"], r"rollout\.overlong_buffer is 0 and rollout\.overlong shape: .* 1 to .* = 63"),
        (["rollout.mode=train_only"], r"rollout\.dump is None and rollout\.mode train_only"),
        (["rollout.dump=folder"], r"rollout\.dump is folder and rollout\.mode colocated"),
        (["rollout.mode=servers"], r"rollout\.servers has 0 entries and rollout\.mode is servers"),
        (["rollout.mode=train_only", "rollout.dump=d"], r"evaluate_every is 10.* train_only, which answers nothing"),
        (["rollout.dynamic_sampling=true", "rollout.max_draws=1"], r"rollout\.max_draws is 1.* would draw nothing"),
        (["rewards.use=[]"], r"rewards\.use is empty"),
        (["rewards.use=[{name: a}, {name: a}]"], r"rewards\.use"),
        (["rewards.combine=popo"], r"rewards\.combine is popo, but rewards\.use has a single reward"),
        (["rewards.popo_step_size=1"], r"popo_step_size is 1\.0, which has no effect with rewards\.combine fixed"),
        (
            [*POPO, "rollout.mode=rollout_only"],
            r"popo and rollout\.mode rollout_only: .* nothing is trained",
        ),
        (["policy.minibatches=3"], r"global_batch_size = 8 prompts do not divide into policy\.minibatches = 3"),
        (["policy.kl_in=reward"], r"policy\.kl_in is reward, which has no effect while policy\.kl_coef is 0"),
        (["policy.loss=gspo", "policy.dual_clip=3"], r"policy\.dual_clip is 3\.0, which has no effect with .* gspo"),
        (["model.mtp_loss_weight=0.1"], r"mtp_loss_weight is 0\.1: the MTP layer is not trained"),
        (["model.load=x", "layout.pp=3"], r"does not divide the 4 ranks"),
    ],
)
def test_what_cannot_run_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validate(recipe(*overrides), 4)


@pytest.mark.parametrize("overrides", [(), (*POPO, "model.expert_bias_update_rate=0.001")])
def test_the_shipped_one_is_accepted_and_with_popo(overrides: tuple[str, ...]) -> None:
    validate(recipe(*overrides), 4)
