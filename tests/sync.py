"""Copy what the scripts have in common from one of them to the others.

    python tests/sync.py gail_cartpole.py     the harness, and same-named functions and classes
    python tests/sync.py                      only say what differs (exit status 1 if anything does)

The harness is everything below its banner. The script that queries its expert has a second version
of it, whose functions and methods are the same except those in OWN_HARNESS. Above the harness, a
top-level function or class that has the same name in two scripts must have the same text. Each
script has its own `train`, and its own version of everything else in OWN; what is in PER_TASK need
only agree between scripts for the same task.
"""

import ast
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = [f"{name}.py" for name in (
    "bc_cartpole", "gail_cartpole", "gail_offline_cartpole",
    "gail_racecar_ppo", "gail_racecar_reinforce", "aggrevated_bipedal",
)]  # fmt: skip
BANNER = "# The harness: "
OWN = {"train", "add_settings", "diagnose", "update_policy", "behavioural_cloning_loss"}
PER_TASK = {"Policy", "Discriminator", "Environments", "gradient_penalty"}
ASKING = {"aggrevated_bipedal.py"}
OWN_HARNESS = {"parse_args", "sizes", "take", "play", "judge", "Run"}
OWN_HARNESS |= {"Run.__init__", "Run.record", "Run.finish"}


def split(text):
    """A script's text above the harness, and the harness with its banner."""
    above = text.index(BANNER)
    start = text.rindex("# ====", 0, above)
    return text[:start], text[start:]


def definitions(text):
    """The source of each top-level function and class, by name."""
    lines = text.splitlines(keepends=True)
    nodes = [n for n in ast.parse(text).body if isinstance(n, ast.FunctionDef | ast.ClassDef)]
    first = {n: min(x.lineno for x in (n, *n.decorator_list)) - 1 for n in nodes}
    return {n.name: "".join(lines[first[n] : n.end_lineno]) for n in nodes}


def members(text):
    """The source of each top-level function and of each method, by name."""
    found = definitions(text)
    for node in ast.parse(text).body:
        if isinstance(node, ast.ClassDef):
            source = textwrap.dedent(found.pop(node.name).partition("\n")[2])
            found |= {f"{node.name}.{name}": body for name, body in definitions(source).items()}
    return found


def differences(texts):
    """A line for each thing that should be the same in two scripts and is not."""
    found, first = [], {}
    for script, text in texts.items():
        above, harness = split(text)
        parts = {"the harness": harness, **members(harness), **definitions(above)}
        own = OWN
        if script in ASKING:
            own = OWN | OWN_HARNESS | {"the harness"}
        for name, source in parts.items():
            if name in own:
                continue
            task = task_of(script) if name in PER_TASK else None
            other, expected = first.setdefault((name, task), (script, source))
            if source != expected:
                pairs = enumerate(zip(source.splitlines(), expected.splitlines()), 1)
                line = next((i for i, (a, b) in pairs if a != b), "the last")
                found.append(f"{name} differs in {other} and {script}, from its line {line} on")
    return found


def copy_from(model, text, same_task=True, same_harness=True):
    """`text` with the harness and the same-named definitions of the script `model`."""
    (source, harness), (above, old) = split(model), split(text)
    ours, theirs = definitions(above), definitions(source)
    for name in ours.keys() & theirs.keys() - OWN - (set() if same_task else PER_TASK):
        above = above.replace(ours[name], theirs[name])
    if not same_harness:
        ours, theirs = members(old), members(harness)
        for name in ours.keys() & theirs.keys() - OWN_HARNESS:
            indent = "    " * ("." in name)
            ours[name], theirs[name] = (textwrap.indent(x[name], indent) for x in (ours, theirs))
            old = old.replace(ours[name], theirs[name])
    return above + (harness if same_harness else old)


def task_of(script):
    if script in ("bc_cartpole.py", "gail_offline_cartpole.py"):
        return script  # one squashes actions, the other has none but Discrete ones
    return script.removesuffix(".py").split("_")[-1 if "cartpole" in script else 1]


def texts():
    return {name: (ROOT / name).read_text() for name in SCRIPTS}


def main():
    if len(sys.argv) > 1:
        model, found = sys.argv[1], texts()
        for name, text in found.items():
            alike = (task_of(name) == task_of(model), (name in ASKING) == (model in ASKING))
            (ROOT / name).write_text(copy_from(found[model], text, *alike))
    found = differences(texts())
    print("\n".join(found) or "the scripts agree")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
