"""The documented formula of npu_fusion_attention and of its gradient, in float32.

A layout only says where a number lies: everything is brought to B N S D first. What the documentation leaves
undefined is filled with NaN, so that code which relies on it is seen. Rules are from op-plugin's page of
npu_fusion_attention.
"""

import torch

from npu_emulator import NotEmulated
from npu_emulator.fused import plain_only

# sparse modes 2, 3 and 4 take a mask of this size, whatever the lengths
COMPRESSED = 2048
STATISTICS = 8  # softmax_max and softmax_sum repeat each number as often
UNUSUAL = dict(pse=None, padding_mask=None, keep_prob=1.0, prefix=None, sink=None, dropout_mask=None)


def heads_first(x, layout, heads):
    "B N S D of a tensor in one of the layouts; `heads` is needed where they are not a dim of their own."
    if layout == 'BNSD':
        return x
    if layout == 'BSND':
        return x.transpose(1, 2)
    if layout == 'BSH':
        return x.unflatten(2, (heads, -1)).transpose(1, 2)
    if layout == 'SBH':
        return x.unflatten(2, (heads, -1)).permute(1, 2, 0, 3)
    if layout == 'TND':
        return x.transpose(0, 1)[None]
    raise NotEmulated(
        f'the emulated NPU has no formula for npu_fusion_attention with input_layout={layout!r}'
    )


def in_layout(x, layout):
    "The way back from B N S D."
    if layout == 'BNSD':
        return x
    if layout == 'BSND':
        return x.transpose(1, 2)
    if layout == 'BSH':
        return x.transpose(1, 2).flatten(2)
    if layout == 'SBH':
        return x.permute(2, 0, 1, 3).flatten(2)
    return x[0].transpose(0, 1)


def check_compressed(mask):
    "Raises ValueError unless the mask is the one that the sparse modes 2, 3 and 4 ask for."
    upper = torch.ones(COMPRESSED, COMPRESSED, dtype=torch.bool).triu(1)
    if (
        mask.shape[-2:] != upper.shape
        or mask.numel() != upper.numel()
        or not torch.equal(mask.bool().reshape(upper.shape), upper)
    ):
        raise ValueError(
            f'sparse_mode 2, 3 and 4 take triu(ones({COMPRESSED}, {COMPRESSED}), 1) as atten_mask, not'
            f' another mask of {tuple(mask.shape)}'
        )


def hidden(queries, keys, mask, mode, before, after):
    """Where (… queries keys) a query may not look, or None: everything is seen.

    Without a mask, mode and windows mean nothing.
    """
    if mask is None:
        return None
    if mode not in range(5):
        raise NotEmulated(f'the emulated NPU has no formula for npu_fusion_attention with sparse_mode={mode}')
    row, column = torch.arange(queries)[:, None], torch.arange(keys)[None]
    if mode in (0, 1):
        # of packed sequences, the mask of the longest
        if mask.dim() == 2:
            mask = mask[:queries, :keys]
        if mask.shape[-2:] != (queries, keys):
            raise ValueError(f'an atten_mask of {tuple(mask.shape)} for {queries} queries and {keys} keys')
        return mask.bool() if mode == 1 else mask.bool() | (column > row + after) | (column < row - before)
    check_compressed(mask)
    # the diagonal begins in the upper left corner
    if mode == 2:
        return column > row
    diagonal = row + keys - queries  # … ends in the lower right one
    return column > diagonal if mode == 3 else (column > diagonal + after) | (column < diagonal - before)


def repeated(x, heads):
    "Keys or values (b g s d) in float32, one head for each of the queries'."
    return x.float().repeat_interleave(heads // x.shape[1], 1)


def scores(q, k, scale, unseen):
    "Scaled scores (b n s s') in float32, -inf where a query may not look."
    found = q.float() @ repeated(k, q.shape[1]).transpose(-1, -2) * scale
    return found if unseen is None else found.masked_fill(unseen, -torch.inf)


def forward(q, k, v, scale, unseen, tolerant):
    """(result, largest score, sum of exponentials), the last two b n s 1.

    A query that sees nothing gets 0 if `tolerant`, else NaN.
    """
    found = scores(q, k, scale, unseen)
    largest = found.amax(-1, keepdim=True)
    weights = (found - largest).exp()
    total = weights.sum(-1, keepdim=True)
    result = weights / total @ repeated(v, q.shape[1])
    return (result.nan_to_num(0.0) if tolerant else result), largest, total


def backward(q, k, v, gradient, result, largest, total, scale, unseen):
    """Gradients of q, k and v from the forward pass's result and softmax statistics, which need not be those
    of these keys alone.
    """
    weights = (scores(q, k, scale, unseen) - largest).exp() / total
    gradient, result = gradient.float(), result.float()
    pull = (
        weights
        * (gradient @ repeated(v, q.shape[1]).transpose(-1, -2) - (gradient * result).sum(-1, keepdim=True))
        * scale
    )

    def summed(x):
        return x.unflatten(1, (k.shape[1], -1)).sum(2)  # over the query heads of a key head

    return (
        pull @ repeated(k, q.shape[1]),
        summed(pull.transpose(-1, -2) @ q.float()),
        summed(weights.transpose(-1, -2) @ gradient),
    )


def check_inputs(query, key, value, head_num, layout):
    """What CANN checks itself: one dtype, key heads that divide the query heads, equal head sizes.

    The number of key heads.
    """
    if not query.dtype == key.dtype == value.dtype:
        raise ValueError(
            f'query, key and value are {query.dtype}, {key.dtype} and {value.dtype}; one dtype is wanted'
        )
    packed = layout in ('BSH', 'SBH')
    heads = head_num if packed else query.shape[1 if layout in ('BNSD', 'TND') else 2]
    if heads != head_num:
        raise ValueError(f'head_num is {head_num}, but {layout} {tuple(query.shape)} has {heads} query heads')
    if query.shape[-1] % (head_num if packed else 1):
        raise ValueError(f'{head_num} heads do not divide {query.shape[-1]}')
    size = query.shape[-1] // head_num if packed else query.shape[-1]
    groups = key.shape[-1] // size if packed else key.shape[1 if layout in ('BNSD', 'TND') else 2]
    if key.shape[-1] % size if packed else key.shape[-1] != size:
        raise ValueError(f'keys {tuple(key.shape)} do not have heads of {size}')
    if not groups or head_num % groups:
        raise ValueError(f'{groups} key heads do not divide {head_num} query heads')
    return groups


def sequences(layout, tokens, lengths, other_lengths):
    """(slice of queries, slice of keys) of every packed sequence: cumulative lengths without a leading 0.

    Zeros at the end are sequences left out.
    """
    if layout != 'TND':
        return [(slice(None), slice(None))]
    ends = [(q, k) for q, k in zip(lengths, other_lengths)]
    while ends and ends[-1][0] == 0:
        ends.pop()
    starts = [(0, 0), *ends[:-1]]
    if any(a[0] > b[0] or a[1] > b[1] for a, b in zip(starts, ends)):
        raise ValueError(f'cumulative lengths must not fall: {lengths}, {other_lengths}')
    if ends and ends[-1][0] > tokens:
        raise ValueError(f'actual_seq_qlen ends at {ends[-1][0]}, but there are {tokens} tokens')
    if any(a[0] < b[0] and a[1] == b[1] for a, b in zip(starts, ends)):
        raise ValueError(f'a sequence has queries but no keys: {lengths}, {other_lengths}')
    return [(slice(a[0], b[0]), slice(a[1], b[1])) for a, b in zip(starts, ends) if a[0] < b[0]]


def statistics(x, layout, softmax_layout):
    """b n s 1 as CANN gives it: b n s 8.

    Of packed sequences each in the order n s 8 unless the call asks for s n 8.
    """
    x = x.expand(*x.shape[:-1], STATISTICS)
    if layout != 'TND':
        return x
    return (x[0].transpose(0, 1) if softmax_layout == 'TND' else x[0]).reshape(-1, STATISTICS)


def read_statistics(x, rows, heads, layout, softmax_layout):
    "The way back: b n s 1 of the packed sequence at `rows`."
    if layout != 'TND':
        return x[..., :1]
    part = x[rows]
    part = part.transpose(0, 1) if softmax_layout == 'TND' else part.reshape(heads, -1, STATISTICS)
    return part[None, ..., :1]


def undefined(x):
    "A float32 tensor like x of which nothing is known."
    return torch.full_like(x, torch.nan, dtype=torch.float32)


def attention(
    query,
    key,
    value,
    head_num,
    input_layout,
    atten_mask,
    scale,
    pre_tockens,
    next_tockens,
    inner_precise,
    actual_seq_qlen,
    actual_seq_kvlen,
    sparse_mode,
    softmax_layout,
    **options,
):
    "npu_fusion_attention: the result, the largest scores and the sums of exponentials."
    plain_only('npu_fusion_attention', options, **UNUSUAL)
    groups, found = check_inputs(query, key, value, head_num, input_layout), []
    result = undefined(query[..., : value.shape[-1]] if input_layout in ('BNSD', 'BSND', 'TND') else query)
    for rows, columns in sequences(input_layout, len(query), actual_seq_qlen, actual_seq_kvlen):
        q = heads_first(query[rows], input_layout, head_num)
        k, v = (heads_first(x[columns], input_layout, groups) for x in (key, value))
        unseen = hidden(q.shape[2], k.shape[2], atten_mask, sparse_mode, pre_tockens, next_tockens)
        tolerant = inner_precise == 2 or (sparse_mode == 3 and q.shape[2] > k.shape[2])
        mixed, *both = forward(q, k, v, scale, unseen, tolerant)
        result[rows] = in_layout(mixed, input_layout)
        found.append([statistics(x, input_layout, softmax_layout) for x in both])
    largest, total = (torch.cat(parts) for parts in zip(*found))
    return (
        (result, largest, total)
        if input_layout != 'TND'
        else (result, *(by_token(x, len(query), head_num) for x in (largest, total)))
    )


def by_token(x, tokens, heads):
    "Statistics of packed sequences in the shape t n 8; tokens of sequences left out are undefined."
    return torch.cat([x, x.new_full((tokens * heads - len(x), STATISTICS), torch.nan)]).reshape(
        tokens, heads, STATISTICS
    )


def attention_gradient(
    query,
    key,
    value,
    dy,
    head_num,
    input_layout,
    atten_mask,
    softmax_max,
    softmax_sum,
    attention_in,
    scale_value,
    pre_tockens,
    next_tockens,
    actual_seq_qlen,
    actual_seq_kvlen,
    sparse_mode,
    softmax_layout,
    **options,
):
    """npu_fusion_attention_grad: gradients of query, key and value from the statistics given, as ring
    attention gives those of whole rows.
    """
    plain_only(
        'npu_fusion_attention_grad',
        options,
        **{name: usual for name, usual in UNUSUAL.items() if name != 'dropout_mask'},
    )
    groups = check_inputs(query, key, value, head_num, input_layout)
    gradients = [undefined(x) for x in (query, key, value)]
    for rows, columns in sequences(input_layout, len(query), actual_seq_qlen, actual_seq_kvlen):
        q, pull, result = (heads_first(x[rows], input_layout, head_num) for x in (query, dy, attention_in))
        k, v = (heads_first(x[columns], input_layout, groups) for x in (key, value))
        unseen = hidden(q.shape[2], k.shape[2], atten_mask, sparse_mode, pre_tockens, next_tockens)
        largest, total = (
            read_statistics(x, rows, head_num, input_layout, softmax_layout)
            for x in (softmax_max, softmax_sum)
        )
        own = backward(q, k, v, pull, result, largest, total, scale_value, unseen)
        for whole, part, place in zip(gradients, own, (rows, columns, columns)):
            whole[place] = in_layout(part, input_layout)
    return gradients


FORMULAS = {'npu_fusion_attention': attention, 'npu_fusion_attention_grad': attention_gradient}
