"""Two machines, which are network namespaces with an address of their own, train from the generated scripts:
the losses of one machine, a clear error when the link is cut, the same lines again go on, and so do the
same torchruns when a rank is killed.
"""

import json
import os
import re
import subprocess
import time
from contextlib import suppress
from dataclasses import replace

import kill_test
import psutil
import pytest

from mmkit.config import Layout
from mmkit.launcher.hosts import Hosts, prepare_run, shell_script, slurm_script, try_line
from mmkit.launcher.run import Run

# address: namespace
NAMES = {f'10.77.{os.getpid() % 250}.{number}': f'mmkit-{os.getpid()}-{number}' for number in (1, 2)}
SSH = f"""#!/usr/bin/env bash
while [[ $1 == -* ]]; do shift 2; done
case $1 in {' '.join(f'{address}) space={space};;' for address, space in NAMES.items())} esac
exec ip netns exec "$space" bash -c "$2"
"""
SRUN = """#!/usr/bin/env bash
while [[ $1 == -* ]]; do shift; done
number=0
for node in $SLURM_JOB_NODELIST; do SLURM_NODEID=$number SLURMD_NODENAME=$node SLURM_NNODES=2 ssh -o x "$node" "$(printf '%q ' "$@")" & number=$((number + 1)); done
wait -n && wait -n
"""  # noqa: E501
SCONTROL = '#!/usr/bin/env bash\nprintf "%s\\n" $3\n'


def ip(*words):
    subprocess.run(['ip', *words], check=True, capture_output=True, text=True)


@pytest.fixture(scope='module')
def machines():
    "Two namespaces with a cable between them; `machines('down')` cuts it."
    first, second = NAMES.values()
    try:
        try:
            ip('netns', 'add', first)
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(
                'machines with a network of their own need root and ip (iproute2):'
                f' {getattr(error, "stderr", error)}'
            )
        ip('netns', 'add', second)
        ip('-n', first, 'link', 'add', 'eth0', 'type', 'veth', 'peer', 'name', 'eth0', 'netns', second)
        for address, space in NAMES.items():
            ip('-n', space, 'addr', 'add', f'{address}/24', 'dev', 'eth0')
            for link in ('eth0', 'lo'):
                ip('-n', space, 'link', 'set', link, 'up')
        yield lambda state: ip('-n', second, 'link', 'set', 'eth0', state)
    finally:
        for space in NAMES.values():
            pids = subprocess.run(
                ['ip', 'netns', 'pids', space], capture_output=True, text=True
            ).stdout.split()
            for pid in pids:
                subprocess.run(['kill', '-9', pid], capture_output=True)
            subprocess.run(['ip', 'netns', 'delete', space], capture_output=True)


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Starts a script of bash, with the commands it asks for that one machine does not have.

    Ends what is left of it.
    """
    for name, text in {'ssh': SSH, 'srun': SRUN, 'scontrol': SCONTROL}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    begun = []

    def begin(text):
        script = tmp_path / f'script{len(begun)}'
        script.write_text(text)
        settings = {
            **os.environ,
            'PATH': f'{tmp_path}:{os.environ["PATH"]}',
            'SLURM_JOB_NODELIST': ' '.join(NAMES),
        }
        begun.append(
            subprocess.Popen(
                ['bash', str(script)],
                env=settings,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
        return begun[-1]

    yield begin
    for process in begun:
        if process.poll() is None:
            process.kill()


def hosts(**more):
    return Hosts(names=tuple(NAMES), ranks=2, interface='eth0', port=29517, silence=10, **more)


def prepared(folder, model, steps):
    """Tiny weights and data, a run on four ranks of one machine, and the folder of the same run on two
    machines.
    """
    (kill_test.write_text if model == 'text' else kill_test.write_video)(folder)
    config = replace(kill_test.config_of(folder, model, steps), layout=Layout(tp=2))
    alone = folder / 'alone'
    alone.mkdir()
    (alone / 'config.json').write_text(kill_test.dumps(config))
    processes = kill_test.start(alone, 4)
    try:
        for process in processes:
            assert process.wait(300) == 0, (alone / 'log.txt').read_text()[-3000:]
    finally:
        kill_test.end(processes)
    return losses(alone), prepare_run(config, hosts(), folder / 'two').folder


def losses(folder):
    return [
        [record[name] for name in ('step', 'loss', 'grad_norm')]
        for record in map(json.loads, (folder / 'metrics.jsonl').read_text().splitlines())
    ]


def rank_process(folder, rank):
    "The process of a rank of the run folder."
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if (
                'mmkit.launcher.hosts' in (words := process.cmdline())
                and str(folder) in words
                and process.environ().get('RANK') == str(rank)
            ):
                return process


def test_the_check_names_the_machine_that_fails(machines, start):
    (first, one), (second, two) = NAMES.items()

    def line(number, space, limit):
        return f'ip netns exec {space} {try_line(hosts(), number, limit)}'

    said, _ = start(line(0, one, 2)).communicate(timeout=120)
    assert f'mmkit: {second} did not come to {first} within 2 s' in said
    # a machine knows itself by its addresses
    both = start(line(0, one, 60)), start(line(1, two, 60).replace(f'--here {second} ', ''))
    for process in both:
        assert re.search('^ok +machines +2 machines meet', process.communicate(timeout=200)[0], re.M)


def test_two_machines_video_as_one_does_from_the_slurm_script(machines, start, tmp_path):
    alone, folder = prepared(tmp_path, 'video', 4)
    process = start(slurm_script(hosts(), folder))
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said[-3000:]
    assert losses(folder) == alone and Run(folder).status == 'done'


def test_a_cut_link_is_a_clear_error_on_both_sides_and_the_same_script_goes_on(machines, start, tmp_path):
    alone, folder = prepared(tmp_path, 'text', 30)
    script = shell_script(hosts(), folder)
    process = start(script)
    deadline = time.monotonic() + 200
    while kill_test.lines(folder) < 5 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    assert Run(folder).status == 'running'
    machines('down')
    try:
        said, _ = process.communicate(timeout=60)
    finally:
        machines('up')
    first, second = NAMES
    for here, lost in ((first, second), (second, first)):
        assert re.search(f'^{here}: rank.: {here} has not heard of {lost} for 10 s', said, re.M), said[-3000:]
    assert process.returncode and Run(folder).status == 'failed' and 5 <= len(losses(folder)) < 30
    before, process = kill_test.lines(folder), start(script)
    while (
        kill_test.lines(folder) < before + 5 and process.poll() is None and time.monotonic() < deadline + 200
    ):
        time.sleep(0.05)
    rank_process(folder, 3).kill()
    # the same torchruns, on both machines, start all ranks again
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said[-3000:]
    assert (
        (folder / 'log' / 'rank0.txt').read_text().count('goes on from') == 2
        and losses(folder) == alone
        and Run(folder).status == 'done'
    )
