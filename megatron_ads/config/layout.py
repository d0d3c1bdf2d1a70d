"""``layout``: how the ranks of a job are divided."""

from dataclasses import dataclass

from megatron_ads.architecture import ModelShape
from megatron_ads.config.checks import require, require_at_least
from megatron_ads.layout import ParallelLayout, PipelinePlacement, place_layers


@dataclass(kw_only=True, slots=True)
class LayoutConfig:
    """Parallel sizes a user chooses, in ranks; replicas (dp, edp) follow from the number of ranks launched."""

    tp: int = 1
    """Tensor parallel, attention and dense layers."""
    cp: int = 1
    """Context parallel: ranks sharing one sequence."""
    pp: int = 1
    """Pipeline stages."""
    vpp: int = 1
    """Virtual chunks per stage; 1 is no interleaving."""
    ep: int = 1
    """Expert parallel: ranks the routed experts are spread over."""
    etp: int = 1
    """Tensor parallel inside one expert."""
    pipeline: str | None = None
    """Layers of every chunk, as ``Et|(tt|)*29tmL``; None spreads them evenly."""
    first_stage_layers: int | None = None
    """Decoder layers of stage 0, where the others share the rest evenly; None is an even share."""
    last_stage_layers: int | None = None
    """Decoder layers of the last stage; None is an even share."""

    def runtime(self, world: int) -> ParallelLayout:
        """Return the layout for a job of ``world`` ranks.

        Raises:
            ConfigError: If the sizes do not divide the ranks.
        """
        return ParallelLayout(world=world, tp=self.tp, cp=self.cp, pp=self.pp, vpp=self.vpp, ep=self.ep, etp=self.etp)

    def fewest_ranks(self) -> int:
        """Return the smallest number of ranks that holds every weight once."""
        return ParallelLayout.smallest(tp=self.tp, cp=self.cp, pp=self.pp, vpp=self.vpp, ep=self.ep, etp=self.etp).world

    def placement(self, shape: ModelShape, layout: ParallelLayout) -> PipelinePlacement:
        """Return which chunk runs which layers.

        Raises:
            ConfigError: If the layers do not fit the stages.
        """
        return place_layers(
            shape,
            layout,
            pipeline=self.pipeline,
            first_stage_layers=self.first_stage_layers,
            last_stage_layers=self.last_stage_layers,
        )

    def check(self) -> None:
        """Refuse values that are impossible whatever the other sections say."""
        for name in ("first_stage_layers", "last_stage_layers"):
            require_at_least("layout", self, 0, name)
            require(
                getattr(self, name) is None or (self.pp > 1 and self.vpp == 1 and self.pipeline is None),
                f"layout.{name} is {getattr(self, name)}, which has no effect unless layout.pp > 1, layout.vpp = 1 and "
                f"layout.pipeline is null (they are {self.pp}, {self.vpp}, {self.pipeline!r}). Remove it.",
            )
