"""mmkit's fused operations on emulated NPUs give what their twins give on the CPU, forward and backward, and
a wrong call is caught.

What is caught and by whom: the wheel's host code (on the emulated device), its shapes for the meta device, or
the checks of mmkit's own.
"""

import pytest
import torch
import torch_npu
from npu_emulator import calls

from mmkit.core.values import largest
from mmkit.models.rope import apply_rotary, apply_rotary_interleaved, cos_sin, rope_1d
from mmkit.parallel import attention
from mmkit.parallel.attention import (
    Cache,
    attend,
    fused_attention,
    npu_segments,
    npu_tiles,
    ring_tiles,
    segments,
    tile,
    tile_gradients,
)
from mmkit.parallel.layers import npu_rotary, rms_norm, swiglu

# largest difference over largest value, in float32: 84 of its roundings
LIMIT = 1e-5


def seeded(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def rows(b, s, h, g, d, keys=None):
    "Queries (b s h d), keys and values (b keys g d) whose gradients are wanted."
    return [
        seeded(b, n, heads, d, seed=seed).requires_grad_()
        for seed, (n, heads) in enumerate(((s, h), (keys or s, g), (keys or s, g)))
    ]


def on(place, function, inputs):
    "What a function makes of inputs on a device, and the gradients of a weighted sum of it, on the host."
    given = [
        x.detach().to(place).requires_grad_(x.requires_grad) if isinstance(x, torch.Tensor) else x
        for x in inputs
    ]
    made = function(*given)
    made = made if isinstance(made, tuple) else (made,)
    leaves = [x for x in given if isinstance(x, torch.Tensor) and x.requires_grad]
    found = (
        torch.autograd.grad(sum((x * seeded(*x.shape, seed=9).to(place)).sum() for x in made), leaves)
        if leaves
        else ()
    )
    return [x.detach().cpu() for x in (*made, *found)]


def apart(mine, theirs):
    """Largest difference over largest value, of several tensors that one operation made of the same inputs.

        The size is that of all of them: the gradient of a query that sees one key is 0, computed as a
    difference of two equal sums, so it is as large as what rounds in them.
    """
    assert [x.shape for x in mine] == [x.shape for x in theirs]
    return largest((a - b).abs().max().item() for a, b in zip(mine, theirs)) / max(
        b.abs().max().item() for b in theirs
    )


def test_not_a_number_is_far():
    "Also where it is not the first of several."
    good, bad = torch.ones(3), torch.tensor([1.0, torch.nan, 1.0])
    assert (
        apart([good, bad], [good, good]) == apart([good, good], [good, bad]) == float('inf')
        and apart([good], [good]) == 0
    )

    def broken(x):
        return (x, x * torch.nan) if x.device.type == 'npu' else (x, x)

    with pytest.raises(AssertionError):
        same(broken, good, fused=())


def same(function, *inputs, fused, change=lambda x: x):
    """The function gives the CPU's result and gradients on the NPU, and `fused` operators of these names ran
    there; `change` puts the NPU's result into the twin's order.
    """
    before = calls.copy()
    mine, theirs = on('npu', lambda *x: change(function(*x)), inputs), on('cpu', function, inputs)
    ran = set(calls - before)
    assert set(fused) <= ran, (fused, ran)
    assert apart(mine, theirs) <= LIMIT, apart(mine, theirs)


ATTENTION, BOTH = ('npu_fusion_attention',), ('npu_fusion_attention', 'npu_fusion_attention_grad')
# b s h g d
SIZES = [(1, 7, 4, 2, 16), (2, 16, 4, 4, 8), (3, 33, 6, 2, 32), (1, 1, 2, 1, 80), (2, 130, 8, 1, 8)]


@pytest.mark.parametrize('size', SIZES, ids=str)
@pytest.mark.parametrize('causal', (False, True))
def test_attention(size, causal):
    same(lambda q, k, v: attend(q, k, v, causal=causal), *rows(*size), fused=BOTH)


@pytest.mark.parametrize('keys', (2, 5, 77))
def test_attention_to_other_rows(keys):
    same(attend, *rows(2, 9, 4, 2, 16, keys), fused=BOTH)


def test_attention_under_a_mask():
    shown = torch.arange(9)[None] <= torch.tensor([3, 5, 8])[:, None]
    same(
        lambda q, k, v: attend(q, k, v, mask=shown[:, None, None].to(q.device)),
        *rows(3, 1, 4, 2, 8, 9),
        fused=BOTH,
    )
    with pytest.raises(ValueError, match='a mask and causal'):
        attend(*(x.npu() for x in rows(1, 4, 2, 2, 8)), causal=True, mask=shown.npu())


@pytest.mark.parametrize('ahead', ((), (1, 1), (3, 1), (3, 4)), ids=str)
def test_every_form_of_a_mask(ahead):
    """SS, 11SS, B1SS and BNSS.

    Any other shape is refused, and so are numbers, which `~` would turn into others that all hide.
    """
    shown = (seeded(*ahead, 5, 9) > 0) | (torch.arange(9) == 0)
    same(lambda q, k, v: attend(q, k, v, mask=shown.to(q.device)), *rows(3, 5, 4, 2, 8, 9), fused=BOTH)
    q, k, v = (x.detach().npu() for x in rows(3, 5, 4, 2, 8, 9))
    for wrong in (
        shown.to(torch.uint8),
        shown.float(),
        shown[..., :1, :],
        shown[..., :8],
        torch.ones(1, 4, 5, 9, dtype=torch.bool),
        torch.ones(3, 2, 5, 9, dtype=torch.bool),
        torch.ones(9, 5, dtype=torch.bool),
    ):
        with pytest.raises(ValueError, match='one of bool with one of the shapes'):
            attend(q, k, v, mask=wrong.npu())


LENGTHS = [[3, 8, 1, 4], [4, 4, 8], [13, 3, 0], [16], [1] * 16, [0, 5, 0, 11]]


@pytest.mark.parametrize('lengths', LENGTHS, ids=str)
@pytest.mark.parametrize('causal', (False, True))
@pytest.mark.parametrize('b, h, g', ((1, 4, 2), (2, 3, 3)))
def test_segments(lengths, causal, b, h, g):
    same(lambda q, k, v: segments(lengths, causal, q.device)(q, k, v), *rows(b, 16, h, g, 8), fused=BOTH)


@pytest.mark.parametrize('device', ('npu', 'npu:0', torch.device('npu')), ids=str)
def test_a_device_may_be_a_text(device):
    same(
        lambda q, k, v: segments([3, 8, 1, 4], True, device if q.device.type == 'npu' else 'cpu')(q, k, v),
        *rows(1, 16, 4, 2, 8),
        fused=BOTH,
    )
    assert segments([3, 13], True, device).__qualname__.startswith('npu_segments') and ring_tiles(
        [16], True, 0, 2, device
    ) == npu_tiles([16], True, 0, 2)


def test_more_segments_than_the_kernel_takes_at_once():
    lengths, inputs = [2, 3, 1, 4] * 5, rows(2, 50, 2, 1, 8)
    before = calls['npu_fusion_attention']
    mine = on('npu', lambda q, k, v: npu_segments(lengths, True, 'npu', at_once=16)(q, k, v), inputs)
    assert (
        calls['npu_fusion_attention'] - before == 3
        and apart(mine, on('cpu', segments.twin(lengths, True), inputs)) <= LIMIT
    )


def test_a_cache_while_generating():
    q, k, v = rows(1, 9, 4, 2, 8)

    def told(q, k, v):
        cache, at = Cache([3, 4], room=2), q.device
        cache.fill(segments([3, 4], True, at))(*(x[:, :7] for x in (q, k, v)))
        return cache.step(torch.tensor([3, 4], device=at))(*(x[:, 7:] for x in (q, k, v)))

    same(told, *(x.detach() for x in (q, k, v)), fused=ATTENTION)


def around(lengths, causal, ring, make_tiles, place):
    """A ring on one process: results of all ranks, and gradients of q, k, v, with the tiles and the tile
    functions of a device.
    """
    q, k, v = (x.detach() for x in rows(2, sum(lengths), 4, 2, 8))
    parts, half = attention.ring_chunks(q.shape[1], ring), q.shape[1] // ring

    def take(x, rank):
        return x[:, parts[rank].flatten()].to(place)

    made, found = [], [torch.zeros_like(x) for x in (q, k, v)]
    for rank in range(ring):
        mixed = torch.zeros(2, half, 2, 2, 8, device=place)
        total = torch.full((2, 2, 2, half), -torch.inf, device=place)
        tiles = make_tiles(lengths, causal, rank, ring, place)
        # its own first, as a ring turns: then every query has seen a key
        for other in ((rank - step) % ring for step in range(ring)):
            for mine, theirs, shown in tiles[other]:
                attention.add_tile(
                    mixed[:, mine],
                    total[..., mine],
                    *tile(take(q, rank)[:, mine], *(take(x, other)[:, theirs] for x in (k, v)), shown),
                )
        pull = take(seeded(*q.shape, seed=5), rank).unflatten(2, (2, 2))
        for other in range(ring):
            for mine, theirs, shown in tiles[other]:
                own = tile_gradients(
                    take(q, rank)[:, mine],
                    *(take(x, other)[:, theirs] for x in (k, v)),
                    shown,
                    pull[:, mine],
                    mixed[:, mine],
                    total[..., mine],
                )
                for whole, part, (who, span) in zip(
                    found, own, ((rank, mine), (other, theirs), (other, theirs))
                ):
                    whole[:, parts[who].flatten()[span]] += part.cpu()
        made.append(mixed.flatten(2, 3).cpu())
    return [*made, *found]


@pytest.mark.parametrize(
    'lengths, causal',
    (([3, 8, 1, 4], True), ([16], True), ([16], False), ([13, 3], False), ([5, 11, 0], True)),
    ids=str,
)
@pytest.mark.parametrize('ring', (2, 4))
def test_a_ring_of_tiles(lengths, causal, ring):
    before = calls.copy()
    mine, theirs = (
        around(lengths, causal, ring, *way)
        for way in ((ring_tiles, torch.device('npu')), (ring_tiles, torch.device('cpu')))
    )
    assert apart(mine, theirs) <= LIMIT and set(BOTH) <= set(calls - before)
    assert ring_tiles(lengths, causal, 0, ring, torch.device('npu')) == npu_tiles(lengths, causal, 0, ring)


@pytest.mark.parametrize('shape', ((5, 1, 10), (3, 2, 33), (7,), (2, 3, 4, 5)), ids=str)
@pytest.mark.parametrize('epsilon', (1e-6, 0.1))
def test_norm(shape, epsilon):
    same(
        lambda x, weight: rms_norm(x, weight, epsilon),
        seeded(*shape).requires_grad_(),
        seeded(shape[-1]).requires_grad_(),
        fused=('npu_rms_norm', 'npu_rms_norm_backward'),
    )


@pytest.mark.parametrize('shape', ((5, 1, 10), (3, 34), (2,)), ids=str)
def test_swiglu(shape):
    same(swiglu, seeded(*shape).requires_grad_(), fused=('npu_swiglu', 'npu_swiglu_backward'))


def test_swiglu_of_strides():
    same(
        lambda x: swiglu(x.transpose(0, 1)),
        seeded(3, 5, 8).requires_grad_(),
        fused=('npu_swiglu', 'npu_swiglu_backward'),
    )


@pytest.mark.parametrize('b, s, h, d', ((1, 7, 3, 16), (2, 5, 1, 80), (2, 16, 2, 2)))
def test_rope_of_halves(b, s, h, d):
    cos, sin = cos_sin(rope_1d(torch.arange(b * s).view(b, s), d, 100.0), torch.float32)
    same(
        apply_rotary,
        seeded(b, s, h, d).requires_grad_(),
        cos,
        sin,
        fused=('npu_rotary_mul', 'npu_rotary_mul_backward'),
    )
    short = seeded(b, s, h, d).bfloat16()
    assert apply_rotary(short.npu(), cos.npu(), sin.npu()).dtype == torch.bfloat16
    # in float32, then rounded once, as the twin
    assert torch.equal(apply_rotary(short.npu(), cos.npu(), sin.npu()).cpu(), apply_rotary(short, cos, sin))


@pytest.mark.parametrize('b, s, h, d', ((1, 7, 3, 16), (2, 5, 1, 6)))
def test_rope_of_pairs(b, s, h, d):
    angles = rope_1d(torch.arange(s), d, 100.0)

    def halves(x):
        return x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2) if x.device.type == 'npu' else x

    same(
        apply_rotary_interleaved,
        seeded(b, s, h, d).requires_grad_(),
        angles.cos(),
        angles.sin(),
        fused=('npu_rotary_mul', 'npu_rotary_mul_backward'),
        change=halves,
    )

    def products(q, k):
        return torch.einsum(
            'bqhd,bkhd->bhqk',
            *(
                apply_rotary_interleaved(x, angles.cos().to(x.device), angles.sin().to(x.device))
                for x in (q, k)
            ),
        )

    # the order of channels falls out
    same(
        products,
        seeded(b, s, h, d).requires_grad_(),
        seeded(b, s, h, d, seed=1).requires_grad_(),
        fused=('npu_rotary_mul',),
    )


@pytest.mark.parametrize('dtype', (torch.float32, torch.bfloat16), ids=str)
def test_adamw(dtype):
    "Megatron's Adam is torch's fused one, which the wheel has a kernel for."

    def trained(place):
        x = seeded(5, 3).to(place, dtype).requires_grad_()
        optimizer = torch.optim.AdamW([x], lr=0.1, weight_decay=0.1, fused=True)
        for step in range(4):
            x.grad = seeded(5, 3, seed=step).to(place, dtype)
            optimizer.step()
        return x.detach().cpu().float()

    before = calls['_fused_adamw_']
    assert (
        apart([trained('npu')], [trained('cpu')]) <= (LIMIT if dtype == torch.float32 else 0.03)
        and calls['_fused_adamw_'] == before + 4
    )


def test_on_the_cpu_nothing_of_it_runs():
    before = calls.copy()
    on('cpu', attend, rows(1, 4, 2, 2, 8))
    assert not calls - before


# Wrong calls


def npu_rows(*size, **more):
    return [x.detach().npu() for x in rows(*size, **more)]


def test_shapes_that_do_not_fit_are_refused_by_us():
    q, k, v = npu_rows(1, 6, 4, 2, 8)
    for wrong in (
        (q, k[..., :4], v[..., :4]),
        (q, k, v[:, :5]),
        (q, k[:, :, :1].repeat(1, 1, 3, 1), v[:, :, :1].repeat(1, 1, 3, 1)),
        (q[0], k, v),
    ):
        with pytest.raises(ValueError):
            attend(*wrong)
    cos, sin = (x.npu() for x in cos_sin(rope_1d(torch.arange(6)[None], 8, 100.0), torch.float32))
    for wrong in (
        (cos[:, :5], sin[:, :5]),
        (cos[..., :4], sin[..., :4]),
        (cos, sin[:, :3]),
        (cos.repeat(3, 1, 1), sin.repeat(3, 1, 1)),
    ):
        with pytest.raises(ValueError, match='cosines'):
            npu_rotary(q, *wrong, mode='half')

    def ones(*shape):
        return torch.ones(shape, device='npu')

    for mode, shape, turns in (
        ('half', (1000, 1, 1, 8), (1, 1, 8)),
        ('half', (1, 1, 1000, 8), (1, 1, 8)),
        ('interleave', (10, 1, 100, 8), (1, 1, 8)),
        ('half', (1, 1, 1, 896), (1, 1, 896)),
        ('half', (1, 1, 1, 7), (1, 1, 7)),
    ):
        with pytest.raises(ValueError, match='the NPU turns no'):
            npu_rotary(ones(*shape), ones(*turns), ones(*turns), mode)
    for mode, shape in (('half', (999, 1, 2, 8)), ('interleave', (3, 1, 333, 8)), ('half', (2, 1, 2, 894))):
        npu_rotary(ones(*shape), ones(1, 1, shape[-1]), ones(1, 1, shape[-1]), mode)
    with pytest.raises(ValueError, match='cosines'):
        npu_rotary(ones(2, 1, 2, 8), ones(2, 1, 8), ones(2, 1, 8), 'interleave')
    with pytest.raises(ValueError, match='a weight of'):
        rms_norm(q, torch.ones(7, device='npu'), 1e-6)
    with pytest.raises(ValueError, match='gate and value'):
        swiglu(q[..., :7])


def calling(monkeypatch, **changed):
    "Changes what mmkit's call of the kernel passes on."
    real = torch_npu.npu_fusion_attention
    monkeypatch.setattr(
        torch_npu,
        'npu_fusion_attention',
        lambda q, k, v, **options: real(
            q, k, v, **{**options, **{name: value(options, q) for name, value in changed.items()}}
        ),
    )


@pytest.mark.parametrize(
    'changed',
    (
        dict(input_layout=lambda options, q: 'XYZ'),
        dict(input_layout=lambda options, q: 'TND'),
        dict(atten_mask=lambda options, q: options['atten_mask'].cpu()),
        dict(sparse_mode=lambda options, q: 9),
        dict(keep_prob=lambda options, q: 2.0),
        dict(attention_mask=lambda options, q: None),
    ),
    ids=lambda changed: next(iter(changed)),
)
def test_the_wheel_refuses(monkeypatch, changed):
    calling(monkeypatch, **changed)
    with pytest.raises((RuntimeError, TypeError)):
        fused_attention(*npu_rows(1, 6, 4, 4, 8), causal=True)


@pytest.mark.parametrize(
    'changed',
    (
        dict(scale=lambda options, q: 1.0),
        dict(
            sparse_mode=lambda options, q: 0,
            atten_mask=lambda options, q: ~torch.ones(6, 6, dtype=torch.bool, device='npu').triu(1),
        ),
        dict(atten_mask=lambda options, q: None),
    ),
    ids=('no scale', 'mask upside down', 'no mask'),
)
def test_the_twin_tells(monkeypatch, changed):
    calling(monkeypatch, **changed)
    inputs = [x.detach() for x in rows(1, 6, 4, 4, 8)]
    mine, theirs = (
        on(place, lambda q, k, v: attend(q, k, v, causal=True), inputs) for place in ('npu', 'cpu')
    )
    assert not apart(mine, theirs) <= 0.01  # or it is no number


@pytest.mark.parametrize(
    'changed',
    (dict(input_layout=lambda options, q: 'BNSD'), dict(head_num=lambda options, q: 3)),
    ids=('layout', 'heads'),
)
def test_a_shape_tells(monkeypatch, changed):
    """A layout or a number of heads that is another one's has the wrong shape on the meta device, or no
    result; mmkit compares it.
    """
    from torch._subclasses import FakeTensorMode

    def call():
        return fused_attention(*(torch.empty(2, 6, 4, 8, device='npu') for _ in range(3)), causal=False)

    with FakeTensorMode():
        assert call()[0].shape == (2, 6, 4, 8)
    calling(monkeypatch, **changed)
    with FakeTensorMode(), pytest.raises(ValueError, match='the fused attention made'):
        call()
