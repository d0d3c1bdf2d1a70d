"""A step with another objective, and log-probabilities and entropies of every label, under several layouts."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_ads.data.batches import ReplicaShare, batches_of_all
from megatron_ads.errors import ConfigError
from megatron_ads.layout import ParallelLayout
from megatron_ads.losses.loss import Loss, LossValues, TokenValues
from megatron_ads.rows import TokenizedRow
from parity_tests.harness.ranks import run_ranks
from parity_tests.harness.training_jobs import Recipe, start
from tests.models.checkpoints import V3, write_checkpoint

LAYOUTS = {
    "one": (1, {}),
    "dp2": (2, {}),
    "pp2-ep2": (4, {"pp": 2, "ep": 2}),
    "tp2": (2, {"tp": 2, "etp": 2}),
    "pp2-vpp2": (2, {"pp": 2, "vpp": 2}),
}
SEQ_LENGTH = 24


def samples() -> list[TokenizedRow]:
    """Return seven rows of many lengths; a prompt weighs nothing."""
    draw, made = np.random.default_rng(3), []
    for number, length in enumerate((9, 5, 17, 2, 12, 25, 7)):
        weights = np.ones(length, dtype=np.float32)
        weights[: length // 2] = 0
        made.append(TokenizedRow(f"r{number}", "test", draw.integers(1, 128, length).astype(np.int32), weights))
    return made


def share_of_rank(layout: ParallelLayout) -> ReplicaShare:
    from megatron_ads.layout import rank

    return ReplicaShare(4, 1, layout.coordinates(rank()).dp, layout.dp)


def _log_probabilities(recipe: Recipe) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    from megatron_ads.training.step import run_log_probabilities, run_log_probabilities_and_entropies

    model, shards, _ = start(recipe)
    share = share_of_rank(shards.layout)
    log_p, entropies = run_log_probabilities_and_entropies(samples(), share, model.chunks, seq_length=SEQ_LENGTH)
    alone = run_log_probabilities(samples(), share, model.chunks, seq_length=SEQ_LENGTH)
    assert all(torch.equal(*pair) for pair in zip(alone, log_p, strict=True))
    return log_p, entropies


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    return write_checkpoint(tmp_path_factory.mktemp("model") / "v3", V3)


@pytest.fixture(scope="module")
def distributions(folder: Path) -> Sequence[torch.Tensor]:
    """log p of every next token, (labels, vocabulary), computed by transformers row by row."""
    model = AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32).eval()
    found = []
    for row in samples():
        tokens = torch.from_numpy(row.tokens).long()[None]
        with torch.no_grad():
            found.append(model(tokens).logits[0, :-1].float().log_softmax(-1))
    return found


@pytest.fixture(scope="module")
def expected(distributions: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
    labels = [torch.from_numpy(row.tokens[1:]).long() for row in samples()]
    return [log_p.gather(1, each[:, None])[:, 0] for log_p, each in zip(distributions, labels, strict=True)]


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_rank_gets_the_log_probability_of_every_label_as_transformers_computes_it(
    name: str, folder: Path, expected: Sequence[torch.Tensor], distributions: Sequence[torch.Tensor]
) -> None:
    world, layout = LAYOUTS[name]
    for found, entropies in run_ranks(world, _log_probabilities, Recipe(folder=folder, layout=layout)):
        assert [len(values) for values in found] == [row.predictions for row in samples()]
        for values, wanted in zip(found, expected, strict=True):
            torch.testing.assert_close(values, wanted, rtol=1e-5, atol=2e-5)
        assert not torch.allclose(found[0][:4], expected[1], atol=1e-2)  # the negative twin: another row's
        for values, log_p in zip(entropies, distributions, strict=True):
            torch.testing.assert_close(values, -(log_p.exp() * log_p).sum(-1), rtol=1e-5, atol=2e-5)
        assert not torch.allclose(entropies[0][:4], entropies[1], atol=1e-3)


def _advantage_weighted(values: TokenValues) -> LossValues:
    """sum_t A_t log p_t over the targets, with the sum of |A| as one number and as one for each sample."""
    advantage_T = values.extra["advantage"] * (values.mask_T != 0)
    per_sample = torch.zeros(values.step_samples, dtype=torch.float64, device=advantage_T.device)
    per_sample.index_add_(0, values.sample_T, advantage_T.abs().double().view(-1))
    total = (advantage_T * -values.negative_log_p_T.float()).sum()
    report = {"size": advantage_T.abs().sum(), "sample_size": per_sample}
    return LossValues(sum=total, count=values.normalizer, report=report)


ADVANTAGE = Loss(compute=_advantage_weighted, totals=("size",), per_sample=("sample_size",))


def _advantages() -> list[np.ndarray]:
    draw = np.random.default_rng(4)
    return [draw.normal(size=row.predictions).astype(np.float32) for row in samples()]


def _step(recipe: Recipe) -> tuple[float, dict[str, float], list[float], float]:
    from megatron_ads.training.step import run_step

    model, shards, _ = start(recipe)
    batches = batches_of_all(
        samples(),
        share_of_rank(shards.layout),
        seq_length=SEQ_LENGTH,
        packing=True,
        extra={"advantage": _advantages()},
    )
    report = run_step(batches, model.chunks, model.optimizer, learning_rate=1e-3, loss=ADVANTAGE)
    assert report.update is not None
    return report.loss, report.totals, report.per_sample["sample_size"], report.update.grad_norm


def _absent(recipe: Recipe, loss: Loss) -> str:
    from megatron_ads.training.step import run_evaluation

    model, shards, _ = start(recipe)
    share = share_of_rank(shards.layout)
    extra = {"advantage": _advantages()}
    cut = batches_of_all(samples(), share, seq_length=SEQ_LENGTH, packing=True, extra=extra)
    with pytest.raises(ConfigError) as caught:
        run_evaluation(cut, model.chunks, loss=loss)
    return str(caught.value)


@pytest.mark.parametrize(
    ("loss", "named"),
    [
        (Loss(compute=_advantage_weighted, totals=("size", "entropy")), "entropy"),
        (Loss(compute=_advantage_weighted, per_sample=("size",)), "size"),  # one number, not one for each sample
    ],
)
def test_a_report_that_is_announced_and_absent_is_named_on_every_rank(folder: Path, loss: Loss, named: str) -> None:
    world, layout = LAYOUTS["pp2-ep2"]
    found = run_ranks(world, _absent, Recipe(folder=folder, layout=layout), loss)
    assert found == [found[0]] * world
    assert found[0].startswith(f"the loss announces {named}, but its microbatches report none of that size")


def test_another_loss_sees_what_the_batch_carries_and_its_reports_are_summed_by_name(
    folder: Path, expected: Sequence[torch.Tensor]
) -> None:
    masks = [torch.from_numpy(row.loss_weights[1:]) for row in samples()]
    advantages = [torch.from_numpy(each) * mask for each, mask in zip(_advantages(), masks, strict=True)]
    objective = sum(float((a * log_p).sum()) for a, log_p in zip(advantages, expected, strict=True))
    targets = sum(row.target_count for row in samples())
    sizes = [float(each.abs().sum()) for each in advantages]
    for world, layout in (LAYOUTS["dp2"], LAYOUTS["pp2-ep2"]):
        for loss, totals, per_sample, norm in run_ranks(world, _step, Recipe(folder=folder, layout=layout)):
            assert loss == pytest.approx(objective / targets, rel=1e-4)
            assert totals == {"size": pytest.approx(sum(sizes), rel=1e-5)}
            assert per_sample == pytest.approx(sizes, rel=1e-5)
            assert norm > 0
