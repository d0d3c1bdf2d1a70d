"""Beam search over a transformers model: the most probable answers of many prompts, each row by rules of its own.

It is ours because transformers' own gives invalid or repeated beams where fewer than asked for are valid. A beam is
lengthened until it ends; ended beams keep no place among those that go on, so that as many names are found as asked
for, or all there are. A row is done when none of its running beams can still be among its best.

Shape suffixes: K = running beams of one row, R = running beams of all rows, V = vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_ads.config.generation import LengthRule
from megatron_ads.inference.beam_rules import Rules
from megatron_ads.inference.engine import sum_in_order
from megatron_ads.inference.language_model import RunningRows


@dataclass(frozen=True, kw_only=True, slots=True)
class Beam:
    """One answer that was written, or is being written."""

    tokens: tuple[int, ...] = ()
    """Without the end token."""
    log_probabilities: tuple[float, ...] = ()
    """The model's, of the tokens and the end token, in nats."""
    score: float = 0.0
    """What beams are ordered by; while a beam is running, the sum of its gains."""
    ended: bool = False
    choices: int = 0
    """Tokens that had an alternative."""
    state: Any = field(default=None, compare=False)
    """What the rules know of it."""

    @property
    def log_probability(self) -> float:
        """Return the model's log-probability of the whole answer, in nats."""
        return sum_in_order(self.log_probabilities)


class RowSearch:
    """The beams of one row, from step to step."""

    def __init__(self, rules: Rules, *, beams: int, limit: int, end_token: int, length: LengthRule) -> None:
        """Begin with one beam in which nothing is written.

        Args:
            rules: What may be written.
            beams: How many are wanted.
            limit: Most tokens of a beam, end token included.
            end_token: Ends a beam.
            length: How beams of different length are compared.
        """
        self._rules, self._beams, self._limit = rules, beams, limit
        self._end_token, self._length = end_token, length
        self._steps = 0
        self.best: list[Beam] = []
        """The beams found, the best first; what was cut off at the limit comes after what ended."""
        self.running: list[Beam] = [Beam(state=rules.start)]

    def advance(self, log_probabilities_KV: Tensor) -> list[int]:
        """Lengthen the running beams by a token; return, for each that runs on, which of the former it comes from."""
        self._steps += 1
        found = self._rules.candidates([beam.state for beam in self.running], log_probabilities_KV)
        totals_C = np.asarray([beam.score for beam in self.running])[found.beams_C] + found.gains_C
        parents: list[int] = []
        grown: list[Beam] = []
        for place in np.argsort(-totals_C, kind="stable").tolist():
            ends = int(found.tokens_C[place]) == self._end_token
            if not ends and len(grown) == self._beams:
                continue
            parent = int(found.beams_C[place])
            before = self.running[parent]
            beam = Beam(
                tokens=before.tokens if ends else (*before.tokens, int(found.tokens_C[place])),
                log_probabilities=(*before.log_probabilities, float(found.log_probabilities_C[place])),
                score=float(totals_C[place]),
                ended=ends,
                choices=before.choices + int(not found.forced_C[place]),
                state=found.states[place],
            )
            if ends:
                self.best.append(self._judged(beam))
            else:
                parents.append(parent)
                grown.append(beam)
        self.best = sorted(self.best, key=lambda beam: -beam.score)[: self._beams]
        self.running = [] if self._is_done(grown) else grown
        return parents if self.running else []

    def _is_done(self, grown: Sequence[Beam]) -> bool:
        if not grown:
            return True
        if self._steps == self._limit:
            cut_off = sorted((self._judged(beam) for beam in grown), key=lambda beam: -beam.score)
            self.best = [*self.best, *cut_off][: self._beams]
            return True
        # Gains are not positive: the best score a running beam can still get is that of its sum over the most tokens.
        max_tokens = 1 if self._length is LengthRule.sum else self._limit
        return len(self.best) == self._beams and grown[0].score / max_tokens <= self.best[-1].score

    def _judged(self, beam: Beam) -> Beam:
        tokens = {
            LengthRule.sum: 1,
            LengthRule.mean: len(beam.tokens) + int(beam.ended),
            LengthRule.mean_of_choices: max(beam.choices, 1),
        }[self._length]
        return replace(beam, score=beam.score / tokens)


@torch.inference_mode()
def search_beams(rows: RunningRows, searches: Sequence[RowSearch]) -> list[list[Beam]]:
    """Carry the searches out, one per prompt of ``rows``; return the beams of each, the best first."""
    while any(search.running for search in searches):
        log_probabilities_RV = rows.logits_RV.log_softmax(-1)
        parents: list[int] = []  # over all running beams, where each comes from
        tokens: list[int] = []
        start = 0
        for search in searches:
            width = len(search.running)
            if width:
                parents += [start + parent for parent in search.advance(log_probabilities_RV[start : start + width])]
                tokens += [beam.tokens[-1] for beam in search.running]
            start += width
        if parents:
            rows.go_on(parents, tokens)
    return [search.best for search in searches]
