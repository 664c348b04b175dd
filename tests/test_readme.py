"""What README and the tutorials tell somebody to type is there and works, and every heading of the quick
start they replace is found in them.
"""

import json
import os
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from mmkit.cli import COMMANDS, mm_convert, mmkit
from mmkit.config import Config, Data, Loop, load_config
from mmkit.core.files import load_json
from mmkit.core.ranks import package_path
from mmkit.core.values import dumps, override
from mmkit.launcher.run import launch
from mmkit.models.shapes import QwenShape
from mmkit.toy.qwen import conversation_texts, emoji_names, llava_toy, tiny_qwen2_5_vl
from mmkit.toy.wan import tiny_wan

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / 'README.md').read_text(encoding='utf-8')


# What is to be typed


def commands(text):
    """Every shell command in fenced blocks, lines joined, and every code span of a text that begins with a
    command of ours.
    """
    blocks = re.findall(r'```(?:sh|bash)\n(.*?)```', text, re.S)
    lines = [
        line.split('  #')[0].strip()
        for block in blocks
        for line in block.replace('\\\n', ' ').split('\n')
        if line.strip()
    ]
    return lines + [
        span
        for span in re.findall(r'`([^`\n]+)`', re.sub(r'```.*?```', '', text, flags=re.S))
        if re.match(r'(mmkit|mm-convert) ', span)
    ]


def pages():
    "(name, text) of README in both languages, the index and every tutorial."
    for name in ('README.md', 'README_zh.md'):
        yield name, (ROOT / name).read_text(encoding='utf-8')
    for path in [ROOT / 'nbs/index.ipynb', *sorted((ROOT / 'nbs/tutorials').glob('*.ipynb'))]:
        cells = json.loads(path.read_text(encoding='utf-8'))['cells']
        yield (
            path.name,
            '\n\n'.join(''.join(cell['source']) for cell in cells if cell['cell_type'] == 'markdown'),
        )


def unknown(line):
    "The word or the flag of a line that no command of ours has; None where all are known."
    words = [part for part in re.split(r'\s*&&\s*', line) if part.startswith('mmkit ')]
    for part in words:
        name, *rest = part.removeprefix('mmkit ').split()
        if name not in COMMANDS:
            return name
        flags = {flag for flag, _ in COMMANDS[name][2]}
        for word in rest:
            if word.startswith('--') and word.split('=')[0] not in flags:
                return word


def test_every_command_that_is_named_exists():
    found = [(name, line) for name, text in pages() for line in commands(text) if 'mmkit ' in line]
    assert len(found) > 40 and {name for name, _ in found} >= {
        'README.md',
        'README_zh.md',
        'index.ipynb',
        '2_qwen2_5_vl.ipynb',
        '3_wan2_1.ipynb',
    }
    assert not [(name, line) for name, line in found if unknown(line)]
    assert (
        unknown('mmkit try-hosts') == 'try-hosts'
        and unknown('mmkit plan A --host B') == '--host'
        and not unknown('mmkit doctor --hosts a,b')
    )


# README's commands, in a folder where what they name is small


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "The folders and the config that README names, as toys."
    folder, before = tmp_path_factory.mktemp('readme'), Path.cwd()
    os.chdir(folder)
    images, file = llava_toy('data', emoji_names(4), count=16, size=56)
    weights = tiny_qwen2_5_vl('ckpt/hf_path/Qwen2.5-VL-3B-Instruct', conversation_texts(file), hidden=64)
    tiny_wan('weights/Wan-AI/Wan2.1-T2V-1.3B-Diffusers', room=16)
    Path('config.json').write_text(
        dumps(
            Config(
                weights=str(weights),
                data=Data(files=(str(file),), media_dir=str(images), max_length=128, workers=0),
                loop=Loop(steps=4, global_batch=16),
            )
        )
    )
    yield folder
    os.chdir(before)


@pytest.fixture(scope='module')
def run(folder):
    "A run of four steps."
    return launch(load_config('config.json'), 2, name='NAME').wait()


def test_weights_are_converted(folder, capsys):
    (line,) = (line for line in commands(README) if line.startswith('mm-convert '))
    shape = QwenShape.from_hf(load_json(Path('ckpt/hf_path/Qwen2.5-VL-3B-Instruct/config.json')))
    assert '[[36]]' in line and '[[32]]' in line
    assert (
        mm_convert(
            shlex.split(
                line.replace('[[36]]', f'[[{shape.text.layers}]]').replace(
                    '[[32]]', f'[[{shape.vision.layers}]]'
                )
            )[1:]
        )
        == 0
    )
    (line,) = (line for line in commands(README) if line.startswith('mmkit convert-wan --'))
    assert mmkit(shlex.split(line)[1:]) == 0
    assert capsys.readouterr().out.count('wrote ') == 2
    for made in ('ckpt/mm_path/Qwen2.5-VL-3B-Instruct', 'ckpt/wan2.1'):
        assert (Path(made) / 'release/mp_rank_00/model_optim_rng.pt').is_file()


def test_what_a_run_needs_and_costs_is_said(run, capsys):
    for name, words in (('plan', 'layer'), ('estimate', 'the run: 5000 steps')):
        (line,) = (line for line in commands(README) if line.startswith(f'mmkit {name} runs'))
        assert mmkit(shlex.split(line)[1:]) == 0
        assert words in capsys.readouterr().out


def test_a_run_goes_on(run, capsys):
    (line,) = (line for line in commands(README) if line.startswith('mmkit resume '))
    # as if it had been stopped early
    (run.folder / 'config.json').write_text(
        dumps(override(load_config(run.folder / 'config.json'), ['loop.steps=6']))
    )
    assert mmkit(shlex.split(line)[1:]) == 0
    assert [record['step'] for record in run.records()] == [
        1,
        2,
        3,
        4,
        5,
        6,
    ] and 'done: runs/NAME' in capsys.readouterr().out


def test_several_machines_are_told_what_to_start(folder, capsys):
    (line,) = (line for line in commands(README) if line.startswith('mmkit launch-lines '))
    assert mmkit(shlex.split(line)[1:]) == 0
    said = capsys.readouterr().out
    assert (
        said.count('torchrun') == 2
        and '# on node2, to train:' in said
        and '--nnodes=2' in said.replace('--nnodes 2', '--nnodes=2')
        and 'eth0' in said
    )


def test_machines_are_tried(folder):
    "Two names of this machine stand for two machines."
    (line,) = (line for line in commands(README) if line.startswith('mmkit doctor --hosts'))
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        port = probe.getsockname()[1]
    assert 'node1,node2' in line
    words = shlex.split(line.replace('node1,node2', '127.0.0.1,localhost'))[1:]

    def start(here):
        return subprocess.Popen(
            [
                sys.executable,
                '-c',
                'import sys; from mmkit.cli import mmkit; sys.exit(mmkit())',
                *words,
                '--here',
                here,
                '--port',
                str(port),
                '--limit',
                '90',
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, 'PYTHONPATH': package_path()},
        )

    for machine in [start('127.0.0.1'), start('localhost')]:
        assert '2 machines meet at 127.0.0.1' in machine.communicate(timeout=200)[0]


# .ci/run, test_notebook.py, test_cli.py, test_peer.py
ELSEWHERE = ('pip install', 'mmkit first-run', 'mmkit first-video', 'mmkit doctor', 'mmkit from-mindspeed-mm')


def test_no_command_of_readme_is_left_out():
    "A new command in README needs a test here, or a place in the list above."
    here = [
        'mm-convert Qwen2_5_VLConverter hf_to_mm ',
        'mmkit convert-wan',
        'mmkit plan ',
        'mmkit estimate ',
        'mmkit resume ',
        'mmkit launch-lines ',
        'mmkit doctor --hosts ',
    ]
    assert not [
        line
        for line in commands(README)
        if not any(re.match(start, line) for start in here) and not line.startswith(ELSEWHERE)
    ]


# The headings of the quick start (Qwen2.5-VL-3B and Wan2.1 快速上手指南), in its order

HEADINGS = {
    '2_qwen2_5_vl.ipynb': (
        '1 环境安装',
        '1.1 昇腾软件安装',
        '1.2 仓库拉取以及MindSpeed MM依赖安装',
        '2 权重下载及转换',
        '2.1 权重下载',
        '2.2 权重转换',
        '3 数据集准备及处理',
        '3.1 数据集下载(以coco2017数据集为例)',
        '3.2 数据集处理',
        '4 启动微调',
        '4.1 准备工作',
        '4.2 配置参数',
        '4.2 数据目录配置',
        '4.2 模型保存加载及日志信息配置',
        '4.2 单机运行配置',
        '4.2 多机运行配置',
        '4.3 启动微调',
    ),
    '3_wan2_1.ipynb': (
        '1 环境安装',
        '1.1 昇腾软件安装',
        '1.2 仓库拉取以及MindSpeed MM依赖安装',
        '1.3 Decord搭建',
        '2 权重下载及转换',
        '2.1 Diffusers权重下载',
        '2.2 权重转换',
        '3 数据预处理',
        '4.1 特征提取',
        '4.2 准备工作',
        '4.3 参数配置',
        '4.4 启动特征提取',
        '5 启动训练',
        '5.1 准备工作',
        '5.2 参数配置',
        '5.3 启动训练',
    ),
}


@pytest.mark.parametrize('name', HEADINGS)
def test_every_heading_of_the_quick_start_is_found(name):
    """In the table that says where everything went, in the quick start's order and with its numbers.

    What is not about settings alone is a heading of the tutorial, too.
    """
    text = dict(pages())[name]
    bold = re.findall(r'^\| \*\*(.+?)\*\*', text, re.M)
    assert bold == list(HEADINGS[name])
    titles = [title.split(' · ')[0] for title in re.findall(r'^#+ (.+)$', text, re.M)]
    settings = ('数据目录配置', '模型保存加载及日志信息配置', '单机运行配置', '多机运行配置')
    wanted = [title for heading in HEADINGS[name] if (title := heading.split(' ', 1)[1]) not in settings]
    assert [title for title in titles if title in wanted] == wanted and all(
        word in text.split('## Every path')[0] for word in settings if name.startswith('2')
    )
