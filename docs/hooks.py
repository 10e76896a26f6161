"""What mkdocs calls while it builds the site: checks, the pages that are generated, and `{{ blocks }}` in those by hand.

A line `{{ name }}` in a page of `docs/pages` is replaced by what `BLOCKS[name]` makes, `{{ name argument ... }}` with
arguments. A build is strict (`make docs`): each public name without docstring is a warning, and so stops it.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
# A bare `mkdocs build` has the root not on its path; `python -m mkdocs` has.
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from docs import commands, methods, reference  # noqa: E402
from docs.coverage import Sources, breaches  # noqa: E402
from docs.methods import Landed  # noqa: E402
from laconic.catalog import read  # noqa: E402
from laconic.catalog.new import render  # noqa: E402
from laconic.core.card import FAMILIES  # noqa: E402
from laconic.errors import BadInput  # noqa: E402

log = logging.getLogger("mkdocs.hooks.laconic")

BLOCK = re.compile(r"^\{\{ (.+?) \}\}$", re.MULTILINE)
ELSEWHERE = re.compile(r"""<(?:script|link|img|iframe|source)\b[^>]*?(?:src|href)=["']?(?:https?:)?//[^>]*>""")
# Files of the repository that are pages as they stand.
ADOPTED = {"start.md": "README.md", "CONTRIBUTING.md": "CONTRIBUTING.md", "CHANGELOG.md": "CHANGELOG.md"}

# Name -> from (what has landed, the page it stands on, arguments) to Markdown.
BLOCKS: dict[str, Callable[..., str]] = {
    "methods": lambda landed, page: methods.method_tables(landed, page),
    "kinds": lambda landed, page: methods.kind_list(landed, page),
    "claims": lambda landed, page: methods.claim_table(landed, page),
    "families": lambda landed, page: methods.family_table(landed, page),
    "commands": lambda landed, page: commands.command_list(),
    "modules": lambda landed, page: reference.module_table(landed.sources, page),
    "root": lambda landed, page: reference.root_table(landed.sources, page),
    "skeleton": lambda landed, page, id, kind, family, what: _fenced(render(id, kind, family)[what]),
    "number": lambda landed, page: f"{len(landed.catalog)} methods have landed.",
}

_landed: Landed | None = None


def on_config(config: Any) -> Any:
    """Read what there is, complain of what is undocumented, complete the navigation."""
    global _landed
    try:
        for breach in breaches():
            log.warning(str(breach))
        _landed = Landed.read(read(), Sources())
    except BadInput as error:
        raise PluginError(str(error)) from None
    families = [family for family in FAMILIES if _landed.family(family)]
    _section(config.nav, "Methods").extend(
        {family: [f"methods/{family}/index.md", *(methods.page_of(one) for one in _landed.family(family))]}
        for family in families
    )
    _section(config.nav, "Python").extend(_modules_by_package(_landed.sources))
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that are generated, and the plots."""
    landed = _now()
    for page, source in ADOPTED.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=_without_dead_links(text)))
    for family in FAMILIES:
        if landed.family(family):
            content = methods.family_page(landed, family)
            files.append(File.generated(config, f"methods/{family}/index.md", content=content))
    for method in landed.catalog:
        page = methods.page_of(method)
        files.append(File.generated(config, page, content=methods.method_page(landed, method)))
        plot = landed.plot(method)
        if plot is not None:
            files.append(File.generated(config, page.removesuffix(".md") + ".svg", abs_src_path=str(plot)))
    for module in reference.modules(landed.sources):
        content = reference.module_page(landed.sources, module)
        files.append(File.generated(config, reference.page_of(module.dotted), content=content))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Fill in the blocks of a page that is written by hand."""

    def block(match: re.Match[str]) -> str:
        name, *arguments = match[1].split()
        if name not in BLOCKS:
            raise PluginError(f"{page.file.src_uri}: there is no block {name!r}; there are {', '.join(BLOCKS)}")
        return BLOCKS[name](_now(), page.file.src_uri, *arguments)

    return markdown if page.file.generated_by else BLOCK.sub(block, markdown)


def on_post_page(output: str, page: Any, **_: Any) -> str:
    """Warn where a page would load something from elsewhere: the site has to work without network."""
    for tag in ELSEWHERE.findall(output):
        log.warning(f"{page.file.src_uri} loads from elsewhere: {tag}")
    return output


def _now() -> Landed:
    assert _landed is not None  # mkdocs calls on_config first
    return _landed


def _section(nav: list[Any], title: str) -> list[Any]:
    """The entries under a title of the navigation, however deep it lies.

    Raises:
        PluginError: mkdocs.yml has no such title.
    """
    waiting = list(nav)
    while waiting:
        entry = waiting.pop(0)
        for name, inner in entry.items() if isinstance(entry, dict) else ():
            if isinstance(inner, list):
                if name == title:
                    return inner
                waiting += inner
    raise PluginError(f"mkdocs.yml: the navigation has no section {title!r}, which generated pages go to")


def _modules_by_package(sources: Sources) -> list[Any]:
    """The entries of the reference: a section for each package, a page for each module."""
    sections: dict[str, list[Any]] = {}
    for module in reference.modules(sources):
        _, package, *inner = module.dotted.split(".")
        page = reference.page_of(module.dotted)
        # The package's own page is the section's.
        sections.setdefault(package, []).append({".".join(inner): page} if inner else page)
    return [{name: pages if len(pages) > 1 else pages[0]} for name, pages in sections.items()]


def _without_dead_links(text: str) -> str:
    """A file of the repository as a page: links to files that are none become their names."""

    def linked(match: re.Match[str]) -> str:
        words, target = match[1], match[2]
        if target.startswith("docs/pages/"):
            return f"[{words}]({target.removeprefix('docs/pages/')})"
        path, hash_, anchor = target.partition("#")
        pages = {source: page for page, source in ADOPTED.items()}
        if path in pages:
            return f"[{words}]({pages[path]}{hash_}{anchor})"
        return match[0] if "://" in target or not path else f"{words} (`{target}`)"

    return re.sub(r"(?<!!)\[([^\]]+)\]\(([^)]+)\)", linked, text)


def _fenced(source: str) -> str:
    return f"```python\n{source.rstrip()}\n```"
