"""Turn a SAC or TD3 of stable-baselines3 into an expert that aggrevated_bipedal.py can query.

    python experts/convert.py model.zip --env-id Pendulum-v1 --out expert.pt
    python aggrevated_bipedal.py --env-id Pendulum-v1 --expert expert.pt

The zip holds weights, and settings in JSON: pickled objects, each with a description in plain
text. Nothing is unpickled; only the text is read. Whatever would change the actions and does not
fit into the new file (a features extractor, gSDE, another activation) is refused.

What no zip says: whether the model was trained inside VecNormalize, and whether its class had a
`predict` of its own. So some greedy episodes are played, and their mean return is printed beside
that of random actions: is it what you expect?
"""

import io
import json
import re
import shlex
import sys
import zipfile
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import torch
import torch.nn.functional as F
from shared import BadInput, Parser, check, say, write
from tasks import make_env, play, statistics

MAX_BYTES = 2**28  # unpacked; 256 MB
BOX = r"<class 'gym(nasium)?\.spaces\.box\.Box'>"
FLATTEN = "<class 'stable_baselines3.common.torch_layers.FlattenExtractor'>"
ACTIVATIONS = {f"<class 'torch.nn.modules.activation.{x}'>": x.lower() for x in ("ReLU", "Tanh")}
# Arguments of the policy's class that change its actions, with what they may be, and those that
# do not: FlattenExtractor has no weights to share, and only images are ever divided by 255.
EXPECTED = {
    "features_extractor_class": [FLATTEN],
    "features_extractor_kwargs": ["{}", "None"],
    "use_sde": ["False"],
    "activation_fn": list(ACTIVATIONS),
}
HARMLESS = ["net_arch", "n_critics", "optimizer_class", "optimizer_kwargs", "log_std_init"]
HARMLESS += ["use_expln", "clip_mean", "share_features_extractor", "normalize_images"]
DROPPED = r"(actor\.log_std|actor_target\.mu\.\d+|critic(_target)?\.qf\d+\.\d+)\.(weight|bias)"


def unzip(file, *names):
    with zipfile.ZipFile(file) as archive:
        size = sum(member.file_size for member in archive.infolist())
        check(size <= MAX_BYTES, f"{size} bytes when unpacked, expected at most {MAX_BYTES}")
        return [archive.read(name) for name in names]


def read_zip(path):
    """The settings and the weights of a model; nothing in them is unpickled."""
    data, pth = unzip(path, "data", "policy.pth")
    unzip(io.BytesIO(pth))  # torch.save writes a zip, too
    data, weights = json.loads(data), torch.load(io.BytesIO(pth), "cpu", weights_only=True)
    check(isinstance(data, dict), f"data is a {type(data).__name__}, expected a dictionary")
    tensors = isinstance(weights, dict) and all(map(torch.is_tensor, weights.values()))
    check(tensors, "policy.pth has something else, expected a dictionary of tensors")
    return data, weights


def read_settings(data, env):
    """The policy ("SAC" or "TD3") and its activation, from the plain text; or a refusal."""
    policy = data.get("policy_class", {})
    found = f"{policy.get('__module__')} {policy.get('__init__')}".partition(" at 0x")[0]
    names = r"stable_baselines3\.(?:sac|td3)\.policies <function (SAC|TD3)Policy\.__init__"
    match = re.fullmatch(names, found)
    check(match, f"policy class {found}, expected SAC's or TD3's own")
    check(data.get("use_sde") is False, f"use_sde {data.get('use_sde')}, expected False: no gSDE")
    included = data.get("_vec_normalize_env")  # only where save() was told to include it
    check(included is None, "trained inside VecNormalize, expected observations as they are")
    options = {k: str(v) for k, v in data["policy_kwargs"].items() if not k.startswith(":")}
    for name, value in options.items():
        allowed = EXPECTED.get(name, [value] if name in HARMLESS else ["no such argument"])
        check(value in allowed, f"policy_kwargs: {name} {value}, expected {' or '.join(allowed)}")
    for name, ours in (("observation", env.observation_space), ("action", env.action_space)):
        theirs = data[f"{name}_space"]
        box = re.fullmatch(BOX, theirs[":type:"])
        check(box, f"{name} space {theirs[':type:']}, expected a Box")
        shape = tuple(theirs["_shape"])
        check(shape == ours.shape, f"{name}s of shape {shape}, expected the task's {ours.shape}")
        for bound in ("low", "high"):
            text, expected = theirs[bound], getattr(ours, bound)
            values = np.array(text.strip("[]").split(), np.float32)  # as the task's are here
            same = len(values) == len(expected) and np.allclose(values, expected, rtol=1e-5)
            check(same, f"{name}s with {bound} {text}, expected the task's {expected}")
    return match[1], ACTIVATIONS[options.get("activation_fn", EXPECTED["activation_fn"][0])]


def actor_layers(weights, policy, env):
    """The names of the actor's linear layers, first to last, and the sizes between them."""
    hidden, last = ("actor.latent_pi", ["actor.mu"]) if policy == "SAC" else ("actor.mu", [])
    found = {k: tuple(x.shape) for k, x in weights.items() if not re.fullmatch(DROPPED, str(k))}
    depth = sum(bool(re.fullmatch(rf"{hidden}\.\d+\.weight", str(name))) for name in found)
    layers = [f"{hidden}.{2 * i}" for i in range(depth)] + last  # odd numbers are activations
    between = [sum(found.get(f"{layer}.bias", ())) for layer in layers[:-1]]
    sizes = [*env.observation_space.shape, *between, *env.action_space.shape]
    expected = {f"{x}.weight": (o, i) for x, (i, o) in zip(layers, pairwise(sizes))}
    expected |= {f"{x}.bias": (o,) for x, o in zip(layers, sizes[1:])}
    theirs, ours = found.items() - expected.items(), expected.items() - found.items()
    text = f"policy.pth has {[*theirs][:3]}, expected {[*ours][:3] or 'the layers of an MLP alone'}"
    check(found == expected, text)
    kinds = {weights[name].dtype for name in expected}
    check(kinds == {torch.float32}, f"{kinds}, expected float32")
    large = sum(weights[name].numel() for name in expected) > MAX_BYTES // 4
    finite = not large and all(weights[name].isfinite().all() for name in expected)
    check(finite, "weights that are NaN, infinite or too many, expected finite ones")
    return layers, sizes


def convert(args, argv):
    path, out, task = Path(args.model), Path(args.out), args.env_id.split(":")[-1]
    check(path.is_file(), "not found, expected a file")  # a pipe could block
    check(args.episodes > 0, f"--episodes {args.episodes}, expected at least 1")
    check(not out.exists(), f"--out {out} exists already, expected a new file")
    check(out.parent.is_dir(), f"--out {out}: its folder does not exist")
    env = make_env(args.env_id)
    for folder in (path.parent, path.with_suffix("")):  # CheckpointCallback's place, rl-zoo3's
        for pkl in folder.glob("*vec*normalize*.pkl"):
            raise BadInput(f"{pkl} lies beside it, expected no VecNormalize (another's? Move it)")
    data, weights = read_zip(path)
    policy, activation = read_settings(data, env)
    source = {"algorithm": policy, "steps": data.get("num_timesteps")}
    layers, sizes = actor_layers(weights, policy, env)
    settings = {"sizes": sizes, "activation": activation}
    settings |= {x: [float(y) for y in getattr(env.action_space, x)] for x in ("low", "high")}
    ours = {"mean": torch.zeros(sizes[0]), "deviation": torch.ones(sizes[0])}
    for i, layer in enumerate(layers):
        for kind in ("weight", "bias"):
            ours[f"network.{2 * i}.{kind}"] = weights[f"{layer}.{kind}"].clone()

    def act(observation, _):
        """tanh(network(observation)), from [-1, 1] to the range of the actions."""
        x = torch.as_tensor(observation).float()
        for layer in layers:
            x = F.linear(x, weights[f"{layer}.weight"], weights[f"{layer}.bias"])
            x = getattr(torch, activation)(x) if layer != layers[-1] else x.tanh()
        low, high = torch.tensor(settings["low"]), torch.tensor(settings["high"])
        return ((low + high) / 2 + (high - low) / 2 * x).numpy()  # exactly x for [-1, 1]

    env.action_space.seed(10**6)  # not one of the episodes'
    acts = {"return_mean": act, "random": lambda *_: env.action_space.sample()}
    score = {"episodes": args.episodes}
    for name, who in acts.items():
        played = play(SimpleNamespace(act=who), args.env_id, args.episodes, 0)
        score[name] = statistics(played)["return_mean"]
    source |= {"score": score, "converted": shlex.join(["python", "experts/convert.py", *argv])}
    source["converted_with"] = {"gymnasium": gym.__version__, "torch": str(torch.__version__)}
    expert = {"script": "aggrevated_bipedal", "env_id": task, "settings": settings}
    expert |= {"weights": ours, "source": source}
    write(out, lambda file: torch.save(expert, file))
    say(f"{out}: {args.env_id}, {'-'.join(map(str, sizes))}, {activation}")
    say(f"mean return of {score['return_mean']:.1f}, random {score['random']:.1f}")
    say("If that is too low: was it trained inside VecNormalize? No zip says that.")


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    parser = Parser("convert.py", __doc__)
    parser.add_argument("model", metavar="MODEL.zip", help="what model.save() wrote")
    parser.add_argument("--env-id", required=True, help="the task, which the zip does not name")
    parser.add_argument("--out", required=True, metavar="EXPERT.pt", help="a new file")
    parser.add_argument("--episodes", type=int, default=10, help="how many to play (default: 10)")
    args = parser.parse_args(argv)
    with parser.converting(args.model):
        convert(args, argv)


if __name__ == "__main__":
    main()
