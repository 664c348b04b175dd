"Tutorial 5 on emulated NPUs: what an owner of real ones runs, shorter."

from pathlib import Path

import nbformat
from nbclient import NotebookClient

TUTORIAL = Path(__file__).parents[2] / 'nbs' / 'tutorials' / '5_on_ascend.ipynb'

FEWER = """
from mmkit.diagnostics import conformance
rows_of = conformance.rows_of
conformance.rows_of = lambda *given: {title: row for title, row in rows_of(*given).items() if title in ('CPU', 'one rank', 'zero1, bfloat16')}
"""  # noqa: E501


def test_the_tutorial_finds_that_fused_operations_and_models_are_near(tmp_path):
    """Two steps, on the CPU, on one NPU, and on two in bfloat16.

    The other formats and layouts are in test_training.py.
    """
    notebook = nbformat.read(TUTORIAL, 4)
    (cell,) = (cell for cell in notebook.cells if 'steps, peak = 20' in cell.source)
    cell.source = cell.source.replace('peak = 20', 'peak = 2', 1) + FEWER
    notebook.cells.append(
        nbformat.v4.new_code_cell(
            'print(found.device, found.fused, found.good, len(found.operations), len(found.runs))'
        )
    )
    NotebookClient(notebook, timeout=1000, resources={'metadata': {'path': str(tmp_path)}}).execute()
    assert notebook.cells[-1].outputs[0].text.split() == ['npu', 'True', 'True', '28', '6'], notebook.cells[
        -1
    ].outputs
