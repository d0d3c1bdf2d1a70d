"""Tasks that are answered with a name: which are valid, how an answer is written, which are near or likely.

The collaborative model counts, in the training rows, who is bought from next, after whom. It reads no text. Over N
valid names, labels that are no such name left out:

    popular(n)   = (rows with label n + 1) / (rows + N)
    after(n | r) = rows with label n whose user had bought from r / rows whose user had bought from r
    P(n | user)  = popular(n) / 2 + mean over the user's known r of after(n | r) / 2; popular(n) alone without one

Ours; D3 takes a trained sequential recommender in its place. Free text becomes a ranking of what exists as in BIGRec
(arXiv:2308.08434), which embeds with the language model; ours embeds runs of three letters by TF-IDF and SVD, which
needs no model and finds names that are spelt a little differently.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_ads.data.chat import ChatTokenizer
from megatron_ads.errors import DataError
from megatron_ads.inference.beam_rules import NameTrie, build_trie
from megatron_ads.metrics.ranking import each_once, same_name
from megatron_ads.metrics.text import fit_embedding
from megatron_ads.rows import ChatRow, Fact
from megatron_ads.tasks import advertiser_question, next_advertiser, next_item
from megatron_ads.tasks.answer_format import render_reasoned
from megatron_ads.tasks.semantic_id import is_semantic_id
from megatron_ads.tasks.user_history import Section, shown_history

_SHOWN_CHARACTERS = 40
_ADVERTISER_TASKS = frozenset({next_advertiser.TASK, next_advertiser.RANKING_TASK})


@dataclass(frozen=True, slots=True)
class AdvertiserNames:
    """The advertisers there are."""

    names: tuple[str, ...]
    """Each once."""
    source: str
    """Where they come from, for people."""
    given: bool = False
    """Somebody listed them: nothing else exists, for baselines neither."""
    items: tuple[str, ...] = ()
    """Semantic IDs of the items there are, which answer ``next_item``."""


NO_NAMES = AdvertiserNames((), "nowhere")
MAX_NAME_TOKENS = 256
"""Of a valid name: beams write it a token at a time, so that one long name holds up every row."""
MAX_TRIES = 256
"""Kept: rows with candidates of their own have one each."""


def read_names(file: Path) -> AdvertiserNames:
    """Read one name a line; empty lines are left out, and semantic IDs are items.

    Raises:
        DataError: If the file cannot be read or holds no name.
    """
    try:
        names = each_once(file.read_text(encoding="utf-8").splitlines())
        problem = "" if names else "holds no names"
    except OSError as error:
        problem = f"cannot be read ({error.strerror})"
    except UnicodeDecodeError:
        problem = "is not UTF-8 text"
    if problem:
        raise DataError(f"{file} {problem}; --names takes a file with a name a line.")
    items = tuple(filter(is_semantic_id, names))
    others = tuple(name for name in names if not is_semantic_id(name))
    return AdvertiserNames(others, str(file), given=True, items=items)


def names_trained_on(training: Iterable[ChatRow]) -> AdvertiserNames:
    """Return whom training rows name: as the truth, or in their facts as somebody that a user bought from."""
    rows = list(training)
    of_task = [row for row in rows if row.task in _ADVERTISER_TASKS]
    labels = [row.label for row in of_task if row.label is not None]
    past = [name for row in of_task if Fact.read_from_prompt not in row.facts for name in bought_from(row)]
    of_items = [row for row in rows if row.task == next_item.TASK and row.label is not None]
    items = (known for row in of_items for known in (row.label or "", *recent_items(row)))
    return AdvertiserNames(each_once([*labels, *past]), "the training rows", items=tuple(dict.fromkeys(items)))


def bought_from(row: ChatRow) -> tuple[str, ...]:
    """Return whom a row shows that the user bought from, the most recent first."""
    return shown_history(row).get(Section.past_advertisers, ()) if Fact.history in row.facts else ()


def recent_items(row: ChatRow) -> tuple[str, ...]:
    """Return the semantic IDs that a row shows, the most recent first."""
    return shown_history(row).get(Section.semantic_ids, ()) if Fact.history in row.facts else ()


def valid_names(row: ChatRow, advertisers: AdvertiserNames) -> tuple[str, ...] | None:
    """Return the names that a row may be answered with; None if its task is not answered with a name."""
    if row.task == next_advertiser.TASK:
        return advertisers.names
    if row.task == next_item.TASK:
        return advertisers.items
    return each_once(row.list_fact(Fact.candidates)) if row.task == advertiser_question.CHOOSE_ONE else None


class NameForms:
    """Answers with a name in tokens: what comes before the name is the same in all of them."""

    def __init__(self, tokenizer: ChatTokenizer) -> None:
        """Take the model's tokenizer."""
        self._tokenizer = tokenizer
        self._kept = lru_cache(MAX_TRIES)(self._trie)

    def text(self, name: str) -> str:
        """Return the whole answer with a name."""
        return render_reasoned("", name)

    def before(self, opened: str) -> list[int]:
        """Return the tokens before the name: a block without reasoning.

        Args:
            opened: What of the answer the prompt has already: nothing, the opening tag, or both tags.
        """
        return self._tokenizer.encode(self._text("", opened))

    def trie(self, names: Sequence[str], opened: str) -> NameTrie:
        """Return the names behind ``before``.

        Raises:
            DataError: If there are none, one has more than ``MAX_NAME_TOKENS``, or two are the same tokens.
        """
        return self._kept(tuple(names), opened, False)

    def answers(self, names: Sequence[str], opened: str) -> NameTrie:
        """Return the whole answers, what comes before the name included.

        Raises:
            DataError: If there are none, or two are the same tokens.
        """
        return self._kept(tuple(names), opened, True)

    def _trie(self, names: tuple[str, ...], opened: str, whole: bool) -> NameTrie:
        # Encoded with what comes before, as in training, where it may change how a name begins.
        end = self._tokenizer.before_end
        answers = {name: self._tokenizer.encode(self._text(name, opened) + end) for name in names}
        return build_trie(answers if whole else self._behind(answers, opened), self._tokenizer.end_token_id)

    def _behind(self, answers: Mapping[str, list[int]], opened: str) -> dict[str, list[int]]:
        before = self.before(opened)
        for name, tokens in answers.items():
            if tokens[: len(before)] != before:
                raise DataError(f"the tokenizer joins the end of the reasoning with the beginning of {name!r}.")
        behind = {name: tokens[len(before) :] for name, tokens in answers.items()}
        longest = max(behind, key=lambda name: len(behind[name]), default="")
        if behind and len(behind[longest]) > MAX_NAME_TOKENS:
            raise DataError(
                f"the valid name {longest[:_SHOWN_CHARACTERS]!r}... has {len(behind[longest]):,} tokens, and beams "
                f"write names of at most {MAX_NAME_TOKENS}; shorten it, or leave it out of --names."
            )
        return behind

    def _text(self, name: str, opened: str) -> str:
        return self._tokenizer.as_answer(render_reasoned("", name)).removeprefix(opened)


class CollaborativeModel:
    """Counts of training rows."""

    def __init__(self, training: Iterable[ChatRow]) -> None:
        """Count labels, and labels after each name that the user had bought from."""
        self._popular: Counter[str] = Counter()
        self._after: dict[str, Counter[str]] = defaultdict(Counter)
        for row in training:
            if row.label is not None:
                label = same_name(row.label)
                self._popular[label] += 1
                for past in _past(row):
                    self._after[past][label] += 1

    def chances(self, row: ChatRow, names: Sequence[str]) -> NDArray[np.float64]:
        """Return the probability of each of ``names``, (N,); all are above 0 and their sum is 1."""
        keys = [same_name(name) for name in names]
        popular_N = _counts(self._popular, keys) + 1
        popular_N /= popular_N.sum()
        after = [_counts(self._after[past], keys) for past in _past(row) if past in self._after]
        known = [counts_N / counts_N.sum() for counts_N in after if counts_N.any()]
        if not known:
            return popular_N
        chances_N: NDArray[np.float64] = (popular_N + np.mean(known, axis=0)) / 2
        return chances_N


def _past(row: ChatRow) -> dict[str, None]:
    return dict.fromkeys(same_name(name) for name in bought_from(row))


def _counts(counted: Counter[str], keys: Sequence[str]) -> NDArray[np.float64]:
    return np.asarray([counted[key] for key in keys], dtype=np.float64)


_DIMENSIONS = 256
_RUN = 3


class NearestNames:
    """Valid names and where they lie."""

    def __init__(self, names: Sequence[str]) -> None:
        """Fit the embedding to the names."""
        self._names, self._keys = list(names), [same_name(name) for name in names]
        runs = [_runs(name) for name in names]
        self._embedding = fit_embedding(runs, dimensions=_DIMENSIONS)
        self._vectors_ND = self._embedding.embed(runs)

    def rank(self, texts: Sequence[str], most: int) -> list[list[str]]:
        """Return the ``most`` nearest names of each text; none for a text that has no run of letters with any name.

        A text that is a name is nearest to it. Of names that are equally near, those named first come first.
        """
        found: list[list[str]] = []
        for text, vector_D in zip(texts, self._embedding.embed([_runs(text) for text in texts]), strict=True):
            if not vector_D.any():
                found.append([])
                continue
            near_N = self._vectors_ND @ vector_D
            wanted = same_name(text)
            near_N[[key == wanted for key in self._keys]] = np.inf
            found.append([self._names[place] for place in np.argsort(-near_N, kind="stable")[:most]])
        return found


def _runs(text: str) -> str:
    """Return the overlapping runs of letters of a text, as words; the ends of its words count as letters."""
    letters = "".join(letter if letter.isalnum() else "_" for letter in f"_{same_name(text)}_")
    return " ".join(letters[start : start + _RUN] for start in range(len(letters) - _RUN + 1))
