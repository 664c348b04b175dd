"""Qwen2.5-VL and Wan2.1 train on emulated NPUs with the losses that they have on the CPU, on one rank and laid out over two, by the fused operators.

MindSpeed is not in these runs; test_mindspeed_training.py has the same with it."""
import json
import os
import sys
from pathlib import Path

import pytest

import parity
from mmkit.config import Clips, Config, Data, Film, Layout, Loop, Optim
from mmkit.device import place
from mmkit.toy import emoji_names, emoji_picture, sentence, tiny_qwen2_5_vl
from mmkit.toyfilm import film_clips, tiny_wan, write_exact
from mmkit.values import override

LIMIT, ROUGH = 1e-5, 0.02                       # relative difference of losses, in float32 and in bfloat16
STEPS, SHORT = 10, 3                            # on one rank, and of a layout over two
LAYOUTS = {'tp 2, sequence parallel': ['layout.tp=2', 'layout.sequence_parallel=true'], 'pp 2': ['layout.pp=2', 'loop.micro_batch=1'], 'cp 2, Ulysses': ['layout.cp=2'],
           'cp 2, ring': ['layout.cp=2', 'layout.cp_kind=ring'], 'dp 2, zero1': ['layout.data=zero1', 'loop.micro_batch=1']}
MODELS = ('qwen', 't2v', 'i2v')
ROWS = {                                        # title: (ranks, model, steps, what differs)
    **{model: (1, model, STEPS, []) for model in MODELS},
    'qwen in bfloat16': (1, 'qwen', SHORT, ['dtype=bfloat16']), 't2v in bfloat16': (1, 't2v', SHORT, ['dtype=bfloat16']),
    **{f'{model}: {title}': (2, model, SHORT, words) for model in MODELS[:2] for title, words in LAYOUTS.items()}}
FUSED = {'qwen': {'npu_fusion_attention', 'npu_fusion_attention_grad', 'npu_rms_norm', 'npu_rms_norm_backward', 'npu_rotary_mul', 'npu_rotary_mul_backward', 'npu_swiglu',
                  'npu_swiglu_backward', '_fused_adamw_'}}
FUSED |= dict.fromkeys(('t2v', 'i2v'), FUSED['qwen'] - {'npu_swiglu', 'npu_swiglu_backward'})
CUT = {'t2v: tp 2, sequence parallel': {'npu_rms_norm', 'npu_rms_norm_backward'}}            # a norm over rows that lie on two ranks has no kernel
CLIPS = Clips(num_frames=5, max_height=32, max_width=32)

def write_talks(folder):
    "Six pictures, and a JSON of nine conversations, three of them without one."
    names, talk = emoji_names(6), lambda question, answer, *images: dict(images=images, messages=[dict(role='user', content=question), dict(role='assistant', content=answer)])
    for i, name in enumerate(names): emoji_picture(name, i, 150).resize((84 + 28 * (i % 3), 56)).save(folder / f'{i}.png')
    records = [talk('<image>\nWhat is this?', sentence(name), f'{i}.png') for i, name in enumerate(names)] + [talk(f'Spell {name}', ' '.join(name)) for name in names[:3]]
    (folder / 'talks.json').write_text(json.dumps(records))
    texts = [message['content'] for record in records for message in record['messages']]
    tiny_qwen2_5_vl(folder / 'qwen', texts, random_all=True, seed=3, hidden=64, layers=2, heads=4, kv_heads=2, ffn=96, vision_hidden=64, vision_depth=2, vision_heads=4,
        vision_ffn=80, window=56, full_attention=(1,))

def write_films(folder):
    "Seven clips of five frames, two tiny models and their features."
    from mmkit.datasets.features import extract_features
    from mmkit.datasets.video import VideoClips
    from mmkit.models.codecs import open_codecs
    clips, captions = film_clips()
    for i in range(7): write_exact(folder / f'{i}.mp4', clips[3 * i][:5])
    (folder / 'films.json').write_text(json.dumps([dict(path=f'{i}.mp4', cap=captions[3 * i]) for i in range(7)]))
    for model in MODELS[1:]:
        tiny_wan(folder / model, image=model == 'i2v', layers=2, ffn=192, room=24, random_all=True, seed=3)
        extract_features(VideoClips(folder / 'films.json', CLIPS), open_codecs(folder / model, image=model == 'i2v'), folder / f'features-{model}', progress=False)

def config_of(folder, title, device):
    "The configuration of a row."
    _, model, steps, words = ROWS[title]
    common = dict(weights=str(folder / model), layout=Layout(data='ddp'), optim=Optim(lr=1e-3, decay='constant', clip=1.0), dtype='float32', device=device,
        loop=Loop(steps=steps, global_batch=4 if model == 'qwen' else 2, micro_batch=2))
    if model == 'qwen': plain = Config(data=Data(files=(str(folder / 'talks.json'),), media_dir=str(folder), max_length=512, workers=0), **common)
    else: plain = Config(task='wan2_1', film=Film(features=str(folder / f'features-{model}'), clips=CLIPS, workers=0), **common)
    return override(plain, words)

def run(folder, device, titles):
    "Losses, norms and counts of fused operators of the named rows, on this world's ranks."
    from mmkit.trainer.loop import fit
    from npu_emulator import calls
    folder, found = Path(folder), {}
    for title in titles:
        before = calls.copy()
        records = fit(config_of(folder, title, device), folder / 'runs' / f'{title}-{device}-{"mindspeed" in sys.modules}'.replace(' ', '-'))
        found[title] = dict(losses=[r.loss for r in records], norms=[r.grad_norm for r in records], ran=dict(calls - before), mindspeed='mindspeed' in sys.modules)
    return found

def on_npu(folder): return run(folder, 'npu', [title for title, row in ROWS.items() if row[0] == place().world])
def on_cpu(folder): return run(folder, 'cpu', [title for title, row in ROWS.items() if row[0] == 1])

def apart(mine, theirs): return max(abs(a - b) / abs(b) for a, b in zip(mine, theirs))

def compare(npu, cpu, record_property):
    "Prints how far the NPU's losses and norms are from the CPU's, and which fused operators ran how often; asserts that they are near."
    rows = []
    for title, row in npu.items():
        like = cpu[title if title in cpu else ROWS[title][1]]
        assert len(row['losses']) == ROWS[title][2] <= len(like['losses']) and not like['ran']
        rows.append([title, ROWS[title][0], len(row['losses']), apart(row['losses'], like['losses']), apart(row['norms'], like['norms']),
                     ' '.join(f'{name.removeprefix("npu_")} {row["ran"][name]}' for name in sorted(row['ran']) if name.startswith(('npu_', '_fused')))])
        lacking = FUSED[ROWS[title][1]] - set(row['ran'])
        assert lacking == CUT.get(title, set()), (title, lacking)
    text = parity.table(['on emulated NPUs', 'ranks', 'steps', 'losses', 'norms', 'fused operators of rank 0'], rows)
    record_property('table', f'Largest relative difference from the CPU, {"with" if any(row["mindspeed"] for row in npu.values()) else "without"} MindSpeed\n\n{text}')
    for title, _, _, losses, norms, _ in rows: assert losses <= (ROUGH if 'bfloat16' in title else LIMIT) and norms <= (ROUGH if 'bfloat16' in title else 10 * LIMIT), text

@pytest.fixture(scope='session')
def cpu(tmp_path_factory):
    "Tiny models with their data, and what the rows of one rank give on the CPU."
    folder = tmp_path_factory.mktemp('training')
    write_talks(folder)
    write_films(folder)
    return folder, parity.on_ranks('npu.test_training', 'on_cpu', folder, 1, 300)

def test_it_learns_on_the_cpu(cpu):
    found = cpu[1]
    assert all(found[model]['losses'][-1] < found[model]['losses'][0] for model in MODELS), found

@pytest.mark.parametrize('ranks', (1, 2))
def test_npus_give_the_losses_of_the_cpu(cpu, ranks, record_property):
    found = parity.on_ranks('npu.test_training', 'on_npu', cpu[0], ranks, 500)
    assert not any(row['mindspeed'] for row in found.values())
    compare(found, cpu[1], record_property)
