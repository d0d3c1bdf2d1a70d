"""Epochs on Ray Data: each is one record of a data set, and actors with connections of their own label them.

What is complete is on disk, under the epoch's name, so that a job that was killed begins with the others; Ray's own
checkpoints add nothing to that. The folder must be one that all nodes see.
"""

import json
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from megatron_ads.config.labelling import LabelConfig
from megatron_ads.errors import ConfigError, DataError


class EpochActor:
    """One actor: a labeller, and the job's folder."""

    def __init__(self, settings: str, out: str) -> None:
        """Open the model; ``settings`` is the job's recipe as JSON."""
        from megatron_ads.labelling.labeller import open_labeller
        from megatron_ads.labelling.question_store import QuestionStore

        merged = OmegaConf.merge(OmegaConf.structured(LabelConfig), json.loads(settings))
        config = OmegaConf.to_object(merged)
        assert isinstance(config, LabelConfig)
        self._stack = ExitStack()
        self._labeller = self._stack.enter_context(open_labeller(config))
        self._out, self._store = Path(out), QuestionStore(Path(out), config)

    def __call__(self, record: dict[str, Any]) -> dict[str, Any]:
        """Label one epoch."""
        from megatron_ads.labelling.job import label_epoch

        epoch = int(record["epoch"])
        return {"epoch": epoch, "rows": label_epoch(self._out, self._store, epoch, self._labeller)}


def label_on_ray(out: Path, config: LabelConfig, epochs: Sequence[int]) -> None:
    """Label the epochs that wait.

    Raises:
        ConfigError: If Ray is not installed.
        DataError: If an epoch could not be labelled; the others are kept.
    """
    try:
        import ray
        import ray.data
        from ray.exceptions import RayError
    except ImportError as error:
        raise ConfigError(
            f"runner is ray, which is not installed ({error}): pip install 'megatron-ads[ray]', or runner=local."
        ) from None
    if not epochs:
        return
    local = {"num_cpus": config.ray.workers, "_node_ip_address": "127.0.0.1", "include_dashboard": False}
    ray.init(**({"address": config.ray.address} if config.ray.address else local), log_to_driver=False)
    try:
        asked = ray.data.from_items([{"epoch": epoch} for epoch in epochs], override_num_blocks=len(epochs))
        done = asked.map(
            EpochActor,
            fn_constructor_args=(json.dumps(asdict(config)), str(out.absolute())),
            concurrency=min(config.ray.workers, len(epochs)),
        )
        done.materialize()
    except RayError as error:
        cause = getattr(error, "cause", None) or error
        raise DataError(f"an epoch could not be labelled ({cause}). Start again: finished epochs are kept.") from None
    finally:
        ray.shutdown()
