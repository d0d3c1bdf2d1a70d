"""Samples packed into one row give the gradients of the same samples run one by one."""

from typing import Any

import pytest
import torch
from torch import Tensor

from parity_tests.harness import model_jobs
from parity_tests.harness.model_jobs import Job
from parity_tests.harness.ranks import run_ranks
from tests.models.checkpoints import V3, write_checkpoint

TOLERANCE = 1e-5
"""Relative to the largest value: FP32 sums over tokens in another order."""


def _split(row: dict[str, Any]) -> list[dict[str, Any]]:
    """Return each sample of a row as a row of its own."""
    lengths = row["boundaries"].diff().tolist()
    columns = {key: row[key].split(lengths, dim=1) for key in ("tokens", "labels", "positions", "mask")}
    return [{key: parts[index] for key, parts in columns.items()} for index in range(len(lengths))]


def _gradients(job: Job, form: str) -> dict[str, Tensor]:
    (model,), shape, spec = model_jobs.build(job)
    from megatron_ads.models.weights import named_weights

    for row in model_jobs.rows(shape.vocab_size):
        if form == "one by one":
            pieces: list[tuple[dict[str, Any], Any]] = [(piece, None) for piece in _split(row)]
        elif form == "packed":
            pieces = [(row, model_jobs.packed(row))]
        else:  # as if the row were one sample
            pieces = [
                (
                    row,
                    model_jobs.packed(
                        row | {"boundaries": torch.tensor([0, model_jobs.ROW_TOKENS], dtype=torch.int32)}
                    ),
                )
            ]
        for piece, boundaries in pieces:
            arguments = {"labels": piece["labels"], "loss_mask": piece["mask"], "packed_seq_params": boundaries}
            loss = model(piece["tokens"], piece["positions"], None, **arguments)
            (loss * piece["mask"]).sum().backward()
    return {weight.name: weight.tensor.grad for weight in named_weights([model], spec) if weight.tensor.requires_grad}


@pytest.fixture(scope="module")
def one_by_one(tmp_path_factory: pytest.TempPathFactory) -> tuple[Job, dict[str, Tensor]]:
    job = Job(folder=write_checkpoint(tmp_path_factory.mktemp("packing") / "hf", V3), settings={"mtp_loss_weight": 0.3})
    (gradients,) = run_ranks(1, _gradients, job, "one by one")
    return job, gradients


def _largest_error(job: Job, form: str, expected: dict[str, Tensor]) -> float:
    (gradients,) = run_ranks(1, _gradients, job, form)
    assert gradients.keys() == expected.keys()
    return max(float((gradients[name] - full).abs().max() / full.abs().max()) for name, full in expected.items())


def test_packed_gradients_equal_those_of_the_samples_one_by_one(one_by_one: tuple[Job, dict[str, Tensor]]) -> None:
    assert _largest_error(one_by_one[0], "packed", one_by_one[1]) < TOLERANCE


def test_forgetting_the_boundaries_is_seen(one_by_one: tuple[Job, dict[str, Tensor]]) -> None:
    assert _largest_error(one_by_one[0], "one sample", one_by_one[1]) > 1000 * TOLERANCE
