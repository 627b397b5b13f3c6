"""Photo-like images with FFHQ's bytes per image, for benchmarks and trials without the 89 GB.

    python -m benchmarks.photos FOLDER [--count 300] [--resolution 1024]

Each is a random crop of one of the two photographs that scikit-learn ships, enlarged, turned, recoloured, with a little
camera noise: what makes a PNG of a photograph large. FFHQ's mean is 1.27 MB at 1024 pixels; these come to within a tenth.
"""

from __future__ import annotations

import argparse
import os

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images

from sivae.progress import progress_bar

NOISE = 0.9  # standard deviation of the noise, in 8-bit steps, that gives FFHQ's bytes per image


def photo(number: int, resolution: int) -> Image.Image:
    """Image `number` of the endless set: RGB, resolution x resolution; the same on every machine."""
    draw = np.random.default_rng(number)
    picture = Image.fromarray(load_sample_images().images[number % 2])
    side = int(draw.integers(180, 400))
    left, top = (int(draw.integers(0, length - side)) for length in picture.size)
    picture = picture.crop((left, top, left + side, top + side)).rotate(90 * int(draw.integers(4)))
    picture = picture.resize((resolution, resolution), Image.Resampling.BICUBIC)
    pixels = np.asarray(picture, dtype=np.float32)[:, :: int(draw.choice([-1, 1]))]
    noise = draw.normal(0, NOISE, (resolution, resolution, 1)).astype(np.float32)
    pixels = pixels * draw.uniform(0.7, 1.1, 3).astype(np.float32) + noise
    return Image.fromarray(pixels.clip(0, 255).round().astype(np.uint8))


def make(folder: str, count: int, resolution: int) -> int:
    """Write count PNG files into a folder, unless they are there. Returns their bytes."""
    os.makedirs(folder, exist_ok=True)
    total = 0
    with progress_bar(count, "making photographs", " images") as bar:
        for number in range(count):
            path = os.path.join(folder, f"{number:05d}.png")
            if not os.path.exists(path):
                photo(number, resolution).save(f"{path}.part", format="PNG")
                os.replace(f"{path}.part", path)
            total += os.path.getsize(path)
            bar.update()
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder")
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--resolution", type=int, default=1024)
    options = parser.parse_args()
    total = make(options.folder, options.count, options.resolution)
    print(f"{options.folder}: {options.count} images, {total / options.count / 1e6:.2f} MB each")


if __name__ == "__main__":
    main()
