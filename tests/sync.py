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
OWN_HARNESS = {"parse_args", "sizes", "begin", "take", "play", "judge", "Run"}
OWN_HARNESS |= {"Run.__init__", "Run.record", "Run.finish"}


def shared(script, text):
    """The source of its harness, of each function and class, in the harness of each method instead
    of the class, by name and by task where that matters; without what is its own."""
    own = OWN | OWN_HARNESS | {"the harness"} if script in ASKING else OWN
    lines = text.splitlines(keepends=True)
    banner = next(i for i, line in enumerate(lines) if line.startswith(BANNER)) - 1
    found = {"the harness": "".join(lines[banner:])}

    def add(nodes, prefix=""):
        for node in nodes:
            if not isinstance(node, ast.FunctionDef | ast.ClassDef):
                continue
            first = min(x.lineno for x in (node, *node.decorator_list)) - 1
            if isinstance(node, ast.ClassDef) and first > banner:
                add(node.body, f"{node.name}.")
            else:
                found[prefix + node.name] = "".join(lines[first : node.end_lineno])

    add(ast.parse(text).body)
    tasks = dict.fromkeys(PER_TASK, task_of(script))
    return {(name, tasks.get(name)): x for name, x in found.items() if name not in own}


def differences(texts):
    """A line for each thing that should be the same in two scripts and is not."""
    found, first = [], {}
    for script, text in texts.items():
        for key, source in shared(script, text).items():
            other, expected = first.setdefault(key, (script, source))
            if source != expected:
                pairs = enumerate(zip(source.splitlines(), expected.splitlines()), 1)
                line = next((i for i, (a, b) in pairs if a != b), "the last")
                found.append(f"{key[0]} differs in {other} and {script}, from its line {line} on")
    return found


def task_of(script):
    if script in ("bc_cartpole.py", "gail_offline_cartpole.py"):
        return script  # one squashes actions, the other has none but Discrete ones
    return script.removesuffix(".py").split("_")[-1 if "cartpole" in script else 1]


def texts():
    return {name: (ROOT / name).read_text() for name in SCRIPTS}


def main():
    if len(sys.argv) > 1:
        model = shared(sys.argv[1], texts()[sys.argv[1]])
        for script, text in texts().items():
            for key, source in shared(script, text).items():
                text = text.replace(source, model.get(key, source))
            (ROOT / script).write_text(text)
    found = differences(texts())
    print("\n".join(found) or "the scripts agree")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
