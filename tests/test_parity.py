"""What the tests of equal answers compare with: not-a-number and infinity are far from everything, wherever
they stand and whichever rank has them.
"""

import math

import parity
import test_layouts
import torch

BAD = (math.nan, math.inf, -math.inf)


def test_what_is_not_finite_is_far():
    good = torch.tensor([1.0, 2.0])
    assert parity.apart(good, good) == 0 and parity.apart(good, good[:1]) == math.inf
    for bad in BAD:
        broken = torch.tensor([1.0, bad])
        assert (
            parity.apart(broken, good)
            == parity.apart(good, broken)
            == parity.apart(broken, broken)
            == math.inf
        )
        for names in ('ab', 'ba'):
            assert parity.furthest(
                {name: broken if name == 'a' else good for name in names}, dict.fromkeys(names, good)
            ) == (math.inf, 'a')
        assert test_layouts.far(dict(losses=[1.0, bad]), dict(losses=[1.0, 1.0, 1.0]), 'losses') == math.inf


def over_ranks(folder):
    "The largest over two ranks of a number that is not one on one of them, whichever that is."
    from mmkit.config import Layout
    from mmkit.core.device import pick_device
    from mmkit.parallel.mesh import open_mesh

    with open_mesh(Layout(data_parallel='ddp'), pick_device('cpu')) as mesh:
        return [parity.over_ranks(math.nan if mesh.place.rank == bad else 1.0) for bad in range(3)]


def test_the_worst_rank_decides(tmp_path):
    assert parity.on_ranks('test_parity', 'over_ranks', tmp_path, 2, 120) == [math.inf, math.inf, 1.0]
