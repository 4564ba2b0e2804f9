"""The site builds without network, and each of its links leads somewhere."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.skipif(
    importlib.util.find_spec("mkdocs") is None and "PHONON_TEST_SITE" not in os.environ,
    reason="needs phonon[docs]; `make docs` does not let it pass",
)
def test_it_builds(tmp_path: Path) -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1", "http_proxy": "http://127.0.0.1:9"},
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    pages = list(tmp_path.rglob("*.html"))
    assert len(pages) > 30
    # The site has everything that a page fetches.
    for page in pages:
        text = page.read_text(encoding="utf-8")
        for attribute in (
            '<script src="http',
            '<link rel="stylesheet" href="http',
            '<img src="http',
        ):
            assert attribute not in text, page
    reference = (tmp_path / "reference" / "process.html").read_text(encoding="utf-8")
    assert "create_reference" in reference
