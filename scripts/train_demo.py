"""Trains the embedded models on Fashion-MNIST and writes the test images that ship with them.

    python scripts/train_demo.py --write-data
    python scripts/train_demo.py --model vit
    python scripts/train_demo.py --model swin
    python scripts/train_demo.py --model deit3
    python scripts/train_demo.py --model convnext

The data is Debian's package dataset-fashion-mnist (MIT licence). The test images are used for nothing but the figure
printed after each epoch: the last average of the weights is saved, not the best. As DeiT, the models are distilled from a
convolutional teacher, which this script trains first. Results: dfqvit/models/assets/README.md.
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
from training import adamw, moving_average

from dfqvit import demo
from dfqvit.storage.atomic import atomic

DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
NAMES = {kind: f"dfqvit_demo_{kind}" for kind in ("vit", "swin", "deit3", "convnext")}
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


class Teacher(torch.nn.Sequential):
    """A small convolutional network: it learns in minutes what the transformers, which know nothing of images, are told."""

    def __init__(self) -> None:
        layers: list[torch.nn.Module] = []
        for channels_in, channels, pool in ((1, 16, False), (16, 32, True), (32, 64, True)):
            layers += [
                torch.nn.Conv2d(channels_in, channels, 3, padding=1),
                torch.nn.BatchNorm2d(channels),
                torch.nn.ReLU(),
            ]
            layers += [torch.nn.MaxPool2d(2)] if pool else []
        layers += [torch.nn.Flatten(), torch.nn.Dropout(0.25), torch.nn.Linear(64 * 49, 128), torch.nn.ReLU()]
        super().__init__(*layers, torch.nn.Dropout(0.25), torch.nn.Linear(128, 10))


def shifted(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Each image of [n, 1, 28, 28] moved by up to a pixel each way."""
    n = len(images)
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


def fit(
    model: torch.nn.Module,
    data: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None],
    test: tuple[torch.Tensor, torch.Tensor],
    options: argparse.Namespace,
    epochs: int,
) -> tuple[torch.nn.Module, float]:
    """AdamW with a cosine schedule; (the moving average of the weights, its test top-1 in percent).

    `data` is (images, labels, teacher's logits or None). The loss is the mean of the cross-entropy with the labels and, if
    there is a teacher, with its softened distribution (temperature 2). A bfloat16 copy computes, float32 weights are updated.
    """
    images, labels, teacher = data
    generator = torch.Generator().manual_seed(options.seed)
    shadow = copy.deepcopy(model).bfloat16().to(memory_format=torch.channels_last)
    for module in shadow.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False  # on a CPU, small windows are faster without it
    compiled = torch.compile(shadow)
    average, optimizer = moving_average(model), adamw(model, options.lr)
    steps_an_epoch = len(images) // options.batch_size
    total, warmup, top1 = steps_an_epoch * epochs, 200, 0.0
    for epoch in range(epochs):
        shadow.train()
        started, losses = time.time(), 0.0
        order = torch.randperm(len(images), generator=generator)
        for step in range(steps_an_epoch):
            now = epoch * steps_an_epoch + step
            rate = now / warmup if now < warmup else 0.5 * (1 + math.cos(math.pi * (now - warmup) / (total - warmup)))
            for group in optimizer.param_groups:
                group["lr"] = options.lr * max(rate, 1e-3)
            chosen = order[step * options.batch_size : (step + 1) * options.batch_size]
            torch._foreach_copy_([p.data for p in shadow.parameters()], [p.data for p in model.parameters()])
            logits = compiled(shifted(images[chosen], generator).bfloat16()).float()
            loss = F.cross_entropy(logits, labels[chosen])
            if teacher is not None:
                soft = F.softmax(teacher[chosen] / 2, dim=1)
                loss = 0.5 * loss + 2.0 * F.kl_div(F.log_softmax(logits / 2, dim=1), soft, reduction="batchmean")
            shadow.zero_grad(set_to_none=True)
            loss.backward()
            for parameter, twin in zip(model.parameters(), shadow.parameters(), strict=True):
                parameter.grad = twin.grad.float()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            for buffer, twin in zip(model.buffers(), shadow.buffers(), strict=True):
                buffer.copy_(twin)
            if now >= warmup:
                average.update_parameters(model)
            losses += loss.item()
        top1 = accuracy(average.module, *test)
        seconds = time.time() - started
        print(
            f"epoch {epoch + 1}: loss {losses / steps_an_epoch:.4f}, test top-1 {top1:.2f} %, {seconds:.0f} s",
            flush=True,
        )
    return average.module, top1


def train(options: argparse.Namespace) -> None:
    torch.manual_seed(options.seed)
    train_images, train_labels = (torch.tensor(a) for a in read_split(options.data, "train"))
    test_images, test_labels = (torch.tensor(a) for a in read_split(options.data, "t10k"))
    train_images, test_images = ((images.float() / 255 - MEAN) / STD for images in (train_images, test_images))
    test = (test_images, test_labels)
    cache = Path(options.teacher) if options.teacher else None
    if cache is not None and cache.exists():
        taught = safetensors.torch.load_file(cache)["logits"]
    else:
        print("teacher:")
        teacher, _ = fit(Teacher(), (train_images, train_labels, None), test, options, epochs=5)
        with torch.no_grad():
            taught = torch.cat([teacher.eval()(images) for images in train_images.split(500)])
        if cache is not None:
            safetensors.torch.save_file({"logits": taught}, cache)
    print(f"{options.model}:")
    model = timm.create_model(NAMES[options.model])
    if options.init:
        model.load_state_dict(safetensors.torch.load_file(options.init))
    else:
        initialise(model)
    best, top1 = fit(model, (train_images, train_labels, taught), test, options, options.epochs)
    weights = {key: value.contiguous() for key, value in best.state_dict().items()}
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
    parser.add_argument("--teacher", help="file that keeps the teacher's logits for the next run")
    parser.add_argument("--init", type=Path, help="go on from these weights, with a schedule of --epochs of its own")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, help="where the weights go (default: dfqvit/models/assets)")
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
