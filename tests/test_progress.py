"""Progress where it is seen: in an executed notebook's file, on a terminal, in Kaggle's log."""

import io
import os
import pty
import re
import subprocess
import sys
import termios
from pathlib import Path

import nbclient
import nbformat
import pytest
import tqdm.std

from eaftlib.progress import progress_bar

ROOT = Path(__file__).parents[1]


def execute(*cells, **settings):
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    kernel = nbclient.NotebookClient(
        notebook, kernel_name="python3", resources={"metadata": {"path": ROOT}}, **settings
    )
    return [cell.outputs for cell in kernel.execute().cells]


def test_an_executed_notebook_holds_one_line_each_with_the_last_state():
    ran_through, of_bytes, broke_off, hidden = execute(
        "import time\n"
        "from eaftlib.progress import progress_bar\n"
        "with progress_bar(1_572_864, 'UNION 2048 x 31 models', 'tok') as advance:\n"
        "    for _ in range(12):\n"
        "        advance(131_073)\n"
        "        time.sleep(0.15)",
        "with progress_bar(2_000_000_000, 'prune', 'B') as advance:\n"
        "    with progress_bar(4, 'inner', 'layer') as inner:\n"
        "        inner(4)\n"
        "    advance(1_500_000_000)",
        "with progress_bar(1000, 'broken', 'tok') as advance:\n    advance(259)\n    raise RuntimeError('stop')",
        "with progress_bar(10, 'hidden', 'tok', shown=False) as advance:\n    advance(5)",
        allow_errors=True,
    )
    (line,) = map(plain_text, ran_through)
    found = re.fullmatch(r"UNION 2048 x 31 models: 100 % · 1,572,864 tok · ([\d.]+) s · ([\d,]+) tok/s", line)
    seconds, rate = float(found[1]), int(found[2].replace(",", ""))
    assert seconds > 1.7 and rate == pytest.approx(1_572_864 / seconds, rel=0.05)
    outer, inner = map(plain_text, of_bytes)
    assert re.fullmatch(r"prune: 75 % · 1\.50GB · [\d.]+ s · [\d.]+[kMGT]?B/s", outer)
    assert re.fullmatch(r"inner: 100 % · 4 layer · [\d.]+ s · [\d,]+ layer/s", inner)
    shown, error = broke_off
    assert plain_text(shown).startswith("broken: 25 % · 259 tok · ") and error.ename == "RuntimeError"
    assert hidden == []


def plain_text(output):
    assert output.output_type == "display_data" and list(output.data) == ["text/plain"]
    return output.data["text/plain"]


def test_a_terminal_shows_a_bar_that_never_passes_its_total():
    use = "with progress_bar(1000, 'pass', 'tok') as advance:\n    advance(600)\n    advance(600)"
    terminal, end = pty.openpty()
    termios.tcsetwinsize(end, (24, 100))
    code = f"from eaftlib.progress import progress_bar\n{use}"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=end, stderr=end, check=True)
    states = [state.strip() for state in os.read(terminal, 1 << 16).decode().split("\r") if state.strip()]
    assert states[0].startswith("pass:   0%|") and states[-1].startswith("pass: 100%|") and "1.00k/1.00k" in states[-1]
    os.close(end)
    os.close(terminal)


@pytest.mark.parametrize("shown, expected", [(True, "pass:  60%"), (False, "")])
def test_beside_a_terminal_the_bar_goes_to_stderr(shown, expected, monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with pytest.raises(KeyError), progress_bar(10, "pass", "tok", shown) as advance:
        advance(6)
        raise KeyError
    assert expected in sys.stderr.getvalue() and bool(sys.stderr.getvalue()) == shown


def test_kaggles_log_gets_the_first_line_at_once_then_one_a_minute_then_the_last(monkeypatch, capsys):
    clock = 1000.0
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Batch")
    monkeypatch.setattr(tqdm.std, "time", lambda: clock)
    with progress_bar(400, "pass", "tok") as advance:
        assert capsys.readouterr().out == "pass: 0 % · 0 tok · 0.0 s · 0 tok/s\n"
        for _ in range(15):
            clock += 10
            advance(20)
    out, err = capsys.readouterr()
    assert err == "" and out.splitlines() == [
        "pass: 30 % · 120 tok · 60.0 s · 2 tok/s",
        "pass: 60 % · 240 tok · 120.0 s · 2 tok/s",
        "pass: 75 % · 300 tok · 150.0 s · 2 tok/s",
    ]


def test_a_pass_counted_in_shares_of_layers_ends_at_100_percent(monkeypatch, capsys):
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Batch")
    with progress_bar(2048, "pass", "tok") as advance:
        for _ in range(4 * 24):
            advance(512 / 24)  # adds up to 2047.999999999997
    assert capsys.readouterr().out.splitlines()[-1].startswith("pass: 100 % · 2,048 tok · ")
