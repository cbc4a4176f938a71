"""These scripts and the `imitation` library on tasks that neither was tuned for.

    python benchmark/peers_tasks.py --peer-python .venv-peer/bin/python --seeds 1-5

From the same four demonstrations: cloning (8,000 updates), and 200,000 steps of GAIL from scratch
and with cloning first; here that is the default, there GAIL goes on with the cloned policy. The
scripts have their defaults, the library its tutorials' settings. It needs an older Gymnasium,
whose Hopper-v4 has the observations, actions and (but for 1 at a fall) rewards of Hopper-v5.

Solved: 95 % of the way from random to the expert at an evaluation of 20 greedy episodes and at
every later one. Evaluations are every 16,384 steps (a round there) and not counted in the seconds.
For each seed one run follows the other, one thread each. It goes on where it stopped; the result
is benchmark/results/peers_tasks.json.
"""

from itertools import product

from peers import measure, parse_args

TASKS = {"Acrobot-v1": "Acrobot-v1", "Pendulum-v1": "Pendulum-v1", "Hopper-v5": "Hopper-v4"}
BUDGET = ["--total-steps", 200_000]
OURS = {
    "cloning": ["bc_cartpole.py", "--total-steps", 8_000, "--eval-every", 1_000],
    "GAIL": ["gail_cartpole.py", *BUDGET, "--eval-every", 16_384, "--bc-weight", 0],
    "cloning and GAIL": ["gail_cartpole.py", *BUDGET, "--eval-every", 16_384],
}
THEIRS = {"cloning": "bc", "GAIL": "gail", "cloning and GAIL": "bc+gail"}


def comparison(task, learner):
    there = [THEIRS[learner], "--env-id", TASKS[task], "--updates", 8_000, *BUDGET]
    return {
        "about": {"variant": task, "algorithm": learner},
        "flags": ["--env-id", task, "--num-demos", 4],
        "here": OURS[learner],
        "there": [*there, "--eval-episodes", 20],
    }


if __name__ == "__main__":
    comparisons = [comparison(*which) for which in product(TASKS, OURS)]
    measure("peers_tasks", "peers_tasks.py", parse_args(__doc__), comparisons)
