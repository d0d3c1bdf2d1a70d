"""Recipes of reinforcement learning: what is impossible, or would have no effect, is refused with the numbers."""

import re

import pytest

from megatron_ads.config.recipes import load_job
from megatron_ads.config.rl import RlConfig, validate
from megatron_ads.errors import ConfigError

POPO = ("rewards.combine=popo", "rewards.use=[{name: a}, {name: b}]")
SERVER = "{url: 'http://a:1/v1', model: policy}"
TEACHER = ("teacher.kind=local", "teacher.model=t")
ALONE = (*TEACHER, "rewards.use=[]", "train.evaluate_every=null")
SERVED = ("teacher.model=t", "teacher.url='http://a:1/v1'", "teacher.tokenizer=d")
SERVERS = ("rollout.mode=servers", f"rollout.servers=[{SERVER}]")


def recipe(*overrides: str) -> RlConfig:
    config = load_job("rl/quickstart", ["model.load=runs/sft-quickstart/export", *overrides])
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
        ([*SERVERS, "rollout.max_staleness=-1"], r"rollout\.max_staleness is -1; it must be at least 0"),
        (["rollout.mode=servers", f"rollout.servers=[{SERVER}, {SERVER}]"], r"rollout\.servers lists http://a:1/v1"),
        (["rollout.mode=servers", "rollout.servers=[{url: 'http://b/v1'}]"], r"servers\[0\]\.model is missing"),
        (["rollout.mode=train_only", "rollout.dump=d"], r"evaluate_every is 25.* train_only, which answers nothing"),
        (["rollout.dynamic_sampling=true", "rollout.max_draws=1"], r"rollout\.max_draws is 1.* would draw nothing"),
        (["rewards.use=[]"], r"rewards\.use is empty, and teacher\.model is null\. Name at least one reward"),
        ([*ALONE, "rollout.samples=0"], r"rollout\.samples is 0; it must be at least 1"),
        ([*ALONE, "rewards.combine=popo"], r"rewards\.combine is popo, but rewards\.use has no reward"),
        ([*TEACHER, "teacher.kl_coef=0"], r"teacher\.kl_coef is 0\.0; it must be above 0"),
        ([*TEACHER, "teacher.batch_size=0"], r"teacher\.batch_size is 0; it must be at least 1"),
        (["teacher.model=t"], r"teacher\.url is missing; kind endpoint needs one"),
        (["teacher.model=t", "teacher.url='http://a:1/v1'"], r"teacher\.tokenizer is null\. Name the folder"),
        (["rewards.use=[{name: a}, {name: a}]"], r"rewards\.use lists a"),
        (["rewards.combine=popo"], r"rewards\.combine is popo, but rewards\.use has a single reward"),
        (
            [*POPO, "rollout.mode=rollout_only"],
            r"popo and rollout\.mode rollout_only: .* nothing is trained",
        ),
        (["policy.minibatches=3"], r"global_batch_size = 8 prompts do not divide into policy\.minibatches = 3"),
        (["policy.router_replay=R3"], r"router_replay is R3, but no engine .* Set it to R2"),
        (["model.mtp_loss_weight=0.1"], r"mtp_loss_weight is 0\.1: the MTP layer is not trained"),
        (["model.load=x", "layout.pp=3"], r"does not divide the 4 ranks"),
    ],
)
def test_what_cannot_run_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validate(recipe(*overrides), 4)


@pytest.mark.parametrize(
    ("where", "elsewhere", "setting"),
    [
        ([*POPO, "model.expert_bias_update_rate=0.001"], [], "rewards.popo_step_size=1"),
        ([*POPO], [], "rewards.popo_temperature=2"),
        (["rewards.use=[{name: 'my_module:score'}]"], [], "rewards.timeout_seconds=9"),
        ([*SERVERS], [], "rollout.reload_command=restart"),
        ([*SERVERS], [], "rollout.server_wait_seconds=60"),
        ([*SERVERS], [], "rollout.max_staleness=1"),
        ([], [*SERVERS], "rollout.batch_size=8"),
        (["rollout.mode=rollout_only"], [*SERVERS], "rollout.valid_names=true"),
        ([], ["rollout.mode=train_only", "rollout.dump=d", "train.evaluate_every=null"], "rollout.valid_names=true"),
        (["rollout.dynamic_sampling=true"], [], "rollout.max_draws=2"),
        ([], ["policy.loss=gspo"], "policy.dual_clip=3"),
        (["policy.kl_coef=0.1"], [], "policy.kl_in=reward"),
        (["policy.kl_coef=0.1"], [], "policy.kl_loss_type=k2"),
        (["policy.importance_sampling=tis"], [], "policy.importance_cap=3"),
        (["policy.minibatches=2"], [], "policy.router_replay=R2"),
        ([], [*ALONE], "policy.norm_adv_by_std=false"),
        ([], [*ALONE], "policy.leave_one_out=true"),
        ([], [*ALONE], "rollout.dynamic_sampling=true"),
        (["policy.kl_coef=0.1"], [*ALONE, "policy.kl_coef=0.1"], "policy.kl_in=reward"),
        ([], [*ALONE], "train.evaluate_every=5"),
        (["rollout.overlong_buffer=8"], [*ALONE, "rollout.overlong_buffer=8"], "rollout.overlong=shape"),
        ([*TEACHER], [], "teacher.kl_coef=2"),
        ([*TEACHER], [*SERVED], "teacher.batch_size=8"),
        ([*SERVED], [*TEACHER], "teacher.attempts=9"),
        ([*SERVED], [*TEACHER], "teacher.server_wait_seconds=9"),
        ([*SERVED], [], "teacher.concurrency=9"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_setting_is_accepted_where_it_has_an_effect_alone(
    where: list[str], elsewhere: list[str], setting: str
) -> None:
    validate(recipe(*where, setting), 4)
    with pytest.raises(ConfigError, match=rf"{re.escape(setting.partition('=')[0])} is .*, which has no effect"):
        validate(recipe(*elsewhere, setting), 4)


def test_a_section_of_fine_tuning_is_named_with_the_setting_that_may_be_meant() -> None:
    with pytest.raises(ConfigError, match=r"loss is a section of recipes of kind sft.* Did you mean policy\.loss\?"):
        recipe("loss=gspo")


def test_a_teacher_alone_needs_one_answer_to_a_prompt_and_rewards_need_two() -> None:
    validate(recipe(*ALONE, "rollout.samples=1", "rollout.overlong=mask"), 4)
    validate(recipe(*ALONE, "rollout.mode=train_only", "rollout.dump=d"), 4)
    with pytest.raises(ConfigError, match=r"rollout\.samples is 1; it must be at least 2"):
        validate(recipe(*TEACHER, "rollout.samples=1"), 4)


def test_a_teacher_renders_no_conversation() -> None:
    with pytest.raises(ConfigError, match=r"template_arguments is .*thinking.*, which has no effect on a teacher"):
        validate(recipe(*SERVED, "teacher.template_arguments={thinking: true}"), 4)
