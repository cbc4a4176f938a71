"""The track from above with the paths of the learner and its expert, and a film of a learnt lap.

    python benchmark/racecar_picture.py runs/FOLDER

FOLDER is a run of gail_racecar_ppo.py or gail_racecar_reinforce.py. It writes
docs/figures/racecar_paths.png and docs/figures/racecar_lap.gif.
"""

import argparse
import importlib
import json
import sys
from pathlib import Path

import gymnasium
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Circle, Rectangle
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
FIGURES = ROOT / "docs" / "figures"
sys.path.insert(0, str(ROOT))

import racecar_env  # noqa: E402

EPISODES, SEED = 20, 200_000_000  # apart from training's and the scripts' evaluation
EVERY, COLOURS = 4, 64  # steps per frame of the film, colours in its palette


def draw_track(axes):
    for x0, y0, x1, y1 in racecar_env.WALL_SEGMENTS:
        thick = racecar_env.WALL_THICKNESS
        width, height = x1 - x0 or thick, y1 - y0 or thick
        corner = ((x0 + x1 - width) / 2, (y0 + y1 - height) / 2)
        axes.add_patch(Rectangle(corner, width, height, color="0.75", linewidth=0))
    axes.add_patch(Circle(racecar_env.FINISH, racecar_env.FINISH_RADIUS, color="0.9", zorder=0))
    axes.set(aspect="equal", xlabel="x, m", ylabel="y, m")


def draw_paths(script, policy, path):
    laps = {
        "expert": script.play(script.make_expert(None), "RaceCar-v0", EPISODES, SEED),
        "learner": script.play(policy.act, "RaceCar-v0", EPISODES, SEED),
    }
    figure = Figure(figsize=(9, 5.2), layout="constrained")
    axes = figure.subplots()
    draw_track(axes)
    for (name, episodes), colour in zip(laps.items(), ("tab:orange", "tab:blue"), strict=True):
        reached = sum(episode["rewards"].sum() > 0 for episode in episodes)
        for i, episode in enumerate(episodes):
            label = None if i else f"{name}: {reached} of {EPISODES} reach the finish"
            x, y = episode["observations"][:, :2].T
            axes.plot(x, y, color=colour, linewidth=0.8, alpha=0.7, label=label)
    axes.legend(loc="upper left")
    figure.savefig(path, dpi=110, metadata={"Software": None})


def film(policy, path):
    env = gymnasium.make("RaceCar-v0", render_mode="rgb_array")
    (observation, _), over, frames = env.reset(seed=SEED), False, []
    while not over:
        if env.unwrapped.steps % EVERY == 0:
            frame = Image.fromarray(env.render())
            frames.append(frame.quantize(COLOURS, dither=Image.Dither.NONE))
        observation, _, terminated, truncated, info = env.step(policy.act(observation[None])[0])
        over = terminated or truncated
    env.close()
    step = EVERY * 1000 // racecar_env.CONTROL_RATE  # milliseconds, for real time
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=step, loop=0)
    return info["is_success"], len(frames)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="a run folder")
    run = parser.parse_args().run
    name = json.loads((run / "args.json").read_text())["script"]
    script = importlib.import_module(name)
    saved = torch.load(run / "policy.pt", weights_only=True)
    policy = script.Policy(**saved["network"])
    policy.load_state_dict(saved["weights"])
    FIGURES.mkdir(parents=True, exist_ok=True)
    draw_paths(script, policy, FIGURES / "racecar_paths.png")
    success, frames = film(policy, FIGURES / "racecar_lap.gif")
    size = (FIGURES / "racecar_lap.gif").stat().st_size
    print(f"{frames} frames, {size / 1e6:.2f} MB, the finish is reached: {success}")


if __name__ == "__main__":
    main()
