"""From a recipe's `data` section to this replica's batches, to train on and to evaluate on."""

from collections.abc import Sequence

from conversion.sources import WeightSource
from megatron_ads.config import SftConfig
from megatron_ads.data.batches import BatchStream, PackedBatch, ReplicaShare, batches_of_all
from megatron_ads.data.chat import tokenize_row
from megatron_ads.data.mixing import WeightedRows
from megatron_ads.data.rows import ChatRow, TokenizedRow
from megatron_ads.data.sources import read_source
from megatron_ads.data.split import split_by_group
from megatron_ads.data.tokenizer import ChatTokenizer, load_tokenizer
from megatron_ads.layout import ParallelLayout
from megatron_ads.observability.log import get_logger, rank

logger = get_logger(__name__)


def open_streams(
    config: SftConfig, source: WeightSource, layout: ParallelLayout
) -> tuple[BatchStream, list[PackedBatch]]:
    """Return the endless steps of this replica, and its share of the held-out rows (none without ``evaluate_every``).

    Every rank of a replica reads the same rows: pipeline stages in the middle need the sample boundaries.

    Raises:
        DataError: If a source cannot be read or leaves no rows to train on.
    """
    tokenizer = load_tokenizer(source.side_folder)
    share = ReplicaShare(
        global_batch_size=config.train.global_batch_size,
        micro_batch_size=config.train.micro_batch_size,
        dp_rank=layout.coordinates(rank()).dp,
        dp_size=layout.dp,
    )
    training, validation = _read(config, tokenizer)
    stream = BatchStream(
        training,
        share,
        seq_length=config.data.seq_length,
        packing=config.data.packing,
        seed=config.data.seed,
        normalize=config.loss.normalize,
    )
    if config.train.evaluate_every is None or not validation:
        return stream, []
    return stream, batches_of_all(
        validation,
        share,
        seq_length=config.data.seq_length,
        packing=config.data.packing,
        normalize=config.loss.normalize,
    )


def _read(config: SftConfig, tokenizer: ChatTokenizer) -> tuple[list[WeightedRows], list[TokenizedRow]]:
    """Return the sources to mix, and the held-out rows of all of them, shared out by weight."""
    total = sum(source.weight for source in config.data.sources)
    training, validation = [], []
    for source in config.data.sources:
        split = split_by_group(
            read_source(source, seed=config.data.seed),
            validation_rows=round(config.data.validation_rows * source.weight / total),
            seed=config.data.seed,
        )
        training.append(
            WeightedRows(_tokenize(split.training, tokenizer, config.data.seq_length), source.weight, source.kind)
        )
        validation += _tokenize(split.validation, tokenizer, config.data.seq_length)
    return training, validation


def _tokenize(rows: Sequence[ChatRow], tokenizer: ChatTokenizer, seq_length: int) -> list[TokenizedRow]:
    """Tokenise; rows that do not fit into ``seq_length`` are left out and counted, never cut."""
    tokenized = [tokenize_row(row, tokenizer) for row in rows]
    fitting = [row for row in tokenized if row.predictions <= seq_length]
    if dropped := len(tokenized) - len(fitting):
        logger.warning(
            "%d of %d rows are longer than data.seq_length = %d and are left out", dropped, len(rows), seq_length
        )
    return fitting
