"""One memory under two names: the emulated device's tensors, seen as tensors of the CPU."""

import torch

NPU = 'npu'


def on_npu(value):
    "Whether a value is a tensor of the emulated device."
    return isinstance(value, torch.Tensor) and value.device.type == NPU


def on_host(value):
    "A tensor of the emulated device as one of the CPU over the same memory; any other value as it is."
    if not on_npu(value):
        return value
    storage = value.untyped_storage()
    if not storage.nbytes():
        return torch.empty_strided(value.size(), value.stride(), dtype=value.dtype)
    memory = torch._C._construct_storage_from_data_pointer(
        storage.data_ptr(), torch.device('cpu'), storage.nbytes()
    )
    return torch.empty(0, dtype=value.dtype).set_(
        memory, value.storage_offset(), value.size(), value.stride()
    )


def to_device(value, device):
    "A copy of a CPU tensor on the emulated device, with the same strides; any other value as it is."
    if not isinstance(value, torch.Tensor) or value.device.type != 'cpu':
        return value
    copy = torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device=device)
    on_host(copy).copy_(value)
    return copy


def in_each(function, value):
    "The value with `function` applied to what its lists, tuples and dicts hold."
    if isinstance(value, dict):
        return {key: in_each(function, item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(in_each(function, item) for item in value)
    return function(value)


def first_device(values):
    "The emulated device of the first tensor that lies on one, else the current one."
    found = []
    in_each(lambda value: found.append(value.device) if on_npu(value) else None, values)
    return found[0] if found else torch.device(NPU, torch.npu.current_device())
