"""Mixed precision: the file fits, and what is chosen loses less than what is not."""

from __future__ import annotations

import warnings
from itertools import pairwise, product

import pytest
import safetensors.torch
import timm
import torch
import torch.nn.functional as F

import dfqvit
from dfqvit.calibration import allocation, convert, observe
from dfqvit.calibration.allocation import (
    WIDTHS,
    LayerCost,
    allocate_bits,
    check_budget,
    choose_widths,
    measure_divergence,
)
from dfqvit.calibration.equalize import equalize
from dfqvit.errors import UsageError
from dfqvit.quantization.layers import QuantLinear, allocate
from dfqvit.quantization.model import state_of
from dfqvit.quantization.recipe import Recipe

from ..conftest import MODELS, SMALL, small_vit


def random_costs(layers):
    """Convex, as roundings are in practice: each bit less costs more."""
    costs = {}
    for index in range(layers):
        rows, step = int(torch.randint(1, 50, ())), torch.rand(len(WIDTHS)) ** 3
        falls = step.sort().values.cumsum(0).double()
        costs[f"l{index}"] = LayerCost(
            {bits: rows * bits for bits in WIDTHS}, {bits: falls[i].item() for i, bits in enumerate(WIDTHS)}
        )
    return costs


def total(costs, chosen, field):
    return sum(getattr(costs[name], field)[bits] for name, bits in chosen.items())


def test_budget_holds_and_nothing_better_is_far(seed):
    """Brute force over all widths of four layers: greedy stays within one step of the best."""
    for _ in range(5):
        costs = random_costs(4)
        least, most = (sum(c.size[bits] for c in costs.values()) for bits in (WIDTHS[-1], WIDTHS[0]))
        budget = int(least + torch.rand(()).item() * (most - least))
        chosen = choose_widths(costs, budget)
        assert total(costs, chosen, "size") <= budget
        every = [dict(zip(costs, widths, strict=True)) for widths in product(WIDTHS, repeat=4)]
        best = min(total(costs, c, "divergence") for c in every if total(costs, c, "size") <= budget)
        step = max(c.divergence[b] - c.divergence[a] for c in costs.values() for a, b in pairwise(WIDTHS))
        assert best - 1e-9 <= total(costs, chosen, "divergence") <= best + step


def test_enough_room_keeps_the_widest(seed):
    costs = random_costs(6)
    assert set(choose_widths(costs, 10**9).values()) == {WIDTHS[0]}


def test_divergence_is_that_of_the_rounded_layer_alone(model):
    images, recipe = torch.randn(4, 3, 32, 32), Recipe(8, scaling="none")  # its layers go into the float model
    qmodel = convert(model, recipe)
    observe(qmodel, images, recipe)
    layers = {name: m for name, m in qmodel.named_modules() if isinstance(m, QuantLinear)}
    name = list(layers)[int(torch.randint(len(layers), ()))]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    found = measure_divergence(model, images, {name: layers[name]})[name]
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    with torch.no_grad():
        wanted = model(images).double().log_softmax(1)
        weight = model.get_submodule(name).weight
        integers, scale = layers[name].round_weight(3)
        weight.copy_((integers * scale[:, None]).view_as(weight))
        changed = model(images).double().log_softmax(1)
    expected = F.kl_div(changed, wanted, log_target=True, reduction="batchmean").item()
    assert found[3] == pytest.approx(expected, rel=1e-2, abs=1e-6)
    assert found[2] > found[8]


@pytest.mark.parametrize("family", list(MODELS))
def test_a_file_fits_its_budget_and_loads_the_same(family, seed, tmp_path):
    model, images = MODELS[family](), torch.randn(3, 3, 32, 32)
    sizes = {}
    for bits in (2, 8):
        whole = dfqvit.quantize(model, bits, edge_bits=bits, calib=images, model_kwargs=SMALL[family])
        sizes[bits] = dfqvit.save(whole, tmp_path / f"w{bits}.safetensors").stat().st_size / 1e6
    budget = sizes[2] + 0.02 + 0.5 * (sizes[8] - sizes[2])
    told = []
    qmodel = dfqvit.quantize(
        model,
        size_budget=budget,
        calib=images,
        model_kwargs=SMALL[family],
        report=told.append,
    )
    path = dfqvit.save(qmodel, tmp_path / "mixed.safetensors")
    assert path.stat().st_size / 1e6 <= budget
    bits = qmodel.dfqvit_record.recipe.layer_bits
    measured = [(each.step, each.total) for each in told if each.stage == "choose bits"]
    assert measured == [(done, len(bits)) for done in range(len(bits) + 1)]
    assert torch.equal(dfqvit.load(path)(images), qmodel(images))


@pytest.mark.parametrize("chosen", [{"acm_blocks": None}, {"acm_top": 1}], ids=str)
def test_corrections_are_within_the_budget(seed, tmp_path, chosen):
    """They came on top of it: 8 % of a model of 24 blocks."""
    model, images = small_vit(depth=1, img_size=96), torch.randn(2, 3, 96, 96)  # 145 tokens
    options = {"calib": images, "rounding": "nearest", "acm": "sequential", "progress": False, **chosen}
    whole = dfqvit.quantize(model, 5, edge_bits=5, **options)
    budget = dfqvit.save(whole, tmp_path / "q.safetensors").stat().st_size / 1e6
    qmodel = dfqvit.quantize(model, size_budget=budget, **options)
    assert 0.8 * budget < dfqvit.save(qmodel, tmp_path / "q.safetensors").stat().st_size / 1e6 <= budget
    with pytest.raises(UsageError, match=r"size_budget was 0\.\d+ MB; this model needs 0\.\d+ MB at least"):
        dfqvit.quantize(model, size_budget=budget - 0.014, **options)


def test_tables_that_a_file_holds_are_counted(seed, tmp_path):
    """Found by reading: rotary embeddings of a model in bfloat16 are kept as they were rounded, and came on top of the budget."""
    kwargs = {"depth": 1, "embed_dim": 64, "num_heads": 1, "num_classes": 10, "img_size": 56}
    model = timm.create_model("eva02_tiny_patch14_224", **kwargs).bfloat16()
    options = {"calib": 2 * torch.rand(2, 3, 56, 56) - 1, "quantizer": "minmax", "progress": False}
    whole = dfqvit.quantize(model, 2, edge_bits=2, **options)
    size = dfqvit.save(whole, tmp_path / "q.safetensors").stat().st_size
    with pytest.raises(UsageError, match=r"this model needs 0\.\d+ MB at least"):
        dfqvit.quantize(model, size_budget=(size - 1) / 1e6, **options)


def test_biases_that_scaling_adds_are_counted(seed):
    """Found by reading: what is shifted out of a layer's inputs gives it a bias, which no one had counted."""
    model, recipe = small_vit(depth=1, qkv_bias=False), Recipe(2, 4, edge_bits=2, levels="uniform")
    torch.nn.init.normal_(model.blocks[0].norm1.bias, std=3.0)  # the keys' channels then have middles other than 0
    scaled = convert(model, recipe)
    equalize(scaled, torch.randn(2, 3, 32, 32))
    assert scaled.blocks[0].attn.qkv.bias is not None
    allocate(scaled)
    tensors = len(safetensors.torch.save(state_of(scaled)))
    check_budget(model, recipe, (tensors + 8192) / 1e6)
    with pytest.raises(UsageError, match=r"this model needs 0\.\d+ MB at least"):
        check_budget(model, recipe, (tensors + allocation._RECORD_BYTES) / 1e6)


def test_label_names_the_widths():
    assert Recipe(4).label == "W4/A8"
    assert Recipe(4, layer_bits={"head": 8, "blocks.0.mlp.fc1": 3}).label == "W3-8/A8"
    assert Recipe(4, layer_bits={"head": 8}).label == "W4-8/A8"  # the others have 4
    assert Recipe(8, layer_bits={"blocks.0.attn.qkv": 3}).label == "W3-8/A8"
    assert Recipe(4, layer_bits={}) == Recipe(4)


def test_what_a_budget_takes_no_notice_of_is_told(seed):
    """Found here: 300 for 0.3 MB, or a width beside a budget, passed without a word."""
    model, options = MODELS["vit"](), {"calib": torch.randn(4, 3, 32, 32), "rounding": "nearest", "progress": False}
    options["model_kwargs"] = SMALL["vit"]
    greatest = len(safetensors.torch.save(dfqvit.quantize(model, 8, **options).state_dict())) / 1e6
    for asked, told in (
        ({"size_budget": 2 * greatest}, "into which weights of 8 bits fit: all layers have so many"),
        ({"size_budget": 0.8 * greatest, "w_bits": 3}, "w_bits was 3 and size_budget given, which chooses"),
        ({"size_budget": 0.8 * greatest, "edge_bits": 8}, "edge_bits was 8 and size_budget given, which chooses"),
        ({"size_budget": 0.8 * greatest}, ""),
    ):
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            qmodel = dfqvit.quantize(model, **asked, **options)
        said = [str(each.message) for each in found if "size_budget" in str(each.message)]
        assert len(said) == bool(told)
        assert told in "".join(said)
        assert (min(qmodel.dfqvit_record.recipe.layer_bits.values()) == 8) == (asked["size_budget"] > greatest)
    plain, wide = (dfqvit.quantize(model, bits, size_budget=0.8 * greatest, **options) for bits in (4, 3))
    assert plain.dfqvit_record == wide.dfqvit_record  # ACM's "auto" too


def test_bad_budgets_and_names(seed):
    model = MODELS["vit"]()
    with pytest.raises(UsageError, match=r"size_budget was 0.001 MB; this model needs 0\.\d+ MB at least"):
        dfqvit.quantize(model, size_budget=0.001, calib="synthetic", iters=10**6, model_kwargs=SMALL["vit"])
    with pytest.raises(UsageError, match="size_budget was nan MB"):
        allocate_bits(model, torch.randn(1, 3, 32, 32), Recipe(), float("nan"))
    with pytest.raises(UsageError, match="size_budget and layer_bits were both given"):
        dfqvit.quantize(model, size_budget=1.0, layer_bits={"head": 8}, calib="noise")
    with pytest.raises(UsageError, match=r"layer_bits\['head'\] was 9; it may be a whole number from 2 to 8"):
        Recipe(layer_bits={"head": 9})
    with pytest.raises(UsageError, match="layer_bits named 'nothing'; the model has no such linear layer"):
        dfqvit.quantize(model, layer_bits={"nothing": 4}, calib="noise", model_kwargs=SMALL["vit"])
