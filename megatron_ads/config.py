"""The typed schema of every recipe, and the checks that one setting alone cannot express.

A recipe is Hydra YAML below ``recipes/``. It is composed onto these dataclasses, so an unknown key or a wrong
type never reaches the code; :func:`validate` then refuses combinations that cannot work or cannot take effect.
Importing this module needs neither torch nor Megatron-Core.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from megatron_ads.architecture import ModelShape
from megatron_ads.errors import ConfigError
from megatron_ads.layout import ParallelLayout, PipelinePlacement, place_layers
from megatron_ads.recipe_errors import explain
from megatron_ads.recipe_files import locate_recipe

# Member names are lower case because OmegaConf reads an enum by its name, and that is what a recipe writes.


class LayerSpecChoice(StrEnum):
    """Which layer implementation Megatron builds."""

    auto = "auto"
    local = "local"
    grouped = "grouped"
    te = "te"


class Precision(StrEnum):
    """Number format of weights and activations in the forward and backward pass."""

    fp32 = "fp32"
    bf16 = "bf16"


class Recompute(StrEnum):
    """Which activations are computed again in the backward pass instead of being kept."""

    none = "none"
    selective = "selective"
    full = "full"


class RouterBias(StrEnum):
    """What fine-tuning does with the router's selection bias."""

    frozen = "frozen"
    update = "update"


class FrozenPart(StrEnum):
    """A part of the model that can be kept as loaded; layers of MTP count as ``mtp`` only."""

    embedding = "embedding"
    attention = "attention"
    """Attention projections, with their norms and the norm before them."""
    dense = "dense"
    """Feed-forward of the dense layers, with the norm before it."""
    router = "router"
    experts = "experts"
    """Routed experts."""
    shared_experts = "shared_experts"
    mtp = "mtp"
    """The whole multi-token-prediction block; its loss then trains the layers below it only."""
    output = "output"
    """Final norm and output layer."""


class SourceKind(StrEnum):
    """Where rows come from."""

    builtin = "builtin"
    simulator = "simulator"
    esci = "esci"
    next_brand = "next_brand"
    gsm8k = "gsm8k"
    jsonl = "jsonl"
    table = "table"


class SplitBy(StrEnum):
    """What keeps held-out rows apart from those trained on."""

    group = "group"
    """Whole groups, such as queries or users, are held out."""
    time = "time"
    """The latest rows are held out; rows without a time are all trained on."""


class AdsTask(StrEnum):
    """What a row asks the model for."""

    query_ad_relevance = "query_ad_relevance"
    query_ad_three_labels = "query_ad_three_labels"
    """Relevance, place and ad quality."""
    ad_user_relevance = "ad_user_relevance"
    query_generation = "query_generation"
    next_advertiser = "next_advertiser"
    next_advertiser_ranking = "next_advertiser_ranking"
    """Twenty names and five interests, in XML."""
    user_profile = "user_profile"
    model_comparison = "model_comparison"
    ad_rewriting = "ad_rewriting"


class RowVariant(StrEnum):
    """Another question over the same rows."""

    yes_no = "yes_no"
    """Rows of both relevance tasks and of the next advertiser."""
    choose_one = "choose_one"
    """One of 20; rows of the next advertiser, as the two below."""
    list_ranking = "list_ranking"
    several_forms = "several_forms"
    """The name and the three above, drawn by the row's id."""


class Schedule(StrEnum):
    """Course of the learning rate after the warm-up."""

    cosine = "cosine"
    linear = "linear"
    constant = "constant"


class Normalize(StrEnum):
    """What one unit of loss is averaged over."""

    token = "token"
    sample = "sample"


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def _require_at_least(section: str, config: object, minimum: float, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value is not None and not (math.isfinite(value) and value >= minimum):
            raise ConfigError(f"{section}.{name} is {value}; it must be at least {minimum:g}.")


@dataclass(kw_only=True, slots=True)  # not frozen, here and below: Hydra merges into it
class ModelConfig:
    """The weights to start from and how they are run."""

    load: str = MISSING
    """Folder of weights: a Hugging Face checkpoint, converted shards or a torch_dist checkpoint."""
    layer_spec: LayerSpecChoice = LayerSpecChoice.auto
    """``te``: Transformer Engine; ``grouped``: torch with grouped experts; ``local``: torch, experts one by one.
    ``auto`` takes ``te`` where it is installed and there is a GPU, else ``grouped``."""
    precision: Precision = Precision.bf16
    """``bf16`` computes in BF16 and keeps gradients and optimizer state in FP32."""
    recompute: Recompute = Recompute.none
    """``selective``: the core attention; ``full``: whole layers."""
    router_bias: RouterBias = RouterBias.frozen
    """``update`` moves the bias against the load of each expert after every step (arXiv:2408.15664)."""
    router_bias_update_rate: float | None = None
    """Size of one such move; None with a frozen bias. DeepSeek-V3 was pre-trained with 0.001."""
    aux_loss_coefficient: float = 0.0
    """Weight of the load-balancing loss; 0 is off."""
    mtp_loss_weight: float = 0.0
    """Weight of the multi-token-prediction loss; 0 keeps the MTP layers as loaded and does not run them."""
    frozen: list[FrozenPart] = field(default_factory=list)
    """Parts that are not trained; empty trains everything."""
    published: str | None = None
    """Name of the published model this is for, by which a job is planned before ``load`` is at hand; None: unknown."""

    def check(self) -> None:
        """Refuse values that are impossible whatever the other sections say."""
        _require_at_least("model", self, 0, "router_bias_update_rate", "aux_loss_coefficient", "mtp_loss_weight")
        rate = self.router_bias_update_rate
        if self.router_bias is RouterBias.frozen:
            _require(
                rate is None,
                f"model.router_bias_update_rate is {rate}, which has no effect while model.router_bias is frozen. "
                "Remove it, or set model.router_bias=update.",
            )
        else:
            _require(
                rate is not None and rate > 0,
                f"model.router_bias is update, but model.router_bias_update_rate is {rate}. Set it, 0.001 for example.",
            )
        repeated = sorted({part for part in self.frozen if self.frozen.count(part) > 1})
        _require(not repeated, f"model.frozen lists {', '.join(repeated)} more than once.")
        _require(
            FrozenPart.mtp not in self.frozen or self.mtp_loss_weight > 0,
            "model.frozen lists mtp, which has no effect: with model.mtp_loss_weight = 0 the MTP layers are kept as "
            "loaded. Remove mtp.",
        )


@dataclass(kw_only=True, slots=True)
class LayoutConfig:
    """Parallel sizes a user chooses, in ranks; replicas (dp, edp) follow from the number of ranks launched."""

    tp: int = 1
    """Tensor parallel, attention and dense layers."""
    cp: int = 1
    """Context parallel: ranks sharing one sequence."""
    pp: int = 1
    """Pipeline stages."""
    vpp: int = 1
    """Virtual chunks per stage; 1 is no interleaving."""
    ep: int = 1
    """Expert parallel: ranks the routed experts are spread over."""
    etp: int = 1
    """Tensor parallel inside one expert."""
    pipeline: str | None = None
    """Layers of every chunk, as ``Et|(tt|)*29tmL``; None spreads them evenly."""
    first_stage_layers: int | None = None
    """Decoder layers of stage 0, where the others share the rest evenly; None is an even share."""
    last_stage_layers: int | None = None
    """Decoder layers of the last stage; None is an even share."""

    def runtime(self, world: int) -> ParallelLayout:
        """Return the layout for a job of ``world`` ranks.

        Raises:
            ConfigError: If the sizes do not divide the ranks.
        """
        return ParallelLayout(world=world, tp=self.tp, cp=self.cp, pp=self.pp, vpp=self.vpp, ep=self.ep, etp=self.etp)

    def fewest_ranks(self) -> int:
        """Return the smallest number of ranks that holds every weight once."""
        return ParallelLayout.smallest(tp=self.tp, cp=self.cp, pp=self.pp, vpp=self.vpp, ep=self.ep, etp=self.etp).world

    def placement(self, shape: ModelShape, layout: ParallelLayout) -> PipelinePlacement:
        """Return which chunk runs which layers.

        Raises:
            ConfigError: If the layers do not fit the stages.
        """
        return place_layers(
            shape,
            layout,
            pipeline=self.pipeline,
            first_stage_layers=self.first_stage_layers,
            last_stage_layers=self.last_stage_layers,
        )

    def check(self) -> None:
        """Refuse values that are impossible whatever the other sections say."""
        for name in ("first_stage_layers", "last_stage_layers"):
            _require_at_least("layout", self, 0, name)
            _require(
                getattr(self, name) is None or (self.pp > 1 and self.vpp == 1 and self.pipeline is None),
                f"layout.{name} is {getattr(self, name)}, which has no effect unless layout.pp > 1, layout.vpp = 1 and "
                f"layout.pipeline is null (they are {self.pp}, {self.vpp}, {self.pipeline!r}). Remove it.",
            )


@dataclass(kw_only=True, slots=True)
class HistoryConfig:
    """How much of a user's history a prompt shows; sections are those of ``megatron_ads/tasks/user_history.py``."""

    without: list[str] | None = None
    """Sections left out, such as ``clicks``; None is the source's own choice."""
    window_days: dict[str, float] = field(default_factory=dict)
    """Oldest event shown, by section; the built-in windows hold for sections that are not named."""
    most_entries: int | None = None
    """Most entries of a section; None is the source's own number."""
    most_tokens: int | None = None
    """Sections are shortened until the history takes about so many tokens, counted as words and signs; None is no
    limit."""

    def check(self, section: str) -> None:
        """Refuse impossible values; ``section`` is where this stands in the recipe."""
        _require_at_least(section, self, 1, "most_entries", "most_tokens")
        for name, days in self.window_days.items():
            _require(days > 0, f"{section}.window_days.{name} is {days}; it must be above 0.")


_NEXT_BRAND_TASKS = (AdsTask.next_advertiser, AdsTask.user_profile)
_TASKS_OF_USERS = (
    AdsTask.ad_user_relevance,
    AdsTask.next_advertiser,
    AdsTask.next_advertiser_ranking,
    AdsTask.user_profile,
)


@dataclass(kw_only=True, slots=True)
class SourceConfig:
    """One source of rows."""

    kind: SourceKind = MISSING
    """``builtin``: generated query-ad pairs; ``simulator``: rows of any task from a simulated ads business; ``esci``:
    public query-product pairs; ``next_brand``: public purchases; ``gsm8k``: school mathematics, for the general mix;
    ``jsonl``: chat rows in a file; ``table``: a JSONL, Parquet or CSV file with columns of your own."""
    path: str | None = None
    """File or folder; None for ``builtin`` and ``simulator``, and for public data below the folder that
    ``MEGATRON_ADS_DATA`` names."""
    task: AdsTask | None = None
    """What rows of ``simulator``, ``next_brand`` and ``table`` ask for. Without it ``next_brand`` asks for the next
    advertiser, and rows of ``table`` have a prompt and a target already."""
    variant: RowVariant | None = None
    """Ask the rows another way: ``yes_no``, ``choose_one`` (of 20), ``list_ranking`` (of 20) or ``several_forms``,
    which mixes these with the plain question; None: as their task has it."""
    history: HistoryConfig = field(default_factory=HistoryConfig)
    """How much of a user's history the prompts show, where they show any."""
    columns: dict[str, str] = field(default_factory=dict)
    """``table``: which column holds each field of the task, ``{query: search_term, title: ad_title, label: grade}``."""
    anchor: str | None = None
    """``table`` with task next_advertiser: date that histories end at and answers begin with, ``2025-03-01`` (UTC); the
    file then holds one user event a row."""
    rejected: str | None = None
    """``table`` and ``jsonl``: file that rows which cannot be used are written to, with the reason; None: the first one
    ends the run."""
    weight: float = 1.0
    """Share of the rows drawn from this source, relative to the other sources' weights."""
    rows: int | None = None
    """Use at most this many rows; None is all (``builtin``, ``simulator``: as many as they generate)."""
    keep_share: bool = False
    """Keep the share in all samples that ``weight`` gives when ``reweight.tasks`` moves the others': for general-domain
    rows."""

    def check(self, section: str) -> None:
        """Refuse impossible values; ``section`` is where this source stands in the recipe."""
        _require(
            math.isfinite(self.weight) and self.weight > 0,
            f"{section}.weight is {self.weight}; it must be above 0. Remove the source to leave it out.",
        )
        _require_at_least(section, self, 1, "rows")
        self.history.check(f"{section}.history")
        if self.kind in (SourceKind.jsonl, SourceKind.table):
            _require(self.path is not None, f"{section}.path is missing; kind {self.kind} reads a file of rows.")
        if self.kind in (SourceKind.builtin, SourceKind.simulator):
            _require(
                self.path is None,
                f"{section}.path is {self.path!r}, which has no effect with kind {self.kind}. "
                "Remove it, or set kind: jsonl.",
            )
        self._check_effects(section)

    def _check_effects(self, section: str) -> None:
        """Refuse settings that this kind of source does not read."""
        is_table, shows_users = self.kind is SourceKind.table, self.kind is SourceKind.next_brand
        is_event_log = is_table and self.task is AdsTask.next_advertiser
        _require(
            is_event_log == (self.anchor is not None),
            f"{section}.anchor is {self.anchor}; kind table with task next_advertiser needs one, others have no use "
            "for it.",
        )
        if self.kind is SourceKind.simulator:
            _require(
                self.task is not None, f"{section}.task is missing; kind simulator needs one of {', '.join(AdsTask)}."
            )
            shows_users = self.task in _TASKS_OF_USERS
        else:
            _require(
                self.task is None or is_table or (shows_users and self.task in _NEXT_BRAND_TASKS),
                f"{section}.task is {self.task}, which has no effect with kind {self.kind}. Remove it.",
            )
        _require(
            shows_users or is_event_log or self.history == HistoryConfig(),
            f"{section}.history has no effect: these rows show no user's history. Remove it.",
        )
        _require(is_table or not self.columns, f"{section}.columns has no effect with kind {self.kind}. Remove it.")
        _require(not is_table or bool(self.columns), f"{section}.columns is missing; kind table needs to know them.")
        _require(
            is_table or self.kind is SourceKind.jsonl or self.rejected is None,
            f"{section}.rejected is {self.rejected!r}, which has no effect with kind {self.kind}. Remove it.",
        )


@dataclass(kw_only=True, slots=True)
class DataConfig:
    """Rows and how they become batches."""

    sources: list[SourceConfig] = field(default_factory=list)
    """Where rows come from; at least one."""
    seq_length: int = 4096
    """Tokens of one row of a batch."""
    packing: bool = True
    """Put several samples into one row, attention kept inside each."""
    seed: int = 0
    """Decides the order of rows and which of them are held out."""
    validation_rows: int = 0
    """Rows held out for evaluation; 0 is none."""
    split_by: SplitBy = SplitBy.group
    """Which rows are held out: those of whole groups such as queries and users, or the latest."""
    validation_rows_per_group: int | None = None
    """Most rows that one held-out group, such as a query, gives; fewer spread the evaluation over more groups, whose
    other rows take no part. None is all."""

    def check(self) -> None:
        """Refuse values that are impossible whatever the other sections say."""
        _require(
            bool(self.sources),
            "data.sources is empty. Choose data=builtin or data=esci, or 'data.sources=[{kind: jsonl, path: FILE}]'.",
        )
        for index, source in enumerate(self.sources):
            source.check(f"data.sources[{index}]")
        _require_at_least("data", self, 2, "seq_length")
        _require_at_least("data", self, 0, "seed", "validation_rows")
        _require(
            self.split_by is SplitBy.group or self.validation_rows_per_group is None,
            f"data.validation_rows_per_group is {self.validation_rows_per_group}, which has no effect with "
            "data.split_by time. Remove it.",
        )
        _require_at_least("data", self, 1, "validation_rows_per_group")
        _require(
            self.validation_rows_per_group is None or self.validation_rows > 0,
            f"data.validation_rows_per_group is {self.validation_rows_per_group}, but data.validation_rows is 0: "
            "nothing is held out. Set data.validation_rows, or data.validation_rows_per_group to null.",
        )


@dataclass(kw_only=True, slots=True)
class OptimConfig:
    """AdamW (arXiv:1711.05101) and the course of its learning rate."""

    learning_rate: float = MISSING
    """Highest learning rate, reached after the warm-up."""
    min_learning_rate: float = 0.0
    """Learning rate at the last step."""
    schedule: Schedule = Schedule.cosine
    """From the highest to the lowest learning rate."""
    warmup_steps: int = 0
    """Steps over which the learning rate rises linearly from 0."""
    weight_decay: float = 0.0
    """Decoupled weight decay; norms and biases are left out."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.95
    """Decay of the second moment."""
    epsilon: float = 1e-8
    """Added to the square root of the second moment."""
    clip_grad: float = 1.0
    """Largest global gradient norm; 0 is off."""

    def check(self) -> None:
        """Refuse values that are impossible whatever the other sections say."""
        _require_at_least("optim", self, 0, "learning_rate", "min_learning_rate", "warmup_steps", "weight_decay")
        _require_at_least("optim", self, 0, "clip_grad")
        for name in ("learning_rate", "epsilon"):
            value = getattr(self, name)
            _require(math.isfinite(value) and value > 0, f"optim.{name} is {value}; it must be above 0.")
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            _require(0 <= value < 1, f"optim.{name} is {value}; it must be at least 0 and below 1.")
        if self.schedule is Schedule.constant:
            _require(
                self.min_learning_rate == 0,
                f"optim.min_learning_rate is {self.min_learning_rate:g}, which has no effect with optim.schedule "
                "constant. Remove it, or choose cosine or linear.",
            )
        _require(
            self.min_learning_rate <= self.learning_rate,
            f"optim.min_learning_rate {self.min_learning_rate:g} is above optim.learning_rate {self.learning_rate:g}.",
        )


@dataclass(kw_only=True, slots=True)
class TrainConfig:
    """How long and in which portions."""

    steps: int = MISSING
    """Optimizer steps of the whole run, over all resumptions."""
    global_batch_size: int = 8
    """Rows of ``data.seq_length`` tokens per step, over all ranks."""
    micro_batch_size: int = 1
    """Rows one rank runs forward and backward at a time."""
    seed: int = 0
    """Seeds every random number generator that is not the data's."""
    deterministic: bool = False
    """Ask for bit-equal repetition, slower on a GPU."""
    log_every: int = 1
    """Steps between lines of metrics."""
    evaluate_every: int | None = None
    """Steps between evaluations on the held-out rows; None is never."""

    def check(self) -> None:
        """Refuse values that are impossible whatever the other sections say."""
        _require_at_least("train", self, 1, "steps", "global_batch_size", "micro_batch_size", "log_every")
        _require_at_least("train", self, 1, "evaluate_every")
        _require_at_least("train", self, 0, "seed")

    def microbatches(self, layout: ParallelLayout) -> int:
        """Return how many microbatches each data-parallel rank runs in one step.

        Raises:
            ConfigError: If the rows of a step cannot be divided evenly.
        """
        rows = self.micro_batch_size * layout.dp
        _require(
            self.global_batch_size % rows == 0,
            f"train.global_batch_size = {self.global_batch_size} is not a multiple of train.micro_batch_size * dp = "
            f"{self.micro_batch_size} * {layout.dp} = {rows}. Choose a multiple of {rows}.",
        )
        return self.global_batch_size // rows


@dataclass(kw_only=True, slots=True)
class LossConfig:
    """How the loss is averaged."""

    normalize: Normalize = Normalize.token
    """``token``: every target token of a step weighs the same; ``sample``: every sample does."""


@dataclass(kw_only=True, slots=True)
class ReweightConfig:
    """Weights that follow what the model has learned; formulas in ``megatron_ads/data/adaptive_weights.py``."""

    instances: bool = False
    """Multiply each sample's loss by a weight that falls as its perplexity does."""
    interval: int = 50
    """Steps between renewals of the instance weights."""
    beta: float = 1.0
    """How strongly a change of perplexity changes an instance weight."""
    lowest: float = 0.2
    """Smallest instance weight."""
    highest: float = 5.0
    """Largest instance weight."""
    tasks: bool = False
    """Draw more samples of the tasks whose validation metric is low, renewed at each evaluation."""
    alpha: float = 1.0
    """How strongly a low validation metric raises a task's share; 1 is in proportion to what is missing to 1."""

    def check(self) -> None:
        """Refuse values that are impossible whatever the other sections say."""
        _require_at_least("reweight", self, 1, "interval", "alpha")
        for name in ("beta", "lowest"):
            value = getattr(self, name)
            _require(math.isfinite(value) and value > 0, f"reweight.{name} is {value:g}; it must be above 0.")
        _require(
            self.lowest <= 1 <= self.highest < math.inf,
            f"reweight.lowest = {self.lowest:g} and reweight.highest = {self.highest:g} must have 1 between them: it "
            "is the weight of a sample whose perplexity has not changed.",
        )


@dataclass(kw_only=True, slots=True)
class CheckpointConfig:
    """Saving and resuming."""

    dir: str = MISSING
    """Folder that holds one folder per checkpoint."""
    save_every: int | None = None
    """Steps between checkpoints; None saves after the last step only."""
    keep_last: int = 2
    """Complete checkpoints kept; older ones are deleted."""
    resume: bool = True
    """Go on from the latest complete checkpoint in ``dir`` where there is one."""

    def check(self) -> None:
        """Refuse values that are impossible whatever the other sections say."""
        _require_at_least("checkpoint", self, 1, "save_every", "keep_last")


@dataclass(kw_only=True, slots=True)
class RuntimeConfig:
    """Processes of the job."""

    timeout_seconds: int = 600
    """A communication, or a step in which nothing moves, that takes longer ends the job, with a report on the cause."""
    threads: int = 0
    """CPU threads per process; 0 divides the cores among the processes of a machine."""
    straggler_factor: float = 1.5
    """A rank is named as slow when its own work takes this many times the median of its pipeline stage."""
    straggler_steps: int = 5
    """For how many logged steps on end it must."""

    def check(self) -> None:
        """Refuse values that are impossible whatever the other sections say."""
        _require_at_least("runtime", self, 1, "timeout_seconds", "straggler_factor", "straggler_steps")
        _require_at_least("runtime", self, 0, "threads")


@dataclass(kw_only=True, slots=True)
class LogConfig:
    """What a run leaves behind to look at."""

    dir: str = MISSING
    """Folder for metrics.jsonl, the resolved recipe and TensorBoard files."""
    tensorboard: bool = True
    """Write TensorBoard files besides metrics.jsonl."""


@dataclass(kw_only=True, slots=True)
class SftConfig:
    """A whole supervised fine-tuning job."""

    model: ModelConfig = field(default_factory=ModelConfig)
    layout: LayoutConfig = field(default_factory=LayoutConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    reweight: ReweightConfig = field(default_factory=ReweightConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    log: LogConfig = field(default_factory=LogConfig)


def validate(config: SftConfig, world: int, shape: ModelShape | None = None) -> None:
    """Refuse a recipe that cannot run, or that holds settings without effect, on ``world`` ranks.

    With ``shape``, what depends on the model is checked too: layers and experts per rank, MTP, sequence length.

    Raises:
        ConfigError: Naming the settings, their values and what to change.
    """
    for section in (config.model, config.layout, config.data, config.optim, config.train):
        section.check()
    config.reweight.check()
    config.checkpoint.check()
    config.runtime.check()
    _check_steps(config)
    layout = config.layout.runtime(world)
    _check_batch(config, layout)
    if shape is not None:
        _check_model(config, layout, shape)


def _check_steps(config: SftConfig) -> None:
    _require(
        config.optim.warmup_steps <= config.train.steps,
        f"optim.warmup_steps = {config.optim.warmup_steps} is more than train.steps = {config.train.steps}: "
        "the learning rate would never be reached.",
    )
    _require(
        config.train.evaluate_every is None or config.data.validation_rows > 0,
        f"train.evaluate_every is {config.train.evaluate_every}, but data.validation_rows is 0: there is nothing to "
        "evaluate on. Set data.validation_rows, or train.evaluate_every to null.",
    )
    _require(
        not config.reweight.tasks or config.train.evaluate_every is not None,
        "reweight.tasks needs a validation metric of each task, but train.evaluate_every is null. Set it.",
    )


def _check_batch(config: SftConfig, layout: ParallelLayout) -> None:
    microbatches = config.train.microbatches(layout)
    _require(
        layout.vpp == 1 or microbatches % layout.pp == 0,
        f"layout.vpp = {layout.vpp} runs microbatches in groups of layout.pp = {layout.pp}, but a step has "
        f"train.global_batch_size / (train.micro_batch_size * dp) = {config.train.global_batch_size} / "
        f"({config.train.micro_batch_size} * {layout.dp}) = {microbatches} microbatches. Choose a "
        f"train.global_batch_size that is a multiple of {layout.pp * layout.dp * config.train.micro_batch_size}.",
    )
    # Context parallelism cuts a row into 2 * cp pieces to balance the causal mask; sequence parallelism into tp.
    pieces = layout.tp * (2 * layout.cp if layout.cp > 1 else 1)
    tokens = config.data.seq_length * config.train.micro_batch_size
    _require(
        tokens % pieces == 0,
        f"data.seq_length * train.micro_batch_size = {config.data.seq_length} * {config.train.micro_batch_size} = "
        f"{tokens} tokens cannot be cut into {pieces} pieces (layout.tp = {layout.tp}, layout.cp = {layout.cp}). "
        f"Choose a multiple of {pieces}.",
    )


def _check_model(config: SftConfig, layout: ParallelLayout, shape: ModelShape) -> None:
    config.layout.placement(shape, layout)
    layout.check_model(shape)
    _require(
        config.data.seq_length <= shape.max_positions,
        f"data.seq_length = {config.data.seq_length} is longer than the model's {shape.max_positions} positions.",
    )
    _require(
        shape.mtp_layers > 0 or config.model.mtp_loss_weight == 0,
        f"model.mtp_loss_weight is {config.model.mtp_loss_weight:g}, but the model has no MTP layer. Set it to 0.",
    )
    _require(
        shape.has_expert_bias or config.model.router_bias is RouterBias.frozen,
        "model.router_bias is update, but the model's router has no selection bias. Set it to frozen.",
    )
    _require_parts(config.model.frozen, shape)


def _require_parts(frozen: Sequence[FrozenPart], shape: ModelShape) -> None:
    """Refuse to freeze what the model does not have."""
    has = {
        FrozenPart.dense: shape.first_dense_layers > 0,
        FrozenPart.shared_experts: shape.shared_ffn_size > 0,
    }
    absent = [part for part in frozen if not has.get(part, True)]
    _require(not absent, f"model.frozen lists {', '.join(absent)}, which the model does not have. Remove it.")


def load_recipe(name_or_path: str, overrides: Sequence[str] = ()) -> SftConfig:
    """Compose a recipe with Hydra and return it as plain dataclasses, not yet validated against a world size.

    Args:
        name_or_path: A shipped recipe such as ``sft/quickstart``, or a YAML file of one's own.
        overrides: Hydra overrides, ``train.steps=20`` or ``layout=pp4_ep2``.

    Raises:
        ConfigError: If there is no such recipe, a key is unknown (the nearest known one is named), a value has
            the wrong type, or a required one is missing.
    """
    composed = _compose(name_or_path, overrides)
    if missing := sorted(OmegaConf.missing_keys(composed)):
        raise ConfigError(
            f"{name_or_path}: {', '.join(missing)} must be set, in the recipe or on the command line as KEY=VALUE."
        )
    config = OmegaConf.to_object(composed)
    assert isinstance(config, SftConfig)  # to_object instantiates the schema composed onto
    return config


def load_layout(name_or_path: str, overrides: Sequence[str] = ()) -> LayoutConfig:
    """Return the layout section of a recipe alone; other settings may still be open.

    Raises:
        ConfigError: As :func:`load_recipe`, but for missing settings.
    """
    layout = OmegaConf.to_object(_compose(name_or_path, overrides).layout)
    assert isinstance(layout, LayoutConfig)
    return layout


def _compose(name_or_path: str, overrides: Sequence[str]) -> DictConfig:
    return compose_onto(SftConfig, "sft", name_or_path, overrides)


def compose_onto(schema: type, kind: str, name_or_path: str, overrides: Sequence[str]) -> DictConfig:
    """Return a recipe of one kind, ``recipes/KIND/``, composed onto the schema, which it names as ``base_KIND``.

    Raises:
        ConfigError: If there is no such recipe, a key is unknown, or a value has the wrong type.
    """
    ConfigStore.instance().store(name=f"base_{kind}", node=schema)
    folder, name, search = locate_recipe(name_or_path, kind)
    try:
        with initialize_config_dir(config_dir=str(folder), version_base=None):
            composed = compose(config_name=name, overrides=[*search, *overrides])
        # Merged once more from plain values: an override such as +train.stepz=1 may extend the composed config.
        merged = OmegaConf.merge(OmegaConf.structured(schema), OmegaConf.to_container(composed, resolve=True))
    except (HydraException, OmegaConfBaseException, YAMLError, ValueError) as error:  # Hydra refuses some overrides so
        raise explain(error, schema=schema, recipe=name_or_path) from None
    assert isinstance(merged, DictConfig)
    return merged


def recipe_yaml(config: SftConfig) -> str:
    """Return the resolved recipe as YAML, which :func:`load_recipe` reads back to an equal one."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))
