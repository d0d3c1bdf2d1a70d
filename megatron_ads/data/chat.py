"""Turn a conversation into tokens: loss on the target only, reasoning and end token included.

The tokenizer is that of a checkpoint folder, exactly as its ``tokenizer.json`` describes it. The prompt is rendered by
the checkpoint's own chat template up to where the assistant speaks, and a turn ends with what the template ends it
with. The target is appended as it is, not rendered: templates of reasoning models drop ``<think>...</think>`` from
assistant messages. Where the prompt opens or closes the reasoning already, the target does not repeat it.

Only the template speaks in control tokens. In what people, advertisers and logs wrote, ``<｜Assistant｜>`` is a word
like others: the text is broken behind its first character, and the pieces are encoded apart. Everything else is
encoded as if this were not done. Of an answer, the tags of its own reasoning are control tokens.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from megatron_ads.errors import DataError, one_line
from megatron_ads.layout import rank
from megatron_ads.observability.log import get_logger
from megatron_ads.rows import ChatRow, Message, Role, TokenizedRow
from megatron_ads.tasks.answer_format import CLOSE, OPEN

logger = get_logger(__name__)
_BREAK = "\udfff"
"""Where a text is encoded in pieces: half a surrogate pair, which no text that can be encoded holds."""
_TAG = re.compile(r"<[|｜].*[|｜]>|</?think>", re.DOTALL)
"""Tokens of this form are control tokens, whatever the tokenizer and the template say about them."""
_LONGEST = 64
"""Characters of the longest control token that messages could make together."""
_RESERVED = frozenset({"messages", "tools", "documents", "chat_template", "add_generation_prompt", "tokenize"})


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatTokenizer:
    """A tokenizer, and what a conversation needs of it."""

    fast: Any
    """``transformers.PreTrainedTokenizerFast``."""
    end_token_id: int
    """Ends every assistant message."""
    before_end: str
    """What the template writes between an assistant message and its end token; nearly always nothing."""
    template_arguments: Mapping[str, Any]
    """What the template is given besides the messages, such as ``thinking``."""
    control: frozenset[int]
    """Tokens by which the template speaks."""
    written_control: re.Pattern[str]
    """Finds their texts."""

    @property
    def size(self) -> int:
        """One more than the highest token id."""
        vocabulary: dict[str, int] = self.fast.get_vocab()
        return max(vocabulary.values()) + 1

    def encode(self, text: str) -> list[int]:
        """Return the tokens of ``text``, with no begin or end token added."""
        if _BREAK in text:
            return [token for piece in text.split(_BREAK) for token in self.encode(piece)]
        # The tokenizer underneath: the wrapper takes twice as long, and every process encodes every row.
        ids: list[int] = self.fast.backend_tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, tokens: list[int]) -> str:
        """Return the text of ``tokens``, special tokens left out."""
        text: str = self.fast.decode(tokens, skip_special_tokens=True)
        return text

    def as_text(self, text: str) -> str:
        """Return ``text`` for :meth:`encode`, broken wherever it would be a control token."""
        if not self._may_hold_control(text):
            return text
        whole: list[str] = []
        left = [text]
        while left:
            piece = left.pop()
            encoding = self.fast.backend_tokenizer.encode(piece, add_special_tokens=False)
            spans = zip(encoding.ids, encoding.offsets, strict=True)
            cuts = [start + 1 for token, (start, end) in spans if token in self.control and end > start + 1]
            if cuts:  # a piece may show another one, of <<think> for instance
                ends = [0, *cuts, len(piece)]
                left += [piece[start:end] for start, end in zip(ends[-2::-1], ends[:0:-1], strict=True)]
            else:
                whole.append(piece)
        return _BREAK.join(whole)

    def _may_hold_control(self, text: str) -> bool:
        if self.written_control.search(text):
            return True
        normalizer = self.fast.backend_tokenizer.normalizer
        return normalizer is not None and bool(self.written_control.search(normalizer.normalize_str(text)))

    def as_answer(self, text: str) -> str:
        """Return an assistant's message for :meth:`encode`: its first block of reasoning keeps its tags."""
        head, closing, answer = self.without_end(text).partition(CLOSE)
        if not closing:
            return self.as_text(head)
        before, opening, reasoning = head.partition(OPEN)
        return self.as_text(before) + opening + self.as_text(reasoning) + closing + self.as_text(answer)

    def without_end(self, text: str) -> str:
        """Return ``text`` without end tokens that it closes with; told once, as there is one behind every target."""
        ends = tuple({self.fast.convert_ids_to_tokens(self.end_token_id), self.fast.eos_token} - {None, ""})
        while text.rstrip().endswith(ends):
            _tell(f"targets end with {' or '.join(ends)} themselves; they are given one end token all the same.")
            text = re.sub(f"(?:{'|'.join(map(re.escape, ends))})\\s*$", "", text)
        return text


@cache
def _tell(message: str) -> None:
    """Log once and not on every rank."""
    if rank() == 0:
        logger.warning(message)


def load_tokenizer(folder: Path, template_arguments: Mapping[str, Any] | None = None) -> ChatTokenizer:
    """Load ``tokenizer.json`` and ``tokenizer_config.json``; code in the folder is never run.

    Args:
        folder: A checkpoint's.
        template_arguments: What the chat template is given besides the messages.

    Raises:
        DataError: If the folder does not exist, has no ``tokenizer.json``, or names no end token, or its template does
            not read one of the arguments.
    """
    from transformers import PreTrainedTokenizerFast  # takes seconds

    if not folder.is_dir():
        raise DataError(f"{folder} does not exist. Give a checkpoint folder with a tokenizer.")
    if not (folder / "tokenizer.json").is_file():
        raise DataError(
            f"{folder} holds no tokenizer.json. Copy it from the checkpoint's repository; a tokenizer that is code "
            "(tokenization_*.py) must be converted to tokenizer.json first."
        )
    # Not AutoTokenizer: for some class names it rebuilds the tokenizer from its vocabulary, with another splitting.
    try:
        fast = PreTrainedTokenizerFast.from_pretrained(folder)
    # tokenizers raises Exception itself, and transformers KeyError, TypeError and others, for files it did not expect.
    except Exception as error:  # noqa: BLE001
        raise DataError(
            f"{folder}: the tokenizer cannot be loaded ({one_line(error)}). Copy its files again."
        ) from None
    template, arguments = _template_of(fast), dict(template_arguments or {})
    for name in arguments:
        if name in _RESERVED or not re.search(rf"\b{re.escape(name)}\b", template):
            why = (
                "is not for a setting to give" if name in _RESERVED else f"the chat template of {folder} does not read"
            )
            raise DataError(f"data.template_arguments has {name!r}, which {why}. Correct or remove it.")
    control = _control_tokens(fast, template)
    before_end, end = _end_of_turn(fast, control, arguments)
    if end is None:
        end = fast.eos_token_id
    if end is None:
        raise DataError(f"{folder}/tokenizer_config.json names no eos_token; nothing would end an answer. Add it.")
    _tell_of_template(folder, fast, end, arguments)
    normalizer = fast.backend_tokenizer.normalizer
    words = {fast.convert_ids_to_tokens(token) for token in control}
    words |= {normalizer.normalize_str(word) for word in words} if normalizer else set()
    return ChatTokenizer(
        fast=fast,
        end_token_id=end,
        before_end=before_end,
        template_arguments=arguments,
        control=control,
        written_control=_finder(words - {""}),
    )


def _finder(words: set[str]) -> re.Pattern[str]:
    """Return what finds any of ``words``: by their beginnings, as there may be a thousand of them."""
    grouped = groupby(sorted(words), key=lambda word: word[:3])
    found = (f"{re.escape(start)}(?:{'|'.join(re.escape(word[3:]) for word in group)})" for start, group in grouped)
    return re.compile("|".join(found) or "(?!)")


def _template_of(fast: Any) -> str:
    """Return the text of the chat template, of all where there are several; empty without one.

    Raises:
        DataError: If it is something else.
    """
    given = fast.chat_template or ""
    texts = list(given.values()) if isinstance(given, dict) else [given]
    if not all(isinstance(text, str) for text in texts):
        raise DataError(
            f"{fast.name_or_path}/tokenizer_config.json: chat_template is {given!r:.80}; it must be a text, or texts "
            "by name. Copy the file again."
        )
    return "\n".join(texts)


def _control_tokens(fast: Any, template: str) -> frozenset[int]:
    """Return special tokens, and added ones that the template writes or that look like a tag of a template."""
    found = {
        number
        for number, token in fast.added_tokens_decoder.items()
        if token.special
        or _TAG.fullmatch(token.content)
        or (token.content in template and token.content.strip() and not token.content.isalnum())
    }
    return frozenset(found - {fast.unk_token_id})  # any odd text becomes that one


def _end_of_turn(fast: Any, control: frozenset[int], arguments: Mapping[str, Any]) -> tuple[str, int | None]:
    """Return what the template writes behind an assistant's message: text, and the first control token, if any."""
    said = "Yes7"
    turns = [Message(Role.user, "Is it?"), Message(Role.assistant, said)]
    try:
        behind = _apply_template(fast, turns, arguments, ask=False).rpartition(said)[2] if fast.chat_template else ""
    except DataError:  # a template that refuses is reported with the first row
        return "", None
    encoding = fast.backend_tokenizer.encode(behind, add_special_tokens=False)
    for token, (start, _) in zip(encoding.ids, encoding.offsets, strict=True):
        if token in control:
            return behind[:start], token
    return "", None


def _tell_of_template(folder: Path, fast: Any, end: int, arguments: Mapping[str, Any]) -> None:
    if not fast.chat_template:
        begin = f"behind {fast.bos_token}" if fast.bos_token else "without a begin token"
        _tell(f"{folder} has no chat template: a prompt is one paragraph a message, 'user: ...', {begin}.")
        return
    if end != fast.eos_token_id:
        _tell(
            f"{folder}: a turn ends with {fast.convert_ids_to_tokens(end)}, as its chat template has it, and not with "
            f"the eos_token {fast.eos_token}."
        )
    try:
        prompt = _apply_template(fast, [Message(Role.user, "Is it?")], arguments, ask=True)
    except DataError:
        return
    if fast.bos_token and not prompt.startswith(fast.bos_token):
        _tell(f"{folder}: the chat template writes no begin token, so prompts have no {fast.bos_token}.")


def tokenize_row(row: ChatRow, tokenizer: ChatTokenizer) -> TokenizedRow:
    """Return prompt, target and end token, with the row's weight on target and end token.

    Raises:
        DataError: If the chat template does not take this conversation, or closes the reasoning that the target has.
    """
    prompt, target = split_text(row, tokenizer)
    prompt_tokens = tokenizer.encode(prompt)
    target_tokens = [*tokenizer.encode(target + tokenizer.before_end), tokenizer.end_token_id]
    weights = np.zeros(len(prompt_tokens) + len(target_tokens), dtype=np.float32)
    weights[len(prompt_tokens) :] = row.weight
    tokens = np.array(prompt_tokens + target_tokens, dtype=np.int32)
    return TokenizedRow(id=row.id, task=row.task, tokens=tokens, loss_weights=weights)


def split_text(row: ChatRow, tokenizer: ChatTokenizer) -> tuple[str, str]:
    """Return the prompt as the model reads it, and the target as the model should continue it.

    Both are for ``tokenizer.encode``: where they are to be encoded in pieces, they hold a mark.
    """
    try:
        prompt = render_prompt(row.prompt, tokenizer)
    except DataError as error:
        raise DataError(f"Row {row.id!r}: {error}") from None
    target = tokenizer.as_answer(row.target)
    opened = opened_by(prompt)
    if not opened:
        return prompt, target
    head, closing, answer = target.partition(CLOSE)
    is_block = head.lstrip().startswith(OPEN) or OPEN not in head
    if opened == OPEN:
        if closing and is_block:
            return prompt, target.lstrip().removeprefix(OPEN).lstrip("\n")
        # No reasoning: the model learns to close the block first, on lines of their own where the template has lines.
        return prompt, CLOSE + ("" if prompt.endswith(OPEN) else "\n\n") + target.lstrip()
    if not (closing and is_block):
        return prompt, target
    if head.strip().removeprefix(OPEN).strip():
        known = re.search(r"\b\w*thinking\w*\b", _template_of(tokenizer.fast))
        raise DataError(
            f"Row {row.id!r}: its target reasons, but the prompt ends in {CLOSE}: the chat template leaves reasoning "
            f"out. Set 'data.template_arguments={{{known[0] if known else 'thinking'}: true}}', or "
            "data.reasoning=false."
        )
    return prompt, answer.lstrip("\n")


def holds_control_text(row: ChatRow, tokenizer: ChatTokenizer) -> bool:
    """Return whether something in a row is written like a control token, and encoded as text."""
    return any(_BREAK in text for text in split_text(row, tokenizer))


def opened_by(prompt: str) -> str:
    """Return what a prompt has of the answer: some templates open the reasoning themselves, or leave it out."""
    end = prompt.rstrip()
    return OPEN if end.endswith(OPEN) else OPEN + CLOSE if end.endswith(CLOSE) else ""


def render_prompt(messages: Sequence[Message], tokenizer: ChatTokenizer) -> str:
    """Return the text of a conversation up to where the assistant answers, for ``tokenizer.encode``.

    Raises:
        DataError: If the checkpoint's chat template refuses these messages.
    """
    turns: list[Message] = []
    before = ""
    for message in messages:
        content = (tokenizer.as_answer if message.role is Role.assistant else tokenizer.as_text)(message.content)
        # Messages that a template joins make no control token together either.
        joins = tokenizer.written_control.finditer(before + content[:_LONGEST])
        if any(match.start() < len(before) < match.end() for match in joins):
            content = _BREAK + content
        turns.append(Message(message.role, content))
        before = (before + content)[-_LONGEST:]
    if tokenizer.fast.chat_template:
        return _apply_template(tokenizer.fast, turns, tokenizer.template_arguments, ask=True)
    texts = [f"{turn.role}: {turn.content}" for turn in turns]  # a base model: one paragraph a message
    return (tokenizer.fast.bos_token or "") + "\n\n".join([*texts, f"{Role.assistant}: "])


def _apply_template(fast: Any, messages: Sequence[Message], arguments: Mapping[str, Any], *, ask: bool) -> str:
    turns = [message.as_dict() for message in messages]
    try:
        text: str = fast.apply_chat_template(turns, tokenize=False, add_generation_prompt=ask, **arguments)
    except Exception as error:  # noqa: BLE001  # a template is a program, and raises what it likes
        raise DataError(f"the checkpoint's chat template refuses the conversation: {one_line(error)}") from None
    return text
