"""What `fastgpt bench` makes of measured rows: floors, exponents, tables, pictures, comparisons. Nothing is timed."""

import copy
import json
import types

import pytest
import torch

from benchmarks import ceilings, compare, conftest, harness, memory, plots, publish, report
from fastgpt.files import write_json

CEILINGS = {"1": {"copy": 20e9, "read": 25e9, "float32": 100e9, "bfloat16": 200e9}}


def row(suite="gelu", seconds=1e-3, ratio=2.0, *, peer="torch", half=0.01, **changes):
    """A row as report.rows makes it; ``half``: half of the ratio's interval, as a fraction."""
    made = {
        "suite": suite,
        "name": suite,
        "case": {"work": "forward", "dtype": "float32"},
        "shape": "4096 x 768",
        "dtype": "float32",
        "backend": "cpu",
        "threads": 1,
        "bytes": 12.5e6,
        "flops": 1e6,
        "memory": 5_000_000,
        "spread": 0.02,
        "peers": {
            peer: {
                "seconds": seconds * ratio,
                "spread": 0.01,
                "ratio": ratio,
                "interval": [ratio * (1 - half), ratio * (1 + half)],
                "memory": 20_000_000,
            }
        },
        "missing": {},
        "scale": None,
        "seconds": seconds,
        "rounds": 25,
        "other": {},
        **changes,
    }
    return {**made, "floor": ceilings.floor(made, CEILINGS["1"])}


def document(*rows, complete=True, **machine):
    made = report.document(rows, CEILINGS, complete=complete, command="fastgpt bench")
    return {**made, "machine": {**made["machine"], "commit": "abc1234", **machine}}


def test_the_floor_is_the_slower_of_memory_and_products():
    top = CEILINGS["1"]
    assert ceilings.floor({"bytes": 50e6, "flops": None, "dtype": "float32"}, top) == pytest.approx(2e-3)
    assert ceilings.floor({"bytes": 50e6, "flops": 400e6, "dtype": "float32"}, top) == pytest.approx(4e-3)
    assert ceilings.floor({"bytes": 50e6, "flops": 400e6, "dtype": "bfloat16"}, top) == pytest.approx(2e-3)
    assert ceilings.floor({"bytes": None, "flops": 400e6, "dtype": "float16"}, top) is None
    assert ceilings.floor({"bytes": None, "flops": None, "dtype": "float32"}, top) is None
    assert ceilings.best({"copy": 1.0, "read": 5.0}, {"copy": 2.0, "read": 4.0}) == {"copy": 2.0, "read": 5.0}


@pytest.mark.parametrize("power", [0.0, 1.0, 1.7, 2.0])
def test_the_exponent_of_a_power_law(power):
    sizes = [128, 256, 1024, 4096]
    assert report.fitted_exponent(sizes, [3e-6 * n**power for n in sizes]) == pytest.approx(power, abs=1e-9)


def test_one_size_has_no_exponent():
    with pytest.raises(ValueError, match=r"at least two different sizes, not \[128\]"):
        report.fitted_exponent([128, 128], [1.0, 2.0])


def test_curves_are_gathered_by_series():
    rows = [
        row("scaling", n * 1e-6, case={"length": n, "dtype": dtype}, dtype=dtype, scale=["T", n])
        for dtype in ("float32", "bfloat16")
        for n in (256, 128, 512)
    ]
    rows.append(row("scaling", case={"rows": 7}, scale=["V", 7]))  # one size: no curve
    rows[0]["peers"] = {}  # a peer without that size: no curve of its own
    first, second = report.exponents(rows)
    assert (first["series"], first["variable"], first["sizes"]) == ("scaling float32", "T", [128, 256, 512])
    assert first["exponents"].keys() == {"ours"}
    assert second["exponents"] == {"ours": pytest.approx(1.0), "torch": pytest.approx(1.0)}


def test_spread_and_interval():
    assert harness.spread([1.0, 1.0, 1.0]) == 0
    assert harness.spread([0.9, 1.0, 1.1, 50.0]) == pytest.approx(1.4826 * 0.1 / 1.05)  # one outlier does not count
    low, high = harness.interval([2.0, 2.2, 1.8, 2.1, 1.9] * 4, [1.0, 1.1, 0.9, 1.05, 0.95] * 4)
    assert low == pytest.approx(2) == high  # noise that hits both alike is none
    low, high = harness.interval([1.8, 2.2, 2.0], [1.0, 1.0, 1.0])
    assert low == pytest.approx(1.8)
    assert high == pytest.approx(2.2)


class Benchmark:
    """pytest-benchmark's fixture, as far as versus needs it, with a made-up clock."""

    fullname = "benchmarks/gelu.py::test_gelu[forward]"
    name = "test_gelu[forward]"

    def __init__(self):
        self.extra_info, self.params = {}, {"work": "forward", "dtype": torch.bfloat16}

    def pedantic(self, call, setup, rounds, iterations):
        for _ in range(rounds):
            setup()
            call()
        self.stats = types.SimpleNamespace(
            stats=types.SimpleNamespace(data=[1e-3] * rounds, median=1e-3, rounds=rounds)
        )


def test_rows_name_what_is_missing(monkeypatch):
    monkeypatch.setattr(harness.settings, "seconds", 0.0)
    order = []

    def broken():
        raise RuntimeError("no compiler\nmore")

    def peer():
        order.append("peer")

    benchmark, before = Benchmark(), torch.get_num_threads()
    ours = harness.forward(lambda x: order.append(("ours", torch.get_num_threads())), torch.ones(3, 4))
    absent = {"flash-attn": harness.Missing(), "Liger": None, "compiled": harness.Missing("left out"), "odd": broken}
    harness.versus(benchmark, ours, {"torch": peer, **absent}, bytes=100, flops=10, threads=2, scale=("T", 8))
    assert torch.get_num_threads() == before
    assert order[-6:] == ["peer", ("ours", 2)] * 3  # they take turns
    benchmark.stats = benchmark.stats.stats
    (made,) = report.rows([benchmark], {"2": CEILINGS["1"]})
    assert made["missing"] == {
        "flash-attn": "not installed",
        "Liger": "not installed",
        "compiled": "left out",
        "odd": "RuntimeError: no compiler",
    }
    assert made["peers"].keys() == {"torch"}
    assert (made["suite"], made["name"], made["case"]) == ("gelu", "gelu", {"work": "forward", "dtype": "bfloat16"})
    assert (made["shape"], made["dtype"], made["backend"], made["threads"]) == ("3 x 4", "bfloat16", "cpu", 2)
    assert made["floor"] == 100 / 25e9
    json.dumps(made)
    assert "compiled: left out" in report.cells(made)[-1]


def test_a_row_says_that_ours_fell_back(monkeypatch):
    monkeypatch.setattr(harness.settings, "seconds", 0.0)
    from fastgpt import ops

    benchmark = Benchmark()
    ours = harness.forward(ops.gelu, torch.ones(3, 4, dtype=torch.float64))
    harness.versus(benchmark, ours, {})
    assert benchmark.extra_info["backend"].startswith("reference: ")


def test_missing_functions_stay_missing(monkeypatch):
    monkeypatch.setattr(harness.settings, "quick", True)
    absent = harness.compiled(torch.nn.functional.gelu)
    assert absent == harness.Missing("left out of a quick run")
    assert harness.forward(absent, torch.ones(3)) is absent
    assert harness.forward_backward(absent, torch.ones(3)) is absent


@pytest.mark.skipif(not memory._RESET.exists(), reason="the system does not tell a process's greatest size")
def test_peak_memory_counts_what_is_freed_again():
    def call():
        scratch = torch.ones(8 << 20)  # 32 MB, and 16 MB beside it
        return scratch[: 4 << 20] + 1

    call()
    assert 47e6 < memory.peak(call) < 56e6
    assert memory.peak(lambda: None) < 5e6


def test_marks_choose_cases_by_their_parameters(pytester_item):
    assert conftest.marked(pytester_item(work="forward", n=3), "quick")
    assert conftest.marked(pytester_item(work="forward", n=2), "quick")
    assert not conftest.marked(pytester_item(work="forward", n=4), "quick")
    assert not conftest.marked(pytester_item(work="backward", n=3), "quick")
    assert not conftest.marked(pytester_item(work="forward", n=3), "long")
    with pytest.raises(pytest.UsageError, match=r"'quick' names no parameter of it: \['work'\]"):
        conftest.marked(pytester_item(n=3), "quick")


@pytest.fixture
def pytester_item():
    """Makes what looks like a collected case with the mark quick(work="forward", n=[2, 3])."""
    mark = types.SimpleNamespace(kwargs={"work": "forward", "n": [2, 3]})

    def make(**params):
        return types.SimpleNamespace(
            nodeid="x",
            callspec=types.SimpleNamespace(params=params),
            iter_markers=lambda name: [mark] if name == "quick" else [],
        )

    return make


def test_the_page_and_the_pictures(tmp_path):
    rows = [row(), row("attention", 4e-3, 0.5, missing={"flash-attn": "not installed"}, memory=None)]
    rows += [row("scaling", n * 1e-6, case={"length": n}, scale=["T", n], name="sample") for n in (128, 256)]
    paths = publish.write(document(*rows, complete=False), tmp_path)
    assert [p.name for p in paths] == ["bench.json", "bench.md", "speedup.png", "roofline.png", "scaling.png"]
    text = (tmp_path / "bench.md").read_text()
    assert "cases are missing" in text
    assert "| 1 | 20.0 | 25.0 | 100 | 200 |" in text
    peer = "torch 2 ms (2.00x, 95 % in 1.98 to 2.02)"
    shape = "4096\u00a0x\u00a0768"
    assert (
        f"| forward | {shape} | float32 | cpu | 1 | 1 ms | 2% | 12.5 | 1 | 50% | 2.00x | 5.0 MB (20 MB) | {peer} |"
        in text
    )
    assert "| 0.50x |  | torch 2 ms (0.50x, 95 % in 0.49 to 0.51), flash-attn: not installed |" in text
    assert report.cells(rows[0])[1:] == ["float32", "1", "1 ms", "2%", "50%", "2.00x", "5.0 MB (20 MB)", "2.00x torch"]
    assert "| sample | T | 128 to 256 | 1.00 | 1.00 |" in text
    assert "![roofline](roofline.png)" in text
    assert report.read(tmp_path / "bench.json")["rows"][0]["case"] == {"work": "forward", "dtype": "float32"}
    assert not list(tmp_path.glob("*.tmp"))


def test_a_run_without_peers_or_flops_draws_what_it_can(tmp_path):
    assert plots.draw(document(row(peers={}, flops=None)), tmp_path) == []


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "x.json"
    for content, message in (
        ({"rows": []}, "is not a results file of `fastgpt bench`"),
        ([1], "is not a results file of `fastgpt bench`"),
        ({**document(), "schema": 99}, "has schema 99; this version of fastgpt reads schema 1"),
    ):
        write_json(path, content)
        with pytest.raises(ValueError, match=message):
            report.read(path)


def compared(tmp_path, old, new):
    for name, content in (("a", old), ("b", new)):
        write_json(tmp_path / f"{name}.json", content)
    return compare.comparison(tmp_path / "a.json", tmp_path / "b.json")


def test_changes_beyond_the_noise(tmp_path):
    rows = [row(), row("rotary"), row("swiglu"), row("adamw", half=0.3), row("sample", memory=10_000_000)]
    later = copy.deepcopy(rows)
    for changed, ratio in zip(later, (3.0, 1.5, 2.04, 2.5, 2.0), strict=False):
        peer = changed["peers"]["torch"]
        scale = ratio / peer["ratio"]
        peer["interval"] = [end * scale for end in peer["interval"]]
        peer["ratio"] = ratio
        changed["seconds"] /= scale
    later[4]["memory"] = 20_000_000
    old, new = document(*rows, row("embedding")), document(*later, row("generate"))
    text = compared(tmp_path, old, new)
    assert "warning" not in text
    slower, faster, used, only_a, only_b, rest = text.split("\n\n")[1:]
    assert slower.splitlines() == [
        "slower:",
        "  rotary forward float32  0.75x as fast against torch  noise 6%  1 ms -> 1.33 ms",
    ]
    assert faster.splitlines() == [
        "faster:",
        "  gelu forward float32  1.50x as fast against torch  noise 6%  1 ms -> 667 us",
    ]
    assert used.splitlines() == ["memory:", "  sample forward float32  10 MB -> 20 MB"]
    assert only_a.splitlines() == ["only in A:", "  embedding forward float32"]
    assert only_b.splitlines() == ["only in B:", "  generate forward float32"]
    assert rest == "3 of 5 rows in both are the same within the noise."


def test_the_quietest_common_peer_is_the_control():
    old, new = row(half=0.4), row(half=0.4)
    for some, ratio in ((old, 4.0), (new, 5.0)):
        some["peers"]["compiled"] = {**some["peers"]["torch"], "ratio": ratio, "interval": [ratio, ratio]}
    found = compare.change(old, new, same_machine=False)
    assert (found.against, found.factor, found.counts) == ("compiled", 1.25, True)


def test_without_a_common_peer_times_count_on_the_same_machine_alone():
    old, new = row(peer="one"), row(seconds=2e-3, peer="two")
    assert compare.change(old, new, same_machine=False) is None
    found = compare.change(old, new, same_machine=True)
    assert (found.against, found.factor, found.counts) == ("time", 0.5, True)


def test_other_machines_and_versions_are_warned_of(tmp_path):
    old, new = document(row(peer="one")), document(row(peer="two"), cpu="Another", torch="9.9", complete=False)
    text = compared(tmp_path, old, new)
    assert "warning: measured on different machines (cpu " in text
    assert "'Another'" in text
    assert "warning: the peers or the system differ (torch " in text
    assert "warning: B is not complete" in text
    assert "not comparable (no peer in both):\n  gelu forward float32" in text
    assert "0 of 1 rows in both are the same within the noise." in text


def test_a_run_in_parts():
    old = document(row("gelu", 1.0), row("sample", 2.0))
    new = document(row("gelu", 3.0), row("adamw", 4.0))
    both = report.merged(old, new)
    assert [(r["suite"], r["seconds"]) for r in both["rows"]] == [("adamw", 4.0), ("gelu", 3.0), ("sample", 2.0)]
    assert both["complete"]
    with pytest.raises(ValueError, match="cannot be kept beside new ones: commit 'other', now 'abc1234'"):
        report.merged(document(row(), commit="other"), new)


def test_publishing(tmp_path, monkeypatch):
    case = {"work": "forward"}
    monkeypatch.setattr(publish, "LINES", [("gelu forward", "gelu", case)])
    (tmp_path / "README.md").write_text(f"before\n{publish.BEGIN}\nold\n{publish.END}\nafter\n")
    source = tmp_path / "bench.json"
    slow = row("swiglu", ratio=0.5)
    write_json(source, found := document(row(), slow))
    paths = publish.publish(source, tmp_path)
    assert {p.name for p in paths} >= {"benchmarks.json", "benchmarks.md", "README.md", "speedup.png"}
    readme = (tmp_path / "README.md").read_text()
    assert readme == f"before\n{publish.BEGIN}\n{publish.table(found)}{publish.END}\nafter\n"
    assert "| gelu forward | 2.00x torch (50%) |  |" in readme
    worst = "1 of the 2 cases are slower than their best peer, the slowest swiglu forward float32 (0.50x torch)."
    assert worst in readme
    assert "![speedup](images/benchmarks/speedup.png)" in (tmp_path / "docs" / "benchmarks.md").read_text()

    monkeypatch.setattr(publish, "LINES", [("dance", "dance", case)])
    with pytest.raises(ValueError, match="no row for README's line 'dance'"):
        publish.publish(source, tmp_path)
    write_json(source, document(row(), complete=False))
    with pytest.raises(ValueError, match="is not complete"):
        publish.publish(source, tmp_path)
    with pytest.raises(ValueError, match="no place for the table"):
        publish.with_table("nothing", "table")
