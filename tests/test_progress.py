"""Progress as people see it: what a saved notebook holds, what a terminal and Kaggle's log get."""

import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from eaftlib.progress import progress_bar

ROOT = Path(__file__).parents[1]
WORK = """
import time
from eaftlib.progress import progress_bar
with progress_bar(1_572_864, "UNION 2048 x 31 models", "tok") as advance:
    for _ in range(64):
        advance(1_572_864 / 64 + 1e-9)
        time.sleep(0.03)
"""


def execute(source, monkeypatch, **environment):
    """Outputs of one cell, as a saved notebook has them."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)])
    client = NotebookClient(notebook, timeout=60, kernel_name="python3", allow_errors=True)
    client.execute()
    return notebook.cells[0].outputs


def text_of(output):
    assert output.output_type == "display_data"
    return output.data["text/plain"]


def test_a_saved_notebook_holds_one_line_with_the_last_state(monkeypatch):
    (output,) = execute(WORK, monkeypatch)
    name, share, done, seconds, rate = [text_of(output).split(": ")[0], *text_of(output).split(": ")[1].split(" · ")]
    assert (name, share, done) == ("UNION 2048 x 31 models", "100%", "1,572,864 tok")
    assert 1.8 < float(seconds.removesuffix(" s")) < 20
    assert int(rate.removesuffix(" tok/s").replace(",", "")) == pytest.approx(
        1_572_864 / float(seconds.removesuffix(" s")), rel=0.05
    )


def test_what_fails_shows_how_far_it_came(monkeypatch):
    failing = WORK.replace("time.sleep(0.03)", "1 / 0")
    line, error = execute(failing, monkeypatch)
    assert text_of(line).startswith("UNION 2048 x 31 models: 2% · 24,576 tok · ") and error.ename == "ZeroDivisionError"


def test_bytes_are_counted_as_bytes(monkeypatch):
    (output,) = execute(WORK.replace('"tok"', '"B"'), monkeypatch)
    assert "100% · 1.57MB · " in text_of(output) and text_of(output).endswith("B/s")


def test_hidden_is_hidden(monkeypatch, capsys):
    assert execute(WORK.replace('"tok")', '"tok", shown=False)'), monkeypatch) == []
    with progress_bar(10, "x", "tok", shown=False) as advance:
        advance(10)
    assert capsys.readouterr() == ("", "")


def test_kaggles_log_gets_a_line_a_minute(monkeypatch):
    """The clock runs a thousand times as fast: the work takes some 1,900 s."""
    fast = "import time as t, types\nimport eaftlib.progress as p\n"
    fast += "p.time = types.SimpleNamespace(monotonic=lambda s=t.monotonic(): 1000 * (t.monotonic() - s))\n"
    outputs = execute(fast + WORK, monkeypatch, KAGGLE_KERNEL_RUN_TYPE="Batch")
    lines = [o for o in outputs if o.output_type == "display_data"]
    printed = "".join(o.text for o in outputs if o.output_type == "stream" and o.name == "stdout").splitlines()
    assert len(lines) == 1 and "100%" in text_of(lines[0])
    assert 2 <= len(printed) <= 40 and all(line.startswith("UNION 2048 x 31 models: ") for line in printed)
    assert not [o for o in outputs if o.output_type == "stream" and o.name == "stderr"]


def test_a_short_pass_on_kaggle_prints_nothing(monkeypatch):
    assert len(execute(WORK, monkeypatch, KAGGLE_KERNEL_RUN_TYPE="Batch")) == 1


def test_a_terminal_gets_a_bar_that_ends_at_its_total(capsys):
    with progress_bar(100, "UNION 40", "tok") as advance:
        for _ in range(3):
            advance(40)
    out, err = capsys.readouterr()
    assert out == "" and "UNION 40: 100%" in err and "100/100" in err


def test_without_a_kernel_no_notebook_library_is_loaded():
    program = "import sys; from eaftlib.progress import progress_bar\n"
    program += "with progress_bar(1, 'x', 'tok') as advance: advance(1)\nprint('IPython' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n" and "100%" in done.stderr
