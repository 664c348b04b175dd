"""Tokens per second of one training step: mmkit on one rank beside a plain transformers loop, alternating in
one process.

    python tests/benchmark.py [--steps 12] [--samples 8] [--pictures]

Same weights, same chats (about a third of the tokens trained), fused AdamW, sdpa, float32, one thread on both
sides. transformers gets the chats padded to the longest of the batch, as its users train; only real tokens
are counted.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

WORDS = 'the cat sat on a mat and saw how many red cars drove past its house before noon'.split()


def chats(count, rng, grid):
    """Chats as samples: a question of many words, an answer of half as many that is trained, a picture if
    there is a grid.
    """
    for _ in range(count):
        asked, said = rng.integers(40, 160), rng.integers(20, 80)
        # above the tokens that mark pictures
        yield rng.integers(1000, 4000, asked), rng.integers(1000, 4000, said), grid


def sample(shape, places, asked, said, grid):
    picture = np.full(int(np.prod(grid)) // 4 if grid else 0, shape.image_token)
    ids = np.concatenate([asked[:5], picture, asked[5:], said])
    labels = np.where(np.arange(len(ids)) >= len(ids) - len(said), ids, -100)
    items = np.array([grid] if grid else []).reshape(-1, 3).astype(np.int64)
    ids, labels, items, seconds = (
        torch.from_numpy(ids),
        torch.from_numpy(labels),
        torch.from_numpy(items),
        torch.zeros(len(items)),
    )
    return dict(
        input_ids=ids,
        labels=labels,
        grid=items,
        seconds=seconds,
        pixels=torch.randn(int(items.prod(1).sum()), 1176),
        positions=places(ids, items, seconds),
    )


def padded(samples, pad):
    "The same samples as transformers wants them: rows padded to the longest."

    def rows(name, value):
        return torch.nn.utils.rnn.pad_sequence(
            [s[name] for s in samples], batch_first=True, padding_value=value
        )

    longest = max(len(s['input_ids']) for s in samples)
    places = torch.stack(
        [torch.nn.functional.pad(s['positions'], (0, longest - s['positions'].shape[1])) for s in samples], 1
    )
    mask = torch.stack([torch.arange(longest) < len(s['input_ids']) for s in samples]).long()
    batch = dict(
        input_ids=rows('input_ids', pad),
        labels=rows('labels', -100),
        attention_mask=mask,
        position_ids=places,
    )
    grid = torch.cat([s['grid'] for s in samples])
    return batch | (
        dict(pixel_values=torch.cat([s['pixels'] for s in samples]), image_grid_thw=grid) if len(grid) else {}
    )


def main():
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parse.add_argument('--steps', type=int, default=12)
    parse.add_argument('--samples', type=int, default=8, help='chats in a step')
    parse.add_argument('--pictures', action='store_true', help='every chat has a picture of 224 x 224 pixels')
    args = parse.parse_args()
    torch.set_num_threads(1)

    from transformers import Qwen2_5_VLForConditionalGeneration

    from mmkit.config import Config, Layout, Loop, Optim
    from mmkit.core.device import pick_device
    from mmkit.parallel.data import build_optimizer
    from mmkit.parallel.mesh import open_mesh
    from mmkit.toy.qwen import tiny_qwen2_5_vl
    from mmkit.trainer.loop import build
    from mmkit.trainer.qwen2_5_vl import QwenTask, pack
    from mmkit.trainer.step import train_step

    folder = tiny_qwen2_5_vl(
        Path(tempfile.mkdtemp()) / 'model',
        WORDS,
        hidden=512,
        layers=8,
        heads=8,
        kv_heads=2,
        ffn=1408,
        vocab=4096,
        tied=False,
    )
    config = Config(
        weights=str(folder),
        layout=Layout(data_parallel='ddp'),
        optim=Optim(lr=1e-4),
        loop=Loop(global_batch=args.samples, micro_batch=args.samples),
    )
    mesh, task = open_mesh(config.layout, pick_device('cpu')), QwenTask(config)
    model, wrapped, dtype = build(config, task, mesh)
    optimizer, schedule = build_optimizer(wrapped, config.optim, config.layout, dtype, args.steps)
    twin = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, attn_implementation='sdpa'
    )
    plain = torch.optim.AdamW(twin.parameters(), lr=1e-4, weight_decay=0.0, fused=True)
    rng, grid = np.random.default_rng(0), (1, 16, 16) if args.pictures else None

    def peer(batch):
        loss = twin(**batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(twin.parameters(), 1.0)
        plain.step()
        plain.zero_grad()
        return loss.item()

    ours, theirs, tokens, labelled = [], [], 0, 0
    for step in range(args.steps + 1):  # the first step is for warming up
        samples = [sample(task.shape, task.places, *chat) for chat in chats(args.samples, rng, grid)]
        packed, rows = pack(samples, 1, 0), padded(samples, 0)
        turns = [
            (ours, lambda: train_step(step + 1, wrapped, optimizer, schedule, task, mesh, [packed]).loss),
            (theirs, lambda: peer(rows)),
        ]
        losses = []
        for times, run in turns if step % 2 else turns[::-1]:
            start = time.perf_counter()
            losses.append(run())
            if step:
                times.append(time.perf_counter() - start)
        if step:
            tokens, labelled = tokens + int(packed['tokens']), labelled + int((packed['labels'] >= 0).sum())
        else:
            assert abs(losses[0] - losses[1]) < 1e-4 * losses[0], losses

    def rate(times):
        return tokens / args.steps / statistics.median(times)

    print(
        f'{sum(p.numel() for p in twin.parameters()) / 1e6:.1f} M parameters, {tokens / args.steps:.0f}'
        f' tokens a step, {labelled / tokens:.0%} trained, pictures {bool(grid)}'
    )
    print(
        f'mmkit {rate(ours):.0f} tokens/s, transformers {rate(theirs):.0f} tokens/s, ratio'
        f' {rate(ours) / rate(theirs):.2f}'
    )


if __name__ == '__main__':
    main()
