"""The pool of threads that CPU operators share: by itself, and under them."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dfqvit.evaluation.neighbours import neighbours
from dfqvit.kernels import extension

ROOT = Path(__file__).parents[2]
COMPILER = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
CASES = ["pieces", "ranges", "countdowns", "exceptions", "nested", "callers", "alone", "forks", "ends", "ends_late"]
HANGS = 900  # seconds; no busy machine takes as long
module = extension.load()[0]
compiled = pytest.mark.skipif(module is None, reason="dfqvit._C is not built")
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")

# What the operators give on random input, as a digest of their bytes: torch's own operators on it would want its threads,
# which a child of a fork does not have.
OPERATORS = """
import hashlib, os, sys, threading, torch
from dfqvit.kernels import block_weight, extension, pack_weight
torch.manual_seed(int(os.environ["SEED"]))
assert extension.load()[0]
ops = torch.ops.dfqvit_cpu
one = torch.tensor
x = torch.randn(3, 131, 96)
scale = torch.rand(288) * 0.01 + 0.01
packed = pack_weight(torch.randn(288, 96) * 0.1, scale, 4)
weight = block_weight(packed, 96, 4)
three, zeros = torch.full((3,), 0.03), torch.full((3,), 128.0)
norm = (torch.rand(96) + 0.5, torch.randn(96))
small, hidden = torch.rand(96) * 0.01 + 0.01, torch.rand(200) * 0.01 + 0.01
pack = lambda outputs, inputs, s: block_weight(pack_weight(torch.randn(outputs, inputs) * 0.1, s, 4), inputs, 4)
weights = [weight, pack(96, 96, small), pack(200, 96, hidden), pack(96, 200, small)]
block = ([*norm, *norm], [1e-6] * 2, weights, [torch.empty(0)] * 4, [scale, small, hidden, small], [4] * 4,
         [one(0.03)] * 7, [one(128.0)] * 7, [8] * 7, 3, 0.2)
windows = torch.randperm(130).view(5, 26).int()
images, features = torch.randn(5, 3, 40, 30), torch.randn(2, 3, 70, 20)
rows, columns = torch.rand(5, 24) * 38, torch.rand(5, 20) * 28
shift = torch.randint(0, 20, (5, 2))
grad = torch.randn(5, 3, 24, 20)

def results():
    qkv = ops.quant_linear(x, weight, None, None, one(0.03), one(128.0), scale, 8, 4, "none", None, three, zeros, 8, "uint8")
    ends = ops.similarity_range(features)
    entropy, density = ops.patch_similarity_entropy(features, ends, 10, 0.01, 1)
    tv = ops.total_variation(images)
    yield from (
        qkv, ends, entropy, density, tv,
        ops.quant_linear(x[0, :20], packed, None, None, one(0.03), one(128.0), scale, 8, 4, "gelu", None, None, None, 8, "float32"),
        ops.layer_norm_quantize(x, *norm, 1e-6, one(0.02), one(128.0), 8),
        ops.quant_attention(qkv, 3, three, zeros, 0.2, None, None, None, one(0.02), one(128.0), 8),
        ops.fake_quantize(x, one([0.02]), one([128.0]), 0, 255, 0),
        ops.patch_similarity_entropy_backward(entropy, features, ends, density, 0.01, 1),
        ops.roll_resize(images, rows, columns, shift),
        ops.roll_resize_backward(grad, rows, columns, shift, 40, 30),
        ops.total_variation_backward(tv, images),
        *(ops.quant_block(x[:n], *block, None, None, None, None, None, "gelu") for n in (1, 2, 3)),
        ops.quant_block(x[:1, :130].contiguous(), *block, None, None, windows, None, None, "gelu"),
    )

def digest():
    found = hashlib.sha256()
    for result in results():
        found.update(bytes(result.contiguous().view(torch.uint8).numpy()))
    return found.hexdigest()

def workers(expected):
    while named() < expected:  # a thread names itself when it first has a processor
        pass
    return named()

def named():
    names = (open(f"/proc/self/task/{task}/comm").read().strip() for task in os.listdir("/proc/self/task"))
    return sum(name == "dfqvit" for name in names)
"""


def python(code, seed=0, **environment):
    """The lines that OPERATORS and `code` print, in a process of their own that must end well."""
    command = [sys.executable, "-c", OPERATORS + code]
    names = {name: value for name, value in os.environ.items() if name != "DFQVIT_CPUS"}
    names |= {"SEED": str(seed), **environment}
    found = subprocess.run(command, capture_output=True, text=True, timeout=HANGS, env=names, check=False)
    assert found.returncode == 0, (found.returncode, found.stderr)
    return found.stdout.split()


@pytest.fixture(scope="session")
def pool(tmp_path_factory):
    """Programs of the pool alone: as it is, and under ThreadSanitizer where the compiler has it."""
    if COMPILER is None:
        pytest.skip("no C++ compiler")
    folder, source = tmp_path_factory.mktemp("pool"), Path(__file__).with_name("pool")
    include = [f"-I{source}", f"-I{ROOT / 'csrc/include'}"]
    files = [str(source / "pool.cpp"), str(ROOT / "csrc/cpu/parallel.cpp")]
    programs = []
    for name, flags in (("plain", []), ("tsan", ["-g", "-fsanitize=thread"])):
        command = [COMPILER, "-std=c++17", "-O1", *flags, *include, *files, "-o", str(folder / name), "-pthread"]
        built = subprocess.run(command, capture_output=True, text=True, check=False)
        assert built.returncode == 0 or name == "tsan", built.stderr
        programs += [folder / name] * (built.returncode == 0)
    return programs


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("busy", [0, 3])
def test_the_pool_by_itself(pool, case, busy):
    environment = {**os.environ, "DFQVIT_CPUS": "8", "TSAN_OPTIONS": "die_after_fork=0"}
    with neighbours(busy):
        for program in pool:
            if (program.name, case) == ("tsan", "forks"):
                continue  # ThreadSanitizer does not know threads after a fork
            found = subprocess.run(
                [str(program), case], capture_output=True, text=True, timeout=HANGS, env=environment, check=False
            )
            assert found.returncode == 0, (program.name, found.stderr)


@compiled
def test_bits_depend_neither_on_threads_nor_on_company(seed):
    code = """
from dfqvit.evaluation.neighbours import neighbours
for busy in (0, 3):
    with neighbours(busy):
        for count in (1, 2, 3, 8):
            torch.set_num_threads(count)
            for _ in range(5):
                print(digest())
"""
    found = python(code, seed, DFQVIT_CPUS="8")
    assert len(found) == 40
    assert len(set(found)) == 1


@compiled
def test_callers_from_many_threads(seed):
    code = """
torch.set_num_threads(8)
found = []
all = [threading.Thread(target=lambda: found.extend(digest() for _ in range(3))) for _ in range(20)]
[thread.start() for thread in all], [thread.join() for thread in all]
torch.set_num_threads(1)
assert len(found) == 60
print(*found, digest())
"""
    assert len(set(python(code, seed, DFQVIT_CPUS="8"))) == 1


@compiled
@linux
def test_a_child_of_a_fork_computes(seed):
    """After the parent's threads have worked; and in a child of the child."""
    code = """
torch.set_num_threads(4)
def family(generation):
    print(digest(), flush=True)
    assert workers(3) == 3
    if generation < 3:
        child = os.fork()
        if child == 0:
            family(generation + 1)
            sys.stdout.flush()
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        print(digest(), flush=True)
family(1)
"""
    found = python(code, seed, DFQVIT_CPUS="4")
    assert len(found) == 5
    assert len(set(found)) == 1


@compiled
@linux
def test_no_more_threads_than_cpus(seed):
    """One CPU: no thread beside the caller. Torch's setting and the CPUs allowed: the smaller one.

    Each in a child of its own.
    """
    code = """
from dfqvit import _C
def count(threads):
    torch.set_num_threads(threads)
    digest()
    print(_C.parallel_threads(), workers(_C.parallel_threads() - 1))

def narrow():
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})

def fixed():
    os.environ["DFQVIT_CPUS"] = "5"

for work in (lambda: (narrow(), count(8)),
             lambda: (count(8), narrow(), print(_C.parallel_threads())),
             lambda: (fixed(), count(3), count(8))):
    if os.fork() == 0:
        work()
        sys.stdout.flush()
        os._exit(0)
    assert os.wait()[1] == 0
"""
    quota = module.cpu_quota()
    allowed = min(8, len(os.sched_getaffinity(0)), max(1, -int(-quota // 1)) if quota else 8)
    assert list(map(int, python(code, seed))) == [1, 0, allowed, allowed - 1, 1, 3, 2, 5, 4]


@compiled
def test_an_exception_in_a_piece_reaches_the_caller(seed):
    code = """
torch.set_num_threads(8)
broken = torch.randn(1000, 96)
broken[707, 3] = float("nan")
for _ in range(50):
    try:
        rest = (one(0.03), one(128.0), torch.ones(1000), 8, 4, "none", None, None, None, 8, "float32")
        ops.quant_linear(x, broken, None, None, *rest)
    except ValueError as error:
        print("weight" in str(error) and digest())
"""
    found = python(code, seed, DFQVIT_CPUS="8")
    assert len(found) == 50
    assert len(set(found)) == 1
    assert found[0] != "False"


@compiled
def test_a_process_ends_while_threads_spin_sleep_or_compute(seed):
    """Each end is that of a child, forked before there are threads, but the last, which is the process's own."""
    code = """
import time
def company():
    def forever():
        while True: digest()
    for _ in range(3): threading.Thread(target=forever, daemon=True).start()

# Python's own end cuts off threads within C++, which torch does not survive either
children = [lambda: (company(), print(digest(), flush=True), os._exit(0)), lambda: os._exit(0), lambda: time.sleep(0.1)]
for last in [*children, lambda: None]:
    if last in children and (child := os.fork()):
        assert os.waitpid(child, 0)[1] == 0
        continue
    torch.set_num_threads(8)
    for _ in range(3): print(digest(), flush=True)
    last()
    break
"""
    found = python(code, seed, DFQVIT_CPUS="8")
    assert len(found) == 13
    assert len(set(found)) == 1


@compiled
@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        ("0::/a/b\n", {"a/b/cpu.max": "150000 100000", "a/cpu.max": "max 100000"}, 1.5),
        ("0::/a/b\n", {"a/b/cpu.max": "150000 100000", "a/cpu.max": "50000 100000"}, 0.5),
        ("0::/\n", {"cpu.max": "300000 100000"}, 3.0),
        ("0::/\n", {"cpu.max": "max 100000"}, 0.0),
        ("0::/gone\n", {"cpu.max": "250000 100000"}, 2.5),  # seen from within a container
        ("4:memory:/m\n3:cpu,cpuacct:/a\n", {"cpu/a/cpu.cfs_quota_us": "150000", "cpu/a/cpu.cfs_period_us": "50000"}, 3.0),
        ("1:cpu:/a\n0::/\n", {"cpu/a/cpu.cfs_quota_us": "-1", "cpu/a/cpu.cfs_period_us": "100000"}, 0.0),
        ("2:cpuset:/a\n", {"cpu/a/cpu.cfs_quota_us": "1000", "cpu/a/cpu.cfs_period_us": "100000"}, 0.0),
        ("not a line\n", {}, 0.0),
        (None, {}, 0.0),
    ],
)  # fmt: skip
def test_quotas_of_control_groups(tmp_path, groups, files, expected):
    if groups is not None:
        (tmp_path / "proc/self").mkdir(parents=True)
        (tmp_path / "proc/self/cgroup").write_text(groups)
    for name, text in files.items():
        file = tmp_path / "sys/fs/cgroup" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text + "\n")
    assert module.cpu_quota(str(tmp_path)) == expected


def test_neighbours_are_busy_and_end_with_the_block():
    seen = []

    def interrupted():
        with neighbours(3) as processes:
            seen.extend(processes)
            assert [process.poll() for process in processes] == [None] * 3
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert len(seen) == 3
    assert None not in [process.returncode for process in seen]


@linux
def test_neighbours_end_though_their_parent_is_killed():
    code = """
import json, os, signal
from dfqvit.evaluation.neighbours import neighbours
with neighbours(2) as processes:
    print(json.dumps([process.pid for process in processes]), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=HANGS, check=False)
    pids = json.loads(found.stdout)
    assert len(pids) == 2
    while any(_runs(pid) for pid in pids):  # as long as it takes
        pass


def _runs(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


@compiled
@linux
def test_torch_threads_sleep_once_an_operator_has_shared_its_work():
    """Code of torch.compile has regions of OpenMP between our operators; its threads spin for milliseconds after each.

    Counted in processor time, which other processes do not add to. A user's own setting of the spinning stays.
    """
    code = """
import time
if not torch.__config__.parallel_info().count("OpenMP"):
    print(1, 0), sys.exit()
torch.set_num_threads(2)
torch.randn(1 << 20).sin()

def spun():
    rounds, taken = 30, time.process_time()
    for _ in range(rounds):
        torch.ones(1 << 16).add_(1)
        time.sleep(0.01)
    return (time.process_time() - taken) / rounds

before = spun()
list(results())
time.sleep(0.05)
print(before, spun())
"""
    environment = dict.fromkeys(("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"), "")
    before, after = map(float, python(code, OMP_NUM_THREADS="2", DFQVIT_CPUS="2", **environment))
    assert after < 0.5 * before, (before, after)


@pytest.mark.parametrize("count", [0, 1, 3])  # torch.set_num_threads sets it; 0: as many as all have
def test_mathematics_of_mkl_has_one_thread_between_our_operators(count):
    """It counts its threads for itself: sines of a rope waited for OpenMP's, on the processors that ours spin on."""
    module, reason = extension.load()
    if module is None:
        pytest.skip(reason)
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    set_local = getattr(ctypes.CDLL(str(library)), "MKL_Set_Num_Threads_Local", None) if library.exists() else None
    if set_local is None:
        pytest.skip("this torch has no MKL")
    seen = []

    def note():
        before = set_local(0)
        set_local(before)
        seen.append(before)

    before = set_local(count)
    try:
        note()
        module.serial_torch(note)
        module.serial_torch(lambda: (module.lift_serial_torch(), note()))
        note()
    finally:
        set_local(before)
    assert seen == [count, 1, count, count]
