"""The scripts agree with each other, with their documentation and with what they declare."""

import ast
import re
import sys
import tomllib

import pytest
import sync
from packaging.requirements import Requirement
from scripts import CASES, PYBULLET, ROOT, environment, python

COMMON = "env-id seed out resume evaluate eval-every eval-episodes total-steps capture-video device"
COMMON = {f"--{name}" for name in f"{COMMON} no-progress help".split()}
INDIRECT = {"pybullet": "racecar_env", "moviepy": "RecordVideo", "tensorboard": "torch"}
each = pytest.mark.parametrize("source", [ROOT / name for name in sync.SCRIPTS], ids=sync.SCRIPTS)


def test_the_scripts_agree():
    assert sync.differences(sync.texts()) == []
    assert {f"{case.script}.py" for case in CASES} == set(sync.SCRIPTS) or not PYBULLET


@pytest.mark.parametrize("command", ["check", "format --check"])
def test_ruff(command):
    done = python("-m", "ruff", *command.split(), "--no-cache", ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


def test_nothing_is_unpickled():
    for path in [*ROOT.glob("*.py"), *(ROOT / "experts").glob("*.py")]:
        text = path.read_text()
        for unsafe in ("allow_pickle=True", "weights_only=False", "pickle.load", "joblib"):
            assert unsafe not in text, path
        for call in re.findall(r"(?:torch|np)\.load\([^\n]*", text):
            assert "weights_only=True" in call or "allow_pickle=False" in call, call


@each
def test_docstring(source):
    docstring = ast.get_docstring(ast.parse(source.read_text()))
    assert len(docstring.splitlines()) <= 30
    assert docstring.count(f"python {source.name}") >= 3 and "--resume" in docstring


@each
def test_help_shows_every_flag(source):
    """In a process of its own: a script starts from anywhere."""
    done = python(source, "--help", cwd="/", env=environment(COLUMNS="1000"))
    text = source.read_text()
    flags = set(re.findall(r'\bflag\(\s*"(--[\w-]+)"', text)) | {"--help"}
    assert flags >= COMMON and done.returncode == 0 and not done.stderr
    for flag in flags:
        assert re.search(rf"(?m)^ +(-h, )?{flag}[, ].*\w", done.stdout), flag
    assert done.stdout.count("(default: ") > 12


def test_help_shows_the_defaults_that_would_be_used():
    flags = ["--policy-gradient", "reinforce", "--help"]
    asked = python("-OO", ROOT / "gail_cartpole.py", *flags)  # without docstrings
    assert asked.returncode == 0 and asked.stdout.count("default: 500000)") == 2  # PPO's: 100000


@each
def test_dependencies_are_what_is_imported(source):
    """It declares them as PEP 723 says, and requirements.txt has a version of each that will do."""
    nodes = list(ast.walk(ast.parse(source.read_text())))
    modules = {name.name for node in nodes if isinstance(node, ast.Import) for name in node.names}
    modules |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    imported = {module.split(".")[0] for module in modules} - sys.stdlib_module_names
    imported = {name for name in imported if not (ROOT / f"{name}.py").exists()}
    (block,) = re.findall(r"(?m)^# /// script\n((?:#(?: .*)?\n)+)# ///$", source.read_text())
    declared = tomllib.loads(block.replace("# ", "").replace("#\n", "\n"))
    needed = {need.name: need for need in map(Requirement, declared["dependencies"])}
    assert imported == needed.keys() - INDIRECT
    lines = (line.split("#")[0].strip() for line in (ROOT / "requirements.txt").open())
    pins = {pin.name: pin for pin in (Requirement(line) for line in lines if line)}
    for name, need in needed.items():
        (version,) = [pin.version for pin in pins[name].specifier if pin.operator == "=="]
        assert version in need.specifier and need.extras <= pins[name].extras, name
