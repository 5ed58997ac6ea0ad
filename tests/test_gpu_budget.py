"""The budget of compiled kernels: the file's errors, every kind of violation, and what --update writes."""

import dataclasses
import json

import pytest

from fastgpt.gpu import budget
from fastgpt.gpu.code import CSRC, RUNS_ALSO_ON, Kernel, matches, short_name, source_of

HEAD = """
[[rule]]
kernels = ["*"]
except = ["copy*"]
forbidden = ["LDL", "STG.U8"]
because = "local memory"

[[rule]]
kernels = ["sum*"]
required = ["LDG.128"]
because = "narrow loads"
"""


def kernel(name="sum<float>", architecture=80, **changes):
    fields = {
        "source": "sums",
        "registers": 30,
        "shared": 32,
        "stack": 0,
        "threads": 256,
        "opcodes": {"LDG.E.128.CONSTANT": 2, "STG.E.128": 1, "BAR.SYNC.DEFER_BLOCKING": 1},
        "runs_also_on": RUNS_ALSO_ON.get(architecture, ()),
    }
    return Kernel(name=name, architecture=architecture, **{**fields, **changes})


def updated(kernels, launches=None, text=HEAD):
    known = budget.parse(text)
    return budget.parse(budget.render(known.head, budget.measure(kernels, launches or {}, known)))


def sentences(violations):
    return [str(v) for v in violations]


def test_opcodes_match_by_name_and_modifiers():
    assert matches("LDG.E.128.CONSTANT", "LDG.128")
    assert matches("LDG.E.128.CONSTANT", "LDG")
    assert not matches("LDG.E.64", "LDG.128")
    assert not matches("LDGSTS.E.BYPASS.128", "LDG.128")
    assert kernel().count("LDG.128") == 2
    assert kernel().instructions == 4


def test_names_are_the_emulators():
    mangled = (
        "_ZN7fastgpt4cuda46_GLOBAL__N__5403cbe5_13_layer_norm_cu_a5cba1ee25layer_norm_forward_kernelINS0_3f16EfEEv"
        "NS_16LayerNormForwardE"
    )
    assert short_name(mangled) == "layer_norm_forward_kernel<f16, float>"
    assert source_of(mangled) == "layer_norm"
    assert short_name("_Z3fooILi64ELb1ELj4EEvPf") == "foo<64, true, 4>"
    assert short_name("_Z3addPfS_") == "add"
    assert short_name("plain_c_name") == "plain_c_name"
    assert source_of("_Z3addPfS_") == "?"


def test_what_was_measured_is_within_the_budget():
    kernels = [kernel(), kernel(architecture=90, registers=33)]
    written = updated(kernels)
    limits = written.kernels["sum<float>"]
    assert (limits.registers, limits.shared, limits.dynamic, limits.threads) == (40, 32, 0, 256)
    assert limits.blocks == {80: 8, 86: 6, 89: 6, 90: 6}  # sm_86 and sm_89 run sm_80's code
    assert budget.check(kernels, written, {}) == []
    assert written.head.strip() == HEAD.strip()
    assert updated(kernels, text=budget.render(written.head, budget.measure(kernels, {}, written))) == written


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"registers": 33}, "sum<float> on sm_80: 33 registers, 32 allowed"),
        ({"shared": 64}, "sum<float> on sm_80: 64 bytes of shared memory, 32 allowed"),
        ({"stack": 16}, "sum<float> on sm_80: 16 bytes of local memory a thread, 0 allowed"),
        ({"shared": 90 << 10}, "sum<float> on sm_80: 1 blocks per SM, at least 8 wanted"),
        ({"opcodes": {"LDG.E.64": 1}}, "sum<float> on sm_80: no LDG.128, which it must have"),
        ({"opcodes": {"LDG.E.128": 1, "LDL.LU": 3}}, "sum<float> on sm_80: 3 x LDL, which it must not have"),
        ({"opcodes": {"LDG.E.128": 1, "STG.E.U8": 128}}, "sum<float> on sm_80: 128 x STG.U8, which it must not have"),
        ({"name": "sum<f16>"}, "sum<f16>: is not in the budget file"),
        ({"name": "sum<f16>"}, "sum<float>: is in the budget file, but not in the build"),
    ],
)
def test_every_limit_is_held(changes, sentence):
    written = updated([kernel()])
    assert sentence in sentences(budget.check([kernel(**changes)], written, {}))


def test_a_violation_knows_its_cause():
    written = updated([kernel()])
    (found,) = budget.check([kernel(opcodes={"LDG.E.128": 1, "STG.E.U8": 2})], written, {})
    assert (found.cause, found.patterns, found.source) == ("local memory", ("STG.U8",), "sums")


def test_exceptions_and_rules_without_kernels():
    copy = kernel("copy<float>", opcodes={"LDL.LU": 1})
    kernels = [copy, kernel("scale<float>")]
    written = updated(kernels)
    assert sentences(budget.check(kernels, written, {})) == ["sum*: a rule for kernels that do not exist"]


def test_a_rule_may_be_for_some_architectures():
    text = HEAD.replace('required = ["LDG.128"]', 'on = ["sm_90"]\nrequired = ["HGMMA"]')
    kernels = [kernel(), kernel(architecture=90)]
    written = updated(kernels, text=text)
    assert sentences(budget.check(kernels, written, {})) == ["sum<float> on sm_90: no HGMMA, which it must have"]
    assert budget.check(kernels[:1], updated(kernels[:1], text=text), {}) == []


def test_launches_give_the_dynamic_shared_memory(tmp_path):
    (tmp_path / "gw0.json").write_text(json.dumps({"sum<float>": [[128, 1000], [64, 40000]]}))
    (tmp_path / "gw1.json").write_text(json.dumps({"sum<float>": [[128, 50000]]}))
    launches = budget.load_launches(tmp_path)
    assert launches == {"sum<float>": {(128, 1000), (64, 40000), (128, 50000)}}
    written = updated([kernel()], launches)
    limits = written.kernels["sum<float>"]
    assert (limits.threads, limits.dynamic, limits.blocks[80], limits.blocks[86]) == (128, 50000, 3, 2)
    assert budget.check([kernel()], written, launches) == []
    assert budget.check([kernel()], written, {}) == []  # nothing was recorded: the budget's own figures
    more = {"sum<float>": {(128, 60000)}, "mean<float>": {(32, 0)}}
    assert sentences(budget.check([kernel()], written, more)) == [
        "mean<float>: was launched on the emulator, but is not in the build",
        "sum<float> on sm_86: 1 blocks per SM, at least 2 wanted",
        "sum<float> on sm_89: 1 blocks per SM, at least 2 wanted",
        "sum<float> on sm_80: 2 blocks per SM, at least 3 wanted",
        "sum<float>: launched with 60000 bytes of dynamic shared memory, 50000 allowed",
    ]


LINE = '[kernels.sums]\n"sum" = { registers = 32, shared = 0, dynamic = 0, threads = 64, blocks = { sm_80 = 8 } }\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[rule]", "not TOML"),
        ("[rules]", "unknown table 'rules'; allowed are rule, kernels"),
        ('[[rule]]\nkernels = ["*"]\nbecause = "x"', "rule 1: it requires nothing and forbids nothing"),
        ('[[rule]]\nkernels = "*"\nbecause = "x"', r"rule 1: kernels = '\*' is not of type list"),
        ('[[rule]]\nkernels = ["*"]\nforbidden = ["LDL"]', "rule 1: because is missing"),
        ('[[rule]]\nkernel = ["*"]', "rule 1: unknown key 'kernel'; allowed are kernels, except"),
        (
            '[[rule]]\nkernels = ["*"]\nrequired = ["X"]\non = ["sm_70"]\nbecause = "x"',
            "rule 1: on = 'sm_70' is unknown",
        ),
        (LINE.replace("32", "true"), "sum: registers = True is not of type int"),
        (LINE.replace("sm_80", "sm_81"), "sum: blocks: unknown key 'sm_81'; allowed are sm_80, sm_86"),
        (LINE.replace("threads = 64, ", ""), "sum: threads is missing"),
    ],
)
def test_mistakes_in_the_file_are_named(tmp_path, text, message):
    path = tmp_path / "budget.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        budget.load(path)
    assert str(error.value).startswith(str(path))


def test_the_line_of_a_kernel_is_read():
    assert dataclasses.asdict(budget.parse(LINE).kernels["sum"]) == {
        "registers": 32, "shared": 0, "dynamic": 0, "threads": 64, "blocks": {80: 8},
    }  # fmt: skip


def test_the_budget_of_this_checkout_is_sound():
    own = budget.load(CSRC / "cuda" / "budget.toml")
    assert own.kernels
    assert any("LDL" in rule.forbidden and rule.kernels == ("*",) for rule in own.rules)
