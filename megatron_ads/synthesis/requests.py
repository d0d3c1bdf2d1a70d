"""The bodies of requests: sampling settings, and a seed of each request's own, so that a run can be repeated."""

from collections.abc import Sequence

from megatron_ads.config.generation import AnsweringConfig
from megatron_ads.data.rows import ChatRow
from megatron_ads.inference.client import Request
from megatron_ads.inference.openai_engine import request_body
from megatron_ads.stable_random import stable_integer
from megatron_ads.synthesis.prompts import ReasoningTemplate, teacher_messages

_SEEDS = 2**31


def chat_request(
    messages: Sequence[dict[str, str]], config: AnsweringConfig, *, seed: int, candidate: int = 0
) -> Request:
    """Return a request for one answer."""
    body = request_body({"messages": list(messages)}, config, config.generation(seed), seed=seed)
    return Request(body=body, candidate=candidate)


def reasoning_request(
    row: ChatRow, template: ReasoningTemplate, number: int, config: AnsweringConfig, *, seed: int
) -> Request:
    """Return the request for a row's candidate of that number; the template's wordings take turns, seeds differ."""
    return chat_request(
        teacher_messages(row, template, number % len(template.wordings)),
        config,
        seed=drawn(seed, row.id, template.name, number) % _SEEDS,
        candidate=number,
    )


def drawn(*parts: object) -> int:
    """Return a number that looks random and depends on nothing but ``parts``."""
    return stable_integer(*parts, separator="\x1f")
