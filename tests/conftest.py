import itertools
import json
import os
import shutil
import signal
import sys
import zlib
from pathlib import Path

import hypothesis
import pytest
import torch

from tests import triton_runner  # before fastgpt and Triton: it sets their switch

# isort: split
from fastgpt.ops import native

hypothesis.settings.register_profile("fastgpt", deadline=None)  # tests do not time
hypothesis.settings.load_profile("fastgpt")


def pytest_configure(config):
    # A shell starts what runs in the background with SIGINT ignored, and Python leaves it so; but Ctrl-C is tested too.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # One test process per core (pytest-xdist): thread pools that spin against each other would take minutes.
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1)
    # `make sanitize`: ThreadSanitizer sees what the core's own loop does, but not torch's pool.
    if threads := os.environ.get("FASTGPT_OWN_THREADS"):
        native._C.set_parallel_functions(0, 0)
        native._C.set_own_threads(int(threads))


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu"):
        if not native._C.cuda.compiled:
            pytest.skip("CUDA is not in this build")
        if not torch.cuda.is_available():
            pytest.skip("there is no GPU")
    if why := triton_runner.why_skipped(item):
        pytest.skip(why)


# --- Triton kernels without a GPU ---


def pytest_collection_modifyitems(config, items):
    for item in items:
        if triton_runner.RUNNER != "GPU" and triton_runner.uses_triton(item):
            item.add_marker("triton")
    if left_out := triton_runner.left_out(items):
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


@pytest.fixture(autouse=True)
def on_triton_runner(request):
    with triton_runner.running(request.node):
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
