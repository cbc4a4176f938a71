"""Film learnt policies side by side, each for one greedy episode, as a GIF that repeats.

    python gail_racecar_ppo.py --out runs/lap
    python aggrevated_bipedal.py --out runs/walk
    python benchmark/film.py docs/figures/lap_and_walk.gif runs/lap/policy.pt runs/walk/policy.pt

The film runs in real time and ends with the first policy's episode; another policy that is done
sooner stands still. What each policy's episode returned is printed.
"""

import importlib
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
from PIL import Image

FRAMES_PER_SECOND, HEIGHT, COLORS, SEED = 10, 300, 48, 1
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def frames(path):
    """Ten pictures for each second of a policy's episode, all of the same height."""
    script = importlib.import_module(torch.load(path, weights_only=True)["script"])
    policy, env_id = script.load_policy(path)
    env = gym.make(env_id, render_mode="rgb_array")
    every = env.metadata["render_fps"] // FRAMES_PER_SECOND
    observation, _ = env.reset(seed=SEED)
    pictures, total, steps, over = [], 0.0, 0, False
    while True:
        if steps % every == 0 or over:
            picture = Image.fromarray(env.render())
            width = round(picture.width * HEIGHT / picture.height)
            pictures.append(np.asarray(picture.resize((width, HEIGHT), Image.Resampling.LANCZOS)))
        if over:
            break
        observation, reward, terminated, truncated, _ = env.step(policy.act(observation[None])[0])
        total, steps, over = total + float(reward), steps + 1, terminated or truncated
    env.close()
    print(f"{path}: {env_id}, return {total:.1f} in {steps} steps, {len(pictures)} pictures")
    return pictures


def main(film, *policies):
    films = [frames(path) for path in policies]
    columns = zip(*[pictures + pictures[-1:] * len(films[0]) for pictures in films])
    rows = [np.concatenate(row, axis=1) for row, _ in zip(columns, films[0])]
    # One palette for all pictures, without dithering: what stands still is then stored only once.
    some = Image.fromarray(np.concatenate(rows[::20]))
    palette = some.quantize(COLORS, Image.Quantize.FASTOCTREE)
    first, *rest = (Image.fromarray(row).quantize(palette=palette, dither=0) for row in rows)
    pause = [1000 // FRAMES_PER_SECOND] * len(rest) + [1500]  # milliseconds
    first.save(film, save_all=True, append_images=rest, duration=pause, loop=0)
    print(f"{film}: {first.width} x {first.height}, {Path(film).stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main(*sys.argv[1:])
