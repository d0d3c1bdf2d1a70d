"""A model behind the OpenAI chat completions protocol: vLLM, SGLang, `transformers serve`, or a hosted service.

A request that the server is too busy for (429), fails at (5xx) or does not answer in time is sent again after a pause
that doubles, or that the server asks for, up to a limit. Redirects are not followed: they would carry the key along.
"""

import json
import os
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import replace
from http import HTTPStatus
from http.client import HTTPException, HTTPResponse, IncompleteRead
from typing import Any

from megatron_ads.config.engine import AnsweringConfig
from megatron_ads.errors import ConfigError
from megatron_ads.inference.client import Answer, Failure, Finish, Request, Unanswered
from megatron_ads.observability.log import get_logger

logger = get_logger(__name__)
_TRY_AGAIN = frozenset({408, 409, 425, 429})
_HOPELESS = frozenset({301, 302, 303, 307, 308, 401, 403, 404, 405})
"""No request would fare better: the key, the address or the model's name is wrong."""
_LARGEST_ANSWER_BYTES = 32 << 20
_SHOWN_CHARACTERS = 200
_BLOCK_BYTES = 1 << 16


class _TryAgain(Exception):
    """An attempt failed in a way that another one may not."""

    def __init__(self, failure: Failure, why: str, wait_seconds: float | None = None) -> None:
        super().__init__(why)
        self.failure, self.wait_seconds = failure, wait_seconds


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


class Endpoint:
    """A server; any number of threads may ask it."""

    state = ""
    """A server does not say what stands behind the name of its model."""

    def __init__(self, section: str, config: AnsweringConfig) -> None:
        """Prepare to ask; nothing is sent yet.

        Raises:
            ConfigError: If the environment variable that should hold the key is not set.
        """
        assert config.url is not None, "checked with the recipe"
        self._section, self._config = section, config
        self._url = config.url.rstrip("/") + "/chat/completions"
        self._key = _read_key(section, config.api_key_env)
        self._opener = urllib.request.build_opener(_NoRedirects())
        self._starts = _Starts(config.requests_per_minute)
        self._failed: set[Failure] = set()

    def answer(self, request: Request, stop: threading.Event) -> Answer:
        """Return the server's answer.

        Raises:
            Unanswered: If there is none after all attempts, or ``stop`` was set while waiting for another one.
            ConfigError: If the key, the address or the model's name is wrong.
        """
        data = json.dumps(dict(request.body)).encode()
        started = time.monotonic()
        pause = self._config.first_wait_seconds
        failures: list[Failure] = []
        why = "the run was stopped"
        while len(failures) < self._config.attempts and not stop.is_set():
            self._starts.wait(stop)
            try:
                answer = self._ask_once(data)
            except _TryAgain as error:
                failures.append(error.failure)
                why, asked = self._without_key(str(error)), error.wait_seconds
                self._tell_once(error.failure, why)
            else:
                return replace(answer, seconds=time.monotonic() - started, failures=tuple(failures))
            if len(failures) < self._config.attempts:
                stop.wait(min(max(pause, asked or 0.0), self._config.longest_wait_seconds))
                pause *= 2
        attempt = f"attempt {len(failures)} of {self._config.attempts}"
        raise Unanswered(f"{self._url}, {attempt}: {why}.", tuple(failures))

    def _tell_once(self, failure: Failure, why: str) -> None:
        if failure not in self._failed:
            self._failed.add(failure)
            logger.warning("the %s: %s (%s). Such attempts are repeated, and counted.", self._section, failure, why)

    def _ask_once(self, data: bytes) -> Answer:
        """Send a request and return what comes of it.

        Raises:
            _TryAgain: If another attempt may fare better.
            ConfigError: If no request can succeed.
        """
        request = urllib.request.Request(self._url, data=data, headers={"Content-Type": "application/json"})
        if self._key is not None:
            request.add_header("Authorization", f"Bearer {self._key}")
        deadline = time.monotonic() + self._config.timeout_seconds
        try:
            with self._opener.open(request, timeout=self._config.timeout_seconds) as response:
                return self._parsed(_read(response, deadline))
        except urllib.error.HTTPError as error:
            with error:
                return self._refused(error)
        except TimeoutError:
            raise self._timed_out() from None
        except urllib.error.URLError as error:
            if isinstance(error.reason, TimeoutError):
                raise self._timed_out() from None
            raise _TryAgain(Failure.not_connected, str(error.reason)) from None
        except UnicodeError as error:  # of a host that cannot be written as the name system wants it
            raise _TryAgain(Failure.not_connected, str(error)) from None
        except (OSError, HTTPException) as error:
            raise _TryAgain(Failure.broken_connection, f"{type(error).__name__} {error}".strip()) from None

    def _timed_out(self) -> _TryAgain:
        return _TryAgain(Failure.timed_out, f"no answer in {self._config.timeout_seconds:g} s")

    def _refused(self, error: urllib.error.HTTPError) -> Answer:
        """Return the answer to a request that the server calls impossible.

        Raises:
            _TryAgain: If it may answer later.
            ConfigError: If no request can succeed.
        """
        try:
            text = error.read(_BLOCK_BYTES).decode(errors="replace")
        except (OSError, HTTPException):
            text = ""
        said = f"HTTP {error.code}: {' '.join(self._without_key(text).split())[:_SHOWN_CHARACTERS]}"
        if error.code in _TRY_AGAIN or error.code >= 500:
            failure = Failure.rate_limited if error.code == HTTPStatus.TOO_MANY_REQUESTS else Failure.server_error
            raise _TryAgain(failure, said, _seconds(error.headers.get("Retry-After")))
        if error.code in _HOPELESS:
            raise ConfigError(
                f"{self._url} answers {said}. Check {self._section}.url, {self._section}.model = "
                f"{self._config.model!r} and the key in the variable that {self._section}.api_key_env names."
            )
        return Answer(text=said, finish=Finish.refused)

    def _parsed(self, body: bytes) -> Answer:
        try:
            completion = json.loads(body)
            choices = completion["choices"]
            if not choices:
                raise _TryAgain(Failure.no_choice, "the completion has no choice")
            message = choices[0]["message"]
            usage = completion.get("usage") or {}
            return Answer(
                text=self._without_key(_whole_characters(message.get("content") or message.get("refusal") or "")),
                finish=_finish(choices[0].get("finish_reason"), message),
                prompt_tokens=int(usage.get("prompt_tokens") or 0),
                answer_tokens=int(usage.get("completion_tokens") or 0),
            )
        except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError):
            said = self._without_key(body[:_SHOWN_CHARACTERS].decode(errors="replace"))
            raise _TryAgain(Failure.no_completion, f"the answer is no chat completion: {said!r}") from None

    def _without_key(self, text: str) -> str:
        """Return a text in which the key, should the server repeat it, cannot be read."""
        return text.replace(self._key, "***") if self._key else text


class _Starts:
    """Spreads the starts of requests over time."""

    def __init__(self, per_minute: float | None) -> None:
        self._apart = 60.0 / per_minute if per_minute else 0.0
        self._next = 0.0
        self._lock = threading.Lock()

    def wait(self, stop: threading.Event) -> None:
        """Return when one more request may start."""
        if not self._apart:
            return
        with self._lock:
            now = time.monotonic()
            start = max(now, self._next)
            self._next = start + self._apart
        stop.wait(start - now)


def _read(response: HTTPResponse, deadline: float) -> bytes:
    """Return the body; a server that sends it drop by drop does not outlast the deadline."""
    blocks: list[bytes] = []
    size = 0
    while block := response.read1(_BLOCK_BYTES):
        blocks.append(block)
        size += len(block)
        if time.monotonic() > deadline:
            raise TimeoutError
        if size > _LARGEST_ANSWER_BYTES:
            raise _TryAgain(Failure.no_completion, f"the answer is longer than {_LARGEST_ANSWER_BYTES:,} bytes")
    if response.length:  # what is left of the announced length; read1 does not mind
        raise IncompleteRead(b"", response.length)
    return b"".join(blocks)


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


def _finish(reason: object, message: Mapping[str, Any]) -> Finish:
    if reason == "content_filter" or message.get("refusal"):
        return Finish.withheld
    return Finish.cut_off if reason == "length" else Finish.ended


def _whole_characters(text: str) -> str:
    """Return a text that can be written: half a surrogate pair, which JSON can hold, becomes U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _seconds(header: str | None) -> float | None:
    """Return what a Retry-After header asks for; a date, which few servers send, counts as nothing."""
    try:
        return max(0.0, float(header)) if header else None
    except ValueError:
        return None
