"""What a model said of users, as features of a ranking model: the record, how it is made, and its Parquet file.

One row for a user and an anchor: predicted advertisers and interests, product-quantised codes of the whole answer, and
the recent events of the user of whom the most similar thing was said.

Source: advertiser paper, section 3.6.2; Taiji, section 2.4.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from conversion.atomic_file import write_small
from megatron_ads.config.downstream import DownstreamConfig, FeatureConfig
from megatron_ads.downstream.examples import Place, held_out, place_at
from megatron_ads.downstream.logs import Logs
from megatron_ads.downstream.product_codes import embed_answers, product_codes
from megatron_ads.downstream.similar_users import most_similar, recent_events
from megatron_ads.downstream.user_answers import UserAnswer
from megatron_ads.errors import DataError, one_line

SCHEMA = pa.schema(
    [
        ("user", pa.string()), ("anchor", pa.timestamp("us", tz="UTC")), ("advertisers", pa.list_(pa.string())),
        ("interests", pa.list_(pa.string())), ("codes", pa.list_(pa.int32())), ("similar_user", pa.string()),
        ("similar_events", pa.list_(pa.string())),
    ]
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class UserFeatures:
    """Features of one user at one anchor."""

    user: str
    anchor: int
    """Whole seconds since 1970."""
    advertisers: tuple[str, ...] = ()
    """Predicted, the likeliest first."""
    interests: tuple[str, ...] = ()
    codes: tuple[int, ...] = ()
    """One of each part of the answer's vector; none if there was no answer that could be read."""
    similar_user: str | None = None
    similar_events: tuple[str, ...] = ()
    """What that user did before the anchor, the newest first."""


def make_features(
    answers: Sequence[UserAnswer], logs: Logs, pipeline: DownstreamConfig, config: FeatureConfig
) -> list[UserFeatures]:
    """Return the features of each answer, in order.

    Nothing is fitted to what was said of users that the pipeline holds out.

    Raises:
        ConfigError: If faiss is not installed, or the encoder cannot be loaded.
        DataError: If the logs have no such user, or there are too few answers for the codes.
    """
    if unknown := [one.user for one in answers if one.user not in logs.events]:
        raise DataError(
            f"The logs have no events of {len(unknown)} users that were answered about, such as {unknown[0]!r:.80}. "
            "Name the logs that the rows were written from."
        )
    learned = [not held_out(one.user, pipeline) for one in answers]
    vector_ND = embed_answers(
        [one.lines for one in answers], learned, encoder=config.encoder, dimensions=config.dimensions
    )
    codes = product_codes(vector_ND, learned, parts=config.parts, bits=config.bits, seed=config.seed)
    others = most_similar(vector_ND, [one.user for one in answers], [one.anchor for one in answers])
    made = []
    for one, of_one, other in zip(answers, codes, others, strict=True):
        similar = None if other is None else answers[other].user
        events = logs.events[similar] if similar is not None else ()
        made.append(
            UserFeatures(
                user=one.user,
                anchor=one.anchor,
                advertisers=one.advertisers,
                interests=one.interests,
                codes=of_one,
                similar_user=similar,
                similar_events=recent_events(events, before=one.anchor, most=config.events),
            )
        )
    return made


def write_features(file: Path, features: Sequence[UserFeatures]) -> None:
    """Write a Parquet file of ``SCHEMA``, whole or not at all."""
    rows = [asdict(one) | {"anchor": datetime.fromtimestamp(one.anchor, UTC)} for one in features]
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows, SCHEMA), sink, compression="zstd")
    write_small(file, sink.getvalue().to_pybytes())


def read_features(file: Path) -> dict[Place, UserFeatures]:
    """Return the features in a file by user and anchor.

    Raises:
        DataError: If it is no such file, or has a user and anchor twice.
    """
    try:
        with file.open("rb") as opened:
            table = pq.read_table(opened, columns=SCHEMA.names).cast(SCHEMA)
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        raise DataError(
            f"{file} holds no features ({one_line(error)}). Write them with `megatron-ads downstream features`."
        ) from None
    found: dict[Place, UserFeatures] = {}
    names = [field.name for field in fields(UserFeatures)]
    for row in table.to_pylist():
        lists = {name: tuple(value or ()) for name, value in row.items() if isinstance(value, list | None)}
        place = dict(zip(("user", "anchor"), place_at(row["user"], row["anchor"].timestamp()), strict=True))
        values = {**row, **lists, "similar_user": row["similar_user"], **place}
        one = UserFeatures(**{name: values[name] for name in names})
        if (one.user, one.anchor) in found:
            raise DataError(f"{file} has features of {one.user!r:.80} at {row['anchor']} twice. Remove one of them.")
        found[one.user, one.anchor] = one
    if not found:
        raise DataError(f"{file} has no rows. Write features with `megatron-ads downstream features`.")
    return found
