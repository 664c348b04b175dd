"""A fused operator is the wheel's own host code, which checks the call and makes the outputs, and then the
documented formula, which fills them.
"""

import ctypes
import os
from contextlib import contextmanager

import torch

from npu_emulator import NotEmulated, calls
from npu_emulator.memory import in_each, on_host

RUNTIME = ctypes.CDLL(os.path.join(os.environ['NPU_EMULATOR'], 'libascendcl.so'))
EXPECTED = ctypes.c_int.in_dll(RUNTIME, 'emulated_call')
LAST = ctypes.c_char_p.in_dll(RUNTIME, 'last_operator')


@contextmanager
def host_code():
    "Within it the wheel's host code may call operators of CANN; they do nothing."
    EXPECTED.value += 1
    try:
        yield
    finally:
        EXPECTED.value -= 1


def last_operator():
    "The operator of CANN that was called last in this process."
    return LAST.value.decode()


def plain_only(name, options, **usual):
    "Raises NotEmulated if one of the options is not the usual value that the formula of `name` stands for."
    for key, value in usual.items():
        given = options.get(key, value)
        same = given is value if value is None or isinstance(given, torch.Tensor) else given == value
        if not same:
            raise NotEmulated(
                f'the emulated NPU has no formula for {name} with'
                f' {key}={given if not isinstance(given, torch.Tensor) else "a tensor"}'
            )


def fill(outputs, values):
    "Writes the formula's values into the outputs that the host code made; None leaves one as it is."
    for output, value in zip(outputs, values):
        if value is None:
            continue
        if output.shape != value.shape:
            raise RuntimeError(
                f'the host code made an output {tuple(output.shape)}, the formula gives {tuple(value.shape)}'
            )
        on_host(output).copy_(value)


def as_tuple(values):
    return values if isinstance(values, (tuple, list)) else (values,)


def with_formula(operator, formula):
    """The operator as host code and formula.

    The formula gets every argument by name, tensors as those of the CPU.
    """
    names = [argument.name for argument in operator._schema.arguments]
    defaults = {
        argument.name: argument.default_value
        for argument in operator._schema.arguments
        if argument.has_default_value()
    }
    kernel = torch.library.get_kernel(operator, 'PrivateUse1')
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.PrivateUse1)

    def run(*arguments, **named):
        with host_code():
            outputs = kernel.call_boxed(keys, *arguments, **named)
        values = formula(**in_each(on_host, {**defaults, **dict(zip(names, arguments)), **named}))
        fill(as_tuple(outputs), as_tuple(values))
        calls[operator._schema.name.removeprefix('npu::').removeprefix('aten::')] += 1
        return outputs

    return run


def install(library, formulas):
    "Gives the operators of a library's namespace their formulas."
    for name, formula in formulas.items():
        operator = getattr(getattr(torch.ops, library.ns), name).default
        library.impl(name, with_formula(operator, formula), 'PrivateUse1', allow_override=True)
