"""A disk that fills up while a run goes on: what stops it is said in words, though nobody could write it
down; and what was written before stays.
"""

import json
import subprocess
import sys

TARGET = """
import sys, time
from pathlib import Path
from mmkit.core.files import Jsonl
folder = Path(sys.argv[1])
Path(folder, 'fills').write_bytes(bytes(300_000))                  # of 400 kB
for step in range(1, 100_000): Jsonl(folder / 'metrics.jsonl').append({'step': step, 'loss': 1.0, 'words': 'x' * 500})
"""  # noqa: E501
SCRIPT = """
import json, sys
from mmkit import launch
from mmkit.core.files import Jsonl, write_atomic
from mmkit.launcher.run import RunFailed
said = []
run = launch({'loop': {'steps': 100_000}}, 1, folder=sys.argv[1], target=sys.argv[2])
try: run.wait(100)
except RunFailed as error: said.append(str(error))
before = len(run.records())
for write in (lambda: write_atomic(run.folder / 'note', 'x' * 10_000), lambda: Jsonl(run.folder / 'metrics.jsonl').append({'words': 'x' * 10_000})):
    try: write()
    except OSError as error: said.append(str(error))
print(json.dumps([said, before, len(run.records())]))
"""  # noqa: E501


def test_a_run_that_fills_its_disk_says_so(tmp_path):
    target, disk = tmp_path / 'target.py', tmp_path / 'disk'
    target.write_text(TARGET)
    disk.mkdir()
    inside = f'mount -t tmpfs -o size=400k none {disk} && exec "$@"'
    ran = subprocess.run(
        [
            'unshare',
            '--map-root-user',
            '--mount',
            'sh',
            '-c',
            inside,
            'sh',
            sys.executable,
            '-c',
            SCRIPT,
            str(disk / 'run'),
            str(target),
        ],
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert ran.returncode == 0, ran.stderr
    (failed, atomic, line), before, after = json.loads(ran.stdout)
    assert (
        f'the disk of {disk}/run is full: make room and start the run again' in failed
        and 'without a word' not in failed
    )
    for said in (atomic, line):
        assert f'the disk of {disk}/run is full: make room, or give a folder on another disk' in said
    assert before == after > 50  # what was there before is whole
