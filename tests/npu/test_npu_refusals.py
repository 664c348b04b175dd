"""What a wrong call of the emulated NPU meets: the wheel's own host code refuses most, the formulas refuse
what CANN would, and nothing runs unseen.
"""

import npu_emulator
import pytest
import torch
import torch_npu
from npu_emulator.fused import last_operator

Q = torch.zeros(2, 16, 4, 8).npu()
PACKED = torch.zeros(30, 4, 8).npu()
WHOLE = torch.zeros(16, 16, dtype=torch.bool)
ENDS = dict(actual_seq_qlen=[10, 30], actual_seq_kvlen=[10, 30])


def attend(q=Q, k=Q, v=Q, heads=4, layout='BSND', **options):
    return torch_npu.npu_fusion_attention(q, k, v, heads, layout, **options)


BY_THE_WHEEL = {
    'a layout that is none': (lambda: attend(layout='XYZ'), 'layout'),
    'a tensor of three dims as BSND': (lambda: attend(PACKED, PACKED, PACKED), 'Dimension out of range'),
    'a mask on the CPU': (lambda: attend(atten_mask=WHOLE), 'npu|device'),
    'queries on the CPU': (lambda: attend(Q.cpu()), 'PrivateUse1|device|npu'),
    'keep_prob=2': (lambda: attend(keep_prob=2.0), 'keep_prob'),
    'sparse_mode=9': (lambda: attend(sparse_mode=9), 'sparse_mode'),
    'no heads': (lambda: attend(heads=0), 'head_num'),
    'TND without lengths': (lambda: attend(PACKED, PACKED, PACKED, layout='TND'), 'actual_seq'),
    'lengths in a tensor': (
        lambda: attend(
            PACKED,
            PACKED,
            PACKED,
            layout='TND',
            actual_seq_qlen=torch.tensor([30]).npu(),
            actual_seq_kvlen=[30],
        ),
        'actual_seq_qlen',
    ),
    'a misspelt name': (lambda: attend(attention_mask=WHOLE.npu()), 'attention_mask'),
    'the name of another version': (lambda: attend(next_tokens=0), 'next_tokens'),
    'eps for epsilon': (lambda: torch_npu.npu_rms_norm(Q, Q[0, 0, 0], eps=1e-6), 'eps'),
    'rotary_mode that is none': (
        lambda: torch_npu.npu_rotary_mul(Q, Q[:1, :, :1], Q[:1, :, :1], 'foo'),
        'rotary_mode|mode',
    ),
    'all_gather_base_mm of unequal sizes': (
        lambda: torch_npu.npu_all_gather_base_mm(
            torch.zeros(4, 256).npu(), torch.zeros(255, 8).npu(), 'x', 2
        ),
        '256|255|dim',
    ),
    'all_gather_base_mm in three dims': (
        lambda: torch_npu.npu_all_gather_base_mm(
            torch.zeros(1, 4, 256).npu(), torch.zeros(256, 8).npu(), 'x', 2
        ),
        'required to be 2D',
    ),
    'mm_reduce_scatter_base of an odd number of rows': (
        lambda: torch_npu.npu_mm_reduce_scatter_base(
            torch.zeros(5, 256).npu(), torch.zeros(256, 8).npu(), 'x', 2
        ),
        'world_size|rankSize|divi|integer',
    ),
}
BY_THE_FORMULA = {
    'another number of heads': (lambda: attend(heads=3), 'head_num is 3'),
    'BNSD for BSND': (lambda: attend(layout='BNSD'), 'head_num is 4, but BNSD'),
    'keys with another head size': (
        lambda: attend(k=torch.zeros(2, 16, 4, 4).npu(), v=torch.zeros(2, 16, 4, 4).npu()),
        'heads of 8',
    ),
    'key heads that do not divide': (
        lambda: attend(k=torch.zeros(2, 16, 3, 8).npu(), v=torch.zeros(2, 16, 3, 8).npu()),
        'do not divide',
    ),
    'keys of another dtype': (lambda: attend(k=Q.bfloat16()), 'one dtype'),
    'a causal mode with a mask of the lengths': (
        lambda: attend(atten_mask=WHOLE.npu(), sparse_mode=2),
        '2048',
    ),
    'a causal mask on its other side': (
        lambda: attend(atten_mask=torch.ones(2048, 2048).tril(-1).bool().npu(), sparse_mode=2),
        '2048',
    ),
    'a compressed mask in mode 0': (
        lambda: attend(atten_mask=torch.ones(2048, 2048).triu(1).bool().npu()[None, None]),
        '16 queries',
    ),
    'lengths that fall': (
        lambda: attend(
            PACKED, PACKED, PACKED, layout='TND', actual_seq_qlen=[20, 10], actual_seq_kvlen=[20, 10]
        ),
        'must not fall',
    ),
    'lengths beyond the tokens': (
        lambda: attend(PACKED, PACKED, PACKED, layout='TND', actual_seq_qlen=[40], actual_seq_kvlen=[40]),
        '30 tokens',
    ),
    'gamma of another length': (lambda: torch_npu.npu_rms_norm(Q, torch.zeros(7).npu()), 'gamma'),
    'cos of another length': (
        lambda: torch_npu.npu_rotary_mul(Q, torch.zeros(1, 9, 1, 8).npu(), Q[:1, :, :1]),
        'r1',
    ),
    'half of cos': (
        lambda: torch_npu.npu_rotary_mul(Q, torch.zeros(1, 16, 1, 4).npu(), torch.zeros(1, 16, 1, 4).npu()),
        'r1',
    ),
    'heads of 896 to turn': (
        lambda: torch_npu.npu_rotary_mul(Q.repeat(1, 1, 1, 112), *[torch.zeros(1, 16, 1, 896).npu()] * 2),
        'below 896',
    ),
    'swiglu of a transposed tensor': (lambda: torch_npu.npu_swiglu(Q.transpose(1, 2)), 'contiguous'),
    'a communicator of no group': (
        lambda: torch_npu.npu_all_gather_base_mm(
            torch.zeros(4, 256).npu(), torch.zeros(256, 8).npu(), 'x', 2
        ),
        'get_hccl_comm_name',
    ),
}
NOT_EMULATED = {
    'dropout': (lambda: attend(keep_prob=0.9), 'npu_fusion_attention with keep_prob=0.9'),
    'a bias of positions': (lambda: attend(pse=torch.zeros(2, 4, 16, 16).npu()), 'pse'),
    'prefixes': (
        lambda: attend(atten_mask=WHOLE.npu()[None, None], sparse_mode=5, prefix=[1, 1]),
        'sparse_mode=5|prefix',
    ),
    'an operator': (lambda: torch_npu.npu_fast_gelu(Q), 'aclnnFastGelu'),
    'another operator': (lambda: torch_npu.npu_add_rms_norm(Q, Q, Q[0, 0, 0]), 'aclnnAddRmsNorm'),
}
REFUSALS = {**BY_THE_WHEEL, **BY_THE_FORMULA, **NOT_EMULATED}


@pytest.mark.parametrize('name', REFUSALS)
def test_a_wrong_call_is_refused(name):
    call, words = REFUSALS[name]
    npu_emulator.calls.clear()
    with pytest.raises((RuntimeError, TypeError, ValueError, IndexError), match=words) as caught:
        call()
    own = any(
        'npu_emulator/attention.py' in str(entry.path)
        or 'npu_emulator/formulas.py' in str(entry.path)
        or 'collectives.py' in str(entry.path)
        for entry in caught.traceback
    )
    assert own == (name in BY_THE_FORMULA) or name in NOT_EMULATED, (
        f'refused by {"the formula" if own else "the wheel"}: {caught.value}'
    )
    assert not npu_emulator.calls


def test_the_same_calls_made_right_are_taken():
    "Nothing above is refused for another reason than the one that is named."
    (
        attend(),
        attend(atten_mask=WHOLE.npu()),
        attend(layout='BNSD', heads=16),
        attend(PACKED, PACKED, PACKED, layout='TND', **ENDS),
    )
    (
        torch_npu.npu_rms_norm(Q, Q[0, 0, 0], epsilon=1e-6),
        torch_npu.npu_rotary_mul(Q, Q[:1, :, :1], Q[:1, :, :1], 'half'),
    )
    torch_npu.npu_swiglu(Q.transpose(1, 2).contiguous())


def test_a_missing_scale_is_seen_in_the_numbers():
    "No check can refuse it: the operator's default scale is 1, not 1 / sqrt(d)."
    x = torch.randn(1, 6, 2, 16)
    found = torch_npu.npu_fusion_attention(*[x.npu()] * 3, 2, 'BSND')[0].cpu()
    wanted = torch.nn.functional.scaled_dot_product_attention(*[x.transpose(1, 2)] * 3).transpose(1, 2)
    assert (found - wanted).abs().max() > 0.05


def test_host_code_comes_first():
    "The wheel's host code runs down to CANN's operator, and its autograd node is the wheel's own."
    found = attend(Q.clone().requires_grad_())[0]
    assert (
        last_operator().startswith('aclnnFlashAttentionScore')
        and type(found.grad_fn).__name__ == 'NpuFusionAttentionBackward0'
    )
    found.sum().backward()
    assert last_operator().startswith('aclnnFlashAttentionScoreGrad')


def test_an_operator_called_behind_the_formulas_fails_by_name():
    "A call that reaches CANN from anywhere else fails too."
    with pytest.raises(RuntimeError, match='no formula for aclnnGeGlu'):
        torch_npu.npu_geglu(Q)


def test_torch_s_own_operators_are_the_cpu_s():
    "Values, strides, views, writing in place, out=, lists, random numbers of the device's generator."
    x = torch.randn(6, 4)
    y = x.npu()
    assert torch.equal((y.t() @ y).cpu(), x.t() @ x) and y.t().contiguous().stride() == (6, 1)
    y[1:3] *= 2
    assert torch.equal(y.cpu()[1:3], x[1:3] * 2) and torch.equal(
        torch.cat([y, y], 1).cpu()[1:3, 4:], x[1:3] * 2
    )
    out = torch.empty(6).npu()
    assert torch.sum(y, 1, out=out) is out and torch.equal(out.cpu(), y.cpu().sum(1))
    torch._foreach_mul_([y, out], 0.0)
    assert not y.any() and not out.any()
    torch.manual_seed(3)
    a, b = torch.rand(3, device='npu'), torch.rand(3, device='npu')
    state = torch.npu.get_rng_state()
    c = torch.rand(3, device='npu')
    torch.npu.set_rng_state(state)
    assert not torch.equal(a, b) and torch.equal(c, torch.rand(3, device='npu'))


@pytest.mark.parametrize(
    'call',
    [
        lambda x: x + torch.ones(3),
        lambda x: torch.where(torch.ones(3) > 0, x, x),
        lambda x: x.masked_fill(torch.ones(3) > 0, 0),
        lambda x: torch.cat([x, torch.ones(3)]),
        lambda x: x + torch.ones(3, device='npu:1'),
        lambda x: torch.outer(x, torch.ones(3)),
    ],
)
def test_tensors_of_two_devices_do_not_meet(call):
    "As on an NPU, where the CPU's memory cannot be reached; numbers, copies and indices may."
    x = torch.ones(3, device='npu:0')
    with pytest.raises(RuntimeError, match='same device'):
        call(x)
    assert (
        (x + torch.tensor(1.0)).sum() == 6
        and x[torch.tensor([0, 2])].sum() == 2
        and x.copy_(torch.zeros(3)).sum() == 0
    )


def test_dropout_follows_the_device_s_generator():
    """What recompute and Megatron's random tracker rely on: the same state gives the same mask, and the CPU's
    generator is left alone.
    """
    x, host = torch.ones(64).npu(), torch.get_rng_state()

    def drop():
        return torch.nn.functional.dropout(x, 0.5)

    state = torch.npu.get_rng_state()
    first, second = drop(), drop()
    torch.npu.set_rng_state(state)
    assert (
        torch.equal(drop(), first)
        and not torch.equal(second, first)
        and 0 < first.count_nonzero() < 64
        and torch.equal(torch.get_rng_state(), host)
    )


def test_numbers_that_npus_hardly_have_are_counted():
    npu_emulator.doubtful.clear()
    wide = torch.ones(3).npu().double()
    assert not npu_emulator.doubtful
    wide * 2, torch.view_as_complex(torch.ones(3, 2).npu()).exp()
    assert npu_emulator.doubtful == {'aten::mul float64': 1, 'aten::exp complex64': 1}


def test_two_devices_and_their_names():
    assert (
        torch.npu.is_available()
        and torch.npu.device_count() == 2
        and torch.npu.get_device_name().startswith('Ascend910B')
    )
    assert (torch.ones(2, device='npu:1') + 1).device == torch.device('npu', 1)
