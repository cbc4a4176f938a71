"""Run a script with a part of it replaced by name, to see what that part is for.

    python benchmark/variants.py no-critic gail_racecar_ppo.py --seed 1
    python benchmark/variants.py                                  list them

The scripts carry no flags for this: a variant is a function of this file that changes the script's
module before its main() runs. Flags, run folder and summary are the script's own.
"""

import importlib
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent


def as_it_is(script):
    """Nothing is replaced."""


def places_by_15(script):
    """The first attempts' scale: x and y divided by 15, the track's size. D's units stay 0.2 m."""
    script.METRE = 1 / 15
    script.UNITS = [0.2 / 15, 0.2 / 15, *script.UNITS[2:]]


def no_critic(script):
    """Every value is 0: advantages are rewards, discounted by gamma * lambda."""

    class NoCritic(script.Critic):
        def forward(self, observations):
            return super().forward(observations) * 0

    script.Critic = NoCritic


def one_absorbing_state(script):
    """As in DAC: one absorbing state after every end, at the finish and at a wall."""
    absorbing_pairs = script.absorbing_pairs
    script.absorbing_pairs = lambda finished: absorbing_pairs(torch.ones_like(finished))


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
    """AggreVaTeD's roll-ins and states, but A* is 0: what is left is imitation."""
    script.cautious_advantages = lambda critics, observations, actions, *_: 0 * actions.sum(-1)


def score_function(script):
    """AggreVaTeD's gradient as in the paper: of log pi, weighted by A* of eight fresh actions."""

    def loss(policy, critics, observations, expert_actions, weight, caution, anchor):
        gaussian = policy(observations).base_dist
        samples = gaussian.sample((8,))
        columns = (observations, samples.tanh(), expert_actions)
        flat = (column.expand(8, -1, -1).flatten(0, 1) for column in columns)
        with torch.no_grad():
            advantages = script.cautious_advantages(critics, *flat, caution).view(8, -1)
        scores = gaussian.log_prob(samples).sum(-1) * (advantages - advantages.mean(0))
        distances = (policy.greedy(observations) - expert_actions).square().sum(-1)
        return anchor * distances.mean() - weight * scores.mean() * 8 / 7  # the mean includes each

    script.aggrevated_loss = loss


def natural_gradient(script):
    """AggreVaTeD's policy steps along the natural gradient, in place of Adam's."""

    def improve(policy, critics, optimizer, transitions, weight, args):
        critics.requires_grad_(False)
        total = torch.zeros(())
        for _ in range(args.policy_updates):
            batch = transitions.sample(args.batch_size, args.device)
            states = (batch["observations"], batch["expert_actions"])
            loss = script.aggrevated_loss(
                policy, critics, *states, weight, args.caution, args.anchor
            )
            natural_step(policy, batch["observations"], loss)
            total += loss.detach()
        critics.requires_grad_(True)
        return {"losses/policy": float(total) / args.policy_updates}

    script.improve = improve


def natural_step(policy, observations, loss, kl=1e-4, damping=1e-3, iterations=10):
    """Step along -F^-1 g, at most so far that the Gaussian moves by `kl` nats."""
    parameters = list(policy.parameters())

    def flat_gradient(value, **kwargs):
        return torch.cat([g.flatten() for g in torch.autograd.grad(value, parameters, **kwargs)])

    gradient = flat_gradient(loss)
    means = policy.network(observations)
    distance = (means - means.detach()).square().sum(-1).mean() / policy.settings["std"] ** 2 / 2
    slope = flat_gradient(distance, create_graph=True)
    direction, residual = torch.zeros_like(gradient), gradient.clone()
    search, norm = residual.clone(), residual.dot(residual)
    for _ in range(iterations):  # conjugate gradients
        product = flat_gradient(slope.dot(search), retain_graph=True) + damping * search
        length = norm / search.dot(product)
        direction, residual = direction + length * search, residual - length * product
        norm, before = residual.dot(residual), norm
        search = residual + norm / before * search
    step = min(1.0, float((2 * kl / direction.dot(gradient).clamp(min=1e-12)).sqrt()))
    with torch.no_grad():
        for parameter, part in zip(
            parameters, direction.split([parameter.numel() for parameter in parameters])
        ):
            parameter -= step * part.view_as(parameter)


def min_max_weights(script):
    """The first attempt's: -log pi of executed actions, weighted by Q* scaled to [0, 1]."""

    def improve(policy, critics, optimizer, transitions, weight, args):
        columns = transitions.columns
        observations, actions = columns["observations"], columns["actions"].clamp(-0.999, 0.999)
        with torch.no_grad():
            values = critics(observations, actions).min(0).values
            weights = (values - values.min()) / (values.max() - values.min())
        total = torch.zeros(())
        for _ in range(args.policy_updates):
            rows = torch.randint(len(weights), (args.batch_size,))
            log_probs = policy(observations[rows]).log_prob(actions[rows]).sum(-1)
            loss = -(weights[rows] * log_probs).mean()
            script.descend(optimizer, loss)
            total += loss.detach()
        return {"losses/policy": float(total) / args.policy_updates}

    script.improve = improve


def executed_actions(script):
    """As in the authors' code: log pi of the actions taken, times r + gamma V*(s') - V*(s)."""

    def improve(policy, critics, optimizer, transitions, weight, args):
        columns = transitions.columns
        with torch.no_grad():
            values = critics(columns["observations"], columns["expert_actions"]).mean(0)
            following = critics(columns["next_observations"], columns["next_expert_actions"])
            following = args.gamma * ~columns["fell"] * following.mean(0)
            advantages = columns["rewards"] + following - values
        before_the_switch = (~columns["tail"]).nonzero()[:, 0]
        total = torch.zeros(())
        for _ in range(args.policy_updates):
            rows = before_the_switch[torch.randint(len(before_the_switch), (args.batch_size,))]
            observations = columns["observations"][rows]
            taken = columns["actions"][rows].clamp(-0.999, 0.999)
            scores = policy(observations).log_prob(taken).sum(-1) * advantages[rows]
            distances = script.dagger_loss(policy, observations, columns["expert_actions"][rows])
            loss = args.anchor * distances - weight * scores.mean()
            script.descend(optimizer, loss)
            total += loss.detach()
        return {"losses/policy": float(total) / args.policy_updates}

    script.improve = improve


def expert_rolls_in(script):
    """Every trajectory of AggreVaTeD is the expert's own, with noise."""
    roll_in = script.roll_in
    script.roll_in = lambda envs, policy, expert, _, args: roll_in(envs, policy, expert, 1.0, args)


def learner_rolls_in(script):
    """Every trajectory of AggreVaTeD is begun by the learner, the first ones too."""
    roll_in = script.roll_in
    script.roll_in = lambda envs, policy, expert, _, args: roll_in(envs, policy, expert, 0.0, args)


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
    make_pairs = script.make_pairs

    def states(observations, actions):
        pairs = make_pairs(observations, actions)
        return torch.cat([observations, 0 * pairs[..., 4:]], -1)

    script.make_pairs = states


def next_states(script):
    """D sees CartPole's state and the next one, not the action, as a film would show them."""

    def transitions(observations, actions):
        following = cartpole_step(observations, actions)
        flag = torch.zeros_like(observations[..., :1])
        return torch.cat([observations, following - observations, flag], -1)

    def standardisation(observations):
        std, mean = torch.std_mean(observations, 0)
        speed, std = torch.std(observations[1:] - observations[:-1], 0), std + 1e-6
        zero, one = torch.zeros(1), torch.ones(1)
        return torch.cat([mean, 0 * mean, zero]), torch.cat([std, speed + 1e-6, one])

    script.make_pairs, script.standardisation = transitions, standardisation


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


def last_policy(script):
    """What is evaluated and kept is the policy itself, not an average."""
    script.recent_average = lambda average, weights, number: weights


def memory(script):
    """Half of D's negative pairs are from earlier rollouts, 64 of each.

    The memory is not in the checkpoint: a resumed run begins a new one."""
    update_discriminator, remembered = script.update_discriminator, []

    def update(discriminator, optimizer, expert_pairs, policy_pairs, args):
        remembered.append(policy_pairs[torch.randperm(len(policy_pairs))[:64]])
        earlier = script.minibatch(torch.cat(remembered), len(policy_pairs))
        both = torch.cat([policy_pairs, earlier])
        return update_discriminator(discriminator, optimizer, expert_pairs, both, args)

    script.update_discriminator = update


def linear_policy(script):
    """What GAIL trains is a linear policy: ten numbers."""

    class Linear(script.Policy):
        def __init__(self, hidden):
            super().__init__(hidden)
            self.network = script.mlp(4, 2)

    script.Policy = Linear


VARIANTS = {
    f.__name__.replace("_", "-"): f
    for f in (
        *(as_it_is, places_by_15, no_critic, one_absorbing_state, constant_std, coarse_units),
        *(biases_near_0, states_only, next_states, linear_policy, last_policy, memory),
        *(plain_discriminator, plain_gradient, larger_final_lr),
        *(no_advantage, score_function, natural_gradient, min_max_weights, executed_actions),
        *(expert_rolls_in, learner_rolls_in),
    )
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
