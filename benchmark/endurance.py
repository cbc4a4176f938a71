"""Train for a million environment steps, and check that memory, files and speed stay the same.

    python benchmark/endurance.py gail_cartpole.py --total-steps 1000000 --eval-every 100000
    python benchmark/endurance.py gail_racecar_ppo.py --total-steps 1000000 --eval-every 100000

Flags are the script's own. After each iteration the resident memory, the open files and, for the
race car, the physics clients of the process are counted. Each row of the result is one run.
"""

import importlib
import json
import os
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmark" / "results" / "endurance.json"
PAGE = os.sysconf("SC_PAGE_SIZE")


def physics_clients():
    """How many PyBullet clients this process has; 0 where it has not loaded PyBullet."""
    if "pybullet" not in sys.modules:
        return 0
    pybullet = sys.modules["pybullet"]
    return sum(pybullet.isConnected(physicsClientId=i) for i in range(1024))


def watch(script, samples):
    """Let `Run.record` of this script take a sample after each iteration."""
    record = script.Run.record

    def recording(run, *args):
        record(run, *args)
        memory = int(Path("/proc/self/statm").read_text().split()[1]) * PAGE
        files = len(os.listdir("/proc/self/fd"))
        samples.append((run.steps, run.wall_seconds, memory, files, physics_clients()))

    script.Run.record = recording


def measure(samples):
    """The row of a run; memory, files and clients leave out the first tenth, as warm-up."""
    samples = np.array(samples)
    steps, seconds, memory, files, clients = samples.T
    late = steps > 0.1 * steps[-1]
    slope = np.polyfit(steps[late], memory[late], 1)[0]
    tenth = [steps < 0.1 * steps[-1], steps >= 0.9 * steps[-1]]
    first, last = (np.ptp(steps[part]) / np.ptp(seconds[part]) for part in tenth)
    return {
        "steps": f"{int(steps[-1]):,}",
        "memory, MB": f"{memory[late][0] / 1e6:.0f} to {memory[-1] / 1e6:.0f}",
        "MB a million steps": f"{slope:+.1f}",
        "open files": f"{int(files[late].min())} to {int(files[late].max())}",
        "physics clients": f"{int(clients[late].min())} to {int(clients[late].max())}",
        "steps/s, first tenth": f"{first:,.0f}",
        "last by first": f"{last / first:.2f}",
    }


def main():
    if len(sys.argv) < 2:
        print(__doc__)
        return 2
    path, *flags = sys.argv[1:]
    sys.path.insert(0, str(ROOT))
    script, samples = importlib.import_module(Path(path).stem), []
    watch(script, samples)
    status = script.main(flags)
    rows = json.loads(RESULT.read_text())["table"] if RESULT.exists() else []
    rows = [row for row in rows if row["run"].split()[0] != path]
    rows = sorted([*rows, {"run": " ".join(sys.argv[1:]), **measure(samples)}], key=str)
    command = "python benchmark/endurance.py RUN"
    RESULT.write_text(json.dumps({"command": command, "table": rows}, indent=1))
    return status


if __name__ == "__main__":
    sys.exit(main())
