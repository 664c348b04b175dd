"""Process groups of the backend hccl whose traffic goes over gloo.

Each group keeps its real ProcessGroupHCCL, so names, devices and refusals are the wheel's: a CPU tensor in
such a group raises as on an NPU. A second group of gloo beside it carries the bytes of the device's memory.
"""

from collections import deque

import torch
import torch.distributed as dist
import torch_npu
from torch._C._distributed_c10d import ProcessGroup, ProcessGroupGloo, _DistributedBackendOptions

from npu_emulator import calls
from npu_emulator.fused import plain_only
from npu_emulator.memory import in_each, on_host, on_npu

HCCL = torch_npu._C._distributed_c10d.ProcessGroupHCCL
CARRIERS: dict[str, ProcessGroup] = {}  # the group of gloo for the name of a group of hccl
# (request, its tensors): the device keeps memory until its traffic is done, however soon a tensor is dropped
UNDERWAY: deque = deque(maxlen=256)
# a ProcessGroupHCCL, which must stay alive to stay the same object, and its group's name
NAMES: dict[int, tuple[object, str]] = {}


def carrier(options):
    "A group of gloo with the ranks of a group that is being made."
    store = dist.PrefixStore('emulated', options.store)
    gloo = ProcessGroupGloo(store, options.group_rank, options.group_size, timeout=options.timeout)
    group = ProcessGroup(store, options.group_rank, options.group_size)
    group._register_backend(torch.device('cpu'), ProcessGroup.BackendType.GLOO, gloo)
    group._set_group_name(f'carrier of {options.group_id}')
    return group


def with_carrier(create):
    """The wheel's own function that makes a ProcessGroupHCCL, which also makes the group that carries its
    traffic.
    """

    def make(options: _DistributedBackendOptions, settings):
        group = create(options, settings)
        CARRIERS[options.group_id] = carrier(options)
        NAMES[id(group)] = (group, options.group_id)
        return group

    return make


def kept(request, tensors):
    "The request, whose tensors stay alive until it is done."
    while UNDERWAY and UNDERWAY[0][0].is_completed():
        UNDERWAY.popleft()
    UNDERWAY.append((request, tensors))
    return request


def over_gloo(operator):
    "A collective operator of torch, done on the host's memory by the group that carries its group's traffic."
    names = [argument.name for argument in operator._schema.arguments]
    gives_tensors = len(operator._schema.returns) > 1

    def run(*arguments, **named):
        named = {**dict(zip(names, arguments)), **named}
        group = ProcessGroup.unbox(named['process_group'])
        in_each(require_npu, {name: value for name, value in named.items() if name != 'process_group'})
        host = {**in_each(on_host, named), 'process_group': CARRIERS[group.group_name].boxed()}
        found = operator(**host)
        kept(dist.Work.unbox(found[1] if gives_tensors else found), named)
        calls[operator._schema.name.removeprefix('c10d::')] += 1
        return (arguments[0], found[1]) if gives_tensors else found

    return run


def require_npu(value):
    "Raises RuntimeError for a tensor elsewhere, which a group of hccl has no backend for."
    if isinstance(value, torch.Tensor) and not on_npu(value):
        raise RuntimeError(f'a collective of hccl got a tensor on {value.device}')


class All:
    "Requests that are waited for as one."

    def __init__(self, requests):
        self.requests = requests

    def wait(self, *timeout):
        return all(request.wait() for request in self.requests)

    def is_completed(self):
        return all(request.is_completed() for request in self.requests)


def batch_isend_irecv(group, kinds, tensors, peers):
    "ProcessGroupHCCL's own batch of sends and receives (the wheel calls it), each carried by itself."
    gloo = CARRIERS[NAMES[id(group)][1]]
    in_each(require_npu, tensors)
    calls['batch_isend_irecv'] += 1
    send_or_receive = {'isend': gloo.send, 'irecv': gloo.recv}
    return kept(
        All(
            [
                send_or_receive[kind]([on_host(tensor)], peer, 0)
                for kind, tensor, peer in zip(kinds, tensors, peers)
            ]
        ),
        tensors,
    )


def allgather(group, outputs, inputs, *options):
    "ProcessGroupHCCL's own gathering, which the wheel's `gather` calls on it directly."
    in_each(require_npu, [outputs, inputs])
    calls['allgather_'] += 1
    return CARRIERS[NAMES[id(group)][1]].allgather(
        in_each(on_host, outputs), in_each(on_host, inputs), *options
    )


def comm_name(group, rank, init_comm=True):
    "What HCCL would call the communicator of a group; *_base_mm operators find the group by it."
    return f'hcom of {NAMES[id(group)][1]}'


def ranks_of(hcom, world_size):
    "The carrying group for a communicator's name; raises ValueError if it has another number of ranks."
    group = CARRIERS.get(hcom.removeprefix('hcom of '))
    if group is None:
        raise ValueError(
            f'no process group has the communicator {hcom!r}; get_hccl_comm_name gives the name of one'
        )
    if group.size() != world_size:
        raise ValueError(f'world_size is {world_size}, but the group of {hcom!r} has {group.size()} ranks')
    return group


def all_gather_base_mm(input, x2, hcom, world_size, *, gather_index, gather_output, comm_turn, **options):
    "npu_all_gather_base_mm: the rows of all ranks times x2, and these rows."
    plain_only(
        'npu_all_gather_base_mm',
        {**options, 'gather_index': gather_index},
        bias=None,
        x1_scale=None,
        x2_scale=None,
        output_dtype=None,
        gather_index=0,
    )
    rows = input.new_empty(world_size * input.shape[0], input.shape[1])
    ranks_of(hcom, world_size)._allgather_base(rows, input.contiguous()).wait()
    return rows.float() @ x2.float(), rows if gather_output else None


def mm_reduce_scatter_base(input, x2, hcom, world_size, *, reduce_op, comm_turn, **options):
    """npu_mm_reduce_scatter_base: this rank's rows of the sum over ranks of input @ x2, rounded to the dtype
    before they are summed.
    """
    plain_only(
        'npu_mm_reduce_scatter_base',
        {**options, 'reduce_op': reduce_op},
        bias=None,
        x1_scale=None,
        x2_scale=None,
        output_dtype=None,
        reduce_op='sum',
    )
    product = (input.float() @ x2.float()).to(input.dtype)
    part = product.new_empty(product.shape[0] // world_size, product.shape[1])
    ranks_of(hcom, world_size)._reduce_scatter_base(part, product).wait()
    return part


FORMULAS = {
    'npu_all_gather_base_mm': all_gather_base_mm,
    'npu_mm_reduce_scatter_base': mm_reduce_scatter_base,
}


def install(library):
    """Carries the collectives of a library of the namespace c10d, and those that the wheel calls on its group
    directly.
    """
    backend = dist.Backend._plugins['HCCL']
    dist.Backend._plugins['HCCL'] = backend._replace(creator_fn=with_carrier(backend.creator_fn))
    HCCL.batch_isend_irecv, HCCL.allgather, HCCL.get_hccl_comm_name = batch_isend_irecv, allgather, comm_name
    for name in torch._C._dispatch_get_all_op_names():
        if not name.startswith('c10d::') or not torch._C._dispatch_has_kernel_for_dispatch_key(
            name, 'PrivateUse1'
        ):
            continue
        operator = getattr(torch.ops.c10d, name.removeprefix('c10d::')).default
        library.impl(name.removeprefix('c10d::'), over_gloo(operator), 'PrivateUse1', allow_override=True)
