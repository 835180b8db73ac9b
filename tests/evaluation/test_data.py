"""Image folders and .npz files, whole and damaged; evaluation figures against counting by hand."""

from __future__ import annotations

import os
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform
from torch import nn
from torch.utils.data import Subset

from dfqvit.errors import DfqvitError, UsageError
from dfqvit.evaluation import evaluate
from dfqvit.evaluation.batches import Batches, read_by
from dfqvit.evaluation.data import ArrayImages, open_images, spread_images
from dfqvit.models import Preprocessing

from ..conftest import small_vit

PREPROCESSING = Preprocessing((3, 16, 16), (0.5,) * 3, (0.25,) * 3, crop_pct=1.0)


@pytest.fixture
def folder(tmp_path, seed):
    generator = np.random.default_rng(seed)
    for name, count in (("n01", 2), ("n02", 3)):
        (tmp_path / "images" / name).mkdir(parents=True)
        for index in range(count):
            pixels = generator.integers(0, 255, (20, 24, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{index}.png")
    return tmp_path / "images"


def test_folder(folder):
    images = open_images(folder, PREPROCESSING)
    assert [label for _, label in images] == [0, 0, 1, 1, 1]
    assert images[0][0].shape == (3, 16, 16)


def test_classes_file_gives_the_order(folder, tmp_path):
    names = tmp_path / "classes.txt"
    names.write_text("n02\nn07\nn01\n")
    assert [label for _, label in open_images(folder, PREPROCESSING, names)] == [2, 2, 0, 0, 0]
    names.write_text("n02\n")
    with pytest.raises(UsageError, match="has the folder 'n01', which is no class"):
        open_images(folder, PREPROCESSING, names)
    with pytest.raises(UsageError, match=r"classes was .* there is no such file"):
        open_images(folder, PREPROCESSING, tmp_path / "none.txt")


def test_unreadable_file_is_named_and_refused_or_skipped(folder):
    (folder / "n01" / "broken.jpg").write_bytes(b"not an image")
    with pytest.raises(DfqvitError, match=r"broken.jpg' is not a readable image; remove it or give --unreadable skip"):
        open_images(folder, PREPROCESSING)
    with pytest.warns(UserWarning, match=r"broken.jpg' is not a readable image, skipped"):
        assert len(open_images(folder, PREPROCESSING, unreadable="skip")) == 5


def test_grey_files_for_a_grey_model(folder):
    images = open_images(folder, Preprocessing((1, 16, 16), (0.5,), (0.25,)))
    assert images[0][0].shape == (1, 16, 16)
    with pytest.raises(UsageError, match="the model takes 5 channels; image files have 1 or 3"):
        open_images(folder, Preprocessing((5, 16, 16), (0.5,) * 5, (0.25,) * 5))


def test_empty_folder(tmp_path):
    with pytest.raises(UsageError, match="it has no folders of classes"):
        open_images(tmp_path, PREPROCESSING)
    (tmp_path / "a").mkdir()
    with pytest.raises(UsageError, match="it has no images"):
        open_images(tmp_path, PREPROCESSING)
    with pytest.raises(UsageError, match="there is no such file or folder"):
        open_images(tmp_path / "b", PREPROCESSING)


def write_npz(path, size=16, channels=3, count=4, **changes):
    arrays = {
        "images": np.random.default_rng(0).integers(0, 256, (count, channels, size, size), dtype=np.uint8),
        "labels": np.arange(count),
    } | changes
    np.savez(path, **arrays)
    return path


def test_npz_of_the_models_size_is_only_normalised(tmp_path):
    path = write_npz(tmp_path / "a.npz")
    image, label = open_images(path, PREPROCESSING)[2]
    expected = (torch.from_numpy(np.load(path)["images"][2]).float() / 255 - 0.5) / 0.25
    assert torch.allclose(image, expected)
    assert label == 2


def test_npz_of_another_size_is_resized_and_clamped(tmp_path):
    path = write_npz(tmp_path / "a.npz", size=40)
    image, _ = open_images(path, PREPROCESSING)[0]
    assert image.shape == (3, 16, 16)
    low, high = PREPROCESSING.channel_bounds()
    assert bool(((image >= low) & (image <= high)).all())


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"images": np.zeros((4, 3, 8, 8), np.float32)}, DfqvitError, "they must be uint8"),
        ({"labels": np.arange(3)}, DfqvitError, "with 3 labels"),
        ({"images": np.zeros((4, 1, 8, 8), np.uint8)}, UsageError, "has 1 channels; the model takes 3"),
        ({"images": np.zeros((0, 3, 8, 8), np.uint8), "labels": np.arange(0)}, UsageError, "holds no images"),
    ],
)
def test_npz_that_does_not_fit(tmp_path, changes, kind, message):
    with pytest.raises(kind, match=message):
        open_images(write_npz(tmp_path / "a.npz", **changes), PREPROCESSING)


def test_damaged_npz(tmp_path):
    path = write_npz(tmp_path / "a.npz")
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(DfqvitError, match=r"a.npz' is (damaged|not a readable)"):
        open_images(path, PREPROCESSING)
    np.savez(path, pictures=np.zeros(3))
    with pytest.raises(DfqvitError, match="it must hold 'images' and 'labels'"):
        open_images(path, PREPROCESSING)
    np.savez(path, images=np.array([object()]), labels=np.arange(1))
    with pytest.raises(DfqvitError, match=r"is not a readable .npz"):
        open_images(path, PREPROCESSING)


def test_spread_images(tmp_path):
    images = open_images(write_npz(tmp_path / "a.npz", count=9), PREPROCESSING)
    assert torch.equal(spread_images(images, 3), torch.stack([images[i][0] for i in (0, 3, 6)]))
    with pytest.raises(UsageError, match="10 images were asked for; the data has 9"):
        spread_images(images, 10)


class Table(nn.Module):
    """Gives prepared logits: row i for an image filled with i."""

    def __init__(self, logits):
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, x):
        return self.logits[x[:, 0, 0, 0].long()]


def test_evaluation_figures_against_counting(seed):
    count, classes = 23, 9
    ours, theirs = Table(torch.randn(count, classes)), Table(torch.randn(count, classes))
    labels = torch.randint(0, classes, (count,))
    images = torch.arange(count).view(-1, 1, 1, 1).float()
    found = evaluate(ours, [(images[:10], labels[:10]), (images[10:], labels[10:])], theirs)
    a, b = ours.logits.detach().numpy(), theirs.logits.detach().numpy()

    def in_top(table, k):
        return 100 * np.mean([label in np.argsort(-row)[:k] for row, label in zip(table, labels.numpy(), strict=True)])

    assert found.images == count
    assert found.top1 == pytest.approx(in_top(a, 1))
    assert found.top5 == pytest.approx(in_top(a, 5))
    assert found.against_top1 == pytest.approx(in_top(b, 1))
    assert found.against_top5 == pytest.approx(in_top(b, 5))
    assert found.agreement == pytest.approx(100 * np.mean(a.argmax(1) == b.argmax(1)))
    assert found.logit_error == pytest.approx(np.abs(a - b).mean(), rel=1e-5)


@pytest.mark.parametrize(
    ("give", "kind", "message"),
    [
        (lambda y: (y, y), UsageError, r"model gave a tuple for 7 images; it must give logits \[7, classes\]"),
        (lambda y: y[:, None].expand(-1, 7, -1), UsageError, r"model gave \[7, 7, 9\] for 7 images"),
        (lambda y: y[:, 0], UsageError, r"model gave \[7\] for 7 images"),
        (lambda y: y.masked_fill(y == y.max(), torch.nan), DfqvitError, "model gave logits that hold NaN or Inf"),
        (lambda y: y * torch.inf, DfqvitError, "model gave logits that hold NaN or Inf"),
    ],
)
def test_what_is_no_logits_is_not_counted(seed, give, kind, message):
    table, images, labels = Table(torch.randn(7, 9)), torch.arange(7).view(-1, 1, 1, 1).float(), torch.randint(9, (7,))

    class Other(Table):
        def forward(self, x):
            return give(super().forward(x))

    other = Other(table.logits.detach())
    with pytest.raises(kind, match=message):
        evaluate(other, [(images, labels)])
    with pytest.raises(kind, match=message.replace("model", "against", 1)):
        evaluate(table, [(images, labels)], other)


def test_features_are_no_logits(seed):
    with pytest.raises(UsageError, match="model has no classifier"):
        evaluate(small_vit(num_classes=0), [(torch.randn(2, 3, 32, 32), torch.tensor([0, 1]))])


def test_fewer_than_five_classes():
    table = Table(torch.eye(3))
    found = evaluate(table, [(torch.arange(3).view(-1, 1, 1, 1).float(), torch.arange(3))])
    assert (found.top1, found.top5, found.agreement) == (100.0, 100.0, None)


def test_batches_keep_the_order(folder):
    labels = torch.cat([y for _, y in Batches(open_images(folder, PREPROCESSING), 2)])
    assert labels.tolist() == [0, 0, 1, 1, 1]


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
def test_pixels_are_normalised_to_the_bits_of_timms_transform(folder, mode, device):
    preprocessing = Preprocessing((3, 16, 16), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), mode, crop_pct=0.9)
    images = open_images(folder, preprocessing)
    options = {"interpolation": mode, "mean": preprocessing.mean, "std": preprocessing.std, "crop_pct": 0.9}
    transform = create_transform((3, 16, 16), **options)
    expected = torch.stack([transform(Image.open(path).convert("RGB")) for path, _ in images.items])
    found = torch.cat([x for x, _ in Batches(images, 2, device=device)])
    assert found.device.type == device
    assert torch.equal(found.cpu(), expected)
    assert torch.equal(torch.stack([image for image, _ in images]), expected)


def test_every_byte_is_normalised_as_torch_divides_on_the_cpu(device):
    every = torch.arange(256, dtype=torch.uint8).view(1, 16, 16).expand(3, 16, 16)
    preprocessing = Preprocessing((3, 16, 16), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    mean, std = (np.float32(v).reshape(3, 1, 1) for v in (preprocessing.mean, preprocessing.std))
    expected = (every.numpy().astype(np.float32) / np.float32(255) - mean) / std
    assert np.array_equal(preprocessing.normalise(every.to(device)).cpu().numpy(), expected)


@pytest.mark.parametrize("workers", [1, 2])
def test_worker_processes_give_the_same_batches(folder, tmp_path, workers):
    for images in (open_images(folder, PREPROCESSING), open_images(write_npz(tmp_path / "a.npz", 40), PREPROCESSING)):
        alone, shared = Batches(images, 2), Batches(images, 2, workers)
        assert len(alone) == len(shared)
        for _ in range(2):  # passes
            for (x, y), (u, v) in zip(alone, shared, strict=True):
                assert torch.equal(x, u)
                assert torch.equal(y, v)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_waits_until_the_processes_that_read_are_made(number):
    """Found here: beside the line of an interrupted command stood "Exception ignored in", by multiprocessing."""
    made = []

    class Loader:
        def __iter__(self):
            signal.raise_signal(number)
            made.append("all")
            return iter([1])

    def interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(number, interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            list(read_by(Loader()))
    finally:
        signal.signal(number, before)
    assert made == ["all"]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_cut_off_file_is_named_or_left_out(folder, workers):
    path = folder / "n02" / "1.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:-400])  # its header is whole
    images = open_images(folder, PREPROCESSING)
    with pytest.raises(DfqvitError, match=r"^data: '.*n02/1.jpg' is not a readable image \([^\n]*\)$"):
        list(Batches(images, 2, workers))
    images = open_images(folder, PREPROCESSING, unreadable="skip")
    with pytest.warns(UserWarning, match=r"n02/1.jpg' is not a readable image .* skipped"):
        labels = torch.cat([y for _, y in Batches(images, 2, workers)])
    assert labels.tolist() == [0, 0, 1, 1, 1]


class Deadly(ArrayImages):
    def pixels(self, index):
        os.kill(os.getpid(), signal.SIGKILL)


class Interrupted(ArrayImages):
    def pixels(self, index):
        if torch.utils.data.get_worker_info() is not None:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGHUP)
        return super().pixels(index)


def test_what_ends_the_whole_group_is_left_to_the_parent(tmp_path, capfd):
    """Found here: a second signal was a traceback of a process that reads images, beside the command's one line."""
    images = Interrupted(write_npz(tmp_path / "a.npz"), PREPROCESSING)
    usual = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGINT, signal.SIGHUP)}
    try:
        found = [y for _, y in Batches(images, 2, 1)]
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler)
    assert torch.equal(torch.cat(found), torch.cat([y for _, y in Batches(images, 2)]))
    assert capfd.readouterr().err == ""


def test_a_killed_worker_is_one_error(tmp_path):
    images = Deadly(write_npz(tmp_path / "a.npz"), PREPROCESSING)
    with pytest.raises(DfqvitError, match="a process that reads images was killed"):
        list(Batches(images, 2, 1))


def test_part_of_a_data_set(tmp_path):
    images = open_images(write_npz(tmp_path / "a.npz", count=9), PREPROCESSING)
    found = list(Batches(Subset(images, [7, 2, 5]), 2))
    assert torch.cat([y for _, y in found]).tolist() == [7, 2, 5]
    assert torch.equal(found[0][0][1], images[2][0])


def test_time_spent_waiting_for_images(monkeypatch):
    """By a clock that only the images and the model move."""
    now = [0.0]
    monkeypatch.setattr("dfqvit.evaluation.accuracy.time", SimpleNamespace(perf_counter=lambda: now[0]))

    def slow():
        for _ in range(3):
            now[0] += 0.3
            yield torch.zeros(2, 1, 1, 1), torch.zeros(2, dtype=torch.long)

    class Timed(Table):
        def forward(self, images):
            now[0] += 0.1
            return super().forward(images)

    found = evaluate(Timed(torch.eye(3)), slow())
    assert found.waiting == pytest.approx(75)
    assert found.images_per_second == pytest.approx(6 / 0.3)
    assert found.overall_images_per_second == pytest.approx(6 / 1.2)


def test_links_to_folders_are_followed_once(folder):
    inner = folder / "n01" / "more"
    inner.symlink_to(folder / "n02")
    (folder / "n03").symlink_to(folder / "n01")
    (folder / "n02" / "again").symlink_to(folder / "n02")
    images = open_images(folder, PREPROCESSING)
    assert [label for _, label in images.items] == [0] * 5 + [1] * 3 + [2] * 5
    names = [str(path.relative_to(folder)) for path, _ in images.items]
    assert names[:5] == ["n01/0.png", "n01/1.png", "n01/more/0.png", "n01/more/1.png", "n01/more/2.png"]
    assert len(open_images(folder, PREPROCESSING, labelled=False)) == 5  # every folder once


def test_images_of_other_kinds_are_counted(folder):
    for name in ("a.gif", "b.GIF", "c.heic", ".d.gif", "notes.txt"):
        (folder / "n01" / name).write_bytes(b"x")
    with pytest.warns(
        UserWarning, match=r"3 files of other kinds were left out \(.gif, .heic\); images are read from .jpg"
    ):
        assert len(open_images(folder, PREPROCESSING)) == 5


def test_an_image_of_too_many_pixels_is_a_file_that_cannot_be_read(folder, monkeypatch):
    Image.new("L", (100, 100)).save(folder / "n02" / "vast.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(DfqvitError, match=r"vast.png' is not a readable image; remove it or give --unreadable skip"):
        open_images(folder, PREPROCESSING)
    with pytest.warns(UserWarning, match=r"vast.png' is not a readable image, skipped"):
        images = open_images(folder, PREPROCESSING, unreadable="skip")
    assert len(images) == 5
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # 20 x 24 pixels are too many now
    with pytest.raises(DfqvitError, match=r"0.png' is not a readable image \(Image size"):
        images[0]


def test_npz_of_images_without_pixels(tmp_path):
    path = write_npz(tmp_path / "a.npz", images=np.zeros((4, 3, 0, 8), np.uint8))
    with pytest.raises(UsageError, match=r"has images of 8 x 0 pixels; they must have one at least"):
        open_images(path, PREPROCESSING)
