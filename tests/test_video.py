"""Clips on disk to features in memory with Wan's real classes (tiny, random), where the files are as bad as
files are.
"""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from mmkit.datasets.clips import Clips
from mmkit.datasets.features import Features, Index, OnlineFeatures, collate_features, extract_features
from mmkit.datasets.video import VideoClips
from mmkit.models.codecs import open_codecs
from mmkit.toy.wan import tiny_wan, video_clips, write_exact, write_videos

SMALL = Clips(num_frames=9, max_height=48, max_width=48)
CLIPS, CAPTIONS = video_clips()


class Counted:
    "Encoders that remember what they were asked."

    def __init__(self, codecs):
        self.codecs, self.clips, self.captions = codecs, [], []

    clip_identity = property(lambda self: self.codecs.clip_identity)
    text_identity = property(lambda self: self.codecs.text_identity)

    def clip(self, frames):
        self.clips.append(frames)
        return self.codecs.clip(frames)

    def caption(self, caption):
        self.captions.append(caption)
        return self.codecs.caption(caption)

    def asked(self):
        found = len(self.clips), len(self.captions)
        self.clips.clear()
        self.captions.clear()
        return found


@pytest.fixture(scope='module')
def wan(tmp_path_factory):
    "An i2v folder with Wan's own VAE, UMT5 and CLIP."
    from diffusers import AutoencoderKLWan

    torch.manual_seed(0)
    vae = AutoencoderKLWan(base_dim=4, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
    return tiny_wan(tmp_path_factory.mktemp('wan'), codec=vae, image=True, layers=1)


@pytest.fixture(scope='module')
def codecs(wan):
    return open_codecs(wan, image=True)


@pytest.fixture
def encoders(codecs):
    return Counted(codecs)


@pytest.fixture
def opened():
    "VideoClips whose reading processes end with the test."
    made = []

    def open_clips(*arguments, **options):
        made.append(VideoClips(*arguments, **options))
        return made[-1]

    yield open_clips
    for clips in made:
        clips.reader.close()


def few(folder, numbers=(0, 3, 13, 26, 44)):
    "A folder of some of the toy's clips with a data.json in the peer's format."
    folder.mkdir(exist_ok=True)
    records = [
        dict(path=f'{n}.mp4', cap=CAPTIONS[n], num_frames=9, fps=8, resolution=dict(height=48, width=48))
        for n in numbers
    ]
    for n in numbers:
        write_exact(folder / f'{n}.mp4', CLIPS[n])
    (folder / 'data.json').write_text(json.dumps(records))
    return folder / 'data.json'


def extract(clips, encoders, folder, **more):
    return extract_features(clips, encoders, folder, progress=False, **more)


def same(a, b):
    return a.keys() == b.keys() and all(
        torch.equal(a[k], b[k]) if isinstance(a[k], torch.Tensor) else a[k] == b[k] for k in a
    )


# Bad files


def write_sound(path):
    "A second of silence."
    import av

    with av.open(str(path), 'w') as file:
        stream = file.add_stream('aac', rate=16000)
        for start in range(0, 16000, 1024):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format='fltp', layout='mono')
            frame.sample_rate, frame.pts = 16000, start
            file.mux(stream.encode(frame))
        file.mux(stream.encode())


@pytest.fixture
def messy(tmp_path):
    "A list with one of every trouble, and its clips."
    folder = tmp_path / 'messy'
    for name in ('good', 'other'):
        (folder / name).mkdir(parents=True)
        write_exact(folder / name / 'heart.mp4', CLIPS[0] if name == 'good' else CLIPS[16])
    whole = (folder / 'good' / 'heart.mp4').read_bytes()
    (folder / 'empty.mp4').write_bytes(b'')
    (folder / 'short.mp4').write_bytes(whole[: len(whole) // 2])
    write_sound(folder / 'sound.mp4')
    write_exact(folder / 'one.mp4', CLIPS[30][:1])
    shutil.copy(folder / 'other' / 'heart.mp4', folder / 'liar.mp4')
    shutil.copy(folder / 'other' / 'heart.mp4', folder / 'latin.mp4')

    def record(path, cap, frames=9, height=48):
        return dict(path=path, cap=cap, num_frames=frames, fps=8, resolution=dict(height=height, width=48))

    rows = [
        record('good/heart.mp4', 'a red heart'),
        record('other/heart.mp4', 'a car'),
        record('empty.mp4', 'x'),
        record('short.mp4', 'x'),
        record('sound.mp4', 'x'),
        record('one.mp4', 'a dog', 1),
        record('liar.mp4', 'a car', 500, 720),
        record('latin.mp4', 'caf?'),
        record('gone.mp4', 'x'),
    ]
    (folder / 'data.json').write_bytes(json.dumps(rows).encode().replace(b'caf?', b'caf\xe9'))
    (tmp_path / 'data.txt').write_text('messy,messy/data.json\n')
    return tmp_path / 'data.txt'


def test_every_trouble_is_named_and_the_rest_is_used(messy, opened, encoders, tmp_path):
    clips = opened(messy, SMALL)
    dropped = {Path(drop.id).name: drop.reason for drop in clips.report.dropped}
    assert dropped.keys() == {'empty.mp4', 'short.mp4', 'sound.mp4', 'latin.mp4', 'gone.mp4'}
    for name, words in dict(
        empty='the file is empty',
        short='bytes are missing',
        sound='only sound',
        latin='byte 0xe9',
        gone='no such file',
    ).items():
        assert words in dropped[name + '.mp4']
    remarks = [(Path(mark.id).name, mark.reason) for mark in clips.report.remarks]
    assert remarks.count(('heart.mp4', '2 files are called heart.mp4')) == 2
    assert ('one.mp4', 'short: 1 of 9 frames') in remarks and (
        'liar.mp4',
        'the list is wrong: num_frames is 9 and not 500, height is 48 and not 720',
    ) in remarks
    done = extract(clips, encoders, tmp_path / 'features')
    assert (
        done.report.dropped == clips.report.dropped
        and set(done.report.remarks) == set(clips.report.remarks)
        and str(done.report).startswith('kept 4 of 9 clips')
    )
    features = Features(tmp_path / 'features')
    assert [Path(entry['name']).parts[-2:] for entry in features.entries][:2] == [
        ('good', 'heart.mp4'),
        ('other', 'heart.mp4'),
    ] and len(features) == 4
    # no overwriting; equal files, one feature
    assert not torch.equal(features[0]['latents'], features[1]['latents']) and torch.equal(
        features[1]['latents'], features[3]['latents']
    )
    # three captions and the empty one
    assert (
        features.report.dropped == clips.report.dropped
        and features[2]['latents'].shape == (16, 1, 6, 6)
        and encoders.asked() == (3, 4)
    )


def test_a_one_frame_clip_is_dropped_where_more_are_asked_for(messy, opened):
    clips = opened(messy, Clips(num_frames=9, min_num_frames=5, max_height=48, max_width=48))
    assert ('one.mp4', '1 usable frames, at least min_num_frames=5 are needed') in [
        (Path(drop.id).name, drop.reason) for drop in clips.report.dropped
    ]


def test_two_clips_are_enough(tmp_path, opened, encoders):
    extract(opened(few(tmp_path / 'two', (0, 13)), SMALL), encoders, tmp_path / 'features')
    batch = collate_features([Features(tmp_path / 'features')[n] for n in (0, 1)])
    assert (
        batch['latents'].shape == (2, 16, 3, 6, 6)
        and batch['text'].shape == (2, 512, 64)
        and batch['first'].shape == (2, 20, 3, 6, 6)
        and batch['image'].shape == (2, 5, 32)
    )


def test_workers_forked_from_a_busy_parent_read_on(tmp_path, opened):
    from torch.utils.data import DataLoader

    clips = opened(few(tmp_path / 'clips'), SMALL)
    # the parent's reader is open when the workers fork
    pid = (clips[0], clips.reader.process.pid)[1]
    loader = DataLoader(clips, batch_size=None, num_workers=2, timeout=60, multiprocessing_context='fork')
    for _ in range(2):
        assert all(
            (sample['frames'].numpy() == CLIPS[n]).all() for sample, n in zip(loader, (0, 3, 13, 26, 44))
        )
    # a fork that forgets its copy of the clips
    if not (child := os.fork()):
        try:
            clips.reader.close()
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    assert (
        clips.reader.process.pid == pid
        and clips.reader.process.poll() is None
        and (clips[4]['frames'] == CLIPS[44]).all()
    )


def test_a_hanging_decoder_costs_one_clip(tmp_path, opened):
    clips = opened(few(tmp_path / 'clips', (0, 3)), SMALL, limit=60)
    clips.look(0)
    hung = clips.reader.process
    os.kill(hung.pid, signal.SIGSTOP)
    clips.reader.limit = 0.3
    assert clips.look(1) == 'no answer within 0.3 s' and hung.poll() is not None
    clips.reader.limit = 60
    assert (
        len(clips) == 1
        and (clips[0]['frames'] == CLIPS[0]).all()
        and clips.report.dropped[0].reason == 'no answer within 0.3 s'
    )


# What is kept


def test_a_second_run_does_nothing_and_an_edit_costs_one_clip(tmp_path, opened, encoders):
    source, store = few(tmp_path / 'clips'), tmp_path / 'features'
    # five captions and the empty one
    assert (extract(opened(source, SMALL), encoders, store).encoded, *encoders.asked()) == (5, 5, 6)

    def state():
        return {
            path.relative_to(store): (path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest())
            for path in store.rglob('*.*')
            if path.is_file() and path.name != '.index.lock'
        }

    before, clips = state(), opened(source, SMALL)
    assert (
        (extract(clips, encoders, store).found, *encoders.asked()) == (5, 0, 0)
        and state() == before
        and clips.reader.process is None
    )
    write_exact(tmp_path / 'clips' / '13.mp4', 255 - CLIPS[13])
    assert (extract(opened(source, SMALL), encoders, store).encoded, *encoders.asked()) == (1, 1, 0)
    # nothing else was touched
    assert before.items() - {(Path('index.jsonl'), before[Path('index.jsonl')])} <= state().items()
    records = json.loads(source.read_text())
    records[0]['cap'] = 'a new caption'
    source.write_text(json.dumps(records))
    assert (extract(opened(source, SMALL), encoders, store).encoded, *encoders.asked()) == (
        0,
        0,
        1,
    ) and Features(store)[0]['caption'] == 'a new caption'
    source.write_text(json.dumps(records[1:]))
    extract(opened(source, SMALL), encoders, store)
    assert [Path(entry['name']).name for entry in Features(store).entries] == [
        '3.mp4',
        '13.mp4',
        '26.mp4',
        '44.mp4',
    ] and encoders.asked() == (0, 0)


def test_other_encoders_or_settings_are_other_features(tmp_path, opened, wan, encoders):
    source, store = few(tmp_path / 'clips', (0, 3)), tmp_path / 'features'
    extract(opened(source, SMALL), encoders, store)
    for other, clips, found in (
        (open_codecs(wan), SMALL, 2),
        (open_codecs(wan, image=True, dtype='bfloat16'), SMALL, 2),
        (encoders, Clips(num_frames=5, max_height=48, max_width=48), 2),
        (encoders, Clips(num_frames=9, max_height=32, max_width=32), 2),
        (open_codecs(wan, image=True), SMALL, 0),
    ):
        assert extract(opened(source, clips), other, store).encoded == found
    # all was there, and nothing was opened
    assert not vars(other).keys() & {'vae', 'text', 'image'}
    changed = wan.with_name('changed')
    shutil.copytree(wan, changed)
    with open(changed / 'text_encoder' / 'model.safetensors', 'r+b') as file:
        file.seek(-2, 2)
        file.write(b'?')
    reads = open_codecs(changed, image=True)
    done = extract(opened(source, SMALL), reads, store)
    assert (done.encoded, done.captions) == (0, 2) and vars(reads).keys() & {'vae', 'text', 'image'} == {
        'text'
    }


SLOW = """
import sys, time, torch
from mmkit.datasets.clips import Clips
from mmkit.datasets.features import extract_features
from mmkit.datasets.video import VideoClips
class Slow:
    clip_identity = text_identity = 'slow'
    def clip(self, frames): time.sleep(0.15); return dict(latents=torch.full((16, 3, 6, 6), float(frames.mean())))
    def caption(self, caption): return torch.ones(3, 8)
if __name__ == '__main__':
    source, store, rank, ranks = sys.argv[1:]
    clips = VideoClips(source, Clips(num_frames=9, max_height=48, max_width=48))
    print(extract_features(clips, Slow(), store, int(rank), int(ranks), progress=False).encoded)
    clips.reader.close()
"""  # noqa: E501


def run(folder, *arguments):
    (folder / 'slow.py').write_text(SLOW)
    return subprocess.Popen(
        [sys.executable, str(folder / 'slow.py'), *map(str, arguments)],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_for(condition, seconds=60):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, 'it took too long'
        time.sleep(0.01)


def test_a_kill_loses_at_most_the_clip_in_hand(tmp_path):
    source, store = write_videos(tmp_path), tmp_path / 'features'

    def kept():
        return list(store.glob('latents/*/*.safetensors'))

    process = run(tmp_path, source, store, 0, 1)
    wait_for(lambda: len(kept()) >= 8)
    process.kill()
    process.communicate()
    (store / 'index.jsonl').open('a').write('{"name": "half a li')
    done = len(kept())
    assert 8 <= done < 40
    process = run(tmp_path, source, store, 0, 1)
    assert int(process.communicate(timeout=120)[0]) == 48 - done and len(Features(store)) == 48


def test_ranks_share_one_index_without_waiting(tmp_path):
    source, store = write_videos(tmp_path), tmp_path / 'features'
    processes = [run(tmp_path, source, store, rank, 3) for rank in range(3)]
    assert [int(process.communicate(timeout=120)[0]) for process in processes] == [16, 16, 16]
    features = Features(store)
    assert [entry['number'] for entry in features.entries] == list(range(48)) and all(
        abs(features[n]['latents'].mean() - CLIPS[n].mean()) < 1e-3 for n in (0, 1, 2, 47)
    )


def test_a_line_waits_for_the_lock(tmp_path):
    index = Index(tmp_path)
    with index.locked():
        writer = threading.Thread(target=index.add, args=({'name': 'a'},))
        writer.start()
        writer.join(0.3)
        assert writer.is_alive() and index.read() == {}
    writer.join(10)
    assert index.read() == {'a': {'name': 'a'}}


# What is trained on


def test_online_equals_kept_to_the_bit(tmp_path, opened, codecs):
    source = few(tmp_path / 'clips')
    extract(opened(source, SMALL), codecs, tmp_path / 'features')
    kept, fresh = Features(tmp_path / 'features'), OnlineFeatures(opened(source, SMALL), codecs)
    assert (
        len(kept) == len(fresh) == 5
        and kept.sizes == fresh.sizes
        and all(same(kept[n], fresh[n]) for n in range(5))
    )
    assert (
        kept[0].keys() == {'name', 'caption', 'latents', 'text', 'first', 'image'}
        and kept[0]['latents'].std() > 0.1
    )


def test_features_are_what_diffusers_pipelines_compute(tmp_path, opened, wan, codecs):
    from diffusers import WanImageToVideoPipeline, WanPipeline

    pipeline = WanImageToVideoPipeline.from_pretrained(wan)
    words = WanPipeline(pipeline.tokenizer, pipeline.text_encoder, pipeline.vae, pipeline.scheduler)
    extract(opened(few(tmp_path / 'clips', (0,)), SMALL), codecs, tmp_path / 'features')
    batch = collate_features([Features(tmp_path / 'features')[0]])
    video = torch.from_numpy(CLIPS[0]).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
    raw, config = pipeline.vae.encode(video).latent_dist.mode(), pipeline.vae.config
    mean, std = (
        torch.tensor(values).view(1, 16, 1, 1, 1) for values in (config.latents_mean, config.latents_std)
    )
    text = words.encode_prompt(CAPTIONS[0], do_classifier_free_guidance=False, max_sequence_length=512)[0]
    _, first = pipeline.prepare_latents(video[:, :, 0], 1, 16, 48, 48, 9, torch.float32, torch.device('cpu'))
    for name, wanted in (('latents', (raw - mean) / std), ('text', text), ('first', first)):
        assert (batch[name] - wanted).abs().max() < 1e-5, name


def write_peer(folder, names=('a', 'b'), **more):
    "A folder as the peer's extraction leaves it."
    (folder / 'features').mkdir(parents=True)
    made = []
    for count, name in enumerate(names):
        mask = torch.zeros(1, 512, dtype=torch.int64)
        mask[0, : 4 + count] = 1
        made.append(
            dict(
                video=torch.randn(16, 3, 6, 6).bfloat16(),
                prompt_ids=torch.randn(1, 512, 8).bfloat16(),
                prompt_mask=mask,
                **more,
            )
        )
        torch.save(made[-1], folder / 'features' / f'{name}_mp4.pt')
    (folder / 'data.jsonl').write_text(
        ''.join(
            json.dumps(dict(path=f'/data/{name}.mp4', cap=f'clip {name}', file=f'features/{name}_mp4.pt'))
            + '\n'
            for name in (*names, 'never_written')
        )
    )
    return made


def test_the_peers_features_are_read(tmp_path):
    made = write_peer(
        tmp_path / 'peer',
        i2v_clip_feature=torch.randn(257, 16).bfloat16(),
        i2v_vae_feature=torch.randn(20, 3, 6, 6).bfloat16(),
    )
    for where in (tmp_path / 'peer', tmp_path / 'peer' / 'data.jsonl'):
        features = Features(where)
        assert (
            len(features) == 2
            and features.sizes == [(3, 6, 6)] * 2
            and features[1]['caption'] == 'clip b'
            and [Path(drop.id).name for drop in features.report.dropped] == ['never_written.mp4']
        )
        for n, held in enumerate(made):
            assert torch.equal(features[n]['latents'], held['video']) and torch.equal(
                features[n]['text'], held['prompt_ids'][0, : 4 + n]
            )
            assert torch.equal(features[n]['first'], held['i2v_vae_feature']) and torch.equal(
                features[n]['image'], held['i2v_clip_feature']
            )
    assert collate_features([features[0], features[1]])['text'].shape == (2, 512, 8)


class Trap:
    def __reduce__(self):
        return os.mkdir, ('sprung',)


def test_code_in_a_peers_file_does_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_peer(tmp_path / 'peer', names=('a',))
    torch.save(
        dict(video=Trap(), prompt_ids=1, prompt_mask=1),
        tmp_path / 'peer' / 'features' / 'never_written_mp4.pt',
    )
    assert len(Features(tmp_path / 'peer')) == 1 and not (tmp_path / 'sprung').exists()
