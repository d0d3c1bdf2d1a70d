"""DPO and S-DPO as jobs: gradients against autograd through the formula, layouts, resumption, and what is learned."""

import json
import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch import Tensor

from conversion.names import parameters
from megatron_ads.architecture import read_model_shape
from megatron_ads.config.model import Precision
from megatron_ads.config.preference import PreferenceConfig, PreferenceLossConfig
from megatron_ads.data.preferences import PreferenceSet, PreferenceStream, ReferencedSets
from megatron_ads.errors import ConversionError
from megatron_ads.observability.metrics import read_metrics
from megatron_ads.rows import TokenizedRow
from parity_tests import reference
from parity_tests.harness.ranks import run_ranks
from parity_tests.harness.real_job import write_small_model
from parity_tests.harness.training_jobs import Recipe, start
from parity_tests.tolerances import GRADIENTS
from tests.models.checkpoints import V3, write_checkpoint

SETTINGS = PreferenceLossConfig(beta=0.5, sft_weight=0.1, reference_steps=2)
SIZES = (3, 2, 4, 3, 3)
"""Answers of each set."""
SHIFT = (1.0, -0.5, 0.25, 0.0, 2.0)
"""By which the reference differs from the policy, answer by answer, where a test lets it."""


def sets() -> list[PreferenceSet]:
    """Return five sets, each of several answers of many lengths behind one prompt; the second weighs double."""
    draw, made = np.random.default_rng(3), []
    for number, size in enumerate(SIZES):
        prompt = draw.integers(1, 128, 4 + number)
        rows = []
        for answer in range(size):
            tokens = np.concatenate([prompt, draw.integers(1, 128, 2 + 3 * answer)]).astype(np.int32)
            weights = (np.arange(len(tokens)) >= len(prompt)).astype(np.float32)
            rows.append(TokenizedRow(f"{number}/{answer}", "test", tokens, weights))
        made.append(PreferenceSet(tuple(rows), 2.0 if number == 1 else 1.0))
    return made


@dataclass
class FakeSession:
    """As much of a session as a loop needs, with everything recorded."""

    config: Any
    model: Any
    step: int = 0
    recorded: list[dict[str, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        activity = SimpleNamespace(phase="", enter_step=lambda step: None, moved=lambda: None)
        self.membership = SimpleNamespace(activity=activity)
        self.stop = SimpleNamespace(received=None)
        self.log = SimpleNamespace(record=lambda step, metrics: self.recorded.append(dict(metrics)))

    @property
    def is_finished(self) -> bool:
        return self.step >= self.config.train.max_steps

    def is_due(self, every: int | None) -> bool:
        return every is not None and self.step % every == 0

    def save_if_due(self, *, stopped: bool) -> None:
        assert not stopped

    def finish_step(self, report: Any, metrics: dict[str, float]) -> None:
        self.step += 1
        self.recorded.append({"loss": report.loss, "grad_norm": report.update.grad_norm} | metrics)


def _job(recipe: Recipe, *, per_step: int = 2) -> Any:
    from megatron_ads.training.preference import PreferenceJob
    from megatron_ads.training.reference import ReferenceWeights
    from megatron_ads.training.streams import share_of

    model, shards, _ = start(recipe)
    given = recipe.config()
    config = PreferenceConfig(
        model=given.model,
        data=given.data,
        optim=given.optim,
        train=replace(given.train, global_batch_size=per_step, evaluate_every=2),
        preference=SETTINGS,
    )
    return PreferenceJob(
        config=config,
        session=FakeSession(config, model),  # type: ignore[arg-type]
        share=share_of(config, shards.layout),
        reference=ReferenceWeights(model),
        training=PreferenceStream([(sets(), 1.0, "sets")], per_step=per_step, seed=0),
        held_out=ReferencedSets(sets()[:3]),
    )


def _recorded(recipe: Recipe) -> list[dict[str, float]]:
    from megatron_ads.training.preference import train

    job = _job(recipe)
    train(job)
    return [
        {name: float(value) for name, value in each.items() if name != "reference_seconds"}
        for each in job.session.recorded  # type: ignore[attr-defined]
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("model") / "v3", V3)


@pytest.fixture(scope="module")
def on_one_rank(folder: Path) -> list[dict[str, float]]:
    return run_ranks(1, _recorded, Recipe(folder=folder))[0]


@pytest.mark.parametrize(("world", "layout"), [(2, {}), (4, {"pp": 2, "ep": 2})], ids=["dp2", "pp2-ep2"])
def test_steps_and_evaluations_do_not_depend_on_the_layout(
    world: int, layout: dict[str, int], folder: Path, on_one_rank: list[dict[str, float]]
) -> None:
    assert sum("loss" in each for each in on_one_rank) == 3
    assert sum("validation_loss" in each for each in on_one_rank) == 1
    for recorded in run_ranks(world, _recorded, Recipe(folder=folder, layout=layout)):
        for ours, alone in zip(recorded, on_one_rank, strict=True):
            assert ours == pytest.approx(alone, rel=1e-5, abs=2e-5)


def _gradients(recipe: Recipe) -> tuple[float, dict[str, Tensor]]:
    """Return the loss of one step on all sets, and the gradients by canonical name."""
    from megatron_ads.models.weights import named_weights
    from megatron_ads.training import preference

    job = _job(recipe, per_step=len(SIZES))
    shifts = np.resize(SHIFT, sum(SIZES))
    known = job.training.sets
    numbers = range(len(SIZES))
    own = preference._log_probabilities(job, known.answers_of(numbers))
    known.fill(numbers, own - shifts)
    with patch.object(preference, "require_first_loss"):
        preference._step(job)
    model, found = job.session.model, {}
    for weight in named_weights(model.models, model.spec):
        if hasattr(weight.tensor, "main_grad"):
            found |= {name: part.clone() for name, part in replace(weight, tensor=weight.tensor.main_grad).pieces()}
    return job.session.recorded[-1]["loss"], found


def _by_autograd(folder: Path) -> tuple[float, dict[str, Tensor]]:
    """The same by transformers, answer by answer: equation 11 of arXiv:2406.09215 as it stands, and the SFT term."""
    model, losses, shifts = reference.load(folder), [], iter(np.resize(SHIFT, sum(SIZES)).tolist())
    for each in sets():
        log_p, ratios = [], []
        for row in each.answers:
            tokens = torch.from_numpy(row.tokens).long()[None]
            said = model(tokens).logits[0, :-1].log_softmax(-1).gather(1, tokens[0, 1:, None])[:, 0]
            log_p.append(said[torch.from_numpy(row.loss_weights[1:]) != 0])
            ratios.append(log_p[-1].sum() - log_p[-1].sum().detach() + next(shifts))
        differences = torch.stack([SETTINGS.beta * (ratio - ratios[0]) for ratio in ratios[1:]])
        preferred = -torch.nn.functional.logsigmoid(-differences.exp().sum().log())
        losses.append(each.weight * (preferred - SETTINGS.sft_weight * log_p[0].mean()))
    loss = torch.stack(losses).mean()
    loss.backward()
    found = {}
    for name, parameter in parameters(read_model_shape(folder)).items():
        if not name.startswith("mtp.") and not name.endswith("expert_bias"):
            found[name] = torch.cat([reference.hf_view(model, part.name, grad=True) for part in parameter.parts])
    return loss.item(), found


def test_the_gradient_is_that_of_the_formula_by_autograd(folder: Path) -> None:
    ((loss, ours),) = run_ranks(1, _gradients, Recipe(folder=folder, optim={"clip_grad": 0.0}))
    wanted, theirs = _by_autograd(folder)
    assert loss == pytest.approx(wanted, rel=1e-5)
    assert ours.keys() == theirs.keys() and len(theirs) > 100
    moved = {name: gradient for name, gradient in theirs.items() if gradient.any()}
    assert len(moved) > len(theirs) / 4  # the rest: experts that no token chose
    for name, gradient in moved.items():
        assert float((ours[name] - gradient).norm() / gradient.norm()) < GRADIENTS.value, name


def _refusal(recipe: Recipe) -> str:
    from megatron_ads.training import preference

    job = _job(recipe)
    (numbers,) = job.training.upcoming(1)
    preference._step(job)
    updated = preference._objective(job, job.training.sets, numbers)  # the policy is another than the reference now
    with pytest.raises(ConversionError) as caught:
        preference.require_first_loss(updated, Precision.fp32)
    return str(caught.value)


def test_a_first_loss_that_is_not_the_logarithm_of_the_answers_is_refused(folder: Path) -> None:
    (message,) = run_ranks(1, _refusal, Recipe(folder=folder, optim={"learning_rate": 1e-2}))
    assert message.startswith("before the first update the policy is its own reference, so that the loss is log(1 + ")


STEPS, RESUMED_AT = 12, 4


def _run(root: str, rows: str, model: str, checkpoints: str) -> None:
    from megatron_ads.config.recipes import load_job
    from megatron_ads.runtime import cpu_compat
    from megatron_ads.training.preference import run
    from megatron_ads.training.stopping import StopRequest

    cpu_compat.install()
    config = load_job(
        "preference/sdpo",
        [
            "layout=pp1_ep1", f"model.load={model}", f"log.dir={root}", f"checkpoint.dir={checkpoints}",
            f"data.sources=[{{kind: preference, path: {rows}}}]", "data.validation_rows=0", "data.seq_length=96",
            "preference.negatives=2", "preference.reference_steps=3", "optim=adamw_constant",
            "optim.learning_rate=1e-3", f"train.max_steps={STEPS}", "train.global_batch_size=2",
            "train.evaluate_every=null", "checkpoint.save_every=4", "checkpoint.save_total_limit=9",
            "log.tensorboard=false", "runtime.threads=1",
        ],
    )  # fmt: skip
    assert isinstance(config, PreferenceConfig)
    with StopRequest() as stop:
        run(config, stop)


@dataclass(frozen=True)
class Jobs:
    """One job without an interruption, and one that continues from its checkpoint."""

    straight: Path
    resumed: Path


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Jobs:
    root = tmp_path_factory.mktemp("jobs")
    model = write_small_model(root / "model")
    # Seven steps show every row once, so that the reference of some is computed after the job was resumed.
    rows = [
        {"prompt": f"What goes with {number}?", "chosen": f"red {number}", "rejected": ["blue", f"a green {number}"]}
        for number in range(14)
    ]
    file, places = root / "rows.jsonl", [str(root / name) for name in ("straight", "resumed")]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run_ranks(1, _run, places[0], str(file), str(model), f"{places[0]}-saved", process_group=False)
    saved = f"step-{RESUMED_AT:08d}"
    shutil.copytree(root / "straight-saved" / saved, root / "resumed-saved" / saved)
    run_ranks(1, _run, places[1], str(file), str(model), f"{places[1]}-saved", process_group=False)
    return Jobs(root / "straight", root / "resumed")


def _of_steps(folder: Path) -> list[dict[str, float]]:
    kept = ("step", "loss", "grad_norm", "rewards/chosen", "rewards/margins", "logps/rejected")
    return [{name: each[name] for name in kept} for each in read_metrics(folder) if "loss" in each]


def test_a_job_begins_with_the_logarithm_of_the_answers_and_its_margin_grows(jobs: Jobs) -> None:
    metrics = [each for each in read_metrics(jobs.straight) if "loss" in each]
    assert metrics[0]["loss"] == pytest.approx(np.log(3), abs=1e-6)
    assert metrics[0]["rewards/chosen"] == metrics[0]["rewards/margins"] == 0
    assert metrics[-1]["rewards/margins"] > 0.2
    assert metrics[-1]["rewards/accuracies"] == 1
    assert metrics[-1]["loss"] < 0.8 * np.log(3)
    assert sum("reference_seconds" in each for each in read_metrics(jobs.straight)) == 3  # of 14 rows, 3 steps at once


def test_a_resumed_job_is_bit_equal_although_it_computes_the_reference_anew(jobs: Jobs) -> None:
    straight, resumed = _of_steps(jobs.straight), _of_steps(jobs.resumed)
    assert resumed == straight[RESUMED_AT:]
    assert sum("reference_seconds" in each for each in read_metrics(jobs.resumed)) == 1
    exports = [sorted((folder / "export").rglob("*.safetensors")) for folder in (jobs.straight, jobs.resumed)]
    assert len(exports[0]) > 0
    assert [file.read_bytes() for file in exports[0]] == [file.read_bytes() for file in exports[1]]
