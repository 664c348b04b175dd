"""The commands as a user types them: the lines of MindSpeed-MM's quick start with smaller numbers, what goes
wrong, and how fast help comes.
"""

import ast
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import mmkit
from mmkit.cli import mm_convert
from mmkit.cli import mmkit as command
from mmkit.converters.folders import MMFolder
from mmkit.converters.wan2_1 import wan2_1_towers
from mmkit.mindspeed_mm.convert import METHODS

GOLDEN = Path(__file__).parent / 'golden'
HF = GOLDEN / 'qwen2_5_vl_hf'
HF_TO_MM = """
mm-convert  Qwen2_5_VLConverter hf_to_mm \\
  --cfg.mm_dir "ckpt/mm_path/Qwen2.5-VL-3B-Instruct" \\
  --cfg.hf_config.hf_dir "ckpt/hf_path/Qwen2.5-VL-3B-Instruct" \\
  --cfg.parallel_config.llm_pp_layers [[4]] \\
  --cfg.parallel_config.vit_pp_layers [[3]] \\
  --cfg.parallel_config.tp_size 1
"""
MM_TO_HF = """
mm-convert  Qwen2_5_VLConverter mm_to_hf \\
  --cfg.save_hf_dir "ckpt/mm_to_hf/Qwen2.5-VL-3B-Instruct" \\
  --cfg.mm_dir "ckpt/mm_path/Qwen2.5-VL-3B-Instruct" \\
  --cfg.hf_config.hf_dir "ckpt/hf_path/Qwen2.5-VL-3B-Instruct" \\
  --cfg.parallel_config.llm_pp_layers [4] \\
  --cfg.parallel_config.vit_pp_layers [3] \\
  --cfg.parallel_config.tp_size 1
"""
RESPLIT_QWEN = """
mm-convert Qwen2_5_VLConverter resplit \\
  --cfg.source_dir "ckpt/mm_path/Qwen2.5-VL-3B-Instruct" \\
  --cfg.target_dir "ckpt/mm_resplit_path/Qwen2.5-VL-3B-Instruct" \\
  --cfg.source_parallel_config.llm_pp_layers [4] \\
  --cfg.source_parallel_config.vit_pp_layers [3] \\
  --cfg.source_parallel_config.tp_size 1 \\
  --cfg.target_parallel_config.llm_pp_layers [1,3] \\
  --cfg.target_parallel_config.vit_pp_layers [3,0] \\
  --cfg.target_parallel_config.tp_size 2
"""
WEIGHTS = './weights/Wan-AI/Wan2.1-T2V-1.3B-Diffusers'
CONVERT_TO_MM = (
    f'mmkit convert-wan --source_path {WEIGHTS}/transformer/ --target_path ckpt/wan/ --mode convert_to_mm'
)
CONVERT_TO_HF = (
    f'mmkit convert-wan --source_path ckpt/wan/ --ckpt_path {WEIGHTS}/transformer/ --target_path ckpt/wan_hf/'
    ' --mode convert_to_hf'
)
WAN_TO_MM = (
    f'mm-convert WanConverter hf_to_mm --cfg.source_path {WEIGHTS}/transformer/ --cfg.target_path ckpt/wan/'
)
WAN_TO_HF = (
    'mm-convert WanConverter mm_to_hf --cfg.source_path ckpt/wan/ --cfg.target_path ckpt/wan_hf/'
    f' --cfg.hf_dir {WEIGHTS}/transformer/'
)
RESPLIT = (
    'mm-convert WanConverter resplit --cfg.source_path ckpt/wan/ --cfg.target_path ckpt/other/ --cfg.hf_dir'
    f' {WEIGHTS}/transformer/'
)


def run(line, folder=None, code=0):
    "The finished process of a line in a shell; it must end with this exit code, and without a traceback."
    path = f'{Path(sys.executable).parent}{os.pathsep}{os.environ["PATH"]}'
    done = subprocess.run(
        ['sh', '-c', line], cwd=folder, capture_output=True, text=True, env=os.environ | dict(PATH=path)
    )
    assert done.returncode == code, done.stderr
    assert 'Traceback' not in done.stderr
    return done


def does(line):
    "The exit code of a line of mm-convert or mmkit that runs in this process."
    program, *words = shlex.split(line.replace('\\\n', ' '))
    try:
        return {'mm-convert': mm_convert, 'mmkit': command}[program](words)
    except SystemExit as end:
        return end.code


def inside(line, capsys, code):
    "What a line says on stderr when it runs in this process and fails; it must end with this exit code."
    ended = does(line)
    said = capsys.readouterr()
    assert (ended, said.out) == (code, ''), said.err
    return said.err


def last(text):
    return text.strip().splitlines()[-1]


@pytest.fixture
def work(tmp_path, monkeypatch):
    "A folder as the quick start has it, with a small model; the test runs in it."
    monkeypatch.chdir(tmp_path)
    shutil.copytree(HF, tmp_path / 'ckpt' / 'hf_path' / 'Qwen2.5-VL-3B-Instruct')
    return tmp_path


def test_the_quick_starts_lines_do_what_they_did(work):
    assert (
        last(run(HF_TO_MM, work).stdout)
        == 'wrote 66 tensors, 0.47 MB, in 1 file: ckpt/mm_path/Qwen2.5-VL-3B-Instruct'
    )
    mine, golden = (
        torch.load(folder / 'release/mp_rank_00/model_optim_rng.pt', weights_only=True)['model']
        for folder in (work / 'ckpt/mm_path/Qwen2.5-VL-3B-Instruct', GOLDEN / 'qwen2_5_vl_tp1')
    )
    assert mine.keys() == golden.keys() and all(torch.equal(mine[name], x) for name, x in golden.items())
    assert (
        last(run(MM_TO_HF, work).stdout)
        == f'wrote {sum(len(load_file(file)) for file in HF.glob("*.safetensors"))} tensors, 0.47 MB, in 2'
        ' files: ckpt/mm_to_hf/Qwen2.5-VL-3B-Instruct'
    )
    for file in HF.glob('*.safetensors'):
        old, new = load_file(file), load_file(work / 'ckpt/mm_to_hf/Qwen2.5-VL-3B-Instruct' / file.name)
        assert old.keys() == new.keys() and all(torch.equal(new[name], x) for name, x in old.items())


def test_both_forms_of_layers_do_in_both_directions_and_in_a_file(work):
    def words(line):
        return shlex.split(line.replace('\\\n', ' ').replace('tp_size 1', 'tp_size 2'))[1:]

    assert mm_convert(words(HF_TO_MM.replace('[[4]]', '[1,3]').replace('[[3]]', '[3,0]'))) == 0
    assert mm_convert(words(MM_TO_HF.replace('[4]', '[[1,3]]').replace('[3]', '[[3,0]]'))) == 0
    (work / 'there.yaml').write_text(
        'cfg:\n  mm_dir: again\n  hf_config: {hf_dir: ckpt/hf_path/Qwen2.5-VL-3B-Instruct}\n '
        ' parallel_config: {llm_pp_layers: [[1, 3]], vit_pp_layers: [3, 0], tp_size: 2}\n'
    )
    assert mm_convert('Qwen2_5_VLConverter hf_to_mm --config there.yaml'.split()) == 0
    golden = {
        f.relative_to(GOLDEN / 'qwen2_5_vl_tp2_pp2') for f in (GOLDEN / 'qwen2_5_vl_tp2_pp2').rglob('*')
    }
    for folder in ('again', 'ckpt/mm_path/Qwen2.5-VL-3B-Instruct'):
        assert {f.relative_to(work / folder) for f in (work / folder).rglob('*')} == golden
    printed = run('mm-convert Qwen2_5_VLConverter hf_to_mm --config there.yaml --print_config', work).stdout
    assert 'mm_dir: again' in printed and 'tp_size: 2' in printed


@pytest.mark.parametrize(
    'change, words',
    [
        (('hf_path', 'hf_pass'), 'ckpt/hf_pass/Qwen2.5-VL-3B-Instruct is not a folder'),
        (('[[4]]', '[[5]]'), 'llm_pp_layers [[5]] adds up to 5 but the model has 4'),
        (('[[3]]', '[[2]]'), 'vit_pp_layers [[2]] adds up to 2 but the model has 3'),
        (('tp_size 1', 'tp_size 4'), '2 groups of heads, which tp=4 does not divide'),
        (('tp_size 1', 'tp_size 0'), 'tp_size must be at least 1'),
        (('tp_size 1', 'tp_size 1 --cfg.save_vit_only true'), '--cfg.save_vit_only True is not possible'),
        (
            ('tp_size 1', 'tp_size 2 --cfg.parallel_config.vit_tp_size 1'),
            '--cfg.parallel_config.vit_tp_size 1 is not possible',
        ),
        (('tp_size 1', 'tp_size 1 --cfg.parallel_config.ep_size 2'), 'the model has no experts'),
        (('"ckpt/mm_path/Qwen2.5-VL-3B-Instruct"', '"ckpt"'), 'ckpt already holds something'),
    ],
)
def test_what_cannot_be_converted_is_one_sentence(change, words, work, capsys):
    said = inside(HF_TO_MM.replace(*change), capsys, code=1)
    assert len(said.strip().splitlines()) == 1 and said.startswith('mm-convert: ') and words in said
    assert [p.name for p in (work / 'ckpt').iterdir()] == ['hf_path']


@pytest.mark.parametrize(
    'change, words',
    [
        (('[[4]]', '[[4]'), '[[4] is not a list of whole numbers'),
        (('mm_dir', 'mm_dirr'), '--cfg.mm_dirr'),
        (('tp_size 1', 'tp_size one'), 'tp_size'),
        (('hf_to_mm', 'mm_to_mm'), "invalid choice: 'mm_to_mm'"),
        (('Qwen2_5_VLConverter', 'BertConverter'), "invalid choice: 'BertConverter'"),
        (('--cfg.mm_dir "ckpt/mm_path/Qwen2.5-VL-3B-Instruct"', ''), 'cfg.mm_dir'),
    ],
)
def test_what_is_not_understood_is_one_line_with_code_2(change, words, work, capsys):
    said = inside(HF_TO_MM.replace(*change), capsys, code=2)
    assert len(said.strip().splitlines()) == 1 and words in said


def test_a_wrong_path_in_a_shell_is_one_sentence(work):
    for change, code in ((('hf_path', 'hf_pass'), 1), (('hf_dir', 'hf_pass'), 2)):
        said = run(HF_TO_MM.replace(*change), work, code)
        assert said.stdout == '' and len(said.stderr.strip().splitlines()) == 1 and 'hf_pass' in said.stderr


def test_fields_that_change_nothing_are_accepted(work):
    line = (
        HF_TO_MM.replace('\\\n', ' ')
        + ' --cfg.trust_remote_code true --cfg.save_vit_only false --cfg.parallel_config.ep_size 1'
        ' --cfg.parallel_config.vit_tp_size 1 --cfg.parallel_config.audio_tp_size 0'
    )
    assert mm_convert(shlex.split(line)[1:]) == 0


@pytest.fixture
def wan(tmp_path, monkeypatch):
    """A folder as the quick start has it, with pipelines around small Wan2.1 transformers.

    The test runs in it.
    """
    monkeypatch.chdir(tmp_path)
    for kind in ('t2v', 'i2v'):
        pipeline = tmp_path / WEIGHTS.replace('T2V', kind.upper())
        shutil.copytree(GOLDEN / f'wan2_1_{kind}_hf', pipeline / 'transformer')
        (pipeline / 'model_index.json').write_text('{"_class_name": "WanPipeline"}')
    return tmp_path


def files_of(folder):
    return {
        file.relative_to(folder).as_posix(): file.read_bytes()
        for file in Path(folder).rglob('*')
        if file.is_file()
    }


def tensors_of(folder):
    return {name: x for file in Path(folder).glob('*.safetensors') for name, x in load_file(file).items()}


def same(x, y):
    return (
        x.dtype == y.dtype
        and x.shape == y.shape
        and torch.equal(x.contiguous().view(torch.uint8), y.contiguous().view(torch.uint8))
    )


def equal(mine, theirs):
    return mine.keys() == theirs.keys() and all(same(mine[name], x) for name, x in theirs.items())


def check_peers(folder, golden):
    "Every file of `folder` holds what the peer's converter wrote into it."
    assert files_of(folder).keys() == files_of(golden).keys()
    for name in files_of(golden):
        mine, theirs = Path(folder) / name, golden / name
        if mine.suffix != '.pt':
            assert mine.read_bytes() == theirs.read_bytes()
            continue
        mine, theirs = (torch.load(file, weights_only=True) for file in (mine, theirs))
        assert mine.keys() == theirs.keys() and mine.get('checkpoint_version') == theirs.get(
            'checkpoint_version'
        )
        for group in theirs.keys() - {'checkpoint_version'}:
            assert equal(mine[group], theirs[group]), (name, group)


@pytest.mark.parametrize(
    'golden, layers',
    [
        ('t2v_pp1', ''),
        ('t2v_pp1', '[]'),
        ('t2v_pp2', '[1,3]'),
        ('t2v_pp2', '[[1,3]]'),
        ('t2v_pp2_vpp2', '[[1,1],[1,1]]'),
        ('i2v_pp1', '[4]'),
    ],
)
def test_both_spellings_of_wan_write_the_peers_files_and_read_them(golden, layers, wan):
    def kind(line):
        return line.replace('T2V', golden[:3].upper())

    assert does(kind(CONVERT_TO_MM) + (f" --pp_vpp_layers '{layers}'" if layers else '')) == 0
    assert (
        does(
            kind(WAN_TO_MM).replace('ckpt/wan', 'ckpt/same')
            + (f" --cfg.target_parallel_config.pp_layers '{layers}'" if layers else '')
        )
        == 0
    )
    check_peers('ckpt/wan', GOLDEN / f'wan2_1_{golden}')
    assert files_of('ckpt/wan') == files_of('ckpt/same')
    shutil.rmtree('ckpt/wan')
    shutil.copytree(GOLDEN / f'wan2_1_{golden}', 'ckpt/wan')
    assert does(kind(CONVERT_TO_HF)) == does(kind(WAN_TO_HF).replace('wan_hf', 'same_hf')) == 0
    assert (
        files_of('ckpt/wan_hf') == files_of('ckpt/same_hf')
        and files_of('ckpt/wan_hf').keys() == files_of(GOLDEN / f'wan2_1_{golden[:3]}_hf').keys()
    )
    assert equal(tensors_of('ckpt/wan_hf'), tensors_of(GOLDEN / f'wan2_1_{golden[:3]}_hf'))


def test_a_line_of_the_quick_start_for_wan_in_a_shell(wan):
    assert (
        last(run(CONVERT_TO_MM + " --pp_vpp_layers '[1,3]'", wan).stdout)
        == 'wrote 123 tensors, 0.08 MB, in 2 files: ckpt/wan'
    )
    check_peers('ckpt/wan', GOLDEN / 'wan2_1_t2v_pp2')


@pytest.mark.parametrize(
    'steps',
    [
        ['[1,3]', '[[1,1],[1,1]]'],
        ['[[1,1],[1,1]]', '[2,1,1]', '[4]'],
        ['[4]', '[2,2] --cfg.target_parallel_config.tp_size 2', '[3,1]'],
    ],
    ids=' then '.join,
)
def test_wan_with_pictures_goes_through_layouts_and_opens_in_diffusers(steps, wan, capsys):
    from diffusers import WanTransformer3DModel

    first, *others = (f' --cfg.target_parallel_config.pp_layers {layers}' for layers in steps)
    lines = [line.replace('T2V', 'I2V') for line in (WAN_TO_MM, RESPLIT, WAN_TO_HF)]
    assert does(lines[0].replace('ckpt/wan', 'ckpt/0') + first) == 0
    for k, layers in enumerate(others):
        assert (
            does(lines[1].replace('ckpt/wan', f'ckpt/{k}').replace('ckpt/other', f'ckpt/{k + 1}') + layers)
            == 0
        )
    assert ('MindSpeed-MM does not: it has no tensor parallelism' in capsys.readouterr().out) == any(
        'tp_size' in step for step in steps
    )
    whole = WEIGHTS.replace('T2V', 'I2V')
    # the pipeline folder will do
    assert (
        does(lines[2].replace('ckpt/wan/', f'ckpt/{len(others)}').replace(f'{whole}/transformer/', whole))
        == 0
    )
    hf = GOLDEN / 'wan2_1_i2v_hf'
    for k, layers in enumerate(steps):
        table = json.loads(layers.split()[0])
        found = MMFolder(f'ckpt/{k}', wan2_1_towers(json.loads((hf / 'config.json').read_text()))).found
        assert found.towers[0].layers == tuple(
            map(tuple, table if isinstance(table[0], list) else [table])
        ) and found.tp == 1 + ('tp_size 2' in layers)
        assert {
            f'img_emb.proj.{part}.{end}' for part in (0, 1, 3, 4) for end in ('weight', 'bias')
        } <= found.chunks[0][0].keys()
    assert equal(tensors_of('ckpt/wan_hf'), tensors_of(hf))
    opened, report = WanTransformer3DModel.from_pretrained('ckpt/wan_hf', output_loading_info=True)
    assert not any(report.values()) and all(
        torch.equal(opened.state_dict()[name].float(), x.float()) for name, x in tensors_of(hf).items()
    )


def test_a_resplit_equals_a_conversion(wan):
    assert does(WAN_TO_MM) == does(RESPLIT + ' --cfg.target_parallel_config.pp_layers [[1,1],[1,1]]') == 0
    check_peers('ckpt/other', GOLDEN / 'wan2_1_t2v_pp2_vpp2')


def test_an_iteration_of_a_training_and_a_pattern_that_was_converted_in_place(wan):
    shutil.copytree(GOLDEN / 'wan2_1_t2v_pp2', 'ckpt/wan')
    Path('ckpt/wan/release').rename('ckpt/wan/iter_0000500')
    Path('ckpt/wan/latest_checkpointed_iteration.txt').write_text('500')
    shutil.copytree(GOLDEN / 'wan2_1_t2v_pp1', f'{WEIGHTS}/transformer', dirs_exist_ok=True)
    assert (
        does(CONVERT_TO_HF)
        == does(CONVERT_TO_HF.replace('ckpt/wan/', 'ckpt/wan/iter_0000500').replace('wan_hf', 'same'))
        == 0
    )
    assert (
        files_of('ckpt/wan_hf') == files_of('ckpt/same')
        and files_of('ckpt/same').keys() == files_of(GOLDEN / 'wan2_1_t2v_hf').keys()
    )


PP = '--cfg.target_parallel_config.pp_layers'


@pytest.mark.parametrize(
    'line, words',
    [
        (WAN_TO_MM + f' {PP} [2,3]', f'{PP} [2, 3] adds up to 5 but the model has 4'),
        (CONVERT_TO_MM + ' --pp_vpp_layers [2,3]', '--pp_vpp_layers [2, 3] adds up to 5 but the model has 4'),
        (
            CONVERT_TO_MM + ' --pp_vpp_layers [[1,1],[2]]',
            (
                '--pp_vpp_layers [[1, 1], [2]] has rows of [1, 2] numbers: each row needs one number for each'
                ' pipeline stage'
            ),
        ),
        (
            WAN_TO_MM + f' {PP} [[2],[2]]',
            f'{PP} [[2], [2]] has 2 virtual chunks on 1 stage: virtual chunks need at least 2 stages',
        ),
        (CONVERT_TO_MM + ' --pp_vpp_layers [0,4]', '--pp_vpp_layers [0, 4] has a stage without layers'),
        (
            WAN_TO_MM.replace('weights/', 'weight/'),
            (
                '--cfg.source_path weight/Wan-AI/Wan2.1-T2V-1.3B-Diffusers/transformer is not a folder: give'
                ' the transformer folder of a Wan2.1 model'
            ),
        ),
        (
            CONVERT_TO_MM.replace(WEIGHTS, 'qwen'),
            (
                '--source_path qwen/transformer holds a qwen2_5_vl: give the transformer folder of a Wan2.1'
                ' model'
            ),
        ),
        (
            CONVERT_TO_MM.replace(f'{WEIGHTS}/transformer/', 'weights'),
            '--source_path weights has no config.json',
        ),
        (CONVERT_TO_MM.replace(f'{WEIGHTS}/transformer/', 'bare'), 'bare holds no .safetensors file'),
        (
            CONVERT_TO_MM.replace(f'{WEIGHTS}/transformer/', 'two'),
            '--source_path two has two models, transformer and transformer_2: give one of these folders',
        ),
        (
            CONVERT_TO_MM.replace(f'{WEIGHTS}/transformer/', 'mm'),
            '--source_path mm holds a MindSpeed-MM checkpoint',
        ),
        (
            CONVERT_TO_MM.replace('ckpt/wan/', f'{WEIGHTS}/transformer/'),
            (
                'transformer is also the source, which is never changed: give a new folder, such as'
                ' weights/Wan-AI/Wan2.1-T2V-1.3B-Diffusers/transformer_mm'
            ),
        ),
        (
            CONVERT_TO_MM.replace('ckpt/wan/', 'qwen'),
            'qwen already holds something: give a folder that is new or empty',
        ),
        (
            RESPLIT.replace('ckpt/wan/', 'mm').replace('ckpt/other/', 'mm'),
            '--cfg.target_path mm is also the source',
        ),
        (
            CONVERT_TO_HF,
            '--source_path ckpt/wan is not a folder: give a folder that mm-convert or MindSpeed-MM wrote',
        ),
        (
            CONVERT_TO_HF.replace('ckpt/wan/', f'{WEIGHTS}/transformer'),
            (
                'transformer has no latest_checkpointed_iteration.txt: give a folder that mm-convert or'
                ' MindSpeed-MM wrote'
            ),
        ),
        (
            CONVERT_TO_HF.replace('ckpt/wan/', 'mm/iter_0000020'),
            'with 20 in its latest_checkpointed_iteration.txt',
        ),
        (
            CONVERT_TO_HF.replace('ckpt/wan/', 'bits'),
            '--source_path bits holds ranks but is not called release or iter_ and 7 digits',
        ),
        (
            CONVERT_TO_HF.replace('ckpt/wan/', 'mm').replace(f'--ckpt_path {WEIGHTS}/transformer/', ''),
            '--ckpt_path is missing: give the transformer folder of the model',
        ),
        (
            RESPLIT.replace('ckpt/wan/', 'mm').replace(f'--cfg.hf_dir {WEIGHTS}/transformer/', ''),
            '--cfg.hf_dir is missing: give the transformer folder of the model',
        ),
        (
            CONVERT_TO_HF.replace('ckpt/wan/', 'mm').replace('T2V', 'I2V'),
            'does not fit the model: missing: blocks.0.cross_attn.k_img.bias',
        ),
        (
            CONVERT_TO_HF.replace('ckpt/wan/', 'mm').replace(WEIGHTS, 'qwen'),
            '--ckpt_path qwen/transformer holds a qwen2_5_vl',
        ),
        (
            CONVERT_TO_HF.replace('ckpt/wan/', 'qwen_mm'),
            'qwen_mm holds [0] wan layers, 0 in all, but the model has 4',
        ),
        (
            CONVERT_TO_HF.replace('ckpt/wan/', 'mm') + ' --pp_vpp_layers [1,3]',
            (
                '--pp_vpp_layers [1, 3] is not possible, the layout of the source is found by itself: leave'
                ' it out'
            ),
        ),
        (
            WAN_TO_HF.replace('ckpt/wan/', 'mm') + ' --cfg.target_parallel_config.tp_size 2',
            '--cfg.target_parallel_config.tp_size 2 is not possible',
        ),
        (
            WAN_TO_MM + ' --cfg.target_parallel_config.tp_size 0',
            (
                '--cfg.target_parallel_config.tp_size 0 does not divide the 2 heads of the model: give a'
                ' number that does'
            ),
        ),
        (
            WAN_TO_MM + ' --cfg.target_parallel_config.tp_size 3',
            '--cfg.target_parallel_config.tp_size 3 does not divide the 2 heads',
        ),
        (
            WAN_TO_MM + ' --cfg.target_parallel_config.ep_size 2',
            '--cfg.target_parallel_config.ep_size 2 is not possible, the model has no experts: leave it out',
        ),
        (
            WAN_TO_MM + ' --cfg.lora_path lora',
            (
                '--cfg.lora_path lora is not possible, LoRA weights are merged by mm_to_hf and'
                ' merge_lora_to_base: leave it out'
            ),
        ),
        (
            (
                'mm-convert WanConverter layerzero_to_mm --cfg.source_path save --cfg.target_path mm'
                ' --iteration 20 --prefix predictor --ema_model false'
            ),
            'layerzero_to_mm is not possible, the shards of a LayerZero training',
        ),
        (
            (
                'mm-convert WanConverter merge_lora_to_base --cfg.source_path a --cfg.target_path b'
                ' --cfg.lora_path c --lora_rank 8 --lora_alpha 16 --use_npu true'
            ),
            '--cfg.source_path a is not a folder',
        ),
    ],
)
def test_what_cannot_be_converted_of_wan_is_one_sentence(line, words, wan, capsys):
    for name, source in {
        'qwen/transformer': HF,
        'mm': GOLDEN / 'wan2_1_t2v_pp1',
        'mm/iter_0000020': GOLDEN / 'wan2_1_t2v_pp1' / 'release',
        'bits': GOLDEN / 'wan2_1_t2v_pp1' / 'release',
        'qwen_mm': GOLDEN / 'qwen2_5_vl_tp1',
    }.items():
        shutil.copytree(source, name)
    for name in ('bare', 'two/transformer', 'two/transformer_2'):
        Path(name).mkdir(parents=True)
        shutil.copyfile(GOLDEN / 'wan2_1_t2v_hf' / 'config.json', Path(name) / 'config.json')
    before = files_of(wan)
    said = inside(line, capsys, code=1)
    assert len(said.strip().splitlines()) == 1 and said.startswith(f'{line.split()[0]}: ') and words in said
    assert files_of(wan) == before and not Path('ckpt').exists()


@pytest.mark.parametrize(
    'line, words',
    [
        (WAN_TO_MM + f' {PP} 4', '4 is not a list of whole numbers'),
        (
            CONVERT_TO_MM + ' --pp_vpp_layers 1,3',
            'argument --pp_vpp_layers: 1,3 is not a list of whole numbers such as [18,18] or [[18,18]]',
        ),
        (CONVERT_TO_MM.replace('convert_to_mm', 'to_mm'), "argument --mode: invalid choice: 'to_mm'"),
        (CONVERT_TO_MM.replace('--mode convert_to_mm', ''), '--mode'),
        (CONVERT_TO_MM.replace('--source_path', '--source'), '--source_path'),
        (CONVERT_TO_MM + ' --tp 2', 'not understood: --tp 2'),
        (WAN_TO_MM.replace('source_path', 'source_dir'), '--cfg.source_dir'),
        (WAN_TO_MM.replace('hf_to_mm', 'mm_to_dcp'), "invalid choice: 'mm_to_dcp'"),
    ],
)
def test_what_is_not_understood_of_wan_is_one_line_with_code_2(line, words, wan, capsys):
    said = inside(line, capsys, code=2)
    assert (
        len(said.strip().splitlines()) == 1
        and said.startswith(line.split()[0])
        and words in said
        and not Path('ckpt').exists()
    )


def test_wans_fields_that_change_nothing_are_accepted(wan):
    assert (
        does(
            WAN_TO_MM
            + ' --cfg.target_parallel_config.ep_size 1 --cfg.target_parallel_config.tp_size 1 --cfg.lora_path'
            " '' --cfg.hf_dir ''"
        )
        == 0
    )
    assert does(WAN_TO_HF + f' {PP} []') == 0
    Path('there.yaml').write_text(
        f'cfg:\n  source_path: {WEIGHTS}\n  target_path: again\n  target_parallel_config: {{pp_layers: [1,'
        ' 3]}\n'
    )
    assert does('mm-convert WanConverter hf_to_mm --config there.yaml') == 0
    check_peers('again', GOLDEN / 'wan2_1_t2v_pp2')


def test_qwen_is_resplit_with_the_peers_words(work, capsys):
    """A released model needs no config.json for it; this one, whose heads are not 128 wide, does."""
    shutil.copytree(GOLDEN / 'qwen2_5_vl_tp1', 'ckpt/mm_path/Qwen2.5-VL-3B-Instruct')
    assert 'give --cfg.hf_config.hf_dir' in inside(RESPLIT_QWEN, capsys, code=1)
    config = ' --cfg.hf_config.hf_dir ckpt/hf_path/Qwen2.5-VL-3B-Instruct'
    assert does(RESPLIT_QWEN.rstrip() + config) == 0
    check_peers('ckpt/mm_resplit_path/Qwen2.5-VL-3B-Instruct', GOLDEN / 'qwen2_5_vl_tp2_pp2')
    capsys.readouterr()
    assert 'llm_pp_layers [5] adds up to 5' in inside(
        RESPLIT_QWEN.replace('[4]', '[5]').rstrip() + config, capsys, code=1
    )
    assert '--cfg.target_parallel_config.ep_size 2 is not possible' in inside(
        RESPLIT_QWEN.rstrip() + config + ' --cfg.target_parallel_config.ep_size 2', capsys, code=1
    )


def test_heads_that_are_128_wide_need_no_config(work):
    from safetensors.torch import save_file

    from mmkit.converters.convert import hf_to_mm
    from mmkit.converters.qwen2_5_vl import qwen2_5_vl_towers
    from mmkit.converters.weights import pieces

    for tied in (True, False):
        config = dict(
            hidden_size=256,
            intermediate_size=12,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=128,
            vocab_size=8,
            tie_word_embeddings=tied,
            vision_config=dict(
                depth=1, hidden_size=16, intermediate_size=20, num_heads=16, out_hidden_size=256
            ),
        )
        hf = work / f'hf{tied}'
        hf.mkdir()
        save_file(
            {
                h: torch.randn(shape)
                for chunk in pieces(qwen2_5_vl_towers(config))
                for p in chunk
                for h, shape in zip(p.hf, p.rule.shapes)
            },
            hf / 'model.safetensors',
        )
        (hf / 'config.json').write_text(json.dumps(config))
        hf_to_mm(hf, f'mm{tied}', qwen2_5_vl_towers(config, [1, 0], [1, 1]), 2)
        hf_to_mm(hf, f'wanted{tied}', qwen2_5_vl_towers(config), 1)
        line = (
            f'--cfg.source_dir mm{tied} --cfg.target_dir out{tied} --cfg.source_parallel_config.llm_pp_layers'
            ' [1,1] --cfg.source_parallel_config.vit_pp_layers [1,0] --cfg.source_parallel_config.tp_size 2'
            ' --cfg.target_parallel_config.llm_pp_layers [2] --cfg.target_parallel_config.vit_pp_layers [1]'
        )
        assert does(f'mm-convert Qwen2_5_VLConverter resplit {line}') == 0
        check_peers(f'out{tied}', work / f'wanted{tied}')


def test_overwrite_replaces_an_earlier_conversion(work, capsys):
    assert does(HF_TO_MM) == 0
    capsys.readouterr()
    assert 'Qwen2.5-VL-3B-Instruct already holds something' in inside(HF_TO_MM, capsys, code=1)
    pp2 = (
        HF_TO_MM.rstrip()
        .replace('[[4]]', '[1,3]')
        .replace('[[3]]', '[3,0]')
        .replace('tp_size 1', 'tp_size 2')
    )
    assert does(pp2 + ' --overwrite true') == 0
    check_peers('ckpt/mm_path/Qwen2.5-VL-3B-Instruct', GOLDEN / 'qwen2_5_vl_tp2_pp2')
    capsys.readouterr()
    assert 'is or holds the source' in inside(
        pp2.replace('ckpt/mm_path/Qwen2.5-VL-3B-Instruct', 'ckpt/hf_path') + ' --overwrite true',
        capsys,
        code=1,
    )
    assert (
        sorted(f.name for f in (work / 'ckpt').iterdir()) == ['hf_path', 'mm_path']
        and len(list((work / 'ckpt/mm_path').iterdir())) == 1
    )


def test_wan_is_overwritten_in_both_spellings(wan, capsys):
    for line, flag in ((CONVERT_TO_MM, ' --overwrite'), (WAN_TO_MM, ' --overwrite true')):
        if not Path('ckpt/wan').exists():
            assert does(line) == 0
        capsys.readouterr()
        assert 'already holds something' in inside(line, capsys, code=1)
        assert does(line + flag) == 0
        check_peers('ckpt/wan', GOLDEN / 'wan2_1_t2v_pp1')


def example(kind):
    "A value of a kind of field that is not its default, as YAML and as a printed config have it."
    from mmkit.mindspeed_mm.convert import LAYERS, MAYBE_LAYERS

    return {LAYERS: [1, 2], MAYBE_LAYERS: [3, 4], int: 5, float: 6.5, bool: True, str: 'some words'}.get(
        kind, 7
    )


@pytest.mark.parametrize(
    'converter, method',
    [(converter, method) for converter, (_, methods) in METHODS.items() for method in methods],
)
def test_every_field_of_every_method_is_read_from_a_file_and_printed(converter, method, work, capsys):
    """What --print_config prints of a file is a file that is understood.

    A word of the line goes before one of the file.
    """
    import yaml

    _, fields, unused = METHODS[converter][1][method]
    given = {
        name: not default if kind is bool else example(kind) for name, kind, default, _ in (*fields, *unused)
    }
    tree = {}
    for name, value in given.items():
        *path, last = name.split('.')
        inner = tree
        for part in path:
            inner = inner.setdefault(part, {})
        inner[last] = value
    Path('there.yaml').write_text(yaml.safe_dump(tree))
    assert does(f'mm-convert {converter} {method} --config there.yaml --print_config') == 0
    printed = capsys.readouterr().out
    found = yaml.safe_load(printed)
    assert found == tree, printed
    Path('printed.yaml').write_text(printed)
    assert (
        does(f'mm-convert {converter} {method} --config printed.yaml --print_config') == 0
        and capsys.readouterr().out == printed
    )
    texts = [name for name, kind, _, _ in fields if kind is str]
    for name in texts[:1]:
        assert does(f'mm-convert {converter} {method} --config there.yaml --{name} other --print_config') == 0
        assert yaml.safe_load(capsys.readouterr().out) != tree


@pytest.mark.parametrize('converter', METHODS)
def test_a_field_of_a_file_that_no_method_has_is_named(converter, work, capsys):
    for text in ('cfg: {stranger: 1}\n', 'stranger: 1\n'):
        Path('there.yaml').write_text(text)
        said = inside(f'mm-convert {converter} hf_to_mm --config there.yaml', capsys, code=2)
        assert 'stranger' in said and said.count('\n') == 1, said


def test_help_names_every_field(capsys):
    for converter, (_, methods) in METHODS.items():
        for method, (_, fields, unused) in methods.items():
            assert does(f'mm-convert {converter} {method} -h') == 0
            shown = ' '.join(capsys.readouterr().out.split())
            assert not re.search('<|object at|0x', shown), shown
            for name, _, _, words in (*fields, *unused):
                assert f'--{name}' in shown and words in shown, name
    said = run('mm-convert Qwen2_5_VLConverter mm_to_hf -h').stdout
    for field in (
        'save_hf_dir',
        'mm_dir',
        'hf_config.hf_dir',
        'parallel_config.llm_pp_layers',
        'parallel_config.vit_pp_layers',
        'parallel_config.tp_size',
    ):
        assert f'--cfg.{field}' in said
    for line, words in (
        (
            'mm-convert WanConverter resplit -h',
            ('source_path', 'target_path', 'hf_dir', 'pp_layers', 'tp_size', 'Wan'),
        ),
        ('mm-convert WanConverter -h', ('hf_to_mm', 'layerzero_to_mm', 'not possible')),
        ('mmkit convert-wan -h', ('--pp_vpp_layers', '--ckpt_path')),
    ):
        assert does(line) == 0
        shown = capsys.readouterr().out
        assert all(word in shown for word in words), shown
    for line in ('mm-convert -h', 'mm-convert Qwen2_5_VLConverter -h'):
        assert 'Qwen2_5_VLConverter' in run(line).stdout or 'hf_to_mm' in run(line).stdout


def test_mmkit_says_what_it_can_do_and_what_is_wrong(tmp_path):
    assert {'first-run', 'train', 'llava-to-mllm', 'chat', 'convert-wan'} <= set(
        re.findall(r'[\w-]+', run('mmkit --help').stdout)
    )
    said = run('mmkit train nowhere.json layout.tp=2', tmp_path, code=1)
    assert (
        said.stderr.startswith('mmkit: ')
        and 'nowhere.json' in said.stderr
        and len(said.stderr.strip().splitlines()) == 1
    )
    for line in (
        'mmkit train config.json --rank 2',
        'mmkit train config.json fast',
        'mmkit chat folder question more',
        'mmkit',
        'mmkit sing',
    ):
        assert last(run(line, tmp_path, code=2).stderr).startswith('mmkit')


def test_mmkit_hands_on_what_was_said(tmp_path, monkeypatch, capsys):
    from mmkit.config import Config
    from mmkit.core.values import dumps

    (tmp_path / 'config.json').write_text(dumps(Config(weights='weights')))
    told = {}

    class Run:
        status, folder = 'done', 'here'

        def follow(self, print_line):
            print_line('step 1')

    def launch(config, ranks=None, folder=None):
        told.update(config=config, ranks=ranks, folder=folder)
        return Run()

    monkeypatch.setattr('mmkit.launcher.run.launch', launch)
    monkeypatch.setattr(
        'mmkit.trainer.chat.chat', lambda folder, question, images=(): f'{folder} {question} {images}'
    )
    monkeypatch.setattr(
        'mmkit.recipes.first_run.first_run',
        lambda folder=None, ranks=2, seed=0, steps=400, say=print: (
            say(f'{folder} {ranks} {seed} {steps}') or 'well'
        ),
    )
    assert (
        command(
            [
                'train',
                str(tmp_path / 'config.json'),
                'layout.tp=2',
                '--ranks',
                '4',
                '--run',
                'there',
                'loop.steps=3',
            ]
        )
        == 0
    )
    assert (
        told['config'].layout.tp,
        told['config'].loop.steps,
        told['config'].weights,
        told['ranks'],
        told['folder'],
    ) == (2, 3, 'weights', 4, 'there')
    assert command(['chat', 'folder', '--image', 'a.jpg', 'What is this?', '--image', 'b.jpg']) == 0
    assert command(['first-run', '--run', 'x', '--steps', '5']) == 0
    assert capsys.readouterr().out.splitlines() == [
        'step 1',
        'done: here',
        "folder What is this? ['a.jpg', 'b.jpg']",
        'x 2 0 5',
        'well',
    ]
    assert (
        command(['train', str(tmp_path / 'config.json'), 'layout.tpp=2']) == 1
        and 'tpp' in capsys.readouterr().err
    )


def test_mmkit_converts_llava_and_names_what_it_drops(tmp_path):
    turns = [{'from': 'human', 'value': '<image>\nWhat is this?'}, {'from': 'gpt', 'value': 'A cat.'}]
    (tmp_path / 'llava.json').write_text(
        json.dumps(
            [
                dict(id='1', image='cat.jpg', conversations=turns),
                dict(id='2', image='dog.jpg', conversations=turns),
            ]
        )
    )
    (tmp_path / 'pictures').mkdir()
    from PIL import Image

    Image.new('RGB', (8, 8)).save(tmp_path / 'pictures' / 'cat.jpg')
    assert 'kept 1 of 2' in run('mmkit llava-to-mllm llava.json mllm.json --images pictures', tmp_path).stdout
    assert len(json.loads((tmp_path / 'mllm.json').read_text())) == 1
    assert (
        'nowhere.json'
        in run('mmkit llava-to-mllm nowhere.json other.json --images pictures', tmp_path, code=1).stderr
    )


def test_an_interrupted_or_failed_command_says_so(capsys):
    from mmkit.cli import finish
    from mmkit.core.ranks import RankFailed

    def raises(error):
        def command():
            raise error

        return command

    assert [
        finish('mmkit', raises(error))
        for error in (KeyboardInterrupt(), ValueError('no'), RankFailed(1, -9, 'out of memory'))
    ] == [130, 1, 1]
    assert capsys.readouterr().err.splitlines()[:3] == [
        'mmkit: stopped',
        'mmkit: no',
        'mmkit: rank 1 failed (SIGKILL)',
    ]
    with pytest.raises(ZeroDivisionError):
        finish('mmkit', raises(ZeroDivisionError()))


def test_help_and_import_are_quick_and_import_nothing_heavy():
    heavy = {'torch', 'numpy', 'transformers', 'megatron', 'PIL', 'matplotlib', 'IPython'}
    for code in (
        'import mmkit; dir(mmkit); mmkit.Config; mmkit.load_config',
        (
            'import contextlib, io, mmkit.cli\nwith contextlib.redirect_stdout(io.StringIO()),'
            ' contextlib.suppress(SystemExit): mmkit.cli.mmkit(["--help"])'
        ),
    ):
        out = subprocess.run(
            [sys.executable, '-c', code + '\nimport sys; print(*sys.modules)'],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        assert not heavy & set(out.split()), heavy & set(out.split())

    def best(code):
        return min(timed(code) for _ in range(3))

    assert best('import mmkit') - best('pass') < 0.5


def timed(code):
    start = time.perf_counter()
    subprocess.run([sys.executable, '-c', code], check=True)
    return time.perf_counter() - start


@pytest.mark.parametrize('name', mmkit.NAMES)
def test_a_public_name_is_where_the_table_says_and_no_module_hides_it(name):
    package = Path(mmkit.__file__).parent
    tree = ast.parse((package.parent / mmkit.NAMES[name].replace('.', '/')).with_suffix('.py').read_text())
    assert name in next(
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and node.targets[0].id == '__all__'
    )
    assert not (package / f'{name}.py').exists() and not (package / name).exists()


def test_an_unknown_public_name_lists_the_known_ones():
    with pytest.raises(AttributeError, match='Config.*Layout'):  # noqa: RUF043
        mmkit.Layot  # noqa: B018
    assert set(mmkit.NAMES) <= set(dir(mmkit)) and re.fullmatch(r'\d+\.\d+\.\d+', mmkit.__version__)
