"""The integer model compiled, exported, reloaded without dfqvit's method, and run from C++."""

from __future__ import annotations

import copy
import functools
import os
import shutil
import subprocess
import sys
import time
from itertools import product
from pathlib import Path

import pytest
import torch
from torch.export import Dim

from dfqvit.kernels import extension, use_backend
from dfqvit.quantization.model import BITS
from dfqvit.runtime import accelerate
from dfqvit.runtime.block import IntegerBlock

from ..conftest import MODELS, small_vit
from ..kernels.test_library import LIBRARY
from .test_blocks import close, quantized
from .test_residual import small

ROOT = Path(__file__).parent.parent.parent
# Fewer blocks than other tests have, since each is traced for itself: one beside another, windows that are shifted, two stages.
FEW = {"vit": {"depth": 1}, "distilled": {"depth": 2}, "swin": {"depths": (1, 2)}}
ONE = {"vit": {"depth": 1}, "distilled": {"depth": 1}, "swin": {"depths": (1,), "num_heads": (2,)}}
# Ways to say that any number of images may come.
BATCHES = {"dynamic": Dim.DYNAMIC, "named": Dim("batch"), "auto": Dim.AUTO}


@pytest.fixture(params=list(MODELS))
def model(request, seed):
    return few_blocks(request.param)


def few_blocks(family):
    return MODELS[family](**FEW[family])


@pytest.fixture
def integer(model):
    qmodel, images = quantized(model, 4, acm="sequential")
    accelerate(qmodel)
    return qmodel, images


def exported(family, form, strict=False, batch="dynamic"):
    """(a quantized model, images, its program for any number of them); what changes one of the two takes a copy."""
    return _exported(family, form, strict, batch)  # so that defaults that are given find what was made without


@functools.cache
def _exported(family, form, strict, batch):
    qmodel, images = quantized(few_blocks(family), 4, acm="sequential")
    if form == "integer":
        accelerate(qmodel)
    with torch.no_grad():
        program = torch.export.export(qmodel, (images,), dynamic_shapes=({0: BATCHES[batch]},), strict=strict)
    return qmodel, images, program


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_compiles_as_one_graph_and_for_every_batch_after_the_second(integer):
    qmodel, images = integer
    graphs = []

    def count(module, example):
        graphs.append(module)
        return module.forward

    compiled = torch.compile(qmodel, fullgraph=True, backend=count)
    with torch.no_grad():
        for batch in (1, 2, 3, 5, 8):
            x = torch.randn(batch, *images.shape[1:])
            assert torch.equal(compiled(x), qmodel(x))
    assert len(graphs) <= 2


@pytest.mark.skipif(extension.load()[0] is None, reason="dfqvit._C is not built")
@pytest.mark.parametrize("family", list(MODELS))
def test_compiled_models_name_the_backend_unless_one_is_asked_for(seed, family):
    """A choice in every call costs; a later `use_backend` still counts. An exported program stays free, as is seen there."""
    qmodel, images = quantized(MODELS[family](**ONE[family]), 4, acm="sequential")
    accelerate(qmodel)
    graphs = []

    def keep(module, example):
        graphs.append({str(node.target) for node in module.graph.nodes if "quant_block" in str(node.target)})
        return module.forward

    compiled = torch.compile(qmodel, fullgraph=True, backend=keep)
    with torch.no_grad():
        expected = qmodel(images)
        assert torch.equal(compiled(images), expected)
        with use_backend("reference"):
            assert torch.allclose(compiled(images), qmodel(images), atol=1e-5)
        assert torch.equal(compiled(images), expected)
    assert ["dfqvit_cpu" in "".join(names) for names in graphs] == [True, False]


def test_a_compiled_model_follows_what_is_loaded_into_it(integer):
    qmodel, images = integer
    compiled = torch.compile(qmodel, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        compiled(images)
        for key, value in list(qmodel.state_dict().items())[::7]:
            if value.is_floating_point() and "zero_point" not in key:
                qmodel.load_state_dict({key: value * 1.5}, strict=False)
                assert torch.equal(compiled(images), qmodel(images)), key


@pytest.mark.parametrize("family", ["vit", "swin"])
def test_a_compiled_model_follows_a_forward_given_to_an_instance(seed, family):
    """And taken away again: torch.compile guards nothing that is read past the attribute. Of both kinds of block."""
    qmodel, images = quantized(MODELS[family](**ONE[family]), 4, acm="sequential")
    accelerate(qmodel)
    compiled = torch.compile(qmodel, fullgraph=True, backend="eager")
    block = next(module for module in qmodel.modules() if isinstance(module, IntegerBlock))
    with torch.no_grad():
        before = compiled(images)
        for place in ("norm2", "mlp.fc1", "attn"):
            part = block.get_submodule(place)
            part.forward = lambda *args, computes=part.forward, **kwargs: 2 * computes(*args, **kwargs)
            found = compiled(images)
            assert torch.equal(found, qmodel(images)), place
            assert not torch.equal(found, before), place
            del part.forward
            assert torch.equal(compiled(images), before), place


def test_gradients_pass_through_a_compiled_model(integer):
    """In one graph: one break for each block was one graph for each, seconds of compilation, and guards in every call."""
    qmodel, images = integer
    compiled = torch.compile(qmodel, fullgraph=True, backend="aot_eager")
    found, expected = (images.clone().requires_grad_() for _ in range(2))
    compiled(found).square().mean().backward()
    qmodel(expected).square().mean().backward()
    assert torch.allclose(found.grad, expected.grad, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "dynamic"), [("vit", False), ("swin", True)])
def test_inductor(seed, family, dynamic):
    """For one number of images and, compiled once too, for any."""
    qmodel, images = quantized(few_blocks(family), 8, acm="sequential")
    accelerate(qmodel)
    compiled = torch.compile(qmodel, fullgraph=True)
    if dynamic:
        torch._dynamo.mark_dynamic(images, 0)
    with torch.no_grad():
        assert close(compiled(images), qmodel(images))
        if dynamic:
            with torch.compiler.set_stance("fail_on_recompile"):
                assert close(compiled(images[:3]), qmodel(images[:3]))


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("form", ["integer", "simulated"])
@pytest.mark.parametrize("family", list(MODELS))
def test_export_with_a_free_batch(seed, family, form, strict):
    """Each way to say so, of one family; and no program is bound to the backend that would have been chosen here."""
    for batch in BATCHES if family == "vit" else ["dynamic"]:
        qmodel, images, program = exported(family, form, strict, batch)
        assert not any("dfqvit_cpu" in str(node.target) for node in program.graph.nodes)
        module = program.module()
        for count in (1, 2, 5):
            x = torch.randn(count, *images.shape[1:])
            assert torch.equal(module(x), qmodel(x))


def refuses_gradients(call, images):
    """Whether each way to ask for one raises the sentence of an operator."""
    said = "a gradient is wanted of the operator [a-z_]+, which has none: use torch.no_grad()"
    with pytest.raises(Exception, match=said):
        call(images.clone().requires_grad_()).square().mean().backward()
    with pytest.raises(Exception, match=said):
        torch.func.grad(lambda x: call(x).square().mean())(images)


@pytest.mark.parametrize("form", ["whole blocks", "parts", "simulated"])
def test_a_program_refuses_gradients(seed, form):
    """It once gave none, or those of what lies outside the operators, and torch warned at most."""
    model = small("beit_base_patch16_224", depth=1, init_values=0.3) if form == "parts" else few_blocks("vit")
    qmodel, images = quantized(model.eval(), 4)
    if form != "simulated":
        accelerate(qmodel)
    with torch.no_grad():
        module = torch.export.export(qmodel, (images,)).module()
    expected = qmodel(images)
    for program in (module, torch.jit.trace(qmodel, images), torch.compile(module, backend="aot_eager")):
        refuses_gradients(program, images)
        assert torch.equal(program(images), expected)  # as without no_grad, where no gradient is wanted
        with torch.no_grad():
            assert torch.equal(program(images.clone().requires_grad_()), expected)


@pytest.mark.parametrize("form", ["integer", "simulated"])
@pytest.mark.parametrize("family", list(MODELS))
def test_what_a_program_loads_counts(seed, family, form):
    """Key after key. Of the model's state the program lacks what it computes with in another form, and says so."""
    qmodel, images, program = copy.deepcopy(exported(family, form))
    images = images[:8]
    module = program.module()
    state = {key: value.clone() for key, value in qmodel.state_dict().items()}
    fixed = {key for key in state if key.endswith((".weight_packed", ".acm", BITS))}
    assert module.state_dict().keys() == state.keys() - fixed
    with pytest.raises(RuntimeError, match=r"Unexpected key\(s\) in state_dict: .*weight_packed"):
        module.load_state_dict(state)
    for key in state.keys() - fixed:
        value = state[key]
        # by so much that 8 images show it: of 410 such changes they show 380, where of 3 steps 16 images showed 372
        other = (value + 12).clamp(max=255) if key.endswith("zero_point") else value * 1.25
        for each in (module, qmodel):
            each.load_state_dict({key: other}, strict=False)
        assert torch.equal(module(images), qmodel(images)), key


def test_exported_programs_run_in_a_fresh_process_after_one_import(seed, tmp_path):
    names = []
    for family, form in product(MODELS, ("integer", "simulated")):
        qmodel, images, program = exported(family, form)
        names.append(str(tmp_path / f"{family}-{form}"))
        torch.export.save(program, f"{names[-1]}.pt2")
        torch.save((images, qmodel(images)), f"{names[-1]}.pt")
    code = (
        "import sys, torch, dfqvit.kernels\n"
        "for name in sys.argv[1:]:\n"
        "    x, expected = torch.load(name + '.pt')\n"
        "    found = torch.export.load(name + '.pt2').module()(x)\n"
        "    print(torch.equal(found, expected), 'timm' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", code, *names], capture_output=True, text=True, check=False, cwd=ROOT)
    assert found.stdout.split("\n")[:-1] == ["True False"] * 6, found.stderr


@pytest.fixture
def example(tmp_path):
    """The program of examples/cpp, built."""
    compiler = shutil.which("c++") or shutil.which("g++")
    if LIBRARY is None or extension.load()[0] is None or compiler is None or not sys.platform.startswith("linux"):
        pytest.skip("the operators are not built, or there is no C++ compiler")
    torch_folder, program = Path(torch.__path__[0]), tmp_path / "run_pt2"
    include = [f"-I{torch_folder / 'include'}", f"-I{torch_folder / 'include/torch/csrc/api/include'}"]
    link = [f"-L{torch_folder / 'lib'}", f"-Wl,-rpath,{torch_folder / 'lib'}", "-Wl,--no-as-needed"]
    link += ["-ltorch", "-ltorch_cpu", "-lc10", "-ldl"]
    source = ROOT / "examples" / "cpp" / "run_pt2.cpp"
    subprocess.run([compiler, "-std=c++17", "-O0", *include, str(source), "-o", str(program), *link], check=True)
    return program


@pytest.mark.slow
def test_a_pt2_of_aotinductor_runs_from_cpp(seed, example, tmp_path):
    """With the shared library of operators alone: no Python, no dfqvit. It once answered with another dtype's bytes."""
    qmodel, _ = quantized(small_vit(depth=1), 4, acm="sequential")
    accelerate(qmodel)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        program = torch.export.export(qmodel, (x,), dynamic_shapes=({0: Dim("batch", max=64)},))
    package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "m.pt2"))
    loaded = torch._inductor.aoti_load_package(package)
    for batch in (1, 2, 5):
        x = torch.randn(batch, 3, 32, 32)
        assert close(loaded(x), qmodel(x))
    pattern = (torch.arange(3 * 3 * 32 * 32).remainder(97) / 48.5 - 1).view(3, 3, 32, 32)
    assert close(loaded(pattern), qmodel(pattern))
    values, classes = loaded(pattern).max(1)  # of the program: of two that are near the model may choose the other
    arguments = [str(example), str(LIBRARY), package, "3", "32", "32", "3"]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    found = subprocess.run(arguments, capture_output=True, text=True, check=True, env=environment).stdout.split()
    assert [int(c) for c in found[::2]] == classes.tolist()
    assert torch.allclose(torch.tensor([float(v) for v in found[1::2]]), values, rtol=1e-3, atol=1e-3)


def test_a_compiled_call_costs_no_more_than_a_plain_one(seed):
    """Three times as much would mean that something is rebuilt in every call; the figure is in docs/inference.md.

    In this thread's own time on a processor, and in turns: other processes hold both up, or neither.
    """
    qmodel, images = quantized(small_vit(depth=1), 4)
    accelerate(qmodel)
    compiled = torch.compile(qmodel, fullgraph=True, backend="aot_eager")
    with torch.no_grad():

        def taken(call):
            start = time.thread_time()
            call(images)
            return time.thread_time() - start

        compiled(images)
        both = [(taken(compiled), taken(qmodel)) for _ in range(50)]
        shortest = [min(times) for times in zip(*both, strict=True)]
        assert shortest[0] < 3 * shortest[1]
