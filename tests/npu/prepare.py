"""An emulated NPU in a folder: `python tests/npu/prepare.py FOLDER` prints its environment for `eval`, with a
COMMAND behind FOLDER it runs that in it.

With MINDSPEED=FOLDER, a copy of MindSpeed's source, MindSpeed can be imported in it as well.

The folder gets torch-npu's wheel, without its requirements, and a CANN that is built from the wheel's
symbols. Nothing else is changed: the environment puts both in front of PYTHONPATH, and any Python process
started with it has the emulated NPUs (startup/sitecustomize.py).
"""

import hashlib
import importlib.util
import os
import shlex
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
WHEEL = 'torch-npu==2.13.0'


def install(site):
    "Puts the wheel into the folder `site` if it is not there."
    name, version = WHEEL.split('==')
    if (site / f'{name.replace("-", "_")}-{version}.dist-info').is_dir():
        return
    command = [sys.executable, '-m', 'pip', 'install', '--quiet', '--no-deps', '--target', site, WHEEL]
    subprocess.run(command, check=True, stdout=sys.stderr, env={**os.environ, 'PYTHONPATH': ''})


def built(folder, site):
    "The folder of the libraries for this wheel and these sources; they are built if they are not there."
    import fake_cann

    sources = b''.join((HERE / name).read_bytes() for name in ('fake_cann.c', 'fake_cann.py'))
    out = folder / f'cann-{hashlib.sha256(sources + WHEEL.encode()).hexdigest()[:12]}'
    if out.is_dir():
        return out
    making = folder / f'making-{os.getpid()}'
    counts = fake_cann.build(
        making, site / 'torch_npu', Path(importlib.util.find_spec('torch').origin).parent
    )
    print('built {} libraries with {} functions and {} operators'.format(*counts), file=sys.stderr)
    os.replace(making, out)
    return out


def mindspeed():
    """What puts MindSpeed on the path: the folder that MINDSPEED names, if it does.

    SystemExit if it is not there.
    """
    folder = os.environ.get('MINDSPEED')
    if folder and not (Path(folder) / 'mindspeed' / 'megatron_adaptor.py').is_file():
        raise SystemExit(f'MINDSPEED={folder} holds no mindspeed/megatron_adaptor.py')
    return [str(Path(folder).resolve())] if folder else []


def environment(folder):
    "What a process needs on top of its environment to have emulated NPUs."
    folder = Path(folder).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    site = folder / 'site'
    install(site)
    before = [
        path
        for path in os.environ.get('PYTHONPATH', '').split(os.pathsep)
        if path and Path(path) not in (HERE / 'startup', site) and path not in mindspeed()
    ]
    cann = built(folder, site)
    paths = os.pathsep.join([str(HERE / 'startup'), *before, *mindspeed(), str(site)])
    return {
        'NPU_EMULATOR': str(cann),
        'ASCEND_HOME_PATH': str(cann),
        'ASCEND_OPP_PATH': str(cann / 'opp'),
        'PYTHONPATH': paths,
        # an error is raised by the call that made it
        'TASK_QUEUE_ENABLE': '0',
    }


def main(folder='--help', *command):
    "Prints the environment, or becomes the command in it."
    if folder.startswith('-'):
        sys.exit(__doc__)
    changes = environment(folder)
    if not command:
        print(*(f'export {name}={shlex.quote(value)}' for name, value in changes.items()), sep='\n')
    else:
        os.execvpe(command[0], command, {**os.environ, **changes})


if __name__ == '__main__':
    main(*sys.argv[1:])
