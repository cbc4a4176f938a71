"""Why some iterations fail: V* at the start of a walk, and policies that follow several critics.

    python aggrevated_bipedal.py --seed 16 --iterations 12 --run-name collapsed
    python benchmark/bipedal_start.py runs/collapsed > benchmark/results/bipedal_start.json

The transitions are the run's. Its critics are compared with some that were trained for longer, and
with new ones, whose inputs are standardized or not: their V* on the first steps of the expert's
walks with the discounted returns that followed, then the walks of policies that were trained with
each. These begin as the run's best policy, and take one iteration's updates with A* at full weight.

Whether that run's twelfth policy falls depends on the last bit. It does at commit cdde031, where
--eval-every 1 --validation-episodes 100 was given, too.
"""

import argparse
import copy
import json
import sys
from pathlib import Path

import numpy as np
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import aggrevated_bipedal as script

STEPS = (0, 20, 40, 200)
SEED = 900_000  # of the walks; neither training's nor evaluation's begin here


def refitted(critics, target, transitions, updates, args):
    """`critics`, trained for so many updates on all transitions."""
    optimizer = torch.optim.Adam(critics.parameters(), args.critic_lr, fused=True)
    settings = argparse.Namespace(**{**vars(args), "critic_updates": updates})
    script.refit(critics, target, optimizer, transitions, settings)
    return critics


def candidates(checkpoint, transitions, args):
    """Several critics: yields (name, critics)."""
    sizes = (28, args.critic_hidden, args.critic_hidden, 1)

    def make():
        critics = script.Critics(script.relu_mlp(*sizes) for _ in range(args.critics))
        return critics, AveragedModel(critics, multi_avg_fn=get_ema_multi_avg_fn(0.95))

    def saved():
        critics, target = make()
        critics.load_state_dict(checkpoint["critics"])
        target.load_state_dict(checkpoint["target"])
        return critics, target

    yield "the run's", saved()[0]
    yield "the run's, 3,000 updates more", refitted(*saved(), transitions, 3_000, args)
    for updates in (5_000, 12_000):
        yield f"new, {updates:,} updates", refitted(*make(), transitions, updates, args)
        critics, target = make()
        columns = transitions.columns
        critics.standardize.measure(torch.cat([columns["observations"], columns["actions"]], -1))
        target.module.load_state_dict(critics.state_dict())
        critics = refitted(critics, target, transitions, updates, args)
        yield f"new, standardized, {updates:,} updates", critics


def improved(best, critics, transitions, args):
    """A copy of the policy `best` after one iteration's updates with these critics."""
    policy = copy.deepcopy(best)
    optimizer = torch.optim.Adam(policy.parameters(), args.policy_lr, fused=True)
    script.improve(policy, critics, optimizer, transitions, 1.0, args)
    return policy


def fell(episode):
    return bool(episode["rewards"][-1] <= script.FALL)


def values(walks, args):
    """Observations at STEPS of the walks, and the mean discounted returns from there."""
    walks = [walk for walk in walks if len(walk["rewards"]) > max(STEPS)]
    states, returns = [], []
    for step in STEPS:
        states.append(torch.as_tensor(np.stack([walk["observations"][step] for walk in walks])))
        rewards = (torch.as_tensor(walk["rewards"][step:]).float() for walk in walks)
        following = [float(script.discounted_returns(x, args.gamma)[0]) for x in rewards]
        returns.append(float(np.mean(following)))
    return states, returns


def tabulate(row):
    """A row of the table in docs/aggrevated_bipedal.md."""
    line = {"critics": row["critics"]}
    line |= {f"V* at step {k}": f"{value:.1f}" for k, value in zip(STEPS, row["values"])}
    walks = row.get("walks", [])
    line["policies that follow A*: returns"] = ", ".join(f"{x['return_mean']:.0f}" for x in walks)
    falls, episodes = (sum(x[name] for x in walks) for name in ("falls", "episodes"))
    line["walks that ended in a fall"] = f"{falls} of {episodes}" if walks else ""
    return line


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", help="a run's folder, with its checkpoint")
    parser.add_argument("--policies", type=int, default=4, help="trained with each of the critics")
    parser.add_argument("--episodes", type=int, default=60, help="of each policy")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    checkpoint = script.read_checkpoint(Path(chosen.run, "checkpoint.pt"))
    args = argparse.Namespace(**checkpoint["args"])
    expert = script.make_expert(args)
    best = script.Policy(args.hidden, args.std)
    best.load_state_dict(checkpoint["best"])
    transitions = script.Transitions()
    transitions.load_state_dict(checkpoint["transitions"])
    walks = script.play(expert.act, args.env_id, chosen.episodes, SEED)
    states, returns = values(walks, args)
    rows = [{"critics": "none: the expert's returns", "values": returns}]
    torch.manual_seed(0)
    for name, critics in candidates(checkpoint, transitions, args):
        with torch.no_grad():
            of_expert = [float(critics(x, expert.greedy(x)).mean()) for x in states]
        rows.append({"critics": name, "values": of_expert, "walks": []})
        for i in range(chosen.policies):
            torch.manual_seed(i)
            policy = improved(best, critics, transitions, args)
            episodes = script.play(policy.act, args.env_id, chosen.episodes, SEED + 1_000)
            result = {**script.statistics(episodes), "falls": sum(map(fell, episodes))}
            rows[-1]["walks"].append(result)
        print(tabulate(rows[-1]), file=sys.stderr)
    about = {"command": "python " + " ".join([Path(sys.argv[0]).as_posix(), *sys.argv[1:]])}
    validations = [[point["updates"], point["return_mean"]] for point in checkpoint["curve"]]
    about |= {"settings": checkpoint["args"], "validations": validations}
    table = [tabulate(row) for row in rows]
    print(json.dumps({**about, "table": table, "critics": rows}, indent=1))


if __name__ == "__main__":
    main()
