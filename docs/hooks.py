"""For mkdocs: the pages link to files outside docs/ (README.md, experts/, benchmark/); on the site
these lie in the folder repository/, README.md's pages as well, and the links lead there."""

import os
import re
from pathlib import Path

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
LINK = re.compile(r"(\]\()([^)#\s:]+)")


def place(path):
    """Where a file of the repository lies on the site."""
    name = path.relative_to(ROOT).as_posix()
    return name.removeprefix("docs/") if name.startswith("docs/") else f"repository/{name}"


def home(uri):
    """The file of the repository that a page of the site is made from."""
    name = uri.removeprefix("repository/")
    return ROOT / name if name != uri else ROOT / "docs" / uri


def rewritten(markdown, uri):
    """A page with its links as they are on the site, and the files outside docs/ that it links."""
    source, outside = home(uri), []

    def link(match):
        target = (source.parent / match[2]).resolve()
        if not target.is_relative_to(ROOT) or not target.exists():
            return match[0]  # mkdocs warns of it
        target = target / "README.md" if target.is_dir() else target
        if not target.is_relative_to(ROOT / "docs"):
            outside.append(target)
        return match[1] + os.path.relpath(place(target), Path(uri).parent)

    return LINK.sub(link, markdown), outside


def generated(path, config):
    return File.generated(config, place(path), abs_src_path=str(path))


def on_files(files, config):
    todo, found = [home(file.src_uri) for file in files.documentation_pages()], {}
    for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md"):
        found[ROOT / name] = generated(ROOT / name, config)
        todo.append(ROOT / name)
    while todo:
        page = todo.pop()
        for target in rewritten(page.read_text(), place(page))[1]:
            if target not in found:
                found[target] = generated(target, config)
                todo += [target] * (target.suffix == ".md")
    return Files([*files, *found.values()])


def on_page_markdown(markdown, page, config, files):
    return rewritten(markdown, page.file.src_uri)[0]
