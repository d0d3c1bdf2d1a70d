"""Turn a conversation into tokens: loss on the target only, reasoning and end token included.

The tokenizer is that of a checkpoint folder, exactly as its ``tokenizer.json`` describes it. The prompt is rendered by
the checkpoint's own chat template up to where the assistant speaks. The target is appended as it stands, not rendered:
templates of reasoning models drop ``<think>...</think>`` from assistant messages. Some of them open ``<think>`` in the
prompt already; then the target does not repeat it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_ads.errors import DataError
from megatron_ads.rows import ChatRow, Message, Role, TokenizedRow

THINK = "<think>"


@dataclass(frozen=True, slots=True)
class ChatTokenizer:
    """A tokenizer and the two things a conversation needs of it."""

    fast: Any
    """``transformers.PreTrainedTokenizerFast``."""
    end_token_id: int
    """Ends every assistant message."""

    @property
    def size(self) -> int:
        """One more than the highest token id."""
        vocabulary: dict[str, int] = self.fast.get_vocab()
        return max(vocabulary.values()) + 1

    def encode(self, text: str) -> list[int]:
        """Return the tokens of ``text``, with no begin or end token added."""
        # The tokenizer underneath: the wrapper takes twice as long, and every process encodes every row.
        ids: list[int] = self.fast.backend_tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, tokens: list[int]) -> str:
        """Return the text of ``tokens``, special tokens left out."""
        text: str = self.fast.decode(tokens, skip_special_tokens=True)
        return text


def load_tokenizer(folder: Path) -> ChatTokenizer:
    """Load ``tokenizer.json`` and ``tokenizer_config.json``; code in the folder is never run.

    Raises:
        DataError: If the folder does not exist, has no ``tokenizer.json``, or names no end token.
    """
    from transformers import PreTrainedTokenizerFast  # takes seconds

    if not folder.is_dir():
        raise DataError(f"{folder} does not exist. Give a checkpoint folder with a tokenizer.")
    if not (folder / "tokenizer.json").exists():
        raise DataError(
            f"{folder} holds no tokenizer.json. Copy it from the checkpoint's repository; a tokenizer that is code "
            "(tokenization_*.py) must be converted to tokenizer.json first."
        )
    # Not AutoTokenizer: for some class names it rebuilds the tokenizer from its vocabulary, with another splitting.
    try:
        fast = PreTrainedTokenizerFast.from_pretrained(folder)
    except Exception as error:  # noqa: BLE001 - tokenizers has no class of its own for what it refuses
        raise DataError(f"{folder}: the tokenizer cannot be loaded ({error}). Copy its files again.") from None
    if fast.eos_token_id is None:
        raise DataError(f"{folder}/tokenizer_config.json names no eos_token; nothing would end an answer. Add it.")
    return ChatTokenizer(fast=fast, end_token_id=fast.eos_token_id)


def tokenize_row(row: ChatRow, tokenizer: ChatTokenizer) -> TokenizedRow:
    """Return prompt, target and end token, with the row's weight on target and end token.

    Raises:
        DataError: If the chat template does not take this conversation.
    """
    prompt, target = split_text(row, tokenizer)
    prompt_tokens = tokenizer.encode(prompt)
    target_tokens = [*tokenizer.encode(target), tokenizer.end_token_id]
    weights = np.zeros(len(prompt_tokens) + len(target_tokens), dtype=np.float32)
    weights[len(prompt_tokens) :] = row.weight
    tokens = np.array(prompt_tokens + target_tokens, dtype=np.int32)
    return TokenizedRow(id=row.id, task=row.task, tokens=tokens, loss_weights=weights)


def split_text(row: ChatRow, tokenizer: ChatTokenizer) -> tuple[str, str]:
    """Return the prompt as the model reads it, and the target as the model should go on."""
    try:
        prompt = render_prompt(row.prompt, tokenizer)
    except DataError as error:
        raise DataError(f"Row {row.id!r}: {error}") from None
    target = row.target
    if prompt.rstrip().endswith(THINK):
        target = target.lstrip().removeprefix(THINK).lstrip("\n")
    return prompt, target


def render_prompt(messages: Sequence[Message], tokenizer: ChatTokenizer) -> str:
    """Return the text of a conversation up to where the assistant answers.

    Raises:
        DataError: If the checkpoint's chat template refuses these messages.
    """
    from jinja2.exceptions import TemplateError

    if not tokenizer.fast.chat_template:  # a base model: one paragraph a message
        turns = [f"{message.role}: {message.content}" for message in messages]
        return "\n\n".join([*turns, f"{Role.assistant}: "])
    try:
        text: str = tokenizer.fast.apply_chat_template(
            [message.as_dict() for message in messages], tokenize=False, add_generation_prompt=True
        )
    except TemplateError as error:
        raise DataError(f"the checkpoint's chat template refuses the conversation: {error}") from None
    return text
