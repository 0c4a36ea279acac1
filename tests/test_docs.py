"""README and docs: every command runs or parses, what they name is there, every link leads somewhere.

What the commands do is for other tests: the notebooks run as the demo runs them in test_notebooks, Kaggle's commands
in test_kaggle_*. Here it counts that a reader who types what a page says is understood.
"""

import itertools
import os
import re
import shlex
import string
import subprocess
import sys
import tempfile
from pathlib import Path

import click
import pytest
import yaml
from accelerate.commands.launch import launch_command_parser
from markdown_it import MarkdownIt
from papermill.cli import papermill as papermill_command

from eaftlib import __main__, params
from eaftlib.pruning.criteria import CRITERIA, RANDOM

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES += [ROOT / folder / "README.md" for folder in ("demo", "kaggle_runs", "outputs")]
KEPT = {"params", "docs", "bench", "tests", "notebooks", "demo", "eaftlib"}  # what lies there is in the repository
ROOMS = {folder.name for folder in (ROOT / "eaftlib").iterdir() if (folder / "__init__.py").is_file()}
COMMAND = re.compile(r"make [a-z]|(\.venv/bin/)?python -m eaftlib ")

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def tokens(page):
    """Every token of a page, those inside paragraphs, lists and tables included."""
    for token in MarkdownIt("commonmark").enable("table").parse(page.read_text()):
        yield token
        yield from token.children or ()


def commands(page):
    """Words of every command in the page's bash blocks, and of make and python -m eaftlib inside its lines."""
    for token in tokens(page):
        if token.type == "fence" and token.info == "bash":
            yield from split(token.content)
        elif token.type == "code_inline" and COMMAND.match(token.content):
            yield from split(token.content)


def split(text):
    """Commands of a shell script that has neither pipes nor conditions; variables that it sets are put in."""
    values = {}
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(string.Template(line).safe_substitute(values), comments=True)
        while words:
            end = words.index("&&") if "&&" in words else len(words)
            command, words = words[:end], words[end + 1 :]
            if len(command) == 1 and re.match(r"[a-z]+=", command[0]):
                values |= [command[0].split("=", 1)]
            else:
                yield command


def understand(command):
    """Raises one of MISUNDERSTOOD where a word of the command means nothing to the program, or names what is not there."""
    program, *words = command
    for word in words:
        require_named(word.split("=")[-1])
    assert Path(program).name in PROGRAMS, f"no test knows {program}"
    PROGRAMS[Path(program).name](words)


MISUNDERSTOOD = (AssertionError, SystemExit, click.ClickException, subprocess.CalledProcessError)


def require_named(path):
    """A path into the repository is there, a pattern matches something; anything else is no such path."""
    first = path.split("/")[0]
    base = ROOT if first in KEPT else ROOT / "eaftlib"
    if "/" in path and first in KEPT | ROOMS and re.fullmatch(r"[\w./*-]+", path):
        assert list(base.glob(path.rstrip("/"))), f"{path} is not there"


def make(words):
    """What make would do, its set-up aside, is understood too."""
    makefile = (ROOT / "Makefile").read_text()
    assert all(f"$({word.split('=')[0]})" in makefile for word in words if "=" in word)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    command = ["make", "-n", "-o", ".venv/.ready", *words]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    for command in split(done.stdout):
        if command[0].startswith(".venv/"):
            understand(command)


def python(words):
    if words[0] == "-m":
        assert words[1] in MODULES, f"no test knows python -m {words[1]}"
        MODULES[words[1]](words[2:])
    else:
        script = (ROOT / words[0]).read_text()
        assert all(f'"{word}"' in script for word in words if word.startswith("--"))


def papermill(words):
    """The parameters are the notebook's."""
    chosen = papermill_command.make_context("papermill", list(words)).params
    assert chosen["parameters_file"]
    for file in chosen["parameters_file"]:
        if not file.isupper():  # a name to be put in
            model = params.NOTEBOOKS[Path(chosen["notebook_path"]).stem]
            assert set(yaml.safe_load((ROOT / file).read_text())) <= set(model.model_fields)


def accelerate(words):
    assert words[0] == "launch"
    launched = launch_command_parser().parse_args(words[1:])
    assert [launched.training_script, launched.training_script_args[0]] == ["sh", "-c"]
    for command in split(launched.training_script_args[1]):
        understand(command)


def kaggle(words):
    """By the client's own parser, in a process that has nobody's account at a server that is not there."""
    program = "import argparse, sys; from kaggle import cli; parser = argparse.ArgumentParser(); "
    program += "cli.parse_kernels(parser.add_subparsers()); parser.parse_args(sys.argv[1:])"
    account = {"KAGGLE_API_ENVIRONMENT": "LOCALHOST", "KAGGLE_USERNAME": "nobody", "KAGGLE_KEY": "none"}
    with tempfile.TemporaryDirectory() as home:
        environment = os.environ | account | {"HOME": home, "KAGGLE_CONFIG_DIR": home, "KAGGLE_API_TOKEN": ""}
        subprocess.run([sys.executable, "-c", program, *words], env=environment, capture_output=True, check=True)


def helped(*program):
    """A program that refuses a wrong word before it gives its help."""

    def ask(words):
        subprocess.run([*program, *words, "--help"], cwd=ROOT, capture_output=True, check=True)

    return ask


def known(words):
    """Nothing of this project's: a tool of the system, or the very program that runs this test."""


MODULES = {
    "eaftlib": lambda words: __main__.parser().parse_args(words),
    "papermill": papermill,
    "pytest": known,
    "ruff": helped(sys.executable, "-m", "ruff"),
}
PROGRAMS = {
    "make": make,
    "python": python,
    "accelerate": accelerate,
    "kaggle": kaggle,
    "lint-imports": helped(Path(sys.executable).with_name("lint-imports")),
    **dict.fromkeys(("apt-get", "dpkg", "mkdir", "cp"), known),
}


@each_page
def test_every_command_is_understood(page):
    for command in commands(page):
        understand(command)


def test_commands_are_found():
    found = {str(page.relative_to(ROOT)): len(list(commands(page))) for page in PAGES}
    at_least = {
        "README.md": 4,
        "docs/developing.md": 3,
        "docs/gpu.md": 5,
        "docs/kaggle.md": 13,
        "docs/metrics.md": 3,
        "docs/parameters.md": 6,
        "docs/publish.md": 2,
        "docs/snapshot.md": 12,
        "docs/speed.md": 1,
        "demo/README.md": 5,
    }
    assert {page: found[page] >= count for page, count in at_least.items()} == dict.fromkeys(at_least, True), found


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("make demo", "make dmeo"),
        ("make kaggle-pull RUNS=RUN", "make kaggle-pull RUN=RUN"),
        ("make kaggle-push PARAMS='params/demo/*.yaml'", "make kaggle-push PARAMS='params/dmeo/*.yaml'"),
        ("make kaggle-follow RUNS=RUN AT_LIMIT=stop", "make kaggle-follow RUNS=RUN AT_LIMIT=halt"),
        ("make kaggle-push PARAMS=FILE AT_LIMIT=stop", "make kaggle-push PARAMS=FILE AT_LIMIT=halt"),
        ("make rank PARAMS=params/demo/rank.yaml", "make rank PARAMS=params/demo/report.yaml"),
        ("make prune PARAMS=params/demo/prune.yaml", "make prune PARAMS=params/demo/purne.yaml"),
        ("make prune PARAMS=params/demo/prune.yaml", "make prune"),
        ("python -m eaftlib notebooks --check", "python -m eaftlib notebooks --chekc"),
        ("python -m eaftlib summary FILE", "python -m eaftlib sumary FILE"),
        ("python -m ruff check .", "python -m ruff chekc ."),
        ("python -m ruff format --check .", "python -m ruff format --chekc ."),
        (
            "python -m papermill notebooks/01_rank.ipynb out.ipynb -f params/demo/rank.yaml",
            "python -m papermill notebooks/01_rnak.ipynb out.ipynb -f params/demo/rank.yaml",
        ),
        (
            "python -m papermill notebooks/01_rank.ipynb out.ipynb -f params/demo/rank.yaml",
            "python -m papermill notebooks/01_rank.ipynb out.ipynb --fiel params/demo/rank.yaml",
        ),
        ("accelerate launch --multi_gpu sh -c 'make demo'", "accelerate launch --mutli_gpu sh -c 'make demo'"),
        ("accelerate launch --multi_gpu sh -c 'make demo'", "accelerate launch --multi_gpu sh -c 'make dmeo'"),
        ("kaggle kernels output OWNER/RUN -p FOLDER", "kaggle kernels output OWNER/RUN --paht FOLDER"),
        ("kaggle kernels output OWNER/RUN", "kaggle kernels outptu OWNER/RUN"),
        ("python demo/train.py train.npz demo/model --steps 2", "python demo/train.py train.npz demo/model --stpes 2"),
        ("mkdir outputs/demo", "mdkir outputs/demo"),
        ("cp params/demo/rank.yaml FILE", "cp params/demo/rnak.yaml FILE"),
    ],
)
def test_a_misspelt_command_is_not(right, wrong):
    for command in split(right):
        understand(command)
    with pytest.raises(MISUNDERSTOOD):
        for command in split(wrong):
            understand(command)


def test_a_block_is_split_into_its_commands(tmp_path):
    page = tmp_path / "page.md"
    text = "| `make a` and `make`: `python -m\neaftlib b` |\n\n- x\n\n  ```bash\n  again='-c 1'\n"
    page.write_text(text + "  d \\\n    $again '$e' # f\n  g && h\n  ```\n")
    expected = ["make a", "python -m eaftlib b", "d -c 1 $e", "g", "h"]
    assert [" ".join(words) for words in commands(page)] == expected


def test_a_ranking_from_kaggle_goes_where_the_parameters_look(tmp_path):
    page = (ROOT / "docs" / "kaggle.md").read_text()
    result = tmp_path / "kaggle_runs" / "RUN" / "result"
    result.mkdir(parents=True)
    (result / "ranking.json").write_text("{}")
    subprocess.run(["sh", "-c", re.search(r"^mkdir .*$", page, re.MULTILINE)[0]], cwd=tmp_path, check=True)
    assert (tmp_path / yaml.safe_load((ROOT / "params/gpt-oss-20b/prune-24.yaml").read_text())["ranking"]).is_file()


@each_page
def test_every_file_that_is_named_is_there(page):
    for token in tokens(page):
        if token.type == "code_inline":
            require_named(token.content)


@each_page
def test_every_link_leads_somewhere(page):
    for token in tokens(page):
        link = token.attrGet("href" if token.type == "link_open" else "src" if token.type == "image" else "")
        if link and not link.startswith("https://"):
            file, _, anchor = link.partition("#")
            target = (page.parent / file).resolve() if file else page
            assert target.is_file(), f"{link} is not there"
            assert not anchor or anchor in anchors(target), f"{link}: {file or page.name} has {sorted(anchors(target))}"


def anchors(page):
    """Names of a page's headings, as GitHub makes them."""
    found = list(tokens(page))
    titles = [inline.content for before, inline in itertools.pairwise(found) if before.type == "heading_open"]
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_anchors_are_those_of_github(tmp_path):
    (tmp_path / "page.md").write_text("# How fast is it, and against what?\n\n## The demo's `keep-set` (1)\n")
    assert anchors(tmp_path / "page.md") == {"how-fast-is-it-and-against-what", "the-demos-keep-set-1"}


def test_the_readme_is_short_and_names_what_ci_runs():
    readme, ci = (ROOT / "README.md").read_text(), (ROOT / ".ci" / "run").read_text()
    assert len(readme.splitlines()) <= 90
    assert "make demo" in readme and "make test" in readme and ci.rstrip().endswith("make test")


def test_the_readme_leads_to_every_page():
    links = {token.attrGet("href") for token in tokens(ROOT / "README.md") if token.type == "link_open"}
    assert {f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md")} <= links


def test_the_parameters_page_has_every_name_of_every_notebook():
    rows = re.findall(r"^\| (`.+?) \| ([0-5 ]+) \|", (ROOT / "docs" / "parameters.md").read_text(), re.MULTILINE)
    found = {
        (name, int(n)) for names, numbers in rows for name in re.findall("`(.+?)`", names) for n in numbers.split()
    }
    models = params.NOTEBOOKS | {"05_recover": params.Recover}
    assert found == {(name, int(book[:2])) for book, model in models.items() for name in model.model_fields}


def test_the_metrics_page_has_every_criterion_and_the_gates_limits():
    page = (ROOT / "docs" / "metrics.md").read_text()
    assert set(re.findall(r"`(\w+)`", page)) >= {*CRITERIA, RANDOM}
    limits = yaml.safe_load((ROOT / "params" / "gates" / "near-lossless-v1.json").read_text())["limits"]
    assert f"min({limits['ppl_absolute']}, {limits['ppl_relative'] * 100:g} % of" in page
    assert re.findall(r"<= ([\d.]+) \|$", page, re.MULTILINE) == [
        str(limits[k]) for k in ("cc_rate", "mean_prob", "js2d")
    ]


def test_the_rooms_are_those_of_the_package():
    page = (ROOT / "docs" / "developing.md").read_text()
    rooms = dict(re.findall(r"^\| `(\w+)/` \| (.*) \|$", page, re.MULTILINE))
    assert set(rooms) == ROOMS
    for room, text in rooms.items():
        for name in re.findall(r"`(\w+)/?`", text):
            assert list((ROOT / "eaftlib" / room).glob(f"{name}*")), f"{room} has no {name}"
