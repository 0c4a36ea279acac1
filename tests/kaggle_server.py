"""A loopback Kaggle: speaks the client's wire format on 127.0.0.1 and runs what is pushed, or plays a script of faults."""

import ast
import base64
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import sysconfig
import threading
import time
import urllib.parse
from collections import deque
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import yaml
from forking import Forks
from hub_server import TOKEN as HF_TOKEN  # the session's secret

TINY = {
    "model": "tiny/model", "packs": "tiny/packs", "label": "base", "only": ["UNION", "pack_a"], "seq_lens": [24, 40],
    "num_blocks": 3, "device": "cpu", "dtype": "float32", "out_dir": "outputs/tiny",
}  # fmt: skip
OWNER, KEY = "tester", "0123planted4567kaggle89abcdefkey"
PAGE = 20  # files a page, whatever is asked for
SOURCE_LIMIT = 1_000_000
NOT_FOUND_PAGE = b"<!DOCTYPE html><html><head><title>404</title></head><body>We can't find that page.</body></html>"


class Refusal(Exception):
    """An HTTP error with the service's nested body."""

    def __init__(self, status, message):
        super().__init__(message)
        self.status, self.message = status, message


class Version:
    """One pushed version and its session."""

    def __init__(self, number, request, folder):
        self.number, self.request, self.folder = number, request, folder
        self.status, self.failure, self.log, self.stale = "QUEUED", "", "", 0
        self.process = None

    @property
    def working(self):
        return self.folder / "working"


class KaggleServer:
    """``session``: what happens to a pushed version; ``execute`` (papermill) or a function (server, version) -> status.

    ``image``: the interpreter of executed sessions. ``forks``: processes of it, for ``execute_in_fork``.
    """

    def __init__(self, folder, session="execute", old_layout=False, image=sys.executable, forks=None):
        self.folder, self.old_layout, self.image, self.forks = Path(folder), old_layout, image, forks
        self.session = self.execute if session == "execute" else session
        self.kernels, self.datasets, self.blobs = {}, {}, {}
        self.models = {}  # owner/model/framework/variation/version -> folder
        self.calls, self.faults, self.injected = [], {}, []
        self.on_call = lambda method, phase: None
        self.on_upload = lambda name: None  # before a file's bytes are taken
        self.refusals = deque()  # `error` texts of the next pushes, in HTTP 200
        self.invalid_sources = []
        self.session_limit, self.quota_hours = 2, 30
        self.extra_files = {}  # hostile names and the like: name -> bytes, listed with every output
        self.missing_files = {}  # listed, but their address gives a 404 page with this status
        self.most_sessions = 0
        self.lock, self.forking = threading.RLock(), threading.Lock()
        self.http = Listener(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.http.owner = self
        self.port = self.http.server_address[1]
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()

    def close(self):
        self.http.shutdown()
        self.http.server_close()
        for versions in self.kernels.values():
            for version in versions:
                if version.process and version.process.poll() is None:
                    version.process.kill()

    def environment(self, home):
        """What a client needs to reach this server and nothing else."""
        proxy = f"http://127.0.0.1:{self.port}"
        variables = {"HTTP_PROXY": proxy, "http_proxy": proxy, "NO_PROXY": "", "no_proxy": ""}
        variables |= {"KAGGLE_API_ENVIRONMENT": "LOCALHOST", "KAGGLE_USERNAME": OWNER, "KAGGLE_KEY": KEY}
        return variables | {"HOME": str(home), "KAGGLE_CONFIG_DIR": str(home / "kaggle")}

    def inject(self, method, *faults):
        """Faults for the next calls of a method: a status, "drop before", "drop after", "hang", "html", "stale"..."""
        self.faults.setdefault(method, deque()).extend(faults)

    def latest(self, slug):
        return self.kernels[slug][-1]

    def active(self):
        return [v for versions in self.kernels.values() for v in versions if v.status in ("QUEUED", "RUNNING")]

    def wait(self, slug, seconds=240):
        """Until the latest session of a kernel has ended."""
        end = time.monotonic() + seconds
        while self.latest(slug).status in ("QUEUED", "RUNNING"):
            assert time.monotonic() < end, f"{slug} did not end:\n{self.latest(slug).log}"
            time.sleep(0.05)
        return self.latest(slug)

    # --- the calls ---------------------------------------------------------------------------------------------------

    def SaveKernel(self, r):
        if len(r["text"].encode()) > SOURCE_LIMIT:
            raise Refusal(400, "The source is too large")
        owner, slug = r["slug"].split("/")
        assert owner == OWNER and r["isPrivate"] and re.fullmatch(r"[a-z0-9-]{5,50}", slug), r["slug"]
        assert re.sub(r"[^a-z0-9]+", "-", r["newTitle"].lower()) == slug
        assert r["language"] == "python" and r["kernelType"] == "notebook" and r["sessionTimeoutSeconds"] <= 12 * 3600
        if self.refusals:
            return {"error": self.refusals.popleft()}
        if len(self.active()) >= self.session_limit:
            return {"error": f"Maximum batch GPU session count of {self.session_limit} reached."}
        for source in r.get("datasetDataSources", []):
            if source not in self.datasets and source not in self.invalid_sources:
                raise Refusal(400, f"unknown data set {source}")
        versions = self.kernels.setdefault(slug, [])
        number = len(versions) + 1
        version = Version(number, r, self.folder / f"{slug}-v{number}")
        version.working.mkdir(parents=True)
        versions.append(version)
        self.most_sessions = max(self.most_sessions, len(self.active()))
        threading.Thread(target=self._run, args=(version,), daemon=True).start()
        answer = {"ref": f"/code/{OWNER}/{slug}", "url": f"https://www.kaggle.com/code/{OWNER}/{slug}"}
        return answer | {"versionNumber": number, "kernelId": 7, "invalidDatasetSources": list(self.invalid_sources)}

    def GetKernelSessionStatus(self, r):
        version = self._kernel(r)[-1]
        if version.status == "QUEUED":
            return {}
        if version.status not in ("QUEUED", "RUNNING") and version.stale:
            version.stale -= 1
            self.injected.append("stale RUNNING")
            return {"status": "RUNNING"}
        return {"status": version.status} | ({"failureMessage": version.failure} if version.failure else {})

    def ListKernelSessionOutput(self, r):
        version = self._kernel(r)[-1]
        names = sorted(str(p.relative_to(version.working)) for p in version.working.rglob("*") if p.is_file())
        names += list(self.extra_files)
        start = int(r.get("pageToken") or 0)
        size = min(r.get("pageSize") or PAGE, PAGE)
        slug = r["kernelSlug"]
        address = f"http://127.0.0.1:{self.port}/files/{slug}/{version.number}?name="
        page = [{"fileName": n, "url": address + urllib.parse.quote(n, safe="")} for n in names[start : start + size]]
        more = {"nextPageToken": str(start + size)} if start + size < len(names) else {}
        return {"files": page, "log": version.log} | more

    def GetKernel(self, r):
        versions = self._kernel(r)
        slug = r["kernelSlug"]
        blob = {"source": versions[-1].request["text"], "language": "python", "kernelType": "notebook", "slug": slug}
        if version := versions[-1].working / "__notebook__.ipynb":
            blob["source"] = version.read_text() if version.is_file() else blob["source"]
        metadata = {"ref": f"{OWNER}/{slug}", "slug": slug, "title": slug, "currentVersionNumber": len(versions)}
        return {"metadata": metadata, "blob": blob}

    def GetAcceleratorQuotaStatistics(self, r):
        quota = {"timeUsed": f"{(30 - self.quota_hours) * 3600:.0f}s", "totalTimeAllowed": "108000s"}
        return {"gpuQuota": quota, "quotaRefreshTime": "2026-12-01T00:00:00Z"}

    def IntrospectToken(self, r):
        return {"active": r["token"] == KEY, "username": OWNER}

    def GetDatasetStatus(self, r):
        if f"{r['ownerSlug']}/{r['datasetSlug']}" not in self.datasets:
            raise Refusal(403, "Permission 'datasets.get' was denied")
        return {"status": "READY"}

    def ListDatasetFiles(self, r):
        names = sorted(self.datasets[f"{r['ownerSlug']}/{r['datasetSlug']}"])
        return {"datasetFiles": [{"name": n} for n in names]}

    def StartBlobUpload(self, r):
        token = f"blob-{len(self.blobs)}"
        self.blobs[token] = (r["name"], None)
        return {"token": token, "createUrl": f"http://127.0.0.1:{self.port}/upload/{token}"}

    def CreateDataset(self, r):
        ref = f"{r['ownerSlug']}/{r['slug']}"
        assert r["isPrivate"] and 6 <= len(r["slug"]) <= 50
        if ref in self.datasets:
            return {"status": "error", "error": "The requested title is already in use by a dataset."}
        self.datasets[ref] = dict(self.blobs[f["token"]] for f in r["files"])
        assert all(content is not None for content in self.datasets[ref].values())
        return {"ref": ref, "url": f"https://www.kaggle.com/datasets/{ref}", "status": "ok"}

    def _kernel(self, r):
        if r["userName"] != OWNER or r["kernelSlug"] not in self.kernels:
            raise Refusal(403, "Permission 'kernels.get' was denied")
        return self.kernels[r["kernelSlug"]]

    # --- sessions ----------------------------------------------------------------------------------------------------

    def _run(self, version):
        for source in version.request.get("datasetDataSources", []):
            owner, slug = source.split("/")
            layout = [slug] if self.old_layout else ["datasets", owner, slug]
            mount = version.folder.joinpath("input", *layout)
            mount.mkdir(parents=True)
            for name, content in self.datasets.get(source, {}).items():
                (mount / name).write_bytes(content)
        for source in version.request.get("modelDataSources", []):
            mount = version.folder / "input" / "models" / source
            mount.parent.mkdir(parents=True)
            mount.symlink_to(self.models[source])
        version.status = "RUNNING"
        version.status = self.session(version)

    def execute(self, version):
        """As Kaggle does: papermill in /kaggle/working, no kernel named."""
        notebook, secrets = self._session_files(version)
        command = [self.image, "-m", "papermill", notebook, "__notebook__.ipynb", "--no-progress-bar", "--log-output"]
        environment = session_environment(version.folder, secrets) | {"KAGGLE_KERNEL_RUN_TYPE": "Batch"}
        version.process = subprocess.Popen(
            command, cwd=version.working, env=environment,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        )  # fmt: skip
        lines = [{"stream_name": "stderr", "time": 0.1, "data": line} for line in version.process.stdout]
        version.log = json.dumps(lines)
        return "COMPLETE" if version.process.wait() == 0 else "ERROR"

    def execute_in_fork(self, version):
        """The same cells one after the other, without a kernel and a notebook of its own: in a tenth of the time."""
        notebook, secrets = self._session_files(version)
        environment = session_environment(version.folder) | {"KAGGLE_KERNEL_RUN_TYPE": "Batch"}
        with self.forking:
            done = self.forks.run(RUN_CELLS, [notebook, secrets], cwd=version.working, **environment)
        for name in ("stdout", "stderr"):
            (version.working / name).unlink()
        version.log = json.dumps([{"data": done.output + done.errors}])
        return "COMPLETE" if done.returncode == 0 else "ERROR"

    def _session_files(self, version):
        """The notebook, and a folder that holds the secrets' client."""
        notebook, secrets = version.folder / "notebook.ipynb", version.folder / "image"
        notebook.write_text(version.request["text"])
        secrets.mkdir()
        (secrets / "kaggle_secrets.py").write_text(
            f"class UserSecretsClient:\n    def get_secret(self, name):\n        return {{'HF_TOKEN': {HF_TOKEN!r}}}[name]\n"
        )
        return notebook, secrets


RUN_CELLS = """
import json, sys
from pathlib import Path
from IPython.core.interactiveshell import InteractiveShell
sys.path.insert(0, sys.argv[2])
shell = InteractiveShell.instance()
for cell in json.loads(Path(sys.argv[1]).read_text())["cells"]:
    if cell["cell_type"] == "code" and not shell.run_cell("".join(cell["source"]), store_history=True).success:
        sys.exit(1)
"""
# Of what an image has, the part that takes long to load.
IMAGE_MODULES = (
    "IPython.core.interactiveshell", "matplotlib.pyplot", "pandas", "pyarrow.parquet", "pydantic", "datasets", "yaml",
)  # fmt: skip


def fork_image(image, folder, **environment):
    """Processes of an image's interpreter, for the server's ``forks``."""
    return Forks(session_environment(folder) | environment, IMAGE_MODULES, image)


def session_environment(folder, *python_path):
    """A session's: no proxy, no credentials of the host, nothing from the network."""
    kept = {name: os.environ[name] for name in ("PATH", "TMPDIR", "LANG") if name in os.environ}
    kept |= {"HOME": str(folder), "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(map(str, python_path))}
    threads = os.environ.get("OMP_NUM_THREADS", str(os.cpu_count()))  # as here: sums depend on it
    return kept | {"OMP_NUM_THREADS": threads, "JUPYTER_PLATFORM_DIRS": "1"}


class Listener(ThreadingHTTPServer):
    def handle_error(self, request, client_address):
        if not isinstance(sys.exc_info()[1], ConnectionError):  # a client that was killed
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    @property
    def kaggle(self) -> KaggleServer:
        return self.server.owner

    def do_POST(self):
        # Clients that go through a proxy send the whole address.
        path = urllib.parse.urlsplit(self.path).path
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])) or b"{}")
        method = path.rsplit("/", 1)[-1]
        assert path.startswith("/api/v1/"), self.path
        with self.kaggle.lock:
            self.kaggle.calls.append(method)
            faults = self.kaggle.faults.get(method)
            fault = faults.popleft() if faults else None
            if fault:
                self.kaggle.injected.append(f"{fault}")
        self.kaggle.on_call(method, "before")
        if fault == "drop before":
            return self.drop()
        if fault == "hang":
            time.sleep(3)
            return self.drop()
        if fault == "late":  # what was asked is done, long after the client has stopped listening
            time.sleep(1.5)
        if fault == "unknown":
            return self.fail(403, "Permission 'kernels.get' was denied")
        if fault == "html":
            return self.reply(200, b"<html>Down for maintenance</html>", "text/html")
        if fault == 429:
            return self.reply(429, b'{"message": "Too many requests"}', "application/json", {"Retry-After": "0"})
        if isinstance(fault, int):
            return self.fail(fault, f"injected, with your key {KEY}")
        if callable(fault):  # makes an answer of the request's headers
            return self.reply(400, fault(dict(self.headers)).encode(), "text/plain")
        if not self.authorised():
            return self.fail(401, "Unauthenticated")
        try:
            with self.kaggle.lock:
                answer = getattr(self.kaggle, method)(body)
        except Refusal as refusal:
            self.kaggle.on_call(method, "after")
            return self.fail(refusal.status, refusal.message)
        self.kaggle.on_call(method, "after")
        if fault == "drop after":
            return self.drop()
        return self.reply(200, json.dumps(answer).encode(), "application/json")

    def do_GET(self):
        assert "Authorization" not in self.headers, "file addresses are signed; credentials must not go there"
        url = urllib.parse.urlsplit(self.path)
        _, _, slug, number = url.path.split("/")
        name = urllib.parse.parse_qs(url.query)["name"][0]
        faults = self.kaggle.faults.get("GET")
        fault = faults.popleft() if faults else None
        if fault:
            self.kaggle.injected.append(f"download {fault}")
        if fault == "drop before":
            return self.drop()
        if isinstance(fault, int):
            return self.reply(fault, b"<html>error</html>", "text/html")
        if name in self.kaggle.missing_files:
            return self.reply(self.kaggle.missing_files[name], NOT_FOUND_PAGE, "text/html")
        content = self.kaggle.extra_files.get(name)
        if content is None:
            content = (self.kaggle.kernels[slug][int(number) - 1].working / name).read_bytes()
        if fault == "cut":
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[: len(content) // 2])
            return self.drop()
        self.reply(200, content, "application/octet-stream", {"Last-Modified": formatdate(usegmt=True)})

    def do_PUT(self):
        token = self.path.rsplit("/", 1)[-1]
        name, _ = self.kaggle.blobs[token]
        self.kaggle.on_upload(name)
        length = self.headers.get("Content-Length")
        content = self.rfile.read(int(length)) if length else b"".join(iter(self.chunk, b""))
        self.kaggle.blobs[token] = (name, content)
        self.reply(200, b"{}", "application/json")

    def chunk(self):
        size = int(self.rfile.readline(), 16)
        content = self.rfile.read(size)
        self.rfile.readline()
        return content

    def authorised(self):
        basic = "Basic " + base64.b64encode(f"{OWNER}:{KEY}".encode()).decode()
        return self.headers.get("Authorization") in (basic, f"Bearer {KEY}") or self.path.endswith("IntrospectToken")

    def fail(self, status, message):
        """Real refusals hide their reason two levels deep."""
        body = {"error": {"code": status, "details": [], "message": json.dumps({"error": {"message": message}})}}
        self.reply(status, json.dumps(body).encode(), "application/json")

    def reply(self, status, content, kind, headers=()):
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(content)), **dict(headers)}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def drop(self):
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)


def make_image(folder):
    """An interpreter that has what an image has, which is all but this project; returns its path."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    python = folder / "bin" / "python"
    places = subprocess.run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], **_SAID)
    # A folder that a .pth file names is searched, but its own .pth files, an editable install's among them, are not read.
    Path(places.stdout.strip(), "image.pth").write_text(sysconfig.get_path("purelib"))
    tried = subprocess.run([python, "-c", _CHECK_IMAGE], cwd=folder, env=session_environment(folder), **_SAID)
    assert tried.stdout == "ModuleNotFoundError\n", tried
    return python


_SAID = {"capture_output": True, "text": True, "check": True}
_CHECK_IMAGE = """
import papermill, pip
try:
    import eaftlib
except Exception as error:
    print(type(error).__name__)
"""


def copy_project(folder, root):
    """A project folder to start commands in: notebooks and the Kaggle settings."""
    shutil.copytree(root / "notebooks", folder / "notebooks", ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    (folder / "params").mkdir()
    shutil.copy(root / "params" / "kaggle.yaml", folder / "params")
    return folder


def write_params(project, name, **changes):
    """A file of parameters for the tiny model; returns its path inside the project."""
    file = project / "params" / "tiny" / f"{name}.yaml"
    file.parent.mkdir(exist_ok=True)
    file.write_text(yaml.safe_dump(TINY | changes))
    return str(file.relative_to(project))


def run_of(version):
    """What the builder wrote into a pushed notebook's start cell."""
    cells = json.loads(version.request["text"])["cells"]
    start = next(cell["source"] for cell in cells if cell["source"].startswith("RUN = "))
    return ast.literal_eval(ast.parse(start).body[0].value)


def log_of(version):
    return "".join(line["data"] for line in json.loads(version.log))


def assert_loopback(environment):
    """Where the client would send its calls, asked in a process of its own that makes none."""
    subprocess.run([sys.executable, "-c", _CHECK_ENDPOINT], env=environment, check=True)


_CHECK_ENDPOINT = """
import os
import requests
from kagglesdk.kaggle_env import get_endpoint, get_env
assert os.environ["KAGGLE_API_ENVIRONMENT"] == "LOCALHOST" and get_endpoint(get_env()) == "http://localhost"
assert requests.utils.get_environ_proxies("http://localhost/")["http"].startswith("http://127.0.0.1:")
"""
