"""A checkpoint of any layout is taken up by any other with the same bits and the same samples; damage is found before use; a killed run ends as if it had lived.

The kills are in kill_test.py, of which this file runs a short version."""
import json, random, shutil
from itertools import islice
from pathlib import Path

import pytest, torch
from safetensors.torch import load_file

import kill_test, parity
from mmkit.config import Config, Data, Film, Loop, Optim
from mmkit.datasets.order import SizeOrder, ordered_batches
from mmkit.device import pick_device, place
from mmkit.files import load_json
from mmkit.parallel.mesh import open_mesh
from mmkit.toy import conversation_texts, emoji_names, llava_toy, tiny_qwen2_5_vl
from mmkit.trainer.checkpoint import compare_ledger, find_start, latest, save
from mmkit.trainer.loop import begin, fit
from mmkit.trainer.step import train_step
from mmkit.trainer.task import TASKS
from mmkit.values import mistake, override

LAYOUTS = {                                     # title: ranks, the layout
    'one rank': (1, []),
    'tp 2': (2, ['layout.tp=2', 'layout.sequence_parallel=true']),
    'pp 2': (2, ['layout.pp=2']),
    'cp 2': (2, ['layout.cp=2']),
    'dp 2, zero1': (2, ['layout.data=zero1', 'layout.overlap=true']),
    'dp 2, fsdp': (2, ['layout.data=fsdp', 'loop.micro_batch=2']),
    'tp 2, pp 2, two turns': (4, ['layout.tp=2', 'layout.pp=2', 'layout.vpp=2', 'layout.data=ddp']),
    'tp 2, dp 2, zero1': (4, ['layout.tp=2', 'layout.data=zero1']),
}
SAVED = 2                                       # the step of the checkpoints
MODELS = ('text', 'film')

def config_of(folder, model, title):
    "Conversations in float32 with a frozen part and tied weights; films in bfloat16, where formats mix, with averaged weights."
    optim = Optim(lr=1e-3, warmup=1, clip=1.0)
    if model == 'text':
        plain = Config(weights=str(folder / 'text'), data=Data(files=(str(folder / 'data/llava_instruct_150k.json'),), media_dir=str(folder / 'data/COCO2017/train2017'), workers=0), freeze=('merger',), optim=optim, device='cpu',
            loop=Loop(steps=4, global_batch=4, save_every=SAVED))
    else: plain = kill_test.film_config(folder, optim, Loop(steps=4, global_batch=4, save_every=SAVED, average=0.9), dtype='bfloat16')
    return override(plain, LAYOUTS[title][1])

def place_of(folder, model, title): return folder / 'runs' / f'{model}: {title}'.replace(' ', '-')
def checkpoint_of(folder, model, title): return place_of(folder, model, title) / 'checkpoints' / f'step-{SAVED:07d}'
def titles(): return [title for title, (ranks, _) in LAYOUTS.items() if ranks == place().world]
def tensors(folder): return {path.relative_to(folder).as_posix(): load_file(path) for path in sorted(folder.rglob('*.safetensors')) if path.parent.name in ('training', 'transformer', folder.name)}

def differing(mine, theirs):
    "Names of tensors in which two checkpoints do not have the same bits."
    mine, theirs = tensors(mine), tensors(theirs)
    bits = lambda x: x.contiguous().view(torch.int16 if x.element_size() == 2 else torch.int32)
    return [str(mine.keys() ^ theirs.keys())] * (mine.keys() != theirs.keys()) + [f'{file} {name}' for file in mine.keys() & theirs.keys() for name in mine[file].keys() | theirs[file].keys()
        if name not in mine[file] or name not in theirs[file] or not torch.equal(bits(mine[file][name]), bits(theirs[file][name]))]

def write(folder):
    "Makes the checkpoints of every layout of this world."
    for model in MODELS:
        for title in titles(): fit(config_of(Path(folder), model, title), place_of(Path(folder), model, title))

def take(folder):
    "What every layout of this world makes of every checkpoint that is there: tensors that differ when it is saved again at once, the loss of the next step, its numbers of samples."
    folder, found = Path(folder), {}
    for model in MODELS:
        for title in titles():
            for source in (source for source in LAYOUTS if checkpoint_of(folder, model, source).is_dir()):
                if model == 'film' and 'one rank' not in (title, source) and title != source: continue
                found[f'{model}: {source} -> {title}'] = taken_up(folder, model, source, title)
    return found

def taken_up(folder, model, source, title):
    "(differing tensors, loss) of one checkpoint under one layout."
    start, room = checkpoint_of(folder, model, source), folder / 'again' / f'{model}: {source} to {title}'.replace(' ', '-')
    config = override(config_of(folder, model, title), [f'resume={start}', f'seed={42}'])
    with open_mesh(config.layout, pick_device('cpu'), config.seed) as mesh:
        task = TASKS[config.task](config)
        training, state = begin(config, task, mesh, room)
        batches = next(steps := task.batches(mesh, state['step']))
        compare_ledger(state, task, config)
        again = save(training, task, mesh, config, room, state['step'])
        record = train_step(state['step'] + 1, training.wrapped, training.optimizer, training.schedule, task, mesh, batches)
        steps.close()
        bad = differing(again, start) if mesh.first else []
        if mesh.first: shutil.rmtree(room)
    return bad, record.loss, record.lr, {name: state[name] == load_json(start / 'state.json')[name] for name in ('step', 'samples', 'adam_steps')}

@pytest.fixture(scope='module')
def house(tmp_path_factory):
    "Checkpoints of all layouts on one and two ranks, and what each made of the others'; four ranks take up all of them."
    folder = tmp_path_factory.mktemp('resume')
    _, file = llava_toy(folder / 'data', emoji_names(4), count=10, size=56)
    tiny_qwen2_5_vl(folder / 'text', conversation_texts(file), hidden=128, layers=2, random_all=True)
    kill_test.write_film(folder)
    write(folder)
    parity.on_ranks('test_resume', 'write', folder, 2, 300)
    found = take(folder) | parity.on_ranks('test_resume', 'take', folder, 2, 500) | parity.on_ranks('test_resume', 'take', folder, 4, 500)
    return folder, found

def test_every_layout_takes_up_every_checkpoint(house, capsys):
    folder, found = house
    records = {model: [json.loads(line) for line in (place_of(folder, model, 'one rank') / 'metrics.jsonl').read_text().splitlines()] for model in MODELS}
    rows = []
    for title, (bad, loss, rate, same) in found.items():
        model, pair = title.split(': ', 1)
        like = found[f'{model}: {pair.split(" -> ")[0]} -> one rank'][1]
        rows.append([title, len(bad), abs(loss - like) / like])
        assert not bad and all(same.values()) and rate == records[model][SAVED]['lr'], (title, bad[:3], same)
    text = parity.table(['checkpoint -> layout', 'tensors that differ', 'loss of the next step'], rows)
    with capsys.disabled(): print(f'\n\n{text}\n')
    assert len(rows) == 6 * 8 + 11 + 2 and all(row[2] <= (1e-6 if row[0].startswith('text') else 2e-2) for row in rows), text
