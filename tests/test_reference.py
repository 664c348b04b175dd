"""The model is transformers' Qwen2.5-VL: logits, positions, every gradient and every answer, on one rank and
cut over two.

All weights are random, none is zero or one. Gradients go the trainer's way: schedule, reduction over ranks,
division by the global count.
"""

import inspect
import itertools
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import parity
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from mmkit.config import Config, Layout
from mmkit.converters.folders import hub_name
from mmkit.core.device import pick_device, place
from mmkit.models.generate import generate, whole_logits
from mmkit.models.shapes import QwenShape
from mmkit.parallel.mesh import open_mesh
from mmkit.toy.qwen import tiny_qwen2_5_vl
from mmkit.trainer.qwen2_5_vl import pack, positions

SIZES = dict(
    hidden=64,
    layers=3,
    heads=4,
    kv_heads=2,
    ffn=160,
    vision_hidden=64,
    vision_depth=4,
    vision_heads=4,
    vision_ffn=96,
    window=56,
    full_attention=(1, 3),
)
MODELS = {'tied': dict(tied=True, seed=1), 'untied': dict(tied=False, seed=2)}

# A case is a step of micro-batches of samples; a sample is words (how many), pictures (1, rows, columns) and
# clips (steps, rows, columns, seconds per step).
CASES = {
    'text only': [[[9], [24]]],
    'one image': [[[4, (1, 10, 14), 11]]],
    'images of odd sizes': [[[3, (1, 6, 22), 2, (1, 10, 14), (1, 4, 6), 8]]],
    'video': [[[3, (2, 8, 12, 1.0), 9]]],
    'long video': [[[5, (4, 6, 4, 1.5), 4, (3, 4, 4, 0.25), 8]]],
    # every other micro-batch has no picture
    'mixed': [
        [[6], [3, (1, 10, 14), 5], [2, (2, 10, 8, 1.0), 4, (1, 6, 22), 7]],
        [[12], [5]],
        [[2, (1, 4, 4), (1, 8, 6), 3], [8]],
        [[7]],
    ],
}
PROMPTS = [[4, (1, 10, 14), 6], [3, (1, 6, 22), 2, (1, 4, 4), 5], [9], [2, (2, 8, 12, 1.0), 4]]
NEW = 16
LAYOUTS = {
    1: {
        'tp 1': Layout(data_parallel='ddp'),
        'recompute': Layout(data_parallel='ddp', recompute='full'),
        'zero1': Layout(),
    },
    2: {
        'tp 2': Layout(tp=2, data_parallel='ddp'),
        'tp 2, sequence parallel': Layout(tp=2, sequence_parallel=True, data_parallel='ddp'),
        'tp 2, sequence parallel, recompute': Layout(
            tp=2, sequence_parallel=True, data_parallel='ddp', recompute='full'
        ),
        'dp 2, overlap': Layout(data_parallel='ddp', overlap=True),
        'dp 2, zero1, overlap': Layout(overlap=True),
    },
}


def draw(shape, config, parts, seed):
    "A sample with random words and pixels; the first third of it is not trained."
    random, ids, grid, seconds = np.random.default_rng(seed), [], [], []
    for part in parts:
        if isinstance(part, int):
            ids += random.integers(0, 256, part).tolist()
            continue
        token = shape.video_token if len(part) == 4 else shape.image_token
        ids += [
            config['vision_start_token_id'],
            *[token] * (part[0] * part[1] * part[2] // 4),
            config['vision_end_token_id'],
        ]
        grid.append(part[:3])
        seconds.append(part[3] if len(part) == 4 else 0)
    ids, grid = torch.tensor(ids), torch.tensor(grid, dtype=torch.int64).reshape(-1, 3)
    labels = torch.where(
        (torch.arange(len(ids)) < len(ids) // 3) | (ids == shape.image_token) | (ids == shape.video_token),
        -100,
        ids,
    )
    seconds = torch.tensor(seconds, dtype=torch.float32)
    pixels = torch.from_numpy(random.normal(size=(int(grid.prod(1).sum()), 1176)).astype(np.float32))
    return dict(
        input_ids=ids,
        labels=labels,
        grid=grid,
        seconds=seconds,
        pixels=pixels,
        positions=positions(shape, ids, grid, seconds),
    )


def step_of(folder, case):
    "The samples of a case, micro-batch by micro-batch."
    config = json.loads((folder / 'config.json').read_text())
    shape, count = QwenShape.from_hf(config), itertools.count(100)
    return [
        [draw(shape, config, parts, next(count)) for parts in micro]
        for micro in (CASES[case] if isinstance(case, str) else case)
    ]


# transformers


def hf_inputs(model, sample):
    "A sample as arguments of transformers."
    videos, parts = sample['seconds'] > 0, sample['pixels'].split(sample['grid'].prod(1).tolist())
    kinds = (sample['input_ids'] == model.config.image_token_id) + 2 * (
        sample['input_ids'] == model.config.video_token_id
    )
    found = dict(
        input_ids=sample['input_ids'][None], attention_mask=torch.ones(1, len(kinds), dtype=torch.int64)
    )
    if 'mm_token_type_ids' in inspect.signature(model.model.get_rope_index).parameters:
        found['mm_token_type_ids'] = kinds[None].int()
    if (~videos).any():
        found |= dict(
            pixel_values=torch.cat([p for p, video in zip(parts, videos) if not video]),
            image_grid_thw=sample['grid'][~videos],
        )
    if videos.any():
        found |= dict(
            pixel_values_videos=torch.cat([p for p, video in zip(parts, videos) if video]),
            video_grid_thw=sample['grid'][videos],
            second_per_grid_ts=sample['seconds'][videos],
        )
    return found


def hf_positions(model, sample):
    "Position ids (3, s) by transformers."
    wanted = inspect.signature(model.model.get_rope_index).parameters
    return model.model.get_rope_index(
        **{name: x for name, x in hf_inputs(model, sample).items() if name in wanted}
    )[0][:, 0]


def behind_the_longer_side(model, sample):
    """Our position ids as transformers 5 changes them: words go on behind the longer side of a clip, also
    where its time reaches further.
    """
    found, late = sample['positions'].clone(), 0
    visual = (sample['input_ids'] == model.config.image_token_id) | (
        sample['input_ids'] == model.config.video_token_id
    )
    items, token = iter(sample['grid'].tolist()), 0
    while token < len(visual):
        found[:, token] -= late
        if not visual[token]:
            token += 1
            continue
        steps, rows, columns = next(items)
        cells = steps * rows * columns // 4
        found[:, token + 1 : token + cells] -= late
        reached = sample['positions'][0, token + cells - 1] - sample['positions'][0, token]
        late += max(0, int(reached) + 1 - max(rows, columns) // 2)
        token += cells
    return found


def run_hf(model, samples):
    """(logits of all samples one after the other, mean loss, gradients by hub name) by transformers, one
    sample after the other.
    """
    model.zero_grad()
    logits, losses, count = [], [], sum(int((sample['labels'][1:] >= 0).sum()) for sample in samples)
    for sample in samples:
        out = model(**hf_inputs(model, sample), position_ids=sample['positions'][:, None]).logits[0]
        loss = F.cross_entropy(out[:-1], sample['labels'][1:], reduction='sum') / count
        loss.backward()
        logits.append(out.detach())
        losses.append(loss.detach())
    return (
        torch.cat(logits),
        sum(losses),
        {
            hub_name(name): torch.zeros_like(p) if p.grad is None else p.grad.clone()
            for name, p in model.named_parameters()
        },
    )


@pytest.fixture(scope='module')
def house(tmp_path_factory):
    "Two tiny models with the logits, gradients and answers of transformers beside them."
    from transformers import Qwen2_5_VLForConditionalGeneration

    folder, models = tmp_path_factory.mktemp('reference'), {}
    for name, how in MODELS.items():
        at = tiny_qwen2_5_vl(folder / name, ['a few words for a tokenizer'], random_all=True, **SIZES, **how)
        model = models[name] = Qwen2_5_VLForConditionalGeneration.from_pretrained(
            at, torch_dtype=torch.float32
        )
        for case in CASES:
            logits, loss, found = run_hf(model, [sample for micro in step_of(at, case) for sample in micro])
            save_file(
                {'logits': logits, 'loss': loss[None], **{f'gradient {key}': x for key, x in found.items()}},
                folder / f'{name} {case}.safetensors',
            )
        model.generation_config.eos_token_id = None
        with torch.no_grad():
            answers = [
                model.generate(**hf_inputs(model, sample), do_sample=False, max_new_tokens=NEW)[
                    0, len(sample['input_ids']) :
                ].tolist()
                for sample in step_of(at, [PROMPTS])[0]
            ]
        (folder / f'{name} answers.json').write_text(json.dumps(answers))
    return folder, models


# mmkit, on every rank of a launch


def open_case(folder, name, case, mesh):
    "(micro-batches of this rank, reference) of a case."
    micro = [pack(samples, mesh.tp.size, 0) for samples in step_of(folder / name, case)]
    return micro[mesh.dp.rank :: mesh.dp.size], load_file(folder / f'{name} {case}.safetensors')


@torch.no_grad()
def logits_of(model, micro, mesh):
    "Logits of all samples one after the other, without padding."
    return torch.cat(
        [whole_logits(model, model.hidden(batch), mesh)[: int(batch['tokens'])] for batch in micro]
    )


def compare_case(folder, name, case, task, model, wrapped, mesh):
    """(logits, loss, gradients, name of the furthest gradient, gradients themselves): how far they are from
    transformers on the worst rank.
    """
    micro, theirs = open_case(folder, name, case, mesh)
    loss, mine = parity.step_gradients(task, wrapped, mesh, micro)
    gradients, worst = parity.furthest(
        mine, {key.removeprefix('gradient '): x for key, x in theirs.items() if key.startswith('gradient ')}
    )
    # a copy of several sees a part of the samples
    logits = (
        parity.over_ranks(parity.apart(logits_of(model, micro, mesh), theirs['logits']))
        if mesh.dp.size == 1
        else None
    )
    return (
        logits,
        parity.over_ranks(parity.apart(torch.tensor([loss]), theirs['loss'])),
        parity.over_ranks(gradients),
        worst,
        mine,
    )


def count_layers(model):
    "A list that grows by one whenever a layer of the text tower runs."
    runs = []
    for layer in model.text_decoder.decoder['layers']:
        layer.register_forward_hook(lambda *_: runs.append(1))
    return runs


def answers(folder, name, model, mesh, stop=()):
    "Greedy answers to the prompts."
    samples = step_of(folder / name, [PROMPTS])[0]
    return generate([model], pack(samples, mesh.tp.size, 0), len(samples), stop, mesh, room=NEW)


def measure(folder):
    """All cases of both models in every layout of this world, the greedy answers, and whether recompute gives
    the same bits.
    """
    folder, rows, said, same_bits, kept, runs = Path(folder), [], {}, {}, {}, {}
    for title, layout in LAYOUTS[place().world].items():
        with open_mesh(layout, pick_device('cpu')) as mesh:
            if layout.overlap:
                parity.small_buckets()
            for name in MODELS:
                task, (model,), wrapped = parity.open_trainer(
                    Config(weights=str(folder / name), layout=layout, dtype='float32'), mesh
                )
                assert not layout.overlap or len(wrapped[0].bucket_groups) > 3
                runs[f'{title}, {name}'] = counted = count_layers(model)
                for case in [case for case in CASES if len(CASES[case]) % mesh.dp.size == 0]:
                    *row, mine = compare_case(folder, name, case, task, model, wrapped, mesh)
                    rows.append([title, name, case, *row])
                    kept[title, name, case] = mine
                    plain = kept.get(
                        (title.removesuffix(', recompute').replace('recompute', 'tp 1'), name, case), {}
                    )
                    if 'recompute' in title:
                        same_bits[f'{title}, {name}, {case}'] = all(
                            torch.equal(mine[key], plain[key]) for key in mine
                        )
                runs[f'{title}, {name}'] = len(counted)
                if mesh.dp.size == 1:
                    said[f'{title}, {name}'] = answers(folder, name, model, mesh)
    return dict(
        rows=rows,
        answers=said,
        same_bits=same_bits,
        runs=runs,
        more=more_on_one_rank(folder) if place().world == 1 else None,
    )


def more_on_one_rank(folder):
    "What needs no second rank: parts frozen, and the other spelling of names."
    with open_mesh(Layout(data_parallel='ddp'), pick_device('cpu')) as mesh:
        return dict(frozen=frozen_rows(folder, mesh), spelling=spelling(folder, mesh))


def frozen_rows(folder, mesh):
    """For each set of frozen parts, with and without recompute: which parts have gradients, and how far they
    are from those of the whole model.
    """
    rows, whole = [], None
    parts = {'vision': 'visual.', 'merger': 'visual.merger.', 'text': ''}

    def part_of(name):
        return next(part for part in ('merger', 'vision', 'text') if name.startswith(parts[part]))

    for frozen, recompute in itertools.product(
        [set for n in range(3) for set in itertools.combinations(parts, n)], ('none', 'full')
    ):
        config = Config(
            weights=str(folder / 'untied'),
            layout=Layout(data_parallel='ddp', recompute=recompute),
            freeze=frozen,
            dtype='float32',
        )
        task, _, wrapped = parity.open_trainer(config, replace(mesh, layout=config.layout))
        _, mine = parity.step_gradients(task, wrapped, mesh, open_case(folder, 'untied', 'mixed', mesh)[0])
        whole = whole or mine
        expected = {name: x for name, x in whole.items() if part_of(name) not in frozen}
        rows.append(
            [
                ', '.join(frozen) or 'nothing',
                recompute,
                sorted({part_of(name) for name in mine}),
                parity.furthest(mine, expected)[0],
            ]
        )
    return rows


def spelling(folder, mesh):
    """Whether a data-parallel replica with the hub's names gives the same logits, and the first names of both
    files.
    """
    found, names = [], []
    for name in MODELS:
        copy = folder / f'{name} as on the hub'
        shutil.copytree(folder / name, copy)
        tensors = load_file(copy / 'model.safetensors')
        renamed = {hub_name(key): x for key, x in tensors.items()}
        if renamed.keys() == tensors.keys():
            renamed = {
                (
                    key
                    if key.startswith('lm_head')
                    else (
                        'model.' + key
                        if key.startswith('visual')
                        else key.replace('model.', 'model.language_model.')
                    )
                ): x
                for key, x in tensors.items()
            }
        save_file(renamed, copy / 'model.safetensors')
        micro = open_case(folder, name, 'mixed', mesh)[0]
        logits = [
            logits_of(
                parity.open_trainer(Config(weights=str(at), dtype='float32', layout=mesh.layout), mesh)[1][0],
                micro,
                mesh,
            )
            for at in (folder / name, copy)
        ]
        found.append(torch.equal(*logits))
        names.append(
            [
                sorted({key.rsplit('.', 4)[0].split('layers')[0].split('blocks')[0] for key in x})
                for x in (tensors, renamed)
            ]
        )
    return dict(same=found, names=names)


# The tests


@pytest.fixture(scope='module')
def one(house):
    return parity.on_ranks('test_reference', 'measure', house[0], 1, 300)


@pytest.fixture(scope='module')
def two(house):
    return parity.on_ranks('test_reference', 'measure', house[0], 2, 300)


def test_no_weight_is_zero_or_one(house):
    for name in MODELS:
        for key, x in load_file(house[0] / name / 'model.safetensors').items():
            assert not ((x == 0) | (x == 1)).any(), key


def test_positions(house):
    """Equal to transformers' own wherever all three rules for clips agree, and in the other case to ours as
    the installed version bends it.

        Ours is the original's: time advances by the seconds of a step, words go on behind the largest
    position. transformers 4.57 takes whole seconds only (0.5 counts as 0); 5 lets words go on behind the
    longer side of a frame, also where time reaches further.
    """
    import transformers

    folder, models = house
    five, differ = int(transformers.__version__.split('.')[0]) >= 5, set()
    # two frames of a clip are 2 / rate seconds apart
    rates = [
        [[3, (12, 4, 6, 2 / rate), 2] for rate in (0.3, 0.6, 0.7, 1.2, 1.5, 1.7, 2.4, 3, 6, 10, 24, 29.97)]
    ]
    for name, case in [*itertools.product(MODELS, CASES), ('tied', rates)]:
        shape = QwenShape.from_hf(json.loads((folder / name / 'config.json').read_text()))
        for sample in (sample for micro in step_of(folder / name, case) for sample in micro):
            fifth = behind_the_longer_side(models[name], sample)
            fourth = positions(shape, sample['input_ids'], sample['grid'], sample['seconds'].trunc())
            assert torch.equal(hf_positions(models[name], sample), fifth if five else fourth), case
            if not torch.equal(fifth, sample['positions']) or not torch.equal(fourth, sample['positions']):
                differ.add(str(case))
    assert differ == {'long video', str(rates)}


def check_rows(rows, record_property, title):
    record_property(
        'table',
        f'{title}\n\n'
        + parity.table(['layout', 'model', 'step', 'logits', 'loss', 'gradients', 'furthest gradient'], rows),
    )
    wrong = [row for row in rows if not max(x for x in row[3:6] if x is not None) <= parity.LIMIT]
    assert not wrong, parity.table(
        ['layout', 'model', 'step', 'logits', 'loss', 'gradients', 'furthest gradient'], wrong
    )


def test_one_rank_is_transformers(one, record_property):
    assert len(one['rows']) == len(LAYOUTS[1]) * len(MODELS) * len(CASES)
    check_rows(
        one['rows'],
        record_property,
        'Largest difference from transformers over largest value, fp32, one rank',
    )


def test_two_ranks_are_transformers(two, record_property):
    assert len(two['rows']) == 3 * len(MODELS) * len(CASES) + 2 * len(MODELS)
    check_rows(
        two['rows'],
        record_property,
        'Largest difference from transformers over largest value, fp32, two ranks',
    )


def test_recompute_gives_the_same_bits_and_does_recompute(one, two):
    for found in (one, two):
        assert found['same_bits'] and all(found['same_bits'].values()), found['same_bits']
        for title, runs in found['runs'].items():
            micro, layers = sum(map(len, CASES.values())), SIZES['layers']
            # gradients, logits, and once more in the backward
            if 'dp 2' not in title:
                assert runs == layers * micro * (3 if 'recompute' in title else 2), title


def test_greedy_answers_are_transformers(house, one, two):
    for name in MODELS:
        theirs = json.loads((house[0] / f'{name} answers.json').read_text())
        assert len(theirs) == len(PROMPTS) == len(set(map(str, theirs))) and all(
            len(row) == NEW for row in theirs
        )
        # a random tied model repeats itself, the other one does not
        assert name == 'tied' or min(len(set(row)) for row in theirs) > 2, theirs
        for title, mine in {**one['answers'], **two['answers']}.items():
            if title.endswith(f', {name}'):
                assert mine == theirs, title
    assert len(one['answers']) + len(two['answers']) == 6 * len(MODELS)


def test_frozen_parts_have_no_gradient_and_change_no_other(one):
    """The gradients are not always the same bits: torch multiplies with another kernel where nothing needs a
    gradient.
    """
    rows = one['more']['frozen']
    assert len(rows) == 14
    for frozen, _, trained, distance in rows:
        assert (
            trained == sorted({'vision', 'merger', 'text'} - set(frozen.split(', ')))
            and distance <= parity.LIMIT
        ), (frozen, trained, distance)


def test_both_spellings_of_names(one):
    found = one['more']['spelling']
    assert found['same'] == [True, True] and all(old != new for old, new in found['names']), found
