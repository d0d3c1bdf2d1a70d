"""The cases of ``benchmarks.run``, in their order."""

from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module

from benchmarks.speed.measure import Effort, Finding


@dataclass(frozen=True, slots=True)
class Case:
    """One process of measurements: a function that takes an ``Effort`` and yields what it finds."""

    name: str
    about: str
    """Work and reference, in words."""
    function: str
    """``module:function``."""
    quick_limit_seconds: float = 600
    """What takes longer hangs, however busy the machine is: a quick case is made to end within two minutes."""
    limit_seconds: float = 3600

    def run(self, effort: Effort) -> Iterator[Finding]:
        """Run it in this process."""
        module, function = self.function.split(":")
        found: Iterator[Finding] = getattr(import_module(module), function)(effort)
        return found


CASES = (
    Case("train-step", "training steps next to transformers'", "benchmarks.speed.training:train_step"),
    Case("products", "a step next to its matrix products alone", "benchmarks.speed.training:products"),
    Case("experts", "grouped experts next to experts one by one", "benchmarks.speed.training:experts"),
    Case("packing", "packed rows next to padded ones", "benchmarks.speed.training:packing"),
    Case("vpp", "a pipeline of four virtual stages next to one of two", "benchmarks.speed.ranks:vpp"),
    Case("conversion", "both ways next to a copy of the files", "benchmarks.speed.disk:conversion"),
    Case("checkpoint", "saved and loaded, next to its bytes written and read", "benchmarks.speed.disk:checkpoint"),
    Case("data", "rows prepared next to the tokenizer alone; how full rows are", "benchmarks.speed.rows:data"),
    Case("generation", "rollouts next to transformers' generate", "benchmarks.speed.answers:generation"),
    Case("sync", "new weights for an engine next to a copy of them", "benchmarks.speed.answers:weight_sync"),
    Case("grpo", "parts of a GRPO step next to matrix products", "benchmarks.speed.answers:grpo"),
    Case("growth", "growing models and rows next to small ones", "benchmarks.speed.training:growth"),
    Case("growth-ranks", "steps on more ranks next to matrix products on as many", "benchmarks.speed.ranks:growth"),
    Case("growth-rows", "more rows prepared, next to the tokenizer alone", "benchmarks.speed.rows:growth"),
)
