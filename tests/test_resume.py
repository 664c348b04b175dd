"""A checkpoint of any layout is taken up by any other with the same bits and the same samples, and goes on as
the run that made it; damage is found before use; a killed run ends as if it had lived.

`python tests/test_resume.py` prints every pair of layouts for both models. The kills are in kill_test.py, of
which this file runs a short version.
"""

import json
import os
import random
import re
import shutil
import signal
import struct
import sys
import time
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from unittest.mock import patch

import kill_test
import parity
import pytest
import torch
from safetensors.torch import load_file, save_file

from mmkit.config import Loop, Optim
from mmkit.converters.writing import SafetensorsWriter
from mmkit.core.device import place
from mmkit.core.files import STATE, check_manifest, load_json
from mmkit.core.values import override
from mmkit.datasets.conversation import Conversations
from mmkit.models.denoise import as_one
from mmkit.models.generate import whole_logits
from mmkit.parallel.attention import segments
from mmkit.parallel.fsdp import gathered
from mmkit.parallel.pipeline import forward_through_stages
from mmkit.trainer import loop
from mmkit.trainer.checkpoint import find_start, save
from mmkit.trainer.loop import fit
from mmkit.trainer.qwen2_5_vl import pack
from mmkit.trainer.task import open_task

TURNS = 'tp 2, pp 2, two turns'
LAYOUTS = {  # title: ranks, the layout
    'one rank': (1, []),
    'tp 2': (2, ['layout.tp=2', 'layout.sequence_parallel=true']),
    'pp 2': (2, ['layout.pp=2']),
    'cp 2': (2, ['layout.cp=2']),
    'dp 2, zero1': (2, ['layout.data_parallel=zero1', 'layout.overlap=true']),
    'dp 2, fsdp': (2, ['layout.data_parallel=fsdp', 'loop.micro_batch=2']),
    TURNS: (4, ['layout.tp=2', 'layout.pp=2', 'layout.vpp=2', 'layout.data_parallel=ddp']),
    'tp 2, dp 2, zero1': (4, ['layout.tp=2', 'layout.data_parallel=zero1']),
}
# of two ranks, each is taken up by itself and by the next; all pairs are in the table of the script
AFTER = dict(zip(list(LAYOUTS)[1:6], [*list(LAYOUTS)[2:6], list(LAYOUTS)[1]]))
MIXED = ['one rank', 'dp 2, zero1', 'dp 2, fsdp']  # layouts of the videos whose formats mix
SAVED, STEPS = 2, 3  # the step of the checkpoints, and the one after it
MODELS = ('text', 'video', 'video in float32')
# how far the next step may be from that of the run that went on
NUMBERS = dict(lr=0, tokens=0, loss=1e-6, grad_norm=1e-5)
ROUGH = dict(lr=0, tokens=0, loss=1e-2, grad_norm=1e-1)  # in bfloat16


def config_of(folder, model, title, *words):
    """Conversations in float32 with a frozen part and tied weights.

    Videos in bfloat16, where formats mix, with averaged weights; and in float32.
    """
    optim = Optim(lr=1e-3, warmup=1, clip=1.0)
    some = Loop(steps=STEPS, global_batch=4, save_every=SAVED, ema=0.9 * (model == 'video'))
    plain = (
        kill_test.text_config(folder, optim, some)
        if model == 'text'
        else kill_test.video_config(folder, optim, some, dtype='bfloat16' if model == 'video' else 'float32')
    )
    return override(plain, [*LAYOUTS[title][1], *words])


def place_of(folder, model, title):
    return folder / 'runs' / f'{model}: {title}'.replace(' ', '-')


def step_of(run, step=SAVED):
    return run / 'checkpoints' / f'step-{step:07d}'


def checkpoint_of(folder, model, title):
    return step_of(place_of(folder, model, title))


def tensors(folder):
    return {
        path.relative_to(folder).as_posix(): load_file(path)
        for path in sorted(folder.rglob('*.safetensors'))
        if path.parent.name in ('training', 'transformer', folder.name)
    }


def ranks(title):
    return LAYOUTS[title][0]


def counted(folder):
    return {
        name: value for name, value in load_json(folder / STATE).items() if name not in ('layout', 'ranks')
    }


def miscounted(mine, theirs):
    "What of two checkpoints' state.json is not the same, but for the layout."
    mine, theirs = counted(mine), counted(theirs)
    return [
        f'{name} {mine.get(name)} and {theirs.get(name)}'
        for name in sorted(mine.keys() | theirs.keys())
        if mine.get(name) != theirs.get(name)
    ]


def differing(mine, theirs):
    "Names of tensors in which two checkpoints do not have the same bits, and of counts."
    counts, mine, theirs = miscounted(mine, theirs), tensors(mine), tensors(theirs)

    def bits(x):
        return x.contiguous().view(torch.int16 if x.element_size() == 2 else torch.int32)

    return (
        counts
        + [str(mine.keys() ^ theirs.keys())] * (mine.keys() != theirs.keys())
        + [
            f'{file} {name}'
            for file in mine.keys() & theirs.keys()
            for name in mine[file].keys() | theirs[file].keys()
            if name not in mine[file]
            or name not in theirs[file]
            or not torch.equal(bits(mine[file][name]), bits(theirs[file][name]))
        ]
    )


def wanted(folder, model, source, title):
    """Whether a pair is tried; with a file `all` in the folder, every one.

    Checkpoints of four ranks are made last, so that no two ranks take them up; the videos' model has too few
    layers for two turns.
    """
    if (ranks(source) == 4 and ranks(title) == 2) or (model != 'text' and TURNS in (source, title)):
        return False
    if (folder / 'all').exists():
        return True
    if 4 in (ranks(source), ranks(title)):
        return model == 'text' and (source == title or 'one rank' in (source, title))
    if model == 'text':
        return 'one rank' in (source, title) or title in (source, AFTER[source])
    return (
        source == 'one rank'
        if model == 'video in float32'
        else 'one rank' in (source, title) and {source, title} <= set(MIXED)
    )


def pairs(folder, world):
    return [
        (model, source, title)
        for model in MODELS
        for title in LAYOUTS
        if ranks(title) == world
        for source in LAYOUTS
        if wanted(folder, model, source, title)
    ]


def sources(folder, model):
    return [source for source in LAYOUTS if any(wanted(folder, model, source, title) for title in LAYOUTS)]


# A run, and others that go on from its checkpoint


def text_answer(training, config, task, mesh):
    "The logits of the model in training for two conversations with pictures."
    asked = Conversations(config.data, task.like.path, task.places)
    batch = pack([asked[0], asked[1]], mesh.tp.size, 0)
    within = segments(batch['lengths'].tolist(), causal=True, device=mesh.at)

    def run(chunk, x):
        x = chunk.hidden(batch, x, [within] * len(chunk.stage.layers['text']))
        return whole_logits(chunk, x, mesh) if chunk.stage.last else x

    return forward_through_stages(training.model, mesh, run)


def video_inputs():
    "Noisy clips, times and texts."
    draw = torch.Generator().manual_seed(0)
    return (
        torch.randn(2, 16, 3, 6, 6, generator=draw),
        torch.tensor([700.0, 150.0]),
        torch.randn(2, 24, 64, generator=draw),
    )


def video_answer(training, config, task, mesh):
    "What the model in training says of them."
    return as_one(training.model, mesh)(*video_inputs()).float()


def trained(folder, model, title):
    "A run to its end, which answers when it has made the step that it saves."
    run = place_of(folder, model, title)

    def after_step(record, config, task, mesh, training, *more):
        due = loop_after_step(record, config, task, mesh, training, *more)
        if record.step == SAVED:
            with torch.no_grad(), training.average.used(), gathered(*training.model):
                found = (text_answer if model == 'text' else video_answer)(training, config, task, mesh)
            if mesh.first:
                save_file({'answer': found.contiguous()}, run / 'answer.safetensors')
        return due

    loop_after_step = loop.after_step
    with patch.object(loop, 'after_step', after_step):
        fit(config_of(folder, model, title), run)


def taken_up(folder, model, source, title):
    """What one layout makes of one checkpoint: what differs when it is saved again at once, what differs
    after the next step, and the numbers of that step.
    """
    start = checkpoint_of(folder, model, source)
    room = folder / 'again' / f'{model}: {source} to {title}'.replace(' ', '-')
    begun = []

    def begin(*given):
        begun.append(loop_begin(*given))
        return begun[-1]

    def train_step(step, wrapped, optimizer, schedule, task, mesh, batches):
        save(begun[0][0], task, mesh, config, room / 'at once', step - 1)
        return loop_train_step(step, wrapped, optimizer, schedule, task, mesh, batches)

    loop_begin = loop.begin
    loop_train_step = loop.train_step
    config = config_of(folder, model, title, f'resume={start}')
    with patch.multiple(loop, begin=begin, train_step=train_step):
        (record,) = fit(config, room)
    if place().rank:
        return None
    # another layout adds in another order
    compare = differing if source == title else miscounted
    after = compare(step_of(room, STEPS), step_of(place_of(folder, model, source), STEPS))
    found = (
        differing(step_of(room / 'at once'), start) + [f'after the next step {one}' for one in after],
        {name: getattr(record, name) for name in NUMBERS},
    )
    shutil.rmtree(room)
    return found


def made(folder):
    "All checkpoints of this world, and what its layouts make of those that are there."
    world, folder = place().world, Path(folder)
    for model in MODELS:
        for title in sources(folder, model):
            if ranks(title) == world:
                trained(folder, model, title)
    return taken(folder) if world > 1 else {}


def taken(folder):
    return {
        f'{model}: {source} -> {title}': taken_up(folder, model, source, title)
        for model, source, title in pairs(folder, place().world)
    }


def prepare(folder):
    "Models, data, and the checkpoints of one rank."
    kill_test.write_text(folder)
    kill_test.write_video(folder)
    made(folder)


def matrix(folder):
    "What each layout makes of each checkpoint; one launch for two ranks and one for four."
    return (
        parity.on_ranks('test_resume', 'made', folder, 2, 2000)
        | parity.on_ranks('test_resume', 'made', folder, 4, 2000)
        | taken(folder)
    )


@pytest.fixture(scope='module')
def house(tmp_path_factory):
    folder = tmp_path_factory.mktemp('resume')
    prepare(folder)
    return folder


@pytest.fixture(scope='module')
def found(house):
    return matrix(house)


def apart(mine, theirs):
    return abs(mine - theirs) / abs(theirs) if theirs else abs(mine)


def judged(folder, found):
    """The table of what was found, and what is wrong with it: bits, counts, and the next step, which the run
    that made the checkpoint made as well.
    """
    rows, wrong = [], []
    for title, (bad, numbers) in found.items():
        model, source, _ = re.split(': | -> ', title)
        went_on = [
            json.loads(line)
            for line in (place_of(folder, model, source) / 'metrics.jsonl').read_text().splitlines()
        ][SAVED]
        far = {name: apart(x, went_on[name]) for name, x in numbers.items()}
        limits = ROUGH if model == 'video' else NUMBERS
        wrong += [f'{title}: {one}' for one in bad[:3]] + [
            f'{title}: {name} {numbers[name]}, and {went_on[name]} without a new start'
            for name in far
            if not far[name] <= limits[name]
        ]
        rows.append([title, len(bad), far['loss'], far['grad_norm']])
    return (
        parity.table(['checkpoint -> layout', 'what differs', 'loss of the next step', 'its gradient'], rows),
        wrong,
    )


def test_every_layout_takes_up_every_checkpoint(house, found, record_property):
    text, wrong = judged(house, found)
    record_property('table', text)
    assert not wrong and len(found) == 21 + 6 + 5 + 6, '\n'.join(wrong)


def test_a_checkpoint_opens_in_transformers_and_diffusers_and_answers_as_the_model_did_in_training(
    house, found
):
    from diffusers import WanTransformer3DModel
    from test_reference import hf_inputs
    from transformers import Qwen2_5_VLForConditionalGeneration

    task = open_task(config := config_of(house, 'text', 'one rank'))
    asked = Conversations(config.data, task.like.path, task.places)
    for model in MODELS:
        for title in sources(house, model):
            folder = checkpoint_of(house, model, title)
            answer = load_file(place_of(house, model, title) / 'answer.safetensors')['answer']
            opened, report = (
                Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
                if model == 'text'
                else WanTransformer3DModel.from_pretrained(folder / 'transformer', output_loading_info=True)
            )
            assert not report['missing_keys'] and not report['unexpected_keys'], (model, title)
            with torch.no_grad():
                if model == 'text':
                    theirs = torch.cat(
                        [opened(**hf_inputs(opened, sample)).logits[0] for sample in (asked[0], asked[1])]
                    )
                else:
                    theirs = opened(*video_inputs(), return_dict=False)[0]
            assert len(answer) >= len(theirs) and parity.apart(answer[: len(theirs)], theirs) < (
                1e-2 if model == 'video' else 1e-5
            ), (model, title)


# Ends that nobody wished for


def test_a_run_saves_by_the_clock(house, tmp_path):
    "Every step takes 40 s by this clock: 60 s are over after the second, and again after the fourth."
    clock = [0.0]

    def train_step(*given):
        clock[0] += 40
        return loop_train_step(*given)

    loop_train_step = loop.train_step
    for minutes, steps in ((1, [2, 4, 5]), (0, [5])):
        with patch.multiple(loop, train_step=train_step, time=SimpleNamespace(monotonic=lambda: clock[0])):
            fit(
                config_of(
                    house,
                    'text',
                    'one rank',
                    f'loop.save_minutes={minutes}',
                    'loop.save_every=0',
                    'loop.steps=5',
                ),
                tmp_path / str(minutes),
            )
        assert [
            int(folder.name[5:]) for folder in sorted((tmp_path / str(minutes) / 'checkpoints').iterdir())
        ] == steps


@pytest.mark.parametrize('background', ['true', 'false'])
def test_a_checkpoint_that_has_no_room_is_refused_before_it_is_written(house, tmp_path, background):
    """The disk is full from the second checkpoint on.

    When there is room again, the run goes on from the first.
    """
    config = config_of(
        house, 'text', 'one rank', f'loop.save_in_background={background}', 'loop.save_every=1'
    )
    full = shutil.disk_usage('/')._replace(free=1000)

    class Writer(SafetensorsWriter):
        def __init__(self, path, *given):
            assert '0000001' in str(path), 'written without room'
            super().__init__(path, *given)

    def room(path):
        return usage(path) if not step_of(tmp_path, 1).exists() and not kill_test.partial(tmp_path) else full

    usage = shutil.disk_usage
    with (
        patch('shutil.disk_usage', room),
        patch('mmkit.trainer.weights.SafetensorsWriter', Writer),
        pytest.raises(ValueError) as caught,
    ):
        fit(config, tmp_path)
    said = str(caught.value)
    assert 'step-0000002' in said and 'free' in said and '\n' not in said, said
    assert [folder.name for folder in (tmp_path / 'checkpoints').iterdir()] == [
        'step-0000001'
    ] and check_manifest(step_of(tmp_path, 1))
    fit(config, tmp_path)
    assert not differing(step_of(tmp_path, STEPS), step_of(place_of(house, 'text', 'one rank'), STEPS))


def stopped_in_a_save(folder):
    """Rank 0 gets SIGTERM in a step while the checkpoint before it is on its way: (what was on its way, steps
    made, checkpoints, steps made after the new start, what differs at the end).
    """
    folder, on_its_way = Path(folder), []
    run, whole = folder / 'stopped', folder / 'never stopped'
    config = config_of(folder, 'text', 'dp 2, zero1', 'loop.save_in_background=true', 'loop.steps=6')

    def train_step(step, *given):
        if step == SAVED + 1 and place().rank == 0:
            on_its_way.extend(path.name[:13] for path in kill_test.partial(run))
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.5)  # until it is heard
        return loop_train_step(step, *given)

    def write(*given):
        time.sleep(0.05)
        return writer_write(*given)

    loop_train_step, writer_write = loop.train_step, SafetensorsWriter.write
    with patch.object(loop, 'train_step', train_step), patch.object(SafetensorsWriter, 'write', write):
        made = [record.step for record in fit(config, run)]
    kept = sorted(path.name for path in (run / 'checkpoints').iterdir())
    for name in kept:
        check_manifest(run / 'checkpoints' / name)
    more = [record.step for record in fit(config, run)]
    fit(config, whole)
    return (
        on_its_way,
        made,
        kept,
        more,
        differing(step_of(run, 6), step_of(whole, 6)) if place().rank == 0 else None,
    )


def test_a_save_is_finished_when_the_run_is_asked_to_stop(house):
    found = parity.on_ranks('test_resume', 'stopped_in_a_save', house, 2, 300)
    assert found == [['.step-0000002'], [1, 2, 3], ['step-0000002', 'step-0000003'], [4, 5, 6], []], found


# Damage


def rewrite(path, content):
    "Gives this name, and no other that the file may have, another content."
    path.unlink()
    path.write_bytes(content)


def flipped(place):
    "Flips one bit of the byte at a place, drawn where it is None."

    def flip(path, draw):
        content = bytearray(path.read_bytes())
        content[draw.randrange(len(content)) if place is None else place] ^= 1 << draw.randrange(8)
        rewrite(path, bytes(content))

    return flip


def cut(size):
    "Cuts a file to a size that is a function of what it has."
    return lambda path, draw: rewrite(path, path.read_bytes()[: size(path.stat().st_size)])


def delete(path, draw):
    path.unlink()


def header(path, draw):
    rewrite(path, struct.pack('<Q', 2**62) + path.read_bytes()[8:])


def stranger(path, draw):
    path.with_name('stranger.safetensors').write_bytes(path.read_bytes())


def astray(path, draw):
    "An index of which one tensor lies outside."
    tree = json.loads(path.read_text())
    tree['weight_map'][next(iter(tree['weight_map']))] = '../../x'
    rewrite(path, json.dumps(tree).encode())


def listing(change):
    "A manifest whose table of files is another."

    def write(path, draw):
        files = json.loads(path.read_text())['files']
        rewrite(path, (json.dumps({'files': change(files)}, indent=1) + '\n').encode())

    return write


def exchange(one, other):
    "Two files change places."

    def swap(folder):
        kept = (folder / one).read_bytes()
        rewrite(folder / one, (folder / other).read_bytes())
        rewrite(folder / other, kept)

    return swap


EVERY = {
    'a bit': flipped(None),
    'a bit of the first byte': flipped(0),
    'a bit of the last byte': flipped(-1),
    'all cut off': cut(lambda size: 0),
    'half cut off': cut(lambda size: size // 2),
    'the last byte cut off': cut(lambda size: size - 1),
    'gone': delete,
}
TENSORS = {'a header of 2^62 bytes': header, 'a stranger beside it': stranger}
MANIFEST = {
    'lists nothing': listing(lambda files: {}),
    'is null': listing(lambda files: None),
    'leads out': listing(lambda files: {'../../x': files[STATE]} | files),
    'knows nothing': listing(lambda files: files | {STATE: {}}),
    'lacks a shard': listing(
        lambda files: {
            name: one for name, one in files.items() if not name.endswith('00001-of-00002.safetensors')
        }
    ),
}


def damages(folder):
    """(what is done, the names in a checkpoint that a message may give, the function of the folder and a
    source of chance that does it), for every file of a checkpoint.
    """
    names = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob('*')) if path.is_file()]

    def on(name, do):
        return lambda copy, draw: do(copy / name, draw)

    cases = [(f'{name}: {what}', [name], on(name, do)) for name in names for what, do in EVERY.items()]
    shards = [name for name in names if name.endswith('.safetensors')]
    cases += [
        (
            f'{name}: {what}',
            [name if do is header else str(Path(name).with_name('stranger.safetensors'))],
            on(name, do),
        )
        for name in shards
        for what, do in TENSORS.items()
    ]
    cases += [
        (f'{name}: ../../x', [name], on(name, astray))
        for name in names
        if name.endswith('.safetensors.index.json')
    ]
    cases += [
        (f'manifest.json {what}', ['manifest.json', '../../x', *shards], on('manifest.json', do))
        for what, do in MANIFEST.items()
    ]
    pairs = [
        (one, one.replace(*change))
        for one in shards
        for change in (('exp_avg-', 'exp_avg_sq-'), ('00001-of', '00002-of'))
        if change[0] in one
    ]
    # some of one size, some not
    assert {(folder / one).stat().st_size == (folder / other).stat().st_size for one, other in pairs} == {
        True,
        False,
    }
    cases += [
        (
            f'{one} and {other} change places',
            [one, other],
            lambda copy, draw, swap=exchange(one, other): swap(copy),  # noqa: B008
        )
        for one, other in pairs
    ]
    # among them the model's
    assert sum('00001-of-00002' in one and 'training' not in one for one, _ in pairs) == 1
    return cases


def linked(source, target):
    "A copy in which every file is a second name of the same."
    return shutil.copytree(source, target, copy_function=os.link)


def own_run(house, model, folder):
    """A run folder with the two checkpoints of one rank, which share what checkpoints and base folder of a
    run share: (its config, the folder).
    """
    config = config_of(folder, model, 'one rank')
    source = place_of(house, model, 'one rank')
    run = folder / 'run'
    shutil.copytree(house / model, folder / model)
    for step in (SAVED, STEPS):
        shutil.copytree(step_of(source, step), step_of(run, step))
        for path in (path for path in step_of(run, step).rglob('*') if path.is_file()):
            name = path.relative_to(step_of(run, step))
            base = house / model / name
            if base.is_file() and base.samefile(step_of(source, step) / name):
                path.unlink()
                os.link(folder / model / name, path)
    return config, run


@pytest.mark.parametrize('model', MODELS[:2])
def test_damage_of_any_file_is_found_before_use_and_the_checkpoint_before_is_taken(house, tmp_path, model):
    config, run = own_run(house, model, tmp_path)
    newest, whole, draw = step_of(run, STEPS), tmp_path / 'whole', random.Random(0)
    newest.rename(whole)
    unnoticed = []
    cases = damages(whole)
    for what, names, do in cases:
        do(linked(whole, newest), draw)
        said = []
        try:
            found = find_start(config, run, said.append)
        except Exception as error:
            found, said = None, [f'{type(error).__name__}: {error}']
        damage = [
            words
            for words in said
            if any(str(newest / name) in words or (name == '../../x' and name in words) for name in names)
        ]
        # of a name or a sum: then the file that it no longer tells is named
        if what.startswith('manifest.json: a bit'):
            damage = [words for words in said if f'{newest}/' in words]
        if found != step_of(run) or len(damage) != 1 or any('\n' in words for words in said):
            unnoticed.append(f'{what}: {found}, {said}')
        shutil.rmtree(newest.with_name(f'aside-1-{newest.name}'), ignore_errors=True)
        shutil.rmtree(newest, ignore_errors=True)
        assert step_of(run).is_dir() and whole.is_dir()
    assert not unnoticed and len(cases) >= 130, f'{len(unnoticed)} of {len(cases)}:\n' + '\n'.join(
        unnoticed[:20]
    )


@pytest.mark.parametrize('model', MODELS[:2])
def test_a_fall_back_is_told_in_one_message_and_a_wished_step_in_the_same_words(house, tmp_path, model):
    config, run = own_run(house, model, tmp_path)
    bad, said = step_of(run, STEPS) / 'training' / 'optimizer-exp_avg-00002-of-00002.safetensors', []
    flipped(-1)(bad, random.Random(0))
    with pytest.raises(ValueError, match=str(bad)):
        find_start(replace(config, resume=STEPS), run, said.append)
    assert find_start(config, run, said.append) == step_of(run) and len(said) == 1 and str(bad) in said[0], (
        said
    )


def test_damage_of_a_file_that_all_checkpoints_share_is_told_as_such(house, tmp_path):
    """A video's codec and text encoder lie once on the disk, under a name in the base folder and one in each
    checkpoint.
    """
    config, run = own_run(house, 'video', tmp_path)
    for name in ('vae/diffusion_pytorch_model.safetensors', 'text_encoder/model.safetensors'):
        shared = step_of(run) / name
        assert shared.samefile(step_of(run, STEPS) / name) and shared.samefile(tmp_path / 'video' / name)
        before = shared.read_bytes()
        # in place, as a failing disk does
        shared.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
        with pytest.raises(ValueError) as caught:
            find_start(config, run, lambda words: None)
        said = str(caught.value)
        assert name in said and 'share' in said and config.weights in said and '\n' not in said, said
        shared.write_bytes(before)
        assert find_start(config, run) == step_of(run, STEPS)


# Kills


@pytest.mark.parametrize('model, kills', [('text', 2), ('video', 1)])
def test_a_killed_run_ends_as_one_that_was_not(house, tmp_path, model, kills):
    "One kill during a save each, and one outside."
    for name in ('data', 'text', 'video', 'features'):
        (tmp_path / name).symlink_to(house / name)
    hits, problems = kill_test.killed(tmp_path, model, kills, saves=1, steps=6)
    assert not problems and hits, (hits, problems[:5])


if __name__ == '__main__':
    with TemporaryDirectory(prefix='resume-') as folder:
        (Path(folder) / 'all').touch()
        prepare(Path(folder))
        text, wrong = judged(Path(folder), matrix(Path(folder)))
        print(text, *wrong, sep='\n')
        sys.exit(bool(wrong))
