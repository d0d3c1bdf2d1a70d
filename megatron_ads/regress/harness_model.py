"""An engine as lm-eval asks it: how probable a continuation is, and what is written behind a prompt.

Every answer is in the journal as soon as it is there, found by the tokens it was asked with; what an earlier run got is
not asked again. Choices are judged behind plain text. Where answers are written, a model with a chat template is spoken
to by it, may reason first, and ends by itself: lm-eval gets what comes behind the reasoning.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM

from megatron_ads.config.generation import GenerationConfig
from megatron_ads.data.chat import ChatTokenizer, opened_by, render_prompt
from megatron_ads.errors import DataError
from megatron_ads.inference.engine import Completion, Engine, Finish, UnsupportedError
from megatron_ads.journal import Journal, digest_of
from megatron_ads.progress import Progress
from megatron_ads.rows import Message, Role
from megatron_ads.tasks.answer_format import CLOSE, OPEN

T = TypeVar("T")
Asked = tuple[tuple[int, ...], tuple[int, ...]]
"""Tokens of a prompt, and of what is said behind it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Speaking:
    """How a model is spoken to."""

    chat: bool
    """Prompts whose answers are written are messages for the chat template."""
    max_new_tokens: int
    """Longest answer, reasoning included."""
    batch_size: int | None
    """Questions of one call of the engine; None: it has a journal and a progress bar of its own."""


class HarnessModel(TemplateLM):  # type: ignore[misc]
    """A model that lm-eval can evaluate."""

    def __init__(self, engine: Engine, tokenizer: ChatTokenizer, journal: Journal, how: Speaking) -> None:
        """Take what answers, its tokenizer, the journal of what it answered before, and how it is spoken to."""
        super().__init__()
        self._engine, self._tokenizer, self._journal, self._how = engine, tokenizer, journal, how
        begin = tokenizer.fast.bos_token_id
        self._begin: tuple[int, ...] = (begin,) if begin in tokenizer.fast("").input_ids else ()
        """What the tokenizer puts in front of a text by itself."""
        self._rendered: dict[str, str] = {}
        self.unfinished: set[str] = set()
        """Prompts whose answer did not end, or never came out of its reasoning."""

    @property
    def eot_token_id(self) -> int:
        return self._tokenizer.end_token_id

    @property
    def prefix_token_id(self) -> int:
        return self._begin[0] if self._begin else self.eot_token_id

    @property
    def tokenizer_name(self) -> str:
        return "the checkpoint's"

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Return the tokens of plain text: what looks like a control token in it is a word like others."""
        begin = () if add_special_tokens is False else self._begin
        return [*begin, *self._tokenizer.encode(self._tokenizer.as_text(string))]

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Return the text of a conversation up to where the assistant answers."""
        messages = [Message(Role(turn["role"]), turn["content"]) for turn in chat_history]
        rendered = render_prompt(messages, self._tokenizer)
        # lm-eval hashes and prints texts, which cannot be done with the marks where this one is encoded in pieces.
        shown = rendered.encode("utf-8", "ignore").decode()
        self._rendered[shown] = rendered
        return shown

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        return list(super().loglikelihood(requests, disable_tqdm=disable_tqdm))

    def loglikelihood_rolling(self, requests: list[Instance]) -> NoReturn:
        raise UnsupportedError("no benchmark of the suite asks for the perplexity of whole texts.")

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        """Return the log-probability of each continuation; whether it is the greedy one is not told by an engine."""
        asked = [(tuple(before), tuple(said)) for _, before, said in requests]
        found = self._answered(asked, "judging choices", self._read, lambda record: float(record["log_probability"]))
        return [(found[one], False) for one in asked]

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Return what comes behind the reasoning of each answer, up to where the task stops it.

        Raises:
            DataError: If a server calls a question impossible: a table without it could not be compared.
        """
        prompts = [request.args[0] for request in requests]
        tokens = [self._prompt_tokens(prompt) for prompt in prompts]
        stops = [() if self._how.chat else tuple(request.args[1].get("until", ())) for request in requests]
        found: dict[tuple[tuple[int, ...], tuple[str, ...]], Completion] = {}
        for stop in dict.fromkeys(stops):
            config = GenerationConfig(max_new_tokens=self._how.max_new_tokens, stop=list(stop))
            asked = [(one, ()) for one, of_one in zip(tokens, stops, strict=True) if of_one == stop]
            written = self._answered(asked, "answering", self._write(config), Completion.from_record, str(config))
            found |= {(one, stop): completion for (one, _), completion in written.items()}
        _require_none_refused(list(found.values()))
        return [
            self._answer(prompt, found[one, stop]) for prompt, one, stop in zip(prompts, tokens, stops, strict=True)
        ]

    def _answered(
        self,
        asked: Iterable[Asked],
        description: str,
        ask: Callable[[Sequence[Asked]], list[dict[str, Any]]],
        read: Callable[[Mapping[str, Any]], T],
        settings: str = "",
    ) -> dict[Asked, T]:
        """Return what the journal has, and ask for the rest, a batch at a time, longest last. Shows a progress bar."""
        size = self._how.batch_size
        keys = {one: digest_of([*map(list, one), settings]) for one in asked}
        if size is None:
            return {one: read(record) for one, record in zip(keys, ask([*keys]), strict=True)}
        before = {one: self._journal.read(key, read) for one, key in keys.items()}
        known = {one: value for one, value in before.items() if value is not None}
        left = sorted((one for one in keys if one not in known), key=lambda one: (len(one[0]) + len(one[1]), one))
        with Progress(len(keys), len(known), description=description, unit="question") as progress:
            for start in range(0, len(left), size):
                batch = left[start : start + size]
                for one, record in zip(batch, ask(batch), strict=True):
                    self._journal.add(keys[one], record)
                    known[one] = read(record)
                progress.update(len(batch))
        return known

    def _read(self, batch: Sequence[Asked]) -> list[dict[str, Any]]:
        found = self._engine.log_probabilities([before for before, _ in batch], [said for _, said in batch])
        return [{"log_probability": sum(of_tokens)} for of_tokens in found]

    def _write(self, config: GenerationConfig) -> Callable[[Sequence[Asked]], list[dict[str, Any]]]:
        def write(batch: Sequence[Asked]) -> list[dict[str, Any]]:
            return [one.as_record() for (one,) in self._engine.generate([prompt for prompt, _ in batch], config)]

        return write

    def _prompt_tokens(self, prompt: str) -> tuple[int, ...]:
        if self._how.chat:
            return tuple(self._tokenizer.encode(self._rendered[prompt]))
        return tuple(self.tok_encode(prompt))

    def _answer(self, prompt: str, said: Completion) -> str:
        """Return what lm-eval reads the answer from."""
        text = (opened_by(prompt) if self._how.chat else "") + said.text
        in_reasoning = OPEN in text and CLOSE not in text
        if in_reasoning or said.finish is not Finish.ended:
            self.unfinished.add(prompt)
        return "" if in_reasoning else text.rpartition(CLOSE)[2]


def _require_none_refused(answers: Sequence[Completion]) -> None:
    if refused := [answer.text for answer in answers if answer.finish is Finish.refused]:
        raise DataError(
            f"the server refuses {len(refused)} of {len(answers)} questions ({refused[0]}). Start it with a longer "
            "context (vLLM: --max-model-len), or leave the benchmark out; what was answered is kept."
        )
