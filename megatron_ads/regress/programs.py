"""Make programs of answers to HumanEval and MBPP: the answer's code, then the benchmark's tests; and pass@k over them.

A program passes if it runs to its last line (``sandbox.py``). Two kinds of answers are understood: a bare continuation
of the prompt, as base models give it, is cut where the papers cut it; an answer of a chat model is searched for its
code, between fences or without.

Sources: HumanEval, arXiv:2107.03374; MBPP, arXiv:2108.07732.
"""

import ast
import math
import re
import warnings
from collections.abc import Mapping
from typing import Any

from megatron_ads.errors import require

HUMANEVAL_STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint", "\n```")
"""Where a bare continuation ends: HumanEval's section 3.2, and a fence that the prompt may have opened."""
MBPP_STOPS = ("[DONE]",)
"""What follows each solution in MBPP's prompts (appendix A)."""

# The last fence may be missing: an answer that was cut off is run as far as it goes.
_FENCED = re.compile(r"^([ \t]*)```[ \t]*(\w*)[^\n]*\n(.*?)(?:^[ \t]*```|\Z)", re.DOTALL | re.MULTILINE)
_FENCE = re.compile(r"^[ \t]*```", re.MULTILINE)
_PYTHON = ("", "python", "python3", "py")
_CODE_BEGINS = re.compile(r"^(?:def|class|from|import|async def)\s|^@\w", re.MULTILINE)
_ANY_FUNCTION = re.compile(r"^(?:async )?def \w+", re.MULTILINE)


def humaneval_program(doc: Mapping[str, Any], completion: str) -> str:
    """Return the program of one HumanEval problem: prompt, completion, tests, and the call of the tests.

    Where the answer defines the function again, it replaces the prompt's; what the prompt has before it, imports and
    functions it builds on, stays.

    Args:
        doc: With ``prompt``, ``test`` and ``entry_point``.
        completion: A continuation of the prompt, or an answer with the code in it; without the prompt.
    """
    prompt, name = doc["prompt"], doc["entry_point"]
    definition = re.compile(rf"^(?:async )?def {re.escape(name)}\b", re.MULTILINE)
    code = extract_code(completion, definition)
    if code is None:
        solution = prompt + cut_at(completion, HUMANEVAL_STOPS)
    elif definition.search(code):
        before = definition.search(prompt)
        solution = (prompt[: before.start()] if before else "") + code
    else:
        solution = prompt + code
    return f"{solution}\n{doc['test']}\ncheck({name})\n"


def mbpp_program(doc: Mapping[str, Any], answer: str) -> str:
    """Return the program of one MBPP problem: what its tests need, the answer's code, the tests.

    Args:
        doc: With ``test_list``, and ``test_setup_code`` (the full set) or ``test_imports`` (the sanitized one).
        answer: A solution, or an answer with the code in it.
    """
    setup = [*doc.get("test_imports", ()), doc.get("test_setup_code", "")]
    answer = cut_at(answer, MBPP_STOPS).removeprefix("[BEGIN]")
    code = extract_code(answer, _ANY_FUNCTION)
    return "\n".join([*setup, answer if code is None else code, *doc["test_list"], ""])


def extract_code(answer: str, definition: re.Pattern[str]) -> str | None:
    """Return the code of a chat model's answer; None if the answer as a whole is code, or continues some.

    Of several fenced blocks, the last that has the definition counts, or else the first. Where the definition stands
    before any fence, code begins at the first line that can only be code, unless all of it is, and ends with the last
    line up to which it can be parsed.
    """
    if re.match(r"\n*(?: {2,}|\t)[^\s`]", answer):
        return None  # the body of a function that the prompt began
    fence = _FENCE.search(answer)
    before = answer[: fence.start()] if fence else answer
    if definition.search(before):
        begin = _CODE_BEGINS.search(before)
        return before if begin is None or _parses(before) else _longest_that_parses(before[begin.start() :])
    found = (block.groups() for block in _FENCED.finditer(answer))
    blocks = [re.sub(rf"^{indent}", "", code, flags=re.M) for indent, kind, code in found if kind.lower() in _PYTHON]
    having = [block for block in blocks if definition.search(block)]
    return having[-1] if having else next(iter(blocks), None)


def cut_at(text: str, stops: tuple[str, ...]) -> str:
    """Return a text up to the first of some strings."""
    return text[: min((at for stop in stops if (at := text.find(stop)) >= 0), default=len(text))]


def _parses(text: str) -> bool:
    return _error_line(text) is None


def _longest_that_parses(text: str) -> str:
    """Return the longest beginning, in lines, that is Python."""
    lines = text.splitlines(keepends=True)
    while (wrong := _error_line("".join(lines))) is not None and lines:
        del lines[min(wrong, len(lines)) - 1 :]  # no beginning that holds this line can be parsed
    return "".join(lines)


def _error_line(text: str) -> int | None:
    """Return the line, from 1, that keeps a text from being Python; None if it is."""
    try:
        with warnings.catch_warnings(action="ignore"):  # a backslash in a string, for one
            ast.parse(text)
    except SyntaxError as error:
        return max(error.lineno or 1, 1)
    except (ValueError, RecursionError, MemoryError):  # a null character, or too deep
        return 1
    return None


def pass_at_k(n: int, c: int, k: int) -> float:
    """Return the unbiased estimate of the chance that one of ``k`` answers passes: 1 - C(n-c, k) / C(n, k).

    Args:
        n: Answers that were sampled for a problem.
        c: Those of them that passed.
        k: How many are tried; at most ``n``.

    Raises:
        ConfigError: If ``0 <= c <= n`` or ``1 <= k <= n`` does not hold.

    Source: arXiv:2107.03374, equation 1, as the product that its figure 3 gives, without large binomials.
    """
    require(0 <= c <= n, f"{c} of {n} answers passed; it must be from 0 to {n}.")
    require(1 <= k <= n, f"pass@{k} of {n} answers; k must be from 1 to {n}. Sample more answers, or lower k.")
    if n - c < k:
        return 1.0
    return 1.0 - math.prod(1.0 - k / i for i in range(n - c + 1, n + 1))
