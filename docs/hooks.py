"""For mkdocs: README.md is the site's first page, docs/index.md its second. Other files outside
docs/ that the pages link to (experts/, benchmark/) lie on the site in the folder repository/."""

import os
import re
from pathlib import Path

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
LINK = re.compile(r"(\]\()([^)#\s:]+)")
MOVED = {"README.md": "index.md", "docs/index.md": "which_script.md"}


def place(path):
    """Where a file of the repository lies on the site."""
    name = path.relative_to(ROOT).as_posix()
    elsewhere = name.removeprefix("docs/") if name.startswith("docs/") else f"repository/{name}"
    return MOVED.get(name, elsewhere)


def rewritten(markdown, page):
    """A page with its links as they are on the site, and the files outside docs/ that it links."""
    outside = []

    def link(match):
        target = (page.parent / match[2]).resolve()
        if not target.is_relative_to(ROOT) or not target.exists():
            return match[0]  # mkdocs warns of it
        target = target / "README.md" if target.is_dir() else target
        if not target.is_relative_to(ROOT / "docs"):
            outside.append(target)
        return match[1] + os.path.relpath(place(target), Path(place(page)).parent)

    return LINK.sub(link, markdown), outside


def on_files(files, config):
    found = [ROOT / name for name in (*MOVED, "CHANGELOG.md", "CONTRIBUTING.md")]
    pages = [*found, *(Path(file.abs_src_path) for file in files.documentation_pages())]
    for page in pages:  # which grow by those that they link
        new = set(rewritten(page.read_text(), page)[1]).difference(found)
        found += new
        pages += [path for path in new if path.suffix == ".md"]
    kept = [file for file in files if file.src_uri != "index.md"]
    made = [File.generated(config, place(path), abs_src_path=str(path)) for path in found]
    return Files([*kept, *made])


def on_page_markdown(markdown, page, config, files):
    return rewritten(markdown, Path(page.file.abs_src_path))[0]


def on_page_content(html, page, config, files):
    """Pictures with captions; flags that no line end divides, and names in tables that one may."""
    caption = r"<figure>\1<figcaption>\2</figcaption></figure>"
    html = re.sub(r'<p>(<img alt="([^"]*)".*?>)</p>', caption, html)
    html = re.sub(r"(?<=[\s>])--[a-z][\w-]*", r"<span class=flag>\g<0></span>", html)
    divided = re.compile(r"(?<=\w)([_/])(?=\w)(?![^<]*>)")  # not within a tag
    return re.sub(r"<td>.*?</td>", lambda cell: divided.sub(r"\1<wbr>", cell[0]), html)
