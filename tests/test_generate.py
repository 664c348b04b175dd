"""Clips are those that diffusers' pipelines make of the same folder, noise and steps.

Everything else about `video` that takes a codec, a file or a second rank.

All weights are random, so that a lost or swapped one shows.
"""

import gc
import json
import shutil
import warnings
from dataclasses import replace
from functools import cache
from pathlib import Path

import av
import numpy as np
import parity
import pytest
import torch
from PIL import Image

from mmkit.config import Layout, Sampling
from mmkit.models.codecs import decode_video, open_vae
from mmkit.toy.vae import LinearCodec
from mmkit.toy.wan import tiny_wan, video_clips
from mmkit.trainer.sampling import check_request, generate, generate_latents, open_pipeline, sampling_of

PROMPTS = ['a red heart moves left', '  a car &amp;amp; a dog\n move up ']
SMALL = Sampling(num_frames=9, height=48, width=32, steps=5, shift=3.0, seed=11)
CASES = {
    f'{kind}, guidance {guidance:g}{", negative" if negative else ""}': replace(
        SMALL, scheduler=kind, guidance=guidance, negative=negative
    )
    for kind in ('unipc', 'euler')
    for guidance, negative in ((1.0, ''), (3.0, ''), (3.0, 'a banana  moves'))
}


def small_vae():
    "A random codec of Wan's own class."
    from diffusers import AutoencoderKLWan

    torch.manual_seed(3)
    return AutoencoderKLWan(base_dim=8, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1).eval()


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
    "Tiny pipelines: text to video and image to video with the toy's codec, image to video with Wan's."
    room = tmp_path_factory.mktemp('video')
    for seed, (name, more) in enumerate(
        {'t2v': {}, 'i2v': dict(image=True), 'wan': dict(image=True, codec=small_vae())}.items()
    ):
        tiny_wan(room / name, random_all=True, seed=seed, layers=2, **more)
    return room


def pictures():
    "The first frames of two clips, cut to the size of the samples."
    clips, _ = video_clips()
    return [np.ascontiguousarray(clips[number, 0, :, 8:40]) for number in (17, 30)]


@cache
def pipeline_of(folder):
    "diffusers' own pipeline; only the toy's codec has to be put in by hand."
    from diffusers import WanImageToVideoPipeline, WanPipeline

    toy = json.loads((folder / 'vae' / 'config.json').read_text())['_class_name'] == 'LinearCodec'
    kind = WanImageToVideoPipeline if (folder / 'image_encoder').exists() else WanPipeline
    pipeline = kind.from_pretrained(folder, **(dict(vae=open_vae(folder)) if toy else {}))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def by_diffusers(folder, sampling, prompts, images=None, output='latent'):
    """What diffusers' pipeline makes: latents (n c f h w) or pixels (n t h w 3) from 0 to 1.

    It gives all prompts one picture, so pictures go one by one.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

    pipeline = pipeline_of(folder)
    pipeline.scheduler = (
        FlowMatchEulerDiscreteScheduler(shift=sampling.shift)
        if sampling.scheduler == 'euler'
        else UniPCMultistepScheduler.from_pretrained(folder / 'scheduler')
    )
    common = dict(
        height=sampling.height,
        width=sampling.width,
        num_frames=sampling.num_frames,
        num_inference_steps=sampling.steps,
        guidance_scale=sampling.guidance,
        output_type=output,
    )
    seeds = [torch.Generator().manual_seed(sampling.seed + number) for number in range(len(prompts))]
    if not images:
        return torch.as_tensor(
            pipeline(
                prompts, negative_prompt=[sampling.negative] * len(prompts), generator=seeds, **common
            ).frames
        )
    return torch.cat(
        [
            torch.as_tensor(
                pipeline(Image.fromarray(image), prompt, sampling.negative, generator=[seed], **common).frames
            )
            for prompt, image, seed in zip(prompts, images, seeds)
        ]
    )


def latents_of(pipeline, sampling, images=None, at_once=1):
    "Latents (n c f h w) of the prompts."
    return torch.stack(
        list(
            generate_latents(pipeline, *check_request(pipeline, PROMPTS, images, sampling), sampling, at_once)
        )
    )


def greys(frames, theirs):
    "How many grey levels uint8 frames are from pixels (t h w 3) from 0 to 1 at most."
    return np.abs(frames.astype(int) - (theirs.numpy() * 255).round().astype(int)).max()


@pytest.fixture(scope='module')
def theirs(folders):
    "Latents by diffusers for both kinds of model and all cases."
    return {
        (name, case): by_diffusers(folders / name, sampling, PROMPTS, images)
        for name, images in (('t2v', None), ('i2v', pictures()))
        for case, sampling in CASES.items()
    }


def test_latents_are_those_of_diffusers(folders, theirs, record_property):
    rows = []
    for name, images in (('t2v', None), ('i2v', pictures())):
        with open_pipeline(folders / name, device='cpu') as pipeline:
            for case, sampling in CASES.items():
                rows.append(
                    [
                        name,
                        case,
                        parity.apart(latents_of(pipeline, sampling, images, 2), theirs[name, case]),
                        parity.apart(*theirs[name, case]),
                    ]
                )
            rows.append(
                [
                    name,
                    'unipc, one by one',
                    parity.apart(
                        latents_of(pipeline, CASES['unipc, guidance 3'], images),
                        theirs[name, 'unipc, guidance 3'],
                    ),
                    None,
                ]
            )
    record_property(
        'table',
        'Latents: largest difference from diffusers over largest value, fp32\n\n'
        + parity.table(['model', 'sampling', 'latents', 'of the two prompts'], rows),
    )
    assert len(rows) == 14 and all(row[2] <= parity.LIMIT and (row[3] or 1) > 0.1 for row in rows), rows
    # the cases do differ
    assert (
        min(
            parity.apart(theirs[name, 'unipc, guidance 3'], theirs[name, f'unipc, guidance {other}'])
            for name in ('t2v', 'i2v')
            for other in ('1', '3, negative')
        )
        > 1e-3
    )


def test_pixels_are_those_of_diffusers(folders):
    for name, images in (('t2v', None), ('wan', pictures())):
        made = generate(folders / name, PROMPTS, images=images, sampling=SMALL, device='cpu', progress=False)
        wanted = by_diffusers(folders / name, SMALL, PROMPTS, images, 'np')
        assert [clip.frames.shape for clip in made] == [(9, 48, 32, 3)] * 2 and max(
            map(greys, (clip.frames for clip in made), wanted)
        ) <= 1, name
        assert made[0].frames.std() > 10 and [clip.prompt for clip in made] == PROMPTS


def test_half_precision_is_near(folders, theirs):
    "The transformer and the text encoder in bfloat16, the clip in float32 all the way."
    with open_pipeline(folders / 't2v', device='cpu', dtype='bfloat16') as pipeline:
        mine = latents_of(pipeline, CASES['euler, guidance 1'])
        assert (
            pipeline.model[0].blocks[0].ffn['0'].weight.dtype
            == pipeline.prompt_embeds[''].dtype
            == torch.bfloat16
            and mine.dtype == pipeline.vae.dtype == torch.float32
        )
    assert 1e-5 < parity.apart(mine, theirs['t2v', 'euler, guidance 1']) < 0.1


# Two ranks


def video_on_ranks(folder):
    "On each of two ranks: how far tp 2 is from the latents in the file, and which files there are."
    folder, found = Path(folder), {}
    with open_pipeline(folder / 'i2v', device='cpu', layout=Layout(tp=2)) as pipeline:
        found['apart'] = parity.over_ranks(
            parity.apart(
                latents_of(pipeline, CASES['unipc, guidance 3'], pictures()),
                torch.load(folder / 'latents.pt'),
            )
        )
        made = pipeline.generate(
            PROMPTS, images=pictures(), sampling=SMALL, output=folder / 'made', progress=False
        )
        found['paths'] = int(
            parity.over_ranks(
                sum(clip.path is None or not clip.path.is_file() for clip in made)
                if pipeline.mesh.first
                else 0
            )
        )
    try:
        open_pipeline(folder / 't2v', device='cpu').__enter__()
    except ValueError as error:
        found['error'] = str(error)
    return found


def test_two_ranks_share_a_model_and_the_first_writes(folders, theirs):
    torch.save(theirs['i2v', 'unipc, guidance 3'], folders / 'latents.pt')
    found = parity.on_ranks('test_generate', 'video_on_ranks', folders, 2, 120)
    assert found['apart'] <= parity.LIMIT and found['paths'] == 0 and 'tp=2' in found['error'], found
    assert sorted(path.name for path in (folders / 'made').iterdir()) == [
        '00_a_red_heart_moves_left.mp4',
        '01_a_car_amp_amp_a_dog_move_up.mp4',
    ]


# What is read, what is written, what is said


def test_files_are_written_one_by_one_and_never_over_others(folders, tmp_path):
    output = tmp_path / 'new' / 'videos'
    (first,) = generate(folders / 't2v', 'a dog', sampling=SMALL, output=output, device='cpu', progress=False)
    kept = first.path.read_bytes()
    (output / '07_other.mp4').write_bytes(b'')
    (second,) = generate(
        folders / 't2v',
        'a dog',
        sampling=replace(SMALL, seed=5, fps=8),
        output=output,
        device='cpu',
        progress=False,
    )
    assert (first.path.name, second.path.name, first.fps, second.fps) == (
        '00_a_dog.mp4',
        '08_a_dog.mp4',
        16,
        8,
    ) and first.path.read_bytes() == kept == first.video != second.video
    for clip in (first, second):
        with av.open(str(clip.path)) as file:
            stream = file.streams.video[0]
            seen = np.stack([picture.to_ndarray(format='rgb24') for picture in file.decode(stream)])
            assert (stream.codec_context.name, stream.codec_context.pix_fmt, stream.average_rate) == (
                'h264',
                'yuv420p',
                clip.fps,
            )
        assert (
            seen.shape == clip.frames.shape and np.abs(seen.mean((1, 2)) - clip.frames.mean((1, 2))).max() < 8
        )


def test_an_interrupt_costs_the_clip_that_is_being_made(folders, tmp_path, monkeypatch):
    decoded = []

    def stop_at_second(vae, latents):
        if decoded:
            raise KeyboardInterrupt
        decoded.append(1)
        return decode_video(vae, latents)

    monkeypatch.setattr('mmkit.trainer.sampling.decode_video', stop_at_second)
    with pytest.raises(KeyboardInterrupt):
        generate(folders / 't2v', PROMPTS, sampling=SMALL, output=tmp_path, device='cpu', progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ['00_a_red_heart_moves_left.mp4']


def test_large_parts_are_never_there_together(folders, monkeypatch):
    """Neither encoder is alive when the transformer is read, and a known caption does not bring the text
    encoder back.
    """
    from transformers import CLIPVisionModel, UMT5EncoderModel

    from mmkit.trainer import sampling as module

    def large():
        return [x for x in gc.get_objects() if type(x) in (UMT5EncoderModel, CLIPVisionModel)]

    opened, alive, before = [], [], large()  # those of diffusers' pipelines
    for name in ('open_text_encoder', 'open_image_encoder', 'open_vae', 'load_weights'):

        def note(*given, inner=getattr(module, name), name=name, **more):  # noqa: B008
            opened.append(name)
            if name == 'load_weights':
                alive.extend(x for x in large() if not any(x is one for one in before))
            return inner(*given, **more)

        monkeypatch.setattr(module, name, note)
    with open_pipeline(folders / 'i2v', device='cpu') as pipeline:
        for _ in range(2):
            pipeline.generate(
                PROMPTS[0], images=pictures()[0], sampling=replace(SMALL, steps=1), progress=False
            )
    assert (
        opened
        == [
            'open_vae',
            'open_text_encoder',
            'open_image_encoder',
            'load_weights',
            'open_image_encoder',
        ]
        and not alive
    )


def test_long_prompts_are_cut_as_diffusers_cuts_them_and_it_is_said(folders):
    long, sampling = ' '.join(['dog moves'] * 400), replace(SMALL, steps=1)
    with pytest.warns(UserWarning, match='512 tokens'):
        (made,) = generate(folders / 't2v', long, sampling=sampling, device='cpu', progress=False)
    assert greys(made.frames, by_diffusers(folders / 't2v', sampling, [long], output='np')[0]) <= 1
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        generate(folders / 't2v', 'a dog', sampling=sampling, device='cpu', progress=False)


def test_pictures_come_in_any_form_and_size(folders, tmp_path):
    wide = np.pad(pictures()[0], [(0, 0), (16, 16), (0, 0)], mode='edge')
    Image.fromarray(wide).save(tmp_path / 'wide.png')
    with open_pipeline(folders / 'i2v', device='cpu') as pipeline:
        frames = [
            check_request(pipeline, 'a dog', image, SMALL)[1][0]
            for image in (
                pictures()[0],
                wide,
                Image.fromarray(wide),
                tmp_path / 'wide.png',
                str(tmp_path / 'wide.png'),
            )
        ]
    assert all(np.array_equal(frame, pictures()[0]) for frame in frames)


def test_without_a_sampling_the_folder_decides(folders, tmp_path):
    assert sampling_of(folders / 't2v') == Sampling(shift=3.0)
    (tmp_path / 'scheduler').mkdir()
    (tmp_path / 'scheduler' / 'scheduler_config.json').write_text(
        '{"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 8}'
    )
    assert sampling_of(tmp_path, steps=3) == Sampling(shift=8.0, scheduler='euler', steps=3)


def change(folder, name, **changes):
    "Changes values of a JSON file in a folder."
    (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | changes))


DOOR = {
    'no model_index.json': dict(change=lambda folder: (folder / 'model_index.json').unlink()),
    'no text_encoder': dict(change=lambda folder: (folder / 'text_encoder' / 'config.json').unlink()),
    'no tokenizer': dict(change=lambda folder: (folder / 'tokenizer').rename(folder / 'other')),
    'Wan2.2': dict(change=lambda folder: change(folder, 'model_index.json', boundary_ratio=0.9)),
    'WanVideoToVideoPipeline': dict(
        change=lambda folder: change(folder, 'model_index.json', _class_name='WanVideoToVideoPipeline')
    ),
    'not of one pipeline': dict(
        change=lambda folder: change(folder, 'transformer/config.json', in_channels=32)
    ),
    'rope_max_seq_len': dict(sampling=replace(SMALL, width=16 * 65)),
    'use 32 or 64': dict(change=lambda folder: LinearCodec(16, side=16).save_pretrained(folder / 'vae')),
    'num_frames=5': dict(
        change=lambda folder: LinearCodec(16, side=8, group=8).save_pretrained(folder / 'vae'),
        sampling=replace(SMALL, num_frames=5),
    ),
    'give a text': dict(prompts=[]),
    'give a text or': dict(prompts=['a dog', None]),
    'leave images out': dict(images=pictures()[:1]),
    'give images': dict(name='i2v'),
    '1 prompts and 2 images': dict(name='i2v', images=pictures()),
    'no such picture': dict(name='i2v', images='no such picture.png'),
    'float64': dict(name='i2v', images=pictures()[0] / 255),
    'at_once': dict(at_once=0),
}


@pytest.mark.parametrize('words', DOOR)
def test_errors_are_said_at_the_door(words, folders, tmp_path, monkeypatch):
    given = dict(DOOR[words])
    folder = shutil.copytree(folders / given.pop('name', 't2v'), tmp_path / 'folder')
    given.pop('change', lambda folder: None)(folder)
    monkeypatch.setattr(
        'mmkit.trainer.sampling.open_text_encoder', lambda *_: pytest.fail('the text encoder was read')
    )
    with pytest.raises(ValueError, match=words):
        generate(
            folder,
            **{'prompts': 'a dog', 'sampling': SMALL, 'output': tmp_path / 'made', 'device': 'cpu', **given},
        )
    assert not (tmp_path / 'made').exists()
