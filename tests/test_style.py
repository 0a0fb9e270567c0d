"""How the source reads, as far as a program can hold it: see docs/style.md."""

import ast
import io
import re
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted(
    file
    for folder in ("bitlm_dist", "kernels", "data_prep", "launch", "experiments")
    for file in (ROOT / folder).rglob("*.py")
)
MAX_FUNCTION_LINES = 60
SLAB_LINES = 25  # a body this long has a blank line or a comment
PER_UNITS = "token|byte|rank|step|second|block|microbatch|node|GPU|process|sequence|document|layer"
A_FOR_PER = re.compile(
    rf"\b(?:bits|bytes|nats|tokens|seconds|MB|GB|files|times|once|twice|passes|one \w+) an? "
    rf"(?:{PER_UNITS})\b"
)


def functions(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def comment_lines(text):
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return {token.start[0] for token in tokens if token.type == tokenize.COMMENT}


def body_lines(function):
    """First and last line of the body, without the docstring."""
    body = function.body
    if isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
        body = body[1:]
    return (body[0].lineno, body[-1].end_lineno) if body else (0, -1)


def unrelated_tuple(node):
    """Whether an assignment is `a, b = x, y` of values that do not depend on the old a and b."""
    if not isinstance(node, ast.Assign):
        return False

    target = node.targets[0]
    if not isinstance(target, ast.Tuple) or not isinstance(node.value, ast.Tuple):
        return False

    # swaps and simultaneous updates read what they assign
    names = {ast.unparse(element) for element in target.elts}
    return names.isdisjoint(ast.unparse(inner) for inner in ast.walk(node.value) if inner != node)


def is_triton_kernel(function):
    """Whether a function is compiled by Triton, where a split would change the kernel."""
    return any("jit" in ast.unparse(decorator) for decorator in function.decorator_list)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_a_file_reads_in_paragraphs(file):
    text = file.read_text()
    lines = text.splitlines()
    comments = comment_lines(text)
    problems = []
    tree = ast.parse(text)

    for function in functions(tree):
        length = function.end_lineno - function.lineno + 1
        if length > MAX_FUNCTION_LINES and not is_triton_kernel(function):
            problems.append(f"{function.lineno}: {function.name} has {length} lines: split it")

        first, last = body_lines(function)
        inside = range(first, last + 1)
        has_air = any(not lines[i - 1].strip() or i in comments for i in inside)
        if len(inside) >= SLAB_LINES and not has_air:
            problems.append(f"{function.lineno}: {function.name} has no paragraphs: blank lines")

    problems += [
        f"{node.lineno}: `{ast.unparse(node)}`: one assignment per line"
        for node in ast.walk(tree)
        if unrelated_tuple(node)
    ]
    problems += [
        f"{number}: {match[0]!r}: write `per`"
        for number, line in enumerate(lines, 1)
        if (match := A_FOR_PER.search(line))
    ]
    assert not problems, "\n".join(problems)
