"""The integer model compiled, exported, reloaded without dfqvit's method, and run from C++."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from itertools import product
from pathlib import Path

import pytest
import torch
from timm.models import VisionTransformer
from torch.export import Dim

from dfqvit.kernels import extension, use_backend
from dfqvit.runtime import accelerate

from ..conftest import MODELS, small_vit
from ..kernels.test_library import LIBRARY
from .test_blocks import close, quantized

ROOT = Path(__file__).parent.parent.parent
# Fewer blocks than other tests have, since each is traced for itself: one beside another, windows that are shifted, two stages.
FEW = {"vit": {"depth": 2}, "distilled": {"depth": 1}, "swin": {"depths": (1, 2)}}


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
def test_compiled_models_name_the_backend_unless_one_is_asked_for(integer):
    """A choice in every call costs; a later `use_backend` still counts, and an exported program stays free."""
    qmodel, images = integer
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
        program = torch.export.export(qmodel, (images,), strict=True)
    assert ["dfqvit_cpu" in "".join(names) for names in graphs] == [True, False]
    assert not any("dfqvit_cpu" in str(node.target) for node in program.graph.nodes)


def test_a_compiled_model_follows_what_is_loaded_into_it(integer):
    qmodel, images = integer
    compiled = torch.compile(qmodel, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        compiled(images)
        for key, value in list(qmodel.state_dict().items())[::7]:
            if value.is_floating_point() and "zero_point" not in key:
                qmodel.load_state_dict({key: value * 1.5}, strict=False)
                assert torch.equal(compiled(images), qmodel(images)), key


def test_gradients_pass_through_a_compiled_model(integer):
    """In one graph: one break for each block was one graph for each, seconds of compilation, and guards in every call."""
    qmodel, images = integer
    compiled = torch.compile(qmodel, fullgraph=True, backend="aot_eager")
    found, expected = (images.clone().requires_grad_() for _ in range(2))
    compiled(found).square().mean().backward()
    qmodel(expected).square().mean().backward()
    assert torch.allclose(found.grad, expected.grad, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["vit", "swin"])
def test_inductor(seed, family):
    qmodel, images = quantized(few_blocks(family), 8, acm="sequential")
    accelerate(qmodel)
    compiled = torch.compile(qmodel, fullgraph=True)
    with torch.no_grad():
        assert close(compiled(images), qmodel(images))
        assert close(compiled(images[:3]), qmodel(images[:3]))


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("form", ["integer", "simulated"])
def test_export_with_a_free_batch(model, form, strict):
    qmodel, images = quantized(model, 4, acm="sequential")
    if form == "integer":
        accelerate(qmodel)
    kinds = (Dim("batch"), Dim.DYNAMIC, Dim.AUTO) if type(model) is VisionTransformer else (Dim.DYNAMIC,)
    for batch in kinds:
        with torch.no_grad():
            program = torch.export.export(qmodel, (images,), dynamic_shapes=({0: batch},), strict=strict)
        module = program.module()
        for count in (1, 2, 5):
            x = torch.randn(count, *images.shape[1:])
            assert torch.equal(module(x), qmodel(x))


def test_exported_programs_run_in_a_fresh_process_after_one_import(seed, tmp_path):
    names = []
    for family, form in product(MODELS, ("integer", "simulated")):
        qmodel, images = quantized(few_blocks(family), 4, acm="sequential")
        if form == "integer":
            accelerate(qmodel)
        with torch.no_grad():
            program = torch.export.export(qmodel, (images,), dynamic_shapes=({0: Dim.DYNAMIC},))
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
    values, classes = qmodel(pattern).max(1)
    arguments = [str(example), str(LIBRARY), package, "3", "32", "32", "3"]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    found = subprocess.run(arguments, capture_output=True, text=True, check=True, env=environment).stdout.split()
    assert [int(c) for c in found[::2]] == classes.tolist()
    assert torch.allclose(torch.tensor([float(v) for v in found[1::2]]), values, atol=0.05)


def test_a_compiled_call_costs_no_more_than_a_plain_one(seed):
    """Three times as much would mean that something is rebuilt in every call; the figure is in docs/inference.md."""
    qmodel, images = quantized(small_vit(), 4)
    accelerate(qmodel)
    compiled = torch.compile(qmodel, fullgraph=True, backend="aot_eager")
    with torch.no_grad():

        def shortest(call):
            times = []
            for _ in range(30):
                start = time.perf_counter()
                call(images)
                times.append(time.perf_counter() - start)
            return min(times)

        compiled(images)
        assert shortest(compiled) < 3 * shortest(qmodel)
