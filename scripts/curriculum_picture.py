"""Makes the picture of the README: images growing out of noise, a column for each moment of the synthesis.

    python scripts/curriculum_picture.py [--model NAME] [--checkpoint FILE] [--iters N] [--out docs/images/curriculum.jpg]

The last column shows the images as calibration sees them: finished with a photograph's spectrum. The same model, seed and
number of threads give the same picture.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torchvision.transforms.functional import to_pil_image
from tqdm import tqdm

from dfqvit.models import Preprocessing, load_model
from dfqvit.report.pictures import to_pixels
from dfqvit.storage.atomic import atomic
from dfqvit.synthesis import Synthesis, SynthesisConfig

OUT = Path(__file__).parents[1] / "docs" / "images" / "curriculum.jpg"
ROWS, SIDE, GAP, HEAD = 4, 104, 4, 24  # images, and pixels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--iters", type=int, default=500)
    parser.add_argument("--samples", type=int, default=ROWS, help="images made")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quality", type=int, default=80, help="of the JPEG")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    model = load_model(options.model, options.checkpoint)
    preprocessing = Preprocessing.of(model)
    run = Synthesis(model, SynthesisConfig(options.samples, options.iters, options.seed), preprocessing)
    with tqdm(total=options.iters, unit="step") as bar:
        finished = run.run(lambda _: bar.update())
    columns = {f"step {step}" if step else "noise": frame for step, frame in sorted(run.frames.items())}
    picture = draw({**columns, "finished": finished}, preprocessing)
    with atomic(options.out) as temporary:
        picture.save(temporary, format="JPEG", quality=options.quality, optimize=True)
    print(f"{options.out}: {picture.width} x {picture.height}, {options.out.stat().st_size / 1e3:.0f} kB")


def draw(columns: dict[str, torch.Tensor], preprocessing: Preprocessing) -> Image.Image:
    """{name: images [n, C, H, W], normalised} side by side, the first ROWS of each one below the other, under its name."""
    width, height = len(columns) * (SIDE + GAP) - GAP, HEAD + ROWS * (SIDE + GAP) - GAP
    sheet = Image.new("RGB", (width, height), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    for column, (name, images) in enumerate(columns.items()):
        left = column * (SIDE + GAP)
        pen.text((left + SIDE / 2, HEAD / 2), name, fill="#57606a", font=font, anchor="mm")
        for row, pixels in enumerate(to_pixels(images[:ROWS], preprocessing)):
            small = to_pil_image(pixels).convert("RGB").resize((SIDE, SIDE), Image.Resampling.LANCZOS)
            sheet.paste(small, (left, HEAD + row * (SIDE + GAP)))
    return sheet


if __name__ == "__main__":
    main()
