"""Settings of a model that is asked: a server that speaks the OpenAI protocol, or a checkpoint on this machine."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, make_dataclass
from enum import StrEnum
from urllib.parse import urlsplit

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from megatron_ads.config.checks import require, require_between
from megatron_ads.config.generation import GenerationConfig, Method
from megatron_ads.config.recipe_errors import explain

# Member names are lower case because OmegaConf reads an enum by its name, and that is what a recipe writes.


class ModelKind(StrEnum):
    """What answers."""

    endpoint = "endpoint"
    """A server that speaks the OpenAI chat completions protocol."""
    local = "local"
    """A checkpoint folder of any kind the project knows, run by transformers in this process."""


@dataclass(kw_only=True, slots=True)  # not frozen, here and below: Hydra merges into it
class EndpointConfig:
    """A model behind a server, and how patiently it is asked."""

    model: str | None = None
    """Name the server knows the model by; None: there is no such model."""
    url: str | None = None
    """Address of the protocol's first version, ``http://localhost:8000/v1``."""
    api_key_env: str | None = None
    """Environment variable that holds the API key; None sends none. The key is never written anywhere."""
    token_limit_field: str = "max_tokens"
    """What the server calls the limit; some want ``max_completion_tokens``."""
    concurrency: int = 8
    """Requests in flight at a time."""
    requests_per_minute: float | None = None
    """Start no more requests than that; None is no limit."""
    timeout_seconds: float = 300.0
    """Longest wait for one answer."""
    attempts: int = 5
    """How often a request is sent at most, where the server is busy, fails or does not answer."""
    first_wait_seconds: float = 1.0
    """Pause before the second attempt; it doubles from attempt to attempt, and a server may ask for a longer one."""
    longest_wait_seconds: float = 60.0
    """No pause is longer."""
    input_price: float | None = None
    """Price of a million prompt tokens, in a currency of your own; None: the cost is not counted."""
    output_price: float | None = None
    """Price of a million answer tokens."""
    most_cost: float | None = None
    """Ask nothing more once answers have cost that much; a higher limit continues from there. None is no limit."""

    def check(self, section: str) -> None:
        """Refuse impossible values; ``section`` is its name in the recipe."""
        self._check_limits(section)
        if self.model is not None:
            self._check_url(section)

    def _check_limits(self, section: str) -> None:
        require_between(section, self, 0, math.inf, "first_wait_seconds", "longest_wait_seconds")
        require_between(section, self, 0, math.inf, "input_price", "output_price", "most_cost")
        require_between(section, self, 1, math.inf, "concurrency", "attempts")
        for name in ("timeout_seconds", "requests_per_minute"):
            value = getattr(self, name)
            require(value is None or value > 0, f"{section}.{name} is {value}; it must be above 0.")
        priced = self.input_price is not None and self.output_price is not None
        require(
            (self.input_price is None) == (self.output_price is None),
            f"{section}.input_price is {self.input_price} and {section}.output_price {self.output_price}; set both, or "
            "neither.",
        )
        require(
            priced or self.most_cost is None,
            f"{section}.most_cost is {self.most_cost}, which has no effect without {section}.input_price and "
            f"{section}.output_price. Set them, or remove it.",
        )

    def _check_url(self, section: str) -> None:
        require(
            self.url is not None,
            f"{section}.url is missing; kind endpoint needs one, such as http://localhost:8000/v1.",
        )
        require(
            _is_address(self.url or ""), f"{section}.url is {self.url!r}; it must be like http://localhost:8000/v1."
        )
        require(
            "@" not in urlsplit(self.url or "").netloc,
            f"{section}.url holds a user name or password, which would be written to the report. Put the key into an "
            f"environment variable and name that in {section}.api_key_env.",
        )


@dataclass(kw_only=True, slots=True)
class AnsweringConfig(EndpointConfig):
    """A model that answers, behind a server or on this machine, and how it is sampled from."""

    kind: ModelKind = ModelKind.endpoint
    """``endpoint``: a server; ``local``: a checkpoint folder, which ``model`` names, and which answers one request at a
    time, so that a server on the same checkpoint is faster."""
    temperature: float = 0.7
    """0 takes the likeliest token."""
    top_p: float = 0.95
    """Draw from the likeliest tokens that have this probability together."""
    max_tokens: int = 1024
    """Longest answer."""

    def check(self, section: str) -> None:
        """Refuse impossible values; ``section`` is its name in the recipe."""
        self._check_limits(section)
        require_between(section, self, 0, math.inf, "temperature")
        require_between(section, self, 1, math.inf, "max_tokens")
        require(self.top_p > 0, f"{section}.top_p is {self.top_p}; it must be above 0.")
        require(self.top_p <= 1, f"{section}.top_p is {self.top_p}; it must be at most 1.")
        if self.model is not None and self.kind is ModelKind.endpoint:
            self._check_url(section)
        if self.model is not None and self.kind is ModelKind.local:
            for name in ("url", "api_key_env", "requests_per_minute"):
                require(
                    getattr(self, name) is None,
                    f"{section}.{name} is {getattr(self, name)!r}, which has no effect with {section}.kind local. "
                    "Remove it.",
                )

    def generation(self, seed: int) -> GenerationConfig:
        """Return how one answer is generated."""
        sampled = self.temperature > 0
        return GenerationConfig(
            method=Method.sampled if sampled else Method.greedy,
            temperature=self.temperature if sampled else 1.0,
            top_p=self.top_p,
            seed=seed,
            max_new_tokens=self.max_tokens,
        )


def load_endpoint(section: str, given: Mapping[str, object], overrides: Sequence[str]) -> EndpointConfig:
    """Return the settings of a server from a command line, checked.

    Args:
        section: What its settings are called there, ``server``.
        given: Settings by name.
        overrides: Others, as ``server.concurrency=16``.

    Raises:
        ConfigError: If a setting is unknown (the nearest known one is named), has the wrong type or is impossible.
    """
    schema = make_dataclass("Settings", [(section, EndpointConfig)], kw_only=True)
    try:
        merged = OmegaConf.merge(
            {section: OmegaConf.structured(EndpointConfig)},
            {section: dict(given)},
            OmegaConf.from_dotlist(list(overrides)),
        )
    except (OmegaConfBaseException, YAMLError, ValueError) as error:
        raise explain(error, schema=schema, recipe="--url") from None
    assert isinstance(merged, DictConfig)
    config = OmegaConf.to_object(merged[section])
    assert isinstance(config, EndpointConfig)
    config.check(section)
    return config


def _is_address(url: str) -> bool:
    try:
        parts = urlsplit(url)
        named = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # of the port
        return False
    return named and not parts.query and not parts.fragment and url.isascii() and url.isprintable() and " " not in url
