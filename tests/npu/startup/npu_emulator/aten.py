"""Every operator of torch itself that the wheel brings to the NPU, computed by the CPU's own kernel over the
device's memory.
"""

from contextlib import contextmanager, nullcontext

import torch

from npu_emulator import doubtful
from npu_emulator.memory import NPU, first_device, in_each, on_host, to_device

# The wheel's own code serves for these: they make, name or look at memory and compute nothing.
REAL = set(
    """empty empty_strided empty_like new_empty_strided as_strided view _reshape_alias alias detach set_ resize_ unfold view_as_real
view_as_complex is_set_to _has_compatible_shallow_copy_type _copy_from _copy_from_and_resize record_stream is_pinned pin_memory _pin_memory
_lazy_clone _efficientzerotensor""".split()  # noqa: E501
)

# an NPU has few operators for these, and slow ones
WIDE = (torch.float64, torch.complex64, torch.complex128)
MOVING = ('copy_', 'copy', 'clone', 'fill_', 'zero_', 'cat')  # no arithmetic
# operators that draw without an argument for the generator
DRAWING = {'aten::native_dropout'}

# tensors of two devices may meet here
ACROSS = {'aten::copy_', 'aten::index', 'aten::index_put', 'aten::index_put_', 'aten::_index_put_impl_'}


def check_devices(name, values):
    "Raises RuntimeError where tensors of two devices meet; single numbers of the CPU may go with any."
    found = set()

    def look(value):
        if isinstance(value, torch.Tensor) and (value.dim() or value.device.type == NPU):
            found.add(str(value.device))

    in_each(look, values)
    if len(found) > 1 and name not in ACROSS:
        raise RuntimeError(
            f'{name}: expected all tensors to be on the same device, found {", ".join(sorted(found))}'
        )


def drawn_seed(generator):
    "A seed for the state of the device's generator, which moves on by one draw."
    seed, offset = generator.get_state().view(torch.int64).tolist()[:2]
    generator.set_offset(offset + 4)
    return (seed * 1_000_003 + offset) % 2**63


@contextmanager
def seeded(seed):
    "Within it the CPU's generator begins at a seed; afterwards it is where it was."
    before = torch.get_rng_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(before)


def host_value(value):
    "An argument as the CPU's kernel takes it."
    if isinstance(value, torch.device) and value.type == NPU:
        return torch.device('cpu')
    if isinstance(value, torch.Generator) and value.device.type == NPU:
        return torch.Generator().manual_seed(drawn_seed(value))
    return on_host(value)


def places(schema):
    "For every result of an operator the name of the argument that is written and given back as it, or None."
    written = {
        mark: argument.name
        for argument in schema.arguments
        if argument.alias_info and argument.alias_info.is_write
        for mark in argument.alias_info.before_set
    }
    marks = [result.alias_info.before_set if result.alias_info else () for result in schema.returns]
    return [next((written[mark] for mark in own if mark in written), None) for own in marks]


def asked_device(named, arguments):
    "The device that the results lie on: the named one if there is one, else that of the arguments."
    wanted = named.get('device')
    if wanted is None:
        return first_device([arguments, named])
    return (
        wanted
        if wanted.type != NPU or wanted.index is not None
        else torch.device(NPU, torch.npu.current_device())
    )


def note(name, result):
    "Counts a result in a number format that NPUs hardly have."
    if isinstance(result, torch.Tensor) and result.dtype in WIDE:
        doubtful[f'{name} {result.dtype}'.replace('torch.', '')] += 1


def on_cpu(operator):
    "The operator, computed on the CPU over the same memory."
    names, given_back = [argument.name for argument in operator._schema.arguments], places(operator._schema)
    random = next(
        (argument.name for argument in operator._schema.arguments if argument.name == 'generator'), None
    )

    def run(*arguments, **named):
        named = {**dict(zip(names, arguments)), **named}
        check_devices(operator._schema.name, named)
        device = asked_device(named, arguments)
        if random and named.get(random) is None and device.type == NPU:
            named[random] = torch.npu.default_generators[device.index]
        with (
            seeded(drawn_seed(torch.npu.default_generators[device.index]))
            if operator._schema.name in DRAWING
            else nullcontext()
        ):
            found = operator(**in_each(host_value, named))
        if not given_back:
            return None
        if device.type == NPU and not operator._schema.name.endswith(MOVING):
            in_each(lambda value: note(operator._schema.name, value), found)
        found = found if isinstance(found, tuple) else (found,)
        results = [
            named[place] if place else in_each(lambda value: to_device(value, device), value)
            for value, place in zip(found, given_back)
        ]
        return results[0] if len(given_back) == 1 else tuple(results)

    return run


def emulated(name):
    "The overload that a name of the dispatcher means if it is to be computed on the CPU, else None."
    packet, _, overload = name.removeprefix('aten::').partition('.')
    if (
        not name.startswith('aten::')
        or packet in REAL
        or not torch._C._dispatch_has_kernel_for_dispatch_key(name, 'PrivateUse1')
    ):
        return None
    operator = getattr(getattr(torch.ops.aten, packet, None), overload or 'default', None)
    views = operator and any(
        result.alias_info and not result.alias_info.is_write for result in operator._schema.returns
    )
    return None if views else operator


def install(library, without):
    """Replaces the kernels in a library of the namespace aten, but for the named ones that have a formula.

    The number of them.
    """
    names = {
        name: operator
        for name in torch._C._dispatch_get_all_op_names()
        if (operator := emulated(name)) and name.removeprefix('aten::') not in without
    }
    for name, operator in names.items():
        library.impl(name.removeprefix('aten::'), on_cpu(operator), 'PrivateUse1', allow_override=True)
    return len(names)
