"""The public benchmarks of a release, pinned: lm-eval's tasks and their versions, shots and metrics.

The suite is that of AdNanny's table 8, but for LiveCodeBench, which lm-eval does not have. The paper does not say how
many examples the prompts show; these are the usual numbers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from megatron_ads.errors import ConfigError


class Kind(StrEnum):
    """What a benchmark takes from a model."""

    choice = "choice"
    """Which of some continuations is the most probable one."""
    text = "text"
    """What it writes, from which lm-eval reads the answer."""
    program = "program"
    """A program that it writes, which is run in a sandbox."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Benchmark:
    """One line of the table."""

    name: str
    task: str
    """lm-eval's name of a task or a group."""
    described_in: str | None
    """Folder of lm-eval's that describes it; None: ``megatron_ads/regress/own_tasks.py`` does."""
    version: float
    """Of each of its tasks; scores of another version cannot be compared."""
    kind: Kind
    metric: str
    shots: int
    """Examples in front of each question."""
    reading: str = "none"
    """lm-eval's filter: how the answer is read from the text."""
    folder: str
    """Where local files are looked for, below the folder of data."""

    def settings(self) -> dict[str, Any]:
        """Return what its scores depend on, as JSON values."""
        return {
            "task": self.task, "version": self.version, "metric": self.metric, "shots": self.shots,
            "reading": self.reading,
        }  # fmt: skip


def _choice(name: str, folder: str, *, shots: int, metric: str = "acc") -> Benchmark:
    return Benchmark(
        name=name, task=name, described_in=folder, version=1.0, kind=Kind.choice, metric=metric, shots=shots,
        folder=name,
    )  # fmt: skip


def _text(
    name: str, task: str, folder: str, *, version: float, shots: int, reading: str = "flexible-extract"
) -> Benchmark:
    return Benchmark(
        name=name, task=task, described_in=folder, version=version, kind=Kind.text, metric="exact_match", shots=shots,
        reading=reading, folder=name,
    )  # fmt: skip


def _program(name: str, *, shots: int) -> Benchmark:
    return Benchmark(
        name=name, task=name, described_in=None, version=1.0, kind=Kind.program, metric="pass@1", shots=shots,
        folder=name,
    )  # fmt: skip


SUITE = (
    _choice("anli_r3", "anli", shots=0),
    _choice("arc_challenge", "arc", shots=25, metric="acc_norm"),
    _text("gsm8k", "gsm8k_cot", "gsm8k", version=3.0, shots=8),
    _choice("hellaswag", "hellaswag", shots=10, metric="acc_norm"),
    _program("humaneval", shots=0),
    _text("math", "hendrycks_math", "hendrycks_math", version=1.0, shots=4, reading="none"),
    _program("mbpp", shots=3),
    _text("mgsm_en", "mgsm_native_cot_en", "mgsm", version=4.0, shots=8),
    _text("mgsm_zh", "mgsm_native_cot_zh", "mgsm", version=4.0, shots=8),
    _choice("mmlu_humanities", "mmlu/default", shots=5),
    _choice("mmlu_other", "mmlu/default", shots=5),
    _choice("mmlu_social_sciences", "mmlu/default", shots=5),
    _choice("mmlu_stem", "mmlu/default", shots=5),
    _choice("openbookqa", "openbookqa", shots=0, metric="acc_norm"),
    _choice("piqa", "piqa", shots=0, metric="acc_norm"),
    _choice("toxigen", "toxigen", shots=0),
    _choice("winogrande", "winogrande", shots=5),
)
OF_FILES: Mapping[str, Benchmark] = {
    # The questions in one file with their topics, as DeepSeek-Math's evaluation has them, and no examples to show.
    "mmlu_stem": Benchmark(
        name="mmlu_stem", task="mmlu_stem_questions", described_in=None, version=1.0, kind=Kind.choice, metric="acc",
        shots=0, folder="mmlu_stem",
    ),
}  # fmt: skip
"""What takes a benchmark's place where its questions are read from local files of another form."""


def chosen(names: Sequence[str]) -> list[Benchmark]:
    """Return the benchmarks of these names in the order of the suite; all, if none are named.

    Raises:
        ConfigError: If a name is unknown.
    """
    known = [benchmark.name for benchmark in SUITE]
    if unknown := [name for name in names if name not in known]:
        raise ConfigError(f"--benchmark {unknown[0]} is unknown; there are {', '.join(known)}.")
    return [benchmark for benchmark in SUITE if not names or benchmark.name in names]
