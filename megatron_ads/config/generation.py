"""How answers are generated, and by what: a server that speaks the OpenAI protocol, or a checkpoint on this machine.

Importing it needs no torch.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields, make_dataclass
from enum import StrEnum
from typing import Any
from urllib.parse import urlsplit

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from megatron_ads.config.recipe_errors import explain
from megatron_ads.errors import require, require_at_least, require_each


class Method(StrEnum):
    """Where the next token comes from."""

    greedy = "greedy"
    """The most probable token."""
    sampled = "sampled"
    """Drawn from the most probable tokens."""
    beam = "beam"
    """The most probable answers, in order."""
    constrained_beam = "constrained-beam"
    """The same among valid names, behind an empty block of reasoning; tasks that do not answer with a name are answered
    greedily."""


class LengthRule(StrEnum):
    """What beams of different length are compared by."""

    sum = "sum"
    """The log-probability of the whole answer."""
    mean = "mean"
    """Per token, end token included: what transformers does. Favours long answers whose later tokens are sure."""
    mean_of_choices = "mean-of-choices"
    """Per token that had an alternative: forced tokens are sure and do not count."""


BEAM_METHODS = (Method.beam, Method.constrained_beam)


@dataclass(kw_only=True, slots=True)  # not frozen: Hydra merges into it
class GenerationConfig:
    """One way to generate; settings that do not belong to ``method`` play no part."""

    method: Method = Method.greedy
    """Where the next token comes from."""
    temperature: float = 1.0
    """``sampled``: divides the logits."""
    top_p: float = 1.0
    """``sampled``: draw from the fewest tokens that hold this probability."""
    seed: int = 0
    """``sampled``: decides the draws, together with the prompts that are generated from at once."""
    samples: int = 1
    """``sampled``: completions of every prompt."""
    beams: int = 20
    """``beam``, ``constrained-beam``: completions of every prompt, the best first."""
    length: LengthRule = LengthRule.sum
    """``sum`` is D3's (arXiv:2406.14900): sure tokens add nothing, so they should not divide either."""
    collaborative: float = 0.0
    """``constrained-beam``: how much a model of who buys from whom counts, next to the language model (D3)."""
    max_new_tokens: int | None = None
    """Longest completion in tokens, the end token included (of beams: not counted); None: as long as fits the model,
    or in an evaluation what the task's training targets suggest."""
    log_probabilities: bool = False
    """Ask for the log-probability of every generated token: the model's own, at temperature 1 without ``top_p``."""
    stop: list[str] = field(default_factory=list)
    """``greedy``, ``sampled``: a completion ends in front of any of these texts, as if the model had ended it there."""

    def check(self, section: str = "generation") -> None:
        """Refuse impossible values, and values that have no effect; ``section`` is its name in the recipe.

        Raises:
            ConfigError: Naming the setting and its value.
        """
        defaults = GenerationConfig()
        names = [field.name for field in fields(self)]
        changed = [name for name in names if getattr(self, name) != getattr(defaults, name)]
        self.check_as(lambda name: f"{section}.{name}", changed)

    def check_as(self, named: Callable[[str], str], given: Collection[str]) -> None:
        """Refuse impossible values, and those of ``given`` that have no effect; ``named`` says what a user calls them.

        Raises:
            ConfigError: Naming the setting and its value.
        """
        for name in given:
            allowed, method = _BELONGS_TO.get(name, tuple(Method)), named("method")
            require(
                self.method in allowed,
                f"{named(name)} has no effect with {method} {self.method}; leave it out, or take {method} "
                f"{' or '.join(allowed)}.",
            )
        limit = self.max_new_tokens
        for name, fits, wanted in (
            ("temperature", 0 < self.temperature < math.inf, "above 0"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("samples", self.samples >= 1, "at least 1"),
            ("beams", self.beams >= 1, "at least 1"),
            ("collaborative", 0 <= self.collaborative <= 1, "from 0 to 1"),
            ("max_new_tokens", limit is None or limit >= 1, "at least 1"),
        ):
            require(fits, f"{named(name)} is {getattr(self, name)}; it must be {wanted}.")


_BELONGS_TO = {
    **dict.fromkeys(("temperature", "top_p", "seed", "samples"), (Method.sampled,)),
    **dict.fromkeys(("beams", "length"), BEAM_METHODS),
    "collaborative": (Method.constrained_beam,),
    "stop": (Method.greedy, Method.sampled),
}


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
    template_arguments: dict[str, Any] = field(default_factory=dict)
    """What the model's chat template is given besides the messages, such as ``{thinking: true}``; a server gets it as
    ``chat_template_kwargs``."""
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
    max_cost: float | None = None
    """Ask nothing more once answers have cost that much; a higher limit continues from there. None is no limit."""

    def check(self, section: str) -> None:
        """Refuse impossible values; ``section`` is its name in the recipe."""
        self._check_limits(section)
        if self.model is not None:
            self._check_url(section)

    def _check_limits(self, section: str) -> None:
        require(self.model != "", f"{section}.model is empty. Name the model, or leave the setting out.")
        amounts = ("first_wait_seconds", "longest_wait_seconds", "input_price", "output_price", "max_cost")
        require_at_least(section, self, 0, *amounts)
        require_at_least(section, self, 1, "concurrency", "attempts")
        require_each(section, self, ("timeout_seconds", "requests_per_minute"), lambda value: value > 0, "above 0")
        require(
            (self.input_price is None) == (self.output_price is None),
            f"{section}.input_price is {self.input_price} and {section}.output_price {self.output_price}; set both, or "
            "neither.",
        )
        require(
            self.max_cost is None or self.input_price is not None,
            f"{section}.max_cost is {self.max_cost}, which has no effect without {section}.input_price and "
            f"{section}.output_price. Set them, or remove it.",
        )

    def _check_url(self, section: str) -> None:
        url = self.url or ""
        require(bool(url), f"{section}.url is missing; kind endpoint needs one, such as http://localhost:8000/v1.")
        require(_is_address(url), f"{section}.url is {url!r}; it must be like http://localhost:8000/v1.")
        require(
            "@" not in urlsplit(url).netloc,
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
        require_at_least(section, self, 0, "temperature")
        require_at_least(section, self, 1, "max_tokens")
        require_each(section, self, ["top_p"], lambda value: 0 < value <= 1, "above 0 and at most 1")
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
