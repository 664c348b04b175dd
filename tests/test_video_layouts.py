"""Training videos gives the same losses and first gradients however the model and the batch are laid out, and
from kept features the same as from files.

Clips of two lengths, dropped captions, Wan's own table of times and weights; a model of text and one that
continues pictures.
"""

import json
import re
import time
from pathlib import Path

import numpy as np
import parity
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

import mmkit.trainer.sampling
from mmkit.config import Clips, Config, Layout, Loop, Optim, Sampling, VideoData
from mmkit.core.device import pick_device, place
from mmkit.core.values import largest, override, relative
from mmkit.datasets.features import extract_features
from mmkit.datasets.video import VideoClips
from mmkit.models.codecs import open_codecs
from mmkit.parallel.mesh import open_mesh
from mmkit.toy.wan import tiny_wan, video_clips, write_exact
from mmkit.trainer.loop import fit
from mmkit.trainer.sampling import generate
from mmkit.trainer.task import TASKS

STEPS, GLOBAL = 3, 4
# mean grey levels: latents 1e-5 of their largest value apart are frames 0.003 levels apart, before they are
# rounded to whole ones
NEAR = 0.01
CLIPS = Clips(num_frames=9, max_height=48, max_width=48)
PROMPTS = ['a red heart moves left', 'a dog moves up', 'a banana']
SAMPLING = Sampling(num_frames=9, height=48, width=48, steps=3, guidance=2.0)
LAYOUTS = {  # title: ranks, what differs from the first row
    'tp 1, one by one': (1, []),
    'micro-batches of 4': (1, ['loop.micro_batch=4']),
    'recompute': (1, ['layout.recompute=full', 'loop.micro_batch=4', 'video.workers=2']),
    'recompute, selective': (1, ['layout.recompute=selective', 'loop.micro_batch=4']),
    'recompute of two blocks': (
        1,
        ['layout.recompute=full', 'layout.recompute_layers=2', 'loop.micro_batch=4'],
    ),
    'from files': (1, ['video.features=null', 'video.source=SOURCE']),
    'tp 2': (2, ['layout.tp=2', 'loop.micro_batch=4']),
    'tp 2, sequence parallel': (2, ['layout.tp=2', 'layout.sequence_parallel=true', 'loop.micro_batch=4']),
    'dp 2, ddp': (2, ['loop.micro_batch=2']),
    'dp 2, zero1': (2, ['layout.data_parallel=zero1']),
    'dp 2, zero1, overlap, average': (
        2,
        [
            'layout.data_parallel=zero1',
            'layout.overlap=true',
            'loop.micro_batch=2',
            'loop.ema=0.9',
            'loop.sample_prompts=PROMPTS',
            'loop.sample_every=EVERY',
        ],
    ),
    'cp 2, Ulysses': (2, ['layout.cp=2', 'loop.micro_batch=4']),
    'cp 2, ring': (2, ['layout.cp=2', 'layout.cp_kind=ring', 'loop.micro_batch=2']),
    'tp 2, cp 2': (4, ['layout.tp=2', 'layout.cp=2', 'loop.micro_batch=4']),
    'tp 2, sequence parallel, cp 2, selective': (
        4,
        [
            'layout.tp=2',
            'layout.recompute=selective',
            'layout.sequence_parallel=true',
            'layout.cp=2',
            'layout.data_parallel=zero1',
            'loop.micro_batch=4',
        ],
    ),
    'cp 4, two by two': (
        4,
        [
            'layout.cp=4',
            'layout.cp_kind=usp',
            'loop.micro_batch=4',
            'loop.sample_prompts=PROMPTS',
            'loop.sample_every=EVERY',
        ],
    ),
    'dp 2, fsdp': (2, ['layout.data_parallel=fsdp', 'loop.micro_batch=2']),
    'dp 2, fsdp, recompute, average': (
        2,
        [
            'layout.data_parallel=fsdp',
            'layout.recompute=full',
            'loop.micro_batch=2',
            'loop.ema=0.9',
            'loop.sample_prompts=PROMPTS',
            'loop.sample_every=EVERY',
        ],
    ),
    'tp 2, sequence parallel, dp 2, fsdp': (
        4,
        ['layout.tp=2', 'layout.sequence_parallel=true', 'layout.data_parallel=fsdp', 'loop.micro_batch=2'],
    ),
    'dp 2, ddp, from files': (2, ['video.features=null', 'video.source=SOURCE']),
    'pp 2': (2, ['layout.pp=2', 'loop.sample_prompts=PROMPTS', 'loop.sample_every=EVERY']),
    'pp 2, uneven': (2, ['layout.pp=2', 'layout.layers={"wan": [[1, 3]]}']),
    'pp 2, two turns': (2, ['layout.pp=2', 'layout.vpp=2']),
    'pp 2, two turns, an empty stage': (
        2,
        ['layout.pp=2', 'layout.vpp=2', 'layout.layers={"wan": [[1, 0], [2, 1]]}'],
    ),
    'pp 4, an empty stage': (4, ['layout.pp=4', 'layout.layers={"wan": [[1, 0, 1, 2]]}']),
    'cp 2, dp 2, ring, zero1, recompute': (
        4,
        [
            'layout.cp=2',
            'layout.cp_kind=ring',
            'layout.data_parallel=zero1',
            'layout.recompute=full',
            'loop.micro_batch=2',
        ],
    ),
    'tp 2, pp 2': (4, ['layout.tp=2', 'layout.pp=2', 'loop.micro_batch=2']),
    'tp 2, sequence parallel, pp 2, recompute': (
        4,
        [
            'layout.tp=2',
            'layout.sequence_parallel=true',
            'layout.pp=2',
            'layout.recompute=full',
            'loop.micro_batch=4',
        ],
    ),
    'pp 2, cp 2': (4, ['layout.pp=2', 'layout.cp=2', 'loop.micro_batch=4']),
    'pp 2, dp 2, zero1, overlap': (
        4,
        ['layout.pp=2', 'layout.data_parallel=zero1', 'layout.overlap=true', 'loop.micro_batch=2'],
    ),
}
# first gradients and all losses equal to the last bit
BITS = ['pp 2', 'pp 2, uneven', 'pp 2, two turns', 'pp 2, two turns, an empty stage', 'pp 4, an empty stage']
BOTH = [
    'tp 1, one by one',
    'from files',
    'tp 2, sequence parallel',
    'dp 2, ddp',
    'cp 2, ring',
    'cp 4, two by two',
    'dp 2, fsdp, recompute, average',
    'tp 2, pp 2',
    *BITS,
]
MORE = [
    'tp 2',
    'cp 2, Ulysses',
    'dp 2, zero1',
    'dp 2, fsdp',
    'tp 2, cp 2',
    'pp 2, cp 2',
    'cp 2, dp 2, ring, zero1, recompute',
]
ROWS = {
    f'{model}: {title}': (ranks, model, words)
    for model in ('t2v', 'i2v')
    for title, (ranks, words) in LAYOUTS.items()
}
FIRST = next(iter(LAYOUTS))


def write_clips(folder):
    """Twenty-three clips, every third one of five frames, and their list.

    23 and 4 share no factor, so the batches of each epoch differ.
    """
    records = []
    for number, (frames, caption) in enumerate(zip(*video_clips())):
        if number % 2 or len(records) == 23:
            continue
        write_exact(folder / f'{number}.mp4', frames[:5] if number % 3 == 0 else frames)
        records.append(dict(path=f'{number}.mp4', cap=caption))
    (folder / 'data.json').write_text(json.dumps(records))
    Image.fromarray(video_clips()[0][0][0]).save(folder / 'heart.png')
    for model, more in (('t2v', {}), ('i2v', dict(image=str(folder / 'heart.png')))):
        (folder / f'prompts-{model}.json').write_text(
            json.dumps([dict(prompt=prompt, **more) for prompt in PROMPTS])
        )


def steps_of(folder):
    "How many steps every row is trained."
    return int((folder / 'steps').read_text()) or STEPS


def rows_of(folder):
    """The rows that are tried: of the model that continues pictures those where it differs, and with
    `--steps` one of every kind.
    """
    asked = BOTH + MORE * bool(int((folder / 'steps').read_text()))
    return {
        title: row for title, row in ROWS.items() if row[1] == 't2v' or title.removeprefix('i2v: ') in asked
    }


def config_of(folder, title):
    "The configuration of a row."
    _, model, words = ROWS[title]
    video = VideoData(
        features=str(folder / f'features-{model}'),
        clips=CLIPS,
        caption_dropout=0.3,
        sampling=SAMPLING,
        workers=0,
    )
    plain = Config(
        task='wan2_1',
        weights=str(folder / model),
        video=video,
        layout=Layout(data_parallel='ddp'),
        optim=Optim(lr=1e-3, schedule='constant', weight_decay=0.1, eps=1e-8, clip=1.0),
        loop=Loop(steps=steps_of(folder), global_batch=GLOBAL),
        dtype='float32',
    )
    known = dict(
        SOURCE=folder / 'data.json', PROMPTS=folder / f'prompts-{model}.json', EVERY=steps_of(folder) - 1
    )
    return override(
        plain, [re.sub('|'.join(known), lambda name: str(known[name[0]]), word) for word in words]
    )


@pytest.fixture(scope='module')
def house(tmp_path_factory, request):
    "Two models, their features, and what all rows gave on one, two and four ranks."
    folder = tmp_path_factory.mktemp('videos')
    (folder / 'steps').write_text(str(request.config.getoption('steps')))
    write_clips(folder)
    for model in ('t2v', 'i2v'):
        tiny_wan(folder / model, image=model == 'i2v', layers=4, ffn=192, room=24, random_all=True, seed=3)
        extract_features(
            VideoClips(folder / 'data.json', CLIPS),
            open_codecs(folder / model, image=model == 'i2v'),
            folder / f'features-{model}',
            progress=False,
        )
    found, seconds = {}, {}
    for ranks in sorted({row[0] for row in rows_of(folder).values()}):
        start = time.perf_counter()
        found |= parity.on_ranks('test_video_layouts', 'train', folder, ranks, 1800)
        seconds[ranks] = time.perf_counter() - start
    return folder, found, seconds


def train(folder):
    """What every row of this world gave; its first gradients lie beside as files.

    Samples are written without loss, so that they can be compared number by number.
    """
    folder, found = Path(folder), {}
    mmkit.trainer.sampling.write_video = write_exact
    for title in (title for title, row in rows_of(folder).items() if row[0] == place().world):
        config = config_of(folder, title)
        with open_mesh(config.layout, pick_device('cpu'), config.seed) as mesh:
            if config.layout.overlap:
                parity.small_buckets()
            task, _, wrapped = parity.open_trainer(config, mesh)
            batches = next(task.batches(mesh))
            _, gradients = parity.step_gradients(task, wrapped, mesh, batches)
            if mesh.first:
                save_file(
                    {name: x.contiguous() for name, x in gradients.items()}, folder / f'{title}.safetensors'
                )
            held = dict(
                frames=[batch['clean'].shape[2] for batch in batches],
                sigmas=sum((batch['sigma'].tolist() for batch in batches), []),
            )
        records = fit(config, folder / 'runs' / title.replace(' ', '-'))
        found[title] = dict(
            held,
            losses=[r.loss for r in records],
            norms=[r.grad_norm for r in records],
            parts=[r.parts for r in records],
            tokens=[r.tokens for r in records],
        )
    return found


def half(folder):
    """A step and a saved model in bfloat16, under ddp and under fsdp: losses, dtypes in the file, distances
    of the gradients.
    """
    folder, found, gradients = Path(folder), {}, {}
    for data in ('ddp', 'fsdp'):
        config = override(
            config_of(folder, f'i2v: {FIRST}'),
            [
                'dtype=bfloat16',
                f'layout.data_parallel={data}',
                'layout.recompute=full',
                'loop.micro_batch=2',
                'loop.steps=2',
            ],
        )
        with open_mesh(config.layout, pick_device('cpu'), config.seed) as mesh:
            task, _, wrapped = parity.open_trainer(config, mesh)
            _, gradients[data] = parity.step_gradients(task, wrapped, mesh, next(task.batches(mesh)))
        records = fit(config, folder / 'runs' / f'half-{data}')
        saved = load_file(
            folder
            / 'runs'
            / f'half-{data}'
            / 'checkpoints'
            / 'step-0000002'
            / 'transformer'
            / 'diffusion_pytorch_model.safetensors'
        )
        found[data] = dict(
            losses=[record.loss for record in records],
            dtypes={name: str(x.dtype) for name, x in saved.items()},
        )
    return found | dict(
        apart={name: parity.apart(x, gradients['ddp'][name]) for name, x in gradients['fsdp'].items()}
    )


def frames_of(path):
    "Frames (t h w 3) of an mp4 as whole numbers with a sign."
    import av

    with av.open(str(path)) as file:
        return np.stack([frame.to_ndarray(format='rgb24') for frame in file.decode(video=0)]).astype(np.int16)


def test_the_steps_hold_what_they_should(house):
    for model in ('t2v', 'i2v'):
        one, two = house[1][f'{model}: {FIRST}'], house[1][f'{model}: dp 2, ddp']
        # steps of both lengths
        assert (
            len(set(one['tokens'])) == 2
            and len(one['losses']) == steps_of(house[0])
            and one['losses'][-1] < one['losses'][0]
        )
        # each copy draws its own part
        assert (
            len(set(one['sigmas'])) == GLOBAL
            and len(two['sigmas']) == GLOBAL // 2
            and set(two['sigmas']) < set(one['sigmas'])
        )
        # gradients are clipped
        assert sum(norm > 1 for norm in one['norms']) > len(one['norms']) / 2
        assert all(len(parts) == 10 and any(part is not None for part in parts) for parts in one['parts'])


def test_layouts_never_change_the_answer(house, record_property):
    folder, found, seconds = house
    rows = []
    for title, (ranks, model, _) in rows_of(folder).items():
        like = f'{model}: {FIRST}'
        if title == like:
            continue
        gradient, name = parity.furthest(*(load_file(folder / f'{row}.safetensors') for row in (title, like)))
        rows.append(
            [
                title,
                ranks,
                relative(found[title]['losses'], found[like]['losses']),
                relative(found[title]['norms'], found[like]['norms']),
                gradient,
                name,
            ]
        )
    text = parity.table(['layout', 'ranks', 'losses', 'norms', 'first gradients', 'furthest gradient'], rows)
    record_property(
        'table',
        f'Largest relative difference from one rank and one clip at a time, {steps_of(folder)} steps of'
        f' AdamW, fp32; {parity.took(seconds)}\n\n{text}',
    )
    assert all(max(row[2:5]) <= parity.LIMIT for row in rows), text


def test_a_pipeline_adds_in_the_same_order(house):
    for model in ('t2v', 'i2v'):
        for title in BITS:
            mine, theirs = (load_file(house[0] / f'{model}: {row}.safetensors') for row in (title, FIRST))
            assert mine.keys() == theirs.keys() and all(mine[name].equal(theirs[name]) for name in mine), (
                title
            )
            assert house[1][f'{model}: {title}']['losses'] == house[1][f'{model}: {FIRST}']['losses'], title


def test_recompute_gives_the_same_bits(house):
    folder, found, _ = house
    for title in (title for title in rows_of(folder) if ': recompute' in title):
        like = f'{title.split(": ")[0]}: micro-batches of 4'
        mine, theirs = (load_file(folder / f'{row}.safetensors') for row in (title, like))
        assert all(mine[name].equal(theirs[name]) for name in theirs), title
        assert all(found[title][what] == found[like][what] for what in ('losses', 'norms')), title


def test_kept_features_train_bit_for_bit_as_files_do(house):
    found = house[1]
    for model in ('t2v', 'i2v'):
        for kept, fresh in ((FIRST, 'from files'),):
            assert (
                found[f'{model}: {kept}']['losses'] == found[f'{model}: {fresh}']['losses']
                and found[f'{model}: {kept}']['norms'] == found[f'{model}: {fresh}']['norms']
            )


def test_what_is_saved_opens_in_diffusers(house):
    from diffusers import WanTransformer3DModel

    for title, (_, model, _) in rows_of(house[0]).items():
        saved = house[0] / 'runs' / title.replace(' ', '-') / 'checkpoints' / f'step-{steps_of(house[0]):07d}'
        opened, report = WanTransformer3DModel.from_pretrained(
            saved / 'transformer', output_loading_info=True
        )
        assert (
            not report['missing_keys']
            and not report['unexpected_keys']
            and (saved / 'model_index.json').is_file()
            and (saved / 'vae' / 'config.json').is_file()
        )
        like = load_file(
            house[0]
            / 'runs'
            / f'{model}: {FIRST}'.replace(' ', '-')
            / 'checkpoints'
            / f'step-{steps_of(house[0]):07d}'
            / 'transformer'
            / 'diffusion_pytorch_model.safetensors'
        )
        apart = largest(
            (value - like[name]).abs().mean().item() for name, value in opened.state_dict().items()
        )
        assert (1e-4 < apart < 1) if 'average' in title else (apart < 3e-5), (title, apart)


def test_samples_are_what_the_saved_weights_make(house):
    """The averaged ones, generated by two replicas in turn.

    The second clip too, whose noise must be that of its number.

        A layout adds in another order, so a number that lies between two grey levels may fall to either side:
    one level, in few places. Frames are compared before H.264, which chooses anew what it leaves out: one
    value of the first clip one level higher, and its video is 0.55 levels apart on average.
    """
    last = steps_of(house[0])
    for title, (_, model, words) in rows_of(house[0]).items():
        if 'loop.sample_prompts=PROMPTS' not in words:
            continue
        run = house[0] / 'runs' / title.replace(' ', '-')
        asked = json.loads((house[0] / f'prompts-{model}.json').read_text())
        sampled = {
            int(path.stem[5:]): json.loads(path.read_text())
            for path in sorted((run / 'samples').glob('step-*.json'))
        }
        assert list(sampled) == [last - 1, last] and all(
            [{key: one[key] for key in one if key != 'video'} for one in found] == asked
            for found in sampled.values()
        )
        made = generate(
            run / 'checkpoints' / f'step-{last:07d}',
            PROMPTS,
            images=[one['image'] for one in asked] if model == 'i2v' else None,
            sampling=SAMPLING,
            device='cpu',
            progress=False,
        )
        shown = [frames_of(run / 'samples' / one['video']) for one in sampled[last]]
        for number, frames in enumerate(shown):
            levels = [np.abs(frames - one.frames) for one in made]
            assert levels[number].max() <= 1 and levels[number].mean() <= NEAR, (
                title,
                number,
                levels[number].max(),
                levels[number].mean(),
            )
            assert min(x.mean() for other, x in enumerate(levels) if other != number) > 1, (title, number)


def test_fsdp_computes_and_saves_in_the_formats_of_ddp(house):
    """In bfloat16 only the gradients of what makes text and picture tokens, to which every layer adds, are
    added up in another order.
    """
    found = parity.on_ranks('test_video_layouts', 'half', house[0], 2, 200)
    assert found['fsdp']['dtypes'] == found['ddp']['dtypes'] and set(found['fsdp']['dtypes'].values()) == {
        'torch.float32',
        'torch.bfloat16',
    }
    assert (
        relative(found['fsdp']['losses'][:1], found['ddp']['losses'][:1]) < 1e-6
        and relative(found['fsdp']['losses'], found['ddp']['losses']) < 1e-3
    )
    added = [name for name in found['apart'] if 'text_embedder' in name or 'image_embedder' in name]
    assert (
        largest(distance for name, distance in found['apart'].items() if name not in added) < 1e-6
        and largest(found['apart'].values()) < 0.02
    ), found['apart']


def test_two_clips_are_enough(house, tmp_path):
    "Each comes four times in a batch of eight, with other noise every time."
    folder = house[0]
    (tmp_path / 'data.json').write_text(json.dumps(json.loads((folder / 'data.json').read_text())[1:3]))
    for number in (2, 4):
        (tmp_path / f'{number}.mp4').write_bytes((folder / f'{number}.mp4').read_bytes())
    words = [
        'video.features=null',
        f'video.source={tmp_path}/data.json',
        'loop.steps=2',
        'loop.global_batch=8',
        'loop.micro_batch=8',
    ]
    records = fit(override(config_of(folder, f't2v: {FIRST}'), words), tmp_path / 'run')
    assert len(records) == 2 and all(0.5 < record.loss < 10 for record in records)
    with open_mesh(Layout(), pick_device('cpu'), 0) as mesh:
        (batch,) = next(TASKS['wan2_1'](override(config_of(folder, f't2v: {FIRST}'), words)).batches(mesh))
        assert (
            len(batch['clean'].unique(dim=0)) == 2
            and len(batch['sigma'].unique()) == 8
            and len(batch['noise'].unique(dim=0)) == 8
        )
