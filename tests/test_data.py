"""Data: what a record becomes equals what Hugging Face makes of it, cutting never tears a picture, order
depends on nothing but seed and step, and bad files are named.
"""

import functools
import itertools
import json
import os
import pickle
import random
import re
import signal
import subprocess
import sys
from contextlib import closing
from importlib.util import find_spec
from itertools import islice
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from qwen_tokenizer import real_qwen_tokenizer

from mmkit.config import Data
from mmkit.datasets.conversation import Conversations, collate_conversations, encode_prompt, open_encoder
from mmkit.datasets.llava import llava_to_mllm
from mmkit.datasets.media import (
    READERS,
    PatchRule,
    fit_area,
    frame_indices,
    frames_patches,
    grid_size,
    open_image_processor,
    picture_patches,
    picture_rule,
    read_frames,
)
from mmkit.datasets.order import SizeOrder, ordered_batches, shuffled, stream
from mmkit.datasets.turns import BadRecord, Turn, prompt_tokens, share, to_tokens
from mmkit.toy.qwen import (
    conversation_texts,
    emoji_clip,
    emoji_names,
    emoji_picture,
    llava_toy,
    tiny_qwen2_5_vl,
    write_clip,
)

SYSTEM = 'You are a helpful assistant.'


def counted(input_ids, grid, seconds):
    return torch.arange(len(input_ids)).expand(3, -1)


@pytest.fixture(scope='module')
def house(tmp_path_factory):
    "A tiny model folder, emoji pictures with LLaVA's JSON, and one clip."
    folder = tmp_path_factory.mktemp('data')
    pictures, file = llava_toy(folder, emoji_names(4), count=10, chinese=True, text_only=2)
    weights = tiny_qwen2_5_vl(folder / 'tiny', conversation_texts(file))
    write_clip(folder / 'clip.mp4', emoji_clip('car', 'right', frames=16), fps=8)
    return folder, pictures, file, weights


@pytest.fixture(scope='module')
def qwen(tmp_path_factory):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(real_qwen_tokenizer(tmp_path_factory.mktemp('qwen')))


# Tokens and labels, against the real tokenizer's chat template

TALKS = {
    'plain': [('user', 'What is 2+2?'), ('assistant', 'It is 4.')],
    'many turns': [
        ('user', 'Hi'),
        ('assistant', 'Hello! 👋'),
        ('user', 'Write\n\n  two lines'),
        ('assistant', 'one\ntwo\n'),
        ('user', 'thanks'),
        ('assistant', "You're welcome"),
    ],
    'chinese': [('user', '这张图片里有什么？'), ('assistant', '一只猫。\n它在睡觉。')],
    'begins with line breaks': [('user', '\n\n what?'), ('assistant', 'That.')],
    'picture': [
        ('user', '<image>\nWhat is this?'),
        ('assistant', 'A cat.'),
        ('user', 'And <image> this<image>'),
        ('assistant', 'Dogs'),
    ],
    'picture and clip': [('user', 'Compare <video>with <image>.'), ('assistant', 'The clip moves.')],
    'empty answer': [('user', 'Say nothing.'), ('assistant', '')],
}


def chat(tokenizer, talk, system):
    """The whole conversation through apply_chat_template, with spans as long as their grids, and where its
    answers stand.
    """

    def part(text):
        return {'<image>': {'type': 'image'}, '<video>': {'type': 'video'}}.get(
            text, {'type': 'text', 'text': text}
        )

    messages = [{'role': 'system', 'content': system}] + [
        {'role': role, 'content': [part(piece) for piece in re.split('(<image>|<video>)', text) if piece]}
        for role, text in talk
    ]
    text = (
        tokenizer.apply_chat_template(messages, tokenize=False)
        .replace('<|image_pad|>', '<|image_pad|>' * 6)
        .replace('<|video_pad|>', '<|video_pad|>' * 24)
    )
    return text, [
        (m.start(1), m.end(1))
        for m in re.finditer(r'<\|im_start\|>assistant\n(.*?<\|im_end\|>\n)', text, re.S)
    ]


@pytest.mark.parametrize('system', [SYSTEM, 'Antworte kurz.'])
@pytest.mark.parametrize('name', TALKS)
def test_ids_and_labels_equal_the_chat_template(qwen, name, system):
    talk = TALKS[name]
    text, answers = chat(qwen, talk, system)
    whole = qwen(text, add_special_tokens=False, return_offsets_mapping=True)
    marks = ''.join(turn for _, turn in talk)
    made = to_tokens(
        [Turn(*turn) for turn in talk],
        [(1, 4, 6)] * marks.count('<image>'),
        [(4, 4, 6)] * marks.count('<video>'),
        qwen,
        max_length=4096,
        system=system,
    )
    assert made.ids.tolist() == whole['input_ids'] and made.left_out == 0
    trained = [any(begin <= start < end for begin, end in answers) for start, _ in whole['offset_mapping']]
    assert len(answers) == len(talk) // 2 and made.labels.tolist() == [
        i if t else -100 for i, t in zip(whole['input_ids'], trained)
    ]
    assert all(i != qwen.convert_tokens_to_ids('<|image_pad|>') for i in made.labels[made.labels >= 0])


def test_a_prompt_is_the_conversation_up_to_its_answer(qwen):
    talk = [Turn(*turn) for turn in TALKS['picture']]
    grids = [(1, 4, 6)] * 3
    whole = to_tokens(talk, grids, [], qwen, max_length=4096)
    prompt = prompt_tokens(talk[:-1], grids, [], qwen)
    first = len(whole.ids) - len(qwen.encode('Dogs<|im_end|>\n'))
    assert (
        prompt.ids.tolist() == whole.ids[:first].tolist()
        and qwen.decode(prompt.ids[-3:].tolist()) == '<|im_start|>assistant\n'
    )


def test_which_turns_are_trained(qwen):
    talk = [Turn(*turn) for turn in TALKS['picture']]

    def text(**how):
        return qwen.decode(
            [
                i
                for i in to_tokens(talk, [(1, 4, 6)] * 3, [], qwen, max_length=4096, **how).labels.tolist()
                if i >= 0
            ]
        )

    assert text() == 'A cat.<|im_end|>\nDogs<|im_end|>\n' and text(mask_history=True) == 'Dogs<|im_end|>\n'
    assert (
        text(train_on_prompt=True) == f'<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n\nWhat is'
        ' this?<|im_end|>\n<|im_start|>assistant\nA cat.<|im_end|>\n<|im_start|>user\nAnd '
        ' this<|im_end|>\n<|im_start|>assistant\nDogs<|im_end|>\n'
    )


def test_a_text_that_spells_a_placeholder_is_refused(qwen):
    with pytest.raises(BadRecord, match='spells out a token'):
        to_tokens(
            [Turn('user', 'what is <|image_pad|>?'), Turn('assistant', 'a token')],
            [],
            [],
            qwen,
            max_length=99,
        )


# Cutting


def shapes_of_spans(ids, tokenizer):
    "(kind, tokens) of every span in order; any start, pad or end out of place is an error."
    number = tokenizer.convert_tokens_to_ids
    start = number('<|vision_start|>')
    end = number('<|vision_end|>')
    pads = {number('<|image_pad|>'): 'image', number('<|video_pad|>'): 'video'}
    spans, place, ids = [], 0, ids.tolist()
    while place < len(ids):
        if ids[place] == start:
            stop = ids.index(end, place)
            # a KeyError is a span with something else in it
            kinds = {pads[i] for i in ids[place + 1 : stop]}
            assert len(kinds) == 1
            spans.append((kinds.pop(), stop - place - 1))
            place = stop
        else:
            assert ids[place] not in pads and ids[place] != end
        place += 1
    return spans


def test_no_budget_tears_a_span(qwen):
    draw = random.Random(0)
    counts = {'whole': 0, 'cut': 0, 'refused': 0}
    for case in range(60):  # noqa: B007

        def words():
            return ' '.join(
                draw.choice(['picture', 'of', '猫', 'the', 'red', 'car.\n'])
                for _ in range(draw.randrange(1, 40))
            )

        turns, images, videos = [], [], []
        for _ in range(draw.randrange(1, 4)):
            pieces = [words()]
            for _ in range(draw.randrange(3)):
                kind = draw.choice(['image', 'video'])
                (images if kind == 'image' else videos).append(
                    (
                        1 if kind == 'image' else draw.randrange(1, 4),
                        2 * draw.randrange(1, 5),
                        2 * draw.randrange(1, 5),
                    )
                )
                pieces += [f'<{kind}>', words()]
            turns += [Turn('user', ''.join(pieces)), Turn('assistant', words())]
        grids = {'image': images, 'video': videos}
        size = len(to_tokens(turns, images, videos, qwen, max_length=10**6).ids)
        for max_length in {*draw.sample(range(8, size + 10), 12), size, size - 1}:
            history = draw.random() < 0.5
            try:
                made = to_tokens(turns, images, videos, qwen, max_length=max_length, mask_history=history)
            except BadRecord as error:
                assert 'raise data.max_length' in str(error)
                counts['refused'] += 1
                continue
            wanted = [(kind, int(np.prod(grids[kind][i])) // 4) for kind, i in made.media]
            assert (
                shapes_of_spans(made.ids, qwen) == wanted
                and len(made.ids) <= max_length
                and len(made.ids) + made.left_out == size
            )
            assert (made.labels >= 0).any() and ((made.labels == made.ids) | (made.labels == -100)).all()
            heads = qwen.decode(made.ids.tolist())
            # every kept answer still has its header
            assert heads.count('<|im_start|>assistant\n') == heads.count('<|im_start|>user\n') >= 1
            counts['whole' if made.left_out == 0 else 'cut'] += 1
    assert min(counts.values()) > 20, counts


def budget(question, answer, room):
    "MindSpeed-MM's rule for a pair of lengths, in its order of questions."
    if 2 * answer >= room:
        answer = min(answer, room - question if 2 * question < room else room * answer // (question + answer))
    return min(question, room - answer), answer


def test_text_is_cut_to_the_lengths_of_the_budget_rule(qwen):
    "Each pair gets its share of what is left."
    for question, answer, room in itertools.product(range(1, 40, 3), range(1, 40, 3), range(2, 60)):
        assert share(question, answer, room) == budget(question, answer, room)
    talk = [
        Turn('user', 'why ' * 30),
        Turn('assistant', 'because ' * 10),
        Turn('user', 'so ' * 10),
        Turn('assistant', 'yes ' * 60),
    ]
    lengths = [
        len(qwen.encode(text))
        for text in (
            f'<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n{talk[0].content}<|im_end|>\n<|im_start|>assistant\n',
            f'{talk[1].content}<|im_end|>\n',
            f'<|im_start|>user\n{talk[2].content}<|im_end|>\n<|im_start|>assistant\n',
            f'{talk[3].content}<|im_end|>\n',
        )
    ]
    for max_length in range(40, sum(lengths) + 5):
        left, wanted = max_length, 0
        for question, answer in ((lengths[0], lengths[1]), (lengths[2], lengths[3])):
            # 8 tokens of template and one of the answer are the least
            if left - 8 <= 0:
                break
            asked, answered = budget(question, answer, left)
            wanted, left = wanted + asked + answered, left - asked - answered
        assert len(to_tokens(talk, [], [], qwen, max_length=max_length).ids) == wanted


# LLaVA to mllm


def test_llava_to_mllm(tmp_path, monkeypatch):
    images = tmp_path / 'COCO2017'
    images.mkdir()
    (images / '000000033471.jpg').write_bytes(b'.')
    turns = [
        {'from': 'human', 'value': '<image>\nWas ist das? 是什么'},
        {'from': 'gpt', 'value': ' A bus.\n'},
    ]
    records = [
        {'id': '000000033471', 'image': '000000033471.jpg', 'conversations': turns},
        {'id': 't', 'conversations': turns[1:]},
        {'id': 'e', 'image': '', 'conversations': turns},
        {'id': 'm', 'image': 'gone.jpg', 'conversations': turns},
        {'id': 'r', 'conversations': [{'from': 'judge', 'value': 'x'}]},
        {'id': 'n'},
        'text',
        {'id': 'l', 'image': ['a.jpg'], 'conversations': turns},
        {'id': 'v', 'conversations': [{'from': 'gpt', 'value': 7}]},
    ]
    (tmp_path / 'in.json').write_text(json.dumps(records), encoding='utf-8')
    monkeypatch.chdir(tmp_path)
    report = llava_to_mllm('in.json', 'out.json', './COCO2017')
    said = [
        {'role': 'user', 'content': '<image>\nWas ist das? 是什么'},
        {'role': 'assistant', 'content': ' A bus.\n'},
    ]
    assert json.loads(Path('out.json').read_text(encoding='utf-8')) == [
        {'images': ['./COCO2017/000000033471.jpg'], 'messages': said},
        {'images': [], 'messages': said[1:]},
        {'images': [], 'messages': said},
    ]
    assert '是什么' in Path('out.json').read_text(encoding='utf-8') and report.kept == 3
    assert [(d.index, d.id) for d in report.dropped] == [
        (3, 'm'),
        (4, 'r'),
        (5, 'n'),
        (6, ''),
        (7, 'l'),
        (8, 'v'),
    ]
    for drop, words in zip(
        report.dropped,
        (
            'no file ./COCO2017/gone.jpg',
            "unknown role 'judge'",
            'no conversations',
            'not an object',
            'image is not a string',
            'no text',
        ),
    ):
        assert words in drop.reason
    assert 'gone.jpg' in str(report) and 'gone.jpg' in report._repr_markdown_()
    before = Path('out.json').read_bytes()
    Path('in.json').write_text('broken')
    with pytest.raises(ValueError, match='out.json exists already'):  # noqa: RUF043
        llava_to_mllm('in.json', 'out.json', './COCO2017')
    assert Path('out.json').read_bytes() == before and sorted(os.listdir()) == [
        'COCO2017',
        'in.json',
        'out.json',
    ]


# Pictures and clips


def test_pictures_equal_hugging_faces(house):
    """Our cutting of frames, fed with a still picture that needs no resize, is Hugging Face's of the picture.

    With a resize it is near.
    """
    processor = open_image_processor(house[3])
    rule = picture_rule(processor)
    assert rule == PatchRule(low=3136, high=12845056)
    for size in ((56, 84), (112, 112), (100, 130), (31, 200), (300, 77)):
        picture = emoji_picture('cat', str(size), 320).resize(size[::-1])
        expected, grid = picture_patches(picture, processor)
        made, found, _ = frames_patches(np.stack([np.asarray(picture)] * 2), rule)
        assert (
            grid == found
            and expected.dtype == made.dtype == np.float32
            and expected.shape == (grid[1] * grid[2], 1176)
        )
        # PIL's and torch's bicubic round differently
        assert np.abs(made - expected).max() < (1e-6 if size[0] % 28 == size[1] % 28 == 0 else 0.05)


def test_the_size_rule_is_hugging_faces(house):
    processor, draw = open_image_processor(house[3]), random.Random(0)
    theirs = sys.modules[type(processor).__module__].smart_resize
    for _ in range(2000):
        size = (draw.randrange(28, 4000), draw.randrange(28, 4000))
        limits = draw.choice([(3136, 12845056), (100352, 602112), (3136, 50000)])
        assert grid_size(*size, 28, *limits) == tuple(theirs(*size, 28, *limits))


def test_sizes_of_pictures_stay_within_what_the_model_takes(house):
    from PIL import Image

    processor = open_image_processor(house[3])
    for size in ((1, 1), (9000, 3), (3, 9000), (5000, 4000), (28, 5600), (27, 29)):
        fitted = fit_area(Image.new('RGB', size), 0, 262144)
        assert min(fitted.size) >= 28 and max(fitted.size) / min(fitted.size) <= 200
        grid = picture_patches(fitted, processor)[1]
        assert grid[1] % 2 == grid[2] % 2 == 0


HF_VIDEO = """
import sys, torch
library = torch.library.Library('torchvision', 'DEF')               # a torchvision built for another torch lacks its operators; none of them is needed
for name in ('nms', 'qnms'):
    try: library.define(f'{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor')
    except RuntimeError: pass
import numpy as np
from transformers import Qwen2VLVideoProcessor
saved = np.load(sys.argv[1]); made = {}
for name in saved.files:
    low, high = (100352, 602112) if 'grown' in name else (3136, 20000) if 'shrunk' in name else (3136, 12845056)
    processor = Qwen2VLVideoProcessor(size=dict(shortest_edge=low, longest_edge=high))
    if not hasattr(processor, 'cap_pixels_per_frame'): capped = {}
    else: capped = dict(cap_pixels_per_frame=False)
    out = processor(videos=[torch.from_numpy(saved[name]).permute(0, 3, 1, 2)], do_sample_frames=False, return_tensors='pt', **capped)
    made[name] = out['pixel_values_videos'].numpy(); made[name + ' grid'] = out['video_grid_thw'].numpy()[0]
np.savez(sys.argv[2], **made)
"""  # noqa: E501


@pytest.fixture(scope='module')
def torchvision(tmp_path_factory):
    """A folder with the torchvision that belongs to this torch.

    It stays out of this process, where it would change what transformers imports.
    """
    if spec := find_spec('torchvision'):
        return Path(spec.origin).parents[1]
    # torch 2.7 goes with torchvision 0.22
    version = f'0.{int(torch.__version__.split(".")[1]) + 15}.*'
    folder = tmp_path_factory.mktemp('torchvision')
    done = subprocess.run(
        [
            sys.executable,
            '-m',
            'pip',
            'install',
            '-q',
            '--no-deps',
            '--target',
            str(folder),
            f'torchvision=={version}',
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    if done.returncode:
        pytest.skip(f"Hugging Face's video processor needs torchvision {version}: {done.stderr[-200:]}")
    return folder


def test_clips_equal_hugging_faces(torchvision, tmp_path):
    draw = np.random.RandomState(0)
    clips = {
        'even': draw.randint(0, 256, (4, 56, 84, 3)),
        'odd': draw.randint(0, 256, (5, 112, 28, 3)),
        'resized': draw.randint(0, 256, (2, 100, 130, 3)),
        'grown': draw.randint(0, 256, (2, 64, 64, 3)),
        'shrunk': draw.randint(0, 256, (4, 300, 200, 3)),
        'emoji shrunk': emoji_clip('dog', 'left', frames=6, size=200),
    }
    clips = {name: clip.astype(np.uint8) for name, clip in clips.items()}
    np.savez(tmp_path / 'in.npz', **clips)
    done = subprocess.run(
        [sys.executable, '-c', HF_VIDEO, str(tmp_path / 'in.npz'), str(tmp_path / 'out.npz')],
        capture_output=True,
        text=True,
        env={
            **os.environ,
            'PYTHONPATH': os.pathsep.join(filter(None, [str(torchvision), os.environ.get('PYTHONPATH')])),
        },
    )
    assert done.returncode == 0, done.stderr[-2000:]
    expected = np.load(tmp_path / 'out.npz')
    for name, clip in clips.items():
        rule = (
            PatchRule(low=100352, high=602112)
            if 'grown' in name
            else PatchRule(low=3136, high=20000)
            if 'shrunk' in name
            else PatchRule(low=3136, high=12845056)
        )
        patches, grid, _ = frames_patches(clip, rule)
        # to the bit, resize included
        assert grid == tuple(expected[name + ' grid']) and np.array_equal(patches, expected[name]), name


@pytest.mark.parametrize('reader', READERS)
def test_the_asked_frames_come(house, tmp_path, reader):
    "Frames carry their number as a grey level; long groups of pictures, so that every seek has to decode."
    frames = np.stack([np.full((32, 64, 3), 10 + 2 * number, np.uint8) for number in range(100)])
    write_clip(tmp_path / 'grey.mp4', frames, fps=25)
    read = read_frames(tmp_path / 'grey.mp4', [0, 99, 7, 50, 7], readers=[reader])
    assert np.abs(read.pixels.mean((1, 2, 3)) - [10, 208, 24, 110, 24]).max() < 1.5
    sampled = read_frames(tmp_path / 'grey.mp4', video_fps=2.0, readers=[reader])
    assert len(sampled.pixels) == 8 and sampled.fps == 2.0  # 4 seconds
    odd = read_frames(tmp_path / 'grey.mp4', video_fps=0.75, readers=[reader])
    # 3 frames and the last again
    assert len(odd.pixels) == 4 and odd.fps == 0.75 and (odd.pixels[2] == odd.pixels[3]).all()


def test_indices_follow_the_rule():
    for total in (1, 2, 5, 30, 100, 999):
        for seconds in (0.01, 1.0, 7.3, 100.0):
            for fps, most in ((2.0, 64), (0.5, 7), (30.0, 16)):
                count = min(total, most, max(1, int(seconds * fps)))
                wanted = [int(x) for x in np.linspace(0, total - 1, count)]
                assert frame_indices(total, seconds, fps, most).tolist() == wanted + wanted[-1:] * (count % 2)


# Bad records


def test_bad_records_are_named_and_the_rest_is_used(house, tmp_path):
    folder, pictures, _, weights = house
    good = (pictures / '000000000000.jpg').read_bytes()
    for name, content in {
        'cut.jpg': good[: len(good) // 2],
        'zero.mp4': b'',
        'text.mp4': b'not a clip at all',
        'text.jpg': b'text',
        'good.jpg': good,
    }.items():
        (tmp_path / name).write_bytes(content)
    clip = (folder / 'clip.mp4').read_bytes()
    (tmp_path / 'cut.mp4').write_bytes(clip[: len(clip) // 2])

    def talk(text, *more, **media):
        return {
            'messages': [{'role': 'user', 'content': text}, {'role': 'assistant', 'content': 'Yes.'}, *more],
            **media,
        }

    seen_at_once = {
        'no file lost.jpg': talk('<image>', images=['lost.jpg']),
        'no file lost.mp4': talk('<video>', videos=['lost.mp4']),
        '2 marks <image> in the text but 1 files': talk('<image><image>', images=['good.jpg']),
        '0 marks <image> in the text but 1 files': talk('', images=['good.jpg']),
        'must alternate': talk('', {'role': 'assistant', 'content': 'No.'}),
        'its answer is missing': talk('', {'role': 'user', 'content': 'Why?'}),
        "unknown role 'judge'": talk('', {'role': 'judge', 'content': 'x'}),
        'no turns': {'messages': []},
        'has no text': talk(None),
        'not a file name': talk('<image>', images=[7]),
        'not an object': 'x',
    }
    seen_later = {
        'cut.jpg: image file is truncated': talk('<image>', images=['cut.jpg']),
        'zero.mp4: decord: ': talk('<video>', videos=['zero.mp4']),
        'text.mp4: decord: ': talk('<video>', videos=['text.mp4']),
        'cut.mp4: decord: ': talk('<video>', videos=['cut.mp4']),
        'text.jpg: cannot identify': talk('<image>', images=['text.jpg']),
        'spells out a token': talk('<|video_pad|>'),
    }
    usable = [
        talk('<image>', images=['good.jpg']),
        talk('<video>', videos=[str(folder / 'clip.mp4')]),
        talk('Text.'),
    ]
    records = [*usable[:1], *seen_at_once.values(), *usable[1:2], *seen_later.values(), *usable[2:]]
    (tmp_path / 'data.json').write_text(json.dumps(records))
    dataset = Conversations(
        Data(files=(str(tmp_path / 'data.json'),), media_dir=str(tmp_path)), weights, counted
    )
    assert dataset.report.kept == len(dataset) == len(usable) + len(seen_later)
    assert [d.index for d in dataset.report.dropped] == list(range(1, 1 + len(seen_at_once)))
    for drop, words in zip(dataset.report.dropped, seen_at_once):
        assert words in drop.reason
    samples = list(dataset)
    assert [i for i, sample in enumerate(samples) if 'replaced' in sample] == list(
        range(2, 2 + len(seen_later))
    )
    for sample, words in zip(samples[2:], seen_later):
        assert words in sample['replaced'][1] and sample['replaced'][1].startswith('data.json[')
        assert torch.equal(sample['input_ids'], samples[-1]['input_ids'])
    assert (
        samples[0]['grid'].tolist() == [[1, 8, 8]]
        and samples[1]['grid'].tolist() == [[2, 4, 4]]
        and samples[1]['seconds'].tolist() == [1.0]
    )


def test_a_replacement_reaches_the_trainer_through_workers(house, tmp_path):
    _, pictures, _, weights = house

    def talk(name):
        return {
            'messages': [{'role': 'user', 'content': '<image>'}, {'role': 'assistant', 'content': 'Yes.'}],
            'images': [name],
        }

    (tmp_path / 'cut.jpg').write_bytes((pictures / '000000000000.jpg').read_bytes()[:600])
    (tmp_path / 'data.jsonl').write_text(
        '\n'.join(
            json.dumps(talk(name))
            for name in ('000000000001.jpg', str(tmp_path / 'cut.jpg'), '000000000002.jpg')
        )
    )
    dataset = Conversations(
        Data(files=(str(tmp_path / 'data.jsonl'),), media_dir=str(pictures)), weights, counted
    )
    for workers in (0, 2):
        with closing(
            stream(dataset, ordered_batches(3, 3, 3, shuffle=False), collate_conversations, workers)
        ) as steps:
            batch = next(steps)[0]
        assert (
            len(batch.replaced) == 1
            and batch.replaced[0][0] == 1
            and 'cut.jpg' in batch.replaced[0][1]
            and batch['lengths'][1] == batch['lengths'][2]
        )


def test_nothing_usable_is_one_error(house, tmp_path):
    (tmp_path / 'data.json').write_text(json.dumps([{'messages': []}] * 3))
    with pytest.raises(ValueError, match='none of the 3 records'):
        Conversations(Data(files=(str(tmp_path / 'data.json'),)), house[3], counted)
    (tmp_path / 'cut.jpg').write_bytes(b'x')
    (tmp_path / 'data.json').write_text(
        json.dumps(
            [
                {
                    'messages': [
                        {'role': 'user', 'content': '<image>'},
                        {'role': 'assistant', 'content': 'y'},
                    ],
                    'images': ['cut.jpg'],
                }
            ]
            * 3
        )
    )
    dataset = Conversations(
        Data(files=(str(tmp_path / 'data.json'),), media_dir=str(tmp_path)), house[3], counted
    )
    with pytest.raises(BadRecord, match='none of the 3 records can be read'):
        dataset[1]


def test_pictures_too_large_for_the_length_say_what_to_change(house, tmp_path):
    _, pictures, file, weights = house
    record = json.loads(file.read_text(encoding='utf-8'))[0]
    (tmp_path / 'one.json').write_text(json.dumps([record]))
    dataset = Conversations(
        Data(files=(str(tmp_path / 'one.json'),), media_dir=str(pictures), max_length=24), weights, counted
    )
    with pytest.raises(
        BadRecord,
        match='take 18 tokens .* raise data.max_length or lower data.image_max_pixels',  # noqa: RUF043
    ):
        dataset[0]


def test_a_mistake_in_code_is_no_bad_record(house):
    _, pictures, file, weights = house

    def wrong(input_ids, grid, seconds):
        raise ValueError('a bug')

    with pytest.raises(ValueError, match='^a bug$'):  # noqa: RUF043
        Conversations(Data(files=(str(file),), media_dir=str(pictures)), weights, wrong)[0]


# The dataset


def test_files_spellings_and_limits(house, tmp_path):
    _, pictures, file, weights = house
    llava_to_mllm(file, tmp_path / 'mllm.json', pictures)
    (tmp_path / 'lines.jsonl').write_text(
        '\n'.join(
            json.dumps(record, ensure_ascii=False) for record in json.loads(file.read_text(encoding='utf-8'))
        ),
        encoding='utf-8',
    )

    def opened(*files, **how):
        return Conversations(Data(files=files, media_dir=str(pictures), **how), weights, counted)

    three = [opened(str(file)), opened(str(tmp_path / 'mllm.json')), opened(str(tmp_path / 'lines.jsonl'))]
    for a, b, c in zip(*three):
        assert all(torch.equal(a[name], b[name]) and torch.equal(a[name], c[name]) for name in a)
    assert (
        len(opened(f'{file},{tmp_path / "mllm.json"}'))
        == len(opened(str(file), str(tmp_path / 'mllm.json')))
        == 24
    )
    assert len(opened(str(file), max_samples=5)) == 5 and len(opened(str(file), max_samples=500)) == 12


def test_a_dataset_can_be_sent_to_a_new_process(house):
    _, pictures, file, weights = house
    dataset = Conversations(Data(files=(str(file),), media_dir=str(pictures)), weights, counted)
    sent = pickle.loads(pickle.dumps(dataset))
    assert all(torch.equal(a, b) for a, b in zip(dataset[3].values(), sent[3].values()))


def test_a_prompt_of_pictures_and_a_clip(house):
    folder, pictures, _, weights = house
    encoder = open_encoder(weights)
    asked = encode_prompt(
        'What?', [emoji_picture('cat', 1)], [folder / 'clip.mp4'], encoder=encoder, positions=counted
    )
    ids, number = asked['input_ids'].tolist(), encoder.tokenizer.convert_tokens_to_ids
    assert (
        ids.count(number('<|image_pad|>')) == 16
        and ids.count(number('<|video_pad|>')) == 8
        and asked['grid'].tolist() == [[1, 8, 8], [2, 4, 4]]
    )
    with pytest.raises(BadRecord, match='1 marks <image> in the text but 2 files'):
        encode_prompt('<image>?', ['a.jpg', 'b.jpg'], encoder=encoder)


@pytest.mark.parametrize('multiple', [1, 16])
def test_a_batch_is_its_samples_end_to_end(house, multiple):
    _, pictures, file, weights = house
    dataset = Conversations(Data(files=(str(file),), media_dir=str(pictures)), weights, counted)
    samples = [dataset[i] for i in (0, 11, 3)]
    batch = collate_conversations(samples, multiple, pad=dataset.encoder.pad)
    assert (
        len(batch['input_ids'])
        == batch['lengths'].sum()
        == len(batch['labels'])
        == batch['positions'].shape[1]
        == len(batch['samples'])
        and len(batch['input_ids']) % multiple == 0
    )
    for number, (sample, ids, labels, places) in enumerate(
        zip(
            samples,
            *(
                batch[name].split(batch['lengths'].tolist(), -1)
                for name in ('input_ids', 'labels', 'positions')
            ),
        )
    ):
        assert (
            torch.equal(ids, sample['input_ids'])
            and torch.equal(places, sample['positions'])
            and labels[-1] == -100
            and torch.equal(labels[:-1], sample['labels'][1:])
        )
        assert (batch['samples'] == number).sum() == len(ids)
    assert (
        torch.equal(batch['pixels'], torch.cat([samples[0]['pixels'], samples[2]['pixels']]))
        and batch['grid'].tolist() == [[1, 8, 8]] * 2
    )
    assert (batch['labels'][sum(len(s['input_ids']) for s in samples) :] == -100).all()


# Order

SPLITS = [(1, 1), (1, 12), (2, 3), (3, 2), (4, 1), (6, 2), (12, 1)]


def test_a_step_holds_the_same_samples_for_every_split():
    for count, step in ((7, 3), (100, 0), (100, 8), (100, 9), (5, 50)):
        held = {
            tuple(
                sorted(
                    i
                    for rank in range(ranks)
                    for micro in ordered_batches(count, 12, each, rank, ranks, seed=5).step(step)
                    for i in micro
                )
            )
            for ranks, each in SPLITS
        }
        assert len(held) == 1 and len(held.pop()) == 12
    for ranks, each in SPLITS:
        parts = ordered_batches(100, 12, each, 0, ranks).step(0)
        assert len(parts) == 12 // (ranks * each) and all(len(micro) == each for micro in parts)


def test_every_epoch_holds_every_sample_once_and_seeds_differ():
    def row(seed, steps):
        return [
            i for step in islice(ordered_batches(13, 4, seed=seed), steps) for micro in step for i in micro
        ]

    assert all(sorted(row(0, 13)[start : start + 13]) == list(range(13)) for start in (0, 13, 26, 39))
    assert row(0, 13)[:13] != row(0, 13)[13:26] and row(0, 13) != row(1, 13) and row(0, 13) == row(0, 13)


def test_resuming_gives_the_tail():
    whole = list(islice(ordered_batches(10, 4, 2, 1, 2, seed=3), 12))
    for first in (1, 5, 11):
        assert (
            list(islice(ordered_batches(10, 4, 2, 1, 2, seed=3, first_step=first), 12 - first))
            == whole[first:]
        )
    # no walk through the steps before
    assert ordered_batches(10**6, 512, seed=3).step(10**5)


def waiting_lists(sizes, whole, seed, epochs):
    """For every epoch the steps it fills, walked clip by clip: each waits until a global batch of its size is
    there.
    """
    waiting = {size: [] for size in sizes}
    for epoch in range(epochs):
        steps = []
        for size in waiting:
            row = [number for number, its in enumerate(sizes) if its == size]
            for place in shuffled(len(row), seed, epoch):
                waiting[size].append(row[place])
                if len(waiting[size]) == whole:
                    steps.append(waiting[size])
                    waiting[size] = []
        yield steps


def test_steps_of_one_size_are_full_waiting_lists():
    for seed in range(20):
        choose = random.Random(seed)
        sizes = choose.choices(
            [(1, 6, 6), (3, 6, 6), (3, 4, 8), (5, 2, 2)], (40, 10, 3, 1), k=choose.randint(1, 60)
        )
        whole = choose.choice((1, 2, 6, 12, 64))
        steps = map(SizeOrder(sizes=sizes, global_batch=whole, seed=seed).samples, itertools.count())
        for wanted in waiting_lists(sizes, whole, seed, 70):
            assert sorted(islice(steps, len(wanted))) == sorted(wanted)


def test_a_run_of_an_older_version_goes_on_with_the_same_samples():
    assert ordered_batches(11, 8, seed=3).samples(5) == [4, 1, 10, 6, 9, 1, 3, 10]
    assert list(
        map(SizeOrder(sizes=[(1, 6, 6)] * 5 + [(3, 6, 6)] * 4, global_batch=4, seed=3).samples, range(6))
    ) == [[5, 6, 8, 7], [1, 4, 2, 0], [3, 1, 0, 3], [8, 7, 5, 6], [2, 4, 3, 0], [8, 5, 7, 6]]


@pytest.mark.parametrize(
    'wrong, words',
    [
        (dict(micro_batch=3, dp_size=2), 'use 6, or 12'),
        (dict(dp_rank=2, dp_size=2), 'dp_rank=2'),
        (dict(count=0), 'no samples'),
        (dict(micro_batch=0), 'at least 1'),
        (dict(first_step=-1), 'first_step'),
    ],
)
def test_an_order_that_cannot_be_is_refused(wrong, words):
    with pytest.raises(ValueError, match=words):
        ordered_batches(**{'count': 20, 'global_batch': 8, **wrong})


def test_workers_change_nothing(house, tmp_path):
    "Clips too, although the parent has opened one before its workers are forked."
    folder, pictures, file, weights = house
    clips = [
        {
            'messages': [{'role': 'user', 'content': '<video>'}, {'role': 'assistant', 'content': 'A car.'}],
            'videos': [str(folder / 'clip.mp4')],
        }
    ] * 4
    (tmp_path / 'clips.json').write_text(json.dumps(clips))
    dataset = Conversations(
        Data(files=(str(file), str(tmp_path / 'clips.json')), media_dir=str(pictures)), weights, counted
    )
    order = ordered_batches(len(dataset), 4, 2, seed=1)
    collate = functools.partial(collate_conversations, multiple=8)
    runs = []
    for workers, first in ((0, 0), (1, 0), (2, 0), (2, 3)):
        with closing(stream(dataset, order, collate, workers, first_step=first)) as steps:
            runs.append(list(islice(steps, 5 - first)))
    assert [len(step) for step in runs[0]] == [2] * 5
    for run in (*runs[1:3], [*runs[0][:3], *runs[3]]):
        for mine, theirs in zip(runs[0], run, strict=True):
            for a, b in zip(mine, theirs, strict=True):
                assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class Failing:
    "Sample 9 raises."

    def __len__(self):
        return 20

    def __getitem__(self, i):
        if i == 9:
            raise KeyError('sample 9')
        return i


def workers_alive():
    return [
        p
        for p in psutil.Process().children(recursive=True)
        if p.status() != psutil.STATUS_ZOMBIE and 'multiprocessing.' not in ' '.join(p.cmdline())
    ]


def test_no_worker_outlives_its_stream():
    order = ordered_batches(20, 4, shuffle=False)
    with pytest.raises(KeyError, match='sample 9'), closing(stream(Failing(), order, list, 2)) as steps:
        for _ in steps:
            pass
    assert not workers_alive()
    with pytest.raises(KeyboardInterrupt), closing(stream(range(20), order, list, 2)) as steps:
        next(steps)
        assert len(workers_alive()) == 2
        signal.raise_signal(signal.SIGINT)
    assert not workers_alive()
