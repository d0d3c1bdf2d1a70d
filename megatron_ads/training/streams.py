"""From a recipe's `data` section to this replica's batches, to train on and to evaluate on."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from conversion.sources import WeightSource
from megatron_ads.config.data import DataConfig
from megatron_ads.config.run import RunConfig
from megatron_ads.config.training import LossConfig, ReweightConfig, TrainConfig
from megatron_ads.data.adaptive_weights import InstanceWeights
from megatron_ads.data.batches import BatchStream, HeldOut, ReplicaShare, batches_of_all
from megatron_ads.data.chat import ChatTokenizer, load_tokenizer
from megatron_ads.data.corpus import LeftOut
from megatron_ads.data.mixing import WeightedRows
from megatron_ads.errors import DataError
from megatron_ads.layout import ParallelLayout, rank
from megatron_ads.observability.log import get_logger
from megatron_ads.training.prepared_data import prepared_data

logger = get_logger(__name__)


def open_streams(
    data: DataConfig,
    train: TrainConfig,
    loss: LossConfig,
    reweight: ReweightConfig,
    source: WeightSource,
    layout: ParallelLayout,
    *,
    directory: Path,
) -> tuple[BatchStream, HeldOut]:
    """Return the endless steps of this replica, and its share of the held-out rows (none without ``evaluate_every``).

    Every rank of a replica reads the same rows: pipeline stages in the middle need the sample boundaries. They are
    prepared below ``directory`` first, unless they are there already.

    Raises:
        DataError: If a source cannot be read, or leaves no rows to train on or none to evaluate on.
    """
    tokenizer_of(source, data.template_arguments)  # whatever is wrong with it is said before rows are read
    share = ReplicaShare(
        global_batch_size=train.global_batch_size,
        micro_batch_size=train.micro_batch_size,
        dp_rank=layout.coordinates(rank()).dp,
        dp_size=layout.dp,
    )
    rows = prepared_data(
        data,
        source.side_folder,
        directory,
        by_task=reweight.tasks,
        evaluate=train.evaluate_every is not None,
    )
    _log_left_out("training", rows.left_out)
    stream = BatchStream(
        rows.training,
        share,
        seq_length=data.seq_length,
        packing=data.packing,
        seed=data.seed,
        normalize=loss.normalize,
        weights=_instance_weights(reweight, rows.training),
    )
    if train.evaluate_every is None:
        return stream, HeldOut([], [])
    _log_left_out("held-out", rows.held_out_left_out)
    held_out = list(rows.held_out)
    stream.require_held_out(held_out)
    validation = batches_of_all(
        held_out, share, seq_length=data.seq_length, packing=data.packing, normalize=loss.normalize
    )
    return stream, HeldOut(held_out, validation)


def share_of(config: RunConfig, layout: ParallelLayout) -> ReplicaShare:
    """Return how rows are divided among the replicas: as few at once as the pipeline allows, so that few are empty."""
    rows = config.train.micro_batch_size * layout.dp * (layout.pp if layout.vpp > 1 else 1)
    return ReplicaShare(
        global_batch_size=rows,
        micro_batch_size=config.train.micro_batch_size,
        dp_rank=layout.coordinates(rank()).dp,
        dp_size=layout.dp,
    )


def tokenizer_of(source: WeightSource, template_arguments: Mapping[str, Any] | None = None) -> ChatTokenizer:
    """Return the tokenizer of the weights that a job starts from.

    Raises:
        DataError: If there is none, or it has tokens that the model's embedding lacks.
    """
    tokenizer = load_tokenizer(source.side_folder, template_arguments)
    if tokenizer.size > source.shape.vocab_size:
        raise DataError(
            f"the tokenizer in {source.side_folder} has token ids up to {tokenizer.size - 1}, but the model's "
            f"embedding has {source.shape.vocab_size} rows (vocab_size). Put the model's own tokenizer there."
        )
    return tokenizer


def _log_left_out(what: str, left_out: Counter[LeftOut]) -> None:
    """Count the rows that take no part, once and not on every rank."""
    if left_out and rank() == 0:
        reasons = ", ".join(f"{count} {reason}" for reason, count in left_out.most_common())
        logger.warning("%s rows that are left out: %s", what, reasons)


def _instance_weights(config: ReweightConfig, sources: Sequence[WeightedRows]) -> InstanceWeights | None:
    if not config.instances:
        return None
    tasks = [row.task for source in sources for row in source.rows]
    return InstanceWeights(
        tasks, interval=config.interval, beta=config.beta, lowest=config.lowest, highest=config.highest
    )
