"""Recipes of reinforcement learning: what is impossible, or would have no effect, is refused with the numbers."""

import pytest

from megatron_ads.config.generation import EndpointConfig
from megatron_ads.config.recipes import load_job
from megatron_ads.config.rl import Combine, RlConfig, validate
from megatron_ads.errors import ConfigError

POPO = ("rewards.combine=popo", "rewards.use=[{name: a}, {name: b}]")
SERVER = "{url: 'http://a:1/v1', model: policy}"
SERVERS = ("rollout.mode=servers", f"rollout.servers=[{SERVER}]")


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
        ([*SERVERS, "rollout.max_staleness=1"], r"rollout\.max_staleness is 1: every step waits .* Set it to 0\."),
        ([*SERVERS, "rollout.batch_size=8"], r"rollout\.batch_size is 8, which has no effect with .* servers"),
        (["rollout.server_wait_seconds=9"], r"rollout\.server_wait_seconds is 9\.0, which has no .* colocated"),
        (["rollout.reload_command=date"], r"rollout\.reload_command is date, which has no effect"),
        (["rollout.mode=servers", f"rollout.servers=[{SERVER}, {SERVER}]"], r"rollout\.servers lists http://a:1/v1"),
        (["rollout.mode=servers", "rollout.servers=[{url: 'http://b/v1'}]"], r"servers\[0\]\.model is missing"),
        (["rollout.mode=train_only", "rollout.dump=d"], r"evaluate_every is 25.* train_only, which answers nothing"),
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
    config = recipe(*overrides)
    validate(config, 4)
    assert config.rewards.combine == (Combine.popo if overrides else Combine.fixed)


def test_the_shipped_one_is_accepted_on_servers_too() -> None:
    config = recipe(*SERVERS, "rollout.reload_command=restart", "rollout.server_wait_seconds=60")
    validate(config, 4)
    assert config.rollout.servers == [EndpointConfig(url="http://a:1/v1", model="policy")]
    assert (config.rollout.reload_command, config.rollout.server_wait_seconds) == ("restart", 60)
