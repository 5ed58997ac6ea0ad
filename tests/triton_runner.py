"""Runs Triton kernels in the tests, where there may be no GPU (docs/triton.md).

FASTGPT_TRITON_RUNNER chooses what runs them there: "interpreter" is Triton's own; "sanitizer" executes the intermediate
code that Triton's compiler makes, and looks for races and stray accesses.
"""

import contextlib
import functools
import os

import torch

RUNNER = "GPU" if torch.cuda.is_available() else os.environ.get("FASTGPT_TRITON_RUNNER", "interpreter")
if RUNNER == "interpreter":  # Triton reads its switch when it is imported, and when a kernel is defined
    os.environ["TRITON_INTERPRET"] = "1"

from fastgpt.ops import native  # noqa: E402

# --- which tests ---


def uses_triton(item):
    """Whether a parameter of a test asks for the backend."""
    return "triton" in getattr(getattr(item, "callspec", None), "params", {}).values()


def why_skipped(item):
    """Why the runner cannot take a test, or None."""
    if RUNNER == "interpreter" and uses_triton(item) and torch.bfloat16 in item.callspec.params.values():
        return "Triton's interpreter computes bfloat16 wrongly; the sanitizer runs it"
    return None


def left_out(items):
    """Of tests marked few_interpreted, whose calls take seconds on these runners: all but as few combinations of
    parameters as hold each one's every value."""
    groups, out = {}, set()
    for item in items:
        if RUNNER != "GPU" and item.get_closest_marker("few_interpreted") and uses_triton(item):
            groups.setdefault((item.path, item.originalname), []).append(item)
    for group in groups.values():
        out |= set(group) - set(_in_few([item for item in group if not why_skipped(item)]))
    return out


def _in_few(items):
    values = {item: {(name, repr(value)) for name, value in item.callspec.params.items()} for item in items}
    missing, chosen = set().union(*values.values()), []
    while missing:
        chosen.append(max(items, key=lambda item: len(values[item] & missing)))
        missing -= values[chosen[-1]]
    return chosen


# --- the interpreter ---


def _patch_language_once():
    """The interpreter replaces the functions of triton.language when a kernel starts, and again in every call of a
    device function, which takes longer than most of them do. Once is enough."""
    from triton.runtime import interpreter

    language, patch = interpreter.tl, interpreter._patch_lang

    def patch_once(function):
        modules = [m for m in function.__globals__.values() if m is language or m is language.core]
        if modules and not any(language.core.is_builtin(m.arange) for m in modules):
            return interpreter._LangPatchScope()
        return patch(function)

    interpreter._patch_lang = patch_once


if RUNNER == "interpreter" and not native.NO_TRITON:
    _patch_language_once()


# --- the sanitizer ---


@contextlib.contextmanager
def sanitized():
    """Triton kernels on CPU tensors by ttsem, which raises on a race, a stray access or an undefined result."""
    from triton.runtime import driver
    from ttsem import _fakedriver, sanitize

    _remember_compiled_kernels()
    _load_tiles_of_fewer_dimensions()
    before = driver._active
    try:
        with sanitize.session(cuda_is_cpu=False), native.triton_on_cpu():
            _fakedriver.unstub_torch_cuda()
            yield
    finally:
        driver._active = before


@functools.cache
def _remember_compiled_kernels():
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


@functools.cache
def _load_tiles_of_fewer_dimensions():
    """Triton makes one operation of a descriptor's load and the reshape that leaves out its extents of 1; ttsem gives
    the result with them."""
    from ttsem import ops

    load = ops.OPS["tt.descriptor_load"]

    def load_as_shaped(interp, op, args):
        return [tile.reshape(ops._rty(op).shape) for tile in load(interp, op, args)]

    ops.OPS["tt.descriptor_load"] = load_as_shaped


def running(item):
    """For the time of a test."""
    return sanitized() if RUNNER == "sanitizer" and uses_triton(item) else contextlib.nullcontext()
