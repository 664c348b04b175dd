"""Every way a process begins gives it the emulated NPUs: python, torchrun and mmkit's launch.

Mmkit knows nothing of them.
"""

import json
import os
import subprocess
import sys

import pytest

SCRIPT = """
import json, os, sys
import torch
import torch.distributed as dist
{middle}
rank = int(os.environ.get('RANK', 0))
x = (torch.ones(2, device=f'npu:{{rank}}') * (rank + 1)).requires_grad_()
torch.npu.set_device(rank)
y = torch.ops.npu.npu_swiglu(x)
y.sum().backward()
if 'RANK' in os.environ:
    dist.init_process_group('hccl')
    dist.all_reduce(y.detach())
os.write(1, f'reached {{torch.npu.device_count()}}\\n'.encode())          # in one piece, though two ranks write at once
if dist.is_initialized(): dist.destroy_process_group()
"""  # noqa: E501


@pytest.fixture
def script(tmp_path):
    path = tmp_path / 'script.py'
    path.write_text(SCRIPT.format(middle=''))
    return path


def environment(folder, **changes):
    return {**os.environ, 'NPU_EMULATOR_CALLS': str(folder), **changes}


def counted(folder):
    "The counts that processes left in a folder, by rank."
    return {path.name.split('-')[1]: json.loads(path.read_text()) for path in folder.glob('calls-*.json')}


ONE = {'npu_swiglu': 1, 'npu_swiglu_backward': 1}
TWO = {**ONE, 'allreduce_': 1}


def test_python(script, tmp_path):
    "torch loads torch_npu by itself, as where CANN is installed."
    ran = subprocess.run(
        [sys.executable, script], env=environment(tmp_path), capture_output=True, text=True, timeout=120
    )
    assert ran.stdout == 'reached 2\n', ran.stdout + ran.stderr
    assert counted(tmp_path) == {'': ONE}


def test_python_without_autoload(script, tmp_path):
    "With TORCH_DEVICE_BACKEND_AUTOLOAD=0 importing torch_npu does it; the number of devices is a variable."
    script.write_text(SCRIPT.format(middle='assert not hasattr(torch, "npu")\nimport torch_npu'))
    changes = dict(TORCH_DEVICE_BACKEND_AUTOLOAD='0', NPU_EMULATOR_DEVICES='8')
    ran = subprocess.run(
        [sys.executable, script],
        env=environment(tmp_path, **changes),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ran.stdout == 'reached 8\n', ran.stdout + ran.stderr
    assert counted(tmp_path) == {'': ONE}


def test_torchrun(script, tmp_path):
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node=2', script]
    ran = subprocess.run(command, env=environment(tmp_path), capture_output=True, text=True, timeout=200)
    assert ran.stdout.count('reached 2') == 2, ran.stdout + ran.stderr
    assert counted(tmp_path) == {'0': TWO, '1': TWO}


def test_mmkit_launch(script, tmp_path):
    from mmkit.launcher.run import launch

    run = launch(
        {}, ranks=2, folder=tmp_path / 'run', target=str(script), env={'NPU_EMULATOR_CALLS': str(tmp_path)}
    ).wait()
    assert run.status == 'done' and 'reached 2' in run.tail()
    assert counted(tmp_path) == {'0': TWO, '1': TWO}


def test_mmkit_picks_the_npu():
    from mmkit.core.device import pick_device

    assert pick_device().name == 'npu' and pick_device().count() == 2


def test_fused_kernels_of_the_wheel_are_those_that_have_formulas():
    """Another version of the wheel would be seen here: every operator with a formula is there with the
    arguments that the formula knows.
    """
    import inspect

    import torch
    from npu_emulator import attention, collectives, formulas

    for name, formula in {**attention.FORMULAS, **formulas.FORMULAS, **collectives.FORMULAS}.items():
        asked = inspect.signature(formula).parameters
        has = {argument.name for argument in getattr(torch.ops.npu, name).default._schema.arguments}
        assert {p.name for p in asked.values() if p.kind is not p.VAR_KEYWORD} <= has, name
