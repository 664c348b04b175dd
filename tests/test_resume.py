"""A checkpoint of any layout is taken up by any other with the same bits and the same samples; damage is found before use; a killed run ends as if it had lived.

The kills are in kill_test.py, of which this file runs a short version."""
import json, random, shutil, struct, sys
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest, torch
from safetensors.torch import load_file

import kill_test, parity
from mmkit.config import Loop, Optim
from mmkit.device import pick_device, place
from mmkit.files import load_json, write_manifest
from mmkit.models.generate import whole_logits
from mmkit.models.qwen2_5_vl import row_attention
from mmkit.parallel.mesh import open_mesh
from mmkit.trainer.checkpoint import compare_ledger, find_start, save
from mmkit.trainer.loop import begin, fit
from mmkit.trainer.step import train_step
from mmkit.trainer.task import open_task
from mmkit.values import override

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
CHAIN = ['tp 2', 'pp 2', 'dp 2, zero1', 'dp 2, fsdp']           # what is taken up from one rank and by one rank anyway, each also by the next
FILMS = ['one rank', 'dp 2, zero1', 'dp 2, fsdp']
SAVED = 2                                       # the step of the checkpoints
MODELS = ('text', 'film', 'film in float32')

def config_of(folder, model, title):
    "Conversations in float32 with a frozen part and tied weights; films in bfloat16, where formats mix, with averaged weights; and in float32."
    optim, loop = Optim(lr=1e-3, warmup=1, clip=1.0), Loop(steps=3, global_batch=4, save_every=SAVED, average=0.9 * (model == 'film'))
    plain = kill_test.text_config(folder, optim, loop) if model == 'text' else kill_test.film_config(folder, optim, loop, dtype='bfloat16' if model == 'film' else 'float32')
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

def sources(folder, model): return [title for title, (ranks, _) in LAYOUTS.items() if ranks < 4 and (model == 'text' or title in FILMS or (folder / 'all').exists())]

def wanted(folder, model, source, title):
    "Whether a pair is tried; with a file `all` in the folder all are."
    if (folder / 'all').exists(): return True
    return (model == 'text' or title in FILMS) and ('one rank' in (source, title) or model == 'text' and (source, title) in zip(CHAIN, CHAIN[1:]))

def write(folder):
    "Makes the checkpoints of every layout of this world."
    for model in MODELS:
        for title in (title for title in titles() if title in sources(Path(folder), model)): fit(config_of(Path(folder), model, title), place_of(Path(folder), model, title))

def take(folder):
    "What every layout of this world makes of the checkpoints: tensors that differ when it is saved again at once, loss and rate of the next step, whether the numbers are the same."
    folder = Path(folder)
    return {f'{model}: {source} -> {title}': taken_up(folder, model, source, title) for model in MODELS for title in titles() for source in sources(folder, model) if wanted(folder, model, source, title)}

def taken_up(folder, model, source, title):
    "What one layout makes of one checkpoint."
    start, room = checkpoint_of(folder, model, source), folder / 'again' / f'{model}: {source} to {title}'.replace(' ', '-')
    config = override(config_of(folder, model, title), [f'resume={start}'])
    with open_mesh(config.layout, pick_device('cpu'), config.seed) as mesh:
        task = open_task(config)
        training, state = begin(config, task, mesh, room)
        batches = next(steps := task.batches(mesh, state['step']))
        compare_ledger(state, task, config)
        again = save(training, task, mesh, config, room, state['step'])
        record = train_step(state['step'] + 1, training.wrapped, training.optimizer, training.schedule, task, mesh, batches)
        steps.close()
        bad = differing(again, start) if mesh.first else []
        if mesh.first: shutil.rmtree(room)
    return bad, record.loss, record.lr, {name: state[name] == load_json(start / 'state.json')[name] for name in ('step', 'samples', 'adam_steps')}

def prepare(folder):
    "Models, data, and the checkpoints of all layouts on one and two ranks."
    kill_test.write_text(folder)
    kill_test.write_film(folder)
    write(folder)
    parity.on_ranks('test_resume', 'write', folder, 2, 400)

def matrix(folder):
    "What each layout makes of each checkpoint, four ranks too."
    return take(folder) | parity.on_ranks('test_resume', 'take', folder, 2, 1000) | parity.on_ranks('test_resume', 'take', folder, 4, 1000)

@pytest.fixture(scope='module')
def house(tmp_path_factory):
    folder = tmp_path_factory.mktemp('resume')
    prepare(folder)
    return folder

def judged(folder, found):
    "The table of what was found, and whether it is good: the same bits and numbers everywhere, and the next step's loss that of one rank, in bfloat16 as far as that carries."
    records = {model: [json.loads(line) for line in (place_of(folder, model, 'one rank') / 'metrics.jsonl').read_text().splitlines()] for model in MODELS}
    rows, good = [], True
    for title, (bad, loss, rate, same) in found.items():
        model, (source, _) = title.split(': ', 1)[0], title.split(': ', 1)[1].split(' -> ')
        like = found[f'{model}: {source} -> one rank'][1]
        rows.append([title, len(bad), abs(loss - like) / like])
        good = good and not bad and all(same.values()) and rate == records[model][SAVED]['lr'] and rows[-1][2] <= (1e-2 if model == 'film' else 1e-6)
    return parity.table(['checkpoint -> layout', 'tensors that differ', 'loss of the next step'], rows), good

def test_every_layout_takes_up_every_checkpoint(house, record_property):
    found = matrix(house)
    text, good = judged(house, found)
    record_property('table', text)
    assert good and len(found) == 16 + 5 + 5, text

def answers_of(model, mesh, ids):
    "Logits (s v) of our text tower for token ids (s)."
    tower, places, attends = model.text_decoder, torch.arange(len(ids)).expand(3, -1), [row_attention([len(ids)], True, mesh)] * len(model.stage.layers['text'])
    return whole_logits(model, tower(tower.embed(ids), places, attends), mesh)

def live(folder, name, title, answer):
    "What the model in training answers, as it begins from a checkpoint of one layout: `answer(model, mesh, task)`."
    config = override(config_of(folder, name, 'one rank'), [f'resume={checkpoint_of(folder, name, title)}'])
    with open_mesh(config.layout, pick_device('cpu'), config.seed) as mesh:
        task = open_task(config)
        training, _ = begin(config, task, mesh, folder / 'live')
        with torch.no_grad(): return answer(training.model[0], mesh, task)

def velocity(model, mesh, task):
    "(noisy clips, times, text, what our model says) of the first micro-batch."
    batch = next(task.batches(mesh))[0]
    given = batch['noisy'], batch['time'], batch['text']
    return *given, model(*given)

def test_a_checkpoint_opens_in_transformers_and_diffusers_and_answers_as_the_live_model(house):
    from diffusers import WanTransformer3DModel
    from transformers import Qwen2_5_VLForConditionalGeneration
    ids = torch.arange(12) + 20
    for title in sources(house, 'text'):
        model, report = Qwen2_5_VLForConditionalGeneration.from_pretrained(checkpoint_of(house, 'text', title), output_loading_info=True)
        theirs = model(input_ids=ids[None]).logits[0].detach()
        mine = live(house, 'text', title, lambda model, mesh, task: answers_of(model, mesh, ids))
        assert not report['missing_keys'] and not report['unexpected_keys'] and parity.apart(mine.reshape(theirs.shape), theirs) < 1e-5, title
    for name in ('film', 'film in float32'):
        for title in sources(house, name):
            model, report = WanTransformer3DModel.from_pretrained(checkpoint_of(house, name, title) / 'transformer', output_loading_info=True)
            assert not report['missing_keys'] and not report['unexpected_keys'], (name, title)
            if name == 'film': continue             # its weights are averages
            *given, mine = live(house, name, title, velocity)
            assert parity.apart(mine, model(*given, return_dict=False)[0].detach()) < 1e-5, title

# Damage

def flip(path, draw):
    content = bytearray(path.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)

def truncate(path, draw): path.write_bytes(path.read_bytes()[:draw.randrange(path.stat().st_size)])

def delete(path, draw): path.unlink()

def swap(path, draw):
    "A file has the content of another one."
    path.write_bytes(draw.choice([other for other in path.parents[1].rglob('*') if other.is_file() and other.read_bytes() != path.read_bytes()]).read_bytes())

def header(path, draw): path.write_bytes(struct.pack('<Q', 2**62) + path.read_bytes()[8:])

def strange(path, draw): path.with_name('stranger.safetensors').write_bytes(path.read_bytes())

def edited(path, draw):
    "A table of files that leads out of the folder, or an empty one."
    tree = json.loads(path.read_text())
    if path.name == 'manifest.json': tree = {'files': draw.choice([{}, {'../../x': next(iter(tree['files'].values()))} | tree['files'], None, {'state.json': {}}])}
    else: tree['weight_map'][next(iter(tree['weight_map']))] = '../../x'
    path.write_text(json.dumps(tree))

ANY, SAFETENSORS, TABLES = ((lambda path: True), (lambda path: path.suffix == '.safetensors'), (lambda path: path.name == 'manifest.json' or path.name.endswith('.safetensors.index.json')))
DAMAGE = [(flip, ANY), (truncate, ANY), (delete, ANY), (swap, ANY), (header, SAFETENSORS), (strange, SAFETENSORS), (edited, TABLES)]

def test_damage_is_found_before_use_and_the_checkpoint_before_is_taken(house, tmp_path):
    "Of any file; a manifest that is damaged itself is named, or the file that it no longer describes."
    draw, cases = random.Random(0), 0
    for model in MODELS[:2]:
        source, run = place_of(house, model, 'one rank') / 'checkpoints', tmp_path / model / 'checkpoints'
        whole = shutil.copytree(source / 'step-0000003', tmp_path / f'{model}-whole')
        inner = whole / 'transformer' if model == 'film' else whole
        file, = inner.glob('*.safetensors')
        (inner / f'{file.name}.index.json').write_text(json.dumps({'metadata': {}, 'weight_map': {name: file.name for name in load_file(file)}}))
        write_manifest(whole)
        shutil.copytree(source / 'step-0000002', run / 'step-0000002')
        config = config_of(house, model, 'one rank')
        for number in range(112):
            shutil.copytree(whole, run / 'step-0000003')
            damage, fits = DAMAGE[number % len(DAMAGE)]
            path = draw.choice([path for path in sorted((run / 'step-0000003').rglob('*')) if path.is_file() and fits(path)])
            damage(path, draw)
            said = []
            found, cases = find_start(config, run.parent, said.append), cases + 1
            named = path.with_name('stranger.safetensors') if damage is strange else path
            case = f'{model}, {damage.__name__} {path.relative_to(run)}: {said}'
            assert found == run / 'step-0000002' and len(said) == 2 and (str(named) in said[0] or '../../x' in said[0] or path.name == 'manifest.json'), case
            shutil.rmtree(run / f'aside-1-step-0000003')
    assert cases >= 200

# Kills

@pytest.mark.parametrize('model', MODELS[:2])
def test_a_killed_run_ends_as_one_that_was_not(house, tmp_path, model):
    for name in ('data', 'text', 'film', 'features'): (tmp_path / name).symlink_to(house / name)
    hits, problems = kill_test.killed(tmp_path, model, kills=1, saves=1, steps=5)
    assert not problems and hits, (hits, problems[:5])

if __name__ == '__main__':
    with TemporaryDirectory(prefix='resume-') as folder:
        (Path(folder) / 'all').touch()
        prepare(Path(folder))
        text, good = judged(Path(folder), matrix(Path(folder)))
        print(text)
        sys.exit(not good)
