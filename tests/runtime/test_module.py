"""The integer model is an ordinary module: what one may do to a module, and what then comes out. The oracle is the model as
it is made afresh in the same state."""

from __future__ import annotations

import copy
import io
import itertools
import pickle

import pytest
import torch
from timm.layers import GluMlp, LayerNorm
from timm.models.vision_transformer import ResPostBlock
from torch import nn

import dfqvit
from dfqvit.calibration import calibrate, convert
from dfqvit.calibration.correction import add_corrections
from dfqvit.errors import UsageError
from dfqvit.models.adapters import find_adapter
from dfqvit.quantization.model import BITS
from dfqvit.quantization.recipe import Recipe
from dfqvit.runtime import accelerate
from dfqvit.runtime.block import IntegerBlock

from ..conftest import MODELS, small_swin, small_vit
from .test_blocks import close, quantized

# Two blocks of equal width each, and a Swin's second stage: every kind of tensor, without doing the same once more.
FEW = {"vit": {"depth": 2}, "distilled": {"depth": 2}, "swin": {"depths": (2, 1)}}


@pytest.fixture(params=list(MODELS))
def model(request, seed):
    return MODELS[request.param](**FEW[request.param])


@pytest.fixture
def integer(model):
    """(a model in integers that has been called, images)."""
    qmodel, images = quantized(model, 4, acm="sequential")
    accelerate(qmodel)
    with torch.no_grad():
        qmodel(images)
    return qmodel, images


def afresh(qmodel):
    """A copy that has prepared nothing yet."""
    return copy.deepcopy(qmodel)


def of_the_same_tensors(qmodel):
    """A copy that has prepared nothing yet, to be called alone: copies of tensors, and of tables of no hooks, take longest."""
    tables = (
        each for module in qmodel.modules() for each in vars(module).values() if isinstance(each, dict) and not each
    )
    kept = itertools.chain(qmodel.parameters(), qmodel.buffers(), tables)
    return copy.deepcopy(qmodel, {id(each): each for each in kept})


def blocks(qmodel):
    return [block for block in qmodel.modules() if isinstance(block, IntegerBlock)]


# ------------------------------------------------------------------ copies


def test_pickle_save_and_deepcopy_give_the_same_bits(model, tmp_path):
    """Before a call and after one."""
    qmodel, images = quantized(model, 4, acm="sequential")
    accelerate(qmodel)
    expected, size = copy.deepcopy(qmodel)(images), len(pickle.dumps(qmodel))
    for _ in ("before", "after"):
        torch.save(qmodel, tmp_path / "m.pt")
        copies = [
            pickle.loads(pickle.dumps(qmodel)),
            copy.deepcopy(qmodel),
            torch.load(tmp_path / "m.pt", weights_only=False),
        ]
        for found in copies:
            assert type(found) is type(qmodel)
            assert torch.equal(found(images), expected)
        qmodel(images)
    assert len(pickle.dumps(qmodel)) == size  # what was prepared stays here


def _call(models, queue):
    with torch.no_grad():
        queue.put([model(images).tolist() for model, images in models])


def test_a_spawned_process_gets_the_models(seed):
    """One of each family, to one process."""
    models = [quantized(make(), 4, acm="sequential") for make in MODELS.values()]
    for qmodel, images in models:
        accelerate(qmodel)
        with torch.no_grad():
            qmodel(images)
    context = torch.multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_call, args=(models, queue))
    process.start()
    found = queue.get(timeout=900)
    process.join()
    for (qmodel, images), theirs in zip(models, found, strict=True):
        # threads, and so nothing else, may differ
        assert torch.allclose(torch.tensor(theirs), qmodel(images), atol=0.05)


# ------------------------------------------------------------------ changes after a call


def test_every_tensor_that_is_loaded_after_a_call_counts(integer):
    """One key at a time: the logits are those of a model that was loaded before its first call."""
    qmodel, images = integer[0], integer[1][:1]
    before = {key: value.clone() for key, value in qmodel.state_dict().items() if key != BITS}
    changed = 0
    for key, value in before.items():
        if "weight_packed" in key:
            other = torch.randint_like(value, 0, 256)
        elif key.endswith("zero_point"):
            other = (value + 3).clamp(0, 255)
        else:
            other = value * 1.25 + (0.0 if "scale" in key else 0.05)
        qmodel.load_state_dict({key: other}, strict=False)
        found = qmodel(images)
        assert torch.equal(found, of_the_same_tensors(qmodel)(images)), key
        qmodel.load_state_dict({key: value}, strict=False)
        changed += not torch.equal(found, qmodel(images))
    assert changed >= 0.7 * len(before)  # a zero point moves nothing but the ends of its range


@pytest.mark.parametrize(
    ("other", "said"), [({"a_bits": 4}, "bits 4; here it has 8"), ({"softmax_bits": 5}, "steps 31; here it has 255")]
)
def test_a_state_of_other_bits_is_refused(seed, other, said):
    """Scales of 4 bits beside codes of 8: logits 20 % off those of either model."""
    model, calib = small_vit(depth=1), torch.rand(4, 3, 32, 32) * 2 - 1
    options = {"calib": calib, "rounding": "nearest", "scaling": "none", "progress": False}
    qmodel = dfqvit.quantize(model, 8, **options)
    expected, file = qmodel(calib), io.BytesIO()
    torch.save(dfqvit.quantize(model, 8, **options, **other).state_dict(), file)
    file.seek(0)
    with pytest.raises(RuntimeError, match=rf"'blocks\.0\.attn\.operands.*' was quantized with {said}"):
        copy.deepcopy(qmodel).load_state_dict(torch.load(file, weights_only=True))
    # as a file of tensors alone
    tensors = dict(torch.nn.Sequential(dfqvit.quantize(model, 8, **options, **other)).state_dict())
    with pytest.raises(RuntimeError, match=rf"'0\.blocks\.0\.attn\.operands.*' was quantized with {said}"):
        torch.nn.Sequential(copy.deepcopy(qmodel)).load_state_dict(tensors)
    again = dfqvit.quantize(model, 8, **options)
    again.load_state_dict(dict(qmodel.state_dict()))
    assert torch.equal(again(calib), expected)
    # of an earlier dfqvit
    again.load_state_dict({key: value for key, value in qmodel.state_dict().items() if key != BITS})
    assert torch.equal(again(calib), expected)


@pytest.mark.parametrize("of", ["the model", "a part"])
def test_the_state_of_a_float_model_is_refused(model, of):
    """With strict=False its norms and biases would count beside packed weights that were scaled: logits 50 % off."""
    integer, images = quantized(model, 4)
    accelerate(integer)
    expected = integer(images)
    holder, floats = (
        (integer, model) if of == "the model" else (find_adapter(each).blocks()[0] for each in (integer, model))
    )
    with pytest.raises(
        RuntimeError, match=r"the state_dict holds '\S+\.weight', of a float model.*: quantize the float model"
    ):
        copy.deepcopy(holder).load_state_dict(floats.state_dict(), strict=False)
    holder.load_state_dict({key: value for key, value in holder.state_dict().items() if "bias" in key}, strict=False)
    assert torch.equal(integer(images), expected)


def small_tensors(qmodel):
    for name, tensor in itertools.chain(qmodel.named_parameters(), qmodel.named_buffers()):
        if tensor.is_floating_point() and tensor.numel() and "window_" not in name and "attn_mask" not in name:
            yield name, tensor


def test_tensors_that_are_written_in_place_count(integer):
    qmodel, images = integer[0], integer[1][:1]
    expected = afresh(qmodel)(images)
    for name, tensor in small_tensors(qmodel):
        before = tensor.clone()
        with torch.no_grad():
            tensor.mul_(1.25) if "zero_point" not in name else tensor.add_(3).clamp_(max=255)
        assert torch.equal(qmodel(images), of_the_same_tensors(qmodel)(images)), name
        tensor.data = before  # another way to write
        assert torch.equal(qmodel(images), expected), name


def test_a_forward_given_to_an_instance_counts(integer):
    qmodel, images = integer
    before = qmodel(images)
    for place in ("norm2", "mlp.fc1", "attn.proj"):
        part = blocks(qmodel)[0].get_submodule(place)
        part.forward = lambda x, computes=part.forward: 2 * computes(x)
        changed = qmodel(images)
        assert not torch.equal(changed, before), place
        assert torch.equal(changed, afresh(qmodel)(images)), place
        del part.forward
        assert torch.equal(qmodel(images), before), place


def test_replaced_parameters_and_submodules_count(integer):
    qmodel, images = integer
    block = blocks(qmodel)[0]
    channels = block.norm1.weight.numel()
    changes = {
        "parameter": lambda: setattr(
            block.norm1, "weight", nn.Parameter(torch.rand(channels) + 0.5, requires_grad=False)
        ),
        "bias": lambda: setattr(block.mlp.fc2, "bias", nn.Parameter(torch.randn(channels), requires_grad=False)),
        "packed": lambda: setattr(block.attn.qkv, "weight_packed", block.attn.qkv.weight_packed.flip(0).contiguous()),
        "acm": lambda: setattr(block.mlp.fc2, "acm", None),
        "norm": lambda: setattr(block, "norm2", LayerNorm(channels, eps=0.1).requires_grad_(False)),
        "eps": lambda: setattr(block.norm2, "eps", 0.5),
        "mlp": lambda: setattr(block, "mlp", copy.deepcopy(blocks(qmodel)[1].mlp)),
        "activation": lambda: setattr(block.mlp, "act", nn.GELU(approximate="tanh")),
        "another activation": lambda: setattr(block.mlp, "act", nn.ReLU()),
    }
    before = qmodel(images)
    for name, change in changes.items():
        change()
        found = qmodel(images)
        assert torch.equal(found, afresh(qmodel)(images)), name
        assert not torch.equal(found, before), name
        before = found
    assert (
        dfqvit.integer_report(qmodel)[next(n for n, b in qmodel.named_modules() if b is block)]
        == "its activation is ReLU"
    )


def test_swin_follows_set_input_size_and_its_bias_table(seed):
    qmodel, images = quantized(small_swin())
    accelerate(qmodel)
    qmodel(images)
    qmodel.set_input_size((64, 64), window_size=8)
    x = torch.randn(2, 3, 64, 64)
    found = qmodel(x)
    assert torch.equal(found, afresh(qmodel)(x))
    simulated = afresh(qmodel)
    with torch.enable_grad():
        assert close(found, simulated(x.requires_grad_()).detach())


# ------------------------------------------------------------------ modes, gradients, hooks


def simulated_twin(qmodel):
    """The same model, layer by layer."""
    twin = copy.deepcopy(qmodel)
    for block in blocks(twin):
        block.__class__ = block.family
    return twin


def test_gradients_are_those_of_the_simulated_model(integer):
    qmodel, images = integer
    twin = simulated_twin(qmodel)
    prompts = [torch.zeros_like(images[:1], requires_grad=True) for _ in range(2)]
    for model, prompt in zip((qmodel, twin), prompts, strict=True):
        model(images + prompt).square().mean().backward()
    assert float(prompts[0].grad.abs().sum()) > 0
    assert torch.equal(prompts[0].grad, prompts[1].grad)


def test_a_parameter_inside_that_wants_a_gradient_gets_it(integer):
    qmodel, images = integer
    weight = blocks(qmodel)[0].norm1.weight.requires_grad_()
    qmodel(images).square().mean().backward()
    twin = simulated_twin(qmodel)
    twin.zero_grad()
    twin(images).square().mean().backward()
    assert torch.equal(weight.grad, blocks_like(twin, qmodel).norm1.weight.grad)


def blocks_like(twin, qmodel):
    name = next(name for name, module in qmodel.named_modules() if isinstance(module, IntegerBlock))
    return twin.get_submodule(name)


def test_without_a_gradient_the_block_runs_in_integers(integer):
    qmodel, images = integer
    wanted = images.clone().requires_grad_()
    with torch.no_grad():
        assert torch.equal(qmodel(wanted), qmodel(images))
    assert not qmodel(images).requires_grad


def test_functorch_transforms_see_the_model_or_say_why_not(integer):
    qmodel, images = integer
    found = torch.func.grad(lambda x: qmodel(x).square().mean())(images)
    wanted = images.clone().requires_grad_()
    qmodel(wanted).square().mean().backward()
    assert torch.allclose(found, wanted.grad, atol=1e-6)


def test_vmap_gives_what_each_call_gives(integer):
    """torch said "Batching rule not implemented" of the blocks."""
    qmodel, images = integer
    with torch.no_grad():
        expected = qmodel(images)
        assert torch.equal(torch.func.vmap(lambda x: qmodel(x[None])[0])(images), expected)
        found = torch.func.vmap(torch.func.vmap(qmodel), in_dims=1, out_dims=1)(images[:, None, None])
        assert torch.equal(found[:, 0, 0], expected)


def test_gradients_of_each_image_and_of_each_logit(integer):
    qmodel, images = integer
    found = torch.func.vmap(torch.func.grad(lambda x: qmodel(x[None]).square().sum()))(images)
    wanted = images.clone().requires_grad_()
    qmodel(wanted).square().sum().backward()
    assert torch.allclose(found, wanted.grad, atol=1e-5)
    logits = qmodel(wanted)[0]
    rows = [torch.autograd.grad(logit, wanted, retain_graph=True)[0][0] for logit in logits]
    assert torch.allclose(torch.func.jacrev(lambda x: qmodel(x[None])[0])(images[0]), torch.stack(rows), atol=1e-5)
    with pytest.raises(ValueError, match=r"a batch of gradients at once .*; use torch\.func\.jacrev"):
        torch.autograd.grad(qmodel(wanted)[0], wanted, torch.eye(len(logits)), is_grads_batched=True)


def test_an_ensemble_of_models_is_called_at_once(integer):
    """The packed weights are a batch then: what a layer prepares is of one.

    Norms of a batch of weights are computed without them first, so their last bits differ, and a value may tip.
    """
    qmodel, images = integer
    other = copy.deepcopy(qmodel)
    other.load_state_dict(
        {name: value.flip(0) for name, value in qmodel.state_dict().items() if "fc1" in name}, strict=False
    )
    with torch.no_grad():
        expected = torch.stack([qmodel(images), other(images)])
        assert not close(*expected)
        state = torch.func.stack_module_state([qmodel, other])
        call = torch.func.vmap(lambda *each: torch.func.functional_call(qmodel, each, (images,)))
        assert all(close(*pair) for pair in zip(call(*state), expected, strict=True))
        assert torch.equal(qmodel(images), expected[0])


def test_functional_call_uses_what_it_is_given(integer):
    qmodel, images = integer
    name = next(name for name, module in qmodel.named_modules() if isinstance(module, IntegerBlock)) + ".norm1.weight"
    weight = qmodel.get_parameter(name) * 1.5
    found = torch.func.functional_call(qmodel, {name: weight}, (images,))
    expected = afresh(qmodel)
    expected.get_parameter(name).data.copy_(weight)
    assert torch.equal(found, expected(images))


def test_a_hook_inside_a_block_sees_its_layer(integer):
    qmodel, images = integer
    seen = []
    block = blocks(qmodel)[0]
    expected = qmodel(images)
    handle = block.mlp.fc1.register_forward_hook(lambda _, __, out: seen.append(out))
    hooked = qmodel(images)
    assert len(seen) == 1
    assert close(hooked, expected)
    handle.remove()
    assert torch.equal(qmodel(images), expected)
    assert len(seen) == 1


def test_dispatch_modes_see_one_operator_a_block(integer):
    qmodel, images = integer
    expected, seen = qmodel(images), []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func.name())
            return func(*args, **(kwargs or {}))

    with Watch():
        assert torch.equal(qmodel(images), expected)
    assert seen.count("dfqvit::quant_block") == len(blocks(qmodel))


def test_the_profiler_sees_the_blocks(integer):
    qmodel, images = integer
    with torch.profiler.profile() as profile, torch.no_grad():
        qmodel(images)
    counts = {event.key: event.count for event in profile.key_averages()}
    assert counts["dfqvit::quant_block"] == len(blocks(qmodel))


@pytest.mark.parametrize("loaded", [False, True])
def test_inference_mode(model, loaded, tmp_path):
    qmodel, images = quantized(model, 4, acm="sequential")
    accelerate(qmodel)
    expected = qmodel(images)
    with torch.inference_mode():
        if loaded:
            qmodel = pickle.loads(pickle.dumps(qmodel))
        assert torch.equal(qmodel(images), expected)
    assert torch.equal(qmodel(images), expected)


# ------------------------------------------------------------------ traces


def test_jit_trace_answers_as_the_model_for_other_batches(integer):
    qmodel, images = integer
    with torch.no_grad():
        traced = torch.jit.trace(qmodel, images)
    for batch in (1, 3, 6):
        x = torch.randn(batch, *images.shape[1:])
        assert torch.equal(traced(x), qmodel(x))
    assert "dfqvit::quant_block" in str(traced.inlined_graph)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize(
    ("kind", "make"),
    [
        ("sparse_coo", lambda images: images.to_sparse()),
        ("nested", lambda images: torch.nested.nested_tensor(list(images))),
        ("jagged", lambda images: torch.nested.nested_tensor(list(images), layout=torch.jagged)),
        ("_mkldnn", lambda images: images.to_mkldnn()),
    ],
)
def test_images_without_rows_are_refused(integer, kind, make):
    """torch said that it cannot access a storage."""
    qmodel, images = integer
    network = dfqvit.quantize(nn.Sequential(small_vit(depth=1)), 8, calib="noise", samples=2, rounding="nearest")
    for model in (qmodel, qmodel.forward_features, network):
        with pytest.raises(
            UsageError, match=f"images were a tensor of kind '{'nested' if kind == 'jagged' else kind}'"
        ):
            model(make(images))


def test_jit_script_is_refused(integer):
    with pytest.raises(UsageError, match=r"cannot be scripted \(torch.jit.script\); torch.jit.trace"):
        torch.jit.script(integer[0])


def test_make_fx_answers_as_the_model(integer):
    qmodel, images = integer
    with torch.no_grad():
        traced = torch.fx.experimental.proxy_tensor.make_fx(qmodel)(images)
    x = torch.randn_like(images)
    assert torch.equal(traced(x), qmodel(x))
    assert "dfqvit.quant_block" in traced.code


# ------------------------------------------------------------------ dtypes and the entry


def test_a_cast_changes_nothing(integer):
    qmodel, images = integer
    expected = qmodel(images)
    kept = {key: value.clone() for key, value in qmodel.state_dict().items()}
    for dtype, cast in ((torch.float16, "half"), (torch.bfloat16, "bfloat16"), (torch.float64, "double")):
        qmodel.to(dtype)
        getattr(qmodel, cast)()
        state = qmodel.state_dict()
        assert all(torch.equal(kept[key], state[key]) and state[key].dtype == kept[key].dtype for key in state), dtype
        found = qmodel(images.to(dtype))
        assert found.dtype == dtype
        assert torch.equal(found, qmodel(images.to(dtype).float()).to(dtype))
        assert torch.equal(qmodel(images), expected), dtype


@pytest.mark.parametrize("form", ["integer", "simulated"])
def test_images_that_cannot_be_normalised_are_refused(model, form):
    qmodel, images = quantized(model)
    if form == "integer":
        accelerate(qmodel)
    for run in (qmodel, qmodel.forward_features, qmodel.forward_intermediates):
        for dtype in (torch.uint8, torch.int64, torch.bool):
            with pytest.raises(UsageError, match=f"images had dtype {dtype}; they must be floats, normalised"):
                run(torch.ones_like(images).to(dtype))
        with pytest.raises(UsageError, match=r"images had shape \[16, 1, 32, 32\]; they must be \[B, 3, H, W\]"):
            run(images[:, :1])
        with pytest.raises(UsageError, match="images were a list"):
            run([images])


# ------------------------------------------------------------------ what is recognised


def variants():
    glu = {"mlp_layer": GluMlp, "act_layer": "gelu", "mlp_ratio": 4}
    return {
        "gated": (small_vit, glu),
        "post-norm": (small_vit, {"block_fn": ResPostBlock, "init_values": None}),
    }


@pytest.mark.parametrize("kind", ["gated", "post-norm"])
def test_a_block_of_another_kind_is_right(seed, kind):
    """Part by part; with a gated MLP as a whole, since the operator has gates."""
    make, options = variants()[kind]
    model = make(**options)
    qmodel, images = quantized(model, 8, acm="sequential")
    expected = qmodel(images)
    assert set(dfqvit.integer_report(qmodel).values()) != {""}  # as simulated
    assert accelerate(qmodel) == {}
    assert set(dfqvit.integer_report(qmodel).values()) == {""}
    assert bool(blocks(qmodel)) == (kind == "gated")
    assert close(qmodel(images), expected)
    many = torch.randn(64, 3, 32, 32)  # a few are too few to tell
    assert float((qmodel(many) - model(many)).norm() / model(many).norm()) < 0.1


def test_the_correction_of_a_post_norm_block_is_added_to_its_output(seed):
    """W2 makes a large shift; every block's mean output is float's on the images that it was learnt from."""
    model = small_vit(block_fn=ResPostBlock, init_values=None)
    images = torch.randn(8, 3, 32, 32)
    qmodel = convert(model, Recipe(2, 8, rounding="nearest"))
    calibrate(qmodel, images, Recipe(2, 8, rounding="nearest"))
    left = add_corrections(model, qmodel, images, "sequential")
    assert max(left.values()) < 1.0
    ours, theirs = find_adapter(model), find_adapter(qmodel)
    from dfqvit.calibration.correction import block_outputs

    wanted, found = block_outputs(ours, images)[-1].mean(0), block_outputs(theirs, images)[-1].mean(0)
    assert float((wanted - found).abs().max()) < 0.02 * float(wanted.std())


def test_the_report_names_every_block(model):
    qmodel, _ = quantized(model)
    report = dfqvit.integer_report(qmodel)
    assert len(report) == len(find_adapter(qmodel).blocks())
    assert all("runtime is simulated" in reason for reason in report.values())
    accelerate(qmodel)
    assert set(dfqvit.integer_report(qmodel).values()) == {""}
    with pytest.raises(UsageError, match="that dfqvit did not quantize"):
        dfqvit.integer_report(model)


def test_bytes_written_behind_torch_s_back_count_after_prepare(integer):
    """The one thing that nobody tells the model of, as the layer's documentation says."""
    qmodel, images = integer
    layer = blocks(qmodel)[0].attn.qkv
    layer.weight_packed.copy_(layer.weight_packed.flip(0))
    layer.prepare()
    assert torch.equal(qmodel(images), afresh(qmodel)(images))


def test_torch_save_to_memory(integer):
    qmodel, images = integer
    stream = io.BytesIO()
    torch.save(qmodel.state_dict(), stream)
    stream.seek(0)
    other = afresh(qmodel)
    other.load_state_dict(torch.load(stream))
    assert torch.equal(other(images), qmodel(images))
