"""Try every prompt template on rows with trusted labels, in every wording, before it is used at scale.

A wording passes if enough of its answers are well formed, repeat the label and mention the input; a template passes if
all its wordings do and the reasoning about one row stays alike over the wordings. One that fails is not used.

Source: AdNanny, section 3.3, where people look at the answers; the report shows them so that people still can.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from megatron_ads.config.synthesis import SynthesisConfig
from megatron_ads.inference.client import Client
from megatron_ads.metrics.text import mean_similarities
from megatron_ads.rows import ChatRow
from megatron_ads.synthesis.candidates import Candidate, by_row, details_in, passing, read_candidate
from megatron_ads.synthesis.filters import embedder
from megatron_ads.synthesis.prompts import ReasoningTemplate, reasoning_request


@dataclass(frozen=True, kw_only=True, slots=True)
class GoldenResult:
    """How one template did on the golden rows of one task."""

    task: str
    template: str
    rows: int
    pass_rates: tuple[float, ...]
    """Of each wording."""
    failures: dict[str, int]
    """Why answers failed, the most frequent first."""
    agreement: float | None
    """Mean similarity over the wordings; None where no row has two good answers."""
    passed: bool
    sample: str
    """The reasoning of the first good answer, for people; empty if there is none."""


def check_template(
    task: str, template: ReasoningTemplate, rows: Sequence[ChatRow], client: Client, config: SynthesisConfig
) -> GoldenResult:
    """Ask about every golden row in every wording, and judge the template.

    Raises:
        DataError: If the teacher stopped answering.
    """
    wordings = range(len(template.wordings))
    asked = [(row, wording) for row in rows for wording in wordings]
    requests = (reasoning_request(row, template, wording, config.teacher, seed=config.seed) for row, wording in asked)
    answers = client.ask(requests, total=len(asked), description=f"golden set, {task}")
    known = details_in(rows)
    candidates = [
        read_candidate(row, wording, answer, details=known.of(row), config=config.reject)
        for (row, wording), answer in zip(asked, answers, strict=True)
    ]
    good = passing(candidates)
    rates = tuple(sum(candidate.number == wording for candidate in good) / len(rows) for wording in wordings)
    agreement = _agreement(good, config)
    failed = Counter(str(candidate.removed) for candidate in candidates if candidate.removed is not None)
    return GoldenResult(
        task=task,
        template=template.name,
        rows=len(rows),
        pass_rates=rates,
        failures=dict(failed.most_common()),
        agreement=agreement,
        passed=min(rates) >= config.golden.pass_rate and (agreement is None or agreement >= config.golden.agreement),
        sample=good[0].reasoning if good else "",
    )


def _agreement(good: Sequence[Candidate], config: SynthesisConfig) -> float | None:
    groups = [group for group in by_row(good).values() if len(group) > 1]
    if not groups:
        return None
    embed = embedder(config.reject, [candidate.reasoning for candidate in good])
    return fmean(
        float(mean_similarities(embed([candidate.reasoning for candidate in group])).mean()) for group in groups
    )
