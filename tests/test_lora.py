"""Adapters of MindSpeed-MM, divided over the ranks of every golden layout, become what the formula says of
the undivided tensors.
"""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mmkit.cli import mm_convert

GOLDEN = Path(__file__).parent / 'golden'
RANK, ALPHA = 4, 6.0
QWEN = {
    'tp1': (1, [[4]], [[3]]),
    'tp2_pp2': (2, [[1, 3]], [[3, 0]]),
    'tp1_pp2_vpp2': (1, [[1, 1], [1, 1]], [[3, 0], [0, 0]]),
}
WAN = {
    'pp1': (1, [[4]], [[0]]),
    'pp2': (1, [[1, 3]], [[0, 0]]),
    'pp2_vpp2': (1, [[1, 1], [1, 1]], [[0, 0], [0, 0]]),
}
KINDS = {
    'linear_qkv': 'rows',
    'linear_fc1': 'halves',
    'linear_proj': 'columns',
    'linear_fc2': 'columns',
    'ffn.0': 'rows',
    'ffn.2': 'columns',
    'proj_q': 'rows',
    'proj_k': 'rows',
    'proj_v': 'rows',
    'proj_out': 'columns',
}
TEXT, VISION, BLOCK = 'text_decoder.decoder.layers.', 'image_encoder.encoder.blocks.layers.', 'blocks.'


def weights(folder):
    "Every file of a rank: (tensor rank, stage) to its content."
    files = sorted((folder / 'release').glob('mp_rank_*/model_optim_rng.pt'))
    return {
        (int(f.parent.name[8:10]), int(f.parent.name[11:] or 0)): torch.load(f, weights_only=True)
        for f in files
    }


def kind_of(name):
    "How a weight that has adapters is divided; None for one without."
    return next(
        (
            kind
            for target, kind in KINDS.items()
            if name.endswith(f'.{target}.weight') and name.startswith((TEXT, VISION, BLOCK))
        ),
        None,
    )


def drawn(whole):
    "For each weight with adapters its two matrices, undivided."
    draw = torch.Generator().manual_seed(1)

    def shape(x, kind):
        return (
            torch.randn(RANK, x.shape[1], generator=draw),
            torch.randn(x.shape[0], RANK, generator=draw),
        )

    return {name: shape(x, kind_of(name)) for name, x in whole.items() if kind_of(name)}


def write_adapters(folder, base, pairs, layout, edit=lambda held: held):
    "The folder that a training on `base` would have saved."
    tp, text, vision = layout
    stages = len(text[0])
    for (t, p), content in weights(base).items():
        held = {}
        for key in (key for key in content if key.startswith('model')):
            k = int(key[5:] or 0) * stages + p
            inner = held[key] = {}
            for name in filter(kind_of, content[key]):
                head = next(h for h in (TEXT, VISION, BLOCK) if name.startswith(h))
                number, rest = name.removeprefix(head).split('.', 1)
                rows = vision if head == VISION else text
                a, b = pairs[
                    f'{head}{sum(n for row in rows for n in row) and int(number) + sum([n for row in rows for n in row][:k])}.{rest}'  # noqa: E501
                ]
                if kind_of(name) == 'columns':
                    a = a.chunk(tp, 1)[t]
                elif kind_of(name) == 'rows':
                    b = b.chunk(tp)[t]
                else:
                    b = torch.cat([half.chunk(tp)[t] for half in b.chunk(2)])
                layer = name.removesuffix('weight')
                inner[layer + 'lora_A.default.weight'], inner[layer + 'lora_B.default.weight'] = (
                    a.clone(),
                    b.clone(),
                )
            inner.update(edit(inner))
        file = (
            folder
            / 'iter_0000020'
            / next(
                f.parent.name
                for f in (base / 'release').glob(f'mp_rank_{t:02d}*{f"_{p:03d}" if stages > 1 else ""}/*.pt')
            )
            / 'model_optim_rng.pt'
        )
        file.parent.mkdir(parents=True)
        torch.save({'iteration': 20, 'checkpoint_version': 3.0, **held}, file)
    (folder / 'latest_checkpointed_iteration.txt').write_text('20')


def merge_by_hand(base, pairs):
    "Merges in the one file of an undivided folder, by the formula."
    (file,) = base.rglob('model_optim_rng.pt')
    content = torch.load(file, weights_only=True)
    for name, (a, b) in pairs.items():
        content['model'][name] = (
            content['model'][name].double() + ALPHA / RANK * b.double() @ a.double()
        ).to(content['model'][name].dtype)
    torch.save(content, file)


def does(line, code=0):
    assert mm_convert(line.split()) == code, line


def flat(rows):
    return str(rows).replace(' ', '')


def qwen_line(method, source, target, layout, more=''):
    tp, text, vision = layout
    sources = (
        f'--cfg.mm_dir {source} --cfg.save_hf_dir {target}'
        if method == 'mm_to_hf'
        else f'--cfg.source_dir {source} --cfg.target_dir {target}'
    )
    return (
        f'Qwen2_5_VLConverter {method} {sources} --cfg.hf_config.hf_dir {GOLDEN}/qwen2_5_vl_hf'
        f' --cfg.parallel_config.llm_pp_layers {flat(text)} --cfg.parallel_config.vit_pp_layers'
        f' {flat(vision)} --cfg.parallel_config.tp_size {tp} {more}'
    )


def wan_line(method, source, target, layout, more=''):
    return (
        f'WanConverter {method} --cfg.source_path {source} --cfg.target_path {target} --cfg.hf_dir'
        f' {GOLDEN}/wan2_1_t2v_hf {more}'
    )


def same(one, two):
    """Whether two folders hold the same tensors, but for one rounding of a number, and how many numbers
    differ by that.
    """
    a, b = (
        {name: x for f in sorted(Path(folder).glob('*.safetensors')) for name, x in load_file(f).items()}
        for folder in (one, two)
    )
    return a.keys() == b.keys() and all(
        x.dtype == b[name].dtype
        and torch.allclose(x, b[name], rtol=1e-2 if x.dtype == torch.bfloat16 else 1e-6, atol=1e-6)
        for name, x in a.items()
    ), sum((x != b[name]).sum().item() for name, x in a.items())


@pytest.mark.parametrize(
    'model, first, line, layouts',
    [('qwen2_5_vl', 'tp1', qwen_line, QWEN), ('wan2_1_t2v', 'pp1', wan_line, WAN)],
    ids=['qwen2_5_vl', 'wan2_1'],
)
def test_every_layout_gives_what_the_formula_says(model, first, line, layouts, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(GOLDEN / f'{model}_{first}', 'hand')
    (content,) = weights(Path('hand')).values()
    pairs = drawn(content['model'])
    assert len(pairs) == (28 if model == 'qwen2_5_vl' else 40)
    merge_by_hand(Path('hand'), pairs)
    does(line('mm_to_hf', 'hand', 'wanted', layouts[first]))
    does(line('mm_to_hf', GOLDEN / f'{model}_{first}', 'before', layouts[first]))
    assert not same('before', 'wanted')[0]
    for name, layout in layouts.items():
        base = GOLDEN / f'{model}_{name}'
        more = f'--cfg.lora_path lora_{name} --lora_alpha {ALPHA:g} --lora_rank {RANK}'
        write_adapters(Path(f'lora_{name}'), base, pairs, layout)
        does(line('mm_to_hf', base, f'hf_{name}', layout, more))
        assert f'merged {len(pairs)} LoRA weights of rank {RANK}' in capsys.readouterr().out
        close, differ = same('wanted', f'hf_{name}')
        # of a hundred thousand, where float32 and float64 round to two sides
        assert close and differ <= 20
        does(line('merge_lora_to_base', base, f'mm_{name}', layout, more))
        does(line('mm_to_hf', f'mm_{name}', f'again_{name}', layout))
        assert same(f'hf_{name}', f'again_{name}') == (True, 0)


def test_a_folder_with_all_weights_brings_its_own_base(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base, layout = GOLDEN / 'qwen2_5_vl_tp2_pp2', QWEN['tp2_pp2']
    pairs = drawn(weights(GOLDEN / 'qwen2_5_vl_tp1')[0, 0]['model'])
    write_adapters(Path('lora'), base, pairs, layout)
    shutil.copytree('lora', 'whole')
    for file in Path('whole').rglob('*.pt'):
        content = torch.load(file, weights_only=True)
        own = torch.load(base / 'release' / file.parent.name / file.name, weights_only=True)['model']
        content['model'] |= {
            (
                name.replace('.weight', '.base_layer.weight').replace('.bias', '.base_layer.bias')
                if kind_of(name.replace('.bias', '.weight'))
                else name
            ): x
            for name, x in own.items()
        }
        torch.save(content, file)
    does(qwen_line('mm_to_hf', base, 'one', layout, '--cfg.lora_path lora --lora_alpha 6'))
    does(qwen_line('mm_to_hf', 'whole', 'two', layout, '--lora_alpha 6'))
    assert same('one', 'two') == (True, 0)
    capsys.readouterr()
    does(qwen_line('mm_to_hf', 'whole', 'three', layout), 1)
    assert 'give --lora_alpha' in capsys.readouterr().err and not Path('three').exists()


def first(ending, change):
    return lambda held: {name: change(x) for name, x in list(held.items()) if name.endswith(ending)}


@pytest.mark.parametrize(
    'edit, more, words',
    [
        (None, '--cfg.lora_path lora', 'does not tell the alpha of its LoRA weights: give --lora_alpha'),
        (None, '--cfg.lora_path lora --lora_alpha 6 --lora_rank 8', '--lora_rank 8 is not that of lora'),
        (
            first('layers.0.mlp.linear_fc1.lora_B.default.weight', lambda x: x[:, :2].clone()),
            '--cfg.lora_path lora --lora_alpha 6',
            'have different ranks',
        ),
        (
            first('layers.0.mlp.linear_fc1.lora_B.default.weight', lambda x: x[:-2].clone()),
            '--cfg.lora_path lora --lora_alpha 6',
            'is not as large as',
        ),
        (
            lambda held: {
                'text_decoder.head.lora_A.default.weight': torch.zeros(4, 4),
                'text_decoder.head.lora_B.default.weight': torch.zeros(4, 4),
            },
            '--cfg.lora_path lora --lora_alpha 6',
            'has adapters for text_decoder.head, which the model has not',
        ),
        (
            lambda held: {f'{TEXT}9.mlp.linear_fc1.lora_A.default.weight': torch.zeros(4, 4)},
            '--cfg.lora_path lora --lora_alpha 6',
            'has no text_decoder.decoder.layers.9.mlp.linear_fc1.lora_B',
        ),
        (
            lambda held: {f'{TEXT}0.lora_magnitude_vector.default.weight': torch.zeros(4)},
            '--cfg.lora_path lora --lora_alpha 6',
            'which is no LoRA weight that can be merged',
        ),
        (None, '--lora_alpha 6', 'holds no LoRA weights'),
        (None, '--cfg.lora_path gone --lora_alpha 6', '--cfg.lora_path gone is not a folder'),
    ],
)
def test_what_cannot_be_merged_is_one_sentence(edit, more, words, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base, layout = GOLDEN / 'qwen2_5_vl_tp2_pp2', QWEN['tp2_pp2']
    write_adapters(
        Path('lora'),
        base,
        drawn(weights(GOLDEN / 'qwen2_5_vl_tp1')[0, 0]['model']),
        layout,
        edit or (lambda held: held),
    )
    capsys.readouterr()
    does(
        qwen_line('merge_lora_to_base' if 'gone' in more or edit else 'mm_to_hf', base, 'new', layout, more),
        1,
    )
    said = capsys.readouterr().err.strip()
    assert words in said and len(said.splitlines()) == 1 and not Path('new').exists()


def test_adapters_need_their_base_and_its_layout(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pairs = drawn(weights(GOLDEN / 'qwen2_5_vl_tp1')[0, 0]['model'])
    write_adapters(Path('lora'), GOLDEN / 'qwen2_5_vl_tp1', pairs, QWEN['tp1'])
    for source, layout, words in (
        ('lora', 'tp1', 'holds LoRA weights and no model'),
        (GOLDEN / 'qwen2_5_vl_tp2_pp2', 'tp2_pp2', 'was trained under another layout than its base'),
    ):
        capsys.readouterr()
        does(qwen_line('mm_to_hf', source, 'new', QWEN[layout], '--cfg.lora_path lora --lora_alpha 6'), 1)
        assert words in capsys.readouterr().err and not Path('new').exists()
    does(
        qwen_line(
            'merge_lora_to_base',
            GOLDEN / 'qwen2_5_vl_tp1',
            'lora',
            QWEN['tp1'],
            '--cfg.lora_path lora --lora_alpha 6 --overwrite true',
        ),
        1,
    )
    assert (
        'is or holds the source lora, which is never changed' in capsys.readouterr().err
        and (Path('lora') / 'iter_0000020').is_dir()
    )
