"""The typed schema of a recipe of `label`, below ``recipes/label/``, and checks that one setting cannot express.

Importing this module needs neither torch nor transformers.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum

from omegaconf import MISSING

from megatron_ads.config.data import SourceConfig
from megatron_ads.config.generation import AnsweringConfig, EndpointConfig, GenerationConfig, Method, ModelKind
from megatron_ads.config.recipes import load_recipe_of
from megatron_ads.errors import require, require_above, require_at_least, require_distinct


class RunnerKind(StrEnum):
    """What carries the epochs out."""

    local = "local"
    """This process, one epoch after another."""
    ray = "ray"
    """Ray Data, several epochs at a time on a cluster; needs the extra ``ray``."""


@dataclass(kw_only=True, slots=True)
class LabellerConfig(AnsweringConfig):
    """The model that labels, and how it is asked."""

    temperature: float = 0.0
    """Of the first draw; 0 takes the likeliest token."""
    servers: list[str] = field(default_factory=list)
    """Addresses of several servers with the same model, in place of ``url``; each takes ``concurrency`` requests."""
    server_wait_seconds: float = 600.0
    """How long all servers may be away before the job stops."""
    tokenizer: str | None = None
    """Folder of the served model's tokenizer: prompts are sent as tokens then, as the model was trained on them."""
    batch_size: int = 64
    """``local``: prompts that are answered at once."""
    send_priority: bool = False
    """Send the priority of a row's task with its request, as vLLM takes it with ``--scheduling-policy priority``."""

    def check(self, section: str) -> None:
        """Refuse impossible values; ``section`` is its name in the recipe."""
        addresses: list[str | None] = [*self.servers] or [self.url]
        for address in addresses:
            replace(self, url=address, servers=[]).check_one(section)
        require_distinct(f"{section}.servers", self.servers)
        require_at_least(section, self, 1, "batch_size")
        require_above(section, self, 0, "server_wait_seconds")
        require(
            not self.servers or self.url is None,
            f"{section}.url is {self.url!r} and {section}.servers names others; give one of them.",
        )
        for name, default in (("servers", []), ("tokenizer", None), ("send_priority", False)):
            require(
                self.kind is ModelKind.endpoint or getattr(self, name) == default,
                f"{section}.{name} is {getattr(self, name)!r}, which has no effect with {section}.kind local. Remove "
                "it.",
            )

    def check_one(self, section: str) -> None:
        """Refuse impossible values of what asks one server, or a checkpoint."""
        AnsweringConfig.check(self, section)

    def of_server(self, address: str) -> EndpointConfig:
        """Return how one of the servers is asked."""
        return replace(self, url=address, servers=[])


@dataclass(kw_only=True, slots=True)
class SelectionConfig:
    """Whose rows are labelled: users that were lately active and lately bought (advertiser paper, 3.2.1)."""

    active_days: float | None = None
    """Of the row's user, some event is at most so many days old; None: whenever."""
    conversion_days: float | None = None
    """And some conversion, on the platform or off it, is at most so many days old; the paper takes 90. None: with or
    without one."""

    def check(self, section: str) -> None:
        """Refuse impossible values; ``section`` is its name in the recipe."""
        require_above(section, self, 0, "active_days", "conversion_days")

    @property
    def selects(self) -> bool:
        """Whether it leaves anybody out."""
        return self.active_days is not None or self.conversion_days is not None


@dataclass(kw_only=True, slots=True)
class RayConfig:
    """Where Ray runs."""

    address: str | None = None
    """Of a cluster's head, ``ray://head:10001`` or ``auto``; None starts one on this machine."""
    workers: int = 2
    """Epochs that are labelled at a time, each with connections of its own."""

    def check(self, section: str) -> None:
        """Refuse impossible values; ``section`` is its name in the recipe."""
        require_at_least(section, self, 1, "workers")


@dataclass(kw_only=True, slots=True)
class LabelConfig:
    """A whole job of `label`."""

    sources: list[SourceConfig] = field(default_factory=list)
    """Rows to label; those of tables need no columns for the answer, and answers that rows have are not looked at."""
    out: str = MISSING
    """Folder of the labels and the report; a job that was interrupted continues there."""
    model: LabellerConfig = field(default_factory=LabellerConfig)
    """Labels the rows."""
    reasoning: bool = True
    """Label and reasoning, in tasks that reason; False: the label alone, for a fraction of the tokens."""
    draws: int = 3
    """How often a row is asked at most, until its answer can be read; from the second time on the answer is drawn."""
    draw_temperature: float = 0.7
    """Of those further draws."""
    first_draw: int = 0
    """Number of a row's first draw: a job that begins with ``draws``, or a multiple, gets other answers to the rows of
    one that begins with 0."""
    log_probabilities: bool = False
    """Keep how probable the label was. Of a server, this needs ``model.tokenizer``."""
    rows_per_epoch: int = 10_000
    """Rows that are labelled, and written, together."""
    priorities: dict[str, int] = field(default_factory=dict)
    """Tasks that come before others: those of lower numbers are labelled first; 0 for tasks that are not named."""
    select: SelectionConfig = field(default_factory=SelectionConfig)
    """Whose rows are labelled."""
    previous: list[str] = field(default_factory=list)
    """Folders of earlier jobs: rows that they labelled, or the jobs before them that they name themselves, are spared
    where their prompt has not changed since. Drift is told against the last one."""
    max_prompt_tokens: int | None = None
    """Longer prompts are not asked, and counted as failures; needs a tokenizer. None: what the server takes."""
    gpus: int | None = None
    """GPUs behind the model, for the report's cost; None: not known."""
    gpu_price_per_second: float | None = None
    """Price of one of them for a second."""
    baseline_cost: float | None = None
    """Cost of a million labels in another way, to which the report relates the cost of this one."""
    runner: RunnerKind = RunnerKind.local
    """What carries the epochs out."""
    ray: RayConfig = field(default_factory=RayConfig)
    """``runner: ray``: where."""
    seed: int = 0
    """Decides further draws, and the rows of generated sources."""

    def check(self) -> None:
        """Refuse values that cannot work.

        Raises:
            ConfigError: Naming the settings, their values and what to change.
        """
        require(bool(self.sources), "sources is empty. Name one: 'sources=[{kind: table, path: FILE, ...}]'.")
        for index, source in enumerate(self.sources):
            source.check(f"sources[{index}]")
        require_at_least("recipe", self, 0, "seed", "first_draw", "gpu_price_per_second", "baseline_cost")
        require_at_least("recipe", self, 1, "draws", "rows_per_epoch", "max_prompt_tokens", "gpus")
        require_above("recipe", self, 0, "draw_temperature")
        require(self.model.model is not None, "model.model is null. Name the model, or the checkpoint folder.")
        self.model.check("model")
        self.select.check("select")
        self.ray.check("ray")
        self._check_tokenizer()
        require(
            (self.gpus is None) == (self.gpu_price_per_second is None),
            f"gpus is {self.gpus} and gpu_price_per_second {self.gpu_price_per_second}; set both, or neither.",
        )
        require(
            self.runner is RunnerKind.local or self.model.kind is ModelKind.endpoint,
            "runner is ray, which needs servers (model.kind endpoint): a checkpoint answers in this process alone.",
        )
        require(
            self.runner is RunnerKind.local or self.model.max_cost is None,
            f"model.max_cost is {self.model.max_cost}, which has no effect with runner ray: its workers do not know of "
            "one another's cost. Remove it.",
        )

    def _check_tokenizer(self) -> None:
        has_tokenizer = self.model.tokenizer is not None or self.model.kind is ModelKind.local
        for name, is_on in (
            ("log_probabilities", self.log_probabilities),
            ("max_prompt_tokens", self.max_prompt_tokens is not None),
            ("reasoning", not self.reasoning),
        ):
            require(
                has_tokenizer or not is_on,
                f"{name} is {getattr(self, name)}, which needs the tokenizer of the served model. Name its folder in "
                "model.tokenizer.",
            )

    def generation(self, draw: int) -> GenerationConfig:
        """Return how a row is asked for the ``draw``-th time, from 0 on."""
        draw += self.first_draw
        first = self.model.generation(self.seed)
        if draw:
            again = replace(first, method=Method.sampled, temperature=self.draw_temperature)
            first = replace(again, top_p=self.model.top_p, seed=self.seed + draw)
        return replace(first, log_probabilities=self.log_probabilities)


def load_label_recipe(name_or_path: str, overrides: Sequence[str] = (), *, out: str | None = None) -> LabelConfig:
    """Compose a recipe with Hydra and return it as plain dataclasses, checked.

    Args:
        name_or_path: A shipped recipe such as ``label/relevance``, or a YAML file of one's own.
        overrides: Hydra overrides, ``model.url=http://host:8000/v1``.
        out: Replaces the recipe's ``out``, whatever characters it has; None leaves it.

    Raises:
        ConfigError: If there is no such recipe, a key is unknown (the nearest known one is named), a value has the
            wrong type or is impossible, or a required one is missing.
    """
    config = load_recipe_of(LabelConfig, "label", name_or_path, overrides, out=out)
    config.check()
    return config
