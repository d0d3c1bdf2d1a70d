"""What answers the prompts of a job, on which ranks, and how it follows the weights that are trained."""

from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_ads.config.model import Precision
from megatron_ads.config.rl import RlConfig
from megatron_ads.data.chat import ChatTokenizer
from megatron_ads.inference.engine import Engine
from megatron_ads.inference.language_model import load_model
from megatron_ads.inference.model_folder import hugging_face_folder
from megatron_ads.inference.transformers_engine import TransformersEngine
from megatron_ads.runtime.device import device
from megatron_ads.training.build import TrainedModel
from megatron_ads.training.checkpoint_errors import raised_on_all_ranks
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

    def follow(self, model: TrainedModel) -> None:
        """Give the engines the weights that are trained; a collective."""
        weights = self.sync.tensors(model.models, model.spec)
        if self.engine is not None:
            self.engine.update_weights(weights)
        else:
            for _ in weights:
                pass


@contextmanager
def open_rollout_engine(config: RlConfig, membership: Membership, tokenizer: ChatTokenizer) -> Iterator[RolloutEngine]:
    """Yield the engine of ``rollout.mode``; a collective. It holds the weights of ``model.load`` until it follows.

    Raises:
        MegatronAdsError: On every rank, if some rank cannot load the model.
    """
    ranks = tuple(range(membership.shards.layout.world))
    with raised_on_all_ranks():
        engine = _colocated(config, tokenizer)
    sync = WeightSync(membership.shards, membership.source, destinations=ranks)
    with closing(engine):
        yield RolloutEngine(engine=engine, ranks=ranks, sync=sync)


def _colocated(config: RlConfig, tokenizer: ChatTokenizer) -> TransformersEngine:
    """Return the whole model on this rank's device, in the number format that is trained; on a CPU in FP32."""
    exact = config.model.precision is Precision.fp32 or device().type == "cpu"
    with hugging_face_folder(Path(config.model.load)) as folder:
        model = load_model(folder, torch.float32 if exact else torch.bfloat16)
    return TransformersEngine(model, end_token=tokenizer.end_token_id, tokenizer=tokenizer)
