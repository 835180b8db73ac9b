"""Scenes as a COCO folder, written without what reads it: images, masks and the JSON of the boxes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from PIL import Image

from dfqvit.evaluation.dense_data import ANNOTATIONS, IMAGES, MASKS
from dfqvit.evaluation.scenes import Scenes


def write_coco(scenes: Scenes, root: Path, classes: tuple[str, ...]) -> None:
    """Writes the scenes as a folder that `open_dense` reads for both tasks."""
    annotations: list[dict[str, Any]] = []
    for folder in (IMAGES, MASKS):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for index in range(len(scenes)):
        name = f"{index:06}.png"
        Image.fromarray(scenes.images[index, 0].numpy()).save(root / IMAGES / name)
        Image.fromarray(scenes.masks[index].numpy()).save(root / MASKS / name)
        for box, label in zip(scenes.boxes[index].tolist(), scenes.labels[index].tolist(), strict=True):
            left, top, right, bottom = box
            size = {"bbox": [left, top, right - left, bottom - top], "area": (right - left) * (bottom - top)}
            annotations.append(
                {"id": len(annotations) + 1, "image_id": index + 1, "category_id": label + 1, "iscrowd": 0, **size}
            )
    height, width = scenes.images.shape[2:]
    images = [{"id": i + 1, "file_name": f"{i:06}.png", "width": width, "height": height} for i in range(len(scenes))]
    categories = [{"id": place + 1, "name": name} for place, name in enumerate(classes)]
    whole = {"images": images, "annotations": annotations, "categories": categories}
    (root / ANNOTATIONS).write_text(json.dumps(whole), encoding="utf-8")
