"""``rollout``, ``rewards``, ``policy``: what reinforcement learning has besides the sections of every job.

A fourth, ``teacher``, is in ``teacher.py``. Settings have the names that verl and TRL users know. Importing it needs no
torch.
"""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from omegaconf import MISSING

from megatron_ads.architecture import ModelShape
from megatron_ads.config.generation import EndpointConfig
from megatron_ads.config.run import RunConfig, validate_run
from megatron_ads.config.teacher import TeacherConfig
from megatron_ads.errors import require, require_above, require_at_least, require_distinct


class RolloutMode(StrEnum):
    """Who generates, and who trains."""

    colocated = "colocated"
    """Every rank generates with transformers, then trains."""
    servers = "servers"
    """Inference servers generate."""
    rollout_only = "rollout_only"
    """Generates and scores with the weights of ``model.load``; nothing is trained."""
    train_only = "train_only"
    """Trains on the rollouts in ``rollout.dump``; nothing is generated."""


class Overlong(StrEnum):
    """What becomes of an answer that was cut off at ``rollout.max_new_tokens``."""

    keep = "keep"
    mask = "mask"
    """It counts in its group's mean reward, but not in the loss (DAPO, arXiv:2503.14476, section 3.4); a group of
    nothing else teaches nothing."""
    shape = "shape"
    """Its reward falls linearly over the last ``rollout.overlong_buffer`` tokens, to 1 less (DAPO, eq. 13): for the
    update, ``dynamic_sampling``, metrics and POPO-light, but neither in files of rollouts nor in evaluation."""


@dataclass(kw_only=True, slots=True)  # not frozen, here and below: Hydra merges into it
class RolloutConfig:
    """Answers of the policy to prompts. A step has ``train.global_batch_size`` prompts, each with ``samples`` answers.

    They are drawn at temperature 1, and from all tokens, as the policy gradient assumes, but for ``valid_names``.
    """

    mode: RolloutMode = RolloutMode.colocated
    """Who generates, and who trains."""
    samples: int = 8
    """G, the answers to each prompt: one group. At least 2, as rewards are compared within it; 1 without rewards."""
    max_new_tokens: int = 256
    """Longest answer, end token included."""
    batch_size: int = 64
    """Answers that one engine generates at once; of a server, its ``concurrency`` says how many it is asked for."""
    valid_names: bool = False
    """Answer rows of ``next_advertiser`` and ``choose_one``, held-out ones too, with nothing but valid names, those of
    the training rows or the row's candidates, without reasoning. Each token is drawn among those that some name goes on
    with. Log-probabilities and the update are of the policy over all tokens, as in MiniOneRec's trainer (ReRe): what
    only the names forced counts as well. Not for ``servers`` and ``train_only``."""
    dynamic_sampling: bool = False
    """Replace groups that teach nothing, as their answers all have the same reward, by those of further prompts (DAPO,
    section 3.2)."""
    max_draws: int = 3
    """``dynamic_sampling``: how often prompts are drawn for one step at most; then groups without variance fill it."""
    overlong: Overlong = Overlong.keep
    """What becomes of an answer that was cut off."""
    overlong_buffer: int = 0
    """``shape``: tokens below ``max_new_tokens`` over which the reward falls."""
    dump: str | None = None
    """``train_only``: a folder of rollouts that another job wrote, ``<log.dir>/rollouts``, with the same ``samples``,
    ``max_new_tokens`` and ``train.global_batch_size``."""
    probe_rows: int = 4
    """Prompts whose targets are scored by engine and trainer after each update; 0 is none."""
    max_logprob_diff: float = 0.05
    """A job ends whose engine and trainer differ by more, in nats, the mean over the tokens of the probe, or of those
    answers of a step that are by the current weights. Answers by older ones (``max_staleness``) are not held to it, nor
    are those of ``train_only``, where it is not known which made them. Raise it for engines in another number format,
    such as FP8, with ``policy.importance_sampling``."""
    servers: list[EndpointConfig] = field(default_factory=list)
    """``servers``: one entry for each inference server."""
    reload_command: str | None = None
    """``servers``: shell command that makes a server use new weights, with MODEL, URL and SERVED_MODEL in its
    environment; it returns when the server answers again. None: vLLM's and SGLang's own requests to load weights from a
    folder."""
    server_wait_seconds: float = 600.0
    """``servers``: longest wait for a server to use new weights, and for any to answer while all are lost."""
    max_staleness: int = 0
    """``servers``: steps that the weights of an answer may be behind those that it is trained with; 0 is on-policy.
    Above 0, servers generate while the trainer updates. Servers get new weights once a step, however many
    ``policy.minibatches`` it has."""

    def check(self) -> None:
        """Refuse values that are impossible whatever the other sections say."""
        require_at_least("rollout", self, 1, "samples", "max_new_tokens", "batch_size", "max_draws")
        require_at_least("rollout", self, 0, "overlong_buffer", "probe_rows", "max_staleness")
        require_above("rollout", self, 0, "max_logprob_diff", "server_wait_seconds")
        has_buffer, shaped = self.overlong_buffer > 0, self.overlong is Overlong.shape
        require(
            has_buffer == shaped and self.overlong_buffer < self.max_new_tokens,
            f"rollout.overlong_buffer is {self.overlong_buffer} and rollout.overlong {self.overlong}: shape needs a "
            f"buffer from 1 to rollout.max_new_tokens - 1 = {self.max_new_tokens - 1}, and nothing else has one.",
        )
        require(
            not self.dynamic_sampling or self.max_draws > 1,
            f"rollout.max_draws is {self.max_draws}, with which rollout.dynamic_sampling would draw nothing in place "
            "of what it drops. Raise it, or leave dynamic_sampling out.",
        )
        require(
            self.dynamic_sampling or self.max_draws == 3,
            f"rollout.max_draws is {self.max_draws}, which has no effect without rollout.dynamic_sampling. Remove it.",
        )
        self._check_mode()

    def _check_mode(self) -> None:
        train_only, servers = self.mode is RolloutMode.train_only, self.mode is RolloutMode.servers
        require(
            (self.dump is not None) == train_only,
            f"rollout.dump is {self.dump} and rollout.mode {self.mode}. train_only needs the folder, no other mode "
            "reads one.",
        )
        require(
            bool(self.servers) == servers,
            f"rollout.servers has {len(self.servers)} entries and rollout.mode is {self.mode}. Mode servers needs at "
            "least one, with url and model; no other mode asks them.",
        )
        require(
            not self.valid_names or self.mode in (RolloutMode.colocated, RolloutMode.rollout_only),
            f"rollout.valid_names is {self.valid_names}, which has no effect with rollout.mode {self.mode}: it is the "
            "ranks' own engines that can be kept to valid names. Remove it, or set rollout.mode to colocated.",
        )
        of_servers = (("reload_command", None), ("server_wait_seconds", 600.0), ("max_staleness", 0))
        of_others = (("batch_size", 64),)
        for name, unused in of_others if servers else of_servers:
            require(
                getattr(self, name) == unused,
                f"rollout.{name} is {getattr(self, name)}, which has no effect with rollout.mode {self.mode}. "
                "Remove it.",
            )
        self._check_servers()

    def _check_servers(self) -> None:
        for index, server in enumerate(self.servers):
            section = f"rollout.servers[{index}]"
            require(server.model is not None, f"{section}.model is missing. Name the model as the server knows it.")
            server.check(section)
        require_distinct("rollout.servers", [server.url or "" for server in self.servers])


@dataclass(kw_only=True, slots=True)
class RewardConfig:
    """One reward."""

    name: str = MISSING
    """A built-in reward of ``megatron_ads/rewards/registry.py``; or a function of one's own, ``module:function`` or
    ``path/to/file.py:function``."""
    weight: float = 1.0
    """w_k; with POPO and POPO-light its start, normalised."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of the reward besides the rollouts, such as ``{k: 20}``."""

    @property
    def is_own(self) -> bool:
        """Whether it is a function of one's own."""
        return ":" in self.name


class Combine(StrEnum):
    """How the advantages of several rewards become one, A = sum_k w_k A_k."""

    fixed = "fixed"
    """By the weights of the recipe."""
    popo = "popo"
    """By weights that follow the inner products of the rewards' gradients (Taiji, eq. 5-6): one more forward and
    backward pass a reward in each step, and on the host K - 1 gradients of K rewards."""
    popo_light = "popo_light"
    """By weights that follow the spread of each reward within its groups (Taiji, eq. 7)."""


@dataclass(kw_only=True, slots=True)
class RewardsConfig:
    """What answers are worth."""

    use: list[RewardConfig] = MISSING
    """The rewards; each is normalised within its groups before they are combined. Empty: a ``teacher`` alone says what
    answers are worth."""
    combine: Combine = Combine.fixed
    """How several become one."""
    popo_step_size: float = 0.1
    """``popo``: eta."""
    popo_temperature: float = 1.0
    """``popo``: mu."""
    timeout_seconds: float = 60.0
    """Longest computation of a function of one's own for the rollouts of one step; what has no value then counts as
    failed. Built-in rewards have no limit of their own: other ranks wait for ``runtime.load_timeout_seconds``."""

    def check(self) -> None:
        """Refuse values that are impossible whatever the other sections say."""
        require_distinct("rewards.use", [reward.name for reward in self.use])
        require_above("rewards", self, 0, "popo_step_size", "popo_temperature", "timeout_seconds")
        for index, reward in enumerate(self.use):
            require_above(f"rewards.use[{index}]", reward, 0, "weight")
        require(
            self.timeout_seconds == 60 or any(reward.is_own for reward in self.use),
            f"rewards.timeout_seconds is {self.timeout_seconds:g}, which has no effect on built-in rewards. Remove it.",
        )
        require(
            len(self.use) > 1 or self.combine is Combine.fixed,
            f"rewards.combine is {self.combine}, but rewards.use has {'a single reward' if self.use else 'no reward'}. "
            "Remove it, or add a reward.",
        )
        for name, unused in (("popo_step_size", 0.1), ("popo_temperature", 1.0)):
            require(
                self.combine is Combine.popo or getattr(self, name) == unused,
                f"rewards.{name} is {getattr(self, name)}, which has no effect with rewards.combine {self.combine}. "
                "Remove it, or set rewards.combine to popo.",
            )


class PolicyLoss(StrEnum):
    """What is clipped."""

    grpo = "grpo"
    """The ratio of each token (arXiv:2402.03300)."""
    gspo = "gspo"
    """The ratio of each answer, its geometric mean over tokens (arXiv:2507.18071), with ``loss_agg_mode``
    seq_mean_token_mean there."""
    cispo = "cispo"
    """The weight of each token's log-probability (arXiv:2506.13585, where ``clip_ratio_low`` is 1: no lower bound)."""


class LossAggregation(StrEnum):
    """How the tokens of a step become one loss, over all replicas and microbatches.

    verl's names; a recipe writes them with _ in place of -.
    """

    token_mean = "token-mean"
    seq_mean_token_sum = "seq-mean-token-sum"
    seq_mean_token_mean = "seq-mean-token-mean"
    seq_mean_token_sum_norm = "seq-mean-token-sum-norm"
    """The sum over tokens divided by ``rollout.max_new_tokens`` (Dr. GRPO, arXiv:2503.20783)."""


class KlType(StrEnum):
    """Estimators of KL(pi || ref) from one token (http://joschu.net/blog/kl-approx.html)."""

    k1 = "k1"
    """Unbiased, for the reward: as part of the loss its gradient is 0 in expectation."""
    k2 = "k2"
    """Biased, but its gradient is that of KL(pi || ref)."""
    k3 = "k3"
    """Unbiased and never negative; its gradient is that of KL(ref || pi)."""


class KlPlace(StrEnum):
    """What the KL term is part of."""

    loss = "loss"
    reward = "reward"


class ImportanceSampling(StrEnum):
    """How the difference between the engine's and the trainer's log-probabilities is corrected."""

    none = "none"
    tis = "tis"
    """Weigh each token by min(pi_trainer / pi_engine, ``importance_cap``)."""
    icepop = "icepop"
    """The same, but tokens outside [1 / ``importance_cap``, ``importance_cap``] do not count."""


class RouterReplay(StrEnum):
    """Whose choices of experts an update repeats; verl's names."""

    disabled = "disabled"
    """Nobody's: the current router chooses."""
    R2 = "R2"
    """Those of the trainer's pass for old log-probabilities (Routing Replay, arXiv:2507.18071, section 5.3)."""
    R3 = "R3"
    """Those of the rollout (arXiv:2510.11370), which no engine here returns: refused."""


@dataclass(kw_only=True, slots=True)
class PolicyConfig:
    """The update; formulas in ``megatron_ads/losses/policy.py`` and ``advantages.py``."""

    loss: PolicyLoss = PolicyLoss.grpo
    """What is clipped."""
    loss_agg_mode: LossAggregation = LossAggregation.token_mean
    """How the tokens of a step become one loss."""
    clip_ratio_low: float = 0.2
    """epsilon_low: ratios below 1 - epsilon_low are clipped."""
    clip_ratio_high: float = 0.2
    """epsilon_high: ratios above 1 + epsilon_high are clipped; 0.28 is DAPO's."""
    dual_clip: float | None = None
    """Bound of the ratio where the advantage is negative, above 1 (arXiv:1912.09729); None is off."""
    norm_adv_by_std: bool = True
    """Divide advantages by the standard deviation of their group's rewards."""
    leave_one_out: bool = False
    """Compare each answer with the mean of the others of its group (RLOO) instead of all."""
    kl_coef: float = 0.0
    """beta, the weight of KL(pi || ref); 0 needs no reference."""
    kl_loss_type: KlType = KlType.k3
    """Estimator of the KL term."""
    kl_in: KlPlace = KlPlace.loss
    """What the KL term is part of."""
    importance_sampling: ImportanceSampling = ImportanceSampling.none
    """Correction for engines whose numbers differ from the trainer's."""
    importance_cap: float = 2.0
    """Bound of that correction."""
    minibatches: int = 1
    """Updates per step, each on as many of its groups."""
    router_replay: RouterReplay = RouterReplay.disabled
    """Whose choices of experts an update repeats, so that its ratios follow from the weights alone. The gates are those
    of the current router, which gets its gradients. The load that metrics show and ``model.expert_bias_update_rate``
    follows is that of the repeated choices; ``model.aux_loss_coefficient`` weighs what the current router would
    choose."""

    def check(self) -> None:
        """Refuse values that are impossible whatever the other sections say."""
        require_above("policy", self, 0, "clip_ratio_low", "clip_ratio_high")
        require_above("policy", self, 1, "dual_clip", "importance_cap")
        require_at_least("policy", self, 0, "kl_coef")
        require_at_least("policy", self, 1, "minibatches")
        require(
            self.router_replay is not RouterReplay.R3,
            "policy.router_replay is R3, but no engine here returns which experts it chose. Set it to R2, the choices "
            "of the trainer's own pass over the answers.",
        )
        no_kl, uncorrected = self.kl_coef == 0, self.importance_sampling is ImportanceSampling.none
        for name, unused, idle, why in (
            ("dual_clip", None, self.loss is not PolicyLoss.grpo, f"with policy.loss {self.loss}"),
            ("kl_in", KlPlace.loss, no_kl, "while policy.kl_coef is 0"),
            ("kl_loss_type", KlType.k3, no_kl, "while policy.kl_coef is 0"),
            ("importance_cap", 2.0, uncorrected, "while policy.importance_sampling is none"),
            # The only update has the weights of the pass before it, and so its choices.
            ("router_replay", RouterReplay.disabled, self.minibatches == 1, "while policy.minibatches is 1"),
        ):
            value = getattr(self, name)
            require(not idle or value == unused, f"policy.{name} is {value}, which has no effect {why}. Remove it.")


@dataclass(kw_only=True, slots=True)
class RlConfig(RunConfig):
    """A whole job of reinforcement learning."""

    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    rewards: RewardsConfig = field(default_factory=RewardsConfig)
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)


def validate(config: RlConfig, world: int, shape: ModelShape | None = None) -> None:
    """Refuse a recipe that cannot run, or that holds settings without effect; as ``validate_run``.

    Raises:
        ConfigError: Naming the settings, their values and what to change.
    """
    for section in (config.rollout, config.rewards, config.policy, config.teacher):
        section.check()
    validate_run(config, world, shape)
    _check_what_judges(config)
    require(
        config.train.global_batch_size % config.policy.minibatches == 0,
        f"train.global_batch_size = {config.train.global_batch_size} prompts do not divide into policy.minibatches = "
        f"{config.policy.minibatches}. Choose a multiple.",
    )
    require(
        config.rollout.mode is not RolloutMode.train_only or config.train.evaluate_every is None,
        f"train.evaluate_every is {config.train.evaluate_every} and rollout.mode train_only, which answers nothing. "
        "Set train.evaluate_every to null.",
    )
    require(
        config.rollout.max_new_tokens < config.data.seq_length,
        f"rollout.max_new_tokens = {config.rollout.max_new_tokens} leaves no room for a prompt in data.seq_length = "
        f"{config.data.seq_length}. Lower it, or raise data.seq_length.",
    )
    require(
        config.rewards.combine is not Combine.popo or config.rollout.mode is not RolloutMode.rollout_only,
        f"rewards.combine is popo and rollout.mode {config.rollout.mode}: POPO's weights follow the gradients of an "
        "update, and nothing is trained. Set rewards.combine to fixed or popo_light.",
    )
    require(
        config.model.mtp_loss_weight == 0,
        f"model.mtp_loss_weight is {config.model.mtp_loss_weight:g}: the MTP layer is not trained by reinforcement "
        "learning. Set it to 0; its weights are carried along.",
    )


def _check_what_judges(config: RlConfig) -> None:
    """Refuse a job that neither rewards nor a teacher judge, and without rewards all that is about them."""
    rollout, policy = config.rollout, config.policy
    if config.rewards.use:
        require_at_least("rollout", rollout, 2, "samples")
        return
    require(
        config.teacher.is_there,
        "rewards.use is empty, and teacher.model is null. Name at least one reward, such as {name: label_agreement}, "
        "or a teacher.",
    )
    for setting, value, *idle in (
        ("rollout.dynamic_sampling", rollout.dynamic_sampling, False),
        ("rollout.overlong", rollout.overlong, Overlong.keep, Overlong.mask),
        ("policy.norm_adv_by_std", policy.norm_adv_by_std, True),
        ("policy.leave_one_out", policy.leave_one_out, False),
        ("policy.kl_in", policy.kl_in, KlPlace.loss),
        ("train.evaluate_every", config.train.evaluate_every, None),
    ):
        require(
            value in idle,
            f"{setting} is {value}, which has no effect while rewards.use is empty. Remove it, or name a reward.",
        )
