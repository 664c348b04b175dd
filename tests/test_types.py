"""What a type checker and an editor know of mmkit: every name it hands out, with its type.

A script that uses them all passes, and its mistakes are found before it runs.
"""

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import mmkit

ROOT = Path(__file__).resolve().parent.parent
# checked inside, too
CHECKED = (
    'config',
    'core/values',
    'notebook/forms',
    'launcher/estimate',
    'diagnostics/doctor',
    'launcher/hosts',
    'core/ranks',
    'core/files',
    'core/plots',
    'launcher/run',
    'launcher/resume',
    'notebook/show',
    'datasets/statistics',
    'datasets/conversation',
    'recipes/presets',
    'trainer/chat',
    'launcher/folder',
    'launcher/view',
)
SETTINGS = """[mypy]
ignore_missing_imports = True
follow_imports = silent
[mypy-torch.*,transformers.*,diffusers.*,megatron.*,decord.*,av.*]
follow_imports = skip
"""
SCRIPT = """
import json
from pathlib import Path
import mmkit
from mmkit.config import Config
from mmkit.converters.weights import Tower
from mmkit.datasets.conversation import Conversations
from mmkit.datasets.features import Extraction
from mmkit.datasets.llava import Report
from mmkit.datasets.statistics import DataStatistics
from mmkit.launcher.estimate import Estimate
from mmkit.launcher.hosts import Lines
from mmkit.launcher.run import Run

def train(data: Conversations) -> str:
    config = mmkit.Config(weights='w', data=mmkit.Data(files=('a.json',), columns=mmkit.Columns(user='human')), layout=mmkit.Layout(tp=2, cp_kind='ring'),
                          optim=mmkit.Optim(lr=1e-5, betas=(0.9, 0.95)), loop=mmkit.Loop(steps=2), freeze=('vision',))
    config = mmkit.override(config, ['loop.steps=3'])
    video = mmkit.Config(task='wan2_1', weights='w', video=mmkit.VideoData(source='s', clips=mmkit.Clips(num_frames=9), flow=mmkit.Flow(draw='uniform', weighted=False), sampling=mmkit.Sampling(steps=5)))
    loaded: Config = mmkit.load_config(Path('config.json'))
    edited: Config = mmkit.form(config, ranks=2).config
    clips: mmkit.Clips = mmkit.form(mmkit.Clips()).config
    preset: Config = mmkit.PRESETS['toy']('w', mmkit.Data())
    looked: DataStatistics = mmkit.data_statistics(data, 20)
    run: Run = mmkit.launch(edited, 2, folder='runs/one')
    run = mmkit.resume(mmkit.Run('runs/one'), 2, ['loop.steps=9'], restarts=1)
    mmkit.watch(run)
    lines: Lines = mmkit.launch_on(edited, ['node1', 'node2'], ranks=8, interface='eth0')
    hosts = mmkit.Hosts(names=('node1',), ranks=8)
    mmkit.watch(mmkit.prepare_run(edited, hosts, 'runs/two'))
    print(lines, mmkit.shell_script(hosts, 'runs/two'), mmkit.slurm_script(lines.hosts, lines.run.folder))
    print(mmkit.runs('runs'), mmkit.watch_async(run))
    cost: Estimate = mmkit.estimate(video, 8, speed=mmkit.speed_of(run))
    hours = (cost.seconds or 0.0) / 3600 + config.loop.steps + loaded.layout.tp + clips.num_frames + preset.seed + looked.count
    pictures = [mmkit.plot_losses([run]), mmkit.compare({'one': run}), mmkit.show_samples(run)]
    return f'{run.status}: {hours:.1f} h, {len(pictures)} pictures'

def convert() -> Report:
    shape = json.loads(Path('w/config.json').read_text())
    towers: tuple[Tower, ...] = mmkit.qwen2_5_vl_towers(shape, [[8]], [[9]])
    mmkit.hf_to_mm('w', 'mm', towers, tp=2)
    mmkit.mm_to_hf('mm', 'w', 'back', towers, tp=2)
    print(mmkit.wan2_1_towers(shape), mmkit.convert_wan('hf_to_mm', 'w', 'mm'), mmkit.from_mindspeed_mm('example').config)
    return mmkit.llava_to_mllm('in.json', 'out.json', 'pictures')

def look(folder: str) -> str:
    config = mmkit.load_config(folder)
    planned = mmkit.plan(config, 8)
    talks: Conversations = mmkit.Conversations(mmkit.Data(files=('a.json',)), 'w', positions=lambda ids, grid, duration: ids)
    clips = mmkit.Features('features')
    task = mmkit.open_task(config)
    scores = mmkit.first_run('runs/first-run', 2)
    return f'{planned} {len(talks)} {len(clips)} {task} {scores} {mmkit.doctor().good}'

def ask() -> Extraction:
    print(mmkit.chat('w', 'What is this?', images=['a.jpg']).text, [clip.fps for clip in mmkit.generate('w', ['a dog'])])
    with mmkit.open_chat('w') as talk: talk.ask('Why?')
    with mmkit.open_pipeline('w') as pipeline: pipeline.generate(['a dog'])
    return mmkit.extract('videos', 'w', 'features', mmkit.Clips(num_frames=9), ranks=2)
"""  # noqa: E501
MISTAKES = {  # a line of a script: what is said of it
    "mmkit.Config(wieghts='w')": 'Unexpected keyword argument "wieghts"',
    "mmkit.Loop(loss_reduction='words')": 'incompatible type "Literal[\'words\']"',
    "mmkit.Layout(data_parallel='zero9')": "Literal['zero9']",
    "mmkit.Layout(tp='2')": 'incompatible type "str"; expected "int"',
    "mmkit.Confg(weights='w')": 'Module has no attribute "Confg"',
    'mmkit.override(mmkit.Layout(), []).tpp': '"Layout" has no attribute "tpp"',
    'mmkit.form(mmkit.Clips()).config.tp': '"Clips" has no attribute "tp"',
    "mmkit.launch(mmkit.Config(weights='w'), ranks='two')": 'incompatible type "str"; expected "int | None"',
    "mmkit.Run('runs/one').recods()": '"Run" has no attribute "recods"',
    "mmkit.Run('runs/one').status + 1": 'Unsupported operand types for + ("str" and "int")',
    "mmkit.compare([]).safefig('x.png')": '"Figure" has no attribute "safefig"',
    "mmkit.launch_on(mmkit.Config(weights='w'), ['node1'], 8).lines": '"Lines" has no attribute "lines"',
    "mmkit.estimate(mmkit.Config(weights='w')).seconds + 1": (
        'Unsupported operand types for + ("None" and "int")'
    ),
}


@pytest.fixture(scope='module')
def said(tmp_path_factory):
    """What the checker says of each file: of a script, of its mistakes, of a list of all names, and of
    modules.
    """
    folder = tmp_path_factory.mktemp('types')
    (folder / 'mypy.ini').write_text(SETTINGS)
    (folder / 'script.py').write_text(SCRIPT)
    (folder / 'mistakes.py').write_text('import mmkit\n' + '\n'.join(MISTAKES))
    (folder / 'names.py').write_text(
        'import mmkit\n' + '\n'.join(f'reveal_type(mmkit.{name})' for name in mmkit.NAMES)
    )
    files = [
        *(str(folder / f'{name}.py') for name in ('script', 'mistakes', 'names')),
        'mmkit/__init__.py',
        *(f'mmkit/{name}.py' for name in CHECKED),
    ]
    command = [
        sys.executable,
        '-m',
        'mypy',
        '--config-file',
        str(folder / 'mypy.ini'),
        '--cache-dir',
        str(folder / 'cache'),
        '--no-error-summary',
        '--check-untyped-defs',
        *files,
    ]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert ran.returncode in (0, 1), ran.stdout + ran.stderr
    return lambda name: [line for line in ran.stdout.splitlines() if re.match(rf'(.*/)?{name}\.py:', line)]


def blocks():
    "The two halves of what mmkit hands out: NAMES, and what the checker is told, name to module."
    tree = ast.parse((ROOT / 'mmkit' / '__init__.py').read_text())
    branch = next(
        node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == 'TYPE_CHECKING'
    )
    told = {
        alias.asname: f'mmkit.{node.module}'
        for node in branch.body
        for alias in node.names
        if alias.name == alias.asname
    }
    return dict(mmkit.NAMES), told


def test_checkers_are_told_of_exactly_the_names_that_are_handed_out():
    names, told = blocks()
    assert told == names
    for name, module in names.items():
        assert name in importlib.import_module(module).__all__, f'{module} does not export {name}'


def test_a_script_that_uses_every_name_passes(said):
    assert set(re.findall(r'\bmmkit\.([A-Za-z]\w*)', re.sub(r'(?m)^from.*', '', SCRIPT))) == set(
        mmkit.NAMES
    ), 'the script does not use every name'
    assert said('script') == []


@pytest.mark.parametrize('line', MISTAKES)
def test_a_mistake_is_found_before_the_script_runs(said, line):
    number = list(MISTAKES).index(line) + 2
    found = [text for text in said('mistakes') if f'mistakes.py:{number}: error' in text]
    assert found and MISTAKES[line] in ' '.join(found), found


def test_the_type_of_every_name_is_known(said):
    assert len(said('names')) == len(mmkit.NAMES)
    for name, text in zip(mmkit.NAMES, said('names')):
        assert 'Revealed type is' in text and not text.endswith(('"Any"', '-> Any"')), f'{name}: {text}'


@pytest.mark.parametrize('module', ['__init__', *CHECKED])
def test_a_module_is_right_inside(said, module):
    assert said(f'mmkit/{module}') == []


def test_the_types_are_installed_with_the_library():
    assert (ROOT / 'mmkit' / 'py.typed').is_file() and "package_data={'mmkit': ['py.typed']}" in (
        ROOT / 'setup.py'
    ).read_text()
