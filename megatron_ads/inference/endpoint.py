"""One request to a server with the OpenAI protocol, sent until it is answered or hopeless.

A request that the server is too busy for (429), fails at (5xx) or does not answer in time is sent again after a pause
that doubles, or that the server asks for, up to a limit. Redirects are not followed: they would carry the key along.
"""

import json
import os
import threading
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import Future
from dataclasses import replace
from http import HTTPStatus
from typing import Any, TypeVar

import httpx2

from megatron_ads.config.generation import EndpointConfig
from megatron_ads.errors import ConfigError, DataError
from megatron_ads.inference.client import Request, Unanswered
from megatron_ads.inference.engine import Completion, Failure, Finish
from megatron_ads.observability.log import get_logger
from megatron_ads.tasks.answer_format import CLOSE, OPEN, whole_characters

logger = get_logger(__name__)
_TRY_AGAIN = frozenset({408, 409, 425, 429})
_HOPELESS = frozenset({301, 302, 303, 307, 308, 401, 403, 404, 405})
"""No request would fare better: the key, the address or the model's name is wrong."""
_NOT_CONNECTED = (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.ProxyError, httpx2.InvalidURL, UnicodeError)
_MAX_ANSWER_BYTES = 32 << 20
_MAX_ERROR_BYTES = 1 << 16
_SHOWN_CHARACTERS = 200
_Number = TypeVar("_Number", int, float)


class _TryAgain(Exception):
    """An attempt failed in a way that another one may not."""

    def __init__(self, failure: Failure, why: str, wait_seconds: float | None = None) -> None:
        super().__init__(why)
        self.failure, self.wait_seconds = failure, wait_seconds


class Endpoint:
    """A server; any number of threads may ask it."""

    state = ""
    """A server does not say what is behind the name of its model."""

    def __init__(self, section: str, config: EndpointConfig) -> None:
        """Prepare to ask; nothing is sent yet.

        Raises:
            ConfigError: If the environment variable that should hold the key is not set, or those of proxies and
                certificates cannot be used.
        """
        assert config.url is not None, "checked with the recipe"
        self._section, self._config = section, config
        self._url = config.url.rstrip("/")
        self._key = _read_key(section, config.api_key_env)
        headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
        try:
            self._http = httpx2.Client(
                headers=headers | ({"Authorization": f"Bearer {self._key}"} if self._key else {}),
                timeout=config.timeout_seconds,
                limits=httpx2.Limits(max_connections=None, max_keepalive_connections=config.concurrency),
                follow_redirects=False,
            )
        except (httpx2.InvalidURL, ImportError, OSError, ValueError) as error:  # ImportError: a SOCKS proxy
            raise ConfigError(
                f"the {section} cannot be asked as the environment says ({error}). Correct or unset HTTP_PROXY, "
                "HTTPS_PROXY, ALL_PROXY, SSL_CERT_FILE or SSL_CERT_DIR."
            ) from None
        self._seconds_apart = 60.0 / config.requests_per_minute if config.requests_per_minute else 0.0
        self._next_start, self._lock = 0.0, threading.Lock()
        self._failed: set[Failure] = set()

    def answer(self, request: Request, stop: threading.Event) -> Completion:
        """Return the server's answer to messages or, where the body has a ``prompt``, to token ids.

        Raises:
            Unanswered: If there is none after all attempts, or ``stop`` was set while waiting for another one.
            ConfigError: If the key, the address or the model's name is wrong.
        """
        url = f"{self._url}/{'completions' if 'prompt' in request.body else 'chat/completions'}"
        data = json.dumps(dict(request.body)).encode()
        started = time.monotonic()
        pause = self._config.first_wait_seconds
        failures: list[Failure] = []
        why = "the run was stopped"
        while len(failures) < self._config.attempts and not stop.is_set():
            self._wait_for_turn(stop)
            try:
                answer = self._ask_once(url, data)
                if request.needs_words and answer.is_empty:
                    raise _TryAgain(Failure.empty_answer, _why_empty(answer))
            except _TryAgain as error:
                failures.append(error.failure)
                why, asked = self._without_key(str(error)), error.wait_seconds
                if error.failure not in self._failed:
                    self._failed.add(error.failure)
                    logger.warning(
                        "the %s: %s (%s). Such attempts are repeated, and counted.", self._section, error.failure, why
                    )
            else:
                return replace(answer, seconds=time.monotonic() - started, failures=tuple(failures))
            if len(failures) < self._config.attempts:
                stop.wait(min(max(pause, asked or 0.0), self._config.longest_wait_seconds))
                pause *= 2
        attempt = f"attempt {len(failures)} of {self._config.attempts}"
        raise Unanswered(f"{url}, {attempt}: {why}.", tuple(failures))

    def _wait_for_turn(self, stop: threading.Event) -> None:
        """Spread the starts of requests over time: return when one more may start."""
        if self._seconds_apart:
            with self._lock:
                now = time.monotonic()
                start = max(now, self._next_start)
                self._next_start = start + self._seconds_apart
            stop.wait(start - now)

    def control(self, name: str, body: Mapping[str, Any], *, seconds: float) -> tuple[int, str]:
        """Send a request of the server's own, which are beside ``/v1``; return its status and what it says.

        Args:
            name: Its path.
            body: JSON values.
            seconds: Longest wait for the whole answer.

        Raises:
            DataError: If the server is not there, or has not answered by then.
        """
        url = f"{self._url.removesuffix('/v1')}/{name}"
        reply: Future[tuple[int, str | None, bytes]] = Future()

        def send() -> None:
            try:
                reply.set_result(self._send(url, json.dumps(dict(body)).encode(), seconds))
            except Exception as error:  # noqa: BLE001  # raised by the thread that waits
                reply.set_exception(error)

        # In a thread of its own: a timeout of httpx2's is one of each read, and none of a name that is looked up.
        threading.Thread(target=send, name=f"control {url}", daemon=True).start()
        try:
            status, _, said = reply.result(timeout=seconds)
        except (TimeoutError, httpx2.TimeoutException):
            raise DataError(f"{url} does not answer in {seconds:g} s. Look into the server's log.") from None
        except (_TryAgain, httpx2.HTTPError, httpx2.InvalidURL, OSError, UnicodeError) as error:
            raise DataError(f"{url} does not answer ({type(error).__name__} {error}). Start the server.") from None
        return status, self._without_key(said.decode(errors="replace"))

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def _ask_once(self, url: str, data: bytes) -> Completion:
        """Send a request and return what comes of it."""
        try:
            status, retry_after, body = self._send(url, data, self._config.timeout_seconds)
        except _NOT_CONNECTED as error:
            raise _TryAgain(Failure.not_connected, str(error) or type(error).__name__) from None
        except (TimeoutError, httpx2.TimeoutException):
            why = f"no answer in {self._config.timeout_seconds:g} s"
            raise _TryAgain(Failure.timed_out, why) from None
        except (httpx2.HTTPError, OSError) as error:
            raise _TryAgain(Failure.broken_connection, f"{type(error).__name__} {error}".strip()) from None
        if status < 300:
            return self._parsed(body)
        text = " ".join(self._without_key(body.decode(errors="replace")).split())
        said = f"HTTP {status}: {text[:_SHOWN_CHARACTERS]}"
        if status in _TRY_AGAIN or status >= 500:
            busy = status == HTTPStatus.TOO_MANY_REQUESTS
            raise _TryAgain(Failure.rate_limited if busy else Failure.server_error, said, _seconds(retry_after))
        if status in _HOPELESS:
            raise ConfigError(
                f"{url} answers {said}. Check {self._section}.url, {self._section}.model = {self._config.model!r} and "
                f"the key in the variable that {self._section}.api_key_env names."
            )
        return Completion(text=said, finish=Finish.refused)

    def _send(self, url: str, data: bytes, seconds: float) -> tuple[int, str | None, bytes]:
        """Return status, Retry-After and body, of an error its beginning; a server that drips is not waited for."""
        deadline = time.monotonic() + seconds
        blocks: list[bytes] = []
        size = 0
        with self._http.stream("POST", url, content=data, timeout=seconds) as response:
            failed = response.status_code >= 300
            try:
                for block in response.iter_raw():
                    blocks.append(block)
                    size += len(block)
                    if time.monotonic() > deadline:
                        raise TimeoutError
                    if failed and size >= _MAX_ERROR_BYTES:
                        break
                    if size > _MAX_ANSWER_BYTES:
                        raise _TryAgain(Failure.no_completion, f"the answer is longer than {_MAX_ANSWER_BYTES:,} bytes")
            except (httpx2.HTTPError, OSError):
                if not failed:  # of an error, the status says enough
                    raise
            return response.status_code, response.headers.get("Retry-After"), b"".join(blocks)

    def _parsed(self, body: bytes) -> Completion:
        try:
            completion = json.loads(body)
            choices = completion["choices"]
            if not choices:
                raise _TryAgain(Failure.no_choice, "the completion has no choice")
            return self._completion(choices[0], completion.get("usage") or {})
        except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError):
            said = self._without_key(body[:_MAX_ERROR_BYTES].decode(errors="replace"))[:_SHOWN_CHARACTERS]
            raise _TryAgain(Failure.no_completion, f"the answer is no completion: {said!r}") from None

    def _completion(self, choice: Mapping[str, Any], usage: Mapping[str, Any]) -> Completion:
        message = choice["message"] if "message" in choice else {"content": choice["text"]}
        withheld = choice.get("finish_reason") == "content_filter" or message.get("refusal")
        ended = Finish.cut_off if choice.get("finish_reason") == "length" else Finish.ended
        text = message.get("content") or message.get("refusal") or ""
        # Of servers with a reasoning parser; the other name is newer vLLM's.
        reasoning = message.get("reasoning_content") or message.get("reasoning")
        if isinstance(reasoning, str) and reasoning:
            text = f"{OPEN}{reasoning}{CLOSE if text or ended is Finish.ended else ''}{text}"
        text = whole_characters(text)
        logprobs, of_prompt = choice.get("logprobs") or {}, choice.get("prompt_logprobs")
        values = logprobs.get("token_logprobs")  # of a completion; a chat completion has ``content``
        if (content := logprobs.get("content")) is not None:
            values = [token["logprob"] for token in content]
        if of_prompt is not None:  # vLLM's; before the first token there is nothing
            of_prompt = [next(iter(entry.values()))["logprob"] for entry in of_prompt[1:] if entry is not None]
        cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")
        return Completion(
            text=self._without_key(text),
            finish=Finish.withheld if withheld else ended,
            token_ids=_tuple_of(int, choice.get("token_ids")),
            log_probabilities=_tuple_of(float, values),
            prompt_log_probabilities=_tuple_of(float, of_prompt),
            prompt_tokens=int(usage.get("prompt_tokens") or 0),
            cached_tokens=None if cached is None else int(cached),
            answer_tokens=int(usage.get("completion_tokens") or 0),
        )

    def _without_key(self, text: str) -> str:
        """Return a text in which the key, should the server repeat it, cannot be read."""
        return text.replace(self._key, "***") if self._key else text


def _read_key(section: str, variable: str | None) -> str | None:
    if variable is None:
        return None
    key = os.environ.get(variable, "").strip()
    if not key:
        raise ConfigError(
            f"{section}.api_key_env names {variable}, which is not set. Set it to the key, or {section}.api_key_env to "
            "null for a server that needs none."
        )
    if not (key.isascii() and key.isprintable()):
        raise ConfigError(
            f"the key in {variable}, which {section}.api_key_env names, holds a line break or a character that no "
            "header can carry. Set it again."
        )
    return key


def _why_empty(answer: Completion) -> str:
    if reasoned := len(answer.text.rpartition(CLOSE)[0].removeprefix(OPEN)):
        return (
            f"the answer is empty: all {reasoned:,} characters are reasoning (reasoning_content). Start the server "
            "without a reasoning parser, or raise max_tokens"
        )
    return "the answer is empty"


def _tuple_of(kind: type[_Number], values: Iterable[Any] | None) -> tuple[_Number, ...] | None:
    return None if values is None else tuple(map(kind, values))


def _seconds(header: str | None) -> float | None:
    """Return what a Retry-After header asks for; a date, which few servers send, counts as nothing."""
    try:
        return max(0.0, float(header)) if header else None
    except ValueError:
        return None
