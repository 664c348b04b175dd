"""What a user sees: tutorial 1 and its run in a real browser (Chromium) on a real JupyterLab server, from Run
All to the kernel that is started again.
"""

import json
import os
import re
import secrets
import shutil
import socket
import statistics
import subprocess
import sys
import urllib.request
from pathlib import Path

import nbformat
import psutil
import pytest
from playwright.sync_api import sync_playwright
from test_launch import until

from mmkit.core.ranks import package_path
from mmkit.launcher.run import Run

CHROMIUM = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))))
FLAGS = [
    '--no-sandbox',
    '--disable-gpu',
    '--disable-quic',
    '--no-first-run',
    '--disable-background-networking',
    '--disable-component-update',
    '--disable-sync',
]
SHORT = {
    'Path(tempfile.mkdtemp())': "Path('job').resolve()",
    'toy_job(workspace, seed=0)': 'toy_job(workspace, seed=0, pictures=128, held_out=12, steps=60)',
    # tutorial 1 with fewer pictures and steps
    'step=100': 'step=60',
    'assert trained >= 0.9 and untrained < 0.2\n': '',
}
MORE = [
    """from mmkit import Run, launch, override
longer = override(config, ['loop.steps=100000', 'loop.sample_every=0'])
run = launch(longer, ranks=2, folder='stopped')
await watch_async(run)""",
    """run = launch({'loop': {'steps': 9}, 'mode': 'fail'}, ranks=2, folder='failed', target='toy.py')
await watch_async(run)""",
    """run = launch({'loop': {'steps': 9}, 'mode': 'flood'}, ranks=2, folder='flood', target='toy.py')
await watch_async(run)""",
    """run = launch({'loop': {'steps': 100000}, 'mode': 'long'}, ranks=2, folder='stays', target='toy.py', stay=True)
run""",  # noqa: E501
    """from mmkit import Run
Run('stays')""",
]
TOY = """
import json, os, sys, time
from pathlib import Path
import torch
import torch.distributed as dist
from mmkit.core.files import Jsonl
folder = Path(sys.argv[1])
config, rank = json.loads((folder / 'config.json').read_text()), int(os.environ['RANK'])
dist.init_process_group('gloo')
for step in range(1, config['loop']['steps'] + 1):
    if config['mode'] == 'fail' and rank == 1 and step == 5: raise ArithmeticError('rank one cannot go on')
    if config['mode'] == 'flood' and step < 5: print(('a line of a rank that tells too much, ' * 2 + '\\n') * 50000, end='')
    dist.all_reduce(torch.ones(1))
    if rank == 0: Jsonl(folder / 'metrics.jsonl').append({'step': step, 'loss': 1.0 / step, 'seconds': 0.1, 'time': time.time(), 'peak_memory': [2**28, 2**29]})
    time.sleep(0.1)
"""  # noqa: E501
# cells out of sight stay in the page
SETTINGS = {
    'notebook-extension/tracker': {'windowingMode': 'none'},
    'apputils-extension/notification': {'fetchNews': 'false'},
}
WATCHED = """() => {
  window.seen = {}; window.pictures = new Set(); window.longest = 0;
  const look = () => {
    for (const output of document.querySelectorAll('.jp-OutputArea-output')) {
      const found = output.textContent.match(/, step (\\d+) of \\d+/);
      if (found && !(found[1] in window.seen)) window.seen[found[1]] = Date.now() / 1000;
      for (const image of output.querySelectorAll('img')) window.pictures.add(image.src.length + image.src.slice(-99));
    }
  };
  new MutationObserver(look).observe(document.querySelector('.jp-Notebook'), {subtree: true, childList: true, characterData: true, attributes: true});
  let before = performance.now();
  const beat = () => { const now = performance.now(); window.longest = Math.max(window.longest, now - before); before = now; setTimeout(beat, 50); };
  beat();
}"""  # noqa: E501
READY = (
    '(() => { const c = window.jupyterapp?.shell?.currentWidget?.sessionContext; return c && c.isReady &&'
    " c.session?.kernel?.status === 'idle' })()"
)


@pytest.fixture(scope='module')
def room(tmp_path_factory):
    "A folder with tutorial 1, shortened, and a notebook of more cells after it."
    room = tmp_path_factory.mktemp('front')
    notebook = nbformat.read(Path(__file__).parent.parent / 'nbs' / 'tutorials' / '1_first_run.ipynb', 4)
    for cell in notebook.cells:
        if cell.cell_type == 'code':
            cell.outputs = []
    for old, new in SHORT.items():
        (cell,) = (cell for cell in notebook.cells if cell.cell_type == 'code' and old in cell.source)
        cell.source = cell.source.replace(old, new)
    nbformat.write(notebook, room / 'tutorial.ipynb')
    (room / 'toy.py').write_text(TOY)
    for name, setting in SETTINGS.items():
        file = room / 'settings' / '@jupyterlab' / f'{name}.jupyterlab-settings'
        file.parent.mkdir(parents=True)
        file.write_text(json.dumps(setting))
    return room


@pytest.fixture(scope='module')
def server(room):
    "A JupyterLab server on that folder: (address, token)."
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        port = probe.getsockname()[1]
    token = secrets.token_hex(16)
    own = {name: str(room / name) for name in ('JUPYTER_CONFIG_DIR', 'JUPYTER_RUNTIME_DIR', 'IPYTHONDIR')}
    words = [
        '--no-browser',
        '--ip=127.0.0.1',
        f'--port={port}',
        f'--IdentityProvider.token={token}',
        '--allow-root',
        f'--ServerApp.root_dir={room}',
        '--expose-app-in-browser',
        '--LabApp.news_url=',
        '--LabApp.extension_manager=readonly',
        f'--LabApp.user_settings_dir={room / "settings"}',
    ]
    with open(room / 'server.txt', 'w') as log:
        process = subprocess.Popen(
            [sys.executable, '-m', 'jupyterlab', *words],
            cwd=room,
            stdout=log,
            stderr=log,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            env={**os.environ, **own, 'PYTHONPATH': package_path()},
        )
    try:
        until(lambda: answers(f'http://127.0.0.1:{port}/api/status?token={token}'), 150)
        yield f'http://127.0.0.1:{port}', token
    finally:
        family = psutil.Process(process.pid).children(recursive=True)
        process.terminate()
        process.wait(20)
        for one in psutil.wait_procs(family, timeout=5)[1]:
            one.kill()


@pytest.fixture(scope='module')
def page(server, room):
    "The tutorial, open in the browser, with a kernel that waits."
    address, token = server
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, headless=True, args=FLAGS)
        page = browser.new_page(viewport=dict(width=1280, height=1400))
        page.set_default_timeout(150_000)
        page.goto(f'{address}/lab/tree/tutorial.ipynb?token={token}&reset')
        page.wait_for_selector('.jp-NotebookPanel .jp-Cell')
        page.wait_for_function(READY)
        page.evaluate(WATCHED)
        yield page
        browser.close()


def answers(address):
    try:
        return urllib.request.urlopen(address, timeout=2).status == 200
    except OSError:
        return False


def command(page, name):
    page.evaluate(f"(window.jupyterapp.commands.execute('{name}'), 1)")


def picture(page, name):
    "A picture of the page for people, where FRONT_PICTURES says that they want some."
    if folder := os.environ.get('FRONT_PICTURES'):
        page.screenshot(path=f'{folder}/{name}.png')


def run_cell(page, source):
    "Puts a cell at the end of the notebook, runs it and returns it."
    command(page, 'notebook:enter-command-mode')
    page.evaluate(
        'window.jupyterapp.shell.currentWidget.content.activeCellIndex ='
        ' window.jupyterapp.shell.currentWidget.content.widgets.length - 1'
    )
    command(page, 'notebook:insert-cell-below')
    page.wait_for_timeout(300)
    page.evaluate(
        'source => {'
        ' window.jupyterapp.shell.currentWidget.content.activeCell.model.sharedModel.setSource(source) }',
        source,
    )
    command(page, 'notebook:run-cell')
    cell = page.locator('.jp-Cell').last
    page.evaluate("[...document.querySelectorAll('.jp-Cell')].at(-1).scrollIntoView()")
    return cell


def idle(page, seconds=120):
    page.wait_for_function(
        '!window.jupyterapp.shell.currentWidget.content.widgets.some(w =>'
        " w.promptNode?.textContent.includes('*')) && " + READY,
        timeout=1000 * seconds,
    )


def ranks_of(folder):
    "The living processes of a run folder: agent and ranks, which have its path in their command line."
    found = []
    for process in psutil.process_iter():
        try:
            if str(folder) in process.cmdline() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            pass
    return found


def test_the_tutorial_runs_and_its_loss_is_live(page, room):
    command(page, 'notebook:run-all-cells')
    metrics = room / 'job' / 'run' / 'metrics.jsonl'
    until(metrics.exists, 240)
    page.wait_for_function('window.pictures.size > 3')
    page.wait_for_selector('button:has-text("Stop")')
    page.evaluate(
        "document.querySelector('.jp-OutputArea-output progress').scrollIntoView({block: 'center'})"
    )
    picture(page, '1_live')
    idle(page)
    picture(page, '2_tutorial_over')
    records, seen = Run(room / 'job' / 'run').records(), page.evaluate('window.seen')
    late = [
        min(when for step, when in seen.items() if int(step) >= record['step']) - record['time']
        for record in records
    ]
    print(
        f'loss on the page after its record: first {late[0]:.2f} s, median {statistics.median(late):.2f} s,'
        f' 95 of 100 within {statistics.quantiles(late, n=20)[-1]:.2f} s, last of all {max(late):.2f} s;'
        f' {page.evaluate("window.pictures.size")} pictures'
    )
    busy = os.getloadavg()[0] / os.cpu_count()
    if busy < 1:
        assert late[0] <= 1 and statistics.quantiles(late, n=20)[-1] <= 1, late
    # others want the machine, too
    else:
        assert late[0] <= max(1, busy / 2) and statistics.median(late) <= max(1, busy / 2), late
    assert len(seen) >= 5 and page.evaluate('window.pictures.size') >= 5
    assert (
        page.locator('button:has-text("Stop")').count() == 0
        and page.locator('.jp-OutputArea-output[data-mime-type*="stderr"]').count() == 0
    )
    assert page.locator('text=/% of 12 right; before/').count() == 1


def test_the_stop_button_ends_all_ranks_of_a_training(page, room):
    cell = run_cell(page, MORE[0])
    until(lambda: (room / 'stopped' / 'metrics.jsonl').exists(), 240)
    cell.locator('text=/running, step/').wait_for()
    processes = ranks_of('stopped')
    assert len(processes) >= 3
    cell.locator('button:has-text("Stop")').click()
    cell.locator('text=/stopped, step/').wait_for()
    assert (
        not [one for one in processes if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]
        and Run(room / 'stopped').status == 'stopped'
    )
    assert Run(room / 'stopped').checkpoints()  # from which it can go on
    idle(page)
    picture(page, '3_stopped')


def test_a_failing_rank_shows_its_traceback(page, room):
    cell = run_cell(page, MORE[1])
    cell.locator('text=/ArithmeticError: rank one cannot go on/').first.wait_for()
    idle(page)
    said = cell.locator('.jp-OutputArea').inner_text()
    assert (
        re.search(r'rank 1 of failed failed \(exit code 1\)', said)
        and 'toy.py' in said
        and 'mmkit' not in said.split('Traceback')[1]
    ), said
    picture(page, '4_failed')


def test_a_flood_of_lines_leaves_page_and_notebook_small(page, room):
    page.evaluate('window.longest = 0')
    cell = run_cell(page, MORE[2])
    cell.locator('text=/done, step 9 of 9/').wait_for()
    idle(page)
    assert (room / 'flood' / 'log' / 'rank1.txt').read_bytes().count(b'\n') >= 200_000
    command(page, 'docmanager:save')
    until(
        lambda: (
            'flood' in (room / 'tutorial.ipynb').read_text()
            and 'done, step 9 of 9' in (room / 'tutorial.ipynb').read_text()
        )
    )
    size, longest = (room / 'tutorial.ipynb').stat().st_size, page.evaluate('window.longest')
    print(f'saved notebook {size / 1000:.0f} kB; the page was never busy for longer than {longest:.0f} ms')
    assert size < 600_000 and longest < 1000
    saved = nbformat.read(room / 'tutorial.ipynb', 4)
    # one static picture of every run
    assert (
        sum('image/png' in output.get('data', {}) for one in saved.cells for output in one.get('outputs', []))
        >= 4
    )
    picture(page, '5_flood')


def test_a_kernel_that_is_started_again_sees_the_run(page, room):
    cell = run_cell(page, MORE[3])
    cell.locator('text=/running, step/').wait_for()
    assert cell.locator('button:has-text("Stop")').is_visible()
    page.evaluate('window.jupyterapp.shell.currentWidget.sessionContext.restartKernel()')
    page.wait_for_function(READY)
    before = len(Run(room / 'stays').records())
    cell = run_cell(page, MORE[4])
    cell.locator('text=/running, step/').wait_for()

    def shown():
        return int(re.search(r'step (\d+) of', cell.locator('.jp-OutputArea').inner_text())[1])

    first = shown()
    until(lambda: shown() > first + 3)  # it follows, and the cell is over
    assert first >= before and page.evaluate(READY)
    picture(page, '6_attached_again')
    processes = ranks_of('stays')
    cell.locator('button:has-text("Stop")').click()
    cell.locator('text=/stopped, step/').wait_for()
    assert len(processes) >= 3 and not [
        one for one in processes if one.is_running() and one.status() != psutil.STATUS_ZOMBIE
    ]
    picture(page, '7_stopped_again')
