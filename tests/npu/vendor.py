"""Runs the vendor's own tests of the operators that mmkit uses against the emulated NPU: `python
tests/npu/vendor.py FOLDER [OPTIONS OF PYTEST]`, in the environment of prepare.py, with FOLDER a copy of
github.com/Ascend/op-plugin. They are not part of mmkit; their expected numbers are the vendor's, not ours.

A table says what became of each test; NPU_EMULATOR_DEVICES=8 also runs those of eight ranks. Tests that need
what is not emulated, or another chip, are named so; any other failure ends with code 1.
"""

import os
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as Tree
from collections import Counter
from pathlib import Path

NAMES = """flash_attention flash_attention_grad rms_norm rms_norm_backward rotary_mul rotary_mul_backward swi_glu swi_glu_backward""".split()  # noqa: E501
FILES = [f'test/test_custom_ops/test_npu_{name}.py' for name in NAMES] + [
    f'test/test_custom_ops/test_{name}.py' for name in ('all_gather_base_mm', 'mm_reduce_scatter_base')
]
PAGE = 'docs/zh/custom_APIs/torch_npu/torch_npu-npu_fusion_attention.md'
MISSING = re.compile(r'(?:the emulated NPU has no formula for|has no attribute|NotEmulated:?) *([^\n]{0,70})')


def example(page):
    "The first test in the code of a documentation page."
    codes = re.findall(r'```python\n(.*?)```', page.read_text(encoding='utf-8'), re.S)
    return next(code for code in codes if 'TestCase' in code)


def needs():
    "The folder of what torch_npu.testing imports beyond mmkit's own requirements."
    folder = Path(os.environ['NPU_EMULATOR']).parent / 'vendor'
    if not folder.is_dir():
        subprocess.run(
            [
                sys.executable,
                '-m',
                'pip',
                'install',
                '--quiet',
                '--no-deps',
                '--target',
                folder,
                'expecttest',
            ],
            check=True,
        )
    return str(folder)


def run(paths, room, options):
    "(name, outcome, reason) of every test in the files."
    report = room / 'report.xml'
    command = [
        sys.executable,
        '-m',
        'pytest',
        '-q',
        '-p',
        'no:cacheprovider',
        f'--junitxml={report}',
        '-o',
        'junit_family=xunit1',
        f'--rootdir={room}',
        *options,
        *map(str, paths),
    ]
    paths = os.pathsep.join([os.environ['PYTHONPATH'], needs()])
    ran = subprocess.run(
        command,
        cwd=room,
        capture_output=True,
        text=True,
        timeout=500,
        env={**os.environ, 'CI': '', 'PYTHONPATH': paths},
    )
    if not report.exists():
        raise SystemExit(f'the tests did not run:\n{ran.stdout[-2000:]}{ran.stderr[-2000:]}')
    return [outcome(case) for case in Tree.parse(report).iter('testcase')]


def outcome(case):
    "(name, passed | skipped | not emulated | failed, reason) of one test of a report."
    name = f'{Path(case.get("file") or case.get("classname")).stem.removeprefix("test_")}.{case.get("name")}'
    for found in case:
        if found.tag == 'skipped':
            return name, 'skipped', found.get('message', '')[:90]
        if found.tag in ('failure', 'error'):
            missing = MISSING.search(found.text or '')
            if missing and 'no attribute' not in missing[0]:
                return name, 'not emulated', missing[1].strip()
            return name, 'failed', (found.get('message') or '').strip().splitlines()[0][:150]
    return name, 'passed', ''


def main(folder, *options):
    "Prints the table of every file; the number of tests that failed."
    with tempfile.TemporaryDirectory() as room:
        page = Path(room) / 'test_documentation.py'
        page.write_text(example(Path(folder) / PAGE), encoding='utf-8')
        rows = run([page, *(Path(folder).resolve() / name for name in FILES)], Path(room), options)
    for name, result, reason in rows:
        print(f'{result:13} {name}' + (f' ({reason})' if reason else ''))
    counts = Counter(result for _, result, _ in rows)
    print(*(f'{count} {result}' for result, count in counts.items()), sep=', ')
    return counts['failed']


if __name__ == '__main__':
    sys.exit(min(main(*sys.argv[1:]), 1))
