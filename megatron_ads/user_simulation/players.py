"""A language model that plays a part: conversations in, texts out, through the journal, so that none is asked twice.

What it says is text of a stranger: it is read by ``model_answers`` or not at all.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ads.config.generation import GenerationConfig, ModelKind
from megatron_ads.config.user_simulation import PlayerConfig
from megatron_ads.data.chat import ChatTokenizer, load_tokenizer, render_prompt
from megatron_ads.errors import require
from megatron_ads.inference.engine import Completion, Engine, Finish
from megatron_ads.inference.journalled_engine import JournalledEngine
from megatron_ads.inference.openai_engine import OpenAIEngine
from megatron_ads.journal import Journal
from megatron_ads.rows import Message


@dataclass(slots=True)
class Player:
    """One model, and what asking it took; requests of earlier runs, found in the journal, are counted as well."""

    engine: Engine
    how: GenerationConfig
    tokenizer: ChatTokenizer | None = None
    """None: conversations are sent as they are."""
    longest_prompt: int | None = None
    """Tokens beyond which nothing is asked."""
    asked: int = 0
    prompt_tokens: int = 0
    answer_tokens: int = 0

    def say(self, conversations: Sequence[Sequence[Message]]) -> list[Completion]:
        """Return what the model says next in each conversation; one too long has a refused completion.

        Raises:
            ConfigError: If no request can succeed, such as with a wrong key.
            DataError: If the model stopped answering; what it has answered is kept.
        """
        if self.tokenizer is None:
            said = [one for (one,) in self.engine.generate(list(conversations), self.how)]
        else:
            said = self._say_by_tokens(conversations, self.tokenizer)
        self.asked += len(said)
        self.prompt_tokens += sum(one.prompt_tokens for one in said)
        self.answer_tokens += sum(one.answer_tokens for one in said)
        return said

    def _say_by_tokens(self, conversations: Sequence[Sequence[Message]], tokenizer: ChatTokenizer) -> list[Completion]:
        prompts = [tokenizer.encode(render_prompt(messages, tokenizer)) for messages in conversations]
        fits = [self.longest_prompt is None or len(prompt) <= self.longest_prompt for prompt in prompts]
        asked = [prompt for prompt, fit in zip(prompts, fits, strict=True) if fit]
        found = iter(self.engine.generate(asked, self.how)) if asked else iter(())
        too_long = Completion(text="the prompt is too long", finish=Finish.refused)
        return [next(found)[0] if fit else too_long for fit in fits]

    def usage(self) -> dict[str, Any]:
        """Return what asking took, as JSON values."""
        return {"asked": self.asked, "prompt_tokens": self.prompt_tokens, "answer_tokens": self.answer_tokens}


@contextmanager
def open_player(config: PlayerConfig, out: Path, *, seed: int) -> Iterator[Player | None]:
    """Yield the model of a recipe, its journal in ``out``; None where the recipe names none.

    Raises:
        ConfigError: If a key is missing, or an answer may be as long as all that the model can read.
        ConversionError: If a folder is no checkpoint.
        DataError: If a folder has no tokenizer, or another process has the journal open.
    """
    if config.model is None:
        yield None
        return
    how = config.generation(seed)
    with ExitStack() as stack:
        if config.kind is ModelKind.endpoint:
            journal = stack.enter_context(Journal(out / "journal.jsonl"))
            yield Player(stack.enter_context(closing(OpenAIEngine("model", config, journal, goes_on=True))), how)
            return
        from megatron_ads.inference.model_folder import hugging_face_folder, model_state  # imports torch
        from megatron_ads.inference.transformers_engine import open_engine

        # A journal of this process's engine does not know the model: each has a file of its own.
        journal = stack.enter_context(Journal(out / f"journal-{model_state(Path(config.model))[:16]}.jsonl"))
        folder = stack.enter_context(hugging_face_folder(Path(config.model)))
        engine = stack.enter_context(closing(open_engine(folder)))
        longest = engine.longest_text - config.max_tokens
        require(
            longest > 0,
            f"model.max_tokens is {config.max_tokens}, and {config.model} reads {engine.longest_text} tokens, the "
            "answer's among them. Lower it.",
        )
        tokenizer = load_tokenizer(folder, config.template_arguments)
        yield Player(JournalledEngine(engine, journal, batch_size=config.batch_size), how, tokenizer, longest)
