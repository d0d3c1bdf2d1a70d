"""Ask a checkpoint: rows become prompts, like ones a batch, and what the model writes becomes answers."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_ads.data.chat import THINK, render_prompt
from megatron_ads.data.rows import ChatRow
from megatron_ads.data.tokenizer import load_tokenizer
from megatron_ads.evaluation.answer import Answer, AnswerBeam
from megatron_ads.evaluation.beam_rules import ValidNames
from megatron_ads.evaluation.beam_search import Beam
from megatron_ads.evaluation.decoding import GREEDY, Decoding, Method
from megatron_ads.evaluation.generator import Generator
from megatron_ads.evaluation.name_answers import NO_NAMES, AdvertiserNames, CollaborativeModel, NameForms, valid_names
from megatron_ads.evaluation.name_trie import NameTrie


@dataclass(frozen=True, kw_only=True, slots=True)
class Asking:
    """How rows are answered."""

    how: Decoding = GREEDY
    max_new_tokens: Mapping[str, int]
    """Longest answer of each task, reasoning included; valid names may be longer."""
    batch_size: int
    """Sequences generated at once; a row with beams is several."""
    advertisers: AdvertiserNames = NO_NAMES
    """Valid names, for constrained beams."""
    training: Sequence[ChatRow] = ()
    """Trained on: what the collaborative model counts, where one is asked for."""

    def settings(self) -> dict[str, Any]:
        """Return what answers depend on besides the model and the rows, as JSON values."""
        return {
            **asdict(self.how),
            "max_new_tokens": dict(sorted(self.max_new_tokens.items())),
            "batch_size": self.batch_size,
            "names": self.advertisers.names if self.how.method is Method.constrained_beam else None,
            "trained_on": [[row.label, row.prompt[-1].content] for row in self.training]
            if self.how.collaborative
            else None,
        }


class RowAsker:
    """Rows and the checkpoint that answers them, a batch at a time. The checkpoint is loaded when the first is due."""

    def __init__(self, folder: Path, rows: Sequence[ChatRow], asking: Asking) -> None:
        """Read the tokenizer and write the prompts."""
        self._folder, self._rows, self._asking = folder, rows, asking
        self._tokenizer = load_tokenizer(folder)
        self._prompts = [render_prompt(row.prompt, self._tokenizer) for row in rows]
        self._tokens = [self._tokenizer.encode(prompt) for prompt in self._prompts]
        self._forms = NameForms(self._tokenizer)
        self._generator: Generator | None = None
        self._collaborative: CollaborativeModel | None = None

    def batches(self) -> list[list[int]]:
        """Return the numbers of the rows that are answered together, all of one task, whose answers are of like length.

        Prompts are of like length too, so that little is padded. Batches depend on the rows and on how they are asked,
        not on what has been answered before.
        """
        how, size = self._asking.how, self._asking.batch_size
        found = []
        for task in sorted({row.task for row in self._rows}):
            rows = [number for number, row in enumerate(self._rows) if row.task == task]
            rows.sort(key=lambda number: len(self._tokens[number]))
            with_beams = self._answers_by_name(rows[0]) or how.method is Method.beam
            width = max(1, size // how.beams) if with_beams else size
            found += [rows[start : start + width] for start in range(0, len(rows), width)]
        return found

    def answer(self, batch: Sequence[int], *, draw: int) -> list[Answer]:
        """Answer the rows of a batch, which are of one task; ``draw`` is the batch's number.

        Raises:
            ConversionError: If transformers cannot load the folder.
            DataError: If two valid names are the same tokens, or there are none.
        """
        if self._generator is None:
            end = self._tokenizer.end_token_id
            self._generator = Generator(self._folder, end_token=end, pad_token=end)
        if self._answers_by_name(batch[0]):
            return self._names(self._generator, batch)
        how, limit = self._asking.how, self._asking.max_new_tokens[self._rows[batch[0]].task]
        prompts = [self._tokens[number] for number in batch]
        if how.method is Method.beam:
            found = self._generator.beams(prompts, how=how, max_new_tokens=limit)
            return [
                self._with_beams(number, beams, [self._written(number, list(beam.tokens)) for beam in beams])
                for number, beams in zip(batch, found, strict=True)
            ]
        seed = hashlib.sha256(f"{how.seed}:{draw}".encode()).digest()
        completions = self._generator.complete(
            prompts, max_new_tokens=limit, how=how, draw=int.from_bytes(seed[:8], "big")
        )
        return [
            Answer(self._rows[number], self._written(number, completion.tokens), completion.ended)
            for number, completion in zip(batch, completions, strict=True)
        ]

    def _answers_by_name(self, number: int) -> bool:
        constrained = self._asking.how.method is Method.constrained_beam
        return constrained and valid_names(self._rows[number], self._asking.advertisers) is not None

    def _names(self, generator: Generator, batch: Sequence[int]) -> list[Answer]:
        how = self._asking.how
        tries = [self._trie(number) for number in batch]
        found = generator.beams(
            [[*self._tokens[number], *self._forms.before(self._opened(number))] for number in batch],
            how=how,
            max_new_tokens=max(trie.depth for trie in tries),
            rules=[self._rules(number, trie) for number, trie in zip(batch, tries, strict=True)],
        )
        answers = []
        for number, trie, beams in zip(batch, tries, found, strict=True):
            names = [trie.names[beam.state.first] for beam in beams]
            assert len(set(names)) == len(names) == min(how.beams, len(trie.names))
            answers.append(self._with_beams(number, beams, [self._forms.text(name) for name in names]))
        return answers

    def _trie(self, number: int) -> NameTrie:
        names = valid_names(self._rows[number], self._asking.advertisers) or ()
        return self._forms.trie(names, self._opened(number))

    def _rules(self, number: int, trie: NameTrie) -> ValidNames:
        share = self._asking.how.collaborative
        if not share:
            return ValidNames(trie)
        if self._collaborative is None:
            self._collaborative = CollaborativeModel(self._asking.training)
        chances = self._collaborative.chances(self._rows[number], trie.names)
        return ValidNames(trie, chances=chances.tolist(), collaborative=share)

    def _with_beams(self, number: int, beams: Sequence[Beam], texts: Sequence[str]) -> Answer:
        said = tuple(
            AnswerBeam(text, beam.log_probability, beam.score) for beam, text in zip(beams, texts, strict=True)
        )
        return Answer(self._rows[number], texts[0], beams[0].ended, said)

    def _written(self, number: int, tokens: list[int]) -> str:
        return self._opened(number) + self._tokenizer.decode(tokens)

    def _opened(self, number: int) -> str:
        """Return what the prompt has of the answer: some chat templates open the reasoning themselves."""
        return THINK if self._prompts[number].rstrip().endswith(THINK) else ""
