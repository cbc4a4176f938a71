"""How large does a negative log D become, with and without the gradient penalty?

    python benchmark/run.py gail_cartpole_rewards gail_cartpole_little
    python benchmark/least_log_d.py

The final discriminators of runs with log D and absorbing states, on 20 episodes of a random policy:
most of these pairs are easy for any D, so its logit is free to grow.
"""

import json
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from cost_ranks import discriminator  # noqa: E402

import gail_cartpole as gail  # noqa: E402

RESULT = ROOT / "benchmark" / "results" / "least_log_d.json"
RUNS = {
    "with the penalty": "gail_cartpole_rewards__logd_absorbing",
    "without": "gail_cartpole_little__log_D_without_a_gradient_penalty",
}


@torch.no_grad()
def main():
    episodes = gail.play(None, "CartPole-v1", 20, 2_000_000)
    pairs = gail.make_pairs(*gail.tensors(episodes))
    table = []
    for name, runs in RUNS.items():
        networks = [discriminator(f"{runs}__{seed}") for seed in range(1, 6)]
        values = [gail.imitation_reward(network(pairs), "logd") for network in networks]
        line = {"gradient penalty": name}
        for which, reduce in (("median log D", torch.median), ("least log D", torch.min)):
            line[f"{which}, seeds 1 to 5"] = ", ".join(f"{float(reduce(x)):.1f}" for x in values)
        table.append(line)
    command = "python benchmark/least_log_d.py"
    RESULT.write_text(json.dumps({"command": command, "table": table}, indent=1))
    print(*table, sep="\n")


if __name__ == "__main__":
    main()
