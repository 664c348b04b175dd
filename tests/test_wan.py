"""The model is diffusers' Wan2.1, its files are MindSpeed-MM's, its schedule is that of Wan's own training.

All weights are random, none is zero or one. Gradients go the trainer's way: schedule, reduction over ranks,
division by the global count.
"""

import copy
import json
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import parity
import pytest
import torch
from safetensors.torch import load_file, save_file

from mmkit.config import Layout, Optim
from mmkit.converters.convert import hf_to_mm, mm_to_hf
from mmkit.converters.folders import HFFolder, open_weights
from mmkit.converters.wan2_1 import wan2_1_towers
from mmkit.converters.weights import pieces
from mmkit.core.device import pick_device, place
from mmkit.models.flow import (
    TIMES,
    Flow,
    add_noise,
    dice,
    euler_sigmas,
    euler_steps,
    flow_noise,
    flow_table,
    flow_times,
    velocity_losses,
)
from mmkit.models.shapes import WanShape
from mmkit.models.wan2_1 import Wan2_1
from mmkit.parallel.data import build_optimizer, wrap_data_parallel
from mmkit.parallel.layers import engine_config
from mmkit.parallel.mesh import open_mesh
from mmkit.trainer.weights import load_weights

COMMON = dict(
    patch_size=(1, 2, 2),
    num_attention_heads=4,
    attention_head_dim=20,
    out_channels=4,
    text_dim=24,
    freq_dim=16,
    ffn_dim=96,
    num_layers=2,
    rope_max_seq_len=32,
)
MODELS = {
    't2v': dict(COMMON, in_channels=4),
    'i2v': dict(COMMON, in_channels=9, image_dim=28, added_kv_proj_dim=80),
    'first and last frame': dict(
        COMMON, in_channels=9, image_dim=28, added_kv_proj_dim=80, pos_embed_seq_len=10
    ),
}
# A case is a step of micro-batches: clips in it, and frames, rows, columns of their latents. 27 tokens (3, 6,
# 6) cannot be cut over two ranks.
CASES = {
    'one clip': [(1, (3, 6, 6))],
    'three clips': [(3, (2, 4, 10))],
    'two resolutions': [(3, (3, 6, 6)), (1, (2, 4, 10))],
}
LAYOUTS = {
    1: {'tp 1': Layout(data_parallel='ddp'), 'recompute': Layout(recompute='full')},
    2: {
        'tp 2': Layout(tp=2, data_parallel='ddp'),
        'tp 2, sequence parallel': Layout(tp=2, sequence_parallel=True, data_parallel='ddp'),
        'tp 2, sequence parallel, recompute': Layout(tp=2, sequence_parallel=True, recompute='full'),
        'dp 2': Layout(data_parallel='ddp'),
        'dp 2, zero1, overlap': Layout(overlap=True),
    },
}
FLOW = Flow()


def batches_of(config, case):
    """The micro-batches of a case: clean, noise, noisy, time, weight, text with zeros behind it, and features
    of a picture.
    """
    found, start = [], 0
    for count, size in CASES[case]:
        g = dice(5, 1, range(start, start := start + count))
        sigma, weight = flow_times(FLOW, g)
        clean, noise, more = (
            flow_noise((channels, *size), g) for channels in (4, 4, config['in_channels'] - 4)
        )
        # diffusers counts 512 text tokens from the end where there is a picture
        text = flow_noise((512 if 'image_dim' in config else 7, 24), g)
        text *= flow_noise((text.shape[1], 1), g).exp()
        for row in range(count):
            text[row, text.shape[1] * (3 + row) // 7 :] = 0
        image = flow_noise((10, 28), g) if 'image_dim' in config else None
        found.append(
            dict(
                clean=clean,
                noise=noise,
                noisy=torch.cat([add_noise(clean, noise, sigma), more], 1),
                time=TIMES * sigma,
                weight=weight + 0.5,
                text=text,
                image=image,
            )
        )
    return found


def randomize(model, seed):
    """Fills every parameter with random numbers of a healthy size.

        The gradient of a key's bias would be zero without the norm behind it: among keys of equal size
    nothing but rounding is left of it. So the tokens of text and pictures get very different sizes.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        x = torch.randn(p.shape, generator=generator)
        p.data.copy_(
            x.exp()
            if 'image_embedder.norm2.weight' in name
            else (
                1 + 0.3 * x
                if 'norm' in name and name.endswith('weight')
                else 0.3 * x
                if 'table' in name or p.dim() == 1
                else x / p[0].numel() ** 0.5
            )
        )
    return model


# diffusers


def run_diffusers(model, batches):
    """(velocities of each micro-batch, mean loss, gradients by name) by diffusers, in the number format of
    the model.
    """
    model.zero_grad()
    dtype, answers, losses, count = model.dtype, [], [], sum(len(batch['clean']) for batch in batches)
    for batch in batches:
        batch = {key: x if x is None or key == 'time' else x.to(dtype) for key, x in batch.items()}
        # two pictures of 5 tokens
        image = (
            batch['image']
            if batch['image'] is None or model.config.pos_embed_seq_len is None
            else batch['image'].reshape(-1, 5, 28)
        )
        answers.append(model(batch['noisy'], batch['time'], batch['text'], image, return_dict=False)[0])
        each = ((answers[-1] - (batch['noise'] - batch['clean'])) ** 2).mean((1, 2, 3, 4))
        losses.append((each * batch['weight']).sum() / count)
        losses[-1].backward()
    return (
        [x.detach() for x in answers],
        sum(losses).detach(),
        {name: p.grad.clone() for name, p in model.named_parameters()},
    )


def run_exactly(model, batches):
    """The same in float64: what diffusers would say if it did not round.

        diffusers calls `float()` on the way, which must not go back to float32 here; only the waves of the
    time are made in float32, since they are rounded so by definition: at time 1000 another rounding is
    another model.
    """
    exact = copy.deepcopy(model).double()
    waves = exact.condition_embedder.timesteps_proj
    single, in_single = torch.Tensor.float, waves.forward

    def forward(time):
        with mock.patch.object(torch.Tensor, 'float', single):
            return in_single(time).double()

    waves.forward = forward
    with mock.patch.object(torch.Tensor, 'float', torch.Tensor.double):
        return run_diffusers(exact, batches)


def tensors_of_run(answers, loss, gradients):
    "What a run said, in float32, as tensors of one file."
    found = {
        'loss': loss[None],
        **{f'answer {k}': x for k, x in enumerate(answers)},
        **{f'gradient {key}': x for key, x in gradients.items()},
    }
    return {key: x.float().contiguous() for key, x in found.items()}


@pytest.fixture(scope='module')
def house(tmp_path_factory):
    "Tiny models with the answers and gradients of diffusers beside them."
    from diffusers import WanTransformer3DModel

    folder, rounding = tmp_path_factory.mktemp('wan'), {}
    for seed, (name, config) in enumerate(MODELS.items()):
        model = randomize(WanTransformer3DModel(**config), seed)
        model.save_pretrained(folder / name)
        for case in CASES:
            exact, single = (
                tensors_of_run(*run(model, batches_of(config, case))) for run in (run_exactly, run_diffusers)
            )
            save_file(exact, folder / f'{name} {case}.safetensors')
            rounding[f'{name}, {case}'] = parity.furthest(single, exact)[0]
    (folder / 'rounding.json').write_text(json.dumps(rounding))
    return folder


# mmkit, on every rank of a launch


def weighted_loss(output, batch):
    "(sum, count) of a batch's weighted losses."
    losses = velocity_losses(output, batch['clean'], batch['noise']) * batch['weight']
    return losses.sum(), torch.tensor(len(losses), dtype=torch.int)


def open_model(folder, mesh, dtype=torch.float32):
    "(model, wrapped stages, task) of a diffusers folder, as a trainer makes them."
    source = HFFolder(folder)
    task = SimpleNamespace(towers=wan2_1_towers(source.config), forward=predict, loss=weighted_loss)
    model = Wan2_1(WanShape.from_hf(source.config), mesh, dtype)
    layers = engine_config(mesh, dtype, mesh.layout.sequence_parallel)
    load_weights([model], source, task.towers, mesh)
    return model, wrap_data_parallel([model], layers, mesh), task


def predict(model, batch):
    return model(batch['noisy'], batch['time'], batch['text'], batch['image'])


@torch.no_grad()
def compare_case(folder, name, case, model, wrapped, task, mesh):
    """(answers, loss, gradients, name of the furthest gradient): how far they are from diffusers on the worst
    rank.
    """
    theirs, batches = load_file(folder / f'{name} {case}.safetensors'), batches_of(MODELS[name], case)
    mine = range(len(batches))[mesh.dp.rank :: mesh.dp.size]
    answers = max(parity.apart(predict(model, batches[k]), theirs[f'answer {k}']) for k in mine)
    with torch.enable_grad():
        loss, found = parity.step_gradients(task, wrapped, mesh, [batches[k] for k in mine])
    gradients, worst = parity.furthest(
        found, {key.removeprefix('gradient '): x for key, x in theirs.items() if key.startswith('gradient ')}
    )
    return (
        parity.over_ranks(answers),
        parity.over_ranks(parity.apart(torch.tensor([loss]), theirs['loss'])),
        parity.over_ranks(gradients),
        worst,
    )


def count_blocks(model):
    "A list that grows by one whenever a block runs."
    runs = []
    for block in model.blocks:
        block.register_forward_hook(lambda *_: runs.append(1))
    return runs


def measure(folder):
    """All cases of all models in every layout of this world, how often blocks ran, and a step of training in
    bfloat16.
    """
    folder, rows, runs, half = Path(folder), [], {}, {}
    for title, layout in LAYOUTS[place().world].items():
        with open_mesh(layout, pick_device('cpu')) as mesh:
            if layout.overlap:
                parity.small_buckets()
            for name in MODELS:
                opened = open_model(folder / name, mesh)
                counted = count_blocks(opened[0])
                for case in [case for case in CASES if len(CASES[case]) % mesh.dp.size == 0]:
                    rows.append([title, name, case, *compare_case(folder, name, case, *opened, mesh)])
                runs[f'{title}, {name}'] = len(counted)
            half[title] = half_step(folder / 'i2v', mesh)
    return dict(rows=rows, runs=runs, half=half)


def half_step(folder, mesh):
    """Of a model in bfloat16: its loss before and after some steps of training, and which parameters are in
    float32 and which did not move.
    """
    model, wrapped, task = open_model(folder, mesh, torch.bfloat16)
    batch = batches_of(MODELS['i2v'], 'three clips')
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer, schedule = build_optimizer(
        wrapped, Optim(lr=1e-2, schedule='constant'), mesh.layout, torch.bfloat16, 5
    )
    losses = []
    for _ in range(5):
        losses.append(parity.step_gradients(task, wrapped, mesh, batch)[0])
        optimizer.step()
        schedule.step(1)
    if mesh.layout.overlap and mesh.layout.data_parallel == 'zero1':
        wrapped[0].start_param_sync(force_sync=True)
    names = {piece.mm: piece.hf[0] for piece in pieces(task.towers)[0]}
    return dict(
        losses=losses,
        exact=sorted(names[name] for name, p in model.named_parameters() if p.dtype == torch.float32),
        still=[name for name, p in model.named_parameters() if torch.equal(p, before[name])],
    )


# The model


@pytest.fixture(scope='module')
def one(house):
    return parity.on_ranks('test_wan', 'measure', house, 1, 120)


@pytest.fixture(scope='module')
def two(house):
    return parity.on_ranks('test_wan', 'measure', house, 2, 120)


def test_no_weight_is_zero_or_one(house):
    for name in MODELS:
        for key, x in load_file(house / name / 'diffusion_pytorch_model.safetensors').items():
            assert not ((x == 0) | (x == 1)).any(), key


def check_rows(house, rows, record_property, ranks):
    """Prints the rows, with diffusers' own rounding in float32 beside ours, and holds them to the limit, or
    to twice what diffusers rounds itself.
    """
    rounding = json.loads((house / 'rounding.json').read_text())
    head = [
        'layout',
        'model',
        'step',
        'answers',
        'loss',
        'gradients',
        'those of diffusers in fp32',
        'furthest gradient',
    ]
    rows = [[*row[:6], rounding[f'{row[1]}, {row[2]}'], row[6]] for row in rows]
    record_property(
        'table',
        f'Largest difference from diffusers in float64 over largest value, fp32, {ranks}\n\n'
        + parity.table(head, rows),
    )
    wrong = [
        row for row in rows if not (max(row[3:5]) <= parity.LIMIT and row[5] <= max(parity.LIMIT, 2 * row[6]))
    ]
    assert not wrong, parity.table(head, wrong)


def test_one_rank_is_diffusers(house, one, record_property):
    assert len(one['rows']) == len(LAYOUTS[1]) * len(MODELS) * len(CASES)
    check_rows(house, one['rows'], record_property, 'one rank')


def test_two_ranks_are_diffusers(house, two, record_property):
    assert len(two['rows']) == 3 * len(MODELS) * len(CASES) + 2 * len(MODELS)
    check_rows(house, two['rows'], record_property, 'two ranks')


def test_recompute_does_recompute(one, two):
    micro = sum(map(len, CASES.values()))
    for title, runs in {**one['runs'], **two['runs']}.items():
        # answers, gradients, and once more in the backward
        if 'dp 2' not in title:
            assert runs == COMMON['num_layers'] * micro * (3 if 'recompute' in title else 2), title


def test_bfloat16_keeps_what_diffusers_keeps(house, one, two):
    from diffusers import WanTransformer3DModel

    theirs = WanTransformer3DModel.from_pretrained(house / 'i2v', torch_dtype=torch.bfloat16)
    exact = sorted(name for name, p in theirs.named_parameters() if p.dtype == torch.float32)
    with torch.no_grad():
        reference = [
            theirs(
                x['noisy'].bfloat16(),
                x['time'],
                x['text'].bfloat16(),
                x['image'].bfloat16(),
                return_dict=False,
            )[0]
            for x in batches_of(MODELS['i2v'], 'three clips')
        ]
    (batch,) = batches_of(MODELS['i2v'], 'three clips')
    loss = float((velocity_losses(reference[0], batch['clean'], batch['noise']) * batch['weight']).mean())
    for title, found in {**one['half'], **two['half']}.items():
        assert found['exact'] == exact and not found['still'], (title, found)
        assert abs(found['losses'][0] - loss) < 1e-3 * loss and found['losses'][-1] < 0.9 * loss, (
            title,
            found['losses'],
            loss,
        )


# The schedule


def test_values_of_the_schedule():
    "Values of MindSpeed-MM's scheduler for shift 5."
    sigmas, weights = flow_table(Flow())
    assert len(sigmas) == 1000 and weights.argmax() == 833 and abs(weights.sum() - 1000) < 1e-6
    u = np.linspace(1, 0, 1001)[:-1]
    by_hand = 5 * u / (1 + 4 * u)
    bump = np.exp(-2 * ((1000 * by_hand - 500) / 1000) ** 2)
    bump -= bump.min()
    assert (
        np.abs(sigmas.numpy() - by_hand).max() < 1e-6
        and np.abs(weights.numpy() - bump * 1000 / bump.sum()).max() < 1e-6
    )
    for found, told in [
        (sigmas[0], '1.0000'),
        (sigmas[1], '0.9998'),
        (sigmas[500], '0.83333'),
        (sigmas[999], '0.00498'),
        (weights[0], '0.0000'),
        (weights[1], '0.00128'),
        (weights[500], '1.02486'),
        (weights[833], '2.0764'),
        (weights[999], '0.03188'),
        (sigmas.mean(), '0.7476'),
        ((sigmas > 0.5).double().mean(), '0.83'),
    ]:
        assert f'{float(found):.{len(told) - 2}f}' == told
    closed, other = flow_table(Flow(extra_one_step=False))[0], flow_table(Flow(sigma_min=0.1, shift=3))[0]
    assert (
        closed[-1] == 0
        and abs(other[999] - 3 * 0.1009 / (1 + 2 * 0.1009)) < 1e-9
        and bool((flow_table(Flow(weighted=False))[1] == 1).all())
    )


def test_draws_follow_the_table_and_the_recipe():
    g = dice(1, 1, range(20000))
    sigma, weight = flow_times(Flow(), g)
    assert (
        abs(sigma.mean() - 0.7476) < 0.01
        and abs(weight.mean() - 1) < 0.03
        and set(sigma.tolist()) <= set(flow_table(Flow())[0].float().tolist())
    )
    smooth, ones = flow_times(Flow(draw='logit_normal', shift=3, weighted=False), dice(1, 2, range(20000)))
    u = smooth / (3 - 2 * smooth)  # shift 3 taken back
    normal = torch.logit(u)
    assert abs(normal.mean()) < 0.03 and abs(normal.std() - 1) < 0.03 and bool((ones == 1).all())
    even, _ = flow_times(Flow(draw='uniform', shift=3, weighted=False), dice(1, 3, range(20000)))
    assert abs((even / (3 - 2 * even)).mean() - 0.5) < 0.01


def test_euler_is_diffusers():
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler, sigmas = FlowMatchEulerDiscreteScheduler(), euler_sigmas(6, 3.0)
    scheduler.set_timesteps(sigmas=sigmas[:-1].tolist())
    x = noise = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))

    def velocity(x, time):
        return torch.tanh(x) * time.view(-1, 1, 1) / 500

    for mine, time in zip(euler_steps(velocity, noise, sigmas), scheduler.timesteps, strict=True):
        x = scheduler.step(velocity(x, time.expand(2)), time, x, return_dict=False)[0]
        assert torch.allclose(mine, x, atol=1e-5)


# Files

GOLDEN = Path(__file__).parent / 'golden'
FILES = {'t2v_pp1': None, 't2v_pp2': [1, 3], 't2v_pp2_vpp2': [[1, 1], [1, 1]], 'i2v_pp1': None}


def hf_of(name):
    return GOLDEN / f'wan2_1_{name[:3]}_hf'


def towers_of(name):
    return wan2_1_towers(json.loads((hf_of(name) / 'config.json').read_text()), FILES[name])


def files_of(folder):
    return sorted(f.relative_to(folder).as_posix() for f in folder.rglob('*') if f.is_file())


def tensors_of(folder):
    return {name: x for file in sorted(folder.glob('*.safetensors')) for name, x in load_file(file).items()}


def same(x, y):
    return (
        x.dtype == y.dtype
        and x.shape == y.shape
        and torch.equal(x.contiguous().view(torch.uint8), y.contiguous().view(torch.uint8))
    )


def equal(mine, theirs):
    return mine.keys() == theirs.keys() and all(same(mine[key], x) for key, x in theirs.items())


def opens(folder):
    "The tensors of a folder, opened by diffusers."
    from diffusers import WanTransformer3DModel

    return dict(WanTransformer3DModel.from_pretrained(folder, torch_dtype=torch.float32).state_dict())


@pytest.mark.parametrize('name', FILES)
def test_written_files_equal_the_peers(name, tmp_path):
    golden = GOLDEN / f'wan2_1_{name}'
    hf_to_mm(hf_of(name), tmp_path / 'mm', towers_of(name))
    assert files_of(tmp_path / 'mm') == files_of(golden)
    for file in golden.rglob('*.pt'):
        theirs, ours = (
            torch.load(f, weights_only=True) for f in (file, tmp_path / 'mm' / file.relative_to(golden))
        )
        assert ours.keys() == theirs.keys()
        assert all(
            (
                equal(ours[group], theirs[group])
                if group != 'checkpoint_version'
                else ours[group] == theirs[group]
            )
            for group in theirs
        )


@pytest.mark.parametrize('name', FILES)
def test_the_peers_files_come_back_bit_for_bit_and_open(name, tmp_path):
    hf = hf_of(name)
    mm_to_hf(GOLDEN / f'wan2_1_{name}', hf, tmp_path / 'hf', towers_of(name))
    assert files_of(tmp_path / 'hf') == files_of(hf)
    for file in hf.glob('*.safetensors'):
        assert equal(load_file(tmp_path / 'hf' / file.name), load_file(file))
    old, new = (
        json.loads((folder / 'diffusion_pytorch_model.safetensors.index.json').read_text())
        for folder in (hf, tmp_path / 'hf')
    )
    assert new['weight_map'] == old['weight_map']
    opened, tensors = opens(tmp_path / 'hf'), tensors_of(hf)
    assert opened.keys() == tensors.keys() and all(
        torch.equal(opened[key], x.float()) for key, x in tensors.items()
    )


@pytest.mark.parametrize(
    'kind, layers, tp', [('i2v', [1, 3], 1), ('i2v', [[1, 1], [1, 1]], 2), ('t2v', [2, 2], 2)]
)
def test_layouts_that_the_peer_cannot_write(kind, layers, tp, tmp_path):
    hf = GOLDEN / f'wan2_1_{kind}_hf'
    towers = wan2_1_towers(HFFolder(GOLDEN / f'wan2_1_{kind}_hf').config, layers)
    hf_to_mm(hf, tmp_path / 'mm', towers, tp)
    first = torch.load(tmp_path / 'mm/release/mp_rank_00_000/model_optim_rng.pt', weights_only=True)
    held = first.get('model', first.get('model0'))
    assert (
        kind == 't2v'
        or {f'img_emb.proj.{k}.{end}' for k in (0, 4) for end in ('weight', 'bias')} <= held.keys()
    )
    assert held['blocks.0.self_attn.q_norm.weight'].shape == (24 // tp,)
    assert open_weights(tmp_path / 'mm', wan2_1_towers(HFFolder(hf).config)).found.tp == tp
    mm_to_hf(tmp_path / 'mm', hf, tmp_path / 'back', towers, tp)
    assert equal(tensors_of(tmp_path / 'back'), tensors_of(hf))


def test_a_number_of_heads_that_cannot_be_cut(tmp_path):
    with pytest.raises(ValueError, match='not divisible by tp=5'):
        hf_to_mm(GOLDEN / 'wan2_1_t2v_hf', tmp_path / 'mm', towers_of('t2v_pp1'), 5)
