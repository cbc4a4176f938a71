"""Does GAIL's learnt reward rank policies that its discriminator never saw?

    python benchmark/run.py gail_cartpole gail_cartpole_ablations gail_cartpole_controls
    python benchmark/cost_ranks.py

The discriminators are the final ones of `gail_cartpole`, and ones that get half of their negative
pairs from earlier rollouts. The policies are clones of thirty pairs after more and more updates,
those of the constant-reward control, and a random one; each plays 20 episodes. Their learnt reward
-log(1 - D), summed over an episode or averaged over steps, is compared by rank correlation with
their return and with their closeness to the expert's occupancy.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import bc_cartpole  # noqa: E402
import gail_cartpole as gail  # noqa: E402

RUNS, RESULT = ROOT / "runs" / "benchmark", ROOT / "benchmark" / "results" / "cost_ranks.json"
SEEDS, ENV_ID, EPISODES = range(1, 11), "CartPole-v1", 20
DISCRIMINATORS = {
    "the newest rollout": [f"gail_cartpole__ppo__{seed}" for seed in SEEDS],
    "and a memory of earlier ones": [f"gail_cartpole_ablations__memory__{s}" for s in range(1, 6)],
}


def clones(seed):
    """Policies cloned from thirty pairs, after 20, 50, 100, 300 and 1,000 updates."""
    args = bc_cartpole.parse_args(["--num-pairs", "30", "--seed", str(seed)])
    observations, actions = bc_cartpole.tensors(bc_cartpole.load_demos(args)[0])
    torch.manual_seed(seed)
    policy = gail.Policy(64)
    optimizer = torch.optim.Adam(policy.parameters(), 3e-3)
    for update in range(1, 1_001):
        gail.descend(optimizer, gail.behavioural_cloning_loss(policy, observations, actions))
        if update in (20, 50, 100, 300, 1_000):
            yield f"clone, {update} updates", gail.play(policy.act, ENV_ID, EPISODES, 2_000_000)


def played():
    """Episodes of each policy: (name, list of episodes)."""
    yield "random", gail.play(None, ENV_ID, EPISODES, 2_000_000)
    for seed in SEEDS:
        yield from clones(seed)
        path = RUNS / f"gail_cartpole_controls__constant-reward__{seed}" / "policy.pt"
        saved = torch.load(path, weights_only=True)
        policy = gail.Policy(**saved["network"])
        policy.load_state_dict(saved["weights"])
        yield "constant reward", gail.play(policy.act, ENV_ID, EPISODES, 2_000_000)


def discriminator(run_name):
    weights = torch.load(RUNS / run_name / "checkpoint.pt", weights_only=True)["discriminator"]
    network = gail.Discriminator(64, weights["mean"], weights["std"])
    network.load_state_dict(weights)
    return network


@torch.no_grad()
def rewards(network, episodes):
    """-log(1 - D) of each step: a list of (steps,)."""
    pairs = [gail.make_pairs(*gail.tensors([episode])) for episode in episodes]
    return [gail.imitation_reward(network(x), "gail") for x in pairs]


def rank_correlation(x, y):
    """Spearman's; equal values share their mean rank."""
    ranks = [np.sign(v[:, None] - v).sum(1) for v in map(np.array, (x, y))]
    return float(np.corrcoef(ranks)[0, 1])


def main():
    args = gail.parse_args([])
    held_out, policies = gail.load_demos(args)[2], list(played())
    samples = {str(i): episodes for i, (_, episodes) in enumerate(policies)}
    samples["random"] = policies[0][1]
    distances = gail.occupancy_distances(ENV_ID, held_out, samples)
    closeness = -np.array([distances[str(i)] for i in range(len(policies))])
    returns = np.array([gail.statistics(e)["return_mean"] for _, e in policies])
    table, seeds = [], {}
    for refuses, runs in DISCRIMINATORS.items():
        networks = map(discriminator, runs)
        each = [[rewards(network, e) for _, e in policies] for network in networks]
        says = {
            "summed over an episode": lambda steps: np.mean([float(r.sum()) for r in steps]),
            "mean of a step": lambda steps: float(torch.cat(steps).mean()),
        }
        for name, value in says.items():
            line = {"D refuses pairs of": refuses, "seeds": len(runs), "learnt reward": name}
            values = [[value(steps) for steps in policy_rewards] for policy_rewards in each]
            for goal, ranks in (("the return", returns), ("closeness to the expert", closeness)):
                found = [rank_correlation(v, ranks) for v in values]
                seeds[f"{refuses}, {name}, {goal}"] = found
                span = f"{np.mean(found):.2f} ({min(found):.2f} to {max(found):.2f})"
                line[f"with {goal}"] = span
            table.append(line)
    note = {"policies": len(policies), "returns": returns.tolist(), "correlations": seeds}
    command = "python benchmark/cost_ranks.py"
    RESULT.write_text(json.dumps({"command": command, "table": table, **note}, indent=1))
    for line in table:
        print(line)


if __name__ == "__main__":
    main()
