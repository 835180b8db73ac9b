"""What a prepared call is made from: freed with its model, looked at anew where it changes, not kept where it cannot be watched."""

from __future__ import annotations

import copy
import gc
import pickle
import warnings
import weakref

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import dfqvit
from dfqvit.kernels import extension
from dfqvit.models import Preprocessing
from dfqvit.runtime import set_runtime

from ..conftest import small_swin, small_vit
from .test_families import ROTARY, make
from .test_replaced import lively

pytestmark = pytest.mark.skipif(not extension.supports_cpu()[0], reason="dfqvit._C is not built")
MADE = {"vit": small_vit, "swin": small_swin}
NAMES = ["vit", "swin", "swinv2", "convnext", "eva02"]


def quantized(name, runtime="integer", **settings):
    model = MADE[name]() if name in MADE else make(name)
    size = (3, 64, 64) if name == "convnext" else Preprocessing.of(model).input_size
    x = torch.randn(2, *size)
    return dfqvit.quantize(
        model, 8, calib="procedural", samples=2, rounding="nearest", runtime=runtime, progress=False, **settings
    ), x


@pytest.mark.parametrize(("name", "runtime"), [*((name, "integer") for name in NAMES), ("vit", "simulated")])
@torch.no_grad()
def test_a_model_that_was_called_is_freed(seed, name, runtime):
    gc.freeze()  # the collector looks through what is made from here on, not through a whole process's millions of objects
    qmodel, x = quantized(name, runtime)
    qmodel(x)
    alive = [weakref.ref(module) for module in qmodel.modules()]
    del qmodel
    gc.collect()
    gc.unfreeze()
    assert not [reference() for reference in alive if reference() is not None]


class Times(nn.Module):
    """A parametrization with a setting of its own."""

    def __init__(self):
        super().__init__()
        self.factor = 1.0

    def forward(self, x):
        return x * self.factor


PARAMETRIZED = {
    "vit": lambda model: (model.head, "bias"),
    "swin": lambda model: (model.layers[0].blocks[0].attn, "relative_position_bias_table"),
    "swinv2": lambda model: (model.layers[0].blocks[0].attn, "logit_scale"),
    "convnext": lambda model: (model.stages[0].blocks[0], "gamma"),
    "eva02": lambda model: (model.blocks[0].norm1, "bias"),
}


def apart(found, wanted):
    """A block with such a tensor may run as simulated, which rounds a little otherwise."""
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("name", PARAMETRIZED)
@torch.no_grad()
def test_a_parametrized_tensor_is_looked_at_in_every_call(seed, name):
    qmodel, x = quantized(name)
    owner, tensor = PARAMETRIZED[name](qmodel)
    before = qmodel(x)
    rule = Times()
    parametrize.register_parametrization(owner, tensor, rule)
    qmodel.eval()
    kept = apart(qmodel(x), before)
    rule.factor = -3.0
    changed = qmodel(x)
    moved = apart(changed, before)
    assert kept < moved / 3
    parametrize.remove_parametrizations(owner, tensor)
    assert apart(qmodel(x), changed) < moved / 3
    getattr(owner, tensor).data.div_(-3)
    assert apart(qmodel(x), before) < moved / 3


WINDOWS = {
    "mask": lambda block: block.attn_mask is None or block.attn_mask.zero_(),
    "no mask": lambda block: setattr(block, "attn_mask", None),
    "shift": lambda block: setattr(block, "shift_size", (0, 0)),
    "index": lambda block: block.attn.relative_position_index.copy_(block.attn.relative_position_index.flip(0)),
}


@pytest.mark.parametrize("change", WINDOWS)
@pytest.mark.parametrize("name", ["swin", "swinv2"])
@torch.no_grad()
def test_windows_that_are_changed_count(seed, name, change):
    qmodel, x = quantized(name)
    before = qmodel(x)
    for block in (module for module in qmodel.modules() if hasattr(module, "shift_size")):
        WINDOWS[change](block)
    found = qmodel(x)
    assert torch.equal(found, qmodel(x))
    set_runtime(qmodel, "simulated")
    simulated = qmodel(x)
    assert apart(found, simulated) < apart(before, simulated) / 2


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_bytes_copied_into_the_tensors_of_a_state_dict_count(seed, name):
    """As averages of models made by hand do, and broadcasts from another process."""
    (one, x), (two, _) = quantized(name, scaling="none"), quantized(name, scaling="none")
    assert not torch.equal(one(x), two(x))
    state = two.state_dict()
    for key, tensor in one.state_dict().items():
        tensor.copy_(state[key])
    assert torch.equal(one(x), two(x))


@pytest.mark.parametrize("buffers", [False, True])
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_averages_of_codes_are_told(seed, name, buffers):
    """torch makes those of bytes by cutting: of a model and itself, each code one less, the logits were 48 % off."""
    qmodel, x = quantized(name)
    averaged = AveragedModel(qmodel, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=buffers)
    for _ in range(3):
        averaged.update_parameters(qmodel)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        found = averaged(x)
    assert any("averages (an EMA's, AveragedModel's with use_buffers)" in str(each.message) for each in told) == buffers
    assert buffers or apart(found, qmodel(x)) < 1e-4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_a_state_of_another_dtype_is_loaded_in_the_models_own(seed, name, dtype):
    """With `assign` too, where torch puts tensors in their place as they come: "mixed dtype (CPU)"."""
    qmodel, x = quantized(name)
    state = {
        key: tensor.to(dtype) if tensor.is_floating_point() else tensor for key, tensor in qmodel.state_dict().items()
    }
    other = copy.deepcopy(qmodel)
    other.load_state_dict(state)
    qmodel.load_state_dict(state, assign=True)
    assert torch.equal(qmodel(x), other(x))


@torch.no_grad()
def test_loading_into_shared_memory_is_told(seed):
    """Another process prepared its calls from the packed weights of before, and cannot see that these were written to."""
    qmodel, x = quantized(NAMES[0])
    before, state = qmodel(x), copy.deepcopy(qmodel.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        qmodel.load_state_dict(state)
        qmodel.share_memory()
    assert torch.equal(qmodel(x), before)
    with pytest.warns(UserWarning, match="in shared memory, and is loaded into: other processes that hold it go on"):
        qmodel.load_state_dict(state)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_tensors_can_be_swapped_after_a_call(seed, name):
    """By torch's own option, under which nothing else may hold them."""
    qmodel, x = quantized(name)
    expected = qmodel(x)
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        qmodel.load_state_dict({key: torch.clone(value) for key, value in qmodel.state_dict().items()})
        assert torch.equal(qmodel(x), expected)
        assert torch.equal(qmodel.half()(x), expected)
        assert torch.equal(qmodel.share_memory()(x), expected)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


@pytest.mark.parametrize("runtime", ["integer", "simulated"])
@pytest.mark.parametrize(
    ("place", "way"),
    [
        ("blocks.1.attn.qkv", "register_forward_hook"),
        ("blocks.1.norm1", "register_forward_hook"),
        ("blocks.1.attn.proj", "register_forward_pre_hook"),
    ],
)
def test_hooks_on_what_is_scaled_are_told(seed, tmp_path, place, way, runtime):
    """Keys of the last block, as detectors of objects take them, and Grad-CAM's norm: their similarities were 40 % off."""
    model, images = lively("vit_tiny_patch16_224", ROTARY), torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        model.blocks[1].norm1.weight[:3] *= 20  # channels that are brought in
        model.blocks[1].attn.qkv.weight[:, :3] /= 20

    def seen(each):
        kept = []
        hook = getattr(each.get_submodule(place), way)(lambda module, given, *found: kept.append((*found, *given)[0]))
        with torch.no_grad(), warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            each(images)
        hook.remove()
        return kept[0], [str(each.message) for each in told if "a forward hook on" in str(each.message)]

    wanted, _ = seen(model)
    options = {"calib": images, "rounding": "nearest", "runtime": runtime, "progress": False}
    plain = dfqvit.quantize(model, 8, scaling="none", **options)
    found, told = seen(plain)
    assert float((found - wanted).norm() / wanted.norm()) < 0.25
    assert not told
    scaled = dfqvit.quantize(model, 8, **options)
    loaded = dfqvit.load(dfqvit.save(scaled, tmp_path / "q.safetensors"), runtime=runtime)
    for each in (scaled, loaded, copy.deepcopy(scaled), pickle.loads(pickle.dumps(scaled))):
        each(images)
        found, told = seen(each)
        assert float((found - wanted).norm() / wanted.norm()) > 0.35
        assert len(told) == 1
        assert told[0].startswith(f"a forward hook on '{place}' may see other values than in the float model")
        hook = each.blocks[1].mlp.register_forward_hook(lambda *_: None)  # which is as in the float model
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            each(images)
        hook.remove()


class Adapted(nn.Module):
    """A layer with an adapter of low rank beside it, as LoRA has it."""

    def __init__(self, layer):
        super().__init__()
        self.layer, generator = layer, torch.Generator().manual_seed(layer.in_features)
        self.down = 0.3 * torch.randn(4, layer.in_features, generator=generator)
        self.up = 0.3 * torch.randn(layer.out_features, 4, generator=generator)

    def forward(self, x):
        return self.layer(x) + x @ self.down.T @ self.up.T


@pytest.mark.parametrize("called", [True, False])
@pytest.mark.parametrize(
    ("part", "way"),
    [("attn.qkv", "adapted"), ("attn.proj", "adapted"), ("mlp.fc1", "adapted"), ("norm1", "float"), ("attn.qkv", "W4")],
)
@torch.no_grad()
def test_parts_put_where_values_are_scaled_are_told(seed, part, way, called):
    """LoRA that was trained around layers of the float model (logits were 90 % off), its norms, layers of other bits."""
    model, images = lively("vit_tiny_patch16_224", ROTARY), torch.randn(3, 3, 32, 32)
    fewer = dfqvit.quantize(model, 4, calib=images, rounding="nearest", progress=False)

    def other(qmodel, layer, name):
        return Adapted(layer) if way == "adapted" else (model if way == "float" else fewer).get_submodule(name)

    parent, _, name = f"blocks.1.{part}".rpartition(".")

    def said_by(qmodel):
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            qmodel(images)
        return [str(each.message).partition(" may see other values")[0] for each in told]

    for scaling in ("channels", "none"):
        qmodel = dfqvit.quantize(model, 8, calib=images, scaling=scaling, rounding="nearest", progress=False)
        if called:
            assert not said_by(qmodel)
        holder = qmodel.get_submodule(parent)
        layer = getattr(holder, name)
        setattr(holder, name, other(qmodel, layer, f"blocks.1.{part}"))
        expected = [f"what stands in the place of 'blocks.1.{part}'"] if scaling == "channels" else []
        assert (
            said_by(qmodel) == said_by(copy.deepcopy(qmodel)) == said_by(pickle.loads(pickle.dumps(qmodel))) == expected
        )
        setattr(holder, name, layer)
        del qmodel.blocks[0]
        assert not said_by(qmodel)
