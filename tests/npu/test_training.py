"""Qwen2.5-VL and Wan2.1 train on emulated NPUs with the losses that they have on the CPU, on one rank and
laid out over two, by the fused operators, each called exactly as often as it must.

MindSpeed is not in these runs; test_mindspeed_training.py has the same with it.
"""

import importlib.util
import json
import os
import sys
from collections import Counter
from pathlib import Path

import parity
import pytest

from mmkit.config import Clips, Config, Data, Layout, Loop, Optim, VideoData
from mmkit.core.device import place
from mmkit.core.values import override, relative
from mmkit.toy.qwen import emoji_names, emoji_picture, sentence, tiny_qwen2_5_vl
from mmkit.toy.wan import tiny_wan, video_clips, write_exact

LIMIT, ROUGH = 1e-5, 0.02  # relative difference of losses, in float32 and in bfloat16
STEPS = int(os.environ['NPU_STEPS'])  # of every row; --steps N makes it so many
LAYOUTS = {
    'tp 2': ['layout.tp=2'],
    'tp 2, sequence parallel': ['layout.tp=2', 'layout.sequence_parallel=true'],
    'pp 2': ['layout.pp=2', 'loop.micro_batch=1'],
    'cp 2, Ulysses': ['layout.cp=2'],
    'cp 2, ring': ['layout.cp=2', 'layout.cp_kind=ring'],
    'dp 2, zero1': ['layout.data_parallel=zero1', 'loop.micro_batch=1'],
}
MODELS = ('qwen', 't2v', 'i2v')
# title: (ranks, model, what differs); those that are `resumed` save in the middle and are begun again
ROWS = {
    **{model: (1, model, []) for model in MODELS},
    'qwen in bfloat16': (1, 'qwen', ['dtype=bfloat16']),
    't2v in bfloat16': (1, 't2v', ['dtype=bfloat16']),
    'qwen, resumed': (1, 'qwen', []),
    't2v, resumed': (1, 't2v', []),
    **{f'{model}: {title}': (2, model, words) for model in MODELS[:2] for title, words in LAYOUTS.items()},
    'i2v: tp 2, sequence parallel': (2, 'i2v', LAYOUTS['tp 2, sequence parallel']),
    'i2v: cp 2, ring': (2, 'i2v', LAYOUTS['cp 2, ring']),
    'qwen: dp 2, zero1, resumed': (2, 'qwen', LAYOUTS['dp 2, zero1']),
}
# Fused operators of one micro-batch in the two towers of Qwen2.5-VL (two layers each; a norm at the end of
# each) and in two blocks of Wan2.1 (attention to the row, to
# the text and, i2v, to the picture, each with normed queries and keys; of the picture only the keys are
# normed), and how many layers attend around a ring.
A_PASS = {
    'qwen': dict(npu_fusion_attention=4, npu_rms_norm=10, npu_rotary_mul=8, npu_swiglu=4),
    't2v': dict(npu_fusion_attention=4, npu_rms_norm=8, npu_rotary_mul=4),
    'i2v': dict(npu_fusion_attention=6, npu_rms_norm=10, npu_rotary_mul=4),
}
# layers of a ring; AdamW is called for the weights that decay and for those that do not
AROUND, GROUPS = 2, 2
BACKWARD = dict(
    npu_fusion_attention='npu_fusion_attention_grad',
    npu_rms_norm='npu_rms_norm_backward',
    npu_rotary_mul='npu_rotary_mul_backward',
    npu_swiglu='npu_swiglu_backward',
)
CLIPS = Clips(num_frames=5, max_height=32, max_width=32)


def write_talks(folder):
    "Six pictures, and a JSON of nine conversations, three of them without one."
    names = emoji_names(6)

    def talk(question, answer, *images):
        return dict(
            images=images,
            messages=[dict(role='user', content=question), dict(role='assistant', content=answer)],
        )

    for i, name in enumerate(names):
        emoji_picture(name, i, 150).resize((84 + 28 * (i % 3), 56)).save(folder / f'{i}.png')
    records = [talk('<image>\nWhat is this?', sentence(name), f'{i}.png') for i, name in enumerate(names)] + [
        talk(f'Spell {name}', ' '.join(name)) for name in names[:3]
    ]
    (folder / 'talks.json').write_text(json.dumps(records))
    texts = [message['content'] for record in records for message in record['messages']]
    tiny_qwen2_5_vl(
        folder / 'qwen',
        texts,
        random_all=True,
        seed=3,
        hidden=64,
        layers=2,
        heads=4,
        kv_heads=2,
        ffn=96,
        vision_hidden=64,
        vision_depth=2,
        vision_heads=4,
        vision_ffn=80,
        window=56,
        full_attention=(1,),
    )


def write_videos(folder):
    "Seven clips of five frames, two tiny models and their features."
    from mmkit.datasets.features import extract_features
    from mmkit.datasets.video import VideoClips
    from mmkit.models.codecs import open_codecs

    clips, captions = video_clips()
    for i in range(7):
        write_exact(folder / f'{i}.mp4', clips[3 * i][:5])
    (folder / 'videos.json').write_text(
        json.dumps([dict(path=f'{i}.mp4', cap=captions[3 * i]) for i in range(7)])
    )
    for model in MODELS[1:]:
        tiny_wan(folder / model, image=model == 'i2v', layers=2, ffn=192, room=24, random_all=True, seed=3)
        extract_features(
            VideoClips(folder / 'videos.json', CLIPS),
            open_codecs(folder / model, image=model == 'i2v'),
            folder / f'features-{model}',
            progress=False,
        )


def config_of(folder, title, device, steps=STEPS):
    "The configuration of a row."
    _, model, words = ROWS[title]
    common = dict(
        weights=str(folder / model),
        layout=Layout(data_parallel='ddp'),
        optim=Optim(lr=1e-3, schedule='constant', clip=1.0),
        dtype='float32',
        device=device,
        loop=Loop(steps=steps, global_batch=4 if model == 'qwen' else 2, micro_batch=2),
    )
    if model == 'qwen':
        plain = Config(
            data=Data(files=(str(folder / 'talks.json'),), media_dir=str(folder), max_length=512, workers=0),
            **common,
        )
    else:
        plain = Config(
            task='wan2_1',
            video=VideoData(features=str(folder / f'features-{model}'), clips=CLIPS, workers=0),
            **common,
        )
    return override(plain, words)


def run(folder, device, titles):
    """Losses and norms of the named rows, on this world's ranks.

    Each rank writes how often it ran which fused operator, and what a real NPU would not like.
    """
    from npu_emulator import calls, doubtful

    from mmkit.parallel.attention import ring_tiles
    from mmkit.trainer.loop import fit

    rectangles = ring_tiles.fused['npu']

    def counted(*arguments):
        tiles = rectangles(*arguments)
        calls['tiles'] += sum(map(len, tiles))
        return tiles

    ring_tiles.fused['npu'] = counted
    # a run folder of its own: one that is there is gone on with
    folder, found, kind = Path(folder), {}, f'{device}-{importlib.util.find_spec("mindspeed") is not None}'
    for title in titles:
        before, strange, records = calls.copy(), doubtful.copy(), []
        for steps in (STEPS // 2, STEPS) if 'resumed' in title else (STEPS,):
            records += fit(
                config_of(folder, title, device, steps), folder / 'runs' / f'{title}-{kind}'.replace(' ', '-')
            )
        (folder / f'{title}-{place().rank}.json').write_text(json.dumps([calls - before, doubtful - strange]))
        found[title] = dict(
            losses=[r.loss for r in records],
            norms=[r.grad_norm for r in records],
            mindspeed='mindspeed' in sys.modules,
        )
    return found


def on_npu(folder):
    return run(folder, 'npu', [title for title, row in ROWS.items() if row[0] == place().world])


def on_cpu(folder):
    return run(
        folder, 'cpu', [title for title, row in ROWS.items() if row[0] == 1 and 'resumed' not in title]
    )


def expected(folder, title, tiles):
    """How often all ranks of a row must call each fused operator, given the tiles of a ring: every layer for
    every micro-batch, on every rank that holds part of its weights or tokens.
    """
    ranks, model, _ = ROWS[title]
    config = config_of(folder, title, 'npu')
    forward = Counter(
        {
            name: (
                count
                * STEPS
                * config.loop.global_batch
                // config.loop.micro_batch
                * config.layout.tp
                * config.layout.cp
            )
            for name, count in A_PASS[model].items()
        }
    )
    # a norm over rows that lie on two ranks has no kernel
    if config.layout.tp > 1 and model != 'qwen':
        del forward['npu_rms_norm']
    calls = forward['npu_rotary_mul'] // A_PASS[model]['npu_rotary_mul']
    # tiles for one call; each rank has its own and another's
    if config.layout.ring > 1:
        forward['npu_fusion_attention'] += AROUND * (max(tiles, 2 * calls) - calls)
    return dict(
        forward
        + Counter({BACKWARD[name]: count for name, count in forward.items()})
        + Counter(_fused_adamw_=GROUPS * STEPS * ranks)
    )


def counts_of(folder, title):
    """What all ranks of a row's last run counted: fused operators, and operators in formats that an NPU
    hardly has.
    """
    ranks = [json.loads((folder / f'{title}-{rank}.json').read_text()) for rank in range(ROWS[title][0])]
    return [sum(map(Counter, found), Counter()) for found in zip(*ranks)]


def judge(title, row, like, ran, strange, wanted):
    "What is wrong with a row beside the CPU's, in words; nothing if it is as it should be."
    rough, adam = 'bfloat16' in title, '_fused_adamw_'
    for what, limit in (('losses', ROUGH if rough else LIMIT), ('norms', 4 * ROUGH if rough else 10 * LIMIT)):
        if not relative(row[what], like[what]) <= limit:
            yield f'{title}: {what} {row[what]} are not {like[what]}'
    if len(row['losses']) != STEPS or strange:
        yield f'{title}: {len(row["losses"])} steps, in formats that an NPU hardly has: {strange}'
    found = {name: count for name, count in ran.items() if name.startswith(('npu_', '_fused'))}
    # every step one call for every weight of a rank; they do not all hold as many
    if row['mindspeed'] and found.get(adam, 0) > wanted[adam] and found[adam] % STEPS == 0:
        found[adam] = wanted[adam]
    if found != wanted:
        yield f'{title}: fused operators ran {found} times, not {wanted}'


def compare(folder, npu, cpu, record_property):
    """Prints how far the NPU's losses and norms are from the CPU's, and which fused operators ran how often
    on all ranks; asserts that they are near and that none was left out.
    """
    rows, wrong = [], []
    for title, row in npu.items():
        like, (ran, strange) = cpu[title if title in cpu else ROWS[title][1]], counts_of(folder, title)
        counts = ' '.join(
            f'{name.removeprefix("npu_")} {ran[name]}'
            for name in sorted(ran)
            if name.startswith(('npu_', '_fused'))
        )
        rows.append(
            [
                title,
                ROWS[title][0],
                len(row['losses']),
                relative(row['losses'], like['losses']),
                relative(row['norms'], like['norms']),
                counts,
            ]
        )
        wrong += judge(title, row, like, ran, strange, expected(folder, title, ran.get('tiles', 0)))
    text = parity.table(
        ['on emulated NPUs', 'ranks', 'steps', 'losses', 'norms', 'fused operators of all ranks'], rows
    )
    record_property(
        'table',
        'Largest relative difference from the CPU,'
        f' {"with" if any(row["mindspeed"] for row in npu.values()) else "without"} MindSpeed\n\n{text}',
    )
    assert not wrong, '\n'.join(wrong)


def test_what_is_wrong_is_said():
    "Not-a-number in the second loss, a step too few, an operator in float64, a tower without its swiglu."
    wanted = dict(npu_swiglu=8, _fused_adamw_=20)
    good = dict(losses=[1.0] * STEPS, norms=[2.0] * STEPS, mindspeed=False)
    assert not list(judge('qwen', good, good, {**wanted, 'allreduce_': 3}, {}, wanted))
    for row, ran, strange in (
        ({'losses': [1.0, float('nan')] * (STEPS // 2)}, wanted, {}),
        ({'losses': [1.0] * (STEPS - 1)}, wanted, {}),
        ({'norms': [2.0, float('nan')] * (STEPS // 2)}, wanted, {}),
        ({}, wanted, {'aten::mul float64': 1}),
        ({}, {**wanted, 'npu_swiglu': 4}, {}),
        ({}, {'npu_swiglu': 8}, {}),
        ({}, {**wanted, '_fused_adamw_': 30}, {}),
    ):
        assert list(judge('qwen', good | row, good, ran, strange, wanted)), (row, ran, strange)


@pytest.fixture(scope='session')
def cpu(tmp_path_factory):
    "Tiny models with their data, and what the rows of one rank give on the CPU."
    folder = tmp_path_factory.mktemp('training')
    write_talks(folder)
    write_videos(folder)
    return folder, parity.on_ranks('npu.test_training', 'on_cpu', folder, 1, 300)


def test_it_learns_on_the_cpu(cpu):
    found = cpu[1]
    assert all(found[model]['losses'][-1] < found[model]['losses'][0] for model in MODELS), found


@pytest.mark.parametrize('ranks', (1, 2))
def test_npus_give_the_losses_of_the_cpu(cpu, ranks, record_property):
    found = parity.on_ranks('npu.test_training', 'on_npu', cpu[0], ranks, 1500)
    assert not any(row['mindspeed'] for row in found.values())
    compare(cpu[0], found, cpu[1], record_property)
