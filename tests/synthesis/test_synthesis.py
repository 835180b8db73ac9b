"""Synthesis: the curriculum, the losses against their formulas, determinism, resuming, valid pixels."""

from __future__ import annotations

import copy
import errno
import math
import os
import signal
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import safetensors.torch
import torch
from safetensors import SafetensorError
from timm.models import VisionTransformer
from torch import nn
from torch.amp import autocast_mode

from dfqvit import synthesize
from dfqvit.errors import DfqvitError, UsageError
from dfqvit.kernels import total_variation, use_backend
from dfqvit.models import Preprocessing
from dfqvit.synthesis import Synthesis, SynthesisConfig, interruption, loop, step
from dfqvit.synthesis.curriculum import DRAWS, crop_ratio, crop_shift_flip
from dfqvit.synthesis.losses import onehot_loss, tv_loss
from dfqvit.synthesis.step import Step

from ..conftest import small_swin, small_vit


def test_schedules():
    bounds = (0.08, 1.0)
    assert crop_ratio("e2h", 0, 100, *bounds) == pytest.approx(1.0)
    assert crop_ratio("e2h", 100, 100, *bounds) == pytest.approx(0.08)
    assert crop_ratio("e2h", 25, 100, *bounds) == pytest.approx(0.08 + 0.92 * (1 + math.cos(math.pi / 4)) / 2)
    assert crop_ratio("hard-to-easy", 0, 100, *bounds) == pytest.approx(0.08)
    assert {crop_ratio("fixed", t, 100, *bounds) for t in range(100)} == {1.0}
    falling = [crop_ratio("e2h", t, 50, *bounds) for t in range(51)]
    assert falling == sorted(falling, reverse=True)


def draws_of(centre_x=0.0, centre_y=0.0, aspect=0.5, shift=0.5, flip=0.9):
    return torch.tensor([[centre_x, centre_y, aspect, shift, flip]])


def test_whole_image_without_shift_or_flip_is_the_image(seed):
    images = torch.randn(1, 3, 9, 14)
    assert torch.allclose(crop_shift_flip(images, draws_of(), 1.0, 0.0), images, atol=1e-4)


def test_flip_and_circular_shift_at_full_size(seed):
    images = torch.randn(1, 2, 10, 10)
    flipped = crop_shift_flip(images, draws_of(flip=0.1), 1.0, 0.0)
    assert torch.allclose(flipped, images.flip(3), atol=1e-4)
    shifted = crop_shift_flip(images, draws_of(shift=1.0), 1.0, 0.3)  # by round(0.3 * 10) pixels, the greatest
    assert torch.allclose(shifted, images.roll((-3, -3), (2, 3)), atol=1e-4)


def test_crop_is_a_bilinear_resize_of_the_cropped_region(seed):
    images = torch.randn(1, 3, 16, 16, dtype=torch.float64)
    found = crop_shift_flip(images, draws_of(centre_x=1.0, centre_y=0.0), 0.25, 0.0)  # the upper right quarter
    region = torch.nn.functional.interpolate(images[:, :, :8, 8:], size=16, mode="bilinear", align_corners=False)
    assert torch.allclose(found[..., 1:-1, 1:-1], region[..., 1:-1, 1:-1], atol=1e-6)  # edges see their neighbours


def test_gradient_flows_into_the_cropped_region_only(seed):
    images = torch.randn(1, 1, 20, 20, requires_grad=True)
    crop_shift_flip(images, draws_of(centre_x=0.0, centre_y=0.0), 0.25, 0.0).sum().backward()
    touched = images.grad[0, 0] != 0
    assert touched[:10, :10].all()
    assert not touched[11:, :].any()
    assert not touched[:, 11:].any()


def test_every_random_crop_stays_inside_and_keeps_its_area(seed):
    """A ramp image shows where the crop lies: its value is the coordinate."""
    side = 64
    ramp = torch.arange(side, dtype=torch.float64).view(1, 1, 1, side).expand(200, 1, side, side)
    found = crop_shift_flip(ramp.contiguous(), torch.rand(200, DRAWS, dtype=torch.float64), 0.25, 0.0)
    width = (found[:, 0, 0, -1] - found[:, 0, 0, 0]).abs() * side / (side - 1)
    assert float(width.min()) > 0.5 * side * math.sqrt(3 / 4) - 2
    assert float(width.max()) < 0.5 * side * math.sqrt(4 / 3) + 2
    assert float(found.min()) >= 0
    assert float(found.max()) <= side - 1


def test_total_variation_against_numpy(seed):
    images = torch.randn(2, 3, 7, 5, dtype=torch.float64)
    for image, found in zip(images.numpy(), total_variation(images), strict=True):
        expected = 0.0
        for dy, dx in ((0, 1), (1, 0), (1, -1), (1, 1)):
            total = 0.0
            for y in range(7):
                for x in range(5):
                    if 0 <= y + dy < 7 and 0 <= x + dx < 5:
                        total += float(((image[:, y, x] - image[:, y + dy, x + dx]) ** 2).sum())
            expected += math.sqrt(total)
        assert found.item() == pytest.approx(expected)


def test_tv_gradient_is_psaq_vits_at_its_batch_and_size(seed):
    """PSAQ-ViT: |norm over the batch of 32 - target|. With equal images both losses and gradients are the same."""
    one = torch.randn(1, 3, 224, 224, dtype=torch.float64)
    images = one.repeat(32, 1, 1, 1).requires_grad_()
    diffs = (
        images[:, :, :, :-1] - images[:, :, :, 1:],
        images[:, :, :-1, :] - images[:, :, 1:, :],
        images[:, :, 1:, :-1] - images[:, :, :-1, 1:],
        images[:, :, :-1, :-1] - images[:, :, 1:, 1:],
    )
    target = 2750.0
    theirs = (sum(torch.norm(d) for d in diffs) - target).abs()
    ours = tv_loss(images, torch.full((32,), 0.5, dtype=torch.float64))
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-9)
    pair = [torch.autograd.grad(loss, images)[0] for loss in (ours, theirs)]
    assert torch.allclose(*pair, rtol=1e-6, atol=1e-12)


def test_same_seed_same_bits_other_seed_other_images(model):
    first, second, third = (synthesize(model, 3, 4, seed) for seed in (5, 5, 6))
    assert torch.equal(first, second)
    assert not torch.equal(first, third)


def test_start_of_an_image_does_not_depend_on_how_many_there_are(model):
    config = {"iters": 2, "seed": 9}
    few = Synthesis(model, SynthesisConfig(samples=2, **config), Preprocessing.of(model))
    many = Synthesis(model, SynthesisConfig(samples=5, **config), Preprocessing.of(model))
    assert torch.equal(few.images, many.images[:2])
    assert torch.equal(few.advance._draws, many.advance._draws[:, :2])
    assert torch.equal(few.advance.labels, many.advance.labels[:2])


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_micro_batches_change_nothing_but_rounding(model, batch_size):
    """The range of similarities is the whole batch's, whatever the parts."""
    config = {"samples": 5, "iters": 3, "seed": 4, "precision": "float32"}
    preprocessing = Preprocessing.of(model)
    reports = []
    for size in (5, batch_size):
        run = Synthesis(model, SynthesisConfig(batch_size=size, **config), preprocessing)
        reports.append([])
        run.run(reports[-1].append)
    for whole, parts in zip(*reports, strict=True):
        assert parts.entropy == pytest.approx(whole.entropy, rel=1e-3)
        assert parts.onehot == pytest.approx(whole.onehot, rel=1e-3)
        assert parts.tv == pytest.approx(whole.tv, rel=1e-3)


def test_fused_and_reference_loss_give_the_same_images_over_20_steps(model):
    """At a tenth of the default rate: at the default, Adam's steps double any difference every few steps (docs/method.md)."""
    found = []
    for backend in (None, "reference"):
        with use_backend(backend):
            found.append(synthesize(model, 4, 20, seed=1, learning_rate=0.02, precision="float32"))
    assert float((found[0] - found[1]).abs().max()) < 1e-3
    assert float((found[0] - found[1]).abs().mean()) < 1e-5
    assert float((found[0] - synthesize(model, 4, 1, seed=1, learning_rate=0.02)).abs().mean()) > 1e-2  # they moved


def test_bfloat16_follows_float32(model):
    """At a low rate the two stay close; the pixels themselves are always float32."""
    found = [synthesize(model, 4, 10, precision=p, learning_rate=0.02) for p in ("float32", "bfloat16")]
    assert found[1].dtype == torch.float32
    moved = (found[0] - synthesize(model, 4, 1, learning_rate=0.02)).abs().mean()
    assert float((found[0] - found[1]).abs().mean()) < 0.5 * float(moved)
    assert not torch.equal(*found)


def test_the_machine_chooses_the_precision(model, monkeypatch):
    """bfloat16 on a CPU that multiplies it; float32 elsewhere, and where the user's own loss or network takes part."""
    made = {p: synthesize(model, 2, 2, precision=p) for p in ("float32", "bfloat16")}
    for able, name in ((True, "bfloat16"), (False, "float32")):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda able=able: {"avx512_bf16": able})
        assert torch.equal(synthesize(model, 2, 2), made[name])
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True})
    assert torch.equal(synthesize(model, 2, 2), made["bfloat16"])
    kinds = []
    synthesize(model, 2, 2, objective=lambda logits: (kinds.append(logits.dtype), logits.float().square().mean())[1])
    assert set(kinds) == {torch.float32}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_graph_of_the_step_gives_what_eager_steps_give(model):
    config = SynthesisConfig(samples=4, iters=12, seed=2)
    run = Synthesis(model.cuda(), config, Preprocessing.of(model))
    reports = []
    found = run.run(reports.append)
    eager = Step(model, config, Preprocessing.of(model))
    for _ in range(config.iters):
        eager._compute()
    assert torch.allclose(found, eager.images, atol=1e-4)
    assert [r.step for r in reports][-1] == config.iters
    assert torch.allclose(run.advance.terms, eager.terms, rtol=1e-3)


def test_pixels_are_valid_and_the_model_is_left_as_it_was(model):
    model.train()
    preprocessing = Preprocessing.of(model)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    images = synthesize(model, 2, 3, learning_rate=5.0)
    low, high = preprocessing.channel_bounds()
    assert bool(((images >= low) & (images <= high)).all())
    assert model.training
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_the_loss_falls(model):
    losses = []
    synthesize(model, 4, 40, schedule="fixed", jitter=0.0, report=lambda p: losses.append(p.entropy + p.onehot + p.tv))
    assert np.mean(losses[-5:]) < np.mean(losses[:5])


def test_other_channel_counts_and_sizes(seed):
    images = synthesize(small_vit(in_chans=1, img_size=(24, 40)), 2, 2)
    assert images.shape == (2, 1, 24, 40)


@pytest.mark.parametrize("stop_at", [1, 3])
def test_resumed_run_gives_the_same_bits(model, tmp_path, stop_at):
    config, preprocessing = SynthesisConfig(samples=2, iters=6, seed=3), Preprocessing.of(model)
    whole = Synthesis(model, config, preprocessing).run()
    snapshot = tmp_path / "s.safetensors"

    def interrupt(progress):
        if progress.step == stop_at:
            raise KeyboardInterrupt

    first = Synthesis(model, config, preprocessing, snapshot)
    with pytest.raises(KeyboardInterrupt):
        first.run(interrupt)
    second = Synthesis(model, config, preprocessing, snapshot)
    assert second.resume()
    assert second.step == stop_at
    assert torch.equal(second.run(), whole)
    assert list(tmp_path.iterdir()) == [snapshot]


@pytest.fixture
def ctrl_c():
    """Ctrl-C as at a terminal: a background shell's children ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_at_any_line_of_a_step_resumes_to_the_same_bits(model, seed, tmp_path):
    """A signal at each line of the loop and of the step that Python runs during the second step, one run for each.

    At each with the ViT, at every fourth from a random one with the others: these lines are no model's.
    """
    config, preprocessing = SynthesisConfig(samples=2, iters=3, seed=4, precision="bfloat16"), Preprocessing.of(model)
    whole = Synthesis(model, config, preprocessing).run()
    snapshot = tmp_path / "s.safetensors"
    files = (loop.__file__, step.__file__, interruption.__file__, autocast_mode.__file__)

    def interrupted_at(line: int) -> bool:
        """Whether the second step has that many lines; the run is interrupted there."""
        run, seen = Synthesis(model, config, preprocessing, snapshot), 0

        def trace(frame, event, _):
            nonlocal seen
            if event == "call":
                return trace if frame.f_code.co_filename in files else None
            if event == "line" and run.step == 1:
                seen += 1
                if seen == line:
                    signal.raise_signal(signal.SIGINT)
            return trace

        before = sys.gettrace()
        sys.settrace(trace)
        try:
            run.run()
        except KeyboardInterrupt:
            return True
        finally:
            sys.settrace(before)
        return False

    line, stride = (1, 1) if type(model) is VisionTransformer else (1 + seed % 4, 4)
    while interrupted_at(line):
        assert not torch.is_autocast_enabled("cpu")
        second = Synthesis(model, config, preprocessing, snapshot)
        assert second.resume()
        assert torch.equal(second.run(), whole), f"interrupted at line event {line}"
        line += stride
    assert line > 40


@pytest.mark.usefixtures("ctrl_c")
def test_a_held_signal_comes_when_the_block_is_done():
    done = []

    def block():
        with interruption.uninterrupted():
            signal.raise_signal(signal.SIGINT)
            done.append(1)

    with pytest.raises(KeyboardInterrupt):
        block()
    assert done == [1]
    with ThreadPoolExecutor(1) as pool:  # where no signal can be held
        assert pool.submit(lambda: interruption.uninterrupted().__enter__()).result() is None


@pytest.mark.usefixtures("ctrl_c")
def test_a_signal_while_the_snapshot_is_written_waits_for_it(model, tmp_path, monkeypatch):
    """Found by CI: torchrun's SIGTERM came while a process that missed another wrote its snapshot, and there was none."""
    write = loop.write_tensors
    snapshot = tmp_path / "s.safetensors"
    run = Synthesis(model, SynthesisConfig(samples=2, iters=3, seed=4), Preprocessing.of(model), snapshot)

    def pressed_again(*arguments):
        signal.raise_signal(signal.SIGINT)
        write(*arguments)

    def pressed(_):
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(loop, "write_tensors", pressed_again)
    with pytest.raises(KeyboardInterrupt):
        run.run(pressed)
    monkeypatch.undo()
    again = Synthesis(model, run.config, run.preprocessing, snapshot)
    assert again.resume()
    assert again.step == 1


def test_a_snapshot_of_another_run_is_refused(model, tmp_path):
    snapshot, preprocessing = tmp_path / "s.safetensors", Preprocessing.of(model)
    Synthesis(model, SynthesisConfig(samples=2, iters=6), preprocessing, snapshot).save_snapshot()
    for other in (SynthesisConfig(samples=2, iters=7), SynthesisConfig(samples=2, iters=6, seed=1)):
        with pytest.raises(DfqvitError, match="is of another model or other settings"):
            Synthesis(model, other, preprocessing, snapshot).resume()
    channels = len(preprocessing.mean)
    for change in ({"mean": (0.4,) * channels}, {"std": (0.3,) * channels}, {"input_size": (channels, 48, 48)}):
        with pytest.raises(DfqvitError, match="is of another model or other settings"):
            Synthesis(model, SynthesisConfig(samples=2, iters=6), replace(preprocessing, **change), snapshot).resume()
    snapshot.write_bytes(snapshot.read_bytes()[:100])
    with pytest.raises(DfqvitError, match="could not be read"):
        Synthesis(model, SynthesisConfig(samples=2, iters=6), preprocessing, snapshot).resume()


@pytest.mark.parametrize("other", ["heads", "activation", "rows"])
def test_a_snapshot_of_another_structure_is_refused(seed, tmp_path, other):
    """Found by reading: weights were summed and structures not looked at, so a run went on with the images of another model."""
    model, config = small_vit(depth=1), SynthesisConfig(samples=2, iters=6)
    snapshot, preprocessing = tmp_path / "s.safetensors", Preprocessing.of(model)
    Synthesis(model, config, preprocessing, snapshot).save_snapshot()
    twin = small_vit(depth=1, **{"heads": {"num_heads": 6}, "activation": {"act_layer": "relu"}}.get(other, {}))
    twin.load_state_dict(model.state_dict())
    assert Synthesis(copy.deepcopy(model), config, preprocessing, snapshot).resume()
    if other == "rows":  # the same sum
        twin.head.weight.data = twin.head.weight.data.flip(0)
    with pytest.raises(DfqvitError, match="is of another model or other settings"):
        Synthesis(twin, config, preprocessing, snapshot).resume()


def test_a_full_disk_names_the_snapshot(model, tmp_path, monkeypatch):
    def full(*_):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    run = Synthesis(model, SynthesisConfig(samples=2, iters=6), Preprocessing.of(model), tmp_path / "s.safetensors")
    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(OSError, match="No space left on device") as told:
        run.save_snapshot()
    assert told.value.filename == str(tmp_path / "s.safetensors")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(safetensors.torch, "save_file", lambda *_: full_of_other())
    with pytest.raises(OSError, match=r"s.safetensors' could not be written: strange"):
        run.save_snapshot()


def test_an_interruption_with_a_full_disk_is_an_interruption(model, tmp_path, monkeypatch):
    """Found by reading: the command ended with status 1 and the disk's error, as though nobody had pressed Ctrl-C."""

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def interrupt(_):
        raise KeyboardInterrupt

    snapshot = tmp_path / "s.safetensors"
    run = Synthesis(model, SynthesisConfig(samples=2, iters=6), Preprocessing.of(model), snapshot)
    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with (
        pytest.raises(KeyboardInterrupt),
        pytest.warns(UserWarning, match="could not be written .No space left on device"),
    ):
        run.run(interrupt)
    assert list(tmp_path.iterdir()) == []


def full_of_other():
    raise SafetensorError("strange")


def test_compat_is_told_where_it_changes_nothing():
    for network, told in ((small_vit(), True), (small_swin(), False), (nn.Sequential(small_swin()), False)):
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            Step(network, SynthesisConfig(samples=1, iters=1, compat="psaq"), Preprocessing.of(network))
        said = [each for each in found if "compat was 'psaq' and the model a VisionTransformer" in str(each.message)]
        assert len(said) == told


def test_frames_show_the_curriculum(model):
    run = Synthesis(model, SynthesisConfig(samples=3, iters=20), Preprocessing.of(model))
    run.run()
    assert sorted(run.frames) == [0, 2, 5, 10, 15, 20]
    assert torch.equal(run.frames[20], run.images)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"samples": 0}, "samples was 0; it must be at least 1"),
        ({"iters": 0}, "iters was 0"),
        ({"schedule": "hard"}, "schedule was 'hard'; it may be 'e2h', 'fixed', 'hard-to-easy'"),
        ({"crop_lower": 0.0}, "crop bounds were 0.0 and 1.0"),
        ({"crop_lower": 0.5, "crop_upper": 0.4}, "crop bounds were 0.5 and 0.4"),
        ({"schedule": "fixed", "crop_lower": 0.5}, "crop_lower was 0.5 and schedule 'fixed'"),
        ({"schedule": "fixed", "crop_upper": 0.0}, "crop bounds were 0.08 and 0.0"),
        ({"learning_rate": 0.0}, "learning_rate was 0.0"),
        ({"batch_size": 0}, "batch_size was 0; it must be at least 1"),
        ({"precision": "float16"}, "precision was 'float16'; it may be 'auto', 'float32' or 'bfloat16'"),
        ({"compat": "x"}, "compat was 'x'"),
        ({"lerning_rate": 0.1}, "synthesize has no setting 'lerning_rate'; did you mean 'learning_rate'?"),
        ({"learning_rate": math.inf}, "learning_rate was inf; it must be a finite number"),
        ({"learning_rate": "0.2"}, "learning_rate was '0.2'; it must be a finite number"),
        ({"crop_lower": math.nan}, "crop_lower was nan; it must be a finite number"),
        ({"tv_weight": None}, "tv_weight was None; it must be a finite number"),
        ({"warmup": 2}, "warmup was 2; it is a share, from 0 to 1"),
        ({"warmup": -1}, "warmup was -1; it is a share, from 0 to 1"),
        ({"jitter": 2}, "jitter was 2; it is a share, from 0 to 1"),
        ({"jitter": -1}, "jitter was -1; it is a share, from 0 to 1"),
        ({"bandwidth": 0.0}, "bandwidth was 0.0; it must be greater than 0"),
        ({"points": 1}, "points was 1; it must be at least 2"),
        ({"samples": "16"}, "samples was '16'; it must be a whole number, 1 or more"),
        ({"samples": 2.5}, "samples was 2.5; it must be a whole number, 1 or more"),
        ({"seed": "0"}, "seed was '0'; it must be a whole number from 0 to"),
        ({"seed": None}, "seed was None; it must be a whole number from 0 to"),
        ({"seed": -1}, "seed was -1; it must be a whole number from 0 to"),
        (
            {"preprocessing": "imagenet"},
            "preprocessing was 'imagenet'; it may be a dfqvit.models.Preprocessing, or None",
        ),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(UsageError, match=message):
        synthesize(small_vit(), **settings)


def test_fixed_crops_have_one_bound():
    """A least area of 0.08 by default refused them where they were smaller."""
    for bounds in ({"crop_upper": 0.05}, {"crop_lower": 0.3, "crop_upper": 0.3}):
        assert SynthesisConfig(schedule="fixed", **bounds).crop_upper == bounds["crop_upper"]


def test_bad_models(seed):
    model = small_vit()
    model.norm.weight.data[0] = float("nan")
    with pytest.raises(DfqvitError, match=r"'norm.weight' holds NaN or Inf"):
        synthesize(model)


def test_without_a_classifier_the_class_term_is_left_out(seed):
    model, terms = small_vit(num_classes=0), []
    images = synthesize(model, samples=3, iters=4, report=lambda progress: terms.append(progress))
    assert torch.isfinite(images).all()
    assert all(progress.onehot == 0 and progress.entropy != 0 for progress in terms)
    assert not torch.equal(images[0], images[1])


@pytest.mark.parametrize("pool", ["", "avg"])
def test_a_model_that_classifies_every_token_is_synthesized_for(seed, pool):
    """Its cross-entropy is the mean of its tokens'."""
    model = small_vit(global_pool=pool)
    assert torch.isfinite(synthesize(model, samples=2, iters=2)).all()
    logits, labels = torch.randn(3, 5, 7), torch.tensor([1, 0, 6])
    expected = -logits.log_softmax(-1)[torch.arange(3), :, labels].mean()
    assert torch.allclose(onehot_loss(logits, labels), expected)
    assert torch.allclose(onehot_loss(logits[:, 0], labels), torch.nn.functional.cross_entropy(logits[:, 0], labels))
