"""``rollout.valid_names``: what the policy may answer where the answer is a name.

Engines draw each token among those that a whole valid answer goes on with, from the first: the empty reasoning block,
which all of them begin with, is part of the answer. It is written as training would write it, and the policy gets a
log-probability for every token of it.
"""

from collections.abc import Iterable, Sequence

from megatron_ads.data.chat import ChatTokenizer
from megatron_ads.errors import ConfigError, DataError
from megatron_ads.inference.beam_rules import AnyToken, Rules, ValidNames
from megatron_ads.inference.name_answers import AdvertiserNames, NameForms, valid_names
from megatron_ads.journal import digest_of
from megatron_ads.rows import ChatRow


class NameRules:
    """The valid answers to every row."""

    def __init__(self, advertisers: AdvertiserNames, tokenizer: ChatTokenizer) -> None:
        """Take the names of advertisers, and how answers become tokens."""
        self._advertisers, self._digest = advertisers, digest_of(advertisers.names)
        self._forms = NameForms(tokenizer)

    def check(self, rows: Iterable[tuple[ChatRow, str]], max_new_tokens: int) -> None:
        """Refuse rows, given with what their prompts have of the answer, that cannot be answered so.

        Raises:
            ConfigError: If no row is answered with a name, or an answer has more than ``max_new_tokens``.
            DataError: If a row has no valid names, or two of them are the same tokens.
        """
        tasks = set[str]()
        answered = False
        for row, opened in rows:
            tasks.add(row.task)
            if (names := valid_names(row, self._advertisers)) is None:
                continue
            answered = True
            if not names:
                raise DataError(
                    f"Row {row.id!r} has no valid names: neither candidates of its own nor advertisers in the training "
                    "rows. Leave it out, or rollout.valid_names."
                )
            if (longest := self._forms.answers(names, opened).depth) > max_new_tokens:
                raise ConfigError(
                    f"rollout.max_new_tokens is {max_new_tokens}, but a valid answer to row {row.id!r} has {longest} "
                    "tokens. Raise it, or leave out rollout.valid_names."
                )
        if not answered:
            raise ConfigError(
                f"rollout.valid_names is True, which has no effect: no row, of {', '.join(sorted(tasks))}, is answered "
                "with a name. Remove it."
            )

    def rules(self, row: ChatRow, opened: str) -> Rules:
        """Return what the answer to a row may be; of tasks that are not answered with a name, anything."""
        names = valid_names(row, self._advertisers)
        return AnyToken(1) if names is None else ValidNames(self._forms.answers(names, opened))

    def key(self, row: ChatRow) -> str | Sequence[str] | None:
        """Return JSON values that differ where the valid names do."""
        names = valid_names(row, self._advertisers)
        return self._digest if names is self._advertisers.names else names
