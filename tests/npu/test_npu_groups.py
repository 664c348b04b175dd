"""Process groups of hccl on two emulated NPUs: what two ranks tell each other is what the CPU's arithmetic
says.

All claims run in one launch, each on both ranks; a test reads what became of its claim.
"""

import json
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

HERE = Path(__file__).resolve().parent


def here(x):
    "A tensor of the CPU on this rank's NPU."
    return x.to(f'npu:{dist.get_rank()}')


def of_all(make):
    "What a function of the rank gives on each of two ranks."
    return [make(rank) for rank in range(2)]


def numbers(rank):
    return torch.arange(4.0) + 10 * rank


def equal(mine, theirs):
    assert mine.device == torch.device('npu', dist.get_rank()) and torch.equal(mine.cpu(), theirs), (
        mine,
        theirs,
    )


def sums_and_largest(rank):
    for operation, wanted in ((dist.ReduceOp.SUM, sum(of_all(numbers))), (dist.ReduceOp.MAX, numbers(1))):
        x = here(numbers(rank))
        dist.all_reduce(x, operation)
        equal(x, wanted)


def an_async_sum(rank):
    x = here(numbers(rank))
    request = dist.all_reduce(x, async_op=True)
    request.wait()
    assert request.is_completed()
    equal(x, sum(of_all(numbers)))


def a_sum_in_place_of_a_view(rank):
    whole = here(torch.zeros(3, 4))
    whole[1] = numbers(rank).to(whole.device)
    dist.all_reduce(whole[1])
    equal(whole, torch.stack([torch.zeros(4), sum(of_all(numbers)), torch.zeros(4)]))


def gathering(rank):
    whole, parts = here(torch.zeros(8)), [here(torch.zeros(4)) for _ in range(2)]
    dist.all_gather_into_tensor(whole, here(numbers(rank)))
    dist.all_gather(parts, here(numbers(rank)))
    equal(whole, torch.cat(of_all(numbers)))
    equal(torch.cat(parts), torch.cat(of_all(numbers)))
    parts = [here(torch.zeros(4)) for _ in range(2)] if rank == 0 else None
    dist.gather(here(numbers(rank)), parts, 0)
    if rank == 0:
        equal(torch.cat(parts), torch.cat(of_all(numbers)))


def scattering_sums(rank):
    one, other = here(torch.zeros(2)), here(torch.zeros(2))
    dist.reduce_scatter_tensor(one, here(numbers(rank)))
    dist.reduce_scatter(other, [here(x) for x in numbers(rank).chunk(2)])
    for x in (one, other):
        equal(x, sum(of_all(numbers)).chunk(2)[rank])


def all_to_all(rank):
    one, parts = here(torch.zeros(4)), [here(torch.zeros(2)) for _ in range(2)]
    dist.all_to_all_single(one, here(numbers(rank)))
    dist.all_to_all(parts, [here(x) for x in numbers(rank).chunk(2)])
    for x in (one, torch.cat(parts)):
        equal(x, torch.cat([x.chunk(2)[rank] for x in of_all(numbers)]))


def broadcasting(rank):
    x, told = here(numbers(rank)), [{'from': rank}]
    dist.broadcast(x, 1)
    dist.broadcast_object_list(told, 1, device=x.device)
    equal(x, numbers(1))
    assert told == [{'from': 1}]


def objects(rank):
    told = [None, None]
    dist.all_gather_object(told, {'rank': rank})
    assert told == [{'rank': 0}, {'rank': 1}]


def sending(rank):
    x = here(numbers(rank))
    dist.send(x, 1) if rank == 0 else dist.recv(x, 0)
    equal(x, numbers(0))


def sending_round(rank, group=None):
    found = here(torch.zeros(4))
    for request in dist.batch_isend_irecv(
        [
            dist.P2POp(dist.isend, here(numbers(rank)), 1 - rank, group),
            dist.P2POp(dist.irecv, found, 1 - rank, group),
        ]
    ):
        request.wait()
    equal(found, numbers(1 - rank))


def new_groups(rank):
    both, own = dist.new_group([0, 1]), [dist.new_group([each]) for each in range(2)][rank]
    assert dist.get_backend(both) == dist.get_backend(own) == 'hccl'
    x = here(numbers(rank))
    dist.all_reduce(x, group=own)
    equal(x, numbers(rank))
    dist.all_reduce(x, group=both)
    equal(x, sum(of_all(numbers)))
    sending_round(rank, both)


def many_at_once(rank):
    "Megatron hands a bucket's collectives over together."
    from torch.distributed.distributed_c10d import _coalescing_manager

    sums, parts, wholes = [[here(torch.zeros(n)) for _ in range(3)] for n in (4, 2, 8)]
    for x in sums:
        x.copy_(numbers(rank))
    for collective, tensors, inputs in (
        (dist.all_reduce, sums, None),
        (dist.reduce_scatter_tensor, parts, numbers),
        (dist.all_gather_into_tensor, wholes, numbers),
    ):
        with _coalescing_manager(dist.group.WORLD, async_ops=True) as together:
            for x in tensors:
                collective(x, here(inputs(rank))) if inputs else collective(x)
        together.wait()
    for x, y, z in zip(sums, parts, wholes):
        equal(x, sum(of_all(numbers)))
        equal(y, sum(of_all(numbers)).chunk(2)[rank])
        equal(z, torch.cat(of_all(numbers)))


def layer(seed=0):
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))


def mean_gradients():
    "Of the two ranks' inputs, on the CPU."
    model = layer()
    sum(model(numbers(rank)[None]).sum() for rank in range(2)).div(2).backward()
    return [x.grad for x in model.parameters()]


def distributed_data_parallel(rank):
    model = torch.nn.parallel.DistributedDataParallel(here_model(rank))
    model(here(numbers(rank)[None])).sum().backward()
    for x, y in zip(model.parameters(), mean_gradients()):
        assert torch.allclose(x.grad.cpu(), y, rtol=1e-6)


def here_model(rank):
    return layer().to(f'npu:{rank}')


def fully_sharded(rank):
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import fully_shard

    model, mesh = here_model(rank), DeviceMesh.from_group(dist.group.WORLD, 'npu')
    for part in (model[0], model[2], model):
        fully_shard(part, mesh=mesh)
    model(here(numbers(rank)[None])).sum().backward()
    for x, y in zip(model.parameters(), mean_gradients()):
        assert torch.allclose(x.grad.full_tensor().cpu(), y, rtol=1e-6)


def matrix_products_that_gather_or_scatter(rank):
    "npu_all_gather_base_mm and npu_mm_reduce_scatter_base find their group by the communicator's name."
    import torch_npu

    name = dist.group.WORLD._get_backend(torch.device('npu')).get_hccl_comm_name(rank)
    rows = of_all(lambda each: torch.randn(6, 256, generator=torch.Generator().manual_seed(each)))
    weight = torch.randn(256, 8, generator=torch.Generator().manual_seed(9))
    product, whole = torch_npu.npu_all_gather_base_mm(
        here(rows[rank]), here(weight), name, 2, gather_index=0, gather_output=True
    )
    equal(whole, torch.cat(rows))
    assert torch.allclose(product.cpu(), torch.cat(rows) @ weight, atol=1e-4)
    part = torch_npu.npu_mm_reduce_scatter_base(here(rows[rank]), here(weight), name, 2, reduce_op='sum')
    assert torch.allclose(part.cpu(), (sum(rows) @ weight).chunk(2)[rank], atol=1e-4)


def a_cpu_tensor_is_refused(rank):
    with pytest.raises(RuntimeError, match='No backend type associated with device type cpu'):
        dist.all_reduce(torch.ones(1))


def counts(rank):
    import npu_emulator

    assert (
        npu_emulator.calls['allreduce_'] >= 6
        and npu_emulator.calls['batch_isend_irecv'] == 2
        and npu_emulator.calls['npu_all_gather_base_mm'] == 1
    )


CLAIMS = [
    sums_and_largest,
    an_async_sum,
    a_sum_in_place_of_a_view,
    gathering,
    scattering_sums,
    all_to_all,
    broadcasting,
    objects,
    sending,
    sending_round,
    new_groups,
    many_at_once,
    distributed_data_parallel,
    fully_sharded,
    matrix_products_that_gather_or_scatter,
    a_cpu_tensor_is_refused,
    counts,
]


def outcome(claim, rank):
    "What became of a claim on this rank, in words."
    try:
        claim(rank)
    except Exception as error:
        return f'rank {rank}: {type(error).__name__}: {error}'
    return 'holds'


def all_claims(out):
    "Every claim on this rank of a launch; rank 0 writes what became of them on both."
    import torch_npu  # noqa: F401

    rank = int(os.environ['RANK'])
    torch.npu.set_device(rank)
    dist.init_process_group('hccl')
    mine, both = {claim.__name__: outcome(claim, rank) for claim in CLAIMS}, [None, None]
    dist.all_gather_object(both, mine)
    if rank == 0:
        Path(out).write_text(json.dumps(both))
    dist.destroy_process_group()


@pytest.fixture(scope='module')
def outcomes(tmp_path_factory):
    "What became of every claim, on two ranks of a launch as mmkit makes it."
    from mmkit.core.ranks import run_ranks

    out = tmp_path_factory.mktemp('groups') / 'outcomes.json'
    run_ranks(
        f'import sys\nsys.path.insert(0, {str(HERE)!r})\nimport'
        f' test_npu_groups\ntest_npu_groups.all_claims({str(out)!r})',
        2,
        200,
    )
    return json.loads(out.read_text())


@pytest.mark.parametrize('claim', [claim.__name__ for claim in CLAIMS])
def test_two_ranks(claim, outcomes):
    assert [each[claim] for each in outcomes] == ['holds', 'holds']
