import contextlib
import functools
import importlib.util
import itertools
import json
import os
import shutil
import sys
import zlib
from pathlib import Path

import hypothesis
import pytest
import torch

# What runs Triton kernels where there is no GPU: "interpreter" is Triton's own, which reads its switch when a kernel is
# defined; "sanitizer" runs Triton's intermediate code and looks for races and stray accesses.
TRITON_RUNNER = "GPU" if torch.cuda.is_available() else os.environ.get("FASTGPT_TRITON_RUNNER", "interpreter")
if TRITON_RUNNER == "interpreter":
    os.environ["TRITON_INTERPRET"] = "1"

from fastgpt.ops import native  # noqa: E402

hypothesis.settings.register_profile("fastgpt", deadline=None)  # tests do not time
hypothesis.settings.load_profile("fastgpt")


def pytest_configure(config):
    # One test process per core (pytest-xdist): thread pools that spin against each other would take minutes.
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1)


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu"):
        if not native._C.cuda.compiled:
            pytest.skip("CUDA is not in this build")
        if not torch.cuda.is_available():
            pytest.skip("there is no GPU")
    if _is_skipped_bfloat16(item):
        pytest.skip("Triton's interpreter computes bfloat16 wrongly; the sanitizer runs it")


# --- Triton kernels without a GPU ---


def quicken_interpreter():
    """Triton's interpreter patches its language again for every call of a device function, which takes a millisecond,
    more than the function itself. Once per launch and module is enough."""
    from triton.runtime import interpreter

    patch, execute, patched = interpreter._patch_lang, interpreter.GridExecutor.__call__, set()

    def patch_once(function):
        module = id(function.__globals__)
        if module not in patched:
            patched.add(module)
            return patch(function)

    def execute_afresh(self, *args, **kwargs):
        patched.clear()
        execute(self, *args, **kwargs)

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch_once, execute_afresh


if TRITON_RUNNER == "interpreter" and not native.NO_TRITON:
    quicken_interpreter()


def _uses_triton(item):
    return "triton" in getattr(getattr(item, "callspec", None), "params", {}).values()


@functools.cache
def remember_compiled_kernels():
    """ttsem compiles a kernel down to machine code and parses it at each launch, which takes longer than running it:
    no further than the stage that is run, and once for each specialisation, is enough."""
    from ttsem import harness, mlir

    texts = {}
    mlir.enable_generic_printing()

    def ir_of_specialisation(record, stage, target):
        options, *specialisation = harness._specialize(record.fn, record.args, record.kwargs, target)
        key = (record.fn, stage, str(target), str(options), str(specialisation))
        if key not in texts:
            texts[key] = mlir.to_generic(harness._stage_text(record, stage, target), None)
        return texts[key]

    harness.ir_for_launch = ir_of_specialisation
    mlir.parse = functools.cache(mlir.parse)  # nothing changes a parsed module


def _is_skipped_bfloat16(item):
    return TRITON_RUNNER == "interpreter" and _uses_triton(item) and torch.bfloat16 in item.callspec.params.values()


def _in_few(items):
    """As few of ``items``, tests by parameters, as hold every value that a parameter has in them."""
    values = {item: {(name, repr(value)) for name, value in item.callspec.params.items()} for item in items}
    missing, chosen = set().union(*values.values()), []
    while missing:
        chosen.append(max(items, key=lambda item: len(values[item] & missing)))
        missing -= values[chosen[-1]]
    return chosen


def pytest_collection_modifyitems(config, items):
    """A call on Triton's runners takes seconds: see the mark few_interpreted."""
    groups, left_out = {}, set()
    for item in items:
        if TRITON_RUNNER != "GPU" and item.get_closest_marker("few_interpreted") and _uses_triton(item):
            groups.setdefault((item.path, item.originalname), []).append(item)
    for group in groups.values():
        left_out |= set(group) - set(_in_few([item for item in group if not _is_skipped_bfloat16(item)]))
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


@contextlib.contextmanager
def sanitized_triton():
    """Triton kernels on CPU tensors by ttsem, which raises on a race, a stray access or an undefined result."""
    from triton.runtime import driver
    from ttsem import _fakedriver, sanitize

    remember_compiled_kernels()
    before = driver._active
    with sanitize.session(cuda_is_cpu=False), native.triton_on_cpu():
        _fakedriver.unstub_torch_cuda()
        yield
    driver._active = before


def _patch_language_once():
    """Triton's interpreter replaces the functions of triton.language when a kernel starts, and again in every call of a
    device function, which takes longer than most of them do. Once is enough."""
    from triton.runtime import interpreter

    language, patch = interpreter.tl, interpreter._patch_lang

    def patch_once(function):
        modules = [m for m in function.__globals__.values() if m is language or m is language.core]
        if modules and not any(language.core.is_builtin(m.arange) for m in modules):
            return interpreter._LangPatchScope()
        return patch(function)

    interpreter._patch_lang = patch_once


if TRITON_RUNNER == "interpreter" and importlib.util.find_spec("triton"):
    _patch_language_once()


@pytest.fixture(autouse=True)
def triton_runner(request):
    with (
        sanitized_triton() if TRITON_RUNNER == "sanitizer" and _uses_triton(request.node) else contextlib.nullcontext()
    ):
        yield


# --- the emulator's schedule: in which order threads and blocks run, and when asynchronous copies arrive ---

SCHEDULES = [
    {"order": order, "seed": seed, "lazy_copies": lazy}
    for (order, seed), lazy in itertools.product([("forward", 0), ("reverse", 0), ("random", 1)], (False, True))
]


def _schedule(request, schedule):
    for emulator in filter(None, (native._simt, native._simt_checked)):
        emulator.configure(**schedule)
    if native._simt is not None:
        request.node.add_report_section("call", "schedule of the emulator", str(schedule))


@pytest.fixture(autouse=True)
def own_schedule(request):
    """Each test has a schedule of its own, always the same one; a failure's report says which."""
    chosen = zlib.crc32(request.node.nodeid.encode())
    _schedule(request, {**SCHEDULES[chosen % len(SCHEDULES)], "seed": chosen})


@pytest.fixture(params=SCHEDULES, ids=lambda s: f"{s['order']}-{'lazy' if s['lazy_copies'] else 'eager'}")
def every_schedule(request, own_schedule):
    """Runs a test once under each kind of schedule."""
    _schedule(request, request.param)
    return request.param


# What the emulator launched in this run, for `fastgpt gate`: the dynamic shared memory of a kernel is in no cubin.
LAUNCHES = Path(__file__).resolve().parents[1] / "build" / "launches"


def pytest_sessionstart(session):
    if "PYTEST_XDIST_WORKER" not in os.environ and not session.config.option.collectonly:
        shutil.rmtree(LAUNCHES, ignore_errors=True)


def pytest_sessionfinish(session):
    shapes = {}
    for name in ("fastgpt._simt", "fastgpt._simt_checked"):
        if name in sys.modules:
            for kernel, threads, dynamic_shared, _ in sys.modules[name].launches():
                shapes.setdefault(kernel, set()).add((threads, dynamic_shared))
    if shapes:
        LAUNCHES.mkdir(parents=True, exist_ok=True)
        path = LAUNCHES / f"{os.environ.get('PYTEST_XDIST_WORKER', 'main')}.json"
        path.write_text(json.dumps({kernel: sorted(found) for kernel, found in sorted(shapes.items())}))


@pytest.fixture
def emulated_schedules(request, own_schedule):
    """Calling it yields every kind of schedule in turn, for tests that compare what comes out under each."""
    if native._simt is None:
        pytest.skip("this build has no emulator (FASTGPT_SIMT=on)")

    def schedules():
        for schedule in SCHEDULES:
            _schedule(request, schedule)
            yield schedule

    return schedules


@pytest.fixture
def restore_threads():
    """Lets a test change the thread count."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
