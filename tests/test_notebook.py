"""Real training in a real notebook kernel: a killed rank and an interrupt are said in the cell, nothing is
left, and what the kernel did before is no matter.
"""

import json
import os
import signal
import threading
import time
from pathlib import Path

import nbformat
import psutil
import pytest
import stop_test
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

CELLS = [
    """
from pathlib import Path
from mmkit import Config, Data, Layout, Loop, Optim
from mmkit.launcher.run import launch
from mmkit.notebook.show import watch, watch_async
from mmkit.toy.qwen import conversation_texts, emoji_names, llava_toy, tiny_qwen2_5_vl
images, file = llava_toy('data', emoji_names(4), count=32, size=56)
start = tiny_qwen2_5_vl('start', conversation_texts(file), hidden=64)
config = Config(weights=str(start), data=Data(files=(str(file),), media_dir=str(images)), layout=Layout(tp=2),
                optim=Optim(lr=1e-3), loop=Loop(steps=100000, global_batch=4, micro_batch=4))
""",
    """
run = launch(config, 2, folder='run')
watch(run)
""",
]


def descendants():
    return [p for p in psutil.Process().children(recursive=True) if p.status() != psutil.STATUS_ZOMBIE]


def when_training(folder, act):
    "Calls `act` in a thread once some steps are on record; returns where the time of the call will stand."
    called = []

    def wait():
        metrics = folder / 'run' / 'metrics.jsonl'
        while not metrics.exists() or metrics.read_text().count('\n') < 3:
            time.sleep(0.1)
        called.append(time.time())
        act()

    threading.Thread(target=wait, daemon=True).start()
    return called


def rank_process(folder, rank):
    "The process of a rank, found by its log file, which it has open."
    log = str((folder / 'run' / 'log' / f'rank{rank}.txt').resolve())
    for process in descendants():
        try:
            held = {os.readlink(f'/proc/{process.pid}/fd/{n}') for n in (1, 2)}
        except OSError:
            continue
        if (
            held == {log}
            and f'RANK={rank}' in open(f'/proc/{process.pid}/environ').read().split('\0')  # noqa: SIM115
            and process.ppid() != process.pid
        ):
            return process


@pytest.mark.parametrize('end', ['kill', 'interrupt', 'interrupt while it awaits'])
def test_the_cell_says_how_training_ended(end, tmp_path):
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in CELLS])
    if 'awaits' in end:
        notebook.cells[1].source = CELLS[1].replace('watch(run)', 'await watch_async(run)')
    client = NotebookClient(notebook, timeout=200, resources={'metadata': {'path': str(tmp_path)}})

    def kill():
        os.kill(rank_process(tmp_path, 1).pid, signal.SIGKILL)

    def interrupt():
        os.kill(client.km.provisioner.process.pid, signal.SIGINT)

    called = when_training(tmp_path, kill if end == 'kill' else interrupt)
    with client.setup_kernel():
        client.execute_cell(client.nb.cells[0], 0)
        with pytest.raises(CellExecutionError) as error:
            client.execute_cell(client.nb.cells[1], 1)
        assert called, error.value
        seconds = time.time() - called[0]
        alive = [
            p.cmdline()
            for p in descendants()
            if str(tmp_path / 'run') in ' '.join(p.cmdline()) or 'mmkit.launcher.run' in ' '.join(p.cmdline())
        ]
    # longer where others want the machine, too
    assert seconds < 10 * max(1, os.getloadavg()[0] / os.cpu_count()) and not alive
    said = str(error.value)
    if end == 'kill':
        assert 'rank 1' in said and 'SIGKILL' in said, said
    else:
        assert (
            client.nb.cells[1].outputs[-1].traceback == ['interrupted: every rank of run has ended']
            and json.loads((tmp_path / 'run/log/end.json').read_text())['status'] == 'stopped'
        )


USED = """
import asyncio, os, torch, torch.distributed as dist
torch.set_num_threads(2)
weight = torch.randn(500, 500, requires_grad=True)
(weight @ weight).sum().backward()                          # threads of torch, also those of the backward
os.environ.update(MASTER_ADDR='127.0.0.1', MASTER_PORT='0', RANK='0', WORLD_SIZE='1', LOCAL_RANK='0')
store = dist.TCPStore('127.0.0.1', 0, is_master=True)
os.environ['MASTER_PORT'] = str(store.port)
dist.init_process_group('gloo', store=store, rank=0, world_size=1)
dist.all_reduce(weight.detach())
"""
TWO = """
from dataclasses import replace
from mmkit import watch_async
short = replace(config, loop=replace(config.loop, steps=4))
first, second = [launch(short, 2, folder=name) for name in ('first', 'second')]
await asyncio.gather(watch_async(first), watch_async(second))
dist.all_reduce(weight.detach())
assert dist.get_world_size() == 1 and first.status == second.status == 'done'
assert [r['loss'] for r in first.records()] == [r['loss'] for r in second.records()] and len(first.records()) == 4
"""  # noqa: E501


def test_a_kernel_that_was_used_runs_two_at_once(tmp_path):
    notebook = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell(source) for source in (USED, CELLS[0], TWO)]
    )
    NotebookClient(notebook, timeout=200, resources={'metadata': {'path': str(tmp_path)}}).execute()
    shown = [output.data for output in notebook.cells[-1].outputs if output.output_type == 'display_data']
    # without a page: one last picture of each
    assert sum('image/png' in data for data in shown) == 2
    assert (
        sum('done' in data.get('text/html', '') and 'step 4 of 4' in data['text/html'] for data in shown) == 2
    )


def test_starts_and_stops_leave_nothing_but_a_run_that_goes_on(tmp_path):
    "Three of the fifty tries of stop_test.py, the second of them stopped early."
    _, working, left, problems = stop_test.stopped(tmp_path, 3)
    assert working >= 2 and not left and not problems, problems


def test_the_video_tutorial_learns(tmp_path):
    "Tutorial 3 whole, with fewer steps than it shows: things take shape long before they move the asked way."
    notebook = nbformat.read(Path(__file__).parent.parent / 'nbs' / 'tutorials' / '3_wan2_1.ipynb', 4)
    (cell,) = (cell for cell in notebook.cells if "toy, steps = model == 'toy', 4500" in cell.source)
    cell.source = cell.source.replace('4500', '300')
    notebook.cells.append(
        nbformat.v4.new_code_cell(
            "print(json.dumps([result.scores, result.apart, [record['loss'] for record in run.records()]]))"
        )
    )
    NotebookClient(notebook, timeout=600, resources={'metadata': {'path': str(tmp_path)}}).execute()
    scores, apart, losses = json.loads(notebook.cells[-1].outputs[0].text)
    trained, untrained = scores['trained model, 96 clips'], scores['untrained model']
    assert (
        untrained['correlation'] < 0.45
        and trained['correlation'] > untrained['correlation'] + 0.15
        and untrained['strict'] == 0
    ), scores
    assert sum(losses[-50:]) < 0.6 * sum(losses[:50]) and apart <= 1, (
        apart,
        sum(losses[:50]),
        sum(losses[-50:]),
    )
    assert sum('data:video/mp4' in str(cell.get('outputs')) for cell in notebook.cells) == 3


def test_the_layouts_tutorial_shows_one_curve(tmp_path):
    "Tutorial 4 with two of its eleven layouts; all of them, and more, are in test_layouts.py."
    notebook = nbformat.read(Path(__file__).parent.parent / 'nbs' / 'tutorials' / '4_same_loss.ipynb', 4)
    (place,) = (number for number, cell in enumerate(notebook.cells) if cell.source.startswith('layouts = {'))
    notebook.cells.insert(
        place + 1,
        nbformat.v4.new_code_cell(
            "layouts = {name: layouts[name] for name in ('one process', 'pp 2 x cp 2')}"
        ),
    )
    notebook.cells.append(nbformat.v4.new_code_cell('print(len(apart), max(apart.values()))'))
    NotebookClient(notebook, timeout=300, resources={'metadata': {'path': str(tmp_path)}}).execute()
    assert (
        notebook.cells[-1].outputs[0].text.startswith('2 ')
        and sum('image/png' in str(cell.get('outputs')) for cell in notebook.cells) == 1
    )
