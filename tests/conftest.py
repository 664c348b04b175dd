"""For every test: one thread per process, no process left behind, and no test skipped in silence."""

import importlib.util
import os
import shutil
import signal
import subprocess

import psutil
import pytest

# two cores, several ranks: one thread each; the ranks inherit it
os.environ.setdefault('OMP_NUM_THREADS', '1')
# pytest-xdist makes its workers, and all they start, deaf to Ctrl-C
signal.signal(signal.SIGINT, signal.default_int_handler)


def networks_refused():
    "Why this machine makes no networks of its own; None where it does."
    name = f'mmkit-try-{os.getpid()}'
    made = subprocess.run(
        f'ip netns add {name} && ip netns delete {name}', shell=True, capture_output=True, text=True
    )
    return made.stderr.strip() or 'it fails' if made.returncode else None


def browser_missing():
    "What this machine lacks to open a notebook in a browser; None where nothing is missing."
    lacks = ['Chromium'] * (not any(map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))))
    return (
        ', '.join(
            lacks + [name for name in ('jupyterlab', 'playwright') if not importlib.util.find_spec(name)]
        )
        or None
    )


def disks_refused():
    "Why this machine makes no small disk of its own; None where it does."
    made = (
        subprocess.run(
            ['unshare', '--map-root-user', '--mount', 'mount', '-t', 'tmpfs', 'none', '/tmp'],
            capture_output=True,
            text=True,
        )
        if shutil.which('unshare')
        else None
    )
    return 'no unshare' if made is None else (made.stderr.strip() or 'it fails') if made.returncode else None


REFUSED, DISKLESS, MISSING = networks_refused(), disks_refused(), browser_missing()
WANTED = bool(os.environ.get('CI')) and os.environ.get('MMKIT_NO_BROWSER') != '1'
collect_ignore = (
    ['test_hosts.py'] * bool(REFUSED)
    + ['test_full_disk.py'] * bool(DISKLESS)
    + ['test_front.py'] * bool(MISSING and not WANTED)
)


def pytest_collect_file(file_path):
    "In CI a browser that is missing is an error, unless somebody says that it is meant so."
    if MISSING and WANTED and file_path.name == 'test_front.py':
        raise RuntimeError(
            f'test_front.py takes {MISSING}: install it, or set MMKIT_NO_BROWSER=1 to test without a browser'
        )


LONGEST_FIRST = [
    'test_resume.py',
    'test_notebook.py',
    'test_layouts.py',
    'test_video_layouts.py',
    'test_launch.py',
    'test_hosts.py',
    'test_front.py',
    'test_plan.py',
    'test_readme.py',
    'test_tutorial.py',
    'test_training.py',
]  # the last two on emulated NPUs


def pytest_configure(config):
    "Workers take files in the order below, not those with many tests first."
    config.option.loadscopereorder = False


def pytest_collection_modifyitems(items):
    """Files that take minutes come first, so that the last one does not keep one worker busy and the others
    waiting.
    """
    items.sort(
        key=lambda item: (
            LONGEST_FIRST.index(item.path.name) if item.path.name in LONGEST_FIRST else len(LONGEST_FIRST)
        )
    )


def pytest_addoption(parser):
    parser.addoption(
        '--steps',
        type=int,
        default=0,
        help=(
            'train so many steps under every layout (test_layouts.py, test_video_layouts.py) and in every run'
            ' on emulated NPUs (npu/test_training.py); by default a few'
        ),
    )


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    "In CI a skipped test is a failed one, and its reason says what is missing."
    report = (yield).get_result()
    if report.skipped and not hasattr(report, 'wasxfail') and os.environ.get('CI'):
        report.outcome, report.longrepr = 'failed', f'skipped, and CI skips nothing: {call.excinfo.value}'


@pytest.hookimpl(hookwrapper=True)
def pytest_make_collect_report(collector):
    "A file that skips itself counts the same."
    report = (yield).get_result()
    if report.skipped and os.environ.get('CI'):
        report.outcome, report.longrepr = 'failed', f'skipped, and CI skips nothing: {report.longrepr}'


def pytest_terminal_summary(terminalreporter):
    """The tables that tests recorded, also those of workers.

    What is not collected, and outside CI every skip, with its reason.
    """
    for name, text in (
        pair
        for reports in terminalreporter.stats.values()
        for report in reports
        for pair in getattr(report, 'user_properties', ())
        if getattr(report, 'when', '') == 'call'
    ):
        if name == 'table':
            terminalreporter.write_line(f'\n{text}\n')
    if REFUSED:
        terminalreporter.write_line(
            'not collected: test_hosts.py, two machines that train together, which takes root and `ip netns`'
            f' ({REFUSED})'
        )
    if DISKLESS:
        terminalreporter.write_line(
            'not collected: test_full_disk.py, a disk that fills up, which takes the right to mount one'
            f' ({DISKLESS})'
        )
    if MISSING and not WANTED:
        terminalreporter.write_line(
            f'not collected: test_front.py, a notebook in a real browser, which takes {MISSING}'
        )
    for report in terminalreporter.stats.get('skipped', []):
        terminalreporter.write_line(
            f'skipped {report.nodeid}:'
            f' {report.longrepr[-1] if isinstance(report.longrepr, tuple) else report.longrepr}'
        )


@pytest.fixture(autouse=True, scope='module')
def no_process_left_behind():
    "After the tests of one file, no process started by them is alive."
    before = {p.pid for p in psutil.Process().children(recursive=True)}
    yield
    started = [p for p in psutil.Process().children(recursive=True) if p.pid not in before]
    _, alive = psutil.wait_procs(started, timeout=5)
    # Python's own trackers stay
    alive = [
        p
        for p in alive
        if p.is_running()
        and p.status() != psutil.STATUS_ZOMBIE
        and 'multiprocessing.' not in ' '.join(p.cmdline())
    ]
    left = [f'{p.pid}: {" ".join(p.cmdline())[:120]}' for p in alive]
    for p in alive:
        p.kill()
    assert not left, f'processes left running: {left}'
