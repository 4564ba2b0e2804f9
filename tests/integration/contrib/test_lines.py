"""How many lines a user writes for each integration, as code, without comments and docstrings."""

import ast
import io
import tokenize
from collections.abc import Callable
from pathlib import Path

import pytest

from support.programs import EXAMPLES

#: What a user writes. Django's own files (settings, urls, manage.py) count for what is Phonon's.
INTEGRATIONS = {
    "Celery": ["celery_views.py"],
    "FastAPI": ["fastapi_requests.py"],
    "Django": ["django_shop/shop/models.py", "django_shop/shop/views.py"],
    "gunicorn": ["wsgi_counter.py", "gunicorn_conf.py"],
    "APScheduler": ["scheduled_report.py"],
}
#: Statements, and the lines of a text in them.
MOST = 20
_NO_CODE = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENCODING,
    tokenize.ENDMARKER,
}


def lines_of_code(path: Path, *, imports: bool = False) -> int:
    """Return the number of lines with code, but for docstrings, and imports unless told."""
    text = path.read_text(encoding="utf-8")
    left_out: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        is_import = isinstance(node, ast.Import | ast.ImportFrom)
        is_docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if is_docstring or (is_import and not imports):
            assert isinstance(node, ast.stmt)
            left_out |= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    lines = {
        line
        for token in tokenize.generate_tokens(io.StringIO(text).readline)
        if token.type not in _NO_CODE
        for line in range(token.start[0], token.end[0] + 1)
    }
    return len(lines - left_out)


@pytest.mark.parametrize("name", INTEGRATIONS)
def test_an_integration_takes_few_lines(
    name: str, record_property: Callable[[str, object], None]
) -> None:
    count = sum(lines_of_code(EXAMPLES / file) for file in INTEGRATIONS[name])
    record_property("lines", count)
    whole = sum(lines_of_code(EXAMPLES / file, imports=True) for file in INTEGRATIONS[name])
    record_property("lines with imports", whole)
    assert count < MOST
