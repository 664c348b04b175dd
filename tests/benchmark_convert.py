"""Time and memory of conversions beside `cp` of the same bytes and beside loading everything and saving it
again.

    python tests/benchmark_convert.py [--model qwen-3b|qwen-72b|wan-1.3b|wan-14b] [--layers N] [--rounds 3]
[--warm] [--sparse] [--no-naive] [--folder DIR] [--report]

It ends with code 1 and a sentence for each when a direction takes more than 1.7 times `cp` (median of the
rounds) or 2 times the largest tensor in memory; with --report it only shows them.

A folder with the real shapes of the model is made first. Then, every round in one order: `cp -r`, Hugging
Face to MindSpeed-MM (tp2 pp2; Wan pp2), back again, and both ways by load and save. Every turn begins with a
synced, idle disk and with its source out of the page cache (--warm: in it) and ends with a sync; its time is
that of the whole command, with the start of Python. Memory is what no file stands behind in /proc/PID/statm,
every 20 ms, above what the process has when everything is imported: page cache and mapped files do not count,
copies of tensors do. --sparse writes no data into the source, so that huge ones fit (no cp then).
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil
import torch

from mmkit.converters.qwen2_5_vl import qwen2_5_vl_towers
from mmkit.converters.wan2_1 import wan2_1_towers
from mmkit.converters.weights import pieces
from mmkit.converters.writing import SafetensorsWriter

VISION = dict(
    depth=32,
    hidden_size=1280,
    intermediate_size=3420,
    num_heads=16,
    patch_size=14,
    temporal_patch_size=2,
    spatial_merge_size=2,
    in_channels=3,
)
WAN = dict(
    _class_name='WanTransformer3DModel',
    attention_head_dim=128,
    in_channels=16,
    out_channels=16,
    text_dim=4096,
    freq_dim=256,
    patch_size=[1, 2, 2],
)
MODELS = {
    'qwen-3b': dict(
        hidden_size=2048,
        intermediate_size=11008,
        num_hidden_layers=36,
        num_attention_heads=16,
        num_key_value_heads=2,
        vocab_size=151936,
        tie_word_embeddings=True,
        vision_config=VISION | dict(out_hidden_size=2048),
    ),
    'qwen-72b': dict(
        hidden_size=8192,
        intermediate_size=29568,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        vocab_size=152064,
        tie_word_embeddings=False,
        vision_config=VISION | dict(intermediate_size=3456, out_hidden_size=8192),
    ),
    'wan-1.3b': WAN | dict(num_attention_heads=12, ffn_dim=8960, num_layers=30),
    'wan-14b': WAN | dict(num_attention_heads=40, ffn_dim=13824, num_layers=40),
}
SHARD = 4_000_000_000


def towers_of(config):
    return wan2_1_towers(config) if '_class_name' in config else qwen2_5_vl_towers(config)


def make(folder, config, sparse):
    "A folder with every tensor of the model, in files of at most 4 GB, and the size of its largest tensor."
    wan = '_class_name' in config
    dtype = torch.float32 if wan else torch.bfloat16
    tensors = dict(
        pair
        for chunk in pieces(towers_of(config))
        for piece in chunk
        if not piece.rule.copy
        for pair in zip(piece.hf, piece.rule.shapes)
    )
    files, room = [{}], SHARD
    for name, shape in tensors.items():
        size = torch.Size(shape).numel() * dtype.itemsize
        if size > room and files[-1]:
            files, room = [*files, {}], SHARD
        files[-1][name], room = (dtype, shape), room - size
    folder.mkdir()
    (folder / 'config.json').write_text(json.dumps(config))
    stem = 'diffusion_pytorch_model' if wan else 'model'
    names = [f'{stem}-{n:05d}-of-{len(files):05d}.safetensors' for n in range(1, len(files) + 1)]
    noise = torch.randn(1 << 23).to(dtype)
    for name, held in zip(names, files):
        writer = SafetensorsWriter(folder / name, held)
        if sparse:
            os.truncate(
                folder / name,
                max(
                    offset + dtype.itemsize * torch.Size(shape).numel()
                    for offset, dtype, shape in writer.places.values()
                ),
            )
            writer.file.close()
            continue
        for number, (own, (_, shape)) in enumerate(held.items()):
            count = torch.Size(shape).numel()
            # every tensor begins elsewhere
            writer.write(own, noise.roll(977 * number).repeat(-(-count // len(noise)))[:count].reshape(shape))
        writer.close()
    (folder / f'{stem}.safetensors.index.json').write_text(
        json.dumps(
            dict(metadata={}, weight_map={own: name for name, held in zip(names, files) for own in held})
        )
    )
    return max(torch.Size(shape).numel() * dtype.itemsize for shape in tensors.values())


# The naive way: load everything, cut it in four, save the parts; load them all, join them, save it again


def naive_to_mm(source, target):
    from safetensors import safe_open

    tensors = {}
    for file in sorted(source.glob('*.safetensors')):
        with safe_open(file, 'pt') as opened:
            tensors |= {name: opened.get_tensor(name).clone() for name in opened.keys()}
    names = list(tensors)
    for stage, held in enumerate((names[: len(names) // 2], names[len(names) // 2 :])):
        for rank in range(2):
            folder = target / 'release' / f'mp_rank_{rank:02d}_{stage:03d}'
            folder.mkdir(parents=True)

            def part(x):
                return x.chunk(2)[rank].clone() if x.dim() > 1 and len(x) % 2 == 0 else x

            torch.save({'model': {name: part(tensors[name]) for name in held}}, folder / 'model_optim_rng.pt')


def naive_to_hf(source, target, pattern):
    from safetensors.torch import save_file

    read = {
        (rank, stage): torch.load(
            source / 'release' / f'mp_rank_{rank:02d}_{stage:03d}' / 'model_optim_rng.pt', weights_only=True
        )['model']
        for stage in range(2)
        for rank in range(2)
    }
    whole = {
        name: torch.cat([x, read[1, stage][name]]) if x.dim() > 1 else x
        for stage in range(2)
        for name, x in read[0, stage].items()
    }
    target.mkdir()
    index = json.loads(next(pattern.glob('*.index.json')).read_text())['weight_map']
    for file in sorted(set(index.values())):
        save_file({name: whole[name] for name, place in index.items() if place == file}, target / file)


# One turn


def bytes_in(folder):
    return sum(path.stat().st_blocks * 512 for path in folder.rglob('*') if path.is_file())


def settle(source, warm):
    """Puts the machine into the state in which every turn begins: nothing to write, nothing under way on a
    disk (what a deleted folder leaves to do takes seconds).
    """
    os.sync()
    busy, quiet = None, 0
    while quiet < 5 and psutil.disk_io_counters():
        time.sleep(0.2)
        now = psutil.disk_io_counters()
        busy, quiet = now, (quiet + 1 if now == busy else 0)
    for path in (path for path in source.rglob('*') if path.is_file()):
        with open(path, 'rb') as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            while warm and file.read(1 << 24):
                pass


def anonymous(pid):
    "Bytes of memory of a process that no file stands behind."
    try:
        _, resident, shared, *_ = map(int, Path(f'/proc/{pid}/statm').read_text().split())
    except (OSError, ValueError):
        return 0
    return (resident - shared) * os.sysconf('SC_PAGESIZE')


def watch(process, found):
    while process.poll() is None:
        found.append(anonymous(process.pid))
        time.sleep(0.02)


def turn(arguments, source, target, warm):
    """Seconds of a command and of a sync after it, processor seconds, and its peak of anonymous memory above
    the start.
    """
    shutil.rmtree(target, ignore_errors=True)
    settle(source, warm)
    before, start, found = os.times(), time.perf_counter(), [0]
    process = subprocess.Popen(
        arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    if arguments[0] == sys.executable:
        if process.stdout.readline() != 'ready\n':
            raise SystemExit(process.stderr.read())
        found = [anonymous(process.pid)]
        threading.Thread(target=watch, args=(process, found), daemon=True).start()
    _, said = process.communicate('go\n' if arguments[0] == sys.executable else '')
    if process.returncode:
        raise SystemExit(f'{arguments}: {said}')
    os.sync()
    seconds, after = time.perf_counter() - start, os.times()
    return (
        seconds,
        after.children_user + after.children_system - before.children_user - before.children_system,
        max(found) - found[0],
    )


def child(kind, words):
    "What runs in a process of its own: everything is imported first."
    import mmkit.cli
    import mmkit.converters.convert

    print('ready', flush=True)
    sys.stdin.readline()
    if kind == 'mm-convert':
        sys.exit(mmkit.cli.mm_convert(words))
    {'naive-to-mm': naive_to_mm, 'naive-to-hf': naive_to_hf}[kind](*map(Path, words))


def commands(config, work, naive, copied):
    "(name, command, what it reads, what it writes) of every turn of a round."
    python = [sys.executable, __file__, '--child']
    hf, mm, back, copy, plain, again = (
        work / name for name in ('hf', 'mm', 'back', 'cp', 'naive-mm', 'naive-hf')
    )

    def halves(n):
        return f'[{n - n // 2},{n // 2}]'

    if '_class_name' in config:
        one = [
            'WanConverter',
            'hf_to_mm',
            f'--cfg.source_path={hf}',
            f'--cfg.target_path={mm}',
            f'--cfg.target_parallel_config.pp_layers={halves(config["num_layers"])}',
        ]
        two = [
            'WanConverter',
            'mm_to_hf',
            f'--cfg.source_path={mm}',
            f'--cfg.target_path={back}',
            f'--cfg.hf_dir={hf}',
        ]
    else:
        depth = config['num_hidden_layers']
        layout = [
            f'--cfg.hf_config.hf_dir={hf}',
            f'--cfg.mm_dir={mm}',
            '--cfg.parallel_config.tp_size=2',
            '--cfg.parallel_config.vit_pp_layers=[32,0]',
            (
                f'--cfg.parallel_config.llm_pp_layers=[{max(depth // 2 - 4, 0)},{depth - max(depth // 2 - 4, 0)}]'  # noqa: E501
            ),
        ]
        one = ['Qwen2_5_VLConverter', 'hf_to_mm', *layout]
        two = ['Qwen2_5_VLConverter', 'mm_to_hf', f'--cfg.save_hf_dir={back}', *layout]
    if copied:
        yield 'cp -r', ['cp', '-r', str(hf), str(copy)], hf, copy
    yield 'hf_to_mm', [*python, 'mm-convert', *one], hf, mm
    yield 'mm_to_hf', [*python, 'mm-convert', *two], mm, back
    if not naive:
        return
    yield 'load and save, to mm', [*python, 'naive-to-mm', str(hf), str(plain)], hf, plain
    yield 'load and save, to hf', [*python, 'naive-to-hf', str(plain), str(again), str(hf)], plain, again


TIME, MEMORY = 1.7, 2.0  # times `cp`, times the largest tensor
OURS = 'hf_to_mm', 'mm_to_hf'


def ratios(times, name):
    return [
        one[0] / base[0]
        for one, base in zip(times[name], times.get('cp -r', [(float('nan'),)] * len(times[name])))
    ]


def missed(times, largest):
    """A sentence for each bound that a direction of ours does not keep.

    Without a `cp` there is no bound of time.
    """
    slow = [
        f'{name} took {found:.2f} times cp; {TIME} are allowed'
        for name in OURS
        if (found := statistics.median(ratios(times, name))) > TIME
    ]
    return slow + [
        f'{name} took {found:.2f} times the largest tensor in memory; {MEMORY} are allowed'
        for name in OURS
        if (found := max(one[2] for one in times[name]) / largest) > MEMORY
    ]


def table(times, largest):
    rows = [
        f'{"":22}{"seconds":>9}{"cpu s":>8}{"x cp":>7}{"of rounds":>14}{"memory GB":>11}{"x largest tensor":>18}'  # noqa: E501
    ]
    for name, found in times.items():
        each, memory = ratios(times, name), max(one[2] for one in found)
        spread = f'{min(each):.2f}-{max(each):.2f}'
        rows.append(
            f'{name:22}{statistics.median(one[0] for one in found):9.1f}{statistics.median(one[1] for one in found):8.1f}{statistics.median(each):7.2f}{spread:>14}{memory / 1e9:11.2f}{memory / largest:18.2f}'  # noqa: E501
        )
    return '\n'.join(rows)


def main():
    "The exit code."
    if sys.argv[1:2] == ['--child']:
        return child(sys.argv[2], sys.argv[3:])
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parse.add_argument('--model', choices=MODELS, default='qwen-3b')
    parse.add_argument('--layers', type=int, help='text layers, or blocks of Wan (as many as the model has)')
    parse.add_argument('--rounds', type=int, default=3)
    parse.add_argument('--warm', action='store_true', help='the source of every turn is in the page cache')
    parse.add_argument('--sparse', action='store_true', help='the source has no data, only sizes')
    parse.add_argument(
        '--no-naive',
        action='store_true',
        help='without loading and saving everything, which needs twice the memory of the folder',
    )
    parse.add_argument('--report', action='store_true', help='end with code 0 whatever was measured')
    parse.add_argument('--folder', help='where to work (the folder for temporary files)')
    args = parse.parse_args()
    config = MODELS[args.model]
    if args.layers:
        config = config | {'num_layers' if '_class_name' in config else 'num_hidden_layers': args.layers}
    with tempfile.TemporaryDirectory(dir=args.folder) as work:
        largest = make(Path(work) / 'hf', config, args.sparse)
        size = sum(path.stat().st_size for path in Path(work, 'hf').iterdir())
        print(
            f'{args.model}, {size / 1e9:.2f} GB, largest tensor {largest / 1e9:.2f} GB, sources'
            f' {"in" if args.warm else "not in"} the page cache, a sync after every turn',
            flush=True,
        )
        times = {}
        for number in range(args.rounds):
            for name, command, source, target in commands(
                config, Path(work), not args.no_naive, not args.sparse
            ):
                times.setdefault(name, []).append(turn(command, source, target, args.warm))
                print(f'round {number + 1} {name}: {times[name][-1][0]:.1f} s', file=sys.stderr, flush=True)
                if name != 'hf_to_mm' and 'to mm' not in name:
                    shutil.rmtree(target)
            for left in ('mm', 'naive-mm'):
                shutil.rmtree(Path(work, left), ignore_errors=True)
        print(table(times, largest))
        print(*(problems := missed(times, largest)), sep='\n', end='\n' * bool(problems))
        return int(bool(problems) and not args.report)


if __name__ == '__main__':
    sys.exit(main())
