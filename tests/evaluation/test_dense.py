"""Figures of detection and segmentation against counts made here; data on disk against the scenes it was written from."""

from __future__ import annotations

import contextlib
import io
import json
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import nn

from dfqvit import DfqvitError, UsageError
from dfqvit.evaluation import scenes
from dfqvit.evaluation.dense import DetectionMeter, evaluate_dense
from dfqvit.evaluation.dense_data import SceneImages, open_dense
from dfqvit.models import Preprocessing, dense

from ..coco import write_coco

GREY = Preprocessing((1, 56, 56), (0.5,), (0.25,), "bilinear", 1.0)


class Fixed(nn.Module):
    """Gives what it was told to, whatever the images are, batch after batch."""

    def __init__(self, outputs):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.outputs, self.at = outputs, 0

    def forward(self, x):
        part = self.outputs[self.at : self.at + len(x)]
        self.at += len(x)
        return part


@pytest.fixture
def held(seed):
    return scenes.compose(30, seed % 1000)


def perfect(held, score=0.9):
    return [
        {"boxes": box, "labels": label, "scores": torch.full((len(box),), score)}
        for box, label in zip(held.boxes, held.labels, strict=True)
    ]


def test_the_truth_has_all_points(held):
    data = SceneImages(held, GREY, "detection")
    found = evaluate_dense(Fixed(perfect(held)), data.batches(7), "detection")
    assert found.figures["mAP@50"] == pytest.approx(100)
    assert found.figures["mAP"] == pytest.approx(100)
    assert found.images == 30
    logits = nn.functional.one_hot(held.masks.long(), 8).permute(0, 3, 1, 2).float()
    data = SceneImages(held, GREY, "segmentation")
    found = evaluate_dense(Fixed({"out": logits}["out"]), data.batches(7), "segmentation")
    assert found.figures == {"mIoU": pytest.approx(100), "pixel accuracy": pytest.approx(100)}


def test_precision_of_ranked_detections(seed):
    """One class, one object an image: hits and misses in an order of scores give a known average precision."""
    hits = torch.rand(40) < 0.6
    scores = torch.rand(40).sort(descending=True).values
    targets = [{"boxes": torch.tensor([[10.0, 10, 30, 30]]), "labels": torch.tensor([0])} for _ in range(40)]
    found = []
    for hit, score in zip(hits.tolist(), scores, strict=True):
        box = torch.tensor([[10.0, 10, 30, 31]]) if hit else torch.tensor([[40.0, 40, 50, 50]])
        found.append({"boxes": box, "labels": torch.tensor([0]), "scores": score[None]})
    precision = hits.cumsum(0) / torch.arange(1, 41)
    recall = hits.cumsum(0) / 40
    points = torch.linspace(0, 1, 101, dtype=torch.float64)
    wanted = sum(float(precision[recall >= r - 1e-9].max()) if bool((recall >= r - 1e-9).any()) else 0 for r in points)
    result = evaluate_dense(Fixed(found), [(torch.zeros(40, 1, 8, 8), targets)], "detection")
    # one point of recall may lie on an edge
    assert result.figures["mAP@50"] == pytest.approx(100 * wanted / 101, abs=1.1)


@pytest.mark.parametrize("kinds", [1, 3])
def test_average_precision_is_cocos(seed, kinds):
    """Found here: torchmetrics takes the thresholds of recall from float32, above what 3 in 10 is, and is 0.02 points off."""
    sides = torch.rand(20, 10, 2) * 20 + 5
    corners = torch.rand(20, 10, 2) * 50
    boxes, labels = torch.cat([corners, corners + sides], dim=2), torch.randint(0, kinds, (20, 10))
    moved = boxes + torch.rand(20, 10, 4) * torch.tensor([-3.0, -3, 3, 3])
    guesses = torch.where(torch.rand(20, 10) < 0.7, labels, torch.randint(0, kinds, (20, 10)))
    scores = torch.rand(20, 10)
    found = [
        dict(zip(("boxes", "labels", "scores"), each, strict=True)) for each in zip(moved, guesses, scores, strict=True)
    ]
    targets = [{"boxes": box, "labels": label} for box, label in zip(boxes, labels, strict=True)]
    meter = DetectionMeter()
    meter.add(found, targets)

    def rows(places, marks, ranks):
        return [
            {"image_id": i, "category_id": int(mark), "bbox": [left, top, right - left, bottom - top], **rank}
            for i in range(20)
            for (left, top, right, bottom), mark, rank in zip(places[i].tolist(), marks[i], ranks[i], strict=True)
        ]

    plain = [[{"iscrowd": 0}] * 10] * 20
    truth = [
        row | {"id": k + 1, "area": row["bbox"][2] * row["bbox"][3]} for k, row in enumerate(rows(boxes, labels, plain))
    ]
    ranked = rows(moved, guesses, [[{"score": float(s)} for s in each] for each in scores])
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = {
            "images": [{"id": i} for i in range(20)],
            "annotations": truth,
            "categories": [{"id": k} for k in range(kinds)],
        }
        coco.createIndex()
        wanted = COCOeval(coco, coco.loadRes(ranked), "bbox")
        for step in (wanted.evaluate, wanted.accumulate, wanted.summarize):
            step()
    assert meter.figures()["mAP"] == pytest.approx(100 * wanted.stats[0], abs=1e-4)
    assert meter.figures()["mAP@50"] == pytest.approx(100 * wanted.stats[1], abs=1e-4)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda box: box, ""),
        (lambda box: torch.cat([box[:, :2], box[:, 2:] - box[:, :2]], 1), "end left of where they begin or above it"),
        (lambda box: torch.cat([box[:, :2] + box[:, 2:], 2 * (box[:, 2:] - box[:, :2])], 1) / 2, "end left of where"),
        (lambda box: box / 56, "no detected box is longer than a pixel, as shares of the image are"),
    ],
)
def test_boxes_of_another_form_are_said(held, change, said):
    """Found here: a network that gives width and height for right and bottom had some 5 % and no word."""
    outputs = [{**each, "boxes": change(each["boxes"])} for each in perfect(held)]
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        evaluate_dense(Fixed(outputs), SceneImages(held, GREY, "detection").batches(7), "detection")
    told = "".join(str(each.message) for each in found if "detected box" in str(each.message))
    assert bool(told) == bool(said)
    assert said in told


def test_intersection_over_union_of_random_masks(seed):
    masks, guesses = torch.randint(0, 4, (5, 12, 10)), torch.randint(0, 4, (5, 12, 10))
    masks[torch.rand(masks.shape) < 0.1] = 255
    counted = masks != 255
    each = []
    for k in range(4):
        both = (masks == k) & (guesses == k)
        either = ((masks == k) | (guesses == k)) & counted
        each.append(float(both.sum() / either.sum()))
    logits = nn.functional.one_hot(guesses, 4).permute(0, 3, 1, 2).float()
    batch = (torch.zeros(5, 1, 8, 8), [{"mask": mask} for mask in masks])
    found = evaluate_dense(Fixed(logits), [batch], "segmentation", against=Fixed(logits.roll(1, 0)))
    assert found.figures["mIoU"] == pytest.approx(100 * sum(each) / 4, abs=1e-3)
    right = float(((masks == guesses) & counted).sum() / counted.sum())
    assert found.figures["pixel accuracy"] == pytest.approx(100 * right, abs=1e-3)
    assert found.against is not None
    assert found.against != found.figures


def test_files_hold_the_scenes(held, tmp_path):
    write_coco(held, tmp_path, dense.CLASSES)
    boxes, masks = open_dense(tmp_path, GREY, "detection"), open_dense(tmp_path, GREY, "segmentation")
    assert len(boxes) == len(masks) == 30
    for index in range(30):
        image, target = boxes[index]
        assert torch.allclose(image, (held.images[index].float() / 255 - 0.5) / 0.25)
        assert torch.equal(target["boxes"], held.boxes[index])
        assert torch.equal(target["labels"], held.labels[index])
        assert torch.equal(masks[index][1]["mask"], held.masks[index])
    ids = open_dense(tmp_path, GREY, "detection", label_ids=True)
    assert torch.equal(ids[0][1]["labels"], held.labels[0] + 1)
    wide = Preprocessing((1, 28, 112), (0.5,), (0.25,), "bilinear", 1.0)
    image, target = open_dense(tmp_path, wide, "detection")[0]
    assert image.shape == (1, 28, 112)
    assert torch.equal(target["boxes"], held.boxes[0] * torch.tensor([2, 0.5, 2, 0.5]))


def test_bad_data_is_said_in_a_sentence(held, tmp_path):
    with pytest.raises(UsageError, match=r"for detection it must hold annotations.json and a folder images"):
        open_dense(tmp_path, GREY, "detection")
    with pytest.raises(UsageError, match="for segmentation it must hold folders images and masks"):
        open_dense(tmp_path, GREY, "segmentation")
    with pytest.raises(UsageError, match="it must be a folder"):
        open_dense(tmp_path / "none", GREY, "detection")
    with pytest.raises(UsageError, match="task was 'depth'; it may be 'detection', 'segmentation'"):
        open_dense(tmp_path, GREY, "depth")
    write_coco(held, tmp_path, dense.CLASSES)
    path = tmp_path / "annotations.json"
    good = json.loads(path.read_text())

    def with_box(box):
        changed = json.loads(json.dumps(good))
        changed["annotations"][0]["bbox"] = box
        path.write_text(json.dumps(changed))

    for box in ([40, 10, 20, 10], [-3, 0, 10, 10], [5, 5, 0, 4]):
        with_box(box)
        with pytest.raises(UsageError, match=r"has a box \[.*\] on '.*', which is 56 x 56 pixels; boxes are"):
            open_dense(tmp_path, GREY, "detection")
    for key, value, said in (
        ("image_id", 977, "image_id 977, which is none of its images"),
        ("category_id", "3", "category_id '3', which is none of its categories"),
        ("iscrowd", 0.7, "iscrowd is 0.7; it must be 0 or 1"),
        ("iscrowd", "false", "iscrowd is 'false'; it must be 0 or 1"),
    ):
        changed = json.loads(json.dumps(good))
        changed["annotations"][0][key] = value
        path.write_text(json.dumps(changed))
        with pytest.raises(UsageError, match=said):
            open_dense(tmp_path, GREY, "detection")
    for number in (1 << 40, float("inf"), float("nan")):  # torchmetrics has 32 bits for them
        changed = json.loads(json.dumps(good))
        changed["categories"][0]["id"] = number
        path.write_text(json.dumps(changed))
        with pytest.raises(UsageError, match="ids are whole numbers of 32 bits"):
            open_dense(tmp_path, GREY, "detection", label_ids=True)
    path.write_text('{"images": []}')
    with pytest.raises(DfqvitError, match=r"is not COCO's format \(KeyError"):
        open_dense(tmp_path, GREY, "detection")
    path.write_text("{")
    with pytest.raises(DfqvitError, match="is not COCO's format"):
        open_dense(tmp_path, GREY, "detection")
    path.write_text(json.dumps(good))
    Image.new("L", (20, 30)).save(tmp_path / "images" / "000000.png")
    with pytest.raises(UsageError, match=r"'000000.png' is 20 x 30 pixels; annotations.json says 56 x 56"):
        open_dense(tmp_path, GREY, "detection")[0]
    with pytest.raises(UsageError, match="is 56 x 56 pixels and its image 20 x 30; both must be of one size"):
        open_dense(tmp_path, GREY, "segmentation")[0]
    (tmp_path / "images" / "000001.png").unlink()
    with pytest.raises(DfqvitError, match=r"000001.png' is missing; the annotations name it"):
        open_dense(tmp_path, GREY, "detection")[1]
    Image.new("RGB", (56, 56)).save(tmp_path / "masks" / "000002.png")
    with pytest.raises(UsageError, match="of mode RGB; masks are of mode L or P"):
        open_dense(tmp_path, GREY, "segmentation")[1]
    (tmp_path / "masks" / "000003.png").unlink()
    with pytest.raises(DfqvitError, match="has no mask"):
        open_dense(tmp_path, GREY, "segmentation")


def test_networks_of_another_form_are_said_in_a_sentence(held):
    boxes, masks = (SceneImages(held, GREY, task) for task in ("detection", "segmentation"))
    with pytest.raises(UsageError, match=r"a Fixed, which gives a tensor \[9, 3\]; for detection it must have"):
        evaluate_dense(Fixed(torch.zeros(30, 3)), boxes.batches(9), "detection")
    with pytest.raises(UsageError, match="for segmentation it must give logits"):
        evaluate_dense(Fixed(perfect(held)), masks.batches(9), "segmentation")
    with pytest.raises(UsageError, match=r"a mask held class .; the network's classes are 0 to 1"):
        evaluate_dense(Fixed(torch.zeros(30, 2, 56, 56)), masks.batches(9), "segmentation")
    with pytest.raises(UsageError, match="data held no images"):
        evaluate_dense(Fixed([]), [], "detection")


def changed(root, edit):
    """The annotations in `root` after `edit` of what was written there at first."""
    path, first = root / "annotations.json", root / "first.json"
    if not first.exists():
        first.write_text(path.read_text())
    whole = json.loads(first.read_text())
    edit(whole)
    path.write_text(json.dumps(whole))
    return open_dense(root, GREY, "detection")


def shares(whole):
    for each in whole["annotations"]:
        each["bbox"] = [value / 56 for value in each["bbox"]]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda w: w["categories"].append(dict(w["categories"][2])), "has categories with the id 3 twice"),
        (lambda w: w["images"].append(dict(w["images"][4])), "has images with the id 5 twice"),
        (
            lambda w: w["images"].append({**w["images"][4], "id": 99}),
            "has images with the file_name '000004.png' twice",
        ),
        (lambda w: w["images"][0].update(file_name=5), "has an image whose file_name is 5; it must be text"),
        (shares, "the boxes look like shares of the image, and they must be in pixels"),
    ],
)
def test_annotations_that_count_twice_or_nothing(held, tmp_path, edit, message):
    write_coco(held, tmp_path, dense.CLASSES)
    with pytest.raises(UsageError, match=message):
        changed(tmp_path, edit)


def measured(held, data, **options):
    return evaluate_dense(Fixed(perfect(held)), data.batches(7), "detection", categories=data.categories, **options)


def test_categories_that_are_not_the_networks(held, tmp_path):
    write_coco(held, tmp_path, dense.CLASSES)

    def fewer(whole):
        whole["categories"] = whole["categories"][2:]
        ids = {each["id"] for each in whole["categories"]}
        whole["annotations"] = [each for each in whole["annotations"] if each["category_id"] in ids]

    data = changed(tmp_path, lambda whole: None)
    assert measured(held, data).figures["mAP"] == pytest.approx(100)
    network = Fixed(perfect(held))
    for classes in (7, 8):  # the ground may be one
        network.at, network.num_classes = 0, classes
        evaluate_dense(network, data.batches(7), "detection", categories=7)
    network.num_classes = 9
    with pytest.raises(UsageError, match="the data has 7 categories and the network 9 classes; the data must name all"):
        evaluate_dense(network, data.batches(7), "detection", categories=7)
    with pytest.raises(
        UsageError, match=r"the network gave the label [56]; the data has 5 categories, with the labels 0 to 4"
    ):
        measured(held, changed(tmp_path, fewer))
    with pytest.warns(
        UserWarning, match=r"labels look counted from 1, or one too high: (9[0-9]|100)% of the predictions"
    ):
        found = measured(held, changed(tmp_path, lambda w: w["categories"].append({"id": 0, "name": "ground"})))
    assert found.figures["mAP"] < 1
    changed(tmp_path, lambda whole: None)
    with pytest.warns(UserWarning, match="labels look counted from 1"):
        measured(held, open_dense(tmp_path, GREY, "detection", label_ids=True))
    with pytest.raises(UsageError, match="no box is counted"):
        measured(held, changed(tmp_path, lambda whole: whole.update(annotations=[])))


def test_another_order_of_the_categories_is_said(tmp_path):
    held = scenes.compose(100)
    write_coco(held, tmp_path, dense.CLASSES)
    order = [4, 7, 1, 6, 2, 3, 5]

    def shuffled(whole):
        for each in whole["annotations"]:
            each["category_id"] = order[each["category_id"] - 1]

    with pytest.warns(
        UserWarning, match="the order of the classes looks wrong: 100% of the boxes .*; the data must name"
    ):
        measured(held, changed(tmp_path, shuffled))


def test_masks_that_are_one_off_or_count_nothing(seed):
    masks = torch.randint(0, 4, (3, 12, 10))
    logits = nn.functional.one_hot(masks, 5).permute(0, 3, 1, 2).float()

    def found(targets):
        batch = (torch.zeros(3, 1, 8, 8), [{"mask": mask} for mask in targets])
        return evaluate_dense(Fixed(logits), [batch], "segmentation")

    with pytest.warns(UserWarning, match="labels look counted from 1, or one too high: 100% of"):
        found(masks + 1)
    with pytest.raises(UsageError, match="no pixel is counted: every mask is 255"):
        found(torch.full_like(masks, 255))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert found(masks).figures["mIoU"] == pytest.approx(100)


def test_dense_images_of_sixteen_bits_and_of_too_many_pixels(held, tmp_path, monkeypatch):
    write_coco(held, tmp_path, dense.CLASSES)
    plain = open_dense(tmp_path, GREY, "detection")[0][0]
    path = tmp_path / "images" / "000000.png"
    Image.fromarray(np.asarray(Image.open(path)).astype(np.uint16) * 257).save(path)
    for task in ("detection", "segmentation"):
        assert torch.equal(open_dense(tmp_path, GREY, task)[0][0], plain)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(DfqvitError, match=r"000000.png' is not a readable image \(Image size"):
        open_dense(tmp_path, GREY, "detection")[0]
