"""How mmkit starts on emulated NPUs, and what it says where torch-npu is installed but CANN is not."""

import os
import subprocess
import sys
from pathlib import Path

from mmkit.core.device import INSTALL_MINDSPEED, NPU_DEFAULTS, npu_facts, npu_trouble, pick_device
from mmkit.core.ranks import child_environment
from mmkit.diagnostics.doctor import doctor


def python(code, **environment):
    "(output, errors) of a new Python process with these variables; None takes one away."
    variables = {name: value for name, value in {**os.environ, **environment}.items() if value is not None}
    ran = subprocess.run(
        [sys.executable, '-c', code], env=variables, capture_output=True, text=True, timeout=120
    )
    return ran.stdout.strip(), ran.stderr


def without_cann():
    "The variables of a process that has torch-npu and no CANN."
    paths = [path for path in os.environ['PYTHONPATH'].split(os.pathsep) if Path(path).name != 'startup']
    return dict(
        NPU_EMULATOR=None,
        ASCEND_HOME_PATH=None,
        PYTHONPATH=os.pathsep.join(paths),
        TORCH_DEVICE_BACKEND_AUTOLOAD=None,
    )


def test_an_npu_is_taken_where_there_is_one():
    device = pick_device()
    assert (device.name, device.backend, device.dtype, device.count()) == (
        'npu',
        'hccl',
        'bfloat16',
        2,
    ) and npu_trouble() is None
    assert npu_facts()['chip'].startswith('Ascend')
    found = {one.name: one for one in doctor()}
    assert (
        found['torch-npu'].good
        and found['chip'].found == npu_facts()['chip']
        and found['devices'].found == '2 npu'
    )
    # test_mindspeed.py has the other
    assert (found['MindSpeed'].found, found['MindSpeed'].remedy) == ('not installed', INSTALL_MINDSPEED)
    # the emulated CANN has no version
    assert found['CANN'].found == found['NPU driver'].found == '-' and found['CANN'].good


def test_the_settings_are_defaults():
    ask = (
        'import os; from mmkit.core.device import torch_module; torch_module("npu");'
        ' print(os.environ["HCCL_CONNECT_TIMEOUT"], os.environ["PYTORCH_NPU_ALLOC_CONF"])'
    )
    assert python(ask, HCCL_CONNECT_TIMEOUT=None)[0] == '1200 expandable_segments:True'
    assert (
        python(ask, HCCL_CONNECT_TIMEOUT='60', PYTORCH_NPU_ALLOC_CONF='max_split_size_mb:64')[0]
        == '60 max_split_size_mb:64'
    )
    assert (
        NPU_DEFAULTS.keys() <= child_environment().keys()
        and child_environment()['TASK_QUEUE_ENABLE'] == os.environ['TASK_QUEUE_ENABLE']
    )


OPEN = """
import sys; sys.argv = ['here', '--tensor-model-parallel-size', '2', 'word']
import warnings; warnings.simplefilter('always')
from mmkit.parallel.mesh import open_mesh
with open_mesh() as mesh:
    import megatron.core, torch
    from mmkit.parallel.engine import megatron
    from megatron.core import optimizer
    print(sys.argv, mesh.at, megatron.core.mmkit_device if hasattr(megatron, 'core') else sys.modules['megatron.core'].mmkit_device, optimizer.Adam.__name__)
"""  # noqa: E501


def test_the_engine_leaves_the_arguments_alone_and_says_what_is_missing():
    said, errors = python(OPEN)
    assert (
        said.splitlines()[-1] == "['here', '--tensor-model-parallel-size', '2', 'word'] npu:0 npu FusedAdamW"
    ), errors
    assert errors.count(INSTALL_MINDSPEED) == 1 and 'transfer_to_npu' not in errors


def test_without_cann_there_is_one_sentence_and_the_cpu():
    assert 'Failed to load the backend extension' in python('import torch', **without_cann())[1]
    said, errors = python(
        'import mmkit, torch; from mmkit.core.device import pick_device; print(torch.ones(1).item(),'
        ' pick_device().name)',
        **without_cann(),
    )
    assert (
        said == '1.0 cpu'
        and errors.count('UserWarning') == 1
        and 'set_env.sh' in errors
        and 'Traceback' not in errors
    )
    said, errors = python(
        'import mmkit; from mmkit.core.device import pick_device; pick_device("npu")', **without_cann()
    )
    assert 'set_env.sh' in errors.splitlines()[-1] and errors.splitlines()[-1].startswith('ValueError')
    said, errors = python('from mmkit.cli import mmkit; mmkit(["doctor"])', **without_cann())
    assert (
        'set_env.sh' in next(line for line in said.splitlines() if ' CANN ' in line)
        and 'Traceback' not in errors
    )


def other_wheel(folder, version, says):
    """The variables of a process that finds, before the real one, a torch-npu of another version that fails
    with these words when it is imported.
    """
    info = folder / f'torch_npu-{version}.dist-info'
    info.mkdir(), (folder / 'torch_npu').mkdir()
    (info / 'METADATA').write_text(f'Metadata-Version: 2.1\nName: torch-npu\nVersion: {version}\n')
    (info / 'entry_points.txt').write_text('[torch.backends]\ntorch_npu = torch_npu:_autoload\n')
    (folder / 'torch_npu' / '__init__.py').write_text(f'raise ImportError({says!r})')
    return dict(
        os.environ,
        PYTHONPATH=os.pathsep.join([str(folder), os.environ['PYTHONPATH']]),
        TORCH_DEVICE_BACKEND_AUTOLOAD=None,
    )


PICK = (
    'import mmkit, torch; from mmkit.core.device import pick_device; print(torch.ones(1).item(),'
    ' pick_device().name)'
)
EXAMINE = 'from mmkit.cli import mmkit; mmkit(["doctor"])'


def row(said, name):
    return next(line for line in said.splitlines() if f' {name} ' in line)


def test_a_wheel_for_another_torch_is_one_sentence(tmp_path):
    wrong = other_wheel(tmp_path, '2.7.1.post2', 'undefined symbol: _ZN3c10')
    said, errors = python(PICK, **wrong)
    assert (
        said == '1.0 cpu'
        and errors.count('UserWarning') == 1
        and 'torch-npu 2.7.1.post2 is installed, but torch is 2.13.0' in errors
        and 'Traceback' not in errors
    )
    said, errors = python(
        'import mmkit; from mmkit.core.device import pick_device; pick_device("npu")', **wrong
    )
    assert (
        errors.splitlines()[-1].startswith('ValueError')
        and "'torch-npu==2.13.0.*'" in errors.splitlines()[-1]
    )
    said, errors = python(EXAMINE, **wrong)
    assert (
        "pip install 'torch-npu==2.13.0.*'" in row(said, 'torch-npu')
        and 'ok' in row(said, 'CANN')
        and 'Traceback' not in errors
    )


def test_a_wheel_that_does_not_load_stands_in_the_table(tmp_path):
    failing = other_wheel(tmp_path, '2.13.0', 'undefined symbol: _ZN3c10')
    said, errors = python(EXAMINE, **failing)
    assert (
        'torch_npu is installed, but cannot be loaded (undefined symbol: _ZN3c10)' in row(said, 'CANN')
        and 'Traceback' not in errors
        and row(said, 'disk')
    ), said


def test_a_container_without_the_driver_is_told_so(tmp_path):
    "CANN's library is there, but the driver's, which it needs, is not."
    (tmp_path / 'empty.c').write_text('int empty;')
    for name, needs in (
        ('ascend_hal', []),
        ('hccl', ['-Wl,--no-as-needed', f'-L{tmp_path}', '-lascend_hal']),
    ):
        subprocess.run(
            ['gcc', '-shared', '-fPIC', '-o', tmp_path / f'lib{name}.so', tmp_path / 'empty.c', *needs],
            check=True,
        )
    (tmp_path / 'libascend_hal.so').unlink()
    bare = {**without_cann(), 'LD_LIBRARY_PATH': str(tmp_path)}
    said, errors = python(PICK, **bare)
    assert (
        said == '1.0 cpu'
        and errors.count('UserWarning') == 1
        and 'libascend_hal.so' in errors
        and '/usr/local/Ascend/driver' in errors
        and 'set_env.sh' not in errors
    )
    assert 'libascend_hal.so: cannot open shared object file' in row(python(EXAMINE, **bare)[0], 'CANN')


def test_a_machine_without_torch_npu_never_notices():
    clean = without_cann()
    clean['PYTHONPATH'] = os.pathsep.join(
        path for path in clean['PYTHONPATH'].split(os.pathsep) if not Path(path, 'torch_npu').is_dir()
    )
    said, errors = python(
        'import os; before = dict(os.environ); import mmkit; print(dict(os.environ) == before); from'
        ' mmkit.diagnostics.doctor import doctor; print([one.name for one in doctor()])',
        **clean,
    )
    assert said.startswith('True') and 'torch-npu' not in said and not errors
