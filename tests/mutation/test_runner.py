"""The mutation run's own rules, without building anything."""

import pytest

from tests.mutation import __main__ as runner
from tests.mutation import killers, mutants, suite
from tests.mutation.killers import UNKNOWN, Killer
from tests.mutation.mutants import DoesNotCompile
from tests.mutation.triton_kernels import Triton

SOURCE = "a = b + c;\nd = b;\n"


def mutant(**changes):
    fields = {"name": "m", "kind": "formula", "file": "x.cu", "find": "b + c", "replace": "b - c"}
    return mutants.Mutant(**{**fields, "ops": ("layer_norm",), "units": ("x.cu",), **changes})


@pytest.fixture
def source(tmp_path, monkeypatch):
    (tmp_path / "x.cu").write_text(SOURCE)
    monkeypatch.setattr(mutants, "ROOT", tmp_path)
    return tmp_path


def test_the_mutants_fit_the_sources():
    found = mutants.load()
    assert len(found) >= 60
    assert {m.file for m in found} >= {"csrc/cuda/attention_forward.cu", "csrc/cuda/norm.cuh"}
    for m in found:
        assert m.triton or m.units, m
        assert all((mutants.ROOT / "csrc" / "cuda" / unit).exists() for unit in m.units), m
        assert all((mutants.ROOT / "tests" / "ops" / f"test_{op}.py").exists() for op in m.ops), m


def test_every_kernel_file_has_mutants():
    found = mutants.load()
    files = {p.name for p in (mutants.ROOT / "csrc" / "cuda").glob("*.cu")} - {"device.cu", "kernels.cu"}
    assert files == {unit for m in found for unit in m.units}
    files = {f"kernels/{p.name}" for p in (mutants.ROOT / "kernels").glob("*.py") if "\n@triton.jit" in p.read_text()}
    assert files == {m.file for m in found if m.triton}


def test_a_mutant_changes_one_place(source):
    assert mutant().mutated() == "a = b - c;\nd = b;\n"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"find": "b"}, "occurs 2 times"),
        ({"find": "nothing"}, "occurs 0 times"),
        ({"replace": "b + c"}, "changes nothing"),
    ],
)
def test_a_mutant_that_does_not_fit_is_refused(source, changes, message):
    with pytest.raises(ValueError, match=message):
        mutant(**changes).mutated()


def test_a_file_of_mutants_reports_all_that_is_wrong(source, tmp_path):
    folder = tmp_path / "mutants"
    folder.mkdir()
    (folder / "x.toml").write_text("""
file = "x.cu"
ops = ["layer_norm"]
units = ["x.cu"]
[[mutant]]
name = "good"
kind = "formula"
find = "b + c"
replace = "b"
[[mutant]]
name = "good"
kind = "formula"
find = "d ="
replace = "e ="
[[mutant]]
name = "stale"
kind = "formula"
find = "gone"
replace = ""
[[mutant]]
name = "typo"
kind = "formula"
fnid = "a"
replace = ""
""")
    with pytest.raises(SystemExit) as refused:
        mutants.load(folder)
    assert [word in str(refused.value) for word in ("two of this name", "occurs 0 times", "fnid")] == [True] * 3


class Runner:
    """Builds nothing, or fails to."""

    def __init__(self, checked, error=None):
        self.checked, self.error = checked, error

    def selection(self, mutant):
        return [self.checked]

    def environment(self, mutant, folder):
        if self.error:
            raise self.error
        return {}


def judged(monkeypatch, by_plain="", by_checked="", language="cuda", last=UNKNOWN, **changes):
    """The outcome where those tests fail; and which runners were asked."""
    asked = []

    def run(selection, environment, first):
        assert first == last.test
        asked.extend(selection)
        return suite.Result(1, by_checked if selection[0] else by_plain, "why")

    monkeypatch.setattr(suite, "run", run)
    return runner.judge(mutant(**changes), {f"{language} {c}": Runner(c) for c in (False, True)}, last), asked


def test_a_triton_mutant_goes_to_the_interpreter_and_then_to_the_sanitizer(monkeypatch):
    outcome, asked = judged(monkeypatch, by_checked="test_b", language="triton", file="kernels/x.py")
    assert (outcome.killer, outcome.runner, asked) == ("test_b", "triton True", [False, True])


def test_a_triton_mutant_is_in_a_copy_of_the_kernels(tmp_path):
    (found, *_) = [m for m in mutants.load() if m.triton]
    environment = Triton(False).environment(found, tmp_path)
    changed = tmp_path / found.file
    assert environment == {"FASTGPT_TRITON_RUNNER": "interpreter", "FASTGPT_TRITON_KERNELS": str(changed.parent)}
    assert changed.read_text() == found.mutated() != (mutants.ROOT / found.file).read_text()
    assert (changed.parent / "launch.py").exists()


def test_the_checked_build_is_asked_where_the_plain_one_notices_nothing(monkeypatch):
    outcome, asked = judged(monkeypatch, by_plain="test_a")
    assert (outcome.killer, outcome.good, asked) == ("test_a", True, [False])
    outcome, asked = judged(monkeypatch, by_checked="test_b")
    assert (outcome.killer, outcome.good, asked) == ("test_b", True, [False, True])


def test_what_only_the_checked_build_sees_is_not_shown_to_the_plain_one(monkeypatch):
    outcome, asked = judged(monkeypatch, by_checked="test_b", checked=True)
    assert (outcome.killer, asked) == ("test_b", [True])


def test_the_runner_that_killed_it_last_is_asked_first(monkeypatch):
    outcome, asked = judged(monkeypatch, by_plain="test_a", by_checked="test_b", last=Killer("test_b", True))
    assert (outcome.killer, asked) == ("test_b", [True])
    outcome, asked = judged(monkeypatch, by_plain="test_a", last=Killer("test_b", True))
    assert (outcome.killer, asked) == ("test_a", [True, False])
    outcome, asked = judged(monkeypatch, last=Killer("test_b", True))
    assert (outcome.killer, asked) == ("", [True, False])


def test_killers_are_remembered_of_the_mutants_that_there_are(tmp_path, monkeypatch):
    monkeypatch.setattr(killers, "FILE", tmp_path / "killers.json")
    assert killers.load() == {}
    both = {"a": Killer("test_a[é]"), "b": Killer("test_b", True)}
    killers.save(both, ["a", "b"])
    assert killers.load() == both
    killers.save({"b": Killer("test_c"), "c": Killer()}, ["b", "c"])
    assert killers.load() == {"b": Killer("test_c")}


def test_a_survivor_fails_the_run(monkeypatch):
    outcome, _ = judged(monkeypatch)
    text, good = runner.verdict([outcome, runner.Outcome(mutant(name="other"), "test_a")])
    assert not good
    assert "killed 1 of 2 mutants (50.0 %)" in text
    assert "SURVIVED  x.cu: m" in text


def test_an_equivalent_mutant_must_survive(monkeypatch):
    outcome, asked = judged(monkeypatch, equivalent="the same value")
    assert runner.verdict([outcome]) == (
        "killed 0 of 0 mutants (0.0 %)\nequivalent  x.cu: m: the same value",
        True,
    )
    assert asked == [False, True]
    outcome, _ = judged(monkeypatch, by_checked="test_b", equivalent="the same value")
    text, good = runner.verdict([outcome])
    assert not good
    assert "NOT EQUIVALENT  x.cu: m: test_b" in text


def test_a_mutant_that_does_not_compile_is_no_kill():
    outcome = runner.judge(mutant(), {"cuda False": Runner(False, DoesNotCompile("error: no such thing"))})
    text, good = runner.verdict([outcome])
    assert not good
    assert "killed 0 of 1" in text
    assert "error: no such thing" in text


def test_results_come_from_a_process_of_their_own(tmp_path):
    (tmp_path / "test_it.py").write_text(
        "import os\ndef test_good(): pass\ndef test_bad(): assert os.environ['FASTGPT_SIMT_LIBRARY'] == 'mine'\n"
        "def test_dies(): os.kill(os.getpid(), 9)\n"
    )
    path = str(tmp_path / "test_it.py")
    sound = suite.run([path, "-k", "good"], {})
    assert sound == suite.Result(1)
    failed = suite.run([path, "-k", "not dies"], {})
    assert failed.failed.endswith("test_bad")
    assert "KeyError" in failed.why
    first = suite.run([path], {}, failed.failed)
    assert (first.ran, first.failed) == (1, failed.failed)
    dead = suite.run([path, "-k", "dies"], {})
    assert dead.failed.endswith("test_dies")
    assert "died (9)" in dead.why
    with pytest.raises(SystemExit, match="pytest ended with 5 "):
        suite.run([path, "-k", "nothing"], {})
