"""Two ranks with data loader workers are started and stopped again and again, some before their first step:
nothing is left alive, every step made is saved, and the next start goes on from it.

`python tests/stop_test.py --tries 50` does it with figures; test_notebook.py with three tries.
"""

import random
import sys
import time
from argparse import ArgumentParser
from dataclasses import replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import kill_test
import psutil

from mmkit.launcher.folder import alive
from mmkit.launcher.resume import resume
from mmkit.launcher.run import launch


def config_of(folder):
    "Training that would go on for long and saves only when it is stopped."
    kill_test.write_text(folder)
    config = kill_test.config_of(folder, 'text', 100_000)
    return replace(
        config,
        data=replace(config.data, workers=2),
        loop=replace(config.loop, save_every=0, keep_checkpoints=1),
    )


def processes_of(folder):
    "Agent, ranks and workers of a run, which have its folder in their command line."
    found = []
    for process in psutil.process_iter():
        try:
            if str(folder) in process.cmdline() and alive(process):
                found.append(process)
        except psutil.Error:
            pass
    return found


def try_once(begin, draw, early):
    """Starts, waits for a random moment, stops.

    Returns (seconds of the stop, steps made, processes left, problems).
    """
    run = begin()
    before, started = kill_test.lines(run.folder), time.monotonic()
    if early:
        time.sleep(draw.random() * 6)
    else:
        while kill_test.lines(run.folder) <= before and run.running and time.monotonic() < started + 120:
            time.sleep(0.02)
        time.sleep(draw.random())
    asked = time.monotonic()
    run.stop()
    seconds, left = time.monotonic() - asked, processes_of(run.folder)
    for process in left:
        process.kill()
    steps = [record['step'] for record in run.records()]
    saved = int(run.checkpoints()[-1].name[5:]) if run.checkpoints() else 0
    problems = [f'status {run.status}'] * (run.status != 'stopped') + [f'steps {steps[-9:]}'] * (
        steps != list(range(1, len(steps) + 1))
    )
    return (
        seconds,
        len(steps) - before,
        len(left),
        problems + [f'{len(steps)} steps made and {saved} saved'] * (saved != len(steps)),
    )


def stopped(folder, tries, seed=0, say=lambda words: None):
    """So many tries in one run folder.

    Returns the stops' seconds, the number of tries that made steps, of processes left, and the problems.
    """
    config, draw, run = config_of(folder), random.Random(seed), folder / 'run'
    seconds, working, left, problems = [], 0, 0, []
    for number in range(1, tries + 1):
        begin = (lambda: resume(run)) if run.exists() else lambda: launch(config, 2, folder=run)
        took, steps, alive_then, found = try_once(begin, draw, number % 4 == 2)
        seconds = [*seconds, took]
        working = working + (steps > 0)
        left = left + alive_then
        problems = problems + [f'try {number}: {words}' for words in found]
        say(
            f'try {number} of {tries}: {steps} steps, stopped in {took:.1f} s, {alive_then} processes left'
            f' {found or ""}'
        )
    return seconds, working, left, problems


def main():
    "All tries, with one line each."
    words = ArgumentParser()
    words.add_argument('--tries', type=int, default=50)
    words.add_argument('--seed', type=int, default=0)
    tries, seed = vars(words.parse_args()).values()
    with TemporaryDirectory(prefix='stop-') as folder:
        seconds, working, left, problems = stopped(
            Path(folder), tries, seed, say=lambda words: print(words, flush=True)
        )
        steps = kill_test.lines(Path(folder, 'run'))
    print(
        f'{tries} tries, {working} of them with steps, {steps} steps in all; a stop took'
        f' {median(seconds):.1f} s (median), {max(seconds):.1f} s at most; {left} processes left;'
        f' {problems or "every step made was saved and the next start went on from it"}'
    )
    sys.exit(bool(left or problems))


if __name__ == '__main__':
    main()
