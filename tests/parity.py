"""What the tests of equal answers share: a model opened as the trainer opens it, whole gradients under
Hugging Face's names, distances and tables.
"""

import json
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from mmkit.converters.weights import pieces, whole
from mmkit.core.ranks import run_ranks
from mmkit.core.values import largest
from mmkit.parallel.data import accumulate, gradients
from mmkit.parallel.engine import megatron
from mmkit.trainer.loop import build
from mmkit.trainer.step import totals
from mmkit.trainer.task import open_task
from mmkit.trainer.weights import whole_tensors

TESTS = Path(__file__).resolve().parent
# largest difference over largest value: 84 roundings of float32
LIMIT = 1e-5


def on_ranks(module, function, folder, ranks, timeout):
    "What `module.function(folder)` of this folder returns on rank 0 of a launch, as JSON makes it."
    out = Path(folder) / f'{function}-{ranks}.json'
    run_ranks(
        f'import json, os, sys\nsys.path.insert(0, {str(TESTS)!r})\nimport {module}\n'
        f'found = {module}.{function}({str(folder)!r})\n'
        f'if os.environ["RANK"] == "0": open({str(out)!r}, "w").write(json.dumps(found))',
        ranks,
        timeout,
    )
    return json.loads(out.read_text())


def small_buckets(size=20_000):
    """Makes Megatron cut its gradient buffer into many buckets also for a tiny model, so that overlap has
    something to overlap.
    """
    megatron().DistributedDataParallelConfig = partial(
        megatron().DistributedDataParallelConfig, bucket_size=size
    )


def open_trainer(config, mesh):
    "(task, model, wrapped model) as `fit` makes them."
    task = open_task(config)
    model, wrapped, _ = build(config, task, mesh)
    return task, model, wrapped


def differing(held, task, mesh):
    """Names of parameters that every tensor-parallel rank holds whole, of whose gradients `held` the ranks
    have not the same bits; whole tensors are taken from rank 0, which would hide it.
    """
    found = []
    for k, name in (
        (k, piece.mm)
        for k, chunk in enumerate(pieces(task.towers))
        for piece in chunk
        if piece.rule.split is whole and piece.mm in held.get(k, ())
    ):
        every = [torch.empty_like(held[k][name]) for _ in range(mesh.tp.size)]
        torch.distributed.all_gather(every, held[k][name].contiguous(), group=mesh.tp.group)
        if any(not torch.equal(x, every[0]) for x in every):
            found.append(name)
    return found


def step_gradients(task, wrapped, mesh, batches):
    """(mean loss, whole gradients by Hugging Face name) of a step over this rank's micro-batches, on every
    rank.
    """
    total, count = totals(
        mesh, *accumulate(wrapped, iter(batches), len(batches), task.forward, task.loss)[:2]
    )
    held = {chunk.module.module.stage.index: gradients(chunk, mesh) for chunk in wrapped}
    assert not (names := differing(held, task, mesh)), f'gradients differ over tensor-parallel ranks: {names}'
    # every rank of cp counts the whole row
    return total / (count / mesh.cp.size), dict(whole_tensors(held, task.towers, mesh))


def apart(mine: Tensor, theirs: Tensor, size: float | None = None) -> float:
    """Largest absolute difference over the size, by default the largest absolute value.

    Where that is zero, only zero is near, and to what is not finite nothing is.
    """
    if mine.shape != theirs.shape:
        return float('inf')
    difference, size = (mine - theirs).abs().max().item(), theirs.abs().max().item() if size is None else size
    return largest([difference / size if size else (float('inf') if difference else 0.0)])


def furthest(mine, theirs):
    """(distance, name) of the tensor that is furthest from its reference.

    Different names are infinitely far.

        Weight and bias of a layer share their size. The gradient of a key's bias is nearly 0, since moving
    all keys alike moves no attention: what is left of its large terms is no measure of how they round.
    """
    if differ := mine.keys() ^ theirs.keys():
        return float('inf'), f'only on one side: {sorted(differ)[:3]}'
    sizes = {}
    for name, x in theirs.items():
        sizes[layer_of(name)] = max(sizes.get(layer_of(name), 0.0), x.abs().max().item())
    # none of them is not-a-number
    return max((apart(mine[name], theirs[name], sizes[layer_of(name)]), name) for name in mine)


def layer_of(name):
    "The layer that a weight or a bias belongs to."
    return name.rpartition('.')[0] if name.endswith(('.weight', '.bias')) else name


def over_ranks(distance):
    "The largest of a number over all ranks."
    # the largest of a number and not-a-number is either, by the order of the ranks
    x = torch.tensor(largest([distance]))
    torch.distributed.all_reduce(x, torch.distributed.ReduceOp.MAX)
    return x.item()


def took(seconds):
    "How long the ranks of each world took, in words."
    return ', '.join(f'{ranks} rank{"s" * (ranks > 1)} {spent:.0f} s' for ranks, spent in seconds.items())


def table(head, rows):
    "Rows as a table in Markdown; small numbers with two digits."
    text = [
        [f'{x:.1e}' if isinstance(x, float) else '' if x is None else str(x) for x in row]
        for row in [head, *rows]
    ]
    widths = [max(map(len, column)) for column in zip(*text)]
    lines = ['| ' + ' | '.join(x.ljust(width) for x, width in zip(row, widths)) + ' |' for row in text]
    return '\n'.join([lines[0], '|' + '|'.join('-' * (width + 2) for width in widths) + '|', *lines[1:]])
