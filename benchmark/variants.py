"""Run a script with a part of it replaced by name, to see what that part is for.

    python benchmark/variants.py no-critic gail_racecar_ppo.py --seed 1
    python benchmark/variants.py                                  list them

The scripts carry no flags for this: a variant is a function of this file that changes the script's
module before its main() runs. Flags, run folder and summary are the script's own.
"""

import importlib
import inspect
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent


def places_by_15(script):
    """The first attempts' scale: x and y divided by 15, the track's size. D's units stay 0.2 m."""
    script.METRE = 1 / 15
    script.UNITS = [0.2 / 15, 0.2 / 15, *script.UNITS[2:]]


def no_critic(script):
    """Every value is 0: advantages are rewards, discounted by gamma * lambda."""

    mlp = script.mlp

    def without(inputs, hidden, outputs):
        network = mlp(inputs, hidden, outputs)
        if (inputs, outputs) == (10, 1):  # the critic alone maps ten features to one number
            network[-1].register_forward_hook(lambda layer, given, values: 0 * values)
        return network

    script.mlp = without


def one_absorbing_state(script):
    """As in DAC: one absorbing state after every end, at the finish and at a wall."""

    class OneState(script.Discriminator):
        def absorbing_pairs(self, finished):
            return super().absorbing_pairs(torch.ones_like(finished))

    script.Discriminator = OneState


def constant_std(script):
    """The actions' standard deviation stays where it begins."""
    script.FINAL_STD = script.STD


def coarse_units(script):
    """D's units are five times as large, so that it sees differences less finely."""
    script.UNITS = [5 * unit for unit in script.UNITS]


def biases_near_0(script):
    """PyTorch's own initialisation: no unit of a first layer is moved to where the data are."""
    script.spread = lambda layer, inputs: None


def larger_final_lr(script):
    """The step sizes end at 5 % of their initial values."""
    script.FINAL_LR = 0.05


def no_advantage(script):
    """AggreVaTeD's roll-ins and states, but A* has the weight 0: what is left is imitation."""
    loss = script.aggrevated_loss

    def without(policy, critics, states, expert_actions, weight, args):
        return loss(policy, critics, states, expert_actions, 0.0, args)

    script.aggrevated_loss = without


def plain_discriminator(script):
    """Offline GAIL's discriminator without -log pi: its logit is the network's output."""
    script.discriminator_logits = lambda network, observations, log_probs: network(observations)


def plain_gradient(script):
    """Offline GAIL with the plain policy gradient: each action's probability is a factor."""

    def loss(log_probs, rewards):
        return -(log_probs.exp() * rewards).sum(-1).mean()

    script.natural_policy_loss = loss


def states_only(script):
    """D sees the states of CartPole and not the actions."""

    class StatesOnly(script.Discriminator):
        def make_pairs(self, observations, actions):
            pairs = super().make_pairs(observations, actions)
            return torch.cat([pairs[..., :4], 0 * pairs[..., 4:]], -1)

    script.Discriminator = StatesOnly


def next_states(script):
    """D sees CartPole's state and the next one, not the action, as a film would show them."""

    class NextStates(script.Discriminator):
        def __init__(self, policy, hidden):
            super().__init__(policy, hidden)
            self.network, self.unit = script.mlp(9, hidden, 1), None

        def make_pairs(self, observations, actions):
            change = cartpole_step(observations, actions) - observations
            if self.unit is None:  # the first pairs are the expert's
                self.unit = change.std(0) + 1e-6
            flag = torch.zeros_like(observations[..., :1])
            return torch.cat([self.standardise(observations), change / self.unit, flag], -1)

    script.Discriminator = NextStates


def cartpole_step(observations, actions):
    """The next state of Gymnasium's CartPole: (..., 4), (...) -> (..., 4)."""
    x, speed, angle, turn = observations.unbind(-1)
    force = 10.0 * (2 * actions - 1)
    pull = (force + 0.05 * turn**2 * angle.sin()) / 1.1
    length = 0.5 * (4 / 3 - 0.1 * angle.cos() ** 2 / 1.1)
    twist = (9.8 * angle.sin() - angle.cos() * pull) / length
    push = pull - 0.05 * twist * angle.cos() / 1.1
    after = (x + 0.02 * speed, speed + 0.02 * push, angle + 0.02 * turn, turn + 0.02 * twist)
    return torch.stack(after, -1)


def long_average(script):
    """A Gaussian's average reaches back over a third of the run, as that of a softmax does."""
    script.BOX_POWER = 1


def last_policy(script):
    """What is evaluated and kept is the policy itself, not an average."""
    move = script.move_average
    script.move_average = lambda averages, parameters, rate: move(averages, parameters, 1.0)


def all_at_once(script):
    """No first episode is cut: environments whose episodes last equally long stay in step."""

    class Together(script.Environments):
        def __init__(self, *settings):
            super().__init__(*settings)
            self.cuts = [0] * len(self.cuts)

    script.Environments = Together


def memory(script):
    """Half of D's negative pairs are from earlier rollouts, 64 of each.

    The memory is not in the checkpoint: a resumed run begins a new one."""
    update_discriminator, remembered = script.update_discriminator, []

    def update(discriminator, optimizer, expert_pairs, policy_pairs, args):
        remembered.append(policy_pairs[torch.randperm(len(policy_pairs))[:64]])
        earlier = torch.cat(remembered)
        drawn = torch.randint(len(earlier), (len(policy_pairs),))
        both = torch.cat([policy_pairs, earlier[drawn]])
        return update_discriminator(discriminator, optimizer, expert_pairs, both, args)

    script.update_discriminator = update


def full_size_ends(script):
    """D sees the last observation that the absorbing state remembers in its full size."""
    script.Discriminator.end_scale = 1.0


def one_rollout(script):
    """D learns from the newest rollout alone, with an absorbing state as well."""
    script.Recent.rollouts = 1


def linear_policy(script):
    """What GAIL trains is a linear policy: ten numbers."""

    class Linear(script.Policy):
        def __init__(self, inputs, low, high, hidden):
            super().__init__(inputs, low, high, hidden)
            self.network = torch.nn.Sequential(
                torch.nn.Linear(inputs, self.network[-1].out_features)
            )

    script.Policy = Linear


# Every function above that takes a script, and no more.
VARIANTS = {
    name.replace("_", "-"): function
    for name, function in list(globals().items())
    if inspect.isfunction(function) and list(inspect.signature(function).parameters) == ["script"]
}


def main():
    if len(sys.argv) < 3 or sys.argv[1] not in VARIANTS:
        for name, variant in VARIANTS.items():
            print(f"{name:20} {variant.__doc__.splitlines()[0]}")
        return 2
    name, path, *flags = sys.argv[1:]
    sys.path.insert(0, str(ROOT))
    script = importlib.import_module(Path(path).stem)
    VARIANTS[name](script)
    return script.main(flags)


if __name__ == "__main__":
    sys.exit(main())
