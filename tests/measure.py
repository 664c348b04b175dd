"""What a rank really has and does: bytes of all tensors that are alive, operations, bytes that it sends.

For the tests of the plan.
"""

import weakref

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mmkit.parallel.fsdp import own_part

# times (n - 1) / n of the whole; broadcasts are of numbers for the records
SHARES = {
    'allreduce': 2,
    'allgather': 1,
    'reduce_scatter': 1,
    'alltoall': 1,
    'broadcast': 0,
    'recv': 0,
    'barrier': 0,
}


def tensors(tree):
    return [x for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]


class Measured(TorchDispatchMode):
    """For the length of a `with`: `peak` bytes of tensors made in it, and the bytes `sent` by collectives, by
    name.
    """

    def __init__(self):
        super().__init__()
        self.alive, self.now, self.peak, self.sent = {}, 0, 0, {}

    def __enter__(self):
        self.resize, found = torch.UntypedStorage.resize_, self

        def resize_(storage, size):
            self.resize(storage, size)
            found.note(storage)

        torch.UntypedStorage.resize_ = resize_
        return super().__enter__()

    def __exit__(self, *error):
        torch.UntypedStorage.resize_ = self.resize
        return super().__exit__(*error)

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        if function.namespace == 'c10d':
            self.count(function, arguments)
        made = function(*arguments, **(options or {}))
        # what is cut over copies has no memory of its own
        for x in tensors(made):
            self.note(own_part(x).untyped_storage())
        return made

    def note(self, storage):
        "Takes in a storage that was made or has another size now."
        key, size = storage._cdata, storage.nbytes()
        if key not in self.alive:
            weakref.finalize(storage, self.forget, key)
        self.now += size - self.alive.get(key, 0)
        self.alive[key] = size
        self.peak = max(self.peak, self.now)

    def forget(self, key):
        self.now -= self.alive.pop(key)

    def count(self, function, arguments):
        name = function._schema.name.split('::')[1]
        ranks = next(
            (
                dist.ProcessGroup.unbox(x).size()
                for x in tree_leaves(list(arguments))
                if isinstance(x, torch.ScriptObject) and 'ProcessGroup' in str(x._type())
            ),
            1,
        )
        size = max(sum(x.nbytes for x in tensors(one)) for one in arguments[:2])
        share = (
            1
            if name == 'send'
            else next(share for kind, share in SHARES.items() if kind in name) * (ranks - 1) / ranks
        )
        self.sent[name] = self.sent.get(name, 0) + share * size

    def again(self):
        "Forgets the peak and what was sent so far."
        self.peak, self.sent = self.now, {}
