"""Epochs on Ray Data, on this machine: every row once, and a refusal in one line."""

from pathlib import Path

import pytest

from megatron_ads.errors import DataError
from megatron_ads.labelling.job import run_job
from tests.inference.scripted_server import Reply, scripted_server
from tests.labelling.jobs import LABELS, answer, labels_in, recipe, write_pairs

pytest.importorskip("ray.data", reason="Ray is not installed; pip install 'megatron-ads[ray]' (0.25 GB) runs this test")


@pytest.mark.timeout(300)
def test_epochs_are_labelled_by_actors_and_continue_after_a_failure(tmp_path: Path) -> None:
    pairs = write_pairs(tmp_path / "pairs.jsonl", 45)
    on_ray = ("rows_per_epoch=10", "runner=ray", "ray.workers=2", "model.attempts=1", "model.server_wait_seconds=1")
    refused = pytest.raises(DataError, match=r"5 of 5 epochs are not labelled, the first as .*404")
    with scripted_server(lambda body, times: Reply(status=404)) as server, refused:
        run_job(recipe(tmp_path, pairs, f"model.url={server.url}", *on_ray))
    with scripted_server(answer) as server:
        config = recipe(tmp_path, pairs, f"model.url={server.url}", *on_ray)
        run_job(config)
        assert len(server.bodies) == 45
    labels = labels_in(Path(config.out))
    assert [row["id"] for row in labels] == [f"p{number}" for number in range(45)]
    assert [row["label"] for row in labels] == [LABELS[number % 3] for number in range(45)]
