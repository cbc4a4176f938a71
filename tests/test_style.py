"""The scripts agree with each other, with their documentation and with what they declare."""

import argparse
import ast
import re
import subprocess
import sys
import tomllib

import pytest
import sync
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from scripts import CASES, RACECAR_CASES, ROOT
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

COMMON_FLAGS = {
    *("--env-id", "--seed", "--out", "--run-name", "--device", "--num-threads", "--eval-every"),
    *("--eval-episodes", "--capture-video", "--render", "--resume", "--evaluate", "--no-progress"),
}
WATCHING_FLAGS = {"--demos", "--num-demos", "--record-demos"}
GAIL_FLAGS = {"--num-envs", "--total-steps", "--bc-updates", "--control"}
INDIRECT = {  # no script imports these by name
    "pybullet": "racecar_env",
    "moviepy": "Gymnasium's RecordVideo",
    "rich": "stable-baselines3's progress bar",
    "tensorboard": "torch.utils.tensorboard",
}


@pytest.fixture(scope="module", params=sync.SCRIPTS)
def source(request):
    return ROOT / request.param


# --- style ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["check", "format --check"])
def test_ruff(command):
    ruff = [sys.executable, "-m", "ruff", *command.split(), "--no-cache", str(ROOT)]
    done = subprocess.run(ruff, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_scripts_agree():
    found = sync.differences({name: (ROOT / name).read_text() for name in sync.SCRIPTS})
    assert not found, "\n".join(found)


def test_differences_are_found():
    """In the harness, in a body, in a decorator; and `train` may differ."""
    model = "def f():\n    return 1\n\n\n@cached\ndef g():\n    pass\n\n\ndef train():\n    pass\n"
    harness = f"# ====\n{sync.BANNER}its name\n# ====\nx = 1\n"
    for ours, theirs, differs in (
        ("return 1", "return 2", ["f"]),
        ("@cached", "@other", ["g"]),
        ("def train():\n    pass", "def train():\n    return", []),
        ("x = 1", "x = 2", ["the harness"]),
    ):
        texts = {"a.py": model + harness, "b.py": (model + harness).replace(ours, theirs)}
        found = sync.differences(texts)
        assert [line.split(" differs")[0] for line in found] == differs
        copied = sync.copy_from(texts["a.py"], texts["b.py"])
        assert sync.differences({"a.py": texts["a.py"], "b.py": copied}) == []


def test_docstring(source):
    docstring = ast.get_docstring(ast.parse(source.read_text()))
    assert docstring and len(docstring.splitlines()) <= 30
    assert docstring.count(f"python {source.name}") >= 3  # a try, the default, resuming
    assert "--resume" in docstring


@pytest.mark.parametrize("unsafe", ["allow_pickle=True", "weights_only=False", "pickle.load"])
def test_nothing_is_unpickled(source, unsafe):
    text = source.read_text()
    assert unsafe not in text
    for call in re.findall(r"(?:torch|np)\.load\(.*", text):
        assert "weights_only=True" in call or "allow_pickle=False" in call, call


# --- command line ---------------------------------------------------------------------------------


def test_help_shows_every_flag_with_its_default(script, monkeypatch, capsys):
    parsers, print_help = [], argparse.ArgumentParser.print_help

    def spy(parser, *args):
        parsers.append(parser)
        return print_help(parser, *args)

    monkeypatch.setattr(argparse.ArgumentParser, "print_help", spy)
    monkeypatch.setenv("COLUMNS", "1000")  # nothing is wrapped
    with pytest.raises(SystemExit) as stop:
        script.module.main(["--help"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    flags = {flag: action for action in parsers[0]._actions for flag in action.option_strings}
    assert flags.keys() >= COMMON_FLAGS | {script.budget}
    if script.task.demos:
        assert flags.keys() >= WATCHING_FLAGS
    if script.script.startswith("gail") and script.module.CLOCK == "env_steps":
        assert flags.keys() >= GAIL_FLAGS
    for flag, action in flags.items():
        assert flag in text
        shown = action.default not in (None, argparse.SUPPRESS)
        assert action.help + f" (default: {action.default})" * shown in text


# --- documentation --------------------------------------------------------------------------------


def page(script):
    path = ROOT / "docs" / f"{script}.md"
    assert path.exists(), f"docs/{script}.md is missing"
    return path.read_text()


def test_every_tag_in_the_source_is_documented(source):
    tags = re.findall(
        r'"((?:charts|losses|discriminator|critics|eval|accuracy)/\w+)"', source.read_text()
    )
    text = page(source.stem)
    undocumented = {tag for tag in tags if tag not in text}
    assert tags and not undocumented


def test_every_logged_tag_is_documented(case, finished):
    tags = EventAccumulator(str(finished)).Reload().Tags()["scalars"]
    text = page(case.script)
    undocumented = {tag for tag in tags if tag not in text}
    assert tags and not undocumented


def test_tags_are_the_uniform_ones(case, finished):
    groups = {"charts", "losses", "discriminator", "critics", "eval", "accuracy"}
    tags = EventAccumulator(str(finished)).Reload().Tags()["scalars"]
    assert {tag.split("/")[0] for tag in tags} <= groups
    assert {"eval/return_mean", "eval/return_std"} <= set(tags)
    assert any(tag.startswith("losses/") for tag in tags)


# --- dependencies ---------------------------------------------------------------------------------


def metadata(source):
    """The inline metadata of PEP 723."""
    (block,) = re.findall(r"(?m)^# /// script\n((?:#(?: .*)?\n)+)# ///$", source.read_text())
    return tomllib.loads("".join(line[2:] or "\n" for line in block.splitlines(keepends=True)))


def dependencies(source):
    found = [Requirement(text) for text in metadata(source)["dependencies"]]
    return {canonicalize_name(requirement.name): requirement for requirement in found}


def test_dependencies_are_what_is_imported(source):
    modules = set()
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.Import):
            modules |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            modules.add(node.module)
    imported = {module.split(".")[0] for module in modules} - sys.stdlib_module_names
    imported = {name for name in imported if not (ROOT / f"{name}.py").exists()}
    assert {canonicalize_name(name) for name in imported} == dependencies(source).keys() - INDIRECT


def test_dependencies_of_a_task_agree():
    first = {}
    for name in sync.SCRIPTS:
        ours = metadata(ROOT / name)
        task = name.removesuffix(".py").split("_")[-1 if "cartpole" in name else 1]
        assert ours == first.setdefault(task, ours), name


def test_requirements_satisfy_the_scripts(source):
    lines = (line.split("#")[0].strip() for line in (ROOT / "requirements.txt").open())
    pins = [Requirement(line) for line in lines if line and not line.startswith("-")]
    pins = {canonicalize_name(pin.name): pin for pin in pins}
    for name, needed in dependencies(source).items():
        assert name in pins, name
        (version,) = [pin.version for pin in pins[name].specifier if pin.operator == "=="]
        assert version in needed.specifier, f"{pins[name]}, needed {needed}"
        assert needed.extras <= pins[name].extras, f"{pins[name]}, needed {needed}"


def test_every_script_has_a_case():
    assert {case.path.name for case in CASES + RACECAR_CASES} >= set(sync.SCRIPTS)


def test_tables_match_the_results():
    report = [sys.executable, str(ROOT / "benchmark" / "report.py"), "--check"]
    done = subprocess.run(report, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
