"""The engine behind a server with the OpenAI protocol: vLLM, SGLang, `transformers serve`, or a hosted service.

Conversations go to ``/chat/completions``, which every such server has. Token ids go to ``/completions`` with the fields
of vLLM (``prompt`` as ids, ``return_token_ids``, ``logprobs``, ``prompt_logprobs``), so that what is scored and what
was generated are the same tokens.

What a request does not say, such as top_k, a server may take from the checkpoint's generation_config.json; vLLM started
with ``--generation-config vllm`` does not.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NoReturn, cast

from megatron_ads.config.generation import BEAM_METHODS, EndpointConfig, GenerationConfig, Method
from megatron_ads.errors import DataError
from megatron_ads.inference.client import Client, Request, Usage
from megatron_ads.inference.endpoint import Endpoint
from megatron_ads.inference.engine import Completion, Finish, Prompt, UnsupportedError
from megatron_ads.journal import Journal, digest_of
from megatron_ads.rows import Message

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_ads.inference.beam_rules import Rules
    from megatron_ads.inference.servers import Servers

_SEEDS = 2**31
"""Seeds are below, for servers that keep them in 32 bits."""


class OpenAIEngine:
    """A model behind a server. Completions that a journal holds are not asked for again."""

    def __init__(
        self,
        name: str,
        config: EndpointConfig,
        journal: Journal | None = None,
        *,
        servers: "Servers | None" = None,
        also_sent: Mapping[str, Any] | None = None,
        usage: Usage | None = None,
        goes_on: bool = False,
    ) -> None:
        """Prepare to ask; nothing is sent yet.

        Args:
            name: The section of ``config`` in a recipe.
            config: How patiently to ask, and whom.
            journal: Keeps what was answered.
            servers: Asked instead of the one at ``config.url``.
            also_sent: Fields of the server's own that go with every request, such as ``priority``.
            usage: What was asked of the model before, to count on; with it, costs and refusals are those of a job of
                several engines.
            goes_on: A request without an answer after all attempts has an unanswered completion, as long as the server
                answers others, in place of ending the call with an error.

        Raises:
            ConfigError: If the environment variable that should hold the key is not set.
        """
        self._name, self._config, self._also_sent = name, config, dict(also_sent or {})
        self._goes_on = goes_on
        self._endpoint = servers or Endpoint(name, config)
        self.client = Client(name, config, self._endpoint, journal, usage=usage)

    def generate(
        self,
        prompts: Sequence[Prompt],
        config: GenerationConfig,
        *,
        rules: "Sequence[Rules] | None" = None,
        description: str = "generating",
        needs_words: bool = False,
    ) -> list[list[Completion]]:
        """Return the samples of every prompt. A prompt that the server calls impossible has a refused completion.

        With ``needs_words``, an empty answer is a failed attempt; one that stays empty is a refused completion, too.
        Each completion is a request of its own, whose seed depends on ``config.seed``, the prompt, and how often the
        prompt came before in this call.
        """
        require_supported(config)
        samples = config.samples if config.method is Method.sampled else 1
        times: Counter[str] = Counter()
        requests = [self._request(prompt, config, times) for prompt in prompts for _ in range(samples)]
        requests = [replace(request, needs_words=needs_words) for request in requests]
        found = self._ask(requests, description)
        for completion in found:
            self._require_reported(completion, config, prompts[0])
        return [found[start : start + samples] for start in range(0, len(found), samples)]

    def log_probabilities(
        self, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]
    ) -> list[list[float]]:
        """Return the log-probability of every token of every answer, as the server computes it for a prompt.

        Raises:
            UnsupportedError: If the server does not report log-probabilities of prompts.
            DataError: If requests have no answer after all attempts, or one is refused.
        """
        found = []
        for completion, answer in zip(self.read(prompts, answers), answers, strict=True):
            if completion.prompt_log_probabilities is None:
                raise DataError(
                    f"the {self._name} cannot read a text ({completion.text}). If it is too long, start the server "
                    "with a longer context, such as vLLM's --max-model-len."
                )
            found.append(list(completion.prompt_log_probabilities[-len(answer) :]))
        return found

    def read(self, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]) -> list[Completion]:
        """Return a completion for each prompt with its answer, whose ``prompt_log_probabilities`` are those of both.

        Where these are None, the completion is a refused or an unanswered one, and says why.

        Raises:
            UnsupportedError: If the server does not report them.
            DataError: As ``generate``.
        """
        requests = [
            Request(
                body={
                    "model": self._config.model,
                    "prompt": [*prompt, *answer],
                    "temperature": 0.0,
                    self._config.token_limit_field: 1,
                    "prompt_logprobs": 0,
                }
            )
            for prompt, answer in zip(prompts, answers, strict=True)
        ]
        found = self._ask(requests, "reading")
        for completion in found:
            failed = completion.finish in (Finish.refused, Finish.unanswered)
            if completion.prompt_log_probabilities is None and not failed:
                self._lacks("the log-probabilities of a prompt (prompt_logprobs)")
        return found

    def update_weights(self, weights: "Iterator[tuple[str, Tensor]]") -> NoReturn:
        """Refuse, always: the protocol has no request for it."""
        raise UnsupportedError(
            f"the {self._name} at {self._config.url} cannot take weights: the OpenAI protocol has no request for it. "
            "Export the new weights and restart the server on them, or generate with the transformers engine."
        )

    def close(self) -> None:
        """Close the connections."""
        self._endpoint.close()

    def _request(self, prompt: Prompt, config: GenerationConfig, times: Counter[str]) -> Request:
        if not prompt or not isinstance(prompt[0], Message):
            asked: dict[str, Any] = {"prompt": list(cast(Sequence[int], prompt)), "return_token_ids": True}
            logprobs: dict[str, Any] = {"logprobs": 1}
        else:
            asked = {"messages": [message.as_dict() for message in cast(Sequence[Message], prompt)]}
            logprobs = {"logprobs": True}
        name, sampled = digest_of(asked), config.method is Method.sampled
        number, times[name] = times[name], times[name] + 1
        drawn = int(digest_of([config.seed, name, number])[:16], 16) % _SEEDS
        body = request_body(asked, self._config, config, seed=drawn if sampled else 0) | (
            logprobs if config.log_probabilities else {}
        )
        body |= self._also_sent
        return Request(body=body, candidate=number if sampled else 0)

    def _ask(self, requests: Sequence[Request], description: str) -> list[Completion]:
        usage = self.client.usage
        before = usage.gave_up - usage.gave_up_empty
        answers = self.client.ask(requests, total=len(requests), description=description)
        if self._goes_on and usage.answered:
            why = f"no answer after {self._config.attempts} attempts"
            return [answer or Completion(text=why, finish=Finish.unanswered) for answer in answers]
        if usage.gave_up - usage.gave_up_empty > before:
            raise DataError(
                f"{answers.count(None)} of {len(requests)} requests to the {self._name} have no answer after "
                f"{self._config.attempts} attempts each. Start again when {self._config.url} works: {self.client.kept}."
            )
        empty = Completion(text=f"empty after {self._config.attempts} attempts", finish=Finish.refused)
        return [answer or empty for answer in answers]

    def _require_reported(self, completion: Completion, config: GenerationConfig, prompt: Prompt) -> None:
        if completion.finish in (Finish.refused, Finish.withheld, Finish.unanswered):
            return
        if config.log_probabilities and completion.log_probabilities is None:
            self._lacks("log-probabilities (logprobs)")
        if prompt and not isinstance(prompt[0], Message) and completion.token_ids is None:
            self._lacks("the token ids of completions (return_token_ids)")
        tokens, values = completion.token_ids, completion.log_probabilities
        if tokens is not None and values is not None and len(tokens) != len(values):
            self._lacks(f"one log-probability a token, but {len(values)} of {len(tokens)} tokens")

    def _lacks(self, what: str) -> NoReturn:
        raise UnsupportedError(
            f"the {self._name} at {self._config.url} does not report {what}. Use a server that does, such as vLLM, or "
            "the transformers engine."
        )


def require_supported(config: GenerationConfig) -> None:
    """Refuse what no request of the protocol asks for.

    Raises:
        UnsupportedError: If beams are asked for.
    """
    if config.method in BEAM_METHODS:
        raise UnsupportedError(
            f"a server cannot generate by {config.method}: the OpenAI protocol has no beams. Take greedy or sampled, "
            "or let a checkpoint answer in this process (the transformers engine, --model)."
        )


def request_body(
    asked: Mapping[str, Any], endpoint: EndpointConfig, config: GenerationConfig, *, seed: int
) -> dict[str, Any]:
    """Return the body of a request for one completion; ``asked`` has the messages or the prompt."""
    body: dict[str, Any] = {
        "model": endpoint.model,
        **asked,
        "temperature": config.temperature if config.method is Method.sampled else 0.0,
        "top_p": config.top_p,
    }
    if config.max_new_tokens is not None:
        body[endpoint.token_limit_field] = config.max_new_tokens
    if config.stop:
        body["stop"] = list(config.stop)
    if endpoint.template_arguments and "messages" in asked:
        body["chat_template_kwargs"] = dict(endpoint.template_arguments)
    return body | {"seed": seed}
