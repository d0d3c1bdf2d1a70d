"""Turn a task's question and answer into a row."""

from megatron_ads.data.rows import ChatRow, Facts, Message, Role
from megatron_ads.errors import DataError


def single_turn(
    row_id: str,
    task: str,
    prompt: str,
    target: str,
    *,
    facts: Facts | None = None,
    group: str = "",
    label: str | None = None,
) -> ChatRow:
    """Return one question and its answer.

    Args:
        row_id: Unique in its source.
        task: The task's name.
        prompt: The user's message.
        target: The assistant's message.
        facts: What both were rendered from.
        group: What must not be shared between training and validation.
        label: The true answer in short.

    Raises:
        DataError: If the prompt or the target has no text.
    """
    for name, text in (("prompt", prompt), ("target", target)):
        if not text.strip():
            raise DataError(f"row {row_id!r}: the {name} is {text!r}; it must be text that is not empty.")
    messages = (Message(Role.user, prompt), Message(Role.assistant, target))
    label = None if label is None else str(label)
    return ChatRow(id=row_id, task=task, messages=messages, group=group, label=label, facts=facts or {})


def filled(name: str, text: str) -> str:
    """Return ``text`` without surrounding white space.

    Raises:
        DataError: If nothing is left.
    """
    if not text.strip():
        raise DataError(f"{name} is {text!r}; it must be text that is not empty.")
    return text.strip()
