"""Two ranks and all they started are killed with one signal, at random moments, many of them while they save,
and started again until the run is over: losses and final files are those of a run that nobody killed, to
the last bit.

`python tests/kill_test.py --kills 50` does it for both models, and fails as well when fewer than 20 kills
fell into a save; test_resume.py with two kills each.
"""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from argparse import ArgumentParser
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil
from safetensors.torch import load_file, save_file

from mmkit.config import Clips, Config, Data, Loop, Optim, Sampling, VideoData
from mmkit.core.ranks import child_environment
from mmkit.core.values import dumps
from mmkit.datasets.features import extract_features
from mmkit.datasets.video import VideoClips
from mmkit.launcher.folder import alive
from mmkit.models.codecs import open_codecs
from mmkit.toy.qwen import conversation_texts, emoji_names, llava_toy, tiny_qwen2_5_vl
from mmkit.toy.wan import tiny_wan, video_clips, write_exact

CLIPS = Clips(num_frames=9, max_height=48, max_width=48)


def in_two(file):
    "Weights of one file as two files and an index, so that two ranks have something to write."
    tensors = load_file(file)
    parts = [file.with_name(f'{file.stem}-0000{n}-of-00002.safetensors') for n in (1, 2)]
    places = {name: parts[number >= len(tensors) // 2] for number, name in enumerate(sorted(tensors))}
    for part in parts:
        save_file({name: x for name, x in tensors.items() if places[name] == part}, part, {'format': 'pt'})
    file.with_name(f'{file.name}.index.json').write_text(
        json.dumps(dict(metadata={}, weight_map={name: part.name for name, part in places.items()}))
    )
    file.unlink()


def write_video(folder, count=6):
    "A tiny pipeline and the features of a few clips of two lengths."
    records = []
    for number, (frames, caption) in enumerate(zip(*video_clips())):
        if number == count:
            break
        write_exact(folder / f'{number}.mp4', frames[:5] if number % 3 == 0 else frames)
        records.append(dict(path=f'{number}.mp4', cap=caption))
    (folder / 'videos.json').write_text(json.dumps(records))
    tiny_wan(folder / 'video', layers=2, ffn=96, room=24, random_all=True, seed=3)
    in_two(folder / 'video' / 'transformer' / 'diffusion_pytorch_model.safetensors')
    extract_features(
        VideoClips(folder / 'videos.json', CLIPS),
        open_codecs(folder / 'video', image=False),
        folder / 'features',
        progress=False,
    )


def video_config(folder, optim, loop, **more):
    "Training on them."
    video = VideoData(
        features=str(folder / 'features'),
        clips=CLIPS,
        caption_dropout=0.3,
        sampling=Sampling(num_frames=9, height=48, width=48, steps=3),
        workers=0,
    )
    return Config(
        task='wan2_1',
        weights=str(folder / 'video'),
        video=video,
        optim=optim,
        loop=loop,
        device='cpu',
        **more,
    )


# Kills


def text_config(folder, optim, loop, **more):
    "Training on a few conversations, with a frozen part and tied weights."
    data = Data(
        files=(str(folder / 'data/llava_instruct_150k.json'),),
        media_dir=str(folder / 'data/COCO2017/train2017'),
        workers=0,
    )
    return Config(
        weights=str(folder / 'text'),
        data=data,
        freeze=('merger',),
        optim=optim,
        loop=loop,
        device='cpu',
        **more,
    )


def write_text(folder):
    "A tiny model and the conversations."
    _, file = llava_toy(folder / 'data', emoji_names(4), count=10, size=56)
    tiny_qwen2_5_vl(folder / 'text', conversation_texts(file), hidden=128, layers=2, random_all=True)
    in_two(folder / 'text' / 'model.safetensors')


def config_of(folder, model, steps):
    """Two ranks that share the optimizer's state.

    The video's weights have an average, the text's are saved in the background, with a worker that reads
    ahead.
    """
    optim = Optim(lr=1e-3, warmup=2)
    loop = Loop(
        steps=steps,
        global_batch=4,
        micro_batch=2,
        save_every=2,
        keep_checkpoints=2,
        ema=0.9 * (model == 'video'),
        save_in_background=model == 'text',
    )
    config = (text_config if model == 'text' else video_config)(folder, optim, loop)
    return replace(config, data=replace(config.data, workers=int(model == 'text')))


def free_port(chance=random.SystemRandom()):  # noqa: B008
    """A port below those that the system gives to connections, one of which could take it before the first
    rank does.
    """
    while True:
        with socket.socket() as probe:
            if probe.connect_ex(('127.0.0.1', port := chance.randrange(12000, 32000))):
                return port


RANKS = (
    'for rank in $(seq 0 $((WORLD_SIZE - 1))); do RANK=$rank LOCAL_RANK=$rank "$@" & ranks="$ranks $!"; done;'
    ' for rank in $ranks; do wait $rank || kill -s KILL 0; done'
)


def start(run, ranks=2):
    """A process, alone in its list, that starts the ranks of the loop in a run folder and ends with them, and
    with SIGKILL for all when one fails; they are one group.
    """
    port = free_port()
    changes = dict(
        MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port), WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE=str(ranks)
    )
    with open(run / 'log.txt', 'ab') as log:
        return [
            subprocess.Popen(
                ['sh', '-c', RANKS, 'sh', sys.executable, '-m', 'mmkit.trainer.loop', str(run)],
                env=child_environment(changes),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        ]


def end(processes):
    """One SIGKILL for all ranks and all they started; whether any of them was still there.

    Workers, which have groups of their own, must end at once by themselves.
    """
    there = [process for process in processes if process.poll() is None]
    family = [other for process in there for other in psutil.Process(process.pid).children(recursive=True)]
    for process in there:
        os.killpg(process.pid, signal.SIGKILL)
    for process in processes:
        process.wait()
    deadline = time.monotonic() + 10
    while any(map(alive, family)):
        if time.monotonic() > deadline:
            raise TimeoutError('a rank or worker is alive after SIGKILL for the ranks')
        time.sleep(0.01)
    return bool(there)


def until(condition, processes, seconds=90):
    "Waits for a condition, or for the end of a rank."
    deadline = time.monotonic() + seconds
    while not condition() and all(process.poll() is None for process in processes):
        if time.monotonic() > deadline:
            raise TimeoutError('waited in vain')
        time.sleep(0.001)


# on their way in, not out
def partial(run):
    return [
        path
        for path in (run / 'checkpoints').glob('.step-*.partial')
        if not path.name.endswith('.old.partial')
    ]


def newest(run):
    return max((run / 'checkpoints').glob('step-*'), default=None)


def lines(run):
    return (run / 'metrics.jsonl').read_bytes().count(b'\n') if (run / 'metrics.jsonl').exists() else 0


def kill_once(run, draw, saving, fresh):
    """Starts the run and kills it at a random moment, a save if asked for.

    Returns whether it was one (a folder is left half written), and whether anything was left to kill.
    """
    left, processes = set(partial(run)), start(run)
    try:
        if saving:
            for _ in range(draw.randrange(3)):
                before = newest(run)
                until(lambda: newest(run) != before, processes)
            until(lambda: set(partial(run)) - left, processes)
            time.sleep(draw.random() * 0.04)
        elif fresh:
            time.sleep(draw.random() * 8)
        else:
            before = lines(run)
            until(lambda: lines(run) != before, processes)
            time.sleep(draw.random() * 0.3)
    finally:
        hit = end(processes)
    return bool(set(partial(run)) - left), hit


def finished(run):
    "Runs to the end, whatever was there before."
    processes = start(run)
    try:
        for process in processes:
            assert process.wait(300) == 0, (run / 'log.txt').read_text()[-3000:]
    finally:
        end(processes)
    return run


def trail(run, steps):
    "Losses and norms of all steps, and every file of the last checkpoint."
    records = [json.loads(line) for line in (run / 'metrics.jsonl').read_text().splitlines()]
    last = run / 'checkpoints' / f'step-{steps:07d}'
    return [[record[name] for name in ('step', 'loss', 'grad_norm', 'lr')] for record in records], {
        path.relative_to(last).as_posix(): path.read_bytes() for path in last.rglob('*') if path.is_file()
    }


def killed(folder, model, kills, saves, steps, seed=0, say=lambda words: None):
    """Runs a model with kills, so many of them aimed at a save, and without.

    Returns (kills during a save, problems).
    """
    config, draw = config_of(folder, model, steps), random.Random(seed)
    whole, broken = (folder / f'{model}-{name}' for name in ('whole', 'killed'))
    for run in (whole, broken):
        run.mkdir()
        (run / 'config.json').write_text(dumps(config))
    finished(whole)
    wanted = [True] * saves + [False] * (kills - saves)
    draw.shuffle(wanted)
    hits, late = 0, []
    for number, saving in enumerate(wanted, 1):
        hit, living = kill_once(broken, draw, saving, number % 4 == 0)
        hits, late = hits + hit, late + [f'kill {number} came when the run was over'] * (not living)
        say(f'{model}: kill {number} of {kills}, after {lines(broken)} steps, {hits} of them during a save')
    (losses, files), (mine, others) = trail(whole, steps), trail(finished(broken), steps)
    problems = (
        late
        + [f'step {a[0]}: {a} and {b}' for a, b in zip(losses, mine) if a != b]
        + [f'{len(losses)} and {len(mine)} records'] * (len(losses) != len(mine))
    )
    return hits, problems + [
        name for name in files.keys() | others.keys() if files.get(name) != others.get(name)
    ]


def main():
    "All of it, with one line for each kill."
    words = ArgumentParser()
    words.add_argument('--kills', type=int, default=50)
    words.add_argument('--models', nargs='+', default=['text', 'video'])
    kills, models = vars(words.parse_args()).values()
    for model in models:
        with TemporaryDirectory(prefix='kill-') as folder:
            folder, saves = Path(folder), kills * 3 // 5
            write_text(folder) if model == 'text' else write_video(folder)
            hits, problems = killed(
                folder, model, kills, saves, 3 * kills, say=lambda words: print(words, flush=True)
            )
            problems += [f'{hits} kills during a save, and {min(20, saves)} are wanted'] * (
                hits < min(20, saves)
            )
            print(
                f'{model}: {kills} kills, {hits} during a save;'
                f' {problems[:5] or "the same losses and files to the last bit"}',
                flush=True,
            )
            if problems:
                sys.exit(1)


if __name__ == '__main__':
    main()
