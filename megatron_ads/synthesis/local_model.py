"""A checkpoint on this machine, of any kind the project knows: as a teacher that answers, and as a judge of perplexity.

Weights are exported, where they are Megatron's, and loaded at the first use, on a GPU where there is one.
"""

import math
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import cached_property
from operator import itemgetter
from pathlib import Path
from typing import Any

from megatron_ads.config.generation import AnsweringConfig
from megatron_ads.config.synthesis import PerplexityConfig
from megatron_ads.data.chat import load_tokenizer, render_prompt, split_text
from megatron_ads.inference.client import Request
from megatron_ads.inference.engine import Completion, Finish
from megatron_ads.inference.model_folder import hugging_face_folder, model_state, tokenizer_folder
from megatron_ads.inference.transformers_engine import TransformersEngine, open_engine
from megatron_ads.journal import Journal, digest_of
from megatron_ads.metrics.text import perplexity
from megatron_ads.progress import Progress
from megatron_ads.rows import ChatRow, Message, Role
from megatron_ads.synthesis.candidates import Candidate
from megatron_ads.synthesis.prompts import answer_of


class _Checkpoint:
    """A checkpoint of which the tokenizer is read at once, and the weights when they are needed."""

    def __init__(self, folder: Path, exports: ExitStack, template_arguments: Mapping[str, Any]) -> None:
        self._folder, self._exports = folder, exports
        self.tokenizer = load_tokenizer(tokenizer_folder(folder), template_arguments)
        self.state = model_state(folder)

    @cached_property
    def engine(self) -> TransformersEngine:
        return open_engine(self._exports.enter_context(hugging_face_folder(self._folder)))


class LocalTeacher:
    """A checkpoint that answers as an endpoint would; equal requests have equal answers on equal machines."""

    def __init__(self, config: AnsweringConfig, exports: ExitStack) -> None:
        """Load the tokenizer; ``exports`` is closed when the model is no longer needed.

        Raises:
            ConversionError: If the folder is no checkpoint.
            DataError: If the folder does not exist or has no tokenizer.
        """
        assert config.model is not None, "checked with the recipe"
        self._config = config
        self._checkpoint = _Checkpoint(Path(config.model), exports, config.template_arguments)
        self.state = self._checkpoint.state
        self._lock = threading.Lock()

    def answer(self, request: Request, stop: threading.Event) -> Completion:
        """Return what the model writes; a prompt that leaves no room for an answer is refused.

        Raises:
            ConversionError: If transformers cannot load the checkpoint.
        """
        messages = [Message(Role(item["role"]), item["content"]) for item in request.body["messages"]]
        tokens = self._checkpoint.tokenizer.encode(render_prompt(messages, self._checkpoint.tokenizer))
        how = self._config.generation(request.body["seed"])
        with self._lock:
            room = min(self._config.max_tokens, self._checkpoint.engine.longest_text - len(tokens))
            if room < 1:
                return Completion(text=f"the prompt takes {len(tokens)} tokens", finish=Finish.refused)
            started = time.monotonic()
            ((written,),) = self._checkpoint.engine.generate([tokens], replace(how, max_new_tokens=room))
        return replace(written, token_ids=None, seconds=time.monotonic() - started)


class LocalScorer:
    """PPL of answers; numbers are kept in a journal, so that a resumed run does not compute them again."""

    def __init__(self, config: PerplexityConfig, journal: Journal, exports: ExitStack) -> None:
        """Load the tokenizer; ``exports`` is closed when the model is no longer needed.

        Raises:
            ConversionError: If the folder is no checkpoint.
            DataError: If the folder does not exist or has no tokenizer.
        """
        assert config.model is not None, "checked by the caller"
        self._checkpoint = _Checkpoint(Path(config.model), exports, config.template_arguments)
        self._journal, self._batch_size = journal, config.batch_size

    def perplexities(self, candidates: Sequence[Candidate]) -> list[float | None]:
        """Return PPL(answer | prompt, reasoning) of each; None if they are longer than the model's positions.

        Raises:
            ConversionError: If transformers cannot load the checkpoint.
        """
        texts = [self._text(candidate) for candidate in candidates]
        keys = [digest_of({"model": self._checkpoint.state, "text": text}) for text in texts]
        missing = {key: text for key, text in zip(keys, texts, strict=True) if key not in self._journal.records}
        if missing:
            self._measure(missing)
        return [self._journal.read(key, itemgetter("perplexity")) for key in keys]

    def _text(self, candidate: Candidate) -> tuple[str, str]:
        """Return prompt with reasoning, and the answer: apart, so that no token holds the end of one and the other."""
        row, tokenizer = candidate.row, self._checkpoint.tokenizer
        reasoned = Message(Role.assistant, candidate.target)
        prompt, target = split_text(ChatRow(row.id, row.task, (*row.prompt, reasoned)), tokenizer)
        answer = tokenizer.as_text(tokenizer.without_end(answer_of(row)))
        return prompt + target.removesuffix(answer), answer

    def _measure(self, texts: Mapping[str, tuple[str, str]]) -> None:
        """Record the perplexity of each text under its key."""
        encode, longest = self._checkpoint.tokenizer.encode, self._checkpoint.engine.longest_text
        tokens = {key: (encode(before), encode(answer)) for key, (before, answer) in texts.items()}
        readable = [key for key, parts in tokens.items() if sum(map(len, parts)) <= longest]
        readable.sort(key=lambda key: len(tokens[key][0]))  # texts of like length together: little is padded
        for key in tokens.keys() - set(readable):
            self._journal.add(key, {"perplexity": None})
        with Progress(len(readable), description="measuring perplexity", unit="candidate") as progress:
            for start in range(0, len(readable), self._batch_size):
                keys = readable[start : start + self._batch_size]
                befores, answers = zip(*(tokens[key] for key in keys), strict=True)
                found = self._checkpoint.engine.log_probabilities(befores, answers)
                for key, said in zip(keys, found, strict=True):
                    self._journal.add(key, {"perplexity": perplexity(-math.fsum(said), len(said))})
                progress.update(len(keys))
