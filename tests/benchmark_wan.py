"""Wan2.1 beside what it competes with, alternating in one process: a training step beside a plain diffusers
loop, feature extraction beside its raw parts.

    python tests/benchmark_wan.py [--steps 14] [--rounds 10]

One thread and float32 on both sides. Neighbours on the machine slow both sides down, and not evenly: so every
ratio is the median over pairs that ran one right after the other, and processor seconds, which do not count
waiting for a core, stand beside the seconds of the clock. A training step has the same weights, noisy clips
and optimizer settings on both sides; the losses of every step must agree. Extraction starts its reading
process once in a run of hours: it is started before the clock, and its seconds are told. Raw parts are decord
and the resizing of frames, the VAE, and the text encoder once for each different caption; nothing is checked
or written there.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
import torch

MODEL = dict(
    patch_size=(1, 2, 2),
    num_attention_heads=4,
    attention_head_dim=128,
    in_channels=16,
    out_channels=16,
    text_dim=512,
    freq_dim=256,
    ffn_dim=2560,
    num_layers=4,
)
LATENTS = (16, 5, 32, 32)  # 17 frames of 256 x 256 pixels: 1280 tokens
FRAMES, SIDE, CLIPS = 17, 64, 12


class Clock:
    "Seconds of the clock and of the processor that a `with` took, those of another process included."

    def __init__(self, other=None):
        self.other = other

    def now(self):
        return time.perf_counter(), time.process_time() + (
            sum(self.other.cpu_times()[:2]) if self.other else 0
        )

    def __enter__(self):
        self.start = self.now()
        return self

    def __exit__(self, *error):
        self.took = [end - start for start, end in zip(self.start, self.now())]


def pairs(count, ours, theirs, other=None):
    """Runs both `count` times, each first in turn, after a warm-up.

    Yields (number, seconds of ours, of theirs, results) with number 0 for the warm-up.
    """
    for number in range(count + 1):
        took, found = {}, {}
        for name, run in [('ours', ours), ('theirs', theirs)][:: 1 if number % 2 else -1]:
            with Clock(other if name == 'ours' else None) as clock:
                found[name] = run(number)
            took[name] = clock.took
        yield number, took['ours'], took['theirs'], found


def medians(took):
    return [statistics.median(column) for column in zip(*took)]


def ratio(above, below):
    return medians([[a / b for a, b in zip(*pair)] for pair in zip(above, below)])


# A training step


def open_ours(folder, steps):
    "What makes a batch noisy, and a training step of mmkit as the trainer runs it."
    from mmkit.config import Config, Layout, Loop, Optim, VideoData
    from mmkit.core.device import pick_device
    from mmkit.models.flow import dice
    from mmkit.parallel.data import build_optimizer
    from mmkit.parallel.mesh import open_mesh
    from mmkit.trainer.loop import build
    from mmkit.trainer.step import train_step
    from mmkit.trainer.wan2_1 import WanTask, noised

    config = Config(
        task='wan2_1',
        weights=str(folder),
        layout=Layout(data_parallel='ddp'),
        video=VideoData(features='none', caption_dropout=0.0),
        optim=Optim(lr=1e-4, schedule='constant'),
        loop=Loop(steps=steps, global_batch=1),
    )
    mesh, task = open_mesh(config.layout, pick_device('cpu')), WanTask(config)
    _, wrapped, dtype = build(config, task, mesh)
    optimizer, schedule = build_optimizer(wrapped, config.optim, config.layout, dtype, steps)

    def noisy(step, batch):
        return noised(batch, config.video, dice(0, step, [0]), None) | dict(
            tokens=torch.tensor(batch['latents'][:, 0].numel() // 4)
        )

    return (
        noisy,
        lambda step, batch: train_step(step + 1, wrapped, optimizer, schedule, task, mesh, [batch]).loss,
    )


def open_theirs(folder):
    "A training step as a user of diffusers writes it, and its number of parameters."
    from diffusers import WanTransformer3DModel

    model = WanTransformer3DModel.from_pretrained(folder, torch_dtype=torch.float32).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0, fused=True)

    def step(batch):
        velocity = model(batch['noisy'], batch['time'], batch['text'], return_dict=False)[0]
        loss = (
            ((velocity - (batch['noise'] - batch['clean'])) ** 2).mean((1, 2, 3, 4)) * batch['weight']
        ).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step, sum(p.numel() for p in model.parameters())


def train(steps, room):
    "Prints both losses of every step, and the ratio of tokens per second."
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    WanTransformer3DModel(**MODEL).save_pretrained(room)
    (noisy, ours), (theirs, parameters) = open_ours(room, steps + 1), open_theirs(room)
    text = torch.randn(1, 512, MODEL['text_dim'])
    # a caption of 60 tokens in the 512 places of the model
    text[:, 60:] = 0
    batches = [noisy(step, dict(latents=torch.randn(1, *LATENTS), text=text)) for step in range(steps + 1)]
    tokens, took = int(batches[0]['tokens']), []
    print(
        f'training step: {parameters / 1e6:.1f} M parameters, {tokens} tokens\n  step  mmkit s  diffusers s '
        ' loss of mmkit  loss of diffusers'
    )
    for step, mine, other, loss in pairs(
        steps, lambda step: ours(step, batches[step]), lambda step: theirs(batches[step])
    ):
        print(
            f'  {step or "warm":>4}  {mine[0]:7.3f}  {other[0]:11.3f}  {loss["ours"]:13.7f} '
            f' {loss["theirs"]:17.7f}',
            flush=True,
        )
        assert abs(loss['ours'] - loss['theirs']) <= 1e-4 * loss['theirs'], loss
        if step:
            took.append((mine, other))
    mine, other = zip(*took)
    for what, a, b, found in zip(('clock', 'processor'), medians(mine), medians(other), ratio(other, mine)):
        print(
            f'  {what:9}  mmkit {tokens / a:6.1f} tokens/s, diffusers {tokens / b:6.1f} tokens/s, ratio'
            f' {found:.3f}'
        )


# Extraction


def write_clips(folder):
    """Clips that fade from one picture into another, larger than they will be used, and the data.json that
    lists them.
    """
    from PIL import Image

    from mmkit.models.codecs import write_video
    from mmkit.toy.wan import STARS, video_caption

    folder.mkdir()
    rng, records = np.random.default_rng(0), []
    for number in range(CLIPS):
        first, last = (
            np.asarray(
                Image.fromarray(spots).resize((SIDE * 5 // 4, SIDE * 9 // 8), Image.Resampling.BICUBIC),
                np.float32,
            )
            for spots in rng.integers(0, 256, (2, 8, 10, 3), np.uint8)
        )
        write_video(
            folder / f'{number}.mp4',
            np.stack([first + (last - first) * t / FRAMES for t in range(FRAMES)]).round().astype(np.uint8),
        )
        records.append(
            dict(
                path=f'{number}.mp4', cap=video_caption(STARS[number % 4], ('left', 'right')[number // 4 % 2])
            )
        )
    (folder / 'data.json').write_text(json.dumps(records))
    return folder / 'data.json'


@torch.no_grad()
def raw_parts(clips, codecs):
    "Decodes and resizes, encodes every clip, and every caption once; latents and seconds of the encoders."
    import decord

    from mmkit.datasets.clips import cover

    takes, texts, found, encoding = [clips.look(number) for number in range(CLIPS)], {}, [], 0.0
    for one, take in zip(clips.listed, takes):
        frames = decord.VideoReader(one.path, num_threads=1).get_batch(take.numbers).asnumpy()
        video = torch.from_numpy(np.stack([cover(frame, take.height, take.width) for frame in frames]))
        with Clock() as clock:
            found.append(
                codecs.vae.encode(video.permute(3, 0, 1, 2)[None].float() / 127.5 - 1).latent_dist.mode()[0]
            )
            if take.caption not in texts:
                texts[take.caption] = codecs.text.model(
                    **codecs.text.tokenizer(take.caption, return_tensors='pt')
                ).last_hidden_state[0]
        encoding += clock.took[1]
    return torch.stack(found), encoding


class Timed:
    "The encoders, with the processor seconds spent in them."

    def __init__(self, codecs):
        self.codecs = codecs
        self.clip_identity = codecs.clip_identity
        self.text_identity = codecs.text_identity
        self.seconds = 0.0

    def clip(self, frames):
        return self.timed(self.codecs.clip, frames)

    def caption(self, caption):
        return self.timed(self.codecs.caption, caption)

    def timed(self, encode, what):
        # files are read by another thread meanwhile
        start = time.thread_time()
        found = encode(what)
        self.seconds += time.thread_time() - start
        return found


def extract(rounds, room):
    "Prints the ratio of the seconds of an extraction to those of its raw parts."
    from diffusers import AutoencoderKLWan

    from mmkit.datasets.clips import Clips
    from mmkit.datasets.features import Features, extract_features
    from mmkit.datasets.video import VideoClips
    from mmkit.models.codecs import open_codecs
    from mmkit.models.codecs import statistics as spread
    from mmkit.toy.wan import tiny_wan

    torch.manual_seed(0)
    codecs = open_codecs(tiny_wan(room / 'wan', codec=AutoencoderKLWan(base_dim=8, z_dim=16), text_dim=256))
    clips = VideoClips(
        write_clips(room / 'clips'),
        Clips(num_frames=FRAMES, max_height=SIDE, max_width=SIDE, force_resolution=True),
    )
    with Clock() as start:
        assert len(clips) == CLIPS

    def ours(number):
        timed = Timed(codecs)
        assert extract_features(clips, timed, room / f'features {number}', progress=False).encoded == CLIPS
        return timed.seconds

    took, inside = [], []
    for number, mine, other, found in pairs(
        rounds, ours, lambda number: raw_parts(clips, codecs), psutil.Process(clips.reader.process.pid)
    ):
        latents, encoding = found['theirs']
        if number:
            took.append((mine, other))
            inside.append((mine[1] - found['ours'], other[1] - encoding))
        else:
            check(Features(room / 'features 0'), latents, *spread(codecs.vae))
    clips.reader.close()
    mine, other = zip(*took)
    print(
        f'extraction: {CLIPS} clips of {FRAMES} x {SIDE} x {SIDE}, {rounds} rounds; to start the reading'
        f' process and look into the files took {start.took[0]:.2f} s, once and not counted'
    )
    for what, a, b, found in zip(('clock', 'processor'), medians(mine), medians(other), ratio(mine, other)):
        print(
            f'  {what:9}  mmkit {a / CLIPS * 1000:6.1f} ms a clip, raw parts {b / CLIPS * 1000:6.1f} ms,'
            f' ratio {found:.3f}'
        )
    print(
        '  of these, processor time outside the encoders: mmkit {:.1f} ms a clip, raw parts {:.1f} ms'.format(
            *(x / CLIPS * 1000 for x in medians(inside))
        )
    )


def check(features, latents, mean, scale):
    "Both made the same latents."
    assert (
        len(features) == CLIPS
        and (torch.stack([features[number]['latents'] for number in range(CLIPS)]) - (latents - mean) * scale)
        .abs()
        .max()
        < 1e-4
    )


def main():
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parse.add_argument('--steps', type=int, default=14, help='training steps of each side')
    parse.add_argument('--rounds', type=int, default=10, help='extractions of each side')
    args = parse.parse_args()
    torch.set_num_threads(1)
    print(f'load of the machine {os.getloadavg()[0]:.2f} on {os.cpu_count()} cores')
    with tempfile.TemporaryDirectory() as room:
        train(args.steps, Path(room) / 'transformer')
        extract(args.rounds, Path(room))


if __name__ == '__main__':
    main()
