"""Trains the embedded models on Fashion-MNIST and writes the test images that ship with them.

    python scripts/train_demo.py --write-data
    python scripts/train_demo.py --model vit
    python scripts/train_demo.py --model swin

The data is Debian's package dataset-fashion-mnist (MIT licence). The test images are used for nothing but the figure
printed after each epoch: the last average of the weights is saved, not the best. Results: dfqvit/assets/README.md.
"""

from __future__ import annotations

import argparse
import copy
import gzip
import math
import sys
import time
from pathlib import Path

import numpy as np
import safetensors.torch
import timm
import torch
import torch.nn.functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from dfqvit import demo
from dfqvit.files import atomic

DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
NAMES = {"vit": "dfqvit_demo_vit", "swin": "dfqvit_demo_swin"}
MEAN, STD = 0.2860, 0.3530


def read_split(folder: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """(images uint8 [n, 1, 28, 28], labels int64 [n]) of "train" or "t10k"."""
    arrays = []
    for kind, header in (("images-idx3", 16), ("labels-idx1", 8)):
        path = folder / f"{split}-{kind}-ubyte.gz"
        if not path.exists():
            sys.exit(f"--data: '{path}' is missing; install Debian's package dataset-fashion-mnist")
        arrays.append(np.frombuffer(gzip.decompress(path.read_bytes()), dtype=np.uint8, offset=header))
    return arrays[0].reshape(-1, 1, 28, 28), arrays[1].astype(np.int64)


def write_data(folder: Path) -> None:
    """The whole test split, and the first 64 training images for the comparison with real-data calibration."""
    for path, split, count in ((demo.TEST_IMAGES, "t10k", None), (demo.TRAIN_SAMPLE, "train", 64)):
        images, labels = read_split(folder, split)
        with atomic(path) as temporary:
            np.savez_compressed(temporary, images=images[:count], labels=labels[:count])
        print(f"{path.name}: {len(images[:count])} images, {path.stat().st_size} bytes")


def augment(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Flips half of the images and shifts each by up to a pixel; [n, 1, 28, 28]."""
    n = len(images)
    images = torch.where(torch.rand(n, 1, 1, 1, generator=generator) < 0.5, images.flip(3), images)
    padded = F.pad(images, (1, 1, 1, 1))
    rows = torch.randint(0, 3, (n, 1), generator=generator) + torch.arange(28)
    columns = torch.randint(0, 3, (n, 1), generator=generator) + torch.arange(28)
    return padded[torch.arange(n)[:, None, None], 0, rows[:, :, None], columns[:, None, :]].unsqueeze(1)


def initialise(model: torch.nn.Module) -> None:
    """Xavier for every linear layer: timm's standard deviation of 0.02 is for far wider models."""
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.xavier_uniform_(module.weight)


@torch.no_grad()
def accuracy(model: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    """Top-1 in percent, float32."""
    model.eval()
    hits = sum(int((model(x).argmax(1) == y).sum()) for x, y in zip(images.split(500), labels.split(500), strict=True))
    return 100.0 * hits / len(labels)


def train(options: argparse.Namespace) -> None:
    torch.manual_seed(options.seed)
    generator = torch.Generator().manual_seed(options.seed)
    train_images, train_labels = (torch.tensor(a) for a in read_split(options.data, "train"))
    test_images, test_labels = (torch.tensor(a) for a in read_split(options.data, "t10k"))
    test_images = (test_images.float() / 255 - MEAN) / STD
    model = timm.create_model(NAMES[options.model])
    initialise(model)
    shadow = copy.deepcopy(model).bfloat16()  # computes; `model` keeps the float32 weights that Adam updates
    for module in shadow.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False  # on a CPU, small windows are faster without it
    compiled = torch.compile(shadow)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.998))
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}], lr=options.lr
    )
    steps_an_epoch = len(train_images) // options.batch_size
    total = steps_an_epoch * options.epochs
    warmup = min(300, steps_an_epoch)
    top1 = 0.0
    for epoch in range(options.epochs):
        model.train()
        started, losses = time.time(), 0.0
        order = torch.randperm(len(train_images), generator=generator)
        for step in range(steps_an_epoch):
            now = epoch * steps_an_epoch + step
            rate = now / warmup if now < warmup else 0.5 * (1 + math.cos(math.pi * (now - warmup) / (total - warmup)))
            for group in optimizer.param_groups:
                group["lr"] = options.lr * max(rate, 1e-3)
            chosen = order[step * options.batch_size : (step + 1) * options.batch_size]
            images = (augment(train_images[chosen].float() / 255, generator) - MEAN) / STD
            torch._foreach_copy_([p.data for p in shadow.parameters()], [p.data for p in model.parameters()])
            loss = F.cross_entropy(compiled(images.bfloat16()).float(), train_labels[chosen], label_smoothing=0.05)
            shadow.zero_grad(set_to_none=True)
            loss.backward()
            for parameter, twin in zip(model.parameters(), shadow.parameters(), strict=True):
                parameter.grad = twin.grad.float()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            if now >= warmup:
                average.update_parameters(model)
            losses += loss.item()
        top1 = accuracy(average.module, test_images, test_labels)
        print(f"epoch {epoch + 1}: loss {losses / steps_an_epoch:.4f}, test top-1 {top1:.2f} %, "
              f"{time.time() - started:.0f} s", flush=True)  # fmt: skip
    weights = {key: value.contiguous() for key, value in average.module.state_dict().items()}
    metadata = {"dataset": "Fashion-MNIST", "top1": f"{top1:.2f}", "epochs": str(options.epochs)}
    target = options.out or demo.WEIGHTS[NAMES[options.model]]
    with atomic(target) as temporary:
        safetensors.torch.save_file(weights, temporary, metadata)
    print(f"wrote {target.name}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(NAMES))
    parser.add_argument(
        "--write-data", action="store_true", help="write the images that ship with the models, and stop"
    )
    parser.add_argument("--data", type=Path, default=DEBIAN_FOLDER, help="folder of the idx files (default: Debian's)")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, help="where the weights go (default: dfqvit/assets)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.write_data:
        write_data(options.data)
    elif options.model:
        train(options)
    else:
        parser.error("give --model or --write-data")


if __name__ == "__main__":
    main()
