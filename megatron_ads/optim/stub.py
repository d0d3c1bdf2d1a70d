"""The stub optimizer: what takes part for a rank without parameters of a kind, so that no other rank waits for it."""

from torch import Tensor
from torch.distributed import all_reduce

from megatron_ads.optim.members import gradient_statistics


class StubOptimizer:
    """The member of a rank that trains no parameter of its kind: no routed experts, above all.

    In the reference layout (31 stages x 8 ranks) the first pipeline stage holds the embedding and dense layers only.
    Its ranks have nothing for an expert optimizer to update, yet every collective the expert optimizer makes over the
    whole job waits for them: the gradient statistics of each step, the agreement on the number of updates, and the
    saving and loading of checkpoints. A rank that leaves one out hangs the others (AdNanny, arXiv, section 4.1: "stub
    MoE optimizer"). Where adapters of routed experts are all that is trained, the same is true of what is no expert.

    It counts updates like the real one: with rank 0 on an expert-less stage, it is this count that a checkpoint's
    common state records for the experts of all ranks.
    """

    def __init__(self, kind: str, group_names: tuple[str, ...]) -> None:
        self.kind = kind
        self.updates = 0
        self._group_names = group_names

    def prepare_gradients(self) -> None:
        """Nothing to prepare, and no collective elsewhere."""

    def reduce_statistics(self) -> Tensor:
        """Add nothing to the statistics; receive their sum."""
        statistics = gradient_statistics([])
        all_reduce(statistics)
        return statistics

    def counted_gradients(self) -> list[Tensor]:
        """Return none."""
        return []

    def scale_gradients(self, factor: float) -> None:
        """Nothing to scale, and no collective elsewhere."""

    def update(self, learning_rate: float) -> None:
        """Count the update."""
        self.updates += 1

    def group_keys(self) -> tuple[tuple[str, int], ...]:
        """Return the groups' names, each with 0 parameters."""
        return tuple((name, 0) for name in self._group_names)
