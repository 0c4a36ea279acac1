"""What is said before a run is pushed, against sums done by hand."""

import json
import shutil
from pathlib import Path

import pytest
import yaml
from test_kaggle_faults import files_of, impatient, submit
from test_kaggle_job import ASKED

from eaftlib import params
from eaftlib.kaggle import build, forecast, ledger, pulling
from eaftlib.kaggle.job import JOBS

ROOT = Path(__file__).parents[1]
SETTINGS = {
    "accelerator": "NvidiaTeslaT4",
    "internet": True,
    "session_hours": 11.5,
    "gpu_sessions": 2,
    "inputs": {},
    "wheels": None,
}


def settings_of(**changes):
    return build.Settings.check(SETTINGS | changes)


def shipped(notebook, name, **changes):
    values = yaml.safe_load((ROOT / "params" / "gpt-oss-20b" / f"{name}.yaml").read_text()) | changes
    return params.of_notebook(notebook, values).model_dump(exclude_unset=True)


@pytest.mark.parametrize(
    "notebook, name, changes, tokens",
    [
        ("03_evaluate", "eval-base-1024", {}, 512 * 1024),
        ("03_evaluate", "eval-base-1024", {"only": None}, 4 * 512 * 1024),  # three packs and UNION
        ("03_evaluate", "eval-base-1024", {"only": None, "pack_files": None}, None),
        ("03_evaluate", "sweep", {}, 10 * (512 * 1024 + 512 * 2048)),
        ("03_evaluate", "sweep", {"num_blocks": [100, 7]}, 10 * (100 * 1024 + 7 * 2048)),
        ("01_rank", "rank-2048", {}, 512 * 2048),
        ("05_recover", "recover-16", {}, (610 * 16 + 11 * 64) * 2048),  # looks at steps 0, 61, ... 610
    ],
)
def test_tokens_of_the_shipped_runs(notebook, name, changes, tokens):
    assert JOBS[notebook].tokens(shipped(notebook, name, **changes)) == tokens


def test_packs_in_a_local_folder_are_counted(here):
    (file,) = files_of(here, "eval")
    plan = build.plan(file, build.read_settings())
    packs = len(list((here / "tiny" / "packs").glob("*.parquet")))
    assert packs == 3 and JOBS["03_evaluate"].tokens(plan.parameters | {"only": None}) == 4 * 3 * (24 + 40)


@pytest.mark.parametrize(
    "accelerator, notebook, name, hours, sessions",
    [
        # 2 x 2,400 / 1.6 = 3,000 tokens/s
        ("NvidiaTeslaT4", "03_evaluate", "sweep", 15_728_640 / 3_000 / 3600 + 0.15, 1),
        ("NvidiaTeslaT4", "01_rank", "rank-2048", 1_048_576 / 3_000 / 3600 + 0.15, 1),
        # 21,430,272 tokens at 320: 18.6 h, in sessions of 11.5 h less 10 minutes to finish and 9 to set up
        ("NvidiaTeslaT4", "05_recover", "recover-16", 21_430_272 / 320 / 3600 + 0.30, 2),
        ("NvidiaH100", "03_evaluate", "sweep", 15_728_640 / 68_000 / 3600 + 0.15, 1),
        ("NvidiaH100", "05_recover", "recover-16", 21_430_272 / 11_202 / 3600 + 0.15, 1),
    ],
)
def test_hours_by_the_table(accelerator, notebook, name, hours, sessions):
    found = forecast.forecast(notebook, shipped(notebook, name), settings_of(accelerator=accelerator), [])
    assert found.hours == pytest.approx(hours) and found.sessions == sessions
    how = "measured with gpt-oss-20b" if accelerator == "NvidiaH100" else "computed for gpt-oss-20b"
    assert found.speed.how == how


def test_what_is_not_known_is_said():
    asked = shipped("03_evaluate", "sweep")
    assert "no speed of NvidiaX; there is one of NvidiaTeslaT4" in forecast.forecast(
        "03_evaluate", asked, settings_of(accelerator="NvidiaX"), []
    )
    asked |= {"only": None, "pack_files": None}
    assert "how many packs it scores" in forecast.forecast("03_evaluate", asked, settings_of(), [])


def test_a_trainings_own_speed_is_its_curves(tmp_path):
    curve = [{"tokens": 0, "seconds": 0.0}, {"tokens": 2000, "seconds": 8.0}]
    (tmp_path / "recovery.json").write_text(json.dumps({"curve": curve}))
    assert JOBS["05_recover"].speeds(tmp_path) == [(2000, 250.0)] and ASKED["steps"]


def finished(server, play, project, name, gpus, speeds):
    """A verified run whose session found these GPUs and whose passes at 24 and 40 tokens had these speeds."""

    def change(folder, content):
        result = json.loads((folder / "base.json").read_text())
        for pack in result["packs"]:
            for length, speed in speeds.items():
                pack["seq"][length]["model"]["tok_s_pred"] = speed
        (folder / "base.json").write_text(json.dumps(result))
        content.update(machine={"gpus": gpus})

    server.session = lambda version: play(version, change=change)
    (entry,) = submit(files_of(project, name), impatient(), say=lambda line: None)
    server.wait(entry.run)
    (entry,) = pulling.pull(impatient(), say=lambda line: None)
    assert entry.state == "verified", entry.steps[-1].note
    return entry


def test_finished_runs_on_the_accelerator_correct_the_table(here, server, play):
    """By the time that their tokens took: 2 packs x 3 blocks of 24 at 10 tokens/s, of 40 at 40; another card's do not count."""
    finished(server, play, here, "a", ["Tesla T4, 14.7 GiB"] * 2, {"24": 10.0, "40": 40.0})
    finished(server, play, here, "b", ["Tesla P100, 15.9 GiB"], {"24": 9e9, "40": 9e9})
    finished(server, play, here, "c", ["Tesla T4, 14.7 GiB"], {"24": 9e9, "40": 9e9})  # one only
    said = []
    submit(files_of(here, "d"), impatient(), say=said.append)
    expected = (2 * 3 * 24 + 2 * 3 * 40) / (2 * 3 * 24 / 10 + 2 * 3 * 40 / 40)
    assert f"384 tokens at {expected:,.0f} tokens/s (of finished runs) of NvidiaTeslaT4: 0.2 h, 1 session(s)" in said[0]
    settings = build.read_settings()
    plan = build.plan(Path("params/tiny/a.yaml"), settings)
    other = forecast.forecast("03_evaluate", plan.parameters | {"model": "other"}, settings, ledger.entries())
    assert other.speed.how == "computed for gpt-oss-20b"  # those are of another model
    for entry in ledger.entries():
        shutil.rmtree(entry.result_folder, ignore_errors=True)
    alone = forecast.forecast("03_evaluate", plan.parameters, settings, ledger.entries())
    assert alone.speed.how == "computed for gpt-oss-20b"


def test_it_is_said_before_anything_is_pushed_and_not_again(here, server):
    server.quota_hours = 12
    said = []
    say = lambda line: said.append((line, server.calls.count("SaveKernel")))  # noqa: E731
    submit(files_of(here, "a", "b"), impatient(), say=say)
    assert [line.split("  ")[1].split(" at ")[0] for line, _ in said[:2]] == ["384 tokens"] * 2
    assert said[2] == ("0.3 GPU hours in all; 1 % of the week's 30, of which 12.0 are left", 0)
    submit(files_of(here, "a"), impatient(), say=lambda line: said.append((line, 0)))
    assert sum("GPU hours in all" in line for line, _ in said) == 1


def test_more_than_is_left_waits_and_a_quota_that_is_not_told_stops_nothing(here, server):
    server.quota_hours = 0.1
    said = []
    submit(files_of(here, "a"), impatient(), say=said.append)
    assert said[1].endswith("0.1 are left: it waits for the next week's")
    server.inject("GetAcceleratorQuotaStatistics", 403)
    (entry,) = submit(files_of(here, "b"), impatient(), say=said.append)
    assert any("what is left is not known (Kaggle answered 403" in line for line in said) and entry.state == "submitted"
