"Runs that end badly: the right rank is named, nothing is left behind, nothing stalls."

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import kill_test
import psutil
import pytest

from mmkit.core.values import dumps
from mmkit.launcher.folder import agent_process
from mmkit.launcher.run import Run, RunFailed, launch

TARGET = """
import os, signal, sys, time
from pathlib import Path
import torch
import torch.distributed as dist
from mmkit.core.files import Jsonl
folder = Path(sys.argv[1])
mode = (folder / 'config.json').read_text()
rank = int(os.environ['RANK'])
(folder / f'pid{rank}').write_text(str(os.getpid()))
dist.init_process_group('gloo')
metrics = Jsonl(folder / 'metrics.jsonl')
for step in range(1, 11 if 'short' in mode else 1000):
    if rank == 1 and step == 3 and 'raise' in mode: raise ArithmeticError('rank one cannot go on')
    if rank == 1 and step == 3 and 'kill' in mode: os.kill(os.getpid(), signal.SIGKILL)
    if step == 1 and 'flood' in mode: print('x' * 99 + '\\n' + 'y' * 99, end='\\n') or print(('z' * 99 + '\\n') * 20000)
    if step == 1 and 'deaf' in mode: signal.signal(signal.SIGTERM, lambda *_: None)
    dist.all_reduce(torch.ones(1))
    if rank == 0: metrics.append({'step': step, 'loss': 1.0 / step, 'time': time.time()})
    if 'short' not in mode: time.sleep(0.05)
"""  # noqa: E501
PARENT = """
import signal
signal.signal(signal.SIGHUP, signal.SIG_DFL)          # nohup in front of the tests would make this process deaf to it
import sys, time
from mmkit.launcher.run import launch
run = launch({'mode': 'long'}, ranks=2, folder=sys.argv[1], target=sys.argv[2])
run.wait()
"""  # noqa: E501
STAYS = """
import sys
from mmkit import launch, load_config
launch(load_config(sys.argv[1]), 2, folder=sys.argv[2], stay=True, restarts=1)
"""


@pytest.fixture(scope='module')
def target(tmp_path_factory):
    path = tmp_path_factory.mktemp('target') / 'target.py'
    path.write_text(TARGET)
    return str(path)


@pytest.fixture
def start(tmp_path, target):
    "Starts the target in a mode; whatever the test leaves running is stopped at its end."
    runs = []

    def begin(mode, name='run', **settings):
        runs.append(launch({'mode': mode}, ranks=2, folder=tmp_path / name, target=target, **settings))
        return runs[-1]

    yield begin
    for run in runs:
        run.stop(grace=0)


def until(condition, seconds=40):
    "Waits for a condition; the seconds it took."
    began = time.time()
    while not condition():
        assert time.time() - began < seconds, 'waited in vain'
        time.sleep(0.05)
    return time.time() - began


def family(run):
    "The agent and both ranks of a run that has written its first record."
    until(lambda: run.records())
    agent = json.loads((run.folder / 'log' / 'agent.json').read_text())['pid']
    return [
        psutil.Process(pid)
        for pid in (agent, *(int((run.folder / f'pid{rank}').read_text()) for rank in (0, 1)))
    ]


def alive(processes):
    return [p for p in processes if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


@pytest.fixture(scope='module')
def failed(tmp_path_factory, target):
    "A run whose rank 1 raised an error, long over."
    run = launch({'mode': 'raise'}, ranks=2, folder=tmp_path_factory.mktemp('failed') / 'run', target=target)
    until(lambda: not run.running)
    return run


def test_an_exception_is_reported_with_its_rank_and_traceback(failed):
    run = failed
    with pytest.raises(RunFailed) as caught:
        run.wait(60)
    assert caught.value.rank == 1 and caught.value.exit_code == 1 and run.status == 'failed'
    assert caught.value.words.startswith('Traceback') and caught.value.words.endswith(
        'ArithmeticError: rank one cannot go on'
    )
    assert 'target.py' in caught.value.words and 'mmkit' not in caught.value.words
    assert not alive(
        [
            psutil.Process(pid)
            for pid in map(int, (p.read_text() for p in run.folder.glob('pid*')))
            if psutil.pid_exists(pid)
        ]
    )


def test_a_killed_rank_is_named_within_ten_seconds(start):
    run = start('kill')
    processes = family(run)
    until(lambda: len(run.records()) >= 2)
    with pytest.raises(RunFailed) as caught:
        run.wait(60)
    assert (caught.value.rank, caught.value.ending) == (1, 'SIGKILL')
    assert time.time() - run.records()[-1]['time'] < 10 and not alive(processes)


def test_stop_leaves_no_process(start):
    run = start('long')
    processes = family(run)
    assert len(alive(processes)) == 3 and run.status == 'running'
    run.stop()
    assert run.status == 'stopped' and not alive(processes) and run.wait(1) is run


def test_stop_ends_ranks_that_ignore_the_signal(start):
    run = start('deaf')
    processes = family(run)
    began = time.time()
    run.stop(grace=1)
    assert run.status == 'stopped' and not alive(processes) and time.time() - began < 8


@pytest.mark.parametrize('name', ['SIGKILL', 'SIGTERM', 'SIGHUP', 'SIGINT'])
def test_a_parent_that_dies_takes_all_along(tmp_path, target, name):
    script, folder = tmp_path / 'parent.py', tmp_path / 'run'
    script.write_text(PARENT)
    parent = subprocess.Popen(
        [sys.executable, str(script), str(folder), target],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    until(lambda: (folder / 'command.txt').exists())
    run = Run(folder)  # opened again from another process
    processes = family(run)
    assert run.status == 'running'
    parent.send_signal(getattr(signal, name))
    assert until(lambda: not alive(processes)) < 8
    parent.wait(10)
    assert run.status == 'stopped'
    assert name != 'SIGINT' or 'every rank of' in parent.stderr.read()


def test_a_killed_agent_takes_the_ranks_along(start):
    run = start('long')
    processes = family(run)
    processes[0].kill()
    assert until(lambda: not alive(processes)) < 5
    with pytest.raises(RunFailed, match='launcher') as caught:
        run.wait(5)
    assert caught.value.rank is None and run.status == 'failed'


def test_an_interrupt_while_waiting_stops_the_run(start):
    run = start('long')
    processes = family(run)

    def interrupt():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.wait(watch=interrupt)
    assert run.status == 'stopped' and not alive(processes)


def test_a_run_that_stays_outlives_its_parent_and_is_found_again(tmp_path, target):
    script, folder = tmp_path / 'parent.py', tmp_path / 'run'
    script.write_text(PARENT.replace('target=', 'stay=True, target=').replace('run.wait()', ''))
    subprocess.run([sys.executable, str(script), str(folder), target], check=True, timeout=60)
    run = Run(folder)
    processes = family(run)
    assert run.status == 'running' and len(alive(processes)) == 3
    run.stop()
    assert not alive(processes) and run.status == 'stopped'


def test_a_training_that_stays_is_found_again_and_goes_on_after_a_rank_was_killed(tmp_path):
    """A training that its notebook has left: torchrun starts its ranks again from the newest checkpoint, with
    the losses of a run that nobody killed.
    """
    kill_test.write_text(tmp_path)
    config, folder = kill_test.config_of(tmp_path, 'text', 40), tmp_path / 'killed'
    (tmp_path / 'config.json').write_text(dumps(config))
    subprocess.run(
        [sys.executable, '-c', STAYS, str(tmp_path / 'config.json'), str(folder)], check=True, timeout=120
    )
    run = Run(folder)
    try:
        until(lambda: len(run.records()) >= 5, 200)
        agent = agent_process(folder)
        next(process for process in agent.children() if process.environ().get('RANK') == '1').kill()
        whole = launch(config, 2, folder=tmp_path / 'whole').wait(300)
        assert run.wait(300).status == 'done'
    finally:
        run.stop(grace=0)

    def seen(run):
        return [[record[name] for name in ('step', 'loss', 'grad_norm')] for record in run.records()]

    assert seen(run) == seen(whole) and len(seen(run)) == 40
    assert (folder / 'log' / 'rank0.txt').read_text().count('goes on from') == 1 and json.loads(
        (folder / 'log' / 'agent.json').read_text()
    )['pid'] == agent.pid


def test_a_recycled_process_number_is_not_the_agent(failed, tmp_path):
    run = Run(shutil.copytree(failed.folder, tmp_path / 'copy'))
    note = run.folder / 'log' / 'agent.json'
    mine = {**json.loads(note.read_text()), 'pid': os.getpid(), 'started': psutil.Process().create_time()}
    note.write_text(json.dumps({**mine, 'started': mine['started'] - 10}))
    assert not run.running  # so stop() would not end this process
    note.write_text(json.dumps(mine))
    assert run.running  # the time of the start is what tells them apart


def test_two_runs_of_one_name_get_two_folders_and_a_flood_does_not_stall(tmp_path, target, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runs = [launch({'mode': 'short flood'}, ranks=1, name='same', target=target) for _ in range(2)]
    try:
        assert [run.folder for run in runs] == [Path('runs/same'), Path('runs/same-2')]
        for run in runs:
            assert run.wait(60).status == 'done'
        assert (runs[0].folder / 'log' / 'rank0.txt').stat().st_size > 2_000_000
        assert runs[0].tail(2).splitlines()[0] == 'z' * 99
    finally:
        for run in runs:
            run.stop(grace=0)
