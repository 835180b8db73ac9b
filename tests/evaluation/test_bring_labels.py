"""Folders and labels that people bring: known, asked for, or refused; never a wrong order without a word."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import ImageNetInfo
from torch import nn

from dfqvit.errors import DfqvitError, UsageError
from dfqvit.evaluation import evaluate
from dfqvit.evaluation.data import open_images
from dfqvit.evaluation.labels import Confusion, read_labels
from dfqvit.models import Preprocessing

from .test_data import Table

PREPROCESSING = Preprocessing((3, 8, 8), (0.5,) * 3, (0.5,) * 3)


def folders(root, names):
    for name in names:
        (root / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(root / name / "x.png")
    return root


def labels_of(root, **options):
    images = open_images(root, PREPROCESSING, **options)
    return {path.parent.name: label for path, label in images.items}, images.assumed


@pytest.mark.parametrize("subset", ["imagenet-1k", "imagenet-22k", "imagenet-12k"])
def test_wordnet_ids_are_recognised(tmp_path, seed, subset):
    names = ImageNetInfo(subset).label_names()
    chosen = [names[int(index)] for index in torch.randperm(len(names))[:42]]
    found, assumed = labels_of(folders(tmp_path, chosen), num_classes=len(names))
    assert found == {name: names.index(name) for name in chosen}
    assert "WordNet ids, in the order of imagenet" in assumed


def test_folders_that_cannot_be_the_models_classes_are_refused(tmp_path):
    root = folders(tmp_path, [f"c{index:02}" for index in range(42)])
    with pytest.raises(UsageError, match=r"has 42 folders and the model 1000 classes, .*give --classes FILE"):
        labels_of(root, num_classes=1000)
    with pytest.raises(UsageError, match="has 42 folders and the model 10 classes"):
        labels_of(root, num_classes=10)
    found, assumed = labels_of(root, num_classes=42)
    assert found == {f"c{index:02}": index for index in range(42)}
    assert assumed == "the 42 folders in order are the classes 0 to 41"
    folders(tmp_path, ["n99999999"])
    with pytest.raises(UsageError, match="43 folders"):
        labels_of(root, num_classes=1000)


def test_wordnet_ids_of_another_number_of_classes_are_folders_in_order(tmp_path):
    names = ImageNetInfo("imagenet-1k").label_names()[5:8]
    assert labels_of(folders(tmp_path, names), num_classes=3)[0] == {name: index for index, name in enumerate(names)}
    with pytest.raises(UsageError, match="3 folders and the model 100 classes"):
        labels_of(tmp_path, num_classes=100)


def test_the_folder_above_is_recognised(tmp_path):
    for split in ("train", "val"):
        folders(tmp_path / split, ["a", "b", "c"])
    with pytest.raises(
        UsageError, match=r"has 2 folders and the model 3 classes.*give one of its folders, such as '.*train'"
    ):
        labels_of(tmp_path, num_classes=3)


@pytest.mark.parametrize("names", [["train", "val"], ["Test", "training", "valid"]])
def test_parts_of_a_data_set_are_no_classes(tmp_path, names):
    """Also where the model has as many classes as there are parts."""
    for name in names:
        folders(tmp_path / name, ["a", "b", "c"])
    with pytest.raises(UsageError, match=f"the folders {', '.join(names)}, which look like parts of a data set"):
        labels_of(tmp_path, num_classes=len(names))
    assert labels_of(tmp_path, num_classes=len(names), classes=_file(tmp_path / "c.txt", names))[0]


def _file(path, names):
    path.write_text("\n".join(names))
    return path


def test_what_archives_and_notebooks_leave_is_no_class(tmp_path):
    folders(tmp_path, ["b", "a", ".ipynb_checkpoints", "__MACOSX"])
    assert labels_of(tmp_path, num_classes=2)[0] == {"a": 0, "b": 1}


def test_numbers_in_names_are_in_timms_order_and_that_is_said(tmp_path):
    names = [str(index) for index in range(12)]
    with pytest.warns(UserWarning, match=r"in timm's order, numbers by their value .*torchvision sorts them as texts"):
        found, _ = labels_of(folders(tmp_path, names), num_classes=12)
    assert found == {name: int(name) for name in names}


def test_names_of_equal_length_need_no_word(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        labels_of(folders(tmp_path, ["n01", "n02", "n10"]), num_classes=3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a\nb\n", "classes had 2 lines and the model has 3 classes"),
        ("a\nb\na\n", "classes had 'a' in two lines"),
        ("a\n\nb\nc\n", "its line 2 is empty, and line k is the folder of class k"),
        ("a\nb\nd\n", "has the folder 'big cat', which is no class"),
    ],
)
def test_classes_files_that_do_not_fit(tmp_path, text, message):
    root = folders(tmp_path / "data", ["a", "b", "big cat"])
    (tmp_path / "classes.txt").write_text(text)
    with pytest.raises(UsageError, match=message):
        labels_of(root, classes=tmp_path / "classes.txt", num_classes=3)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_classes_files_with_blanks_and_descriptions(tmp_path, encoding):
    root = folders(tmp_path / "data", ["a", "b", "big cat"])
    (tmp_path / "classes.txt").write_text("b something more\r\nbig cat\r\na the letter\r\n\r\n", encoding=encoding)
    found, assumed = labels_of(root, classes=tmp_path / "classes.txt", num_classes=3)
    assert found == {"b": 0, "big cat": 1, "a": 2}
    assert "the classes file says" in assumed


def npz(path, labels):
    np.savez(path, images=np.zeros((len(labels), 3, 8, 8), np.uint8), labels=labels)
    return path


@pytest.mark.parametrize(
    ("labels", "kind", "message"),
    [
        (
            np.arange(1, 11),
            UsageError,
            "has labels from 1 to 10, counted from 1; the model's classes are 0 to 9: subtract 1",
        ),
        (np.arange(0, 12), UsageError, "has labels from 0 to 11; the model's classes are 0 to 9"),
        (np.array([-1, 3]), UsageError, "has labels from -1 to 3"),
        (np.array([0.5, 1.0]), DfqvitError, r"holds labels float64 \(2,\); they must be whole numbers \[n\]"),
        (np.eye(4), DfqvitError, r"holds labels float64 \(4, 4\)"),
        (np.array(["cat", "dog"]), DfqvitError, "they must be whole numbers"),
        (np.array([np.nan, 1.0]), DfqvitError, "they must be whole numbers"),
    ],
    ids=str,
)
def test_labels_that_cannot_be_the_models(tmp_path, labels, kind, message):
    with pytest.raises(kind, match=message):
        open_images(npz(tmp_path / "a.npz", labels), PREPROCESSING, num_classes=10)


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int64, np.float32])
@pytest.mark.parametrize("shape", [(-1,), (-1, 1)])
def test_labels_of_other_whole_kinds(tmp_path, dtype, shape):
    path = npz(tmp_path / "a.npz", np.array([0, 9, 4], dtype).reshape(shape))
    assert [label for _, label in open_images(path, PREPROCESSING, num_classes=10)] == [0, 9, 4]
    assert read_labels(path, np.array([7, 8], dtype), None).tolist() == [7, 8]


def test_a_classes_file_for_an_npz_is_refused(tmp_path):
    (tmp_path / "classes.txt").write_text("a\n")
    with pytest.raises(UsageError, match="it is for a folder of classes"):
        open_images(npz(tmp_path / "a.npz", np.arange(3)), PREPROCESSING, tmp_path / "classes.txt")


def test_channels_last_is_said(tmp_path):
    np.savez(tmp_path / "a.npz", images=np.zeros((2, 8, 8, 3), np.uint8), labels=np.arange(2))
    with pytest.raises(UsageError, match=r"has 8 channels; .*transpose\(0, 3, 1, 2\)"):
        open_images(tmp_path / "a.npz", PREPROCESSING)


def measured(guesses, labels, classes):
    """evaluate() of a model that guesses so."""
    images = torch.arange(len(labels)).view(-1, 1, 1, 1).float()
    return evaluate(Table(nn.functional.one_hot(guesses, classes).float()), [(images, labels)])


def test_predictions_that_are_one_off_are_said(seed):
    truth = torch.randint(0, 9, (200,))
    guesses = torch.where(torch.rand(200) < 0.8, truth, torch.randint(0, 9, (200,)))
    with pytest.warns(UserWarning, match=r"labels look counted from 1, or one too high: \d\d% of"):
        measured(guesses, truth + 1, 10)
    with pytest.warns(UserWarning, match="labels look one too low"):
        measured(guesses + 1, truth, 10)


def test_another_order_of_classes_is_said(seed):
    truth = torch.randint(0, 10, (400,))
    guesses = torch.where(torch.rand(400) < 0.8, truth, torch.randint(0, 10, (400,)))
    order = torch.tensor([3, 9, 0, 6, 5, 1, 8, 2, 7, 4])
    with pytest.warns(UserWarning, match=r"the order of the classes looks wrong: [78]\d% of"):
        measured(guesses, order[truth], 10)


@pytest.mark.parametrize("skill", [0.0, 0.1, 0.5, 0.95])
def test_right_labels_are_never_doubted(seed, skill):
    """Of a model that is right once, be it by chance: where it never is, the labels may be at fault."""
    for classes in (2, 3, 10, 300, 3000):
        truth = torch.randint(0, classes, (600,))
        guesses = torch.where(torch.rand(600) < skill, truth, torch.randint(0, classes, (600,)))
        guesses[0] = truth[0]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            measured(guesses, truth, classes)
            measured(truth[:1].expand(600), truth, classes)  # a model that fell into one class


def test_labels_outside_the_model_are_refused_by_evaluate():
    with pytest.raises(UsageError, match="labels were from 0 to 5; the model's classes are 0 to 3"):
        measured(torch.tensor([0, 1]), torch.tensor([0, 5]), 4)


def test_evaluate_leaves_the_modes(seed):
    model = Table(torch.eye(3)).train()
    evaluate(model, [(torch.arange(3).view(-1, 1, 1, 1).float(), torch.arange(3))], model)
    assert model.training


def test_a_comparison_of_other_classes_is_refused():
    data = [(torch.arange(3).view(-1, 1, 1, 1).float(), torch.arange(3))]
    with pytest.raises(UsageError, match="against gives 4 classes and the model 3"):
        evaluate(Table(torch.eye(3)), data, Table(torch.zeros(3, 4)))


def test_confusion_needs_enough_images():
    confusion = Confusion()
    confusion.add(torch.eye(4)[[1, 2, 3]], torch.tensor([2, 3, 0]))
    assert confusion.doubt() == ""


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (
            torch.zeros(1, dtype=torch.long),
            r"labels were int64 of shape \(1,\); they must be a tensor of whole numbers \[10\]",
        ),
        (torch.zeros(10, 1, dtype=torch.long), r"labels were int64 of shape \(10, 1\)"),
        (torch.zeros(11, dtype=torch.long), r"labels were int64 of shape \(11,\)"),
        (torch.zeros(10, 3), r"labels were float32 of shape \(10, 3\)"),
        (torch.zeros(10), r"labels were float32 of shape \(10,\)"),
        (torch.zeros(10, dtype=torch.bool), r"labels were bool of shape \(10,\)"),
        ([0] * 10, "labels were a list; they must be a tensor of whole numbers"),
        (np.zeros(10, np.int64), "labels were a ndarray"),
    ],
    ids=str,
)
def test_labels_that_are_not_one_for_each_image(labels, message):
    with pytest.raises(UsageError, match=message):
        evaluate(Table(torch.eye(3)), [(torch.zeros(10, 1, 1, 1), labels)])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32])
def test_labels_of_small_whole_kinds_count_and_are_doubted(seed, dtype):
    truth = torch.randint(0, 99, (300,))
    assert measured(truth, truth.to(dtype), 100).top1 == 100
    with pytest.warns(UserWarning, match="labels look counted from 1"):
        measured(truth, (truth + 1).to(dtype), 100)


def test_no_images_at_all_are_refused():
    for batches in ([], [(torch.zeros(0, 1, 1, 1), torch.zeros(0, dtype=torch.long))]):
        with pytest.raises(UsageError, match="batches held no images; they must hold one at least"):
            evaluate(Table(torch.eye(3)), batches)


def test_a_model_that_fell_into_one_class_is_no_doubt_about_labels():
    confusion = Confusion()
    truth = torch.tensor([1] * 70 + [0, 2, 3] * 5)
    confusion.count(truth, torch.zeros_like(truth), 4)
    assert confusion.doubt() == ""


def test_counts_of_a_growing_number_of_classes():
    confusion = Confusion()
    confusion.count(torch.tensor([0, 1]), torch.tensor([0, 0]), 2)
    confusion.count(torch.tensor([3]), torch.tensor([2]), 4)
    confusion.count(torch.tensor([1]), torch.tensor([1]), 2)
    assert confusion.pairs == {(0, 0): 1, (1, 0): 1, (1, 1): 1, (3, 2): 1}


@pytest.mark.parametrize("balance", [0.5, 0.8])
def test_two_classes_the_wrong_way_round_are_said(seed, balance):
    """Found here: who has cats for dogs saw 4 % and no word; of two classes nothing was looked at."""
    truth = (torch.rand(400) < balance).long()
    guesses = torch.where(torch.rand(400) < 0.95, truth, 1 - truth)
    with pytest.warns(UserWarning, match=r"the order of the classes looks wrong: 9\d% of the images"):
        measured(guesses, 1 - truth, 2)


def test_labels_of_models_of_many_classes_are_doubted_too(seed):
    """Found here: of more than 2,048 classes nothing was looked at, as where ImageNet-1k's labels meet a model of 21k."""
    truth = torch.randint(0, 1000, (400,))
    guesses = torch.randint(1000, 21843, (400,))
    with pytest.warns(UserWarning, match="not one of 400 images falls into the class of its label"):
        measured(guesses, truth, 21843)
    with pytest.warns(UserWarning, match="labels look counted from 1, or one too high: 100% of"):
        measured(guesses, guesses + 1, 21844)
    order = torch.randperm(21843)[:40]
    with pytest.warns(UserWarning, match="the order of the classes looks wrong: 100% of"):
        measured(order[truth % 40], truth % 40 + 100, 21843)


def test_names_of_two_words_in_a_classes_file(tmp_path):
    """Folders of a part of the classes; a name is cut to its first word only where that is a folder."""
    root = folders(tmp_path / "data", ["red car", "cat"])
    (tmp_path / "classes.txt").write_text("red car\nred bus\ncat a pet\ncat fish\n")
    with pytest.raises(UsageError, match="classes had 'cat' in two lines"):
        labels_of(root, classes=tmp_path / "classes.txt", num_classes=4)
    (tmp_path / "classes.txt").write_text("red bus\nred car\nred\ncat a pet\n")
    found, _ = labels_of(root, classes=tmp_path / "classes.txt", num_classes=4)
    assert found == {"red car": 1, "cat": 3}
    (tmp_path / "classes.txt").write_text("red bus\nred car\nred bus\ncat\n")
    with pytest.raises(UsageError, match="classes had 'red bus' in two lines"):
        labels_of(root, classes=tmp_path / "classes.txt", num_classes=4)


def test_labels_of_other_classes_are_doubted(seed):
    """Ten labels of one data set, and a model of a thousand classes that are others."""
    confusion = Confusion()
    guesses = torch.randint(10, 1000, (400,))
    confusion.add(torch.nn.functional.one_hot(guesses, 1000).float(), torch.arange(400) % 10)
    assert confusion.doubt().startswith("not one of 400 images falls into the class of its label")
    confusion.add(torch.eye(1000)[:20], torch.arange(20))
    assert confusion.doubt() == ""
