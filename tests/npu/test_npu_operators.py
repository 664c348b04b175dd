"""Every fused operator of the emulated NPU gives what torch's own formula gives on the CPU, forward and
backward, in float32 within 1e-5.

torch's formula is another one than the emulator's: scaled_dot_product_attention, rms_norm, complex
multiplication, silu, AdamW, and autograd for gradients.
"""

import npu_emulator
import pytest
import torch
import torch.nn.functional as F
import torch_npu

from mmkit.core.values import largest

LIMIT = 1e-5  # largest difference over largest value
COMPRESSED = torch.ones(2048, 2048, dtype=torch.bool).triu(1)


def apart(mine, theirs):
    "Largest difference over largest value, of a tensor of the NPU and one of the CPU."
    assert mine.device.type == 'npu' and mine.shape == theirs.shape
    return ((mine.cpu() - theirs).abs().max() / theirs.abs().max()).item()


def same(mine, theirs, gradient, inputs, twins, name, backward):
    "Results and gradients agree, and the operator and its gradient were called once each."
    assert apart(mine, theirs) < LIMIT
    found = torch.autograd.grad(mine, inputs, gradient.npu())
    wanted = torch.autograd.grad(theirs, twins, gradient)
    assert largest(map(apart, found, wanted)) < LIMIT
    assert npu_emulator.calls == {name: 1, backward: 1}


def test_not_a_number_is_far():
    "In a result, and in the second of two gradients."
    x, y = (torch.ones(2, requires_grad=True) for _ in range(2))
    x2, y2 = (one.detach().npu().requires_grad_() for one in (x, y))
    for made in (x2 + y2 * torch.nan, x2 + y2 + (y2 - 1).sqrt() * 0):
        with pytest.raises(AssertionError, match='(nan|inf) < 1e-05'):  # noqa: RUF043
            same(made, x + y, torch.ones(2), (x2, y2), (x, y), 'none', 'none')


@pytest.fixture(autouse=True)
def counted_anew():
    "The counts of one test."
    npu_emulator.calls.clear()
    torch.manual_seed(0)


def pair(*shape):
    "The same random numbers as a leaf on the NPU and as one on the CPU."
    x = torch.randn(shape)
    return x.npu().requires_grad_(), x.requires_grad_()


TO_LAYOUT = {
    'BSND': lambda x: x,
    'BNSD': lambda x: x.transpose(1, 2),
    'BSH': lambda x: x.flatten(2),
    'SBH': lambda x: x.flatten(2).transpose(0, 1),
}
MASKS = {
    'none': (None, 0, 2**31 - 1, 2**31 - 1, lambda i, j, s, t: None),
    'whole': ('whole', 0, 2**31 - 1, 2**31 - 1, lambda i, j, s, t: (i * 7 + j * 3) % 5 != 1),
    'window': ('whole', 0, 2, 3, lambda i, j, s, t: (j <= i + 3) & (j >= i - 2)),
    'all': ('whole', 1, 0, 0, lambda i, j, s, t: (i + j) % 3 != 1),
    'upper left': ('compressed', 2, 0, 0, lambda i, j, s, t: j <= i),
    'lower right': ('compressed', 3, 0, 0, lambda i, j, s, t: j <= i + t - s),
    'band': ('compressed', 4, 4, 1, lambda i, j, s, t: (j <= i + t - s + 1) & (j >= i + t - s - 4)),
}


def seen_in(rule, queries, keys):
    return rule(torch.arange(queries)[:, None], torch.arange(keys)[None], queries, keys)


def mixed(q, k, v, seen, scale=None):
    "torch's attention of (b s n d)."
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale, enable_gqa=True).transpose(
        1, 2
    )


@pytest.mark.parametrize('lengths', [(16, 16), (13, 13), (5, 11)], ids=str)
@pytest.mark.parametrize('mask', MASKS)
@pytest.mark.parametrize(
    'layout, groups', [('BSND', 6), ('BSND', 2), ('BNSD', 3), ('SBH', 2), ('SBH', 6), ('BSH', 1)]
)
def test_attention(layout, groups, mask, lengths):
    kind, mode, before, after, rule = MASKS[mask]
    (q, q2), (k, k2), (v, v2) = (
        pair(2, lengths[0], 6, 8),
        pair(2, lengths[1], groups, 8),
        pair(2, lengths[1], groups, 8),
    )
    seen = seen_in(rule, *lengths)
    given = {None: None, 'whole': None if seen is None else (~seen).npu(), 'compressed': COMPRESSED.npu()}[
        kind
    ]
    found = torch_npu.npu_fusion_attention(
        *map(TO_LAYOUT[layout], (q, k, v)),
        6,
        layout,
        atten_mask=given,
        scale=0.3,
        sparse_mode=mode,
        pre_tockens=before,
        next_tockens=after,
    )
    wanted = TO_LAYOUT[layout](mixed(q2, k2, v2, seen, 0.3))
    same(
        found[0],
        wanted,
        torch.randn(wanted.shape),
        (q, k, v),
        (q2, k2, v2),
        'npu_fusion_attention',
        'npu_fusion_attention_grad',
    )
    scores = torch.einsum('bsgrd,btgd->bgrst', q2.unflatten(2, (groups, -1)), k2).flatten(1, 2) * 0.3
    if seen is not None:
        scores = scores.masked_fill(~seen, -torch.inf)
    largest, total = found[1].cpu(), found[2].cpu()
    assert (
        largest.shape == (2, 6, lengths[0], 8) and (largest - scores.amax(-1)[..., None]).abs().max() < LIMIT
    )
    assert ((largest + total.log()) - scores.logsumexp(-1)[..., None]).abs().max() < LIMIT


PACKED = {
    'one': ([7], [7]),
    'many': ([1, 6, 3, 9], [1, 6, 3, 9]),
    'none between': ([4, 0, 5], [4, 0, 5]),
    'other keys': ([3, 4, 2], [8, 4, 5]),
}


@pytest.mark.parametrize('softmax_layout', ['', 'TND'])
@pytest.mark.parametrize('mode', [0, 2, 3])
@pytest.mark.parametrize('lengths', PACKED)
@pytest.mark.parametrize('groups', [4, 2])
def test_packed_attention(groups, lengths, mode, softmax_layout):
    queries, keys = PACKED[lengths]
    (q, q2), (k, k2), (v, v2) = (
        pair(sum(queries), 4, 8),
        pair(sum(keys), groups, 8),
        pair(sum(keys), groups, 8),
    )
    ends = dict(
        actual_seq_qlen=torch.tensor(queries).cumsum(0).tolist(),
        actual_seq_kvlen=torch.tensor(keys).cumsum(0).tolist(),
    )
    found = torch_npu.npu_fusion_attention(
        q,
        k,
        v,
        4,
        'TND',
        scale=8**-0.5,
        atten_mask=COMPRESSED.npu() if mode else None,
        sparse_mode=mode,
        softmax_layout=softmax_layout,
        **ends,
    )
    rule = {0: lambda i, j, s, t: None, 2: lambda i, j, s, t: j <= i, 3: lambda i, j, s, t: j <= i + t - s}[
        mode
    ]
    parts = [
        mixed(a[None], b[None], c[None], seen_in(rule, len(a), len(b)))[0]
        for a, b, c in zip(q2.split(queries), k2.split(keys), v2.split(keys))
        if len(a)
    ]
    wanted = torch.cat(parts)
    same(
        found[0],
        wanted,
        torch.randn(wanted.shape),
        (q, k, v),
        (q2, k2, v2),
        'npu_fusion_attention',
        'npu_fusion_attention_grad',
    )
    # the statistics of the last sequence: n s 8, or s n 8 if asked
    start = sum(queries[:-1])
    scores = (
        torch.einsum('sgrd,tgd->grst', q2[start:].unflatten(1, (groups, -1)), k2[sum(keys[:-1]) :]).flatten(
            0, 1
        )
        * 8**-0.5
    )
    seen = seen_in(rule, queries[-1], keys[-1])
    total = (scores if seen is None else scores.masked_fill(~seen, -torch.inf)).logsumexp(-1)
    own = (found[1] + found[2].log())[start:].cpu()
    own = own.transpose(0, 1) if softmax_layout == 'TND' else own.reshape(4, -1, 8)
    assert (own - total[..., None]).abs().max() < LIMIT


@pytest.mark.parametrize('layout', ['BSND', 'SBH'])
def test_gradients_of_tiles_sum_to_those_of_the_whole_row(layout):
    """What ring attention does: two tiles of keys, joined by their statistics.

    Each tile's gradient from the statistics of the whole row.
    """
    (q, q2), (k, k2), (v, v2) = (pair(2, 10, 4, 8), pair(2, 12, 2, 8), pair(2, 12, 2, 8))
    cut, way = TO_LAYOUT[layout], dict(head_num=4, input_layout=layout)
    whole = mixed(q2, k2, v2, None)
    gradient = torch.randn_like(whole)
    tiles = [[cut(x.detach()) for x in (q, *part)] for part in zip(k.chunk(2, 1), v.chunk(2, 1))]
    found = [torch_npu.npu_fusion_attention(*tile, **way, scale=8**-0.5) for tile in tiles]
    highest = torch.maximum(found[0][1], found[1][1])
    shares = [part[2] * (part[1] - highest).exp() for part in found]
    total = sum(shares)

    def spread(x):
        return cut(x[..., :1].transpose(1, 2).expand(2, 10, 4, 8))

    joined = sum(part[0] * spread(share / total) for part, share in zip(found, shares))
    assert apart(joined, cut(whole)) < LIMIT
    pulled = [
        torch_npu.npu_fusion_attention_grad(
            *tile,
            cut(gradient.npu()),
            **way,
            softmax_max=highest,
            softmax_sum=total,
            attention_in=joined,
            scale_value=8**-0.5,
        )
        for tile in tiles
    ]
    mine = (
        pulled[0][0] + pulled[1][0],
        *(torch.cat([a, b], 1 if layout == 'BSND' else 0) for a, b in zip(pulled[0][1:3], pulled[1][1:3])),
    )
    assert largest(map(apart, mine, map(cut, torch.autograd.grad(whole, (q2, k2, v2), gradient)))) < LIMIT


def test_without_a_mask_mode_and_window_do_nothing():
    "As the documentation says: raw npu_fusion_attention without a mask sees everything."
    q = torch.randn(1, 6, 2, 8)
    found = torch_npu.npu_fusion_attention(
        *[q.npu()] * 3, 2, 'BSND', scale=8**-0.5, sparse_mode=3, next_tockens=0
    )[0]
    assert apart(found, mixed(q, q, q, None)) < LIMIT


def test_tokens_of_no_sequence_are_undefined():
    "Cumulative lengths that end before the last token, or with zeros, leave the rest out."
    x = torch.randn(9, 2, 8).npu().requires_grad_()
    found = torch_npu.npu_fusion_attention(
        x, x, x, 2, 'TND', actual_seq_qlen=[3, 7, 0], actual_seq_kvlen=[3, 7, 0]
    )[0]
    found[:7].sum().backward()
    assert (
        found[:7].isfinite().all()
        and found[7:].isnan().all()
        and x.grad[:7].isfinite().all()
        and x.grad[7:].isnan().all()
    )


def test_a_query_that_sees_nothing_is_undefined():
    "NaN, so that code which relies on such rows is seen; with inner_precise=2 the result is 0."
    q, hidden = torch.randn(1, 4, 2, 8).npu(), torch.zeros(4, 4, dtype=torch.bool)
    hidden[1] = True
    found = [
        torch_npu.npu_fusion_attention(q, q, q, 2, 'BSND', atten_mask=hidden.npu(), inner_precise=precise)[
            0
        ].cpu()
        for precise in (0, 2)
    ]
    assert (
        found[0][:, 1].isnan().all()
        and found[0][:, [0, 2, 3]].isfinite().all()
        and (found[1][:, 1] == 0).all()
    )


@pytest.mark.parametrize('shape, dims', [((3, 7, 10), 1), ((5, 4, 6), 2), ((1, 1), 1)])
def test_rms_norm(shape, dims):
    (x, x2), (weight, weight2) = pair(*shape), pair(*shape[-dims:])
    # small numbers, or epsilon would not be seen
    with torch.no_grad():
        x.mul_(0.01), x2.mul_(0.01)
    found, rstd = torch_npu.npu_rms_norm(x, weight, epsilon=1e-4)
    same(
        found,
        F.rms_norm(x2, shape[-dims:], weight2, 1e-4),
        torch.randn(shape),
        (x, weight),
        (x2, weight2),
        'npu_rms_norm',
        'npu_rms_norm_backward',
    )
    assert rstd.shape == (*shape[:-dims], *[1] * dims) and rstd.dtype == torch.float32


@pytest.mark.parametrize('mode', ['half', 'interleave'])
@pytest.mark.parametrize(
    'shape, over',
    [
        ((2, 5, 3, 8), (1, 5, 1, 8)),
        ((5, 2, 3, 8), (5, 1, 1, 8)),
        ((2, 3, 5, 8), (1, 1, 5, 8)),
        ((7, 3, 8), (7, 1, 8)),
    ],
)
def test_rotary_mul(shape, over, mode):
    "The twin turns complex numbers."
    x, x2 = pair(*shape)
    angles = torch.randn(*over[:-1], over[-1] // 2)
    spread = (lambda a: torch.cat([a, a], -1)) if mode == 'half' else lambda a: a.repeat_interleave(2, -1)
    found = torch_npu.npu_rotary_mul(x, spread(angles.cos()).npu(), spread(angles.sin()).npu(), mode)
    a, b = x2.chunk(2, -1) if mode == 'half' else (x2[..., 0::2], x2[..., 1::2])
    turned = torch.complex(a, b) * torch.polar(torch.ones_like(angles), angles)
    wanted = (
        torch.cat([turned.real, turned.imag], -1)
        if mode == 'half'
        else torch.view_as_real(turned).flatten(-2)
    )
    same(found, wanted, torch.randn(shape), (x,), (x2,), 'npu_rotary_mul', 'npu_rotary_mul_backward')


@pytest.mark.parametrize('shape, dim', [((3, 5, 14), -1), ((2, 6), 1), ((4, 3), 0)])
def test_swiglu(shape, dim):
    x, x2 = pair(*shape)
    gate, up = x2.chunk(2, dim)
    wanted = F.silu(gate) * up
    same(
        torch_npu.npu_swiglu(x, dim=dim),
        wanted,
        torch.randn(wanted.shape),
        (x,),
        (x2,),
        'npu_swiglu',
        'npu_swiglu_backward',
    )


def test_fused_adamw():
    "Ten steps of torch's fused AdamW on the NPU are those of its plain form on the CPU."
    (a, a2), (b, b2) = pair(5, 3), pair(7)
    options = dict(lr=0.1, betas=(0.8, 0.95), weight_decay=0.2, eps=1e-6)
    mine = torch.optim.AdamW([a, b], fused=True, **options)
    theirs = torch.optim.AdamW([a2, b2], foreach=False, fused=False, **options)
    for _ in range(10):
        for x, y in ((a, a2), (b, b2)):
            y.grad = torch.randn(y.shape)
            x.grad = y.grad.npu()
        mine.step(), theirs.step()
    assert apart(a, a2) < LIMIT and apart(b, b2) < LIMIT and npu_emulator.calls == {'_fused_adamw_': 10}


def test_fused_adamw_with_whole_steps():
    "MindSpeed counts steps in int64 on the device."
    (x, y), gradient = pair(6), torch.randn(6)
    state = [torch.zeros(6).npu(), torch.zeros(6).npu()]
    with torch.no_grad():
        torch._fused_adamw_(
            [x],
            [gradient.npu()],
            [state[0]],
            [state[1]],
            [],
            [torch.tensor(1).npu()],
            amsgrad=False,
            lr=0.1,
            beta1=0.9,
            beta2=0.99,
            weight_decay=0.1,
            eps=1e-8,
            maximize=False,
        )
    y.grad = gradient
    torch.optim.AdamW([y], lr=0.1, betas=(0.9, 0.99), weight_decay=0.1, eps=1e-8).step()
    assert apart(x, y) < LIMIT


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_low_precision_is_rounded_once(dtype):
    "Outputs have the inputs' dtype, statistics are float32."
    q = torch.randn(1, 6, 2, 8, dtype=dtype)
    found = torch_npu.npu_fusion_attention(*[q.npu()] * 3, 2, 'BSND', scale=8**-0.5)
    assert found[0].dtype == dtype and found[1].dtype == found[2].dtype == torch.float32
    assert (
        torch.equal(found[0].cpu(), mixed(*[q.float()] * 3, None).to(dtype))
        or (found[0].cpu().float() - mixed(*[q.float()] * 3, None)).abs().max() < 1e-2
    )
