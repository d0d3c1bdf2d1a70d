"""Batches: what a microbatch holds, that layouts only divide the rows, and exact resume."""

import hashlib
import logging
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from threading import current_thread

import numpy as np
import pytest
import torch

from megatron_ads.config.training import Normalize
from megatron_ads.data.adaptive_weights import InstanceWeights
from megatron_ads.data.batches import BatchStream, ReplicaShare, batches_of_all
from megatron_ads.data.mixing import WeightedRows
from megatron_ads.data.packed_batch import PackedBatch
from megatron_ads.errors import ConfigError, DataError
from megatron_ads.observability.metrics import MetricsWriter
from megatron_ads.rows import TokenizedRow
from tests.data.rows import row, rows

SEQ_LENGTH = 32


def stream(
    *, dp_rank: int = 0, dp_size: int = 1, micro: int = 2, packing: bool = True, seed: int = 0, count: int = 60
) -> BatchStream:
    sources = [WeightedRows(rows(count), 2.0), WeightedRows(rows(20, prefix="s"), 1.0)]
    share = ReplicaShare(global_batch_size=8, micro_batch_size=micro, dp_rank=dp_rank, dp_size=dp_size)
    return BatchStream(sources, share, seq_length=SEQ_LENGTH, packing=packing, seed=seed)


def samples_of(batch: PackedBatch) -> list[tuple[list[int], list[int], list[int], list[float]]]:
    """Return tokens, labels, positions and weights of each stretch between boundaries."""
    flat = [
        tensor.flatten().tolist() for tensor in (batch.tokens_BS, batch.labels_BS, batch.positions_BS, batch.mask_BS)
    ]
    bounds = batch.cu_seqlens.tolist()
    return [
        tuple(values[start:stop] for values in flat)  # type: ignore[misc]
        for start, stop in pairwise(bounds)
    ]


def collate_rows(samples: list[list[TokenizedRow]], *, seq_length: int, normalize: Normalize) -> PackedBatch:
    """Collate rows given by their samples; these are the whole step."""
    numbers = iter(range(sum(len(row) for row in samples)))
    places = [[next(numbers) for _ in row] for row in samples]
    return PackedBatch.of([each for row in samples for each in row], places, seq_length=seq_length, normalize=normalize)


def rows_of(step: list[PackedBatch]) -> list[list[int]]:
    return [tokens for batch in step for tokens in batch.tokens_BS.tolist()]


def equal(first: list[PackedBatch], second: list[PackedBatch]) -> bool:
    names = ("tokens_BS", "labels_BS", "positions_BS", "mask_BS", "cu_seqlens")
    return len(first) == len(second) and all(
        torch.equal(getattr(a, name), getattr(b, name)) for a, b in zip(first, second, strict=True) for name in names
    )


def test_a_row_holds_whole_samples_with_shifted_labels_then_padding():
    # Two samples of 4 and 3 tokens predict 3 and 2: 5 of 8 positions. The prompt of the first is 2 tokens.
    batch = collate_rows(
        [[row("a", 4, first=10, prompt=2), row("b", 3, first=20, prompt=1, weight=0.5)]],
        seq_length=8,
        normalize=Normalize.token,
    )
    assert batch.tokens_BS.tolist() == [[10, 11, 12, 20, 21, 0, 0, 0]]
    assert batch.labels_BS.tolist() == [[11, 12, 13, 21, 22, 0, 0, 0]]
    assert batch.positions_BS.tolist() == [[0, 1, 2, 0, 1, 0, 1, 2]]
    assert batch.mask_BS.tolist() == [[0, 1, 1, 0.5, 0.5, 0, 0, 0]]
    assert batch.cu_seqlens.tolist() == [0, 3, 5, 8]
    assert (batch.sample_count, batch.token_count, batch.target_count, batch.normalizer) == (2, 5, 4, 4)


def test_boundaries_of_several_rows_count_on():
    batch = collate_rows([[row("a", 4)], [row("b", 9)], []], seq_length=8, normalize=Normalize.token)
    assert batch.cu_seqlens.tolist() == [0, 3, 8, 16, 24]  # row 0: sample, padding; row 1 is full; row 2: padding
    assert batch.cu_seqlens.dtype is torch.int32


def test_per_sample_every_sample_weighs_the_same_whatever_its_length():
    # 2 targets of weight 1/2 and 6 of weight 1/6: each sums to its sample's weight, 1 and 0.5.
    batch = collate_rows(
        [[row("a", 4, prompt=2), row("b", 8, prompt=2, weight=0.5)]], seq_length=16, normalize=Normalize.sample
    )
    assert batch.mask_BS[0, :3].sum() == pytest.approx(1.0)
    assert batch.mask_BS[0, 3:10].sum() == pytest.approx(0.5)
    assert (batch.normalizer, batch.target_count) == (2, 8)


def test_a_sample_without_targets_is_not_counted_per_sample():
    batch = collate_rows([[row("a", 4, prompt=4), row("b", 4)]], seq_length=8, normalize=Normalize.sample)
    assert (batch.normalizer, batch.sample_count) == (1, 2)


@pytest.mark.parametrize(("dp_size", "micro"), [(1, 1), (1, 8), (2, 2), (4, 1), (8, 1)], ids=str)
def test_replicas_and_microbatches_only_divide_the_rows_of_a_step(dp_size: int, micro: int):
    reference = stream()
    replicas = [stream(dp_rank=rank, dp_size=dp_size, micro=micro) for rank in range(dp_size)]
    for _ in range(5):
        expected = sorted(rows_of(reference.next_step()))
        steps = [replica.next_step() for replica in replicas]
        assert sorted(tokens for step in steps for tokens in rows_of(step)) == expected
        assert {len(step) for step in steps} == {8 // (dp_size * micro)}
        states = [replica.state_dict() for replica in replicas]
        assert all(state == reference.state_dict() for state in states)


def test_no_sample_is_split_lost_or_repeated_within_an_epoch():
    one_source = [WeightedRows(rows(60))]
    share = ReplicaShare(global_batch_size=4, micro_batch_size=4, dp_rank=0, dp_size=1)
    source = BatchStream(one_source, share, seq_length=SEQ_LENGTH, packing=True, seed=0)
    whole = {tuple(sample.tokens[:-1].tolist()) for sample in rows(60)}
    seen: list[tuple[int, ...]] = []
    while len(seen) < 60:
        for batch in source.next_step():
            seen += [tuple(tokens) for tokens, *_ in samples_of(batch) if tokens[0]]
    assert set(seen[:60]) == whole
    assert source.state_dict()["drawn"] == [len(seen)]


def test_packing_fills_more_than_one_sample_a_row():
    packed = stream().next_step()
    single = stream(packing=False).next_step()
    positions = 8 * SEQ_LENGTH
    assert sum(batch.token_count for batch in packed) > 0.85 * positions > sum(batch.token_count for batch in single)
    assert sum(batch.sample_count for batch in single) == 8


@pytest.mark.parametrize("packing", [True, False])
def test_resume_goes_on_exactly_where_it_was(packing: bool):
    uninterrupted = stream(packing=packing)
    for _ in range(7):
        uninterrupted.next_step()
    state = uninterrupted.state_dict()
    resumed = stream(packing=packing)
    resumed.load_state_dict(state)
    for _ in range(20):  # over the end of an epoch
        assert equal(resumed.next_step(), uninterrupted.next_step())


def test_resume_on_another_layout_has_the_same_steps():
    before = stream()
    before.next_step()
    halves = [stream(dp_rank=rank, dp_size=2, micro=1) for rank in range(2)]
    for half in halves:
        half.load_state_dict(before.state_dict())
    together = sorted(tokens for half in halves for tokens in rows_of(half.next_step()))
    assert together == sorted(rows_of(before.next_step()))


def test_state_is_a_few_numbers_whatever_the_rows():
    started = stream()
    started.next_step()
    state = started.state_dict()
    numbers = {"drawn", "drawn_before", "shares", "source_weights", "rows", "seed"}
    assert state.keys() == numbers | {"contents"}
    assert state["rows"] == [60, 20] and all(type(number) is int for number in state["drawn"])
    assert [len(digest) for digest in state["contents"]] == [64, 64]


@pytest.mark.parametrize(("other", "named"), [({"seed": 1}, "seed 0"), ({"count": 61}, r"rows \[60, 20\]")])
def test_a_state_of_other_data_is_refused(other: dict[str, int], named: str):
    state = stream().state_dict()
    with pytest.raises(DataError, match=named):
        stream(**other).load_state_dict(state)  # type: ignore[arg-type]


def _of(*sources: WeightedRows) -> BatchStream:
    share = ReplicaShare(global_batch_size=8, micro_batch_size=2, dp_rank=0, dp_size=1)
    return BatchStream(sources, share, seq_length=SEQ_LENGTH, packing=True, seed=0)


FIRST, SECOND = rows(20), rows(20, prefix="s")


def _older_content(rows: list[TokenizedRow]) -> bytes:
    """Return what earlier checkpoints had the digest of."""
    parts = [
        part
        for row in rows
        for part in (f"{row.id}\0{row.task}".encode(), row.tokens.tobytes(), row.loss_weights.tobytes())
    ]
    return b"".join(len(part).to_bytes(8, "little") + part for part in parts)


def _changed(**fields: object) -> list[TokenizedRow]:
    return [*FIRST[:-1], replace(FIRST[-1], **fields)]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("first", "second", "named"),
    [
        (_changed(id="another"), SECOND, "other content in source 0, counted"),
        (_changed(task="another"), SECOND, "other content in source 0, counted"),
        (_changed(tokens=FIRST[-1].tokens + 1), SECOND, "other content in source 0, counted"),
        (_changed(loss_weights=FIRST[-1].loss_weights * 2), SECOND, "other content in source 0, counted"),
        (FIRST[::-1], SECOND[::-1], "other content in sources 0, 1, counted"),
        (SECOND, FIRST, "the same sources in another order"),
    ],
)
def test_rows_of_another_content_are_refused_though_they_are_as_many(
    first: list[TokenizedRow], second: list[TokenizedRow], named: str
) -> None:
    state = _of(WeightedRows(FIRST), WeightedRows(SECOND)).state_dict()
    _of(WeightedRows(FIRST, name="moved elsewhere"), WeightedRows(list(SECOND))).load_state_dict(state)
    other = _of(WeightedRows(first), WeightedRows(second))
    with pytest.raises(DataError, match=f"was made with data of {named}.*start anew with another checkpoint.dir"):
        other.load_state_dict(state)
    del state["contents"]  # of an older checkpoint
    other.load_state_dict(state)
    state["digests"] = [hashlib.sha256(_older_content(each)).hexdigest() for each in (FIRST, SECOND)]
    _of(WeightedRows(FIRST), WeightedRows(SECOND)).load_state_dict(state)
    with pytest.raises(DataError, match=f"was made with data of {named}"):
        other.load_state_dict(state)


@pytest.mark.parametrize("older", [False, True])
def test_a_weight_that_has_changed_holds_from_the_resumption_on(older: bool, caplog: pytest.LogCaptureFixture) -> None:
    before = _of(WeightedRows(FIRST), WeightedRows(SECOND))
    for _ in range(5):
        before.next_step()
    state = before.state_dict()
    if older:
        del state["source_weights"], state["contents"]
    after = _of(WeightedRows(FIRST, 3.0, "a"), WeightedRows(SECOND, 1.0, "b"))
    with caplog.at_level(logging.INFO):
        after.load_state_dict(state)
    assert "the sources' weights have changed, and hold from here on: a 0.5 -> 0.75 of the samples, b" in caplog.text
    drawn = [0, 0]
    for _ in range(20):
        after.next_step()
    drawn = [now - then for now, then in zip(after.state_dict()["drawn"], state["drawn"], strict=True)]
    assert drawn[0] == pytest.approx(3 * drawn[1], abs=4)  # at once, and without making up for the past
    caplog.clear()
    same = _of(WeightedRows(FIRST, 2.0), WeightedRows(SECOND, 2.0))  # the same shares
    with caplog.at_level(logging.INFO):
        same.load_state_dict(state)
    assert caplog.text == "" and equal(same.next_step(), before.next_step())


def test_another_seed_gives_another_order():
    assert not equal(stream().next_step(), stream(seed=1).next_step())


def test_a_row_that_is_too_long_is_named():
    share = ReplicaShare(global_batch_size=1, micro_batch_size=1, dp_rank=0, dp_size=1)
    fits, too_long = row("fits", SEQ_LENGTH + 1), row("long", SEQ_LENGTH + 2)
    BatchStream([WeightedRows([fits])], share, seq_length=SEQ_LENGTH, packing=True, seed=0).next_step()
    with pytest.raises(DataError, match=r"'long' needs 33 positions, data\.seq_length is 32"):
        BatchStream([WeightedRows([fits, too_long])], share, seq_length=SEQ_LENGTH, packing=True, seed=0)


def test_rows_that_do_not_divide_are_refused_with_the_numbers():
    with pytest.raises(ConfigError, match=r"= 6 rows do not divide into .* = 2 \* 2 = 4"):
        ReplicaShare(global_batch_size=6, micro_batch_size=2, dp_rank=0, dp_size=2)


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("dp_size", [1, 2])
def test_one_pass_has_every_row_once_and_as_many_microbatches_on_every_replica(packing: bool, dp_size: int):
    all_rows = rows(21)
    per_replica = [
        batches_of_all(all_rows, ReplicaShare(4, 2, rank, dp_size), seq_length=SEQ_LENGTH, packing=packing)
        for rank in range(dp_size)
    ]
    assert len({len(batches) for batches in per_replica}) == 1
    seen = sorted(
        tokens for batches in per_replica for batch in batches for tokens, *_ in samples_of(batch) if tokens[0]
    )
    assert seen == sorted(sample.tokens[:-1].tolist() for sample in all_rows)
    targets = sum(int((sample.loss_weights[1:] > 0).sum()) for sample in all_rows)
    assert sum(batch.normalizer for batches in per_replica for batch in batches) == targets


def test_weights_are_those_of_the_labels_not_of_the_inputs():
    sample = row("a", 5, prompt=2)
    batch = collate_rows([[sample]], seq_length=4, normalize=Normalize.token)
    weights = dict(zip(batch.labels_BS[0].tolist(), batch.mask_BS[0].tolist(), strict=True))
    assert weights == dict(zip(sample.tokens[1:].tolist(), sample.loss_weights[1:].tolist(), strict=True))
    assert np.count_nonzero(sample.loss_weights) == 3


def weighted_stream(dp_rank: int = 0, dp_size: int = 1) -> BatchStream:
    share = ReplicaShare(global_batch_size=8, micro_batch_size=2, dp_rank=dp_rank, dp_size=dp_size)
    weights = InstanceWeights(["test"] * 20, interval=1, beta=1.0, lowest=0.1, highest=10.0)
    return BatchStream([WeightedRows(rows(20))], share, seq_length=SEQ_LENGTH, packing=True, seed=0, weights=weights)


def test_each_label_is_multiplied_by_the_weight_of_its_sample():
    source = weighted_stream()
    sizes = {number: sample.target_count for number, sample in enumerate(rows(20))}
    weights = [1.0] * 20
    for step in range(5):
        seen = []
        for batch in source.next_step():
            for tokens, _, _, mask in samples_of(batch):
                if tokens[0]:  # else padding
                    seen.append(tokens[0] // 1000 - 1)
                    assert [weight for weight in mask if weight] == pytest.approx([weights[seen[-1]]] * sizes[seen[-1]])
        drawn = [draw.number for draw in source._step]
        assert sorted(drawn) == sorted(seen)
        source.observe([sizes[number] * math.log(step + 2) for number in drawn])
        if source.weights_are_due:
            source.renew_weights()
        assert source._weights is not None
        weights = source._weights.of(range(20)).tolist()
    assert len(set(weights)) > 1


def test_what_the_samples_say_has_documented_names(tmp_path: Path):
    source = weighted_stream()
    source.next_step()
    # Half of the sample's tokens are targets; a loss of ln 2 on each is the mean of the only task, "test".
    losses = source.observe([draw.row.target_count * math.log(2) for draw in source._step])
    assert losses == {"test": pytest.approx(math.log(2))}
    metrics = {f"loss/{task}": loss for task, loss in losses.items()} | source.renew_weights()
    assert (metrics["instance_weight_p10/test"], metrics["instance_weight_p90/test"]) == (1, 1)
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        writer.write(1, metrics)


def test_a_checkpoint_with_instance_weights_and_a_job_without_are_told_apart():
    with pytest.raises(DataError, match="made with instance weights"):
        plain = BatchStream(
            [WeightedRows(rows(20))], ReplicaShare(8, 2, 0, 1), seq_length=SEQ_LENGTH, packing=True, seed=0
        )
        plain.load_state_dict(weighted_stream().state_dict())


def test_a_task_without_held_out_rows_is_refused_before_the_first_step():
    source = BatchStream(
        [WeightedRows(rows(20), adaptive_task="profile")],
        ReplicaShare(8, 2, 0, 1),
        seq_length=SEQ_LENGTH,
        packing=True,
        seed=0,
    )
    with pytest.raises(DataError, match=r"there are none of profile\. Raise data\.validation_rows"):
        source.require_held_out(rows(5))  # of task "test"


def test_the_step_drawn_ahead_is_not_in_the_state_and_is_drawn_anew_when_shares_change():
    def of_tasks() -> BatchStream:
        sources = [WeightedRows(rows(40, prefix=task), 1.0, task, adaptive_task=task) for task in ("a", "b")]
        return BatchStream(sources, ReplicaShare(8, 2, 0, 1), seq_length=SEQ_LENGTH, packing=True, seed=0)

    ahead, alone = of_tasks(), of_tasks()
    ahead.next_step()
    assert ahead._ahead is not None
    ahead._ahead.result()  # it has changed the counts of the mixture by now
    state = ahead.state_dict()
    assert sum(state["drawn"]) == len(ahead._step) < sum(ahead._mixture.drawn)
    alone.load_state_dict(state)
    metrics = {"a": 0.9, "b": 0.1}
    assert ahead.adapt(metrics, alpha=1.0) == alone.adapt(metrics, alpha=1.0)
    assert equal(ahead.next_step(), alone.next_step())
    assert len(ahead._step) > 0 and sum(draw.source for draw in ahead._step) > 0.8 * len(ahead._step)  # most are of b


def test_an_error_while_drawing_ahead_is_raised_by_the_step_that_needs_it(monkeypatch: pytest.MonkeyPatch):
    source = stream()
    source.next_step()
    assert source._ahead is not None
    source._ahead.result()
    source._rewind()
    monkeypatch.setattr(source._mixture, "draw", lambda: 1 / 0)
    source._ahead = source._thread.submit(source._draw_step)
    with pytest.raises(ZeroDivisionError):
        source.next_step()


def test_the_thread_that_draws_ahead_works_on_the_gpu_of_its_rank(monkeypatch: pytest.MonkeyPatch):
    calls: list[tuple[str, object]] = []
    monkeypatch.setattr("megatron_ads.runtime.device.device", lambda: torch.device("cuda", 3))
    monkeypatch.setattr("megatron_ads.data.batches.device", lambda: torch.device("cuda", 3))
    monkeypatch.setattr("torch.cuda.set_device", lambda device: calls.append((current_thread().name, device)))
    monkeypatch.setattr(PackedBatch, "pinned", lambda batch: batch)
    source = stream()
    source.next_step()
    source.next_step()
    assert calls == [("batches_0", torch.device("cuda", 3))]
