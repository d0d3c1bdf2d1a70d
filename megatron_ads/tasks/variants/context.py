"""What a prompt shows below its instruction, found again in a row that a template made."""

from collections.abc import Sequence

from megatron_ads.data.rows import ChatRow
from megatron_ads.errors import DataError
from megatron_ads.tasks.prompt_templates import Template


def context_of(row: ChatRow, task: str, templates: Sequence[Template]) -> str:
    """Return the prompt without its first line, the instruction.

    Raises:
        DataError: If the row is of another task, or its first line is not a wording of ``templates``.
    """
    if row.task != task:
        raise DataError(f"row {row.id!r} is of task {row.task}; this variant is made from rows of {task}.")
    instruction, _, context = row.prompt[-1].content.partition("\n")
    known = {template.instruction(wording) for template in templates for wording in range(len(template.paraphrases))}
    if instruction not in known or not context:
        raise DataError(
            f"row {row.id!r} begins with {instruction!r:.60}, which is no instruction of {task}; a variant replaces "
            "that line, so it is made from rows with the task's own prompt."
        )
    return context
