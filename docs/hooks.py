"""Hooks of the site's builder: files beside docs/ that pages link to, and pages of others' making.

In a checkout a link leads out of docs/ to the file itself. In the site it leads to a page made of
it, or to a copy.
"""

import re
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
#: Files of the repository that are pages of the site.
PAGES = {"CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}
#: What the site has in their place.
INSTEAD = {"README.md": "index.md", "README.md#four-jobs": "index.md#four-jobs"}
#: A link out of docs/; its target from the repository's root is found from the page's place.
LINK = re.compile(r"\]\((?!https?:|#|mailto:)([^)\s]+)\)")


def on_files(files: Files, config: Any) -> Files:
    """Add the files beside docs/ that are linked to."""
    for source, page in PAGES.items():
        text = _rewrite((ROOT / source).read_text(encoding="utf-8"), PurePosixPath("."), page)
        files.append(File.generated(config, page, content=text))
    wanted = set()
    for source in PAGES:
        for link in LINK.findall((ROOT / source).read_text(encoding="utf-8")):
            wanted.add(_outside(link, PurePosixPath(".")))
    for file in files.documentation_pages():
        if file.abs_src_path is not None:
            for link in LINK.findall(Path(file.abs_src_path).read_text(encoding="utf-8")):
                wanted.add(_outside(link, PurePosixPath("docs", file.src_uri).parent))
    for path in sorted(path for path in wanted if path is not None and path not in PAGES):
        content = (ROOT / path).read_bytes()
        files.append(File.generated(config, _copy_of(path), content=content))
    return files


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Lead links out of docs/ to what the site has of it."""
    uri = page.file.src_uri
    if uri in PAGES.values():
        return markdown
    return _rewrite(markdown, PurePosixPath("docs", uri).parent, uri)


def _rewrite(markdown: str, folder: PurePosixPath, page: str) -> str:
    up = "../" * page.count("/")

    def instead(match: re.Match[str]) -> str:
        link = match[1]
        path, _, anchor = link.partition("#")
        target = _resolve(path, folder)
        if target.startswith("docs/"):
            found = target.removeprefix("docs/")
            if folder != PurePosixPath("."):
                return match[0]
        elif link in INSTEAD or target in INSTEAD:
            found = INSTEAD[target]
        else:
            found = PAGES.get(target) or _copy_of(target)
        return f"]({up}{found}{'#' * bool(anchor)}{anchor})"

    return LINK.sub(instead, markdown)


def _outside(link: str, folder: PurePosixPath) -> str | None:
    """Return the path, from the repository's root, of a link that leaves docs/."""
    target = _resolve(link.partition("#")[0], folder)
    inside = target.startswith("docs/") or target in INSTEAD
    return None if inside or not (ROOT / target).is_file() else target


def _resolve(link: str, folder: PurePosixPath) -> str:
    parts: list[str] = []
    for part in (*folder.parts, *PurePosixPath(link).parts):
        if part == ".." and parts:
            parts.pop()
        elif part not in {".", ".."}:
            parts.append(part)
    return "/".join(parts)


def _copy_of(path: str) -> str:
    """Return where the site has a copy of a file; Markdown as text, it is no page of the site."""
    return f"files/{path}.txt" if path.endswith((".md", ".py", ".lua")) else f"files/{path}"
