"""The engine in this process: a Hugging Face checkpoint run by transformers, on whatever device there is.

This is deliberately not the trainer's own model: what generates is what a user of the exported folder gets. How to
generate is said in ``GenerationConfig`` and nowhere else: a checkpoint's generation_config.json plays no part.

Shape suffixes: R = running rows, V = vocabulary.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
import transformers
from torch import Tensor

from megatron_ads.config.generation import BEAM_METHODS, GenerationConfig, Method
from megatron_ads.data.chat import ChatTokenizer, load_tokenizer, render_prompt
from megatron_ads.errors import ConfigError
from megatron_ads.inference.beam_rules import AnyToken, Node, Rules, only_valid
from megatron_ads.inference.beam_search import RowSearch, search_beams
from megatron_ads.inference.engine import Completion, Finish, Prompt, UnsupportedError
from megatron_ads.inference.language_model import RunningRows, load_model, log_probabilities
from megatron_ads.rows import Message

if TYPE_CHECKING:
    from megatron_ads.inference.weight_update import WeightUpdate

_HALF_A_CHARACTER = "\N{REPLACEMENT CHARACTER}"
"""What tokens that do not make a whole character are decoded to."""


@dataclass(slots=True)
class _Written:
    """What has been generated behind one prompt so far."""

    tokens: list[int] = field(default_factory=list)
    """Without the end token."""
    log_probabilities: list[float] = field(default_factory=list)
    ended: bool = False
    """With the end token."""
    stopped: bool = False
    """Where a text of ``GenerationConfig.stop`` came."""
    node: Node | None = None
    """Where that is among the valid names; None: anything may be said."""

    def add(self, token: int) -> None:
        """Go on with a token that is not the end token."""
        self.tokens.append(token)
        self.node = self.node and self.node.child(token)


class TransformersEngine:
    """A loaded checkpoint. The prompts of one call are one batch, in which each prompt's draws depend on the others."""

    def __init__(
        self, model: Any, *, end_token: int, pad_token: int | None = None, tokenizer: ChatTokenizer | None = None
    ) -> None:
        """Take a loaded model.

        Args:
            model: From :func:`load_model`.
            end_token: Generation of a prompt stops here.
            pad_token: Fills shorter prompts from the left; it is masked and never seen. None: the end token.
            tokenizer: Renders conversations and decodes; without it prompts are token ids, and texts are empty.
        """
        self._model, self._tokenizer = model, tokenizer
        self._end_token = end_token
        self._pad_token = end_token if pad_token is None else pad_token
        self._update: WeightUpdate | None = None

    @property
    def longest_text(self) -> int:
        """How many tokens of prompt and completion the model has positions for."""
        return int(getattr(self._model.config, "max_position_embeddings", 2**31))

    @property
    def vocabulary_size(self) -> int:
        """One more than the highest token id that the model can read."""
        return int(self._model.get_input_embeddings().num_embeddings)

    def generate(
        self, prompts: Sequence[Prompt], config: GenerationConfig, *, rules: Sequence[Rules] | None = None
    ) -> list[list[Completion]]:
        """Return the samples or beams of every prompt; beams always have their log-probabilities.

        Rules hold for every method: the most probable, or the drawn, of the tokens that they leave is written.

        Raises:
            ConfigError: If constrained beams have no rules.
            DataError: If the chat template refuses a conversation.
        """
        if not prompts:
            return []
        tokens = [self.tokens_of(prompt) for prompt in prompts]
        limit = config.max_new_tokens or max(1, self.longest_text - max(map(len, tokens)))
        if config.method in BEAM_METHODS:
            return self._beams(tokens, config, limit, rules)
        samples = config.samples if config.method is Method.sampled else 1
        written = self._continue(tokens, samples, config, limit, rules)
        return [
            [
                self._completion(one.tokens, one.ended, len(prompt), one.log_probabilities, stop=config.stop)
                for one in written[number * samples : (number + 1) * samples]
            ]
            for number, prompt in enumerate(tokens)
        ]

    def log_probabilities(
        self, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]
    ) -> list[list[float]]:
        """Return the log-probability of every token of every answer; the texts of one call are one batch."""
        return log_probabilities(self._model, prompts, answers, pad_token=self._pad_token)

    def update_weights(self, weights: Iterator[tuple[str, Tensor]]) -> None:
        """Replace all weights in place; refused by versions of transformers that store them in an unknown way."""
        try:  # it needs parts of transformers that are not its interface, and nothing else here does
            from megatron_ads.inference.weight_update import WeightUpdate
        except ImportError as error:
            raise UnsupportedError(
                f"weights cannot be replaced in a model of transformers {transformers.__version__} ({error}). Install "
                "the version in constraints.txt, or load the new weights from a folder."
            ) from None
        self._update = self._update or WeightUpdate(self._model)
        self._update.replace(weights)

    def close(self) -> None:
        """Let go of the model."""
        self._model = self._update = None

    def tokens_of(self, prompt: Prompt) -> list[int]:
        """Return a prompt's token ids."""
        if prompt and isinstance(prompt[0], Message):
            assert self._tokenizer is not None, "conversations need a tokenizer"
            return self._tokenizer.encode(render_prompt(cast(Sequence[Message], prompt), self._tokenizer))
        return list(cast(Sequence[int], prompt))

    @torch.inference_mode()
    def _continue(
        self,
        prompts: Sequence[Sequence[int]],
        samples: int,
        config: GenerationConfig,
        limit: int,
        rules: Sequence[Rules] | None,
    ) -> list[_Written]:
        """Continue every prompt ``samples`` times, greedily or sampled, until it ends or has ``limit`` tokens."""
        chance = torch.Generator(self._model.device).manual_seed(config.seed % 2**63)
        rows = RunningRows(self._model, prompts, self._pad_token, samples=samples)
        starts = [of_row.start for of_row in rules] if rules else [None] * len(prompts)
        written = [_Written(node=start) for start in starts for _ in range(samples)]
        running = list(range(len(written)))
        for step in range(limit):
            logits_RV = only_valid(rows.logits_RV, [written[number].node for number in running])
            chosen_R = next_tokens(logits_RV, config, chance)
            chosen = chosen_R.tolist()
            for number, token in zip(running, chosen, strict=True):
                written[number].ended = token == self._end_token
                if not written[number].ended:
                    written[number].add(token)
                    written[number].stopped = self._has_stopped(written[number].tokens, config.stop)
            if config.log_probabilities:
                found_R = rows.logits_RV.log_softmax(-1).gather(1, chosen_R[:, None])[:, 0]
                for number, value in zip(running, found_R.tolist(), strict=True):
                    written[number].log_probabilities.append(value)
            going_on = [
                place for place, number in enumerate(running) if not (written[number].ended or written[number].stopped)
            ]
            running = [running[place] for place in going_on]
            if not running or step == limit - 1:
                break
            rows.go_on(going_on, [chosen[place] for place in going_on])
        return written

    def _has_stopped(self, tokens: Sequence[int], stop: Sequence[str]) -> bool:
        if not stop or self._tokenizer is None:
            return False
        # A token can be part of a character only, hence some more than the longest text can have.
        end = self._tokenizer.decode(list(tokens[-4 - max(map(len, stop)) :]))
        return any(text in end for text in stop)

    def _beams(
        self, prompts: Sequence[Sequence[int]], config: GenerationConfig, limit: int, rules: Sequence[Rules] | None
    ) -> list[list[Completion]]:
        if config.method is Method.constrained_beam and rules is None:
            raise ConfigError("constrained-beam needs rules: what each completion may say. Give them, or take beam.")
        searches = [
            RowSearch(
                rules[row] if rules else AnyToken(config.beams),
                beams=config.beams,
                limit=limit + 1,
                end_token=self._end_token,
                length=config.length,
            )
            for row in range(len(prompts))
        ]
        found = search_beams(RunningRows(self._model, prompts, self._pad_token), searches)
        return [
            [
                self._completion(beam.tokens, beam.ended, len(prompt), beam.log_probabilities, beam.score)
                for beam in beams
            ]
            for beams, prompt in zip(found, prompts, strict=True)
        ]

    def _completion(
        self,
        said: Sequence[int],
        ended: bool,
        prompt_tokens: int,
        log_probabilities: Sequence[float],
        score: float | None = None,
        stop: Sequence[str] = (),
    ) -> Completion:
        """Return what was said, without the end token, or what it was stopped at, as a completion."""
        tokens = (*said, self._end_token) if ended else tuple(said)
        whole = self._tokenizer.decode(list(said)) if self._tokenizer else ""
        text = before_any(whole, stop)
        ended_here = ended or text != whole
        if not ended_here:
            text = text.rstrip(_HALF_A_CHARACTER)  # at the limit; vLLM leaves it out as well
        return Completion(
            text=text,
            finish=Finish.ended if ended_here else Finish.cut_off,
            token_ids=tokens,
            log_probabilities=tuple(log_probabilities) or None,
            score=score,
            prompt_tokens=prompt_tokens,
            answer_tokens=len(tokens),
        )


def open_engine(folder: Path, *, dtype: torch.dtype | None = None) -> TransformersEngine:
    """Load a Hugging Face folder with its tokenizer; folder and dtype as of :func:`load_model`.

    Raises:
        ConversionError: If transformers cannot load the folder, or would have to make up weights.
        DataError: If it does not exist, or has no tokenizer.
    """
    tokenizer = load_tokenizer(folder)
    return TransformersEngine(load_model(folder, dtype), end_token=tokenizer.end_token_id, tokenizer=tokenizer)


def before_any(text: str, stop: Sequence[str]) -> str:
    """Return ``text`` up to where the first of some texts begins."""
    places = [place for one in stop if (place := text.find(one)) >= 0]
    return text[: min(places)] if places else text


def next_tokens(logits_RV: Tensor, config: GenerationConfig, chance: torch.Generator) -> Tensor:
    """Return the next token of every row, (R,): the most probable one, or one drawn."""
    if config.method is not Method.sampled:
        return logits_RV.argmax(-1)
    shares_RV = (logits_RV / config.temperature).softmax(-1)
    if config.top_p >= 1:
        return shares_RV.multinomial(1, generator=chance)[:, 0]
    shares_RV, tokens_RV = shares_RV.sort(descending=True)
    # The most probable token stays whatever top_p is: before it there is nothing.
    before_RV = shares_RV.cumsum(-1) - shares_RV
    places_R1 = shares_RV.masked_fill(before_RV >= config.top_p, 0.0).multinomial(1, generator=chance)
    return tokens_RV.gather(1, places_R1)[:, 0]
