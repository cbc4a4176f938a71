"""Plant faults in a copy of the project, one at a time, and see whether the tests find each.

    python benchmark/plant_faults.py                    all: some forty minutes on two cores
    python benchmark/plant_faults.py --only mask seed   those whose name holds one of these words

The faults are in faults.txt: a name, lines with - and what takes their place, with +. A fault goes
into every script that has its text, so that the scripts still agree with one another. It is found
if the suite fails. Exit status 1 if one is not.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LEFT = shutil.ignore_patterns(".git", "runs", "__pycache__", ".venv*", ".*_cache")


def read_faults():
    """Of each fault in faults.txt its name, the text, and what takes its place."""
    for fault in (ROOT / "benchmark" / "faults.txt").read_text().split("\n\n"):
        name, *lines = fault.splitlines()
        texts = ["\n".join(x[1:] for x in lines if x[0] == sign) for sign in "-+"]
        yield name.removeprefix("# "), *texts


def plant(folder, old, new):
    """Put the fault into every script below `folder` that has the text; returns how many."""
    paths = [path for path in folder.glob("*.py") if old in path.read_text()]
    for path in paths:
        path.write_text(path.read_text().replace(old, new))
    return len(paths)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", default=[""], help="words of the faults' names")
    parser.add_argument("tests", nargs="*", help="what to run (default: the whole suite)")
    args = parser.parse_args()
    missed = []
    for name, old, new in read_faults():
        if not any(word in name for word in args.only):
            continue
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder, "project")
            shutil.copytree(ROOT, copy, ignore=LEFT)
            scripts = plant(copy, old, new)
            if not scripts:
                raise SystemExit(f"{name}: its text is in no script any more")
            command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", *args.tests]
            done = subprocess.run(command, cwd=copy, capture_output=True, text=True)
        found = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
        if not found:
            missed.append(name)
        print(f"{name} ({scripts} scripts): {(found or ['NOT FOUND'])[0]}", flush=True)
    print(f"{len(missed)} not found: {'; '.join(missed)}" if missed else "all are found")
    return bool(missed)


if __name__ == "__main__":
    sys.exit(main())
