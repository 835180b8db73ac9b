"""Data that is odd and looks well: palettes, 0 and 255, links, pipes, repeated annotations, equal logits."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from dfqvit.errors import DfqvitError, UsageError
from dfqvit.evaluation import count_hits, evaluate, scenes
from dfqvit.evaluation.data import FolderImages, open_images
from dfqvit.evaluation.dense import evaluate_dense
from dfqvit.evaluation.dense_data import open_dense
from dfqvit.evaluation.labels import read_labels
from dfqvit.models import Preprocessing, dense

from ..coco import write_coco

GREY = Preprocessing((1, 56, 56), (0.3,), (0.35,), "bilinear", 1.0)


class Fixed(nn.Module):
    """Gives the same logits for whatever it gets."""

    def __init__(self, logits):
        super().__init__()
        self.register_buffer("logits", logits)

    def forward(self, images):
        return self.logits[: len(images)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_of_equal_logits_the_lower_class_comes_first(seed, dtype):
    """Found here: topk took any of them, others than argmax, and others for one number of classes than for another."""
    logits = torch.randint(0, 4, (300, 10)).to(dtype)
    labels = torch.randint(0, 10, (300,))
    for k in (1, 5, 10, 20):
        order = np.argsort(-logits.float().numpy(), axis=1, kind="stable")[:, :k]
        assert count_hits(logits, labels, k) == int((order == labels.numpy()[:, None]).any(1).sum())
    assert count_hits(logits, labels, 1) == int((logits.argmax(1) == labels).sum())


@pytest.mark.parametrize("size", [1, 7, 64, 500])
def test_figures_do_not_depend_on_the_batch_size(seed, size):
    logits, labels = torch.randint(0, 3, (100, 10)).float(), torch.randint(0, 10, (100,))

    class Next(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("logits", logits)

        def forward(self, images):
            return self.logits[images[:, 0, 0, 0].long()]

    images = torch.arange(100.0).view(-1, 1, 1, 1)
    parts = zip(images.split(size), labels.split(size), strict=True)
    found = evaluate(Next(), parts, Next())
    assert found.images == 100
    assert found.top1 == pytest.approx(100 * float((logits.argmax(1) == labels).float().mean()))
    assert found.agreement == 100
    assert found.logit_error == 0


def classes(root, count=2):
    for index in range(count):
        (root / f"c{index}").mkdir(parents=True)
        Image.new("L", (56, 56), 40 * index).save(root / f"c{index}" / "a.png")
    return root


def test_a_link_to_a_folder_above_is_not_followed(tmp_path):
    """Found here: the images of all classes were of the class with the link."""
    root = classes(tmp_path / "data")
    (root / "c0" / "all").symlink_to("..")
    (root / "c1" / "deep").mkdir()
    (root / "c1" / "deep" / "higher").symlink_to(tmp_path)
    assert [(path.parent.name, label) for path, label in FolderImages(root, GREY).items] == [("c0", 0), ("c1", 1)]


def test_a_pipe_is_no_image(tmp_path):
    """Found here: it was waited for."""
    root = classes(tmp_path)
    os.mkfifo(root / "c0" / "b.png")
    with pytest.raises(DfqvitError, match=r"b\.png' is not a readable image"):
        FolderImages(root, GREY)
    with pytest.warns(UserWarning, match="skipped"):
        assert len(FolderImages(root, GREY, unreadable="skip")) == 2


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": 1, "y": 2}, "has no array 'images'; it must hold 'images' and 'labels', and it has 'x', 'y'"),
        ({"images": np.zeros((1, 1, 4, 4), np.uint8)}, "has no array 'labels'; .* and it has 'images'"),
    ],
)
def test_arrays_of_other_names_are_told(tmp_path, arrays, message):
    np.savez(tmp_path / "data.npz", **arrays)
    with pytest.raises(DfqvitError, match=message):
        open_images(tmp_path / "data.npz", GREY)


@pytest.mark.parametrize("kind", ["npy", "png", "pickle"])
def test_files_that_are_no_npz_are_said_to_be_none(tmp_path, kind):
    """Found here: "This file contains pickled data. If you trust the file ...", of a picture."""
    path = tmp_path / f"data.{kind}"
    if kind == "npy":
        np.save(path, np.zeros(3))
    elif kind == "png":
        Image.new("L", (4, 4)).save(path)
    else:
        path.write_bytes(b"\x80\x04N.")
    with pytest.raises(DfqvitError, match=r"is not a readable \.npz file: it is no zip archive"):
        open_images(path, GREY)


def test_one_file_has_no_unreadable_images(tmp_path):
    np.savez(tmp_path / "data.npz", images=np.full((1, 1, 56, 56), 9, np.uint8), labels=[0])
    with pytest.raises(UsageError, match="unreadable was 'skip'; it is for a folder of images"):
        open_images(tmp_path / "data.npz", GREY, unreadable="skip")


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("labels", [[0.0, np.inf], [1e300, 0.0], [0.0, np.nan], np.array([2**63 + 5], np.uint64)])
def test_labels_that_no_whole_number_holds(tmp_path, labels):
    with pytest.raises(DfqvitError, match="they must be whole numbers"):
        read_labels(tmp_path, np.asarray(labels), 10)


@pytest.fixture
def folder(tmp_path):
    write_coco(scenes.compose(5), tmp_path, dense.CLASSES)
    return tmp_path


def edited(folder, edit):
    path = folder / "annotations.json"
    whole = json.loads(path.read_bytes())
    edit(whole)
    path.write_text(json.dumps(whole))
    return folder


def renumbered(kind):
    def edit(whole):
        for each in whole["categories"]:
            each["id"] = kind(each["id"])
        for each in whole["annotations"]:
            each["category_id"] = kind(each["category_id"])

    return edit


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda w: w["annotations"].extend(w["annotations"][:2]), "has annotations with the id 1 twice"),
        (renumbered(str), "has a category of the id '1'; ids are whole numbers"),
        (renumbered(lambda k: k + 0.5), "has a category of the id 1.5; ids are whole numbers"),
    ],
)
@pytest.mark.parametrize("label_ids", [False, True])
def test_annotations_that_are_there_twice_and_ids_that_are_no_numbers(folder, edit, message, label_ids):
    """Found here: boxes that nothing can find, labels cut to whole numbers, and a traceback."""
    with pytest.raises(UsageError, match=message):
        open_dense(edited(folder, edit), GREY, "detection", label_ids)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_annotations_in_other_encodings(folder, encoding):
    plain = open_dense(folder, GREY, "detection")
    path = folder / "annotations.json"
    path.write_text(path.read_text(), encoding=encoding)
    again = open_dense(folder, GREY, "detection")
    assert again.targets == plain.targets


def masks(folder, change):
    for path in sorted((folder / "masks").iterdir()):
        change(np.array(Image.open(path))).save(path)
    return open_dense(folder, GREY, "segmentation")


def palette(values, colours):
    """The values as entries of a palette, which has a colour for each, and no more."""
    used = sorted(set(values.ravel().tolist()), reverse=True)
    entries = np.zeros_like(values)
    for entry, value in enumerate(used):
        entries[values == value] = entry
    image = Image.fromarray(entries, mode="P")
    image.putpalette([part for value in used for part in colours(value)])
    return image


def test_greys_that_were_numbered_anew_are_refused(folder):
    """As programs for smaller PNGs do. Found here: the numbers of the entries were taken for classes."""
    data = masks(folder, lambda values: palette(values, lambda value: (value, value, value)))
    with pytest.raises(UsageError, match="has a palette of greys in which entry 0 is the grey"):
        data[0]


def test_colours_are_whatever_they_are(folder):
    wanted = [target["mask"] for _, target in (open_dense(folder, GREY, "segmentation")[i] for i in range(5))]

    def coloured(values):  # as Pascal VOC's, of whose colours some are grey
        image = Image.fromarray(values, mode="P")
        image.putpalette(
            [0, 0, 0, 128, 0, 0, 0, 128, 0, 128, 128, 0, 0, 0, 128, 128, 0, 128, 0, 128, 128, 128, 128, 128]
        )
        return image

    data = masks(folder, coloured)
    assert all(torch.equal(data[i][1]["mask"], mask) for i, mask in enumerate(wanted))


def test_black_and_white_are_classes_0_and_1(folder):
    def two(values):
        image = Image.fromarray((values > 0).astype(np.uint8), mode="P")
        image.putpalette([0, 0, 0, 255, 255, 255])
        return image

    assert masks(folder, two)[0][1]["mask"].unique().tolist() == [0, 1]


def test_masks_of_0_and_255_alone_are_refused(folder):
    """Found here: all objects counted for nothing, and the accuracy of the ground looked splendid."""
    data = masks(folder, lambda values: Image.fromarray(np.where(values > 0, 255, 0).astype(np.uint8)))
    with pytest.raises(UsageError, match="the masks hold 0 and 255 alone"):
        evaluate_dense(Fixed(torch.zeros(5, 8, 56, 56)), data.batches(5), "segmentation")


def test_some_masks_may_hold_0_and_255_alone(folder):
    found = masks(folder, Image.fromarray)
    first = np.array(Image.open(folder / "masks" / "000000.png"))
    Image.fromarray(np.where(first > 0, 255, 0).astype(np.uint8)).save(folder / "masks" / "000000.png")
    assert evaluate_dense(Fixed(torch.zeros(5, 8, 56, 56)), found.batches(5), "segmentation").images == 5


@pytest.mark.parametrize("task", ["detection", "segmentation"])
def test_processes_read_the_same(folder, task):
    data = open_dense(folder, GREY, task)
    one, several = (list(data.batches(2, workers)) for workers in (0, 2))
    assert [len(images) for images, _ in several] == [2, 2, 1]
    for (images, targets), (others, of_others) in zip(one, several, strict=True):
        assert torch.equal(images, others)
        for target, other in zip(targets, of_others, strict=True):
            assert target.keys() == other.keys()
            assert all(torch.equal(target[key], other[key]) for key in target)


def test_an_error_in_a_process_is_the_same_error(folder):
    data = open_dense(folder, GREY, "detection")
    (folder / "images" / "000003.png").unlink()
    with pytest.raises(DfqvitError, match=r"000003\.png' is missing; the annotations name it"):
        list(data.batches(2, workers=1))
