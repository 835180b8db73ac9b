"""Networks around timm models: what of them is quantized, saved and loaded, and what is refused."""

from __future__ import annotations

import copy
import json
import warnings

import pytest
import safetensors
import timm
import torch
from torch import nn
from torchvision.transforms import Normalize

import dfqvit
from dfqvit import UsageError
from dfqvit.models import Preprocessing, find_adapter
from dfqvit.models.adapters import flattened, is_network
from dfqvit.models.adapters.network import backbones
from dfqvit.quantization.layers import QuantLinear

from .. import networks
from ..conftest import small_vit

BUILDS = ("segmenter", "siamese", "pair", "retina")
QUICK = {"calib": "procedural", "samples": 4, "progress": False}
HOME = "tests.networks"


def quantize(network, name, **options):
    return dfqvit.quantize(network, build=f"{HOME}:{name}", **{**QUICK, **options})


def images_for(network, count=3):
    return torch.rand(count, *Preprocessing.of(network).input_size)


def distance(found, wanted):
    pairs = zip(flattened(found), flattened(wanted), strict=True)
    return max(float((f.float() - w.float()).norm() / w.float().norm().clamp_min(1e-6)) for f, w in pairs)


@torch.no_grad()
@pytest.mark.parametrize("name", ["segmenter", "siamese", "pair"])
def test_eight_bits_are_close_and_nothing_of_the_float_network_changes(seed, name):
    """On the images that the ranges are from, which hold all values: of others one may lie beyond, and is clamped by far."""
    network = getattr(networks, name)()
    before, attributes = copy.deepcopy(network.state_dict()), set(vars(network))
    images = 2 * images_for(network, 4) - 1
    wanted = network(images)
    qmodel = quantize(network, name, w_bits=8, runtime="simulated", calib=images)
    assert distance(qmodel(images), wanted) < 0.06
    assert distance(network(images), wanted) == 0
    assert set(vars(network)) == attributes
    assert all(torch.equal(value, network.state_dict()[key]) for key, value in before.items())


def test_what_is_quantized_and_to_how_many_bits(seed):
    network = networks.segmenter()
    qmodel = quantize(network, "segmenter", w_bits=3)
    bits = {name: module.w_bits for name, module in qmodel.named_modules() if isinstance(module, QuantLinear)}
    wanted = {
        f"backbone.blocks.{i}.{each}": 3 for i in range(3) for each in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    }
    assert bits == {**wanted, "backbone.patch_embed.proj": 8, "neck.0": 3, "head": 8}  # not the ViT's own, unused head
    assert type(qmodel.neck[2]) is nn.Conv2d
    assert type(qmodel.backbone.head) is nn.Linear


def test_the_last_layers_are_found_along_the_graph(seed):
    class Branches(networks.Segmenter):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.third = nn.Linear(5, 20), nn.Linear(20, 3), nn.Linear(5, 17)

        def forward(self, x):
            rows = super().forward(x)["out"].flatten(2).mT
            return self.second(self.first(rows).relu() * 2 + 1), self.third(rows)

    adapter = find_adapter(Branches().eval())
    assert set(adapter.survey.heads) == {"second", "third"}
    assert {"head", "first"} <= set(adapter.survey.layers)


@torch.no_grad()
@pytest.mark.parametrize("name", BUILDS)
def test_integer_and_simulated_agree_and_a_file_gives_the_same(seed, name, tmp_path):
    network = getattr(networks, name)()
    images = images_for(network, 6)
    qmodel = quantize(network, name, acm_blocks=[-1])
    path = dfqvit.save(qmodel, tmp_path / "network.safetensors")
    loaded = dfqvit.load(path, build=getattr(networks, name))
    for ours, theirs in zip(flattened(loaded(images)), flattened(qmodel(images)), strict=True):
        assert torch.equal(ours, theirs)
    assert dfqvit.integer_report(loaded) == dfqvit.integer_report(qmodel)
    assert not any(dfqvit.integer_report(qmodel).values())
    simulated = dfqvit.load(path, runtime="simulated", build=f"{HOME}:{name}")
    if name != "retina":  # where a box may change its rank
        assert distance(simulated(images), qmodel(images)) < 0.03
    for block, twin in zip(find_adapter(qmodel).blocks(), find_adapter(simulated).blocks(), strict=True):
        x = _input_of(block, simulated, twin, images)
        assert distance(block(x), twin(x)) < 0.03


def _input_of(_, network, block, images):
    kept = []
    handle = block.register_forward_pre_hook(lambda _, inputs: kept.append(inputs[0]))
    network(images)
    handle.remove()
    return kept[0]


def test_a_shared_backbone_is_one_and_stored_once(seed, tmp_path):
    network = networks.siamese()
    qmodel = quantize(network, "siamese")
    assert qmodel.left is qmodel.right
    assert list(backbones(network)) == ["left"]
    path = dfqvit.save(qmodel, tmp_path / "network.safetensors")
    with safetensors.safe_open(path, "pt") as file:
        assert not any(key.startswith("right.") for key in file.keys())  # noqa: SIM118
    assert dfqvit.load(path, build=networks.siamese).left.blocks[0].attn.qkv.frozen


def test_unused_blocks_stay_as_they_are(seed):
    qmodel = quantize(networks.pair(), "pair")
    assert len(find_adapter(qmodel).blocks()) == 2 + 4
    assert type(qmodel.vit.blocks[2].mlp.fc1) is nn.Linear


@torch.no_grad()
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"])
def test_timms_features_only(seed, name, tmp_path):
    own = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3}
    keywords = own if name.startswith("vit") else networks.SWIN
    model = timm.create_model(name, features_only=True, out_indices=(0, 1), **keywords).eval()
    images = dfqvit.synthesize(model, 4, 2)  # what the ranges are from, as above
    qmodel = dfqvit.quantize(model, 8, samples=4, iters=2, progress=False)
    assert distance(qmodel(images), model(images)) < 0.06
    loaded = dfqvit.load(dfqvit.save(qmodel, tmp_path / "features.safetensors"))
    assert all(torch.equal(a, b) for a, b in zip(loaded(images), qmodel(images), strict=True))
    assert not any(dfqvit.integer_report(loaded).values())


@torch.no_grad()
def test_half_images_give_half_outputs_in_their_places(seed):
    qmodel = quantize(networks.segmenter(), "segmenter")
    images = torch.rand(2, 3, 32, 32)
    found = qmodel(images.half())
    assert found.keys() == {"out"}
    assert found["out"].dtype == torch.float16
    assert distance(found, qmodel(images.half().float())) < 1e-3


def test_a_psaq_network_quantizes_outputs_too(seed, tmp_path):
    network = networks.segmenter()
    qmodel = quantize(network, "segmenter", placement="psaq", quantizer="minmax", acm="sequential")
    names = {name for name in qmodel.state_dict() if name.endswith("output_quantizer.scale")}
    assert {"neck.0.output_quantizer.scale", "head.output_quantizer.scale"} <= names
    assert "backbone.head.output_quantizer.scale" not in names
    loaded = dfqvit.load(dfqvit.save(qmodel, tmp_path / "n.safetensors"), build=networks.segmenter)
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(loaded(images)["out"], qmodel(images)["out"])


def test_a_file_runs_no_code_that_the_user_did_not_name(seed, tmp_path):
    path = dfqvit.save(quantize(networks.segmenter(), "segmenter"), tmp_path / "network.safetensors")
    with pytest.raises(UsageError, match=r"holds a network that 'tests.networks:segmenter' builds; give build='tests"):
        dfqvit.load(path)
    with pytest.raises(UsageError, match=r"build was 'tests.networks:number', which gave a int"):
        dfqvit.load(path, build=f"{HOME}:number")
    with pytest.raises(dfqvit.DfqvitError, match="does not fit the model it names"):
        dfqvit.load(path, build=networks.siamese)
    with safetensors.safe_open(path, "pt") as file:
        record = json.loads(file.metadata()["dfqvit"])["record"]
    assert record["spec"]["build_by"] == "tests.networks:segmenter"
    assert "function" not in record["spec"]
    timms = dfqvit.save(dfqvit.quantize(small_vit(), **QUICK), tmp_path / "timm.safetensors")
    with pytest.raises(UsageError, match=r"build was given; .* holds timm's 'vit_tiny_patch16_224', which needs none"):
        dfqvit.load(timms, build=networks.segmenter)


def test_without_build_it_can_be_used_and_not_saved(seed, tmp_path):
    qmodel = dfqvit.quantize(networks.segmenter(), **QUICK)
    assert "network" in repr(qmodel)
    with pytest.raises(UsageError, match=r"quantized without build; give dfqvit.quantize build='module:function'"):
        dfqvit.save(qmodel, tmp_path / "network.safetensors")


@pytest.mark.parametrize(
    ("build", "said"),
    [
        ("tests.networks", "it must be 'module:function'"),
        ("tests.networks:nothing", "could not be imported"),
        ("no_such_module_here:make", "could not be imported"),
        ("tests.networks:Masked.forward", "failed when it was called without arguments"),
        ("tests.networks:SWIN", "a dict; it must be a function"),
        ("tests.networks:siamese", "which makes another network"),
        (3, "build was 3; it may be 'module:function' or a function"),
        (lambda: None, "it may be 'module:function' or a function of a module"),
    ],
)
def test_a_build_that_does_not_fit_is_said_before_any_work(seed, build, said):
    with pytest.raises(UsageError, match=said) as error:
        dfqvit.quantize(networks.segmenter(), build=build, iters=10**9)
    assert "\n" not in str(error.value)


def test_networks_that_cannot_be_taken(seed):
    with pytest.raises(UsageError, match=r"a Masked whose forward takes \(x, mask\); it must take images alone"):
        dfqvit.quantize(networks.Masked().eval(), **QUICK)
    with pytest.raises(UsageError, match=r"several sizes \('vit' 32 x 32, 'swin' 64 x 64\); give preprocessing"):
        dfqvit.quantize(networks.Pair(64).eval(), **QUICK)
    with pytest.raises(UsageError, match="build was given; the model is timm's VisionTransformer"):
        dfqvit.quantize(small_vit(), build=f"{HOME}:segmenter", **QUICK)
    with pytest.raises(UsageError, match="model_kwargs was given; a network that is not timm's"):
        dfqvit.quantize(networks.segmenter(), model_kwargs={}, **QUICK)
    with pytest.raises(UsageError, match="compares logits"):
        dfqvit.quantize(networks.segmenter(), acm="checked", **QUICK)
    wrong = Preprocessing((1, 32, 32), (0.5,), (0.5,))
    with pytest.raises(UsageError, match="preprocessing had 1 channels; the network takes 3"):
        dfqvit.quantize(networks.segmenter(), preprocessing=wrong, **QUICK)
    assert not is_network(nn.Sequential(nn.Linear(3, 3)))


def test_preprocessing_is_the_backbones_or_none_where_the_network_normalises(seed):
    assert Preprocessing.of(networks.segmenter()) == Preprocessing.of(small_vit())
    assert Preprocessing.of(networks.retina()).mean == (0.0, 0.0, 0.0)


class Normalising(nn.Module):
    """Holds a mean and a std by some names, or none, and a ViT that is given images by them."""

    def __init__(self, mean, std, names=("mean", "std")):
        super().__init__()
        self.body, self.values, self.names = small_vit(), (mean, std), names
        for name, value in zip(names, (mean, std), strict=False):
            self.register_buffer(name, torch.full((1, 3, 1, 1), value))

    def forward(self, x):
        return self.body((x - self.values[0]) / self.values[1])


@pytest.mark.parametrize(
    ("network", "greatest"),
    [
        (lambda: nn.Sequential(Normalize([0.5] * 3, [0.5] * 3), small_vit()), 1),
        (lambda: Normalising(0.4, 0.2), 1),
        (lambda: Normalising(120.0, 60.0, ("pixel_mean", "pixel_std")), 255),
    ],
)
def test_a_network_that_normalises_itself_takes_pixels(seed, network, greatest):
    network = network().eval()
    found = Preprocessing.of(network)
    assert (found.mean, found.std) == ((0.0,) * 3, (1 / greatest,) * 3)
    pixels = torch.rand(2, 3, 32, 32)
    assert torch.allclose(found.normalise(pixels), pixels * greatest)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        qmodel = dfqvit.quantize(network, 8, **{**QUICK, "calib": found.normalise(pixels), "samples": 2})
    assert qmodel.dfqvit_record.preprocessing == found


def test_a_network_that_rescales_images_in_a_way_of_its_own_is_told(seed):
    network, said = Normalising(0.4, 0.2, ()), "gives its 'body' images of another mean and deviation than it takes"
    with pytest.warns(UserWarning, match=said):
        dfqvit.quantize(network.eval(), 8, **QUICK)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dfqvit.quantize(network, 8, preprocessing=Preprocessing((3, 32, 32), (0.0,) * 3, (1.0,) * 3), **QUICK)
        dfqvit.quantize(networks.siamese(), 8, **QUICK)


class Around(nn.Module):
    """A backbone of small_vit and a function of it, the images and further modules."""

    def __init__(self, function, **modules):
        super().__init__()
        self.function = function
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, images):
        return self.function(self, images)


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_torchs_transformer_layers_behind_a_backbone(seed, kind):
    """Without gradients nn.TransformerEncoderLayer reads the weights of its linear layers and calls none of them."""
    backbone = small_vit(num_classes=0)
    width = backbone.embed_dim
    if kind == "encoder":
        top = nn.TransformerEncoder(nn.TransformerEncoderLayer(width, 2, 40, batch_first=True), 1)
        network = Around(lambda self, x: self.top(self.backbone.forward_features(x)), backbone=backbone, top=top).eval()
    else:
        top = nn.TransformerDecoderLayer(width, 2, 40, batch_first=True)
        network = Around(lambda self, x: self.top(*[self.backbone.forward_features(x)] * 2), backbone=backbone, top=top)
        network = network.eval()
    images = 2 * images_for(network, 4) - 1
    qmodel = dfqvit.quantize(network, w_bits=8, runtime="simulated", calib=images, progress=False)
    with torch.no_grad():
        found = qmodel(images)
        assert distance(found, network(images)) < 0.06
    assert distance(qmodel(images).detach(), found) < 1e-4
    assert (
        type(qmodel.get_submodule("top.layers.0.linear1" if kind == "encoder" else "top.linear1")) is nn.Linear
    ) == (kind == "encoder")


def test_a_backbone_that_sees_images_of_two_sizes(seed):
    small = Around(
        lambda self, x: self.backbone(x) + self.backbone(nn.functional.avg_pool2d(x, 2)),
        backbone=small_vit(dynamic_img_size=True),
    ).eval()
    images = 2 * images_for(small, 4) - 1
    qmodel = dfqvit.quantize(small, w_bits=8, runtime="simulated", calib=images, progress=False)
    with torch.no_grad():
        assert distance(qmodel(images), small(images)) < 0.1


class InPlace(networks.Segmenter):
    """Normalises the very images that it is given."""

    def forward(self, x):
        return super().forward(x.sub_(0.45).div_(0.22))


def test_a_network_that_writes_into_its_images_is_refused(seed):
    """It ended in an error of autograd's; images that are looked at twice would be normalised twice."""
    with pytest.raises(UsageError, match=r"a InPlace, which writes into the images that it is given, .*x = x - mean"):
        dfqvit.quantize(InPlace(depth=1).eval(), 8, samples=2, calib="noise", rounding="nearest")


def test_a_part_that_is_compiled_is_named(seed):
    network = Around(lambda self, x: self.backbone(x), backbone=torch.compile(small_vit(), backend="eager")).eval()
    with pytest.raises(
        UsageError, match=r"whose 'backbone' is compiled by torch.compile; put model.backbone._orig_mod in"
    ):
        quantize(network, "segmenter")
