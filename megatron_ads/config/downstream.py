"""The settings of the frozen pipeline: how it is cut from logs, how its two models are trained, how features are made.

Importing this module needs no torch.
"""

from dataclasses import dataclass, field
from enum import StrEnum

from megatron_ads.config.data import HistoryConfig
from megatron_ads.config.settings import load_settings
from megatron_ads.errors import require_above, require_at_least, require_between


class RetrieverObjective(StrEnum):
    """What the retriever takes for a good item (advertiser paper, 4.5.1)."""

    conversions = "conversions"
    """What was bought."""
    clicks = "clicks"
    """What was clicked on; a click counts by the logarithm of how long the visit lasted."""
    impressions = "impressions"
    """What was shown."""


@dataclass(kw_only=True, slots=True)  # not frozen, here and below: OmegaConf merges into it
class TowersConfig:
    """Retriever: two towers."""

    objective: RetrieverObjective = RetrieverObjective.conversions
    """What is learned from: ``conversions``, ``clicks`` or ``impressions``."""

    dimensions: int = 64
    """Length of the vectors of users and items."""
    hidden: int = 128
    """Width of the hidden layer of each tower."""
    epochs: int = 10
    """Passes over the examples."""
    batch_size: int = 256
    """Examples in a batch; each is compared with the items of the others."""
    learning_rate: float = 3e-3
    """Of Adam."""
    query_share: float = 0.5
    """Share of examples that show the search before them; the others know the history alone."""
    name_share: float = 0.2
    """Share of examples whose query is the item's own name: people search for names, and answers give them."""

    def check(self, section: str) -> None:
        """Refuse impossible values."""
        require_at_least(section, self, 1, "dimensions", "hidden", "epochs")
        require_at_least(section, self, 2, "batch_size")
        require_above(section, self, 0, "learning_rate")
        require_between(section, self, 0, 1, "query_share", "name_share")


@dataclass(kw_only=True, slots=True)
class CrossConfig:
    """Ranker: DCN-v2 (arXiv:2008.13535) with a head for clicks and one for conversions after a click."""

    cross_layers: int = 2
    """Cross layers."""
    hidden: int = 128
    """Width of the two layers beside them."""
    epochs: int = 3
    """Passes over the impressions."""
    batch_size: int = 512
    """Impressions in a batch."""
    learning_rate: float = 1e-3
    """Of Adam."""
    query_share: float = 0.7
    """Share of impressions that show their query in an epoch; the others know the history alone."""

    def check(self, section: str) -> None:
        """Refuse impossible values."""
        require_at_least(section, self, 1, "cross_layers", "hidden", "epochs", "batch_size")
        require_above(section, self, 0, "learning_rate")
        require_between(section, self, 0, 1, "query_share")


@dataclass(kw_only=True, slots=True)
class DownstreamConfig:
    """A frozen pipeline. Histories end at anchors; what happens in the days after one is predicted from it."""

    seed: int = 0
    """Decides which users are held out, first weights and order."""
    held_out: float = 0.2
    """Share of the users that nothing is learned from."""
    answer_days: float = 7.0
    """Days after an anchor; the last anchor is so long before the end of the logs, and used for evaluation alone."""
    anchors: int = 3
    """Earlier anchors, ``answer_days`` apart, that are learned from."""
    query_minutes: float = 60.0
    """A search counts as the query of a conversion at most so many minutes later."""
    half_life_days: float = 14.0
    """An event so long before the anchor counts half."""
    buckets: int = 8192
    """Numbers that words are hashed to."""
    retriever: TowersConfig = field(default_factory=TowersConfig)
    """What finds items."""
    ranker: CrossConfig = field(default_factory=CrossConfig)
    """What judges pairs of user and item."""

    def check(self) -> None:
        """Refuse impossible values.

        Raises:
            ConfigError: Naming the setting.
        """
        for name in ("retriever", "ranker"):
            getattr(self, name).check(name)
        require_at_least("downstream", self, 0, "seed")
        require_at_least("downstream", self, 1, "anchors")
        require_at_least("downstream", self, 16, "buckets")
        require_above("downstream", self, 0, "answer_days", "query_minutes", "half_life_days")
        require_between("downstream", self, 0.01, 0.99, "held_out")


@dataclass(kw_only=True, slots=True)
class RowsConfig:
    """How the rows look that `downstream rows` writes."""

    history: HistoryConfig = field(default_factory=HistoryConfig)
    """How much of a user's history a prompt shows."""

    def check(self) -> None:
        """Refuse impossible values.

        Raises:
            ConfigError: Naming the setting.
        """
        self.history.check("history")


@dataclass(kw_only=True, slots=True)
class FeatureConfig:
    """How answers become features, in `downstream features`."""

    encoder: str | None = None
    """Model of sentence-transformers that embeds answers, a name on the hub or a folder; None: TF-IDF."""
    dimensions: int = 64
    """Length of the vectors of TF-IDF."""
    parts: int = 8
    """Product-quantised codes of an answer: each is of one part of its vector."""
    bits: int = 6
    """Of a code, which is below 2^bits."""
    events: int = 100
    """Most recent events of the most similar user."""
    seed: int = 0
    """Of the first centroids of the codes."""

    def check(self) -> None:
        """Refuse impossible values.

        Raises:
            ConfigError: Naming the setting.
        """
        require_at_least("features", self, 1, "dimensions", "parts", "events")
        require_between("features", self, 1, 16, "bits")
        require_at_least("features", self, 0, "seed")


def load_downstream(settings: object, source: str) -> DownstreamConfig:
    """Return checked settings of a pipeline.

    Args:
        settings: Overrides such as ``retriever.epochs=8``, or the object that a pipeline's folder has.
        source: What a message begins with.

    Raises:
        ConfigError: If a setting is unknown (the nearest known one is named), has the wrong type or is impossible.
    """
    return load_settings(DownstreamConfig, settings, source)


def load_features(settings: object, source: str) -> FeatureConfig:
    """Return checked settings of features; arguments and errors as of ``load_downstream``."""
    return load_settings(FeatureConfig, settings, source)


def load_rows(settings: object, source: str) -> RowsConfig:
    """Return checked settings of rows; arguments and errors as of ``load_downstream``."""
    return load_settings(RowsConfig, settings, source)
