"""What answers the prompts of a job, on which ranks, and how it follows the weights that are trained."""

from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_ads.config.model import Precision
from megatron_ads.config.rl import RlConfig, RolloutMode
from megatron_ads.data.chat import ChatTokenizer
from megatron_ads.inference.engine import Engine
from megatron_ads.inference.language_model import load_model
from megatron_ads.inference.model_folder import hugging_face_folder
from megatron_ads.inference.server_pool import Probe, ServerPool
from megatron_ads.inference.transformers_engine import TransformersEngine
from megatron_ads.journal import Journal
from megatron_ads.runtime.device import device
from megatron_ads.training.build import TrainedModel
from megatron_ads.training.checkpoint_errors import raised_on_all_ranks, raised_once_all_are_done
from megatron_ads.training.session import Membership
from megatron_ads.training.weight_sync import WeightSync


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutEngine:
    """This rank's engine, and how it gets weights."""

    engine: Engine | None
    """None on a rank that does not generate."""
    ranks: tuple[int, ...]
    """Those that generate."""
    sync: WeightSync
    longest_wait_seconds: float
    """Of the first rank to have new weights, for the last."""

    def follow(self, model: TrainedModel) -> None:
        """Give the engines the weights that are trained; a collective.

        Raises:
            MegatronAdsError: On every rank, if an engine does not take them.
        """
        weights = self.sync.tensors(model.models, model.spec)
        with raised_once_all_are_done("give their engines new weights", self.longest_wait_seconds):
            try:
                if self.engine is not None:
                    self.engine.update_weights(weights)
            finally:
                for _ in weights:  # a collective: where one rank left it, the others would wait in it
                    pass

    def gap(self, probe: Probe) -> float:
        """Return the mean difference in nats between this rank's engine, or the worst server, and a probe.

        A collective: while a server is restarted, no rank waits in a communication.

        Raises:
            DataError: On every rank, if no server answers, or one has the wrong weights.
        """
        with raised_once_all_are_done("compare their engines with the trainer", self.longest_wait_seconds):
            if isinstance(self.engine, ServerPool):
                return self.engine.require_agreement(probe)
            if self.engine is None:
                return 0.0
            return probe.gap(self.engine.log_probabilities(probe.prompts, probe.answers))

    def metrics(self) -> dict[str, float]:
        """Return what the rank that asks servers has to say of them."""
        return {"rollout/server_losses": self.engine.servers.losses} if isinstance(self.engine, ServerPool) else {}

    def stop(self) -> None:
        """Have servers be asked nothing more, from any thread: what waits for them raises."""
        if isinstance(self.engine, ServerPool):
            self.engine.stop()

    def name_weights(self, name: str) -> None:
        """Say what the engines' weights are called; servers' answers are kept under it."""
        if isinstance(self.engine, ServerPool):
            self.engine.name_weights(name)


@contextmanager
def open_rollout_engine(
    config: RlConfig, membership: Membership, tokenizer: ChatTokenizer, journal: Journal
) -> Iterator[RolloutEngine]:
    """Yield the engine of ``rollout.mode``; a collective. It holds the weights of ``model.load`` until it follows.

    Servers are asked by rank 0 alone, which keeps every answer in its ``journal``.

    Raises:
        MegatronAdsError: On every rank, if some rank cannot load the model.
    """
    by_servers = config.rollout.mode is RolloutMode.servers
    ranks = (0,) if by_servers else tuple(range(membership.shards.layout.world))
    engine: Engine | None = None
    with raised_on_all_ranks():
        if by_servers and dist.get_rank() == 0:
            folder = Path(config.log.dir) / "rollouts" / "weights"
            engine = ServerPool(config.rollout, membership.source, folder, journal)
        elif not by_servers:
            engine = _colocated(config, tokenizer)
    sync = WeightSync(membership.shards, membership.source, destinations=ranks)
    patience = config.runtime.load_timeout_seconds
    with nullcontext() if engine is None else closing(engine):
        yield RolloutEngine(engine=engine, ranks=ranks, sync=sync, longest_wait_seconds=patience)


def _colocated(config: RlConfig, tokenizer: ChatTokenizer) -> TransformersEngine:
    """Return the whole model on this rank's device, in the number format that is trained; on a CPU in FP32."""
    exact = config.model.precision is Precision.fp32 or device().type == "cpu"
    with hugging_face_folder(Path(config.model.load), takes_weights=True) as folder:
        model = load_model(folder, torch.float32 if exact else torch.bfloat16)
    return TransformersEngine(model, end_token=tokenizer.end_token_id, tokenizer=tokenizer)
