"""Settings that are impossible, contradict each other or cannot take effect are refused with the numbers."""

from dataclasses import replace

import pytest

from megatron_ads.config.model import FrozenPart
from megatron_ads.config.run import validate
from megatron_ads.errors import ConfigError
from tests.config.quickstart import published, quickstart


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["layout=pp1_ep1", "layout.vpp=2"], r"layout\.vpp is 2 with layout\.pp = 1"),
        (["layout.pp=3"], r"pp \* cp \* tp = 3 \* 1 \* 1 = 3, which does not divide the 4 ranks"),
        (["layout.tp=0"], r"layout\.tp is 0; it must be at least 1"),
        (["layout=pp1_ep1", "layout.last_stage_layers=1"], r"layout\.last_stage_layers is 1, which has no effect"),
        (["layout.pipeline='Et|tL'", "layout.first_stage_layers=1"], r"layout\.first_stage_layers is 1, which has no"),
        (["train.global_batch_size=6"], r"= 6 is not a multiple of .* 2 \* 2 = 4\. Choose a multiple of 4"),
        (["train.micro_batch_size=0"], r"train\.micro_batch_size is 0; it must be at least 1"),
        (["train.max_steps=0"], r"train\.max_steps is 0; it must be at least 1"),
        (
            ["data.sources=[{kind: jsonl, path: a, rejected: r}, {kind: jsonl, path: b, rejected: r}]"],
            r"r is the rejected file of several of data\.sources",
        ),
        (["reweight.exact=true"], r"reweight\.exact is true, which has no effect while reweight\.instances is false"),
        (
            ["train.max_steps=5"],
            r"warmup_steps = 10 is more than train\.max_steps = 5: .* Set optim\.warmup_steps=0, or raise",
        ),
        (["data.validation_rows=0"], r"train\.evaluate_every is 100, but data\.validation_rows is 0"),
        (["data.sources=[]"], r"data\.sources is empty"),
        (["data.sources=[{kind: jsonl}]"], r"data\.sources\[0\]\.path is missing"),
        (["data.sources=[{kind: builtin, path: a}]"], r"data\.sources\[0\]\.path is 'a', which has no effect"),
        (["data.sources=[{kind: simulator}]"], r"data\.sources\[0\]\.task is missing; .*next_advertiser"),
        (
            ["data.sources=[{kind: esci, task: user_profile}]"],
            r"data\.sources\[0\]\.task is user_profile, .*effect",
        ),
        (
            ["data.sources=[{kind: simulator, task: query_generation, history: {max_entries: 2}}]"],
            r"data\.sources\[0\]\.history has no effect",
        ),
        (
            ["data.sources=[{kind: simulator, task: user_profile, history: {window_days: {clicks: 0}}}]"],
            r"data\.sources\[0\]\.history\.window_days\.clicks is 0",
        ),
        (["data.sources=[{kind: table, path: a.csv}]"], r"data\.sources\[0\]\.columns is missing"),
        (
            ["data.sources=[{kind: table, path: a.csv, task: next_advertiser, columns: {user: u}}]"],
            r"data\.sources\[0\]\.anchor is None; kind table with task next_advertiser needs one",
        ),
        (["data.sources=[{kind: esci, anchor: 2025-03-01}]"], r"data\.sources\[0\]\.anchor is 2025-03-01; .* no use"),
        (["data.sources=[{kind: esci, columns: {a: b}}]"], r"data\.sources\[0\]\.columns has no effect"),
        (["data.sources=[{kind: esci, rejected: a}]"], r"data\.sources\[0\]\.rejected is 'a', .* no effect"),
        (["data.sources=[{kind: builtin}, {kind: esci, weight: 0}]"], r"data\.sources\[1\]\.weight is 0\.0; .*above 0"),
        (["data.sources=[{kind: builtin, rows: 0}]"], r"data\.sources\[0\]\.rows is 0; it must be at least 1"),
        (
            ["layout=pp1_ep1", "layout.cp=2", "data.seq_length=255"],
            r"255 \* 2 = 510 tokens cannot be cut into 4",
        ),
        (["optim.learning_rate=inf"], r"optim\.learning_rate is inf; it must be a finite number, at least 0"),
        (["optim.weight_decay=nan"], r"optim\.weight_decay is nan; it must be a finite number, at least 0"),
        (["train.max_skipped_updates=0"], r"train\.max_skipped_updates is 0; it must be at least 1"),
        (["optim.learning_rate=-1"], r"optim\.learning_rate is -1\.0; it must be at least 0"),
        (["optim.learning_rate=0"], r"optim\.learning_rate is 0\.0; it must be above 0"),
        (["optim.learning_rate=nan"], r"optim\.learning_rate is nan"),
        (["optim.beta2=1"], r"optim\.beta2 is 1\.0; it must be at least 0 and below 1"),
        (["optim.min_learning_rate=1"], r"optim\.min_learning_rate 1 is above optim\.learning_rate 0\.002"),
        (["optim=adamw_constant", "optim.min_learning_rate=1e-6"], r"min_learning_rate is 1e-06, which has no effect"),
        (["model.expert_bias_update_rate=0"], r"expert_bias_update_rate is 0\.0; it must be above 0, or null"),
        (["model.mtp_loss_weight=-0.1"], r"model\.mtp_loss_weight is -0\.1; it must be at least 0"),
        (["model.frozen=[mtp]", "model.mtp_loss_weight=0"], r"model\.frozen lists mtp, which has no effect"),
        (
            ["model.recompute_stages=1"],
            r"model\.recompute_stages is 1, which has no effect while model\.recompute is none",
        ),
        (
            ["model.recompute=full", "model.recompute_stages=2"],
            r"model\.recompute_stages is 2, but layout\.pp is 2: no stage would keep everything",
        ),
        (["model.frozen=[router,router]"], r"model\.frozen lists router more than once"),
        (["model.lora.rank=0"], r"model\.lora\.rank is 0; it must be at least 1"),
        (["model.lora={rank: 4, alpha: 0}"], r"model\.lora\.alpha is 0\.0; it must be above 0"),
        (
            ["model.lora={rank: 4, targets: []}"],
            r"model\.lora\.targets is empty\. Choose from attention, dense",
        ),
        (["model.lora={rank: 4, targets: [dense, dense]}"], r"model\.lora\.targets lists dense more than once"),
        (["model.lora.alpha=8"], r"model\.lora has no effect while model\.lora\.rank is null"),
        (
            ["model.lora.rank=4", "model.frozen=[router]"],
            r"model\.frozen lists router, but with model\.lora every",
        ),
        (
            ["model.lora.rank=4", "model.expert_bias_update_rate=0.001"],
            r"expert_bias_update_rate is 0\.001, but model\.lora keeps the routers",
        ),
        (["reweight.interval=0"], r"reweight\.interval is 0; it must be at least 1"),
        (["reweight.beta=0"], r"reweight\.beta is 0\.0; it must be above 0"),
        (["reweight.lowest=1.5"], r"reweight\.lowest = 1\.5 and reweight\.highest = 5 must have 1 between them"),
        (["reweight.tasks=true", "train.evaluate_every=null"], r"reweight\.tasks needs a validation metric"),
        (
            ["reweight.tasks=true", "train.evaluate_every=300"],
            r"evaluate_every = 300 and train\.max_steps = 300: no step",
        ),
        (["reweight.instances=true", "reweight.interval=150"], r"has its first weights after step 300 .* = 150\), but"),
        (
            ["reweight.instances=true", "reweight.exact=true", "reweight.interval=300"],
            r"first weights after step 300 \(reweight\.interval = 300\), but train\.max_steps is 300",
        ),
        (
            ["data.validation_rows_per_group=4", "data.validation_rows=0", "train.evaluate_every=null"],
            r"validation_rows_per_group is 4, but data\.validation_rows is 0",
        ),
        (["checkpoint.save_every=0"], r"checkpoint\.save_every is 0; it must be at least 1"),
        (
            ["checkpoint.async_save=true", "checkpoint.save_every=null"],
            r"async_save is true, which has no effect while checkpoint\.save_every is not set",
        ),
        (["runtime.timeout_seconds=0"], r"runtime\.timeout_seconds is 0"),
    ],
)
def test_an_impossible_or_idle_combination_is_refused_with_the_numbers(overrides: list[str], message: str) -> None:
    config = quickstart(*overrides)
    with pytest.raises(ConfigError, match=message):
        validate(config, 4)


def test_interleaving_asks_for_microbatches_in_groups_of_the_stages() -> None:
    # dp 2, 1 row each: 4 rows are 2 microbatches, a group of pp = 2; 6 rows are 3.
    even = ["layout=pp2_ep2", "layout.vpp=2", "train.micro_batch_size=1", "train.global_batch_size=4"]
    validate(quickstart(*even), 4)
    with pytest.raises(ConfigError, match=r"6 / \(1 \* 2\) = 3 microbatches\. .* a multiple of 4"):
        validate(quickstart(*even, "train.global_batch_size=6"), 4)


DENSE = "deepseek_r1_distill_qwen_7b"


@pytest.mark.parametrize(
    ("model", "overrides", "message"),
    [
        (
            "moonlight_16b_a3b",
            ["model.mtp_loss_weight=0.1"],
            r"mtp_loss_weight is 0\.1, but the model has no MTP layer",
        ),
        (
            "no_shared",
            ["model.frozen=[shared_experts]"],
            r"model\.frozen lists shared_experts, which the model does not",
        ),
        (
            "no_shared",
            ["model.lora={rank: 4, targets: [attention, shared_experts]}"],
            r"model\.lora\.targets lists shared_experts, which the model does not",
        ),
        ("moonlight_16b_a3b", ["data.seq_length=8193"], r"data\.seq_length = 8193 is longer than the model's 8192"),
        ("moonlight_16b_a3b", ["layout.pp=2"], r"27 decoder layers = 27, which 2 chunks"),
        ("moonlight_16b_a3b", ["layout.ep=3"], r"64 routed experts cannot be spread evenly over layout\.ep = 3"),
        (
            "deepseek_v2_lite",
            ["model.expert_bias_update_rate=0.001"],
            r"expert_bias_update_rate is 0\.001, but the model's router has no selection bias",
        ),
        (DENSE, ["model.aux_loss_coefficient=0.1"], r"aux_loss_coefficient is 0\.1, but the model has no experts"),
        (DENSE, ["model.frozen=[router]"], r"model\.frozen lists router, which the model does not"),
        (DENSE, ["layout.ep=2"], r"layout\.ep is 2, but the model has no routed experts"),
    ],
)
def test_a_recipe_that_does_not_fit_the_model_is_refused(model: str, overrides: list[str], message: str) -> None:
    shape = replace(published("moonlight_16b_a3b"), num_shared_experts=0) if model == "no_shared" else published(model)
    base = ["layout=pp1_ep1", "model.mtp_loss_weight=0", "train.global_batch_size=12", "train.micro_batch_size=1"]
    validate(quickstart(*base), 6, shape)
    config = quickstart(*base, *overrides)
    validate(config, 6)
    with pytest.raises(ConfigError, match=message):
        validate(config, 6, shape)


@pytest.mark.parametrize(
    ("settings", "setting", "most"),
    [
        (["reweight.tasks=true"], "train.evaluate_every", 299),
        (["reweight.instances=true"], "reweight.interval", 149),
        (["reweight.instances=true", "reweight.exact=true"], "reweight.interval", 299),
    ],
)
def test_reweighting_needs_a_step_that_is_left_for_it(settings: list[str], setting: str, most: int) -> None:
    validate(quickstart(*settings, "train.max_steps=300", f"{setting}={most}"), 4)
    with pytest.raises(ConfigError, match=rf"Lower {setting}\."):
        validate(quickstart(*settings, "train.max_steps=300", f"{setting}={most + 1}"), 4)


def test_freezing_and_the_moving_router_bias_are_accepted_where_they_have_an_effect() -> None:
    config = quickstart(
        "model.frozen=[experts,mtp]",
        "model.expert_bias_update_rate=0.001",
        "layout.last_stage_layers=59",
    )
    validate(config, 4, published("deepseek_r1"))
    assert config.model.frozen == [FrozenPart.experts, FrozenPart.mtp]
    assert config.model.expert_bias_update_rate == 0.001
