"""Plants mistakes in the emulator's formulas, one at a time, and says which check sees each: `python
tests/npu/mistakes.py [OP_PLUGIN]`.

In the environment of prepare.py. The checks are tests/npu/test_npu_operators.py and, with a copy of
github.com/Ascend/op-plugin, the vendor's own tests.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
# its tests of what is emulated
VENDOR = {
    'rotary': 'rotary',
    'atten': 'flash and not drop and not graph and not tensor',
    'rms': 'rms',
    'swi': 'swi',
    'adam': '',
}
MISTAKES = {
    'rotary turns the other way': (
        'rotary',
        'formulas.py',
        'return torch.cat([-b, a], -1)',
        'return torch.cat([b, -a], -1)',
    ),
    'interleaved rotary turns the other way': (
        'rotary',
        'formulas.py',
        'torch.stack([-x[..., 1::2], x[..., 0::2]], -1)',
        'torch.stack([x[..., 1::2], -x[..., 0::2]], -1)',
    ),
    'scores are scaled 5 % too much': (
        'atten',
        'attention.py',
        '.transpose(-1, -2) * scale\n',
        '.transpose(-1, -2) * scale * 1.05\n',
    ),
    'a causal mask hides the diagonal': (
        'atten',
        'attention.py',
        'return column > row ',
        'return column >= row + (row == 0) ',
    ),
    'the lower right mask is off by one': (
        'atten',
        'attention.py',
        'diagonal = row + keys - queries ',
        'diagonal = row + keys - queries + 1 ',
    ),
    'statistics of packed sequences in the other order': (
        'atten',
        'attention.py',
        "if softmax_layout == 'TND' else x[0]",
        "if softmax_layout != 'TND' else x[0]",
    ),
    'gradient of attention without its inner product': (
        'atten',
        'attention.py',
        ' - (gradient * result).sum(-1, keepdim=True)',
        '',
    ),
    'rms_norm ignores epsilon': ('rms', 'formulas.py', 'keepdim=True) + epsilon)', 'keepdim=True) + 1e-6)'),
    'rms_norm divides the gradient twice': ('rms', 'formulas.py', 'rstd**3', 'rstd**4'),
    'swiglu gates the other half': (
        'swi',
        'formulas.py',
        'torch.nn.functional.silu(a) * b',
        'torch.nn.functional.silu(b) * a',
    ),
    'AdamW decays by the rate squared': (
        'adam',
        'formulas.py',
        '1 - lr * weight_decay',
        '1 - lr * lr * weight_decay',
    ),
}


def planted(name, room):
    "A copy of the emulator with one mistake: its folder of startup."
    _, file, right, wrong = MISTAKES[name]
    startup = room / re.sub(r'\W+', '-', name)
    shutil.copytree(HERE / 'startup', startup, ignore=shutil.ignore_patterns('__pycache__'))
    path = startup / 'npu_emulator' / file
    text = path.read_text(encoding='utf-8')
    if text.count(right) != 1:
        raise SystemExit(f'{name}: {right!r} stands {text.count(right)} times in {file}')
    path.write_text(text.replace(right, wrong), encoding='utf-8')
    return startup


def failures(command, startup):
    "The names of the tests that fail with an emulator in this folder."
    paths = os.environ['PYTHONPATH'].replace(str(HERE / 'startup'), str(startup))
    ran = subprocess.run(
        command, capture_output=True, text=True, timeout=600, env={**os.environ, 'PYTHONPATH': paths}
    )
    return sorted(
        {
            re.sub(r'\[.*', '', name)
            for name in re.findall(r'^(?:FAILED \S*::|failed +)(\S+)', ran.stdout, re.M)
        }
    )


def main(vendor=None):
    "Prints a line for every mistake; the number of those that nothing saw."
    own = [
        sys.executable,
        '-m',
        'pytest',
        '-q',
        '-p',
        'no:cacheprovider',
        str(HERE / 'test_npu_operators.py'),
    ]
    unseen = 0
    with tempfile.TemporaryDirectory() as room:
        for name in MISTAKES:
            startup, words = planted(name, Path(room)), VENDOR[MISTAKES[name][0]]
            checks = {
                'own': own,
                **(
                    {'vendor': [sys.executable, str(HERE / 'vendor.py'), vendor, '-k', words]}
                    if vendor and words
                    else {}
                ),
            }
            found = {check: failures(command, startup) for check, command in checks.items()}
            unseen += not any(found.values())
            print(
                f'{name}: '
                + '; '.join(
                    f'{check}: {", ".join(names) or "sees nothing"}' for check, names in found.items()
                ),
                flush=True,
            )
    return unseen


if __name__ == '__main__':
    sys.exit(min(main(*sys.argv[1:]), 1))
