"""Calibration images that people give: judged, converted, or refused; the same from files."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform

import dfqvit
from dfqvit import demo
from dfqvit.calibration.given import given_images, judge
from dfqvit.errors import DfqvitError, UsageError
from dfqvit.evaluation import evaluate
from dfqvit.evaluation.batches import Batches
from dfqvit.evaluation.data import open_images, spread_images
from dfqvit.models import Preprocessing, load_model
from dfqvit.studies.diagnosis import diagnose

from ..conftest import small_vit

IMAGENET = Preprocessing((3, 32, 32), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF = Preprocessing((3, 32, 32), (0.5,) * 3, (0.5,) * 3)
CLIP = Preprocessing((3, 32, 32), (0.481, 0.458, 0.408), (0.269, 0.261, 0.276))
NONE = Preprocessing((3, 32, 32), (0.0,) * 3, (1.0,) * 3)
DEMO = Preprocessing((1, 32, 32), (0.286,), (0.353,))
ALL = {"imagenet": IMAGENET, "half": HALF, "clip": CLIP, "none": NONE, "demo": DEMO}


def pictures(seed, channels=3, count=4):
    """Smooth random pixels from 0 to 1, most of them far from both ends."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, channels, 5, 5, generator=generator)
    return torch.nn.functional.interpolate(coarse, 32, mode="bicubic", align_corners=False).clamp(0, 1)


def test_images_from_minus_one_to_one_are_doubted_where_black_lies_above(seed):
    """Few of their values lie beyond what pixels become: black is -0.81 there."""
    images = 2 * pictures(seed, channels=1, count=6) - 1
    images[0, 0, 0, :2] = torch.tensor([-1.0, 1.0])
    refusal, doubt = judge(images, DEMO)
    assert not refusal
    assert "held values from -1 to 1, like images of a mean and std of 0.5" in doubt
    assert judge(DEMO.normalise(pictures(seed, channels=1)), DEMO) == ("", "")


@pytest.mark.parametrize("name", list(ALL))
def test_rightly_normalised_images_pass_without_a_word(seed, name):
    preprocessing = ALL[name]
    pixels = pictures(seed, preprocessing.input_size[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = given_images(preprocessing.normalise(pixels), preprocessing)
    assert torch.equal(found, preprocessing.normalise(pixels))


@pytest.mark.parametrize("name", list(ALL))
def test_pixels_to_255_are_refused(seed, name):
    preprocessing = ALL[name]
    pixels = 255 * pictures(seed, preprocessing.input_size[0])
    with pytest.raises(UsageError, match=r"like pixels from 0 to 255; normalised images of this model lie between"):
        given_images(pixels, preprocessing)
    centred = pixels - 120
    with pytest.raises(UsageError, match="like pixels that were not divided by 255"):
        given_images(centred, preprocessing)
    with pytest.raises(UsageError, match=r"calib had dtype uint8; it must be a float tensor.*normalise\(images\)"):
        given_images(pixels.byte(), preprocessing)


@pytest.mark.parametrize("name", ["imagenet", "half", "clip", "demo"])
def test_pixels_to_1_are_refused_where_the_model_wants_another_mean(seed, name):
    preprocessing = ALL[name]
    with pytest.raises(UsageError, match="like pixels from 0 to 1 before normalisation"):
        given_images(pictures(seed, preprocessing.input_size[0]), preprocessing)
    with pytest.warns(UserWarning, match="like pixels from 0 to 1 before normalisation"):
        given_images(0.3 + 0.1 * pictures(seed, preprocessing.input_size[0]), preprocessing)  # only likely


def test_other_normalisations_are_doubted(seed):
    pixels = pictures(seed)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET.mean, IMAGENET.std))
    with pytest.warns(UserWarning, match=r"held values from -1 to 1, like images of a mean and std of 0.5"):
        given_images(HALF.normalise((pixels - pixels.min()) / (pixels.max() - pixels.min())), IMAGENET)
    with pytest.warns(UserWarning, match="values that no pixel gives .*images of another mean and std"):
        given_images(IMAGENET.normalise(pixels), HALF)
    with pytest.warns(UserWarning, match="values that no pixel gives"):
        given_images((IMAGENET.normalise(pixels) - mean) / std, IMAGENET)  # normalised twice


def test_quantize_refuses_pixels():
    """Real ones: from them the demo keeps 33 and 30 % of 92."""
    model = load_model("demo")
    pixels = torch.from_numpy(np.load(demo.TRAIN_SAMPLE)["images"][:16]).float()
    for wrong in (pixels, pixels / 255):
        with pytest.raises(UsageError, match="calib held values from 0"):
            dfqvit.quantize(model, calib=wrong)


def test_diagnose_knows_images_that_were_not_normalised(tmp_path, seed):
    model = load_model("demo")
    low, high = Preprocessing.of(model).channel_bounds()
    good = low + (high - low) * pictures(seed, 1, 8)[..., :28, :28]
    with pytest.warns(UserWarning, match="values that no pixel gives"):
        bad = dfqvit.quantize(model, calib=2.2 * good, rounding="nearest")
    path = dfqvit.save(bad, tmp_path / "q.safetensors")
    findings, measured = diagnose(dfqvit.load(path, runtime="simulated"))
    found = next(each for each in findings if each.signature == "images not normalised")
    assert "normalise" in found.advice
    assert measured["images"]["outside"] > 0.05
    fine = dfqvit.quantize(model, calib=good, rounding="nearest", runtime="simulated")
    assert "images not normalised" not in {each.signature for each in diagnose(fine)[0]}
    fine.dfqvit_record.measured["images"] |= {"least": 0.0, "greatest": 1.0, "outside": 0.0}  # made before the check
    assert "images not normalised" in {each.signature for each in diagnose(fine)[0]}


@pytest.mark.parametrize(
    "kind", ["list", "tuple", "array", "list of arrays", "list of batches", "float64", "float16", "strided"]
)
def test_lists_and_arrays(seed, kind):
    images = HALF.normalise(pictures(seed))
    given = {
        "list": list(images),
        "tuple": tuple(images),
        "array": images.numpy(),
        "list of arrays": list(images.numpy()),
        "list of batches": [image[None] for image in images],
        "float64": images.double().numpy(),
        "float16": images.half(),
        "strided": images.numpy()[::-1][::-1],
    }[kind]
    found = given_images(given, HALF)
    assert found.dtype == torch.float32
    assert torch.equal(found, images.half().float() if kind == "float16" else images)


def test_pil_images_are_prepared_as_timm_does(seed):
    generator = np.random.default_rng(seed)
    files = [Image.fromarray(generator.integers(0, 256, (40, 50, 3), dtype=np.uint8)) for _ in range(3)]
    files[1] = files[1].convert("RGBA")
    transform = create_transform(
        (3, 32, 32), mean=IMAGENET.mean, std=IMAGENET.std, crop_pct=0.9, interpolation="bicubic"
    )
    expected = torch.stack([transform(file.convert("RGB")) for file in files])
    assert torch.equal(given_images(files, IMAGENET), expected)


@pytest.mark.parametrize(
    ("calib", "message"),
    [
        ([], "calib was an empty list"),
        ([1, 2], r"calib\[0\] was a int"),
        (
            [torch.zeros(3, 32, 32), torch.zeros(3, 16, 16)],
            r"images of several shapes or dtypes \(\(3, 16, 16\), \(3, 32, 32\)\)",
        ),
        (torch.zeros(2, 32, 32, 3), r"channels come before height and width: permute\(0, 3, 1, 2\)"),
        (torch.zeros(3, 32, 32), r"calib had shape \(3, 32, 32\); it must be \[n, 3, 32, 32\]"),
        (torch.full((1, 3, 32, 32), float("nan")), "calib held NaN or Inf"),
        (torch.utils.data.DataLoader([1]), "calib was a DataLoader; .* its first batch without the labels"),
        ({"images": 1}, "calib was a dict"),
        (None, "calib was a NoneType; it may be 'synthetic', 'procedural', 'noise', or images"),
        (np.array([object()]), "calib was a ndarray"),
        (torch.zeros(2, 3, 32, 32, dtype=torch.long), "calib had dtype int64"),
    ],
    # no address: every process has its own
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_what_are_no_images(calib, message):
    with pytest.raises(UsageError, match=message):
        given_images(calib, HALF)


def test_judge_says_nothing_of_a_constant_picture():
    assert judge(torch.zeros(1, 3, 32, 32), NONE) == ("", "")
    assert judge(HALF.normalise(torch.full((2, 3, 32, 32), 0.2)), HALF) == ("", "")


def test_a_flat_folder_and_folders_of_any_depth_calibrate(tmp_path, seed):
    generator = np.random.default_rng(seed)
    for name in ("b.png", "a.jpg", "deep/er/c.png", ".hidden/d.png", "notes.txt", "e.tif"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".txt":
            path.write_text("no image")
        else:
            Image.fromarray(generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(path)
    images = open_images(tmp_path, HALF, labelled=False)
    assert [path.name for path, _ in images.items] == ["a.jpg", "b.png", "c.png", "e.tif"]
    assert spread_images(images, 4).shape == (4, 3, 32, 32)
    np.savez(tmp_path / "n.npz", images=np.zeros((2, 3, 32, 32), np.uint8))
    assert len(open_images(tmp_path / "n.npz", HALF, labelled=False)) == 2
    with pytest.raises(DfqvitError, match="it must hold 'images' and 'labels'"):
        open_images(tmp_path / "n.npz", HALF)


@pytest.mark.parametrize("channels", [1, 3])
def test_sixteen_bits_are_scaled(tmp_path, seed, channels):
    values = np.random.default_rng(seed).integers(0, 65536, (32, 32), dtype=np.uint16)
    (tmp_path / "c").mkdir()
    Image.fromarray(values).save(tmp_path / "c" / "deep.png")
    Image.fromarray(((values.astype(np.int64) + 128) // 257).astype(np.uint8)).save(tmp_path / "c" / "plain.png")
    preprocessing = Preprocessing((channels, 32, 32), (0.5,) * channels, (0.5,) * channels, crop_pct=1.0)
    deep, plain = (image for image, _ in open_images(tmp_path, preprocessing))
    assert torch.equal(deep, plain)
    exact = torch.from_numpy(values.astype(np.float64) / 65535)
    assert float(((deep[0] + 1) / 2 - exact).abs().max()) <= 0.5 / 255 + 1e-6


def test_pixels_of_no_known_range_are_named(tmp_path, seed):
    (tmp_path / "c").mkdir()
    Image.fromarray(np.random.default_rng(seed).random((32, 32), dtype=np.float32)).save(tmp_path / "c" / "x.tif")
    with pytest.raises(DfqvitError, match=r"x.tif' is not a readable image \(its pixels are floating-point numbers"):
        open_images(tmp_path, HALF)[0]


def test_eight_bits_in_files_of_sixteen_are_not_taken_for_black(tmp_path, seed):
    values = np.random.default_rng(seed).integers(0, 256, (2, 32, 32), dtype=np.uint8)
    values[:, 0, 0] = 255
    (tmp_path / "c").mkdir()
    for kind, end in ((np.uint16, "png"), (np.int32, "tif")):
        deep = [Image.fromarray(each.astype(kind)) for each in values]
        with pytest.raises(UsageError, match=r"of which they use 8 at most \(255\): all but black"):
            given_images(deep, DEMO)
        deep[0].save(tmp_path / "c" / f"x.{end}")
        with pytest.raises(DfqvitError, match=r"all but black"):
            open_images(tmp_path, DEMO)[0]
        (tmp_path / "c" / f"x.{end}").unlink()
    with pytest.warns(UserWarning, match="pixels up to 4080 only, as cameras of 12 bits give them"):
        given_images([Image.fromarray(values[0].astype(np.uint16) * 16)], DEMO)
    assert len(given_images([Image.fromarray(np.zeros((32, 32), np.uint16)), Image.fromarray(values[0])], DEMO)) == 2
    np.savez(tmp_path / "n.npz", images=(values[:, None] / 255).astype(np.uint8), labels=np.zeros(2, np.int64))
    with pytest.raises(UsageError, match=r"has images of 0 and 1 alone; their pixels must lie from 0 to 255"):
        open_images(tmp_path / "n.npz", DEMO)


@pytest.mark.parametrize("name", list(ALL))
def test_images_that_tell_nothing_are_doubted(seed, name):
    preprocessing = ALL[name]
    images = preprocessing.normalise(pictures(seed, preprocessing.input_size[0]))
    low, _ = preprocessing.channel_bounds()
    with pytest.warns(UserWarning, match="held 4 images of one colour among 4"):
        given_images(low.expand_as(images), preprocessing)
    with pytest.warns(UserWarning, match="held 1 images of one colour among 5"):
        given_images(torch.cat([images, torch.zeros_like(images[:1])]), preprocessing)
    with pytest.warns(UserWarning, match="held the same image 3 times"):
        given_images(images[:1].expand(3, -1, -1, -1), preprocessing)


@pytest.mark.parametrize("kind", [">f4", ">f8", np.longdouble, np.float16])
def test_arrays_of_other_floats(seed, kind):
    images = HALF.normalise(pictures(seed))
    found = given_images(images.numpy().astype(kind), HALF)
    assert found.dtype == torch.float32
    assert torch.allclose(found, images, atol=1e-3)
    assert torch.equal(given_images(list(images.numpy().astype(kind)), HALF), found)


@pytest.mark.parametrize("channels", [1, 3])
def test_sixteen_bits_in_a_list(seed, channels):
    preprocessing = Preprocessing((channels, 32, 32), (0.5,) * channels, (0.5,) * channels, crop_pct=1.0)
    values = np.random.default_rng(seed).integers(0, 256, (2, 32, 32), dtype=np.uint8)
    plain = [Image.fromarray(each) for each in values]
    deep = [Image.fromarray(each.astype(np.uint16) * 257) for each in values]
    assert torch.equal(given_images(deep, preprocessing), given_images(plain, preprocessing))
    with pytest.raises(
        UsageError, match=r"calib\[1\] was a PIL image of mode F: its pixels are floating-point numbers"
    ):
        given_images([plain[0], Image.fromarray(values[1].astype(np.float32))], preprocessing)


def test_images_that_are_not_normalised_are_said_by_evaluate(seed):
    """Found here: a data loader that only makes tensors gave accuracies near chance, of both models, and no word."""
    model, labels = small_vit(num_classes=5), torch.arange(12) % 5
    pixels = torch.rand(12, 3, 32, 32)
    pixels[0, 0, 0, 0], pixels[0, 0, 0, 1] = 0, 1
    images = (pixels - 0.5) / 0.5
    qmodel = dfqvit.quantize(model, 8, calib=images, rounding="nearest", progress=False)
    for each in (model, qmodel):
        for wrong, kind in (
            (pixels, "pixels from 0 to 1 before normalisation"),
            (255 * pixels, "pixels from 0 to 255"),
        ):
            with pytest.warns(UserWarning, match=f"batches held values from .*, like {kind}; normalised images"):
                evaluate(each, [(wrong, labels)])
        imagenet = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        mean, std = (value.view(3, 1, 1) for value in imagenet)
        with pytest.warns(UserWarning, match=r"batches held values that no pixel gives \(\d+% of them\)"):
            evaluate(each, [((pixels - mean) / std, labels)])
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            assert evaluate(each, [(images, labels)]).images == 12
        assert not [each for each in found if "batches held" in str(each.message)]


def test_preprocessing_that_was_asked_for_is_not_doubted(tmp_path, seed):
    """Of --mean 0 --std 1, for a model that takes pixels though its file does not say so."""
    pixels = (torch.rand(12, 3, 32, 32) * 256).byte()
    np.savez(tmp_path / "a.npz", images=pixels.numpy(), labels=np.arange(12) % 5)
    plain = Preprocessing((3, 32, 32), (0.0,) * 3, (1.0,) * 3)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="batches held")
        assert evaluate(small_vit(num_classes=5), Batches(open_images(tmp_path / "a.npz", plain))).images == 12
