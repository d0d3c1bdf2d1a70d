"""One model through the suite: its questions, what it answers, and the score of every question."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_ads.config.generation import EndpointConfig, GenerationConfig
from megatron_ads.data.chat import load_tokenizer
from megatron_ads.evaluation.answer_records import open_journal
from megatron_ads.inference.engine import Engine
from megatron_ads.inference.model_folder import hugging_face_folder, model_state
from megatron_ads.inference.openai_engine import OpenAIEngine
from megatron_ads.inference.transformers_engine import open_engine
from megatron_ads.journal import Journal
from megatron_ads.observability.log import get_logger
from megatron_ads.observability.provenance import provenance
from megatron_ads.regress.harness_tasks import LoadedBenchmark, load_benchmark
from megatron_ads.regress.model_scores import BenchmarkScores, Item, ModelScores
from megatron_ads.regress.suite import Benchmark, Kind

if TYPE_CHECKING:
    from megatron_ads.regress.harness_model import HarnessModel

logger = get_logger(__name__)
FEW_SHOT_SEED = 1234
"""Decides which examples a prompt shows; lm-eval's own."""
LONGEST_IN_CHAT, LONGEST_IN_TEXT = 16384, 1024
"""Tokens of a written answer: of a model that may reason first, and of one that continues a text."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchmarkRequest:
    """What a model is asked, and how."""

    benchmarks: Sequence[Benchmark]
    data: Path | None
    """Folder of local files; None: questions come from the hub."""
    limit: int | None
    """Questions of each task, the first ones; None: all."""
    chat: bool | None
    """Whether written answers are asked for by the chat template; None: if there is one."""
    max_new_tokens: int | None
    """Longest written answer; None: as long as is usual."""
    batch_size: int
    tokenizer_folder: Path | None = None
    """Of a model behind a server."""


def ask_model(model: Path | EndpointConfig, request: BenchmarkRequest, file: Path) -> ModelScores:
    """Return the scores of a model, and write them to ``file``; continues where an earlier run stopped.

    Raises:
        ConfigError: If lm-eval is not the one that the suite is pinned to, or programs cannot be run in a sandbox.
        DataError: If questions cannot be read, or a server stopped answering.
        ConversionError: If transformers cannot load the model.
        UnsupportedError: If a server does not tell log-probabilities of prompts.
    """
    from megatron_ads.regress.harness_model import HarnessModel, Speaking

    served = isinstance(model, EndpointConfig)
    with ExitStack() as opened:
        folder = _folder(model, request, opened)
        tokenizer = load_tokenizer(folder)
        chat = bool(tokenizer.fast.chat_template) if request.chat is None else request.chat
        loaded = [load_benchmark(benchmark, request.data, chat=chat) for benchmark in request.benchmarks]
        state = f"{model.model} at {model.url}" if isinstance(model, EndpointConfig) else model_state(model)
        journal = opened.enter_context(open_journal(file, {"the model": state}))
        engine = opened.enter_context(closing(_engine(model, folder, journal)))
        found = dict[str, BenchmarkScores]()
        for plain in (True, False):
            ours = [one for one in loaded if (one.benchmark.kind is Kind.choice) == plain]
            how = Speaking(
                chat=chat and not plain,
                max_new_tokens=request.max_new_tokens or (LONGEST_IN_CHAT if chat else LONGEST_IN_TEXT),
                batch_size=None if served else request.batch_size,
            )
            if ours:
                harness = HarnessModel(engine, tokenizer, journal, how)
                found |= _scores(harness, ours, how.chat, request.limit)
    scores = ModelScores(
        model=str(model.model if isinstance(model, EndpointConfig) else model),
        chat=chat,
        limit=request.limit,
        benchmarks=tuple(found[one.benchmark.name] for one in loaded),
        provenance=provenance(),
    )
    scores.write(file)
    if served:  # by the next run, other weights may be behind the same name and address
        journal.delete()
    return scores


def require_server(server: EndpointConfig, request: BenchmarkRequest) -> None:
    """Ask a server for as little as possible of each kind, before anything is asked that takes hours.

    Raises:
        ConfigError: If the address, the key or the model's name is wrong.
        UnsupportedError: If it does not tell log-probabilities of prompts, or the tokens that it writes.
        DataError: If it does not answer.
    """
    assert request.tokenizer_folder is not None, "the command line asks for it"
    token = load_tokenizer(request.tokenizer_folder).end_token_id
    kinds = {benchmark.kind for benchmark in request.benchmarks}
    with closing(OpenAIEngine("server", server)) as engine:
        if Kind.choice in kinds:
            engine.log_probabilities([[token]], [[token]])
        if kinds - {Kind.choice}:
            engine.generate([[token]], GenerationConfig(max_new_tokens=1))


def _folder(model: Path | EndpointConfig, request: BenchmarkRequest, opened: ExitStack) -> Path:
    """Return the folder that has the tokenizer, and the weights if no server has them."""
    if not isinstance(model, EndpointConfig):
        return opened.enter_context(hugging_face_folder(model))
    assert request.tokenizer_folder is not None, "the command line asks for it"
    return request.tokenizer_folder


def _engine(model: Path | EndpointConfig, folder: Path, journal: Journal) -> Engine:
    return OpenAIEngine("server", model, journal) if isinstance(model, EndpointConfig) else open_engine(folder)


def _scores(
    harness: "HarnessModel", loaded: Sequence[LoadedBenchmark], chat: bool, limit: int | None
) -> dict[str, BenchmarkScores]:
    """Ask all questions of some benchmarks, and return their scores by name."""
    from lm_eval.evaluator import evaluate

    tasks = {name: task for one in loaded for name, task in one.tasks.items()}
    for task in tasks.values():
        task.set_fewshot_seed(seed=FEW_SHOT_SEED)
    logger.info("asking %s", ", ".join(one.benchmark.name for one in loaded))
    samples = evaluate(
        lm=harness,
        task_dict={"tasks": tasks, "groups": {}, "group_map": {}},
        limit=limit,
        bootstrap_iters=0,
        apply_chat_template=chat,
        fewshot_as_multiturn=chat,
    )["samples"]
    return {
        one.benchmark.name: BenchmarkScores(
            name=one.benchmark.name,
            settings=one.benchmark.settings(),
            items=tuple(item for task in one.tasks for item in _items(one.benchmark, task, samples[task], harness)),
        )
        for one in loaded
    }


def _items(
    benchmark: Benchmark, task: str, samples: Sequence[Mapping[str, Any]], harness: "HarnessModel"
) -> Iterator[Item]:
    """Yield the questions of one task in order; ``samples`` are lm-eval's, one for each way to read the answer."""
    for sample in sorted(samples, key=lambda one: int(one["doc_id"])):
        if sample["filter"] != benchmark.reading:
            continue
        prompt = sample["arguments"][0][0]
        yield Item(
            question=f"{task}:{sample['doc_id']}",
            asked=sample["doc_hash"],
            score=float(sample[benchmark.metric]),
            answer=_answer(benchmark, sample["resps"]),
            finished=prompt not in harness.unfinished,
        )


def _answer(benchmark: Benchmark, responses: Sequence[Sequence[Any]]) -> str:
    if benchmark.kind is not Kind.choice:
        return str(responses[0][0])
    chances = [response[0][0] for response in responses]
    return str(chances.index(max(chances)))
