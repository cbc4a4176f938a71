"""From how many starts does a policy of gail_cartpole.py fall? A hundred episodes may show none.

    python benchmark/run.py gail_cartpole gail_cartpole_ablations
    python benchmark/falling_starts.py

Plays the final policies of these runs from 10,000 starts each. Each row of the result is an
experiment's variant, with every seed's share.
"""

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmark" / "results" / "falling_starts.json"
STARTS, SEED = 10_000, 3_000_000  # apart from training's and evaluation's
VARIANTS = {
    "gail_cartpole__ppo": range(1, 11),
    "gail_cartpole_ablations__default": range(1, 6),
    "gail_cartpole_ablations__last_policy": range(1, 6),
}


def falling(script, folder):
    """The first observations from which a run's policy falls: (falls, 4)."""
    saved = torch.load(folder / "policy.pt", weights_only=True)
    policy = script.Policy(**saved["network"])
    policy.load_state_dict(saved["weights"])
    episodes = script.play(policy.act, saved["env_id"], STARTS, SEED)
    return np.array([e["observations"][0] for e in episodes if e["terminated"]]).reshape(-1, 4)


def main():
    sys.path.insert(0, str(ROOT))
    script = importlib.import_module("gail_cartpole")
    table = []
    for name, seeds in VARIANTS.items():
        starts = [falling(script, ROOT / "runs" / "benchmark" / f"{name}__{i}") for i in seeds]
        shares = ", ".join(f"{len(each) / STARTS:.2%}" for each in starts)
        angles = np.abs(np.concatenate(starts)[:, 2])
        row = {"policies": name.replace("__", ", ").replace("_policy", " policy")}
        row |= {"share of the starts that fall, every seed": shares}
        row["mean size of their angle, of 0.05"] = f"{angles.mean():.3f}" if len(angles) else "none"
        table.append(row)
    command = "python benchmark/falling_starts.py"
    RESULT.write_text(json.dumps({"command": command, "starts": STARTS, "table": table}, indent=1))


if __name__ == "__main__":
    main()
