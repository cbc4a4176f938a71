"""A film of what aggrevated_bipedal.py learnt: one greedy episode as an animated GIF.

    python benchmark/bipedal_film.py runs/FOLDER

It writes docs/figures/bipedal_walk.gif or, for the hardcore course, bipedal_hardcore.gif.
"""

import argparse
import sys
from pathlib import Path

import gymnasium
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from aggrevated_bipedal import Policy  # noqa: E402

COLOURS = 32  # few keep the file small
FILMS = {  # the file, the steps per frame, and the largest number of frames
    "BipedalWalker-v3": ("bipedal_walk", 4, 120),
    "BipedalWalkerHardcore-v3": ("bipedal_hardcore", 6, 240),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=200_000_000, help="of the course")
    args = parser.parse_args()
    saved = torch.load(args.folder / "policy.pt", weights_only=True)
    policy = Policy(**saved["network"])
    policy.load_state_dict(saved["weights"])
    name, every, most = FILMS[saved["env_id"]]
    env = gymnasium.make(saved["env_id"], render_mode="rgb_array")
    (observation, _), frames, over, step = env.reset(seed=args.seed), [], False, 0
    while not over and len(frames) < most:
        if step % every == 0:
            frame = Image.fromarray(env.render()).resize((360, 240))
            frames.append(frame.quantize(COLOURS))
        observation, _, terminated, truncated, _ = env.step(policy.act(observation[None])[0])
        over, step = terminated or truncated, step + 1
    path = ROOT / "docs" / "figures" / f"{name}.gif"
    frames[0].save(
        path, save_all=True, append_images=frames[1:], duration=1000 * every // 50, loop=0
    )


if __name__ == "__main__":
    main()
