"""Answers become programs as the benchmarks' papers make them, and pass@k is the unbiased estimate."""

import gzip
import json
import os
from math import comb
from pathlib import Path

import pytest

from megatron_ads.data.public_data import DATA_ROOT
from megatron_ads.errors import ConfigError
from megatron_ads.regress.programs import humaneval_program, mbpp_program, pass_at_k
from megatron_ads.regress.sandbox import Verdict, run_programs

DOC = {
    "prompt": 'import math\n\n\ndef half(x):\n    return x / 2\n\n\ndef area(r):\n    """Area of a disc."""\n',
    "test": "def check(candidate):\n    assert candidate(1) == math.pi\n    assert candidate(0) == 0\n",
    "entry_point": "area",
}
BODY = "    return math.pi * r * r\n"
BEFORE = "import math\n\n\ndef half(x):\n    return x / 2\n\n\n"
WHOLE = "def area(r):\n    return math.pi * r**2\n"
TESTS = f"\n{DOC['test']}\ncheck(area)\n"


@pytest.mark.parametrize(
    "rest",
    [
        "",
        "\ndef other():\n    pass\n",
        "\nclass A:\n    pass\n",
        "\n# more",
        "\nif True:\n    1",
        "\nprint(area(1))",
        "\n```\nThat is all.",
    ],
)
def test_a_bare_continuation_is_cut_where_the_paper_cuts_it(rest: str) -> None:
    assert humaneval_program(DOC, BODY.rstrip("\n") + rest) == DOC["prompt"] + BODY.rstrip("\n") + TESTS


def test_a_continuation_that_goes_on_to_define_the_function_again_is_still_cut() -> None:
    assert humaneval_program(DOC, f"{BODY}\n{WHOLE}") == f"{DOC['prompt']}{BODY}{TESTS}"


@pytest.mark.parametrize(
    "answer",
    [
        f"```python\n{WHOLE}```",
        f"Multiply:\n\n```python\n{WHOLE}```\nUse it so:\n```python\nprint(area(2))\n```\n",
        f"```py\n{WHOLE}",  # cut off
        f"Slowly:\n```python\ndef area(r):\n    return 0\n```\nBetter:\n```\n{WHOLE}```",
        f"Run this:\n```bash\npip install x\n```\n```Python\n{WHOLE}```",
        f" Leading space.\n```python\n{WHOLE}```",
        WHOLE,
        f"{WHOLE}```\nIt multiplies.",  # the prompt ended with the opening fence
    ],
)
def test_a_whole_function_replaces_the_prompts_but_not_what_stands_before_it(answer: str) -> None:
    assert humaneval_program(DOC, answer) == BEFORE + WHOLE + TESTS


def test_code_without_fences_is_found_between_prose() -> None:
    program = humaneval_program(DOC, f"Here is the function:\n\n{WHOLE}\nIt multiplies the radius (twice).\n")
    assert program == f"{BEFORE}{WHOLE}\n{TESTS}"


def test_a_block_in_a_list_loses_the_indentation_of_its_fence() -> None:
    assert humaneval_program(DOC, "1. So:\n   ```python\n   def area(r):\n       return 1\n   ```") == (
        f"{BEFORE}def area(r):\n    return 1\n{TESTS}"
    )


def test_a_block_with_the_body_alone_continues_the_prompt() -> None:
    assert humaneval_program(DOC, f"```python\n{BODY}```") == DOC["prompt"] + BODY + TESTS


def test_an_answer_without_code_makes_a_program_that_cannot_run() -> None:
    with pytest.raises(SyntaxError):
        compile(humaneval_program(DOC, "I cannot help with that."), "", "exec")


MBPP = {"test_list": ["assert add(1, 2) == 3", "assert add(0, 0) == 0"], "test_setup_code": "BASE = 0"}
ADD = "def add(a, b):\n    return a + b\n"


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        (ADD, ADD),
        (f"{ADD}[DONE]\nWrite a function", ADD),
        (f"[BEGIN]\n{ADD}[DONE]", f"\n{ADD}"),
        (f"Add:\n```python\n{ADD}```\nFor example\n```python\nadd(1, 2)\n```", ADD),
        (f"Add them.\n\n{ADD}", ADD),
        (f"LIMIT = 3\n{ADD}", f"LIMIT = 3\n{ADD}"),
        ("add = lambda a, b: a + b", "add = lambda a, b: a + b"),
    ],
)
def test_an_mbpp_program_is_the_setup_the_answers_code_and_the_tests(answer: str, code: str) -> None:
    assert mbpp_program(MBPP, answer) == f"BASE = 0\n{code}\n{MBPP['test_list'][0]}\n{MBPP['test_list'][1]}\n"


def test_the_sanitized_set_brings_imports_instead_of_a_setup() -> None:
    doc = {"test_list": ["assert add(1, 2) == 3"], "test_imports": ["import math"]}
    assert mbpp_program(doc, ADD).startswith("import math\n")


def test_a_very_long_answer_is_searched_in_reasonable_time() -> None:
    # Each step back would parse all that is left: 20,000 times 20,000 lines.
    prose = "It is (not) code, as one sees.\n" * 20_000
    assert mbpp_program(MBPP, f"So:\n{ADD}{prose}").startswith(f"BASE = 0\n{ADD}\nassert")


@pytest.mark.parametrize(("n", "c", "k"), [(10, 3, 1), (10, 3, 5), (200, 7, 100), (5, 0, 3), (5, 5, 1), (4, 2, 3)])
def test_pass_at_k_is_the_ratio_of_binomials(n: int, c: int, k: int) -> None:
    # Equation 1 in exact integers; (4, 2, 3): of any three, one passes.
    assert pass_at_k(n, c, k) == pytest.approx(1 - comb(n - c, k) / comb(n, k), rel=1e-12)


def test_pass_at_k_of_many_answers_neither_overflows_nor_loses_small_chances() -> None:
    # One of 10^6 passed: the chance that it is among k is k / n.
    assert pass_at_k(10**6, 1, 1000) == pytest.approx(1e-3, rel=1e-9)


@pytest.mark.parametrize(("n", "c", "k"), [(3, 4, 1), (3, -1, 1), (3, 1, 4), (3, 1, 0)])
def test_impossible_counts_are_refused(n: int, c: int, k: int) -> None:
    with pytest.raises(ConfigError, match="must be from"):
        pass_at_k(n, c, k)


# ---- HumanEval ----

HUMANEVAL = Path(os.environ.get(DATA_ROOT, "")) / "humaneval" / "HumanEval.jsonl.gz"
has_humaneval = pytest.mark.skipif(
    not (os.environ.get(DATA_ROOT) and HUMANEVAL.exists()),
    reason=f"{DATA_ROOT} names no folder with humaneval/HumanEval.jsonl.gz (github.com/openai/human-eval, data/)",
)


def _verdicts(part: slice, body: str | None = None) -> list[Verdict]:
    with gzip.open(HUMANEVAL, "rt") as lines:
        docs = [json.loads(line) for line in lines]
    assert len(docs) == 164
    programs = [humaneval_program(doc, body or doc["canonical_solution"]) for doc in docs[part]]
    return [outcome.verdict for outcome in run_programs(programs)]


@has_humaneval
@pytest.mark.usefixtures("sandboxed")
def test_a_quarter_of_humanevals_own_solutions_pass() -> None:
    assert _verdicts(slice(0, None, 4)) == [Verdict.passed] * 41


@pytest.mark.slow
@has_humaneval
@pytest.mark.usefixtures("sandboxed")
def test_the_other_solutions_of_humaneval_pass() -> None:
    verdicts = [_verdicts(slice(first, None, 4)) for first in (1, 2, 3)]
    assert verdicts == [[Verdict.passed] * 41] * 3


@has_humaneval
@pytest.mark.usefixtures("sandboxed")
def test_an_empty_body_passes_no_problem_of_humaneval() -> None:
    assert _verdicts(slice(0, None, 8), "    pass\n") == [Verdict.failed] * 21
