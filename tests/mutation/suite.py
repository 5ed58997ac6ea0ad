"""Runs a selection of the test suite on changed kernels, each time in a new process.

The processes are forked from one that has imported torch and pytest (multiprocessing's fork server), so a run takes
little more than its tests do.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import tempfile
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.reduction import DupFd
from typing import IO, Any

import pytest
import torch

from tests.mutation.mutants import ROOT, Mutant

CPU_SECONDS = 240  # a mutant may loop for ever; no suite takes as long

_context = multiprocessing.get_context("forkserver")
# Not Triton, nor what imports it: it reads the interpreter's switch when it is imported.
_context.set_forkserver_preload(["torch", "pytest", "hypothesis.strategies"])


@dataclass(frozen=True)
class Result:
    ran: int
    failed: str = ""  # the first test that failed, or at which the process died
    why: str = ""


class _Reporter:
    """A pytest plugin: sends the name of each test that begins, and of the first that fails."""

    def __init__(self, connection: Connection, first: str) -> None:
        self.send, self.first = connection.send, first

    def pytest_configure(self, config: pytest.Config) -> None:
        import hypothesis

        # The same examples each time; and a failure is enough, whatever its smallest example is.
        phases = (hypothesis.Phase.explicit, hypothesis.Phase.generate)
        hypothesis.settings.register_profile(
            "mutation", deadline=None, derandomize=True, database=None, phases=phases, report_multiple_bugs=False
        )
        hypothesis.settings.load_profile("mutation")

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items.sort(key=lambda item: item.nodeid != self.first)

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.send(("began", nodeid))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.send(("failed", (report.nodeid, report.longreprtext)))


def _run(connection: Connection, selection: list[str], first: str, environment: dict[str, str], output: Any) -> None:
    descriptor = output.detach()
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.chdir(ROOT)
    os.environ.update(environment)
    torch.set_num_threads(1)  # several of these run side by side
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS + 5))
    arguments = ["-x", "-q", "--tb=short", "-p", "no:cacheprovider", "-p", "no:xdist", "--benchmark-disable"]
    code = pytest.main(["-m", "not slow and not gpu", *arguments, *selection], plugins=[_Reporter(connection, first)])
    connection.send(("exit", int(code)))
    connection.close()
    os._exit(0)  # no destructors of a module that may have written where it should not


def tests_of(mutant: Mutant, backend: str) -> list[str]:
    """The tests of a mutant's operators on a backend, as arguments of pytest."""
    files = [str(p.relative_to(ROOT)) for op in mutant.ops for p in sorted((ROOT / "tests/ops").glob(f"test_{op}*.py"))]
    # Not those of the operator's registration: they are about Python, and slow.
    return [*files, "-k", f"{backend} and not registration and ({mutant.tests or 'test'})"]


def run(selection: list[str], environment: dict[str, str], first: str = "") -> Result:
    """What the selected tests say, of which ``first`` is run first; the environment leads them to the kernels."""
    with tempfile.TemporaryFile() as output:
        return _follow(selection, first, environment, output)


def _follow(selection: list[str], first: str, environment: dict[str, str], output: IO[bytes]) -> Result:
    receiver, sender = _context.Pipe(duplex=False)
    process = _context.Process(target=_run, args=(sender, selection, first, environment, DupFd(output.fileno())))
    process.start()
    sender.close()
    ran, test, why, code = 0, "", "", None
    try:
        while True:
            what, value = receiver.recv()
            if what == "began":
                ran, test = ran + 1, value
            elif what == "failed" and not why:
                test, why = value
            elif what == "exit":
                code = value
    except EOFError:
        process.join()
    if code is None:
        number = -(process.exitcode or 0)
        why = f"out of CPU time ({CPU_SECONDS} s)" if number == signal.SIGXCPU else f"the process died ({number})"
        if not test:
            raise SystemExit(f"pytest died before the first test of {selection}: {why}")
        return Result(ran, test, why)
    if code == pytest.ExitCode.OK:
        return Result(ran)
    if code == pytest.ExitCode.TESTS_FAILED and why:
        return Result(ran, test, why)
    output.seek(0)
    raise SystemExit(f"pytest ended with {code} on {selection}:\n{output.read().decode(errors='replace')}")
