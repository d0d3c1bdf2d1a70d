"""Labels by a checkpoint in this process, with and without reasoning, kept batch by batch."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from megatron_ads.config.generation import GenerationConfig, Method
from megatron_ads.config.labelling import LabelConfig
from megatron_ads.data.chat import load_tokenizer
from megatron_ads.demo_model import CONFIGS, Preset, write_demo_model
from megatron_ads.inference.engine import Completion
from megatron_ads.inference.journalled_engine import JournalledEngine
from megatron_ads.journal import Journal
from megatron_ads.labelling.job import run_job
from megatron_ads.labelling.labeller import Labeller
from megatron_ads.labelling.question_store import Question
from megatron_ads.rows import Message, Role
from tests.labelling.jobs import labels_in, recipe, write_pairs


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "demo"
    write_demo_model(folder, CONFIGS[Preset.tiny] | {"torch_dtype": "float32"})
    return folder


def _job(folder: Path, model: Path, *overrides: str) -> LabelConfig:
    pairs = write_pairs(folder / "pairs.jsonl", 3)
    own = ("model.kind=local", f"model.model={model}", "model.max_tokens=4", "draws=2")
    return recipe(folder, pairs, *own, *overrides)


def test_a_checkpoint_labels_with_and_without_reasoning(model: Path, tmp_path: Path) -> None:
    config = _job(tmp_path, model, "log_probabilities=true")
    run_job(config)
    labels = labels_in(Path(config.out))
    assert len(labels) == 3 and all(row["draws"] == 2 and row["answer_tokens"] <= 8 for row in labels)
    assert all(row["failure"] for row in labels)  # its weights are random
    alone = _job(tmp_path, model, "reasoning=false", "max_prompt_tokens=60")
    alone.out = str(tmp_path / "alone")
    run_job(alone)
    assert all(row["text"].startswith("<think></think>") for row in labels_in(Path(alone.out)))
    short = _job(tmp_path, model, "max_prompt_tokens=5")
    short.out = str(tmp_path / "short")
    run_job(short)
    assert {row["failure"] for row in labels_in(Path(short.out))} == {"prompt_too_long"}


class _Counted:
    """An engine of this process that counts what it is asked."""

    def __init__(self) -> None:
        self.batches: list[list[Any]] = []

    def generate(
        self, prompts: Sequence[Any], config: GenerationConfig, *, rules: Any = None
    ) -> list[list[Completion]]:
        self.batches.append(list(prompts))
        return [[Completion(text=f"{list(prompt)} {config.seed}")] for prompt in prompts]


def test_what_is_in_the_journal_is_not_generated_again(tmp_path: Path) -> None:
    engine, how = _Counted(), GenerationConfig()
    with Journal(tmp_path / "j") as journal:
        first = JournalledEngine(engine, journal, batch_size=2).generate([[1], [2], [3]], how)  # type: ignore[arg-type]
    assert engine.batches == [[[1], [2]], [[3]]]
    with Journal(tmp_path / "j") as journal:
        again = JournalledEngine(engine, journal, batch_size=2)  # type: ignore[arg-type]
        assert again.generate([[1], [4], [3]], how)[::2] == first[::2]
        assert engine.batches[2:] == [[[4]]]
        assert again.generate([[1]], GenerationConfig(max_new_tokens=7))[0][0].text == "[1] 0"
    assert engine.batches[3:] == [[[1]]]


class _Drawn:
    """An engine that never says the same twice."""

    def __init__(self) -> None:
        self.said = 0

    def generate(
        self, prompts: Sequence[Any], config: GenerationConfig, *, rules: Any = None
    ) -> list[list[Completion]]:
        self.said += len(prompts)
        return [[Completion(text=str(self.said - place))] for place in range(len(prompts))]


@pytest.mark.parametrize(("method", "asked"), [(Method.sampled, 3), (Method.greedy, 2)])
def test_equal_prompts_are_drawn_apart_and_found_again(method: Method, asked: int, tmp_path: Path) -> None:
    engine, how = _Drawn(), GenerationConfig(method=method)
    with Journal(tmp_path / "j") as journal:
        said = JournalledEngine(engine, journal, batch_size=2).generate([[1], [2], [1]], how)  # type: ignore[arg-type]
    assert engine.said == asked == len({one.text for (one,) in said})
    with Journal(tmp_path / "j") as journal:
        again = JournalledEngine(engine, journal, batch_size=2).generate([[1], [2], [1]], how)  # type: ignore[arg-type]
    assert (again, engine.said) == (said, asked)


class _Recorded:
    """An engine that notes its prompts and gives one label."""

    def __init__(self) -> None:
        self.prompts: list[list[int]] = []

    def generate(
        self, prompts: Sequence[Any], config: GenerationConfig, *, rules: Any = None
    ) -> list[list[Completion]]:
        self.prompts += [list(prompt) for prompt in prompts]
        return [[Completion(text="<Label>Good</Label>")] for _ in prompts]


def _questions(*contents: str) -> list[Question]:
    return [
        Question(
            row=number, source=0, id=f"q{number}", task="query_ad_relevance", digest=bytes([number] * 16),
            messages=(Message(Role.user, content),),
        )
        for number, content in enumerate(contents)
    ]  # fmt: skip


@pytest.mark.parametrize("end", ["", "<think>", "<think>\n", "<think></think>", "<think>\n\n</think>\n\n"])
def test_for_the_label_alone_the_reasoning_is_closed_whatever_the_template_writes(
    end: str, model: Path, tmp_path: Path
) -> None:
    tokenizer, engine = load_tokenizer(model), _Recorded()
    tokenizer.fast.chat_template = "{{ messages[0]['content'] }}|" + end.replace("\n", "{{ '\\n' }}")
    config = _job(tmp_path, model, "reasoning=false")
    with Journal(tmp_path / "j") as journal:
        labeller = Labeller(config, lambda journal, priority: engine, tokenizer)  # type: ignore[arg-type,return-value]
        (label,) = labeller.label(_questions("Is it?"), journal)
    (prompt,) = engine.prompts
    shown = tokenizer.fast.decode(prompt, skip_special_tokens=False)
    assert "".join(shown.split()) == "Isit?|<think></think>"
    assert (label.label, label.text) == ("Good", "<think></think><Label>Good</Label>")


def test_a_row_that_the_chat_template_refuses_is_counted(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer, engine = load_tokenizer(model), _Recorded()
    text = "{{ messages[0]['content'] }}"
    tokenizer.fast.chat_template = (
        f"{{% if 'odd' in messages[0]['content'] %}}{{{{ raise_exception('no') }}}}{{% endif %}}{text}"
    )
    with Journal(tmp_path / "j") as journal:
        labeller = Labeller(_job(tmp_path, model), lambda journal, priority: engine, tokenizer)  # type: ignore[arg-type,return-value]
        odd, even = labeller.label(_questions("an odd one", "an even one"), journal)
    assert (odd.failure, odd.draws) == ("refused_by_template", 0) and len(engine.prompts) == 2  # two draws of the other
    assert even.failure == "no_reasoning" and "row q0: " in caplog.text
