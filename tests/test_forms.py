"""A form in a kernel of Jupyter: boxes and words change each other over the wire, and a saved notebook keeps
the words as text.
"""

import nbformat
import pytest
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell, new_notebook

SHOWN = """import mmkit
form = mmkit.form(mmkit.Config(weights='w', layout=mmkit.Layout(tp=2)))
form"""
CHANGED = """form.boxes['layout.pp'].value = 2
form.words.value = form.words.value + ' loop.steps=70'
form.config"""
WRONG = """form.boxes['layout.tp'].value = 1
form.boxes['layout.sequence_parallel'].value = True"""
RIGHT = """form.boxes['layout.tp'].value = 4"""
CELLS = [SHOWN, CHANGED, SHOWN, WRONG, SHOWN, WRONG, RIGHT, SHOWN]
# number of the cell: what it keeps
ENDS = {
    0: ['weights=w layout.tp=2 layout.pp=2 loop.steps=70'],
    4: ['weights=w layout.tp=4 layout.sequence_parallel=true'],
    7: ['weights=w layout.tp=2'],
    2: [
        'weights=w layout.sequence_parallel=true',
        'layout.sequence_parallel needs layout.tp > 1; set tp=2 or sequence_parallel=false',
    ],
}


@pytest.fixture(scope='module')
def saved():
    "A notebook after its cells were executed, as it would be saved."
    notebook = new_notebook(cells=[new_code_cell(cell) for cell in CELLS])
    NotebookClient(notebook, timeout=300, kernel_name='python3', store_widget_state=False).execute()
    return notebook


@pytest.mark.parametrize('number', ENDS)
def test_a_saved_notebook_has_the_words_that_the_form_had_last(saved, number):
    boxes, text = saved.cells[number].outputs
    assert 'application/vnd.jupyter.widget-view+json' in boxes['data'] and not boxes['data']['text/plain']
    assert text['data']['text/plain'].splitlines() == ENDS[number]


def test_the_config_is_the_one_that_is_seen_and_the_notebook_stays_small(saved):
    assert (
        '"steps": 70' in saved.cells[1].outputs[-1]['data']['text/markdown']
        and '"pp": 2' in saved.cells[1].outputs[-1]['data']['text/markdown']
    )
    assert len(nbformat.writes(saved)) < 20_000
