"""Converted folders against `golden/`, which the converter of MindSpeed-MM 2.2.0 wrote.

What cannot be converted is named and leaves nothing behind.
"""

import argparse
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from mmkit.converters.convert import hf_to_mm, mm_to_hf, resplit
from mmkit.converters.folders import HFFolder, MMFolder, open_weights
from mmkit.converters.qwen2_5_vl import qwen2_5_vl_towers
from mmkit.converters.weights import pieces
from mmkit.converters.writing import SafetensorsWriter
from mmkit.core.device import pick_device
from mmkit.parallel.engine import prepare

GOLDEN = Path(__file__).parent / 'golden'
HF = GOLDEN / 'qwen2_5_vl_hf'
CONFIG = json.loads((HF / 'config.json').read_text())
LAYOUTS = {
    'tp1': (1, [[3]], [[4]]),
    'tp2_pp2': (2, [[3, 0]], [[1, 3]]),
    'tp1_pp2_vpp2': (1, [[3, 0], [0, 0]], [[1, 1], [1, 1]]),
}
layouts = pytest.mark.parametrize('name', LAYOUTS)


def towers_of(name):
    return qwen2_5_vl_towers(CONFIG, *LAYOUTS[name][1:])


def files_of(folder):
    return sorted(f.relative_to(folder).as_posix() for f in folder.rglob('*') if f.is_file())


def tensors_of(folder):
    return {name: x for file in sorted(folder.glob('*.safetensors')) for name, x in load_file(file).items()}


def same(x, y):
    return (
        x.dtype == y.dtype
        and x.shape == y.shape
        and torch.equal(x.contiguous().view(torch.uint8), y.contiguous().view(torch.uint8))
    )


def copy_of(source, target, tensors, config=None):
    "`source` as one file with other tensors."
    target.mkdir()
    save_file(
        {name: x.contiguous() for name, x in tensors.items()}, target / 'model.safetensors', {'format': 'pt'}
    )
    (target / 'config.json').write_text(
        json.dumps(config or json.loads((source / 'config.json').read_text()))
    )
    return target


def refuses(target, convert, *words):
    """`convert` raises one ValueError that has these words and leaves nothing of `target`, not even a
    temporary folder.
    """
    before = sorted(target.parent.iterdir())
    with pytest.raises(ValueError) as caught:
        convert()
    for word in words:
        assert word in str(caught.value), str(caught.value)
    assert '\n' not in str(caught.value)
    assert sorted(target.parent.iterdir()) == before


@layouts
def test_written_files_equal_the_peers(name, tmp_path):
    golden = GOLDEN / f'qwen2_5_vl_{name}'
    hf_to_mm(HF, tmp_path / 'mm', towers_of(name), LAYOUTS[name][0])
    assert files_of(tmp_path / 'mm') == files_of(golden)
    assert (tmp_path / 'mm' / 'latest_checkpointed_iteration.txt').read_bytes() == (
        golden / 'latest_checkpointed_iteration.txt'
    ).read_bytes()
    for file in golden.rglob('*.pt'):
        theirs, ours = (
            torch.load(f, weights_only=True) for f in (file, tmp_path / 'mm' / file.relative_to(golden))
        )
        assert (
            ours.keys() == theirs.keys() and ours['checkpoint_version'] == theirs['checkpoint_version'] == 3.0
        )
        for group in theirs.keys() - {'checkpoint_version'}:
            assert ours[group].keys() == theirs[group].keys()
            for key, x in theirs[group].items():
                assert same(ours[group][key], x), key
    assert all(
        path.stat().st_mode & 0o777 == (0o750 if path.is_dir() else 0o640)
        for path in [tmp_path / 'mm', *(tmp_path / 'mm').rglob('*')]
    )


@layouts
def test_the_peers_files_come_back_bit_for_bit(name, tmp_path):
    mm_to_hf(GOLDEN / f'qwen2_5_vl_{name}', HF, tmp_path / 'hf', towers_of(name), LAYOUTS[name][0])
    assert files_of(tmp_path / 'hf') == files_of(HF)
    for file in HF.glob('*.safetensors'):
        old, new = load_file(file), load_file(tmp_path / 'hf' / file.name)
        assert old.keys() == new.keys() and all(same(new[key], x) for key, x in old.items())
    old, new = (
        json.loads((folder / 'model.safetensors.index.json').read_text()) for folder in (HF, tmp_path / 'hf')
    )
    assert new['weight_map'] == old['weight_map'] and new['metadata']['total_size'] == sum(
        x.nbytes for x in tensors_of(HF).values()
    )


@layouts
def test_a_peer_folder_reads_like_a_hugging_face_folder(name):
    hf, mm = HFFolder(HF), open_weights(GOLDEN / f'qwen2_5_vl_{name}', qwen2_5_vl_towers(CONFIG))
    assert isinstance(mm, MMFolder) and mm.names == hf.names
    assert mm.found.tp == LAYOUTS[name][0] and [list(map(list, t.layers)) for t in mm.found.towers] == list(
        LAYOUTS[name][1:]
    )
    for key in hf.names:
        assert mm.shape(key) == hf.shape(key) and mm.dtype(key) == hf.dtype(key) and same(mm[key], hf[key])


def new_spelling(name):
    return (
        name.replace('visual.', 'model.visual.')
        if name.startswith('visual.')
        else name.replace('model.', 'model.language_model.', 1)
    )


def test_the_spelling_of_the_folder_is_kept(tmp_path):
    tensors = tensors_of(HF)
    renamed = copy_of(HF, tmp_path / 'new', {new_spelling(name): x for name, x in tensors.items()})
    hf_to_mm(renamed, tmp_path / 'mm', towers_of('tp2_pp2'), 2)
    mine, golden = (
        torch.load(folder / 'release/mp_rank_01_001/model_optim_rng.pt', weights_only=True)['model']
        for folder in (tmp_path / 'mm', GOLDEN / 'qwen2_5_vl_tp2_pp2')
    )
    assert all(same(mine[key], x) for key, x in golden.items())
    mm_to_hf(tmp_path / 'mm', renamed, tmp_path / 'back', towers_of('tp2_pp2'), 2)
    back = load_file(tmp_path / 'back' / 'model.safetensors')
    assert back.keys() == {new_spelling(name) for name in tensors} and all(
        same(back[new_spelling(name)], x) for name, x in tensors.items()
    )
    assert files_of(tmp_path / 'back') == ['config.json', 'model.safetensors']


def test_a_config_of_transformers_5_gives_the_same_towers():
    text_keys = (
        'hidden_size',
        'intermediate_size',
        'num_hidden_layers',
        'num_attention_heads',
        'num_key_value_heads',
        'vocab_size',
        'tie_word_embeddings',
    )
    inside = dict(vision_config=CONFIG['vision_config'], text_config={key: CONFIG[key] for key in text_keys})

    def names(config):
        return [
            (p.mm, p.hf, p.rule.shapes, p.rule.copy)
            for chunk in pieces(qwen2_5_vl_towers(config, [3, 0], [1, 3]))
            for p in chunk
        ]

    assert names(inside) == names(CONFIG)
    on_top = inside | dict(tie_word_embeddings=False)
    assert any('lm_head.weight' in hf for _, hf, _, _ in names(on_top))


def test_an_untied_model_and_an_iteration_of_a_training(tmp_path):
    tensors = tensors_of(HF) | {'lm_head.weight': torch.randn(320, 64).bfloat16()}
    source = copy_of(HF, tmp_path / 'hf', tensors, CONFIG | dict(tie_word_embeddings=False))
    towers = qwen2_5_vl_towers(HFFolder(source).config, [3, 0], [2, 2])
    hf_to_mm(source, tmp_path / 'mm', towers, 2)
    (tmp_path / 'mm' / 'release').rename(tmp_path / 'mm' / 'iter_0000500')
    (tmp_path / 'mm' / 'latest_checkpointed_iteration.txt').write_text('500')
    mm_to_hf(tmp_path / 'mm', source, tmp_path / 'back', towers, 2)
    back = tensors_of(tmp_path / 'back')
    assert back.keys() == tensors.keys() and all(same(back[key], x) for key, x in tensors.items())


def test_a_tied_model_with_its_output_weight_keeps_it(tmp_path):
    tensors = tensors_of(HF)
    source = copy_of(
        HF, tmp_path / 'hf', tensors | {'lm_head.weight': tensors['model.embed_tokens.weight'].clone()}
    )
    hf_to_mm(source, tmp_path / 'mm', towers_of('tp1'))
    trained = tmp_path / 'mm/release/mp_rank_00/model_optim_rng.pt'
    content = torch.load(trained, weights_only=True)
    content['model']['text_decoder.embedding.word_embeddings.weight'] += 1
    torch.save(content, trained)
    mm_to_hf(tmp_path / 'mm', source, tmp_path / 'back', towers_of('tp1'))
    back = tensors_of(tmp_path / 'back')
    assert same(back['lm_head.weight'], back['model.embed_tokens.weight']) and not same(
        back['lm_head.weight'], tensors['model.embed_tokens.weight']
    )


def change(key, edit):
    "The golden tensors with one of them edited."
    tensors = tensors_of(HF)
    return tensors | {key: edit(tensors[key])}


@pytest.mark.parametrize(
    'tensors, words',
    [
        (lambda: tensors_of(HF) | {'model.more.bias': torch.zeros(3)}, ['no rule takes: model.more.bias']),
        (
            lambda: {
                key: x for key, x in tensors_of(HF).items() if key != 'model.layers.2.mlp.up_proj.weight'
            },
            ['missing: model.layers.2.mlp.up_proj.weight'],
        ),
        (
            lambda: change('visual.blocks.1.mlp.down_proj.weight', lambda x: x[:, :47]),
            ['misshapen: visual.blocks.1.mlp.down_proj.weight is (32, 47) instead of (32, 48)'],
        ),
        (
            lambda: {
                key: x[:, :60] if key.endswith('embed_tokens.weight') else x
                for key, x in tensors_of(HF).items()
            },
            ['misshapen: model.embed_tokens.weight is (320, 60) instead of (320, 64)'],
        ),
        (
            lambda: change('model.layers.0.self_attn.k_proj.bias', lambda x: x.float()),
            ['model.layers.0.self_attn.k_proj.bias', 'different dtypes'],
        ),
        (
            lambda: change('model.norm.weight', lambda x: x[:5]) | {'x': torch.zeros(1)},
            ['misshapen: model.norm.weight', 'no rule takes: x'],
        ),
    ],
    ids=['extra', 'missing', 'misshapen', 'embedding', 'dtypes', 'two at once'],
)
def test_what_does_not_fit_is_named_and_nothing_is_written(tensors, words, tmp_path):
    source = copy_of(HF, tmp_path / 'hf', tensors())
    refuses(tmp_path / 'mm', lambda: hf_to_mm(source, tmp_path / 'mm', towers_of('tp1')), *words)


@pytest.mark.parametrize(
    'tp, words',
    [
        (4, ['model.layers.0.self_attn.k_proj', '2 groups of heads, which tp=4 does not divide']),
        (3, ['model.embed_tokens.weight: dim 0 of (320, 64) is not divisible by tp=3']),
    ],
)
def test_tensors_that_cannot_be_divided_are_named(tp, words, tmp_path):
    refuses(tmp_path / 'mm', lambda: hf_to_mm(HF, tmp_path / 'mm', towers_of('tp1'), tp), *words)


@pytest.mark.parametrize(
    'vision, text, words',
    [
        ([3], [[2, 3]], ['text_layers [[2, 3]] adds up to 5 but the model has 4']),
        ([[2]], [4], ['vision_layers [[2]] adds up to 2 but the model has 3']),
        ([[3, 0], [0]], [[1, 1], [1, 1]], ['rows of [1, 2] numbers']),
        (
            [[3, 0]],
            [[1, 1], [1, 1]],
            ['vision layers [[3, 0]] and text layers [[1, 1], [1, 1]] belong to different pipelines'],
        ),
        ([2, 1], [3, 1], ['all vision layers come first']),
    ],
)
def test_layers_that_do_not_add_up_are_told_with_both_numbers(vision, text, words, tmp_path):
    refuses(
        tmp_path / 'mm',
        lambda: hf_to_mm(HF, tmp_path / 'mm', qwen2_5_vl_towers(CONFIG, vision, text)),
        *words,
    )


def edited(tmp_path, edit, rank='mp_rank_01_001'):
    "A copy of the golden tp2_pp2 folder with one rank's tensors edited."
    folder = tmp_path / 'edited'
    hf_to_mm(HF, folder, towers_of('tp2_pp2'), 2)
    file = folder / 'release' / rank / 'model_optim_rng.pt'
    content = torch.load(file, weights_only=True)
    edit(content['model'])
    torch.save(content, file)
    return folder


LAYER = 'text_decoder.decoder.layers.0.'


@pytest.mark.parametrize(
    'edit, words',
    [
        (
            lambda model: model.pop(LAYER + 'mlp.linear_fc2.weight'),
            ['rank 1', 'missing: ' + LAYER + 'mlp.linear_fc2.weight'],
        ),
        (lambda model: model.update(more=torch.zeros(2)), ['no rule takes: more']),
        (
            lambda model: model.update({LAYER + 'input_layernorm.weight': torch.zeros(64).bfloat16()}),
            [
                'the ranks hold different ' + LAYER + 'input_layernorm.weight',
                'model.layers.1.input_layernorm.weight',
            ],
        ),
        (
            lambda model: model.update({LAYER + 'mlp.linear_fc2.weight': torch.zeros(63, 48).bfloat16()}),
            ['do not fit together', LAYER + 'mlp.linear_fc2.weight'],
        ),
    ],
    ids=['missing', 'extra', 'ranks differ', 'misshapen'],
)
def test_a_broken_peer_folder_is_refused(edit, words, tmp_path):
    folder = edited(tmp_path, edit)
    refuses(tmp_path / 'hf', lambda: mm_to_hf(folder, HF, tmp_path / 'hf', towers_of('tp2_pp2'), 2), *words)


def test_tensors_of_the_wrong_shape_on_every_rank_are_named(tmp_path):
    hf_to_mm(HF, tmp_path / 'mm', towers_of('tp1'))
    file = tmp_path / 'mm/release/mp_rank_00/model_optim_rng.pt'
    content = torch.load(file, weights_only=True)
    # Megatron's padded vocabulary
    content['model']['text_decoder.embedding.word_embeddings.weight'] = torch.zeros(384, 64).bfloat16()
    torch.save(content, file)
    refuses(
        tmp_path / 'hf',
        lambda: mm_to_hf(tmp_path / 'mm', HF, tmp_path / 'hf', towers_of('tp1')),
        'misshapen: model.embed_tokens.weight is (384, 64) instead of (320, 64)',
    )


def test_a_drifted_copy_of_the_embedding_is_told(tmp_path):
    folder = edited(tmp_path, lambda model: model['text_decoder.output_layer.weight'].add_(1))
    assert (
        'text_decoder.output_layer.weight of the last stage differs'
        in mm_to_hf(folder, HF, tmp_path / 'hf', towers_of('tp2_pp2'), 2).notes[0]
    )
    assert all(same(tensors_of(tmp_path / 'hf')[key], x) for key, x in tensors_of(HF).items())


def test_stale_ranks_and_wrong_layouts_are_refused(tmp_path):
    hf_to_mm(HF, tmp_path / 'mm', towers_of('tp1'))
    refuses(
        tmp_path / 'mm',
        lambda: hf_to_mm(HF, tmp_path / 'mm', towers_of('tp2_pp2'), 2),
        'already holds something',
    )
    assert files_of(tmp_path / 'mm') == files_of(GOLDEN / 'qwen2_5_vl_tp1')
    refuses(
        tmp_path / 'hf',
        lambda: mm_to_hf(tmp_path / 'mm', HF, tmp_path / 'hf', towers_of('tp2_pp2'), 2),
        "{'tp': 1, 'vision': [[3]], 'text': [[4]]}",
        "{'tp': 2, 'vision': [[3, 0]], 'text': [[1, 3]]}",
    )
    for other in ('mp_rank_00_001', 'mp_rank_00_000_000', 'mp_rank_01'):
        (tmp_path / 'mm/release' / other).mkdir()
        refuses(
            tmp_path / 'hf', lambda: mm_to_hf(tmp_path / 'mm', HF, tmp_path / 'hf', towers_of('tp1')), other
        )
        (tmp_path / 'mm/release' / other).rmdir()


def test_the_file_of_a_training_is_read_without_its_settings(tmp_path):
    """What Megatron saves beside the weights: arguments with objects of its own, states of random generators.

    None of it is needed, nothing of it is run.
    """
    # as every user of Megatron-Core, or no mesh could be opened in this process any more
    prepare(pick_device('cpu'))
    from megatron.core.transformer.enums import AttnBackend

    folder = edited(
        tmp_path,
        lambda model: model.update({'text_decoder.decoder.layers.0.mlp.linear_fc1._extra_state': None}),
    )
    for file in folder.rglob('*.pt'):
        settings = argparse.Namespace(
            attention_backend=AttnBackend.flash,
            params_dtype=torch.bfloat16,
            path=Path('x'),
            act=torch.nn.functional.gelu,
            own=argparse.Namespace(pp=[1, 3]),
        )
        states = dict(
            random_rng_state=random.getstate(),
            np_rng_state=np.random.get_state(),
            torch_rng_state=torch.get_rng_state(),
            rng_tracker_states={},
        )
        content = dict(
            args=settings,
            checkpoint_version=3.0,
            iteration=20,
            rng_state=[states],
            opt_param_scheduler=dict(max_lr=np.float64(1e-5), num_steps=20),
            num_floating_point_operations_so_far=np.int64(3),
        )
        torch.save(content | torch.load(file, weights_only=True), file)
    (folder / 'release').rename(folder / 'iter_0000020')
    (folder / 'latest_checkpointed_iteration.txt').write_text('20\n')
    (folder / 'iter_0000020' / 'mp_rank_00_000' / 'distrib_optim.pt').write_bytes(b'moments')
    told = str(mm_to_hf(folder, HF, tmp_path / 'hf', towers_of('tp2_pp2'), 2)).splitlines()
    assert (
        told[0] == 'not carried over, since they are no weights: args, distrib_optim.pt, iteration,'
        ' num_floating_point_operations_so_far, opt_param_scheduler, rng_state'
    )
    assert all(same(tensors_of(tmp_path / 'hf')[key], x) for key, x in tensors_of(HF).items())
    resplit(folder, tmp_path / 'whole', towers_of('tp2_pp2'), 2, towers_of('tp1'), 1)
    assert equal_folders(tmp_path / 'whole', GOLDEN / 'qwen2_5_vl_tp1')


def content_of(folder):
    "Every group of tensors in the rank files of a folder."
    return {
        f'{file.parent.name} {group}': tensors
        for file in folder.rglob('*.pt')
        for group, tensors in torch.load(file, weights_only=True).items()
        if group.startswith('model')
    }


def equal_folders(one, two):
    one, two = content_of(one), content_of(two)
    return one.keys() == two.keys() and all(
        one[k].keys() == two[k].keys() and all(same(one[k][name], x) for name, x in two[k].items())
        for k in two
    )


SPREAD = {**LAYOUTS, 'tp2_pp4': (2, [[1, 2, 0, 0]], [[0, 1, 2, 1]])}


@pytest.mark.parametrize('tied', [True, False], ids=['tied', 'untied'])
@pytest.mark.parametrize(
    'source, target',
    [
        ('tp1', 'tp2_pp2'),
        ('tp2_pp2', 'tp1'),
        ('tp2_pp2', 'tp1_pp2_vpp2'),
        ('tp1_pp2_vpp2', 'tp2_pp4'),
        ('tp2_pp4', 'tp1'),
    ],
)
def test_a_resplit_equals_a_conversion(source, target, tied, tmp_path):
    """The peer's own resplit forgets the tied output weight when it makes stages out of one.

    Here a resplit is what a conversion would have written.
    """
    hf = (
        HF
        if tied
        else copy_of(
            HF,
            tmp_path / 'hf',
            tensors_of(HF) | {'lm_head.weight': torch.randn(320, 64).bfloat16()},
            CONFIG | dict(tie_word_embeddings=False),
        )
    )
    (tp, *old), (new_tp, *new) = SPREAD[source], SPREAD[target]
    towers, wanted = (qwen2_5_vl_towers(HFFolder(hf).config, *layers) for layers in (old, new))
    hf_to_mm(hf, tmp_path / 'source', towers, tp)
    hf_to_mm(hf, tmp_path / 'wanted', wanted, new_tp)
    resplit(
        GOLDEN / f'qwen2_5_vl_{source}' if tied and source in LAYOUTS else tmp_path / 'source',
        tmp_path / 'target',
        towers,
        tp,
        wanted,
        new_tp,
    )
    assert equal_folders(tmp_path / 'target', tmp_path / 'wanted')
    if tied and target in LAYOUTS:
        assert equal_folders(tmp_path / 'target', GOLDEN / f'qwen2_5_vl_{target}')
    refuses(
        tmp_path / 'more',
        lambda: resplit(tmp_path / 'source', tmp_path / 'more', wanted, new_tp, towers, tp),
        'is laid out as',
    )


def test_stages_that_the_peers_resplit_left_without_their_output_weight_are_read(tmp_path):
    folder = tmp_path / 'edited'
    hf_to_mm(HF, folder, towers_of('tp2_pp2'), 2)
    for rank in ('mp_rank_00_001', 'mp_rank_01_001'):
        content = torch.load(file := folder / 'release' / rank / 'model_optim_rng.pt', weights_only=True)
        del content['model']['text_decoder.output_layer.weight']
        torch.save(content, file)
    mm_to_hf(folder, HF, tmp_path / 'hf', towers_of('tp2_pp2'), 2)
    assert all(same(tensors_of(tmp_path / 'hf')[key], x) for key, x in tensors_of(HF).items())
    resplit(folder, tmp_path / 'whole', towers_of('tp2_pp2'), 2, towers_of('tp2_pp2'), 2)
    assert equal_folders(tmp_path / 'whole', GOLDEN / 'qwen2_5_vl_tp2_pp2')


@pytest.mark.parametrize(
    'what, words',
    [
        ('folder', ['and only checkpoints are overwritten']),
        ('source', ['is or holds the source']),
        ('around', ['is or holds the source']),
        ('conversion', []),
    ],
)
def test_only_an_earlier_conversion_is_overwritten_and_only_by_a_whole_one(what, words, tmp_path):
    source, target = tmp_path / 'all' / 'hf', tmp_path / 'mm'
    source.parent.mkdir()
    copy_of(HF, source, tensors_of(HF))
    if what == 'folder':
        target.mkdir()
        (target / 'thesis.tex').write_text('x')
    if what == 'conversion':
        hf_to_mm(source, target, towers_of('tp2_pp2'), 2)
    target = {'source': source, 'around': source.parent}.get(what, target)

    def write(tp=1):
        return hf_to_mm(source, target, towers_of('tp1'), tp, overwrite=True)

    before = {f: f.stat().st_mtime_ns for f in tmp_path.rglob('*')}
    if words:
        refuses(target, write, *words)
    else:
        refuses(target, lambda: write(4), 'which tp=4 does not divide')
    assert {f: f.stat().st_mtime_ns for f in tmp_path.rglob('*')} == before
    if not words:
        write()
        assert files_of(target) == files_of(GOLDEN / 'qwen2_5_vl_tp1') and sorted(
            f.name for f in tmp_path.iterdir()
        ) == ['all', 'mm']


class Attack:
    def __init__(self, call, *arguments):
        self.what = call, arguments

    def __reduce__(self):
        return self.what


@pytest.mark.parametrize('place', ['beside', 'inside'])
@pytest.mark.parametrize(
    'call', [os.system, eval, subprocess.Popen, torch.save], ids=lambda call: call.__qualname__
)
def test_no_code_of_a_file_is_run(call, place, tmp_path):
    witness = tmp_path / 'witness'
    argument = {
        os.system: f'touch {witness}',
        eval: f"open({str(witness)!r}, 'w')",
        subprocess.Popen: ['touch', str(witness)],
        torch.save: {},
    }[call]
    folder = tmp_path / 'mm'
    hf_to_mm(HF, folder, towers_of('tp1'))
    file = folder / 'release/mp_rank_00/model_optim_rng.pt'
    content = torch.load(file, weights_only=True)
    (content if place == 'beside' else content['model'])['more'] = Attack(
        call, argument, *[str(witness)] * (call is torch.save)
    )
    torch.save(content, file)
    try:
        mm_to_hf(folder, HF, tmp_path / 'hf', towers_of('tp1'))
    except ValueError as error:
        assert 'pickle' in str(error) and str(file) in str(error) and '\n' not in str(error)
    # beside the weights, an object of a harmless module is passed over
    else:
        assert (call, place) == (torch.save, 'beside')
    assert not witness.exists()


SIZES = dict(
    hidden_size=1024,
    intermediate_size=2816,
    num_hidden_layers=12,
    num_attention_heads=8,
    num_key_value_heads=2,
    vocab_size=10240,
    tie_word_embeddings=True,
    vision_config=dict(depth=2, hidden_size=64, intermediate_size=128, num_heads=4, out_hidden_size=1024),
)
MEASURE = """
import sys, threading, time
from mmkit.converters.convert import hf_to_mm, mm_to_hf, resplit
from mmkit.converters.folders import HFFolder
from mmkit.converters.qwen2_5_vl import qwen2_5_vl_towers
from mmkit.converters.weights import check
def held(): return next(int(line.split()[1]) * 1024 for line in open('/proc/self/status') if line.startswith('RssAnon'))
def watch():
    while True: peak[0] = max(peak[0], held()); time.sleep(0.002)
hf, mm, back = sys.argv[1:]
towers = qwen2_5_vl_towers(HFFolder(hf).config, [[2, 0]], [[6, 6]])
check(towers, HFFolder(hf), 2)
before = held(); peak = [before]
threading.Thread(target=watch, daemon=True).start()
hf_to_mm(hf, mm, towers, 2); there = peak[0] - before; peak[0] = held()
mm_to_hf(mm, hf, back, towers, 2); print(there, peak[0] - before)
"""  # noqa: E501


@pytest.mark.skipif(not Path('/proc/self/status').exists(), reason='reads memory from /proc')
def test_memory_is_bounded_by_the_largest_tensor(tmp_path):
    """A model of 300 MB whose largest tensor has 21 MB.

    Measured is RssAnon, the memory the process holds for itself, every 2 ms: pages of mapped files are not in
    it, since the system takes them back when it needs them. One check goes before, so that torch's own code
    for tensors without content, 64 MB, is loaded already; and the C library is told to give freed memory back
    at once.
    """
    (tmp_path / 'hf').mkdir()
    (tmp_path / 'hf' / 'config.json').write_text(json.dumps(SIZES))
    shapes = {
        h: shape
        for chunk in pieces(qwen2_5_vl_towers(SIZES))
        for p in chunk
        for h, shape in zip(p.hf, p.rule.shapes)
    }
    with SafetensorsWriter(
        tmp_path / 'hf' / 'model.safetensors',
        {name: (torch.bfloat16, shape) for name, shape in shapes.items()},
    ) as writer:
        for k, (name, shape) in enumerate(shapes.items()):
            writer.write(name, torch.full(shape, k % 250, dtype=torch.bfloat16))
    sizes = [2 * torch.Size(shape).numel() for shape in shapes.values()]
    run = subprocess.run(
        [sys.executable, '-c', MEASURE, *(str(tmp_path / name) for name in ('hf', 'mm', 'back'))],
        capture_output=True,
        text=True,
        env=os.environ | dict(MALLOC_MMAP_THRESHOLD_='65536'),
    )
    assert run.returncode == 0, run.stderr
    there, back = map(int, run.stdout.split())
    assert sum(sizes) > 290e6 and max(sizes) < 22e6
    assert max(there, back) < 2 * max(sizes), (there, back)
    print(
        f'{sum(sizes) / 1e6:.0f} MB in tensors of at most {max(sizes) / 1e6:.0f} MB took {there / 1e6:.0f} MB'
        f' there, {back / 1e6:.0f} MB back'
    )
    assert (tmp_path / 'hf' / 'model.safetensors').stat().st_size == (
        tmp_path / 'back' / 'model.safetensors'
    ).stat().st_size
