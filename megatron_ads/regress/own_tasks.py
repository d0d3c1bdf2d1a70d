"""Tasks described here: those whose answers are programs, and questions in files of a form that lm-eval does not know.

lm-eval's own HumanEval and MBPP run what a model wrote in the process that evaluates, by a metric from the hub.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from megatron_ads.regress.programs import humaneval_program, mbpp_program
from megatron_ads.regress.sandbox import Verdict, run_program

ProgramOf = Callable[[Mapping[str, Any], str], str]
"""Of a problem and what a model wrote: the program to run, tests included."""
LETTERS = ("A", "B", "C", "D")


def settings_of(task: str, *, chat: bool) -> dict[str, Any]:
    """Return a task's settings by the names of lm-eval's YAML files; ``task`` is one of ``_OWN``.

    With ``chat``, a model is asked for a program in words, instead of given its beginning.
    """
    return {"task": task, "test_split": "test", "metadata": {"version": 1.0}, **_OWN[task](chat)}


def _human_eval(chat: bool) -> dict[str, Any]:
    asked = "Complete this function. Answer with the whole of it, in one block of Python.\n\n```python\n{{prompt}}```"
    return {
        "dataset_path": "openai/openai_humaneval",
        "doc_to_text": asked if chat else "{{prompt}}",
        "doc_to_target": "{{canonical_solution}}",
        # Where a completion ends (arXiv:2107.03374, section 2.1).
        "generation_kwargs": {"until": ["\nclass", "\ndef", "\n#", "\nif", "\nprint"], "do_sample": False},
        **_judged_by_running(humaneval_program),
    }


def _mbpp(chat: bool) -> dict[str, Any]:
    # The form of arXiv:2108.07732, section 2.1, whose examples are problems of the split "prompt".
    return {
        "dataset_path": "google-research-datasets/mbpp",
        "dataset_name": "full",
        "fewshot_split": "prompt",
        "fewshot_config": {"sampler": "first_n"},
        "doc_to_text": "You are an expert Python programmer, and here is your task: {{text}} Your code should pass "
        "these tests:\n\n{{test_list | join('\\n')}}\n" + ("" if chat else "[BEGIN]\n"),
        "doc_to_target": "```python\n{{code}}\n```" if chat else "{{code}}\n[DONE]",
        "target_delimiter": "",
        "generation_kwargs": {"until": ["[DONE]"], "do_sample": False},
        **_judged_by_running(mbpp_program),
    }


def _mmlu_stem_questions(chat: bool) -> dict[str, Any]:
    del chat  # choices are judged behind plain text
    choices = "\n".join(f"{letter}. {{{{options[{place}]}}}}" for place, letter in enumerate(LETTERS))
    return {
        "dataset_path": "json",
        "output_type": "multiple_choice",
        "doc_to_text": f"{{{{question.strip()}}}}\n{choices}\nAnswer:",
        "doc_to_choice": [*LETTERS],
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }


def _judged_by_running(program_of: ProgramOf) -> dict[str, Any]:
    return {
        "output_type": "generate_until",
        "process_results": partial(_pass_at_1, program_of),
        "metric_list": [{"metric": "pass@1", "aggregation": "mean", "higher_is_better": True}],
    }


def _pass_at_1(program_of: ProgramOf, problem: Mapping[str, Any], written: Sequence[str]) -> dict[str, float]:
    outcome = run_program(program_of(problem, written[0]))
    return {"pass@1": float(outcome.verdict is Verdict.passed)}


_OWN: Mapping[str, Callable[[bool], dict[str, Any]]] = {
    "humaneval": _human_eval,
    "mbpp": _mbpp,
    "mmlu_stem_questions": _mmlu_stem_questions,
}
