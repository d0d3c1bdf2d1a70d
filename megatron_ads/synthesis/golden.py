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
from megatron_ads.synthesis.candidates import Candidate, Removed, ask_teacher, by_row, passing
from megatron_ads.synthesis.filters import embedder
from megatron_ads.synthesis.prompts import ReasoningTemplate


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
    failed: tuple[Candidate, ...]
    """Those answers."""
    agreement: float | None
    """Mean similarity over the wordings; None where no row has two good answers."""
    passed: bool
    sample: str
    """The reasoning of the first good answer, for people; empty if there is none."""


def check_template(
    task: str, template: ReasoningTemplate, rows: Sequence[ChatRow], client: Client, config: SynthesisConfig
) -> GoldenResult:
    """Ask about every golden row in every wording, and judge the template."""
    wordings = range(len(template.wordings))
    asked = [(row, wording, template, wording) for row in rows for wording in wordings]
    candidates = ask_teacher(asked, client, config, description=f"golden set, {task}")
    good = passing(candidates)
    rates = tuple(sum(candidate.number == wording for candidate in good) / len(rows) for wording in wordings)
    agreement = None
    if groups := [group for group in by_row(good).values() if len(group) > 1]:
        embed = embedder(config.reject, [candidate.reasoning for candidate in good])
        vectors = [embed([candidate.reasoning for candidate in group]) for group in groups]
        agreement = fmean(float(mean_similarities(vectors_ND).mean()) for vectors_ND in vectors)
    failed = tuple(candidate for candidate in candidates if candidate.removed is not None)
    failures = Counter(
        f"{candidate.removed} ({candidate.reason})" if candidate.removed is Removed.schema else str(candidate.removed)
        for candidate in failed
    )
    return GoldenResult(
        task=task,
        template=template.name,
        rows=len(rows),
        pass_rates=rates,
        failures=dict(failures.most_common()),
        failed=failed,
        agreement=agreement,
        passed=min(rates) >= config.golden.pass_rate and (agreement is None or agreement >= config.golden.agreement),
        sample=good[0].reasoning if good else "",
    )
