"""Set-up of a built notebook, where nothing is installed yet: the standard library and what every image brings.

The text of this file is the notebook's set-up cell. It finds inputs, installs the library, and sees to it that the
session leaves ``eaft_run.json`` and one marked output, however it ends.
"""

import base64
import contextlib
import glob
import hashlib
import html
import importlib.metadata
import io
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import urllib.parse
from pathlib import Path

from IPython import get_ipython
from IPython.display import display
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

OUTCOME, MARKER, SCHEMA = "eaft_run.json", "EAFT-RUN", "eaft-run/1"
RESULT_TYPES = (".json", ".parquet", ".safetensors")


class Session:
    """One session of a built notebook. ``run`` holds what the builder wrote into the cell.

    Results go to ``work``; notebooks run in ``scratch``, where every path of the parameters is a link to the real place.
    ``earlier``: the session that this one replaces in the same kernel, where the cells are run again by hand.
    """

    def __init__(self, run: dict, earlier: "Session | None" = None):
        # An earlier session has left the kernel in its scratch folder.
        self.run, self.home, self.began = run, earlier.home if earlier else Path.cwd(), time.time()
        self.earlier = earlier
        self.on_kaggle = "KAGGLE_KERNEL_RUN_TYPE" in os.environ
        self.in_batch = os.environ.get("KAGGLE_KERNEL_RUN_TYPE") == "Batch"
        self.inputs = self.home.parent / "input" if self.on_kaggle else None  # /kaggle/input beside /kaggle/working
        self.work = self.home if self.on_kaggle else self.home / run["run"]
        self.scratch = Path(tempfile.mkdtemp(prefix="eaft-"))
        self.outcome = {"schema": SCHEMA, "status": "running", "error": None, "machine": {}, "files": {}}
        self.outcome |= {k: run[k] for k in ("run", "attempt", "params_sha256", "code_sha256", "commit")}
        self.secrets: list[str] = []
        self.deadline_is_over = False

    def start(self, wheel: str) -> None:
        """Everything before the first cell of the notebook proper; ``wheel`` is base85, or empty if it is mounted."""
        self._watch_cells()
        self.work.mkdir(exist_ok=True)
        self._write()
        if self.in_batch:
            self._set_deadline()
        self._take_token()
        self._link_paths()
        self._require_packages()
        self._install(wheel)
        self._describe()

    def finish(self, status: str, error: str | None = None) -> None:
        """Write the outcome, print the marker line, and put the results into the notebook as one JSON output.

        What is complete stays complete. By hand a cell may fail, be run again, and the last one still be reached; in a
        batch that goes on after errors, what comes after the first proves nothing.
        """
        if self.outcome["status"] == "complete" or (self.in_batch and self.outcome["status"] != "running"):
            return
        if self.on_kaggle:
            signal.setitimer(signal.ITIMER_REAL, 0)  # the deadline is for what came before
        for name in self.run["brings"]:
            if (self.scratch / name).is_file():
                copy_whole(self.scratch / name, self.work / Path(name).name)
        found = sorted(f for f in self.work.iterdir() if f.suffix in RESULT_TYPES and f.name != OUTCOME)
        found = [f for f in found if f.is_file() and not f.name.startswith((".", "__"))]
        self.outcome |= {"status": status, "error": error and self._without_secrets(error)}
        self.outcome |= {"files": {f.name: sha256(f) for f in found}, "seconds": round(time.time() - self.began, 1)}
        self._write()
        # Each result is one string: an .ipynb puts every number of a list on a line of its own.
        texts = {
            f.name: json.dumps(json.loads(f.read_text()), separators=(",", ":")) for f in found if f.suffix == ".json"
        }
        display({"application/json": {**self.outcome, "results": texts}}, raw=True)
        facts = {k: self.outcome[k] for k in ("run", "attempt", "status", "params_sha256", "seconds")}
        print(MARKER, json.dumps(facts), flush=True)

    def _watch_cells(self) -> None:
        """From now on no cell fails unseen, or shows a secret in its traceback."""
        shell = get_ipython()
        if self.earlier:
            self.earlier._stop_watching(shell)
        self.shown_by = {name: getattr(shell, name) for name in ("showtraceback", "_showtraceback")}
        shell.events.register("post_run_cell", self._after_cell)
        shell.showtraceback, shell._showtraceback = self._show_error, self._show_lines

    def _stop_watching(self, shell) -> None:
        shell.events.unregister("post_run_cell", self._after_cell)
        for name, original in self.shown_by.items():
            setattr(shell, name, original)

    def _after_cell(self, result) -> None:
        error = result.error_before_exec or result.error_in_exec
        # The kernel's reply quotes them, and whoever runs the notebook prints the reply.
        result.error_before_exec = result.error_before_exec and self._masked(result.error_before_exec)
        result.error_in_exec = result.error_in_exec and self._masked(result.error_in_exec)
        if error is not None:
            status = "deadline" if self.deadline_is_over else "failed"
            self.finish(status, "".join(traceback.format_exception(error)))

    def _show_error(self, *args, **kwargs) -> None:
        """For errors that IPython prints by itself: groups of exceptions, wrong uses of a magic."""
        sys.stderr.flush()
        with contextlib.redirect_stderr(io.StringIO()) as said:
            self.shown_by["showtraceback"](*args, **kwargs)
        print(self._without_secrets(said.getvalue()), end="", file=sys.stderr)

    def _show_lines(self, kind, error, lines) -> None:
        """For all others: their traceback's lines, which become the cell's output."""
        self.shown_by["_showtraceback"](kind, self._masked(error), [self._without_secrets(line) for line in lines])

    def _masked(self, error: BaseException) -> BaseException:
        """The error itself, or one that reads the same but for the secrets: its class may word it in any way."""
        text = str(error)
        clean = self._without_secrets(text)
        return error if clean == text else type(type(error).__name__, (Exception,), {})(clean)

    def _write(self) -> None:
        temporary = self.work / f".{OUTCOME}"
        temporary.write_text(json.dumps(self.outcome, indent=1) + "\n")
        temporary.replace(self.work / OUTCOME)

    def _without_secrets(self, text: str) -> str:
        return mask(text, self.secrets)

    def _set_deadline(self) -> None:
        """Stop before the session is killed: one that is killed may not say why, and loses what it had not written."""
        seconds = self.run["deadline_seconds"]

        def stop(*_):
            self.deadline_is_over = True  # whatever becomes of the error on its way
            raise TimeoutError(
                f"the notebook's own deadline of {seconds} s is over; what it has is kept, and make kaggle-follow goes on "
                "from it"
            )

        signal.signal(signal.SIGALRM, stop)
        signal.setitimer(signal.ITIMER_REAL, seconds, 30)  # again: the first may fall where errors are caught

    def _take_token(self) -> None:
        """HF_TOKEN from the secrets of Kaggle or Colab; public repositories need none."""
        try:
            if self.on_kaggle:
                from kaggle_secrets import UserSecretsClient

                token = UserSecretsClient().get_secret("HF_TOKEN")
            else:
                from google.colab import userdata

                token = userdata.get("HF_TOKEN")
        except ImportError:
            print("no secrets service here; HF_TOKEN is what the environment says")
            token = os.environ.get("HF_TOKEN")
        except Exception as missing:  # each service has error classes of its own, which cannot be imported elsewhere
            print(f"no secret HF_TOKEN ({type(missing).__name__}): gated repositories cannot be read")
            token = None
        if token:
            self.secrets.append(token)
            os.environ["HF_TOKEN"] = token

    def _link_paths(self) -> None:
        os.chdir(self.scratch)
        if self.run["results_folder"]:
            link(Path(self.run["results_folder"]), self.work)
        for name, mounts in self.run["mounts"].items():
            place = self._find(mounts, name)
            if place:
                link(Path(name), place)
                print(f"{name}: {place}")
            elif not self.run["internet"]:
                raise FileNotFoundError(f"{name} is not mounted (looked for {mounts}) and internet is off")
            else:
                print(f"{name}: not mounted, comes from the Hugging Face hub")
        for name, file in self.run["files"].items():
            place = self._find([f"{m}/{glob.escape(file['stored_as'])}" for m in self.run["file_mounts"]], name)
            if place is None:
                raise FileNotFoundError(f"{name}: neither mounted nor in {self.home}; upload it there under this path")
            if sha256(place) != file["sha256"]:
                raise ValueError(f"{place} is not the {name} that this notebook was built with (its SHA-256 differs)")
            if not file["resume"]:
                link(Path(name), place)
            elif not (self.work / name).exists():  # a session that this one replaces has added to it
                copy_whole(place, self.work / name)

    def _find(self, mounts: list[str], name: str) -> Path | None:
        """The first of the mounts (patterns under the input folder) that is there, else ``name`` in the home folder."""
        hits = [hit for m in mounts for hit in sorted(self.inputs.glob(m))] if self.inputs else []
        hits += [p for p in [self.home / name] if p.exists()]
        return hits[0] if hits else None

    def _require_packages(self) -> None:
        if platform.python_version() not in SpecifierSet(self.run["python"]):
            raise RuntimeError(
                f"Python {platform.python_version()}; needed: {self.run['python']}. Choose a newer image."
            )
        unmet = [r for r in self.run["requires"] if not met(r)]
        if not unmet:
            return
        lacks = ", ".join(f"{r} (here: {installed(r) or 'none'})" for r in unmet)
        if any(Requirement(r).name == "torch" for r in unmet):
            raise RuntimeError(f"this image is too old: it does not meet {lacks}. Choose a newer image.")
        wheels = self._find(self.run["wheel_mounts"], "wheels")
        if not wheels and not self.run["internet"]:
            raise RuntimeError(
                f"missing or too old: {lacks}. Turn internet on, or put their wheels into a data set and name it as "
                "`wheels` in params/kaggle.yaml."
            )
        print(f"installing {lacks} from {wheels or 'the internet'}")
        self._pip_install(unmet, ["--no-index", "--find-links", str(wheels)] if wheels else [])

    def _pip_install(self, requirements: list[str], source: list[str]) -> None:
        """Whatever this kernel has imported stays what it is, and so does torch: half a new package is worse than none."""
        kept = self.scratch / "kept.txt"
        kept.write_text("".join(f"{name}=={importlib.metadata.version(name)}\n" for name in loaded() | {"torch"}))
        command = [sys.executable, "-m", "pip", "install", *source, "--constraint", str(kept), *requirements]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode:
            said = "\n".join(done.stdout.strip().splitlines()[-16:])
            raise RuntimeError(
                f"pip cannot install {requirements}. If it names a package that this kernel has imported, restart the kernel "
                f"and run all again. It said: {said}"
            )
        importlib.invalidate_caches()

    def _install(self, wheel: str) -> None:
        """Install the embedded or mounted wheel for this kernel alone, after checking its SHA-256."""
        file = self.scratch / self.run["wheel"]["name"]
        if wheel:
            file.write_bytes(base64.b85decode(wheel))
        if sha256(file) != self.run["wheel"]["sha256"]:
            raise ValueError(
                f"{file.name} is damaged: its SHA-256 is {sha256(file)}, not {self.run['wheel']['sha256']}"
            )
        pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--disable-pip-version-check"]
        subprocess.run([*pip, "--target", str(self.scratch / "lib"), str(file)], check=True)
        sys.path.insert(0, str(self.scratch / "lib"))

    def _describe(self) -> None:
        import torch

        cards = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        self.outcome["machine"] = {
            "where": "Kaggle" if self.on_kaggle else "Colab" if "google.colab" in sys.modules else "elsewhere",
            "gpus": [f"{c.name}, {c.total_memory / 2**30:.1f} GiB" for c in cards],
            "cpus": os.cpu_count(),
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in ("torch", "transformers")},
        }
        self._write()
        for name, value in self.outcome["machine"].items():
            print(f"{name:13}{', '.join(value) or 'none' if name == 'gpus' else value}")
        print(f"{'eaftlib':13}{self.run['wheel']['name']}, commit {self.run['commit']}")
        print(f"{'results in':13}{self.work}")


def mask(text: str, secrets: list[str]) -> str:
    """``text`` without the secrets, however they are spelled: as they are, or inside base64 of anything, say of user:key."""
    for secret in secrets:
        for form in _escaped(secret):
            text = text.replace(form, "***")
        cores = "|".join(re.escape(form) for core in _in_base64(secret.encode()) for form in _escaped(core))
        text = re.sub(rf"[\w+/-]*(?:{cores})[\w+/-]*=*", "***", text)
    return text


def _escaped(secret: str) -> set[str]:
    """As plain text, URLs, HTML and JSON spell it, also one inside another. None spells letters or digits differently."""
    ways = [
        lambda s: s,
        urllib.parse.quote,
        lambda s: urllib.parse.quote(s, safe=""),
        lambda s: re.sub("%..", lambda code: code[0].lower(), urllib.parse.quote(s, safe="")),
        html.escape,
        lambda s: json.dumps(s)[1:-1],
        lambda s: json.dumps(s)[1:-1].replace("/", "\\/"),
    ]
    return {outer(inner(secret)) for inner in ways for outer in ways}


def _in_base64(secret: bytes) -> set[str]:
    """What all base64 that holds the secret has in common, by where in a group of 3 bytes it begins, in both alphabets."""
    found = set()
    for before in range(3):
        text = base64.b64encode(bytes(before) + secret).decode()
        core = text[-(-before * 8 // 6) : (before + len(secret)) * 8 // 6]  # whole characters of the secret alone
        found |= {core, core.translate(str.maketrans("+/", "-_"))}
    return found


def link(name: Path, target: Path) -> None:
    name.parent.mkdir(parents=True, exist_ok=True)
    name.symlink_to(target)


def copy_whole(source: Path, target: Path) -> None:
    """Or not at all: the session may be killed meanwhile."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}")
    shutil.copy(source, temporary)
    temporary.replace(target)


def met(requirement: str) -> bool:
    found = installed(requirement)
    return found is not None and Requirement(requirement).specifier.contains(found, prereleases=True)


def installed(requirement: str) -> str | None:
    """The version that is here."""
    try:
        return importlib.metadata.version(Requirement(requirement).name)
    except importlib.metadata.PackageNotFoundError:
        return None


def loaded() -> set[str]:
    """Distributions of which this kernel has imported a module."""
    owners = importlib.metadata.packages_distributions()
    return {name for module in owners.keys() & sys.modules.keys() for name in owners[module]}


def sha256(file: Path) -> str:
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
