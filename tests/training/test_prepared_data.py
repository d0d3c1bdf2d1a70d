"""One rank of a node prepares the rows; the others get the same ones, its error, or an error that names it."""

import json
import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import torch.distributed as dist

from megatron_ads.config.data import DataConfig, SourceConfig, SourceKind
from megatron_ads.data.demo_tokenizer import write_tokenizer
from megatron_ads.errors import DataError
from megatron_ads.training import prepared_data as module
from megatron_ads.training.prepared_data import prepared_data


@pytest.fixture
def node(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Act as a job of two ranks whose store is in memory; returned is what chooses the rank to be."""
    store = dist.HashStore()
    monkeypatch.setattr(module, "job_store", lambda purpose: store)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)

    def be(rank: str) -> None:
        monkeypatch.setenv("LOCAL_RANK", rank)
        monkeypatch.setattr(dist, "get_rank", lambda: int(os.environ["LOCAL_RANK"]))

    return be


def rows_of(folder: Path, data: DataConfig) -> list[str]:
    write_tokenizer(folder, 1024)
    found = prepared_data(data, folder, folder / "prepared", by_task=False, evaluate=False)
    return [row.id for row in found.training[0].rows]


def test_the_second_rank_reads_what_the_first_has_prepared(
    node: Callable[[str], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = DataConfig(sources=[SourceConfig(kind=SourceKind.builtin, rows=20)], seq_length=512)
    node("0")
    first = rows_of(tmp_path, data)
    node("1")
    monkeypatch.setattr(module, "prepare", lambda *_, **__: pytest.fail("the second rank prepares"))
    assert rows_of(tmp_path, data) == first == [f"builtin-{number}" for number in range(20)]


def test_what_stops_the_first_rank_stops_the_second_with_the_same_message(
    node: Callable[[str], None], tmp_path: Path
) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"messages": []}), encoding="utf-8")
    data = DataConfig(sources=[SourceConfig(kind=SourceKind.jsonl, path=str(file))])
    messages = []
    for rank in "01":
        node(rank)
        with pytest.raises(DataError, match=r"row 1: no_target") as error:
            rows_of(tmp_path, data)
        messages.append(str(error.value))
    assert messages[0] == messages[1]


def test_the_second_rank_does_not_wait_for_a_first_one_that_ended_in_a_way_nobody_foresaw(
    node: Callable[[str], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise KeyError("unforeseen")

    monkeypatch.setattr(module, "prepare", fail)
    node("0")
    with pytest.raises(KeyError):
        rows_of(tmp_path, DataConfig())
    node("1")
    with pytest.raises(DataError, match=r"rank 0, which prepares the rows, ended: KeyError: 'unforeseen'"):
        rows_of(tmp_path, DataConfig(prepare_timeout_seconds=0.3))


def test_waiting_for_another_node_that_makes_progress_is_progress(
    node: Callable[[str], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wait(*_: object, on_wait: Callable[[int], None], **__: object) -> None:
        on_wait(7)
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "prepare", wait)
    store = module.job_store("prepared data")
    node("0")
    with pytest.raises(KeyboardInterrupt):
        rows_of(tmp_path, DataConfig())
    assert store.get(f"{socket.gethostname()}/advanced") == b"7"


def test_a_first_rank_that_makes_no_progress_is_named(node: Callable[[str], None], tmp_path: Path) -> None:
    node("1")
    data = DataConfig(sources=[SourceConfig(kind=SourceKind.builtin, rows=20)], prepare_timeout_seconds=0.3)
    with pytest.raises(DataError, match=r"rank 1 waits for the first rank on .*no progress for 0 s .*no portions"):
        rows_of(tmp_path, data)
