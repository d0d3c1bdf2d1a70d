"""Load the tokenizer of a checkpoint folder, exactly as its ``tokenizer.json`` describes it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ads.errors import DataError


@dataclass(frozen=True, slots=True)
class ChatTokenizer:
    """A tokenizer and the two things a conversation needs of it."""

    fast: Any
    """``transformers.PreTrainedTokenizerFast``."""
    end_token_id: int
    """Ends every assistant message."""

    @property
    def has_chat_template(self) -> bool:
        """Whether the checkpoint says how a conversation is written."""
        return bool(self.fast.chat_template)

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
    fast = PreTrainedTokenizerFast.from_pretrained(folder)
    if fast.eos_token_id is None:
        raise DataError(f"{folder}/tokenizer_config.json names no eos_token; nothing would end an answer. Add it.")
    return ChatTokenizer(fast=fast, end_token_id=fast.eos_token_id)
