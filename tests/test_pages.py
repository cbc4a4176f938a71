"""The pages: their links and lengths, and that their commands run. `--long` runs them: minutes."""

import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import sync
from scripts import PYBULLET, ROOT, SCRIPTS, environment, python

OURS = [ROOT / "docs" / name.replace(".py", ".md") for name in sync.SCRIPTS]
COUNTED = [ROOT / "README.md", ROOT / "docs" / "index.md", *OURS, ROOT / "docs/racecar_env.md"]
STUDIES = sorted(ROOT.glob("docs/studies/*.md"))
FOLDERS = ("", "docs/**/", "experts/", "benchmark/**/")
PAGES = sorted(page for folder in FOLDERS for page in ROOT.glob(f"{folder}*.md"))
RUN = [*COUNTED, ROOT / "docs/demonstrations.md"]  # whose commands run, in this order
NOT_RUN = {  # part of a command or of a block: why it is not run here
    "pip install": "installs, from the network",
    "uv run": "installs, from the network",
    "tensorboard": "a server",
    "mkdocs serve": "a server",
    "pytest": "this is it",
    "YOUR_TASK": "a task and a file of the reader's",
    "experts/train.py": "trains an expert: minutes to hours",
    "--expert expert.pt": "the expert that experts/train.py would have made",
    "model.zip": "a file of the reader's",
    "from_minari.py": "installs a library and loads a dataset from the network",
    "--drive": "needs a display",
    "--render": "needs a display",
    "trajectories": "needs the imitation library and a dataset of the reader's",
}
NOT_RUN |= {} if PYBULLET else {"racecar": "no pybullet"}
SHORT = {case.script: case for case in SCRIPTS}
CODE = r"(?ms)^```.*?^```$"
BLOCK = r"(?ms)^```(\w*)\n(.*?)^```$|(?<=\n\n)((?:    [^\n]*\n)+)"  # fenced, or indented


def anchors(page):
    """Of its headings, as GitHub and mkdocs make them."""
    headings = re.findall(r"(?m)^#+ (.*)$", re.sub(CODE, "", page.read_text()))
    return {re.sub(r"[^\w\- ]", "", x.lower()).strip().replace(" ", "-") for x in headings}


def commands(page):
    """Its shell commands, and its Python, in their order; Python without shell between is one."""
    found = []
    for language, fenced, indented in re.findall(BLOCK, page.read_text()):
        if language == "python":
            before = found.pop()[1] if found and found[-1][0] == "python" else ""
            found.append(("python", before + fenced))
        else:
            words = [line.split("  #")[0].strip() for line in (fenced + indented).splitlines()]
            found += [("shell", part) for x in words for part in x.split(" && ") if part]
    return found


def shortened(command):
    """The same command with a tiny budget."""
    match = re.match(r"python (\w+)\.py ", f"{command} ")
    if not match or match[1] not in SHORT:
        return command
    case = SHORT[match[1]]
    if "--resume" in command:
        return f"{command} --total-steps {2 * case.every}"
    return f"{command} {case.flags} --eval-episodes 2 --total-steps {case.every}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links(page):
    text = re.sub(f"{CODE}|`[^`\n]*`", "", page.read_text())
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists() and file.is_relative_to(ROOT), target
        assert not anchor or anchor in anchors(file), target


def test_lengths():
    assert sum(len(page.read_text().split()) for page in COUNTED) <= 9_000
    assert {page: n for page in OURS if (n := len(page.read_text().splitlines())) > 150} == {}
    assert {page: n for page in STUDIES if (n := len(page.read_text().splitlines())) > 200} == {}


def test_every_study_is_listed():
    """In the index of the studies, and in the site's navigation."""
    listed, site = (ROOT / "docs/studies/index.md").read_text(), (ROOT / "mkdocs.yml").read_text()
    for page in STUDIES:
        assert page.name == "index.md" or f"({page.name})" in listed, page
    for page in ROOT.glob("docs/**/*.md"):
        assert f" {page.relative_to(ROOT / 'docs')}\n" in site, page


def test_site(tmp_path):
    """It builds without a warning, where docs/requirements.txt is installed."""
    pytest.importorskip("material")
    done = python("-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path, cwd=ROOT)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", RUN, ids=lambda page: page.name)
def test_commands_parse(page):
    """Their flags exist. (A resumed run's are read together with the run.)"""
    for kind, command in commands(page):
        words = shlex.split(command) if kind == "shell" else []
        if words[:1] == ["python"] and Path(words[1]).stem in SHORT and "--resume" not in words:
            importlib.import_module(Path(words[1]).stem).parse_args(words[2:])


def test_commands_run(pytestconfig, tmp_path):
    """All of them, one after the other in one copy, on a tiny budget."""
    if not pytestconfig.getoption("--long"):
        pytest.skip("minutes: --long")
    unwanted = shutil.ignore_patterns(".git", ".venv*", "runs", "__pycache__", "*.tmp")
    shutil.copytree(ROOT, tmp_path / "clone", ignore=unwanted)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    settings = {"cwd": tmp_path / "clone", "env": environment(PATH=path), "timeout": 600}
    for page in RUN:
        for kind, command in commands(page):
            if any(part in command for part in NOT_RUN):
                continue
            words = ["bash", "-c", shortened(command)]
            if kind == "python":
                words = [sys.executable, "-c", command]
            done = subprocess.run(words, capture_output=True, text=True, **settings)
            assert done.returncode == 0, f"{page.name}: {words[-1]}\n{done.stdout}{done.stderr}"
