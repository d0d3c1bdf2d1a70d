"""The typed schemas of recipes of `users`, below ``recipes/users/``: browse, agents, converse.

Importing this module needs neither torch nor numpy.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TypeVar

from omegaconf import OmegaConf

from megatron_ads.config.generation import AnsweringConfig
from megatron_ads.config.recipes import load_recipe_of
from megatron_ads.errors import require, require_above, require_at_least, require_between, require_distinct


@dataclass(kw_only=True, slots=True)  # not frozen, here and below: Hydra merges into it
class SimulatedWorldConfig:
    """The simulated business, what recommenders learn from, and the frozen pipeline."""

    logs: str | None = None
    """Folder of `megatron-ads data simulate`; None: simulated below ``out``."""
    pipeline: str | None = None
    """Folder of `megatron-ads downstream train` on these logs; None: trained below ``out``."""
    seed: int = 0
    """``logs: null``: of the world."""
    users: int = 4000
    """``logs: null``: people in the logs."""
    days: int = 42
    """``logs: null``: days of the logs; nothing of the last seven is shown to anybody."""
    held_out: float = 0.4
    """``pipeline: null``: share of the users that nothing is learned from, of whom users are simulated."""

    def check(self, section: str) -> None:
        """Refuse impossible values."""
        require_at_least(section, self, 0, "seed")
        require_at_least(section, self, 1, "users")
        require_at_least(section, self, 15, "days")
        require_between(section, self, 0.01, 0.99, "held_out")
        defaults, given = SimulatedWorldConfig(), {"logs": ("seed", "users", "days"), "pipeline": ("held_out",)}
        for folder, names in given.items():
            for name in names:
                require(
                    getattr(self, folder) is None or getattr(self, name) == getattr(defaults, name),
                    f"{section}.{name} is {getattr(self, name)}, which has no effect with {section}.{folder} "
                    f"{getattr(self, folder)!r}. Remove it.",
                )


@dataclass(kw_only=True, slots=True)
class PlayerConfig(AnsweringConfig):
    """The model that plays a part; without ``model`` fixed rules play it."""

    temperature: float = 0.0
    """0 takes the likeliest token."""
    max_tokens: int = 512
    """Longest answer, reasoning included."""
    batch_size: int = 16
    """``local``: prompts that are answered at once."""

    def check(self, section: str) -> None:
        """Refuse impossible values."""
        AnsweringConfig.check(self, section)
        require_at_least(section, self, 1, "batch_size")


class RecommenderKind(StrEnum):
    """Who chooses what users are shown, from the logs alone."""

    random = "random"
    """Any order, drawn evenly for each user."""
    popular = "popular"
    """What users had most to do with: searches aside, all events with an advertiser."""
    recent = "recent"
    """What the user bought lately, then what is popular."""
    factors = "factors"
    """PureSVD: truncated singular value decomposition of who had to do with whom."""
    two_towers = "two_towers"
    """The retriever of the frozen pipeline, on the user's history."""
    diluted = "diluted"
    """The same with every second place drawn evenly: known to be worse, which simulated users should notice."""
    answers = "answers"
    """Names that a model gave, ``answers``, then what is popular."""


@dataclass(kw_only=True, slots=True)
class AnswersConfig:
    """Answers of a language model to the rows of `megatron-ads downstream rows`, as a recommender."""

    rows: str | None = None
    """The rows."""
    file: str | None = None
    """Its answers, as `megatron-ads evaluate --answers` or a labelling job writes them."""

    def check(self, section: str, wanted: bool) -> None:
        """Refuse impossible values."""
        for name in ("rows", "file"):
            value = getattr(self, name)
            require(
                (value is not None) == wanted,
                f"{section}.{name} is {value!r}, and recommenders {'names' if wanted else 'does not name'} answers. "
                f"{'Name the file' if wanted else 'Name answers there, too, or remove it'}.",
            )


@dataclass(kw_only=True, slots=True)
class ScriptedUserConfig:
    """How scripted users decide, besides what they like."""

    noise: float = 0.02
    """Share of decisions on an ad that a coin takes."""
    patience: float = 3.0
    """Pages without a click that a user puts up with, on average; a page with one takes half as much."""
    attention: float = 0.9
    """How likely each place of a page is looked at, of how likely the place before it is."""

    def check(self, section: str) -> None:
        """Refuse impossible values."""
        require_between(section, self, 0, 1, "noise", "attention")
        require_above(section, self, 0, "patience")


@dataclass(kw_only=True, slots=True)
class UsersConfig:
    """What every simulation of users has, whatever they do."""

    out: str = "runs/users"
    """Folder of everything that is written."""
    seed: int = 0
    """Of users' decisions, and of all else that is drawn."""
    world: SimulatedWorldConfig = field(default_factory=SimulatedWorldConfig)
    """The simulated business."""
    simulated: int = 100
    """Users that act."""
    model: PlayerConfig = field(default_factory=PlayerConfig)
    """The model that plays a part; ``model.model: null``: fixed rules play it."""

    def check(self) -> None:
        """Refuse impossible values.

        Raises:
            ConfigError: Naming the setting.
        """
        self.world.check("world")
        self.model.check("model")
        require_at_least("recipe", self, 0, "seed")
        require_at_least("recipe", self, 1, "simulated")


@dataclass(kw_only=True, slots=True)
class BrowseConfig(UsersConfig):
    """Users, whom the model plays, browse pages of ads of several recommenders (Agent4Rec)."""

    simulated: int = 500
    """Users that browse, each with every recommender."""
    pages: int = 6
    """Most pages of a visit."""
    page_size: int = 5
    """Ads of a page."""
    recommenders: list[RecommenderKind] = field(
        default_factory=lambda: [kind for kind in RecommenderKind if kind is not RecommenderKind.answers]
    )
    """Whose pages are browsed."""
    factors: int = 16
    """Singular values that ``factors`` keeps."""
    answers: AnswersConfig = field(default_factory=AnswersConfig)
    """What ``answers`` recommends."""
    user: ScriptedUserConfig = field(default_factory=ScriptedUserConfig)
    """Scripted users."""

    def check(self) -> None:
        """Refuse impossible values, as every simulation does."""
        UsersConfig.check(self)
        self.user.check("user")
        require_at_least("recipe", self, 1, "factors")
        require_between("recipe", self, 1, 50, "pages", "page_size")
        require(bool(self.recommenders), f"recommenders is empty. Name some of {', '.join(RecommenderKind)}.")
        require_distinct("recommenders", self.recommenders)
        self.answers.check("answers", RecommenderKind.answers in self.recommenders)


@dataclass(kw_only=True, slots=True)
class AgentsConfig(UsersConfig):
    """Agents of users and advertisers, which the model plays, update their memories by reflection (AgentCF)."""

    purchases: int = 4
    """Latest purchases of each user that agents learn from, the oldest first."""
    candidates: int = 10
    """Advertisers ranked at the end, the next one bought from among them."""
    memory_characters: int = 600
    """Longest memory; what a reflection writes beyond it is cut off."""

    def check(self) -> None:
        """Refuse impossible values, as every simulation does."""
        UsersConfig.check(self)
        require_at_least("recipe", self, 1, "purchases")
        require_between("recipe", self, 2, 50, "candidates")
        require_between("recipe", self, 50, 10_000, "memory_characters")


@dataclass(kw_only=True, slots=True)
class ConverseConfig(UsersConfig):
    """An assistant, which the model plays, recommends advertisers in a conversation of several turns (Chat-Rec)."""

    simulated: int = 300
    """Users that talk, one conversation each."""
    turns: int = 5
    """Most turns: what the assistant says to the user, and what the user says to it."""
    shown: int = 3
    """Most advertisers of one recommendation."""
    calls: int = 2
    """Most calls of the retriever before each turn."""
    history: bool = False
    """Whether the retriever has the user's history, too; without, it knows what is said in the conversation alone."""

    def check(self) -> None:
        """Refuse impossible values, as every simulation does."""
        UsersConfig.check(self)
        require_between("recipe", self, 1, 20, "turns", "shown")
        require_between("recipe", self, 1, 5, "calls")


SIMULATIONS: dict[str, type[UsersConfig]] = {"browse": BrowseConfig, "agents": AgentsConfig, "converse": ConverseConfig}
"""The schema of each subcommand; a recipe says its subcommand by ``base_SUBCOMMAND`` in its ``defaults``."""

UsersRecipe = TypeVar("UsersRecipe", bound=UsersConfig)


def load_users_recipe(
    schema: type[UsersRecipe], name_or_path: str, overrides: Sequence[str] = (), *, out: str | None = None
) -> UsersRecipe:
    """Compose a recipe of `users` with Hydra and return it as plain dataclasses, checked.

    Args:
        schema: One of ``SIMULATIONS``.
        name_or_path: A shipped recipe such as ``users/browse``, or a YAML file of one's own.
        overrides: Hydra overrides, ``simulated=1000``.
        out: Replaces the recipe's ``out``; None leaves it.

    Raises:
        ConfigError: If there is no such recipe, it is of another subcommand, a key is unknown (the nearest known one is
            named), or a value has the wrong type or is impossible.
    """
    kind = next(name for name, each in SIMULATIONS.items() if each is schema)
    config = load_recipe_of(schema, kind, name_or_path, overrides, out=out, shipped_in="users", kinds=SIMULATIONS)
    config.check()
    return config


def users_recipe_yaml(config: UsersConfig) -> str:
    """Return the resolved recipe as YAML, which :func:`load_users_recipe` reads back to an equal one."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))
