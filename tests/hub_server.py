"""A hub of models and data sets on 127.0.0.1, as far as the unmodified huggingface_hub client asks for one.

What it answers follows the client's source (hf_api.py, _commit_api.py, lfs.py, file_download.py of 2.4): repositories,
preupload, large files by the LFS batch protocol in one piece or in parts, commits, trees, downloads with ranges. Large
files are redirected to another host name, as the hub redirects to its content network. Xet is not offered: a client
has to be told (HF_HUB_DISABLE_XET).
"""

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

TOKEN = "hf_" + "loopbackLOOPBACK" * 2


@dataclass(frozen=True)
class File:
    """A file of a commit: content, or where the content of a large file is."""

    size: int
    git_oid: str
    sha256: str | None = None
    content: bytes = b""


@dataclass
class Repo:
    private: bool
    commits: list[tuple[str, dict[str, File]]] = field(default_factory=list)  # (oid, path -> file), the newest last

    def at(self, revision):
        return next((c for c in reversed(self.commits) if revision in ("main", c[0])), None)


@dataclass
class Fault:
    """What happens to the first ``times`` requests whose "METHOD path" matches, instead of an answer.

    answer: a status; or a number of bytes of the body after which the connection is cut; or an event to wait for.
    """

    pattern: str
    status: int | None = None
    cut_after: int | None = None
    wait: threading.Event | None = None
    times: int = 1


class HubServer:
    def __init__(self):
        self.lock = threading.Lock()
        self.reset()
        handler = type("Handler", (_Handler,), {"hub": self})
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._http.daemon_threads = True
        threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True).start()

    def reset(self, chunk_size=None):
        """Forget everything. chunk_size: large files are taken in parts of so many bytes; None: in one piece."""
        self.repos: dict[tuple[str, str], Repo] = {}
        self.large: dict[str, bytes] = {}
        self.parts: dict[str, dict[int, bytes]] = {}
        self.log: list[tuple[str, str, int]] = []  # method, path, status; what was answered
        self.stored: list[str] = []  # the SHA-256 of each large file, each time that it was sent whole
        self.faults: list[Fault] = []
        self.chunk_size = chunk_size

    @property
    def port(self):
        return self._http.server_address[1]

    @property
    def endpoint(self):
        return f"http://127.0.0.1:{self.port}"

    def environment(self, home, token=TOKEN):
        """For a process whose client shall know this hub alone."""
        names = {"HF_ENDPOINT": self.endpoint, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
        return names | {"HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "*", "HF_TOKEN": token}

    def close(self):
        self._http.shutdown()
        self._http.server_close()

    def add(self, kind, name, files, private=False):
        """A repository that is there already. files: path -> bytes; those that end in .safetensors or .parquet are large."""
        found = {}
        for path, content in files.items():
            digest = hashlib.sha256(content).hexdigest() if is_large(path) else None
            if digest:
                self.large[digest] = content
            found[path] = File(len(content), git_oid(content), digest, b"" if digest else content)
        repo = self.repos.setdefault((kind, name), Repo(private))
        repo.commits.append((git_oid(repr(sorted(found)).encode()), found))

    def files(self, name, kind="model"):
        """Path -> bytes of a repository's newest commit."""
        _, files = self.repos[kind, name].commits[-1]
        return {path: self.large[f.sha256] if f.sha256 else f.content for path, f in files.items()}

    def requests(self, pattern):
        return [entry for entry in self.log if re.search(pattern, f"{entry[0]} {entry[1]}")]


def git_oid(content):
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def is_large(path):
    return path.endswith((".safetensors", ".parquet"))


class _Cut(Exception):
    """The connection is to be closed without another word."""


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_GET(self):
        self._handle()

    do_HEAD = do_POST = do_PUT = do_GET

    def _handle(self):
        split = urlsplit(self.path)
        self.route, self.query = unquote(split.path), parse_qs(split.query)
        fault = self._fault()
        try:
            self.body = self._read_body()
            if fault and fault.wait:
                fault.wait.wait(60)
                raise _Cut
            if fault and fault.status:
                return self._send(fault.status, b"out of order")
            self.cut_after = fault.cut_after if fault else None
            self._answer()
        except (_Cut, ConnectionError):
            self.close_connection = True

    def _fault(self):
        with self.hub.lock:
            for fault in self.hub.faults:
                if fault.times and re.search(fault.pattern, f"{self.command} {self.route}"):
                    fault.times -= 1
                    return fault
        return None

    def _read_body(self):
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            body = b""
            while size := int(self.rfile.readline().split(b";")[0], 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return body
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _answer(self):
        for method, pattern, action in _ROUTES:
            found = re.fullmatch(pattern, self.route)
            if found and self.command in method.split("|"):
                return action(self, **found.groupdict())
        self._send(404, b"no such route", {"X-Error-Message": f"no route for {self.command} {self.route}"})

    def _send(self, status, body=b"", headers=(), length=None):
        self.hub.log.append((self.command, self.route, status))
        self.send_response(status)
        for name, value in dict(headers).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        if self.command != "HEAD":
            if getattr(self, "cut_after", None) is not None and len(body) > self.cut_after:
                self.wfile.write(body[: self.cut_after])
                self.wfile.flush()
                raise _Cut
            self.wfile.write(body)

    def _json(self, content, status=200, headers=()):
        self._send(status, json.dumps(content).encode(), {"Content-Type": "application/json", **dict(headers)})

    @property
    def _knows_token(self):
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _repo(self, kind, name, write=False):
        """The repository, or an answer that says that there is none: that of a private one, too, to a stranger."""
        repo = self.hub.repos.get((kind, name))
        if write and not self._knows_token:
            self._json(
                {"error": "Invalid credentials"},
                401,
                {"X-Error-Message": "Invalid credentials in Authorization header"},
            )
        elif repo is None or (repo.private and not self._knows_token):
            self._json({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
        else:
            return repo
        raise _Answered

    # repositories

    def create(self):
        wanted = json.loads(self.body)
        if not self._knows_token:
            return self._json({"error": "Invalid username or password."}, 401)
        key = wanted.get("type", "model"), f"{wanted['organization']}/{wanted['name']}"
        with self.hub.lock:
            there = key in self.hub.repos
            if not there:
                self.hub.repos[key] = Repo(wanted.get("visibility") == "private", [(git_oid(b"begin"), {})])
        self._json({"url": f"{self.hub.endpoint}/{key[1]}"}, 409 if there else 200)

    def info(self, kind, name, revision="main"):
        repo = self._repo(kind, name)
        oid, files = repo.at(revision) or self._no_revision()
        siblings = [{"rfilename": path} for path in files]
        self._json({"id": name, "sha": oid, "private": repo.private, "siblings": siblings, "tags": [], "downloads": 0})

    def tree(self, kind, name, revision, folder=""):
        _, files = self._repo(kind, name).at(revision) or self._no_revision()
        if folder and not any(path.startswith(f"{folder}/") for path in files):
            return self._json({"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound"})
        entries = []
        for path, file in files.items():
            if path.startswith(folder):
                lfs = {"oid": file.sha256, "size": file.size, "pointerSize": 134} if file.sha256 else None
                entries.append(
                    {"type": "file", "path": path, "size": file.size, "oid": file.git_oid}
                    | ({"lfs": lfs} if lfs else {})
                )
        self._json(entries)

    def _no_revision(self):
        self._json({"error": "Revision not found"}, 404, {"X-Error-Code": "RevisionNotFound"})
        raise _Answered

    # uploads

    def validate_yaml(self):
        """The hub reads a card's front matter; so does this one."""
        content, errors = json.loads(self.body)["content"], []
        found = re.match(r"---\r?\n(.*?)\r?\n---\r?\n", content, re.DOTALL)
        try:
            values = yaml.safe_load(found[1]) if found else None
            if not isinstance(values, dict):
                errors.append({"message": "no front matter"})
        except yaml.YAMLError as error:
            errors.append({"message": str(error)})
        self._json({"errors": errors, "warnings": []}, 400 if errors else 200)

    def preupload(self, kind, name, revision):
        _, there = self._repo(kind, name, write=True).at(revision)
        files = []
        for wanted in json.loads(self.body)["files"]:
            file, mode = there.get(wanted["path"]), "lfs" if is_large(wanted["path"]) else "regular"
            oid = {"oid": file.sha256 or file.git_oid} if file else {}
            files.append({"path": wanted["path"], "uploadMode": mode, "shouldIgnore": False} | oid)
        self._json({"files": files})

    def lfs_batch(self, kind, name):
        self._repo(kind, name, write=True)
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            oid, size = wanted["oid"], wanted["size"]
            objects.append(
                {"oid": oid, "size": size} | ({} if oid in self.hub.large else {"actions": self._actions(oid, size)})
            )
        transfer = "multipart" if self.hub.chunk_size else "basic"
        self._json({"transfer": transfer, "objects": objects})

    def _actions(self, oid, size):
        base = f"{self.hub.endpoint}/storage/{oid}"
        if not (chunk := self.hub.chunk_size):
            return {"upload": {"href": base}}
        urls = {str(i + 1): f"{base}/{i + 1}" for i in range(-(-size // chunk))}
        return {"upload": {"href": f"{base}/complete", "header": {"chunk_size": str(chunk)} | urls}}

    def store(self, oid):
        if hashlib.sha256(self.body).hexdigest() != oid:
            return self._send(400, b"content does not match its oid")
        with self.hub.lock:
            self.hub.large[oid] = self.body
            self.hub.stored.append(oid)
        self._send(200)

    def store_part(self, oid, number):
        self.hub.parts.setdefault(oid, {})[int(number)] = self.body
        self._send(200, headers={"ETag": f'"{hashlib.md5(self.body).hexdigest()}"'})

    def complete(self, oid):
        parts = self.hub.parts[oid]
        self.body = b"".join(parts[p["partNumber"]] for p in json.loads(self.body)["parts"])
        self.store(oid)

    def commit(self, kind, name, revision):
        repo = self._repo(kind, name, write=True)
        lines = [json.loads(line) for line in self.body.splitlines()]
        files = dict(repo.at(revision)[1])
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                content = base64.b64decode(value["content"])
                files[value["path"]] = File(len(content), git_oid(content), None, content)
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.hub.large:
                    return self._json({"error": f"{value['path']} was never sent"}, 400)
                files[value["path"]] = File(value["size"], git_oid(value["oid"].encode()), value["oid"])
        oid = hashlib.sha1(self.body + str(len(repo.commits)).encode()).hexdigest()
        repo.commits.append((oid, files))
        self._json({"commitUrl": f"{self.hub.endpoint}/{name}/commit/{oid}", "commitOid": oid, "pullRequestUrl": None})

    # downloads

    def resolve(self, kind, name, revision, path):
        oid, files = self._repo(kind, name).at(revision) or self._no_revision()
        file, commit = files.get(path), {"X-Repo-Commit": oid}
        if file is None:
            return self._send(404, b"Entry not found", commit | {"X-Error-Code": "EntryNotFound"})
        if file.sha256 is None:
            return self._send(200, file.content, commit | {"ETag": f'"{file.git_oid}"'})
        location = f"http://localhost:{self.hub.port}/content/{file.sha256}"
        linked = {"X-Linked-Etag": f'"{file.sha256}"', "X-Linked-Size": str(file.size), "Location": location}
        self._send(302, b"", commit | linked)

    def content(self, oid):
        whole = self.hub.large[oid]
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not asked:
            return self._send(200, whole, {"ETag": f'"{oid}"', "Accept-Ranges": "bytes"})
        start, end = int(asked[1]), int(asked[2] or len(whole) - 1)
        headers = {"ETag": f'"{oid}"', "Content-Range": f"bytes {start}-{end}/{len(whole)}"}
        self._send(206, whole[start : end + 1], headers)


class _Answered(Exception):
    """An answer has been sent; nothing is left to do."""


def _route(method, pattern, action):
    def act(handler, **found):
        if "kind" in found:
            found["kind"] = {"models": "model", "datasets": "dataset", "datasets/": "dataset"}.get(
                found["kind"], "model"
            )
        try:
            action(handler, **{k: v for k, v in found.items() if v is not None})
        except _Answered:
            pass

    return method, pattern, act


_API = r"/api/(?P<kind>models|datasets)/(?P<name>[^/]+/[^/]+)"
_ROUTES = [
    _route("POST", "/api/repos/create", _Handler.create),
    _route("POST", "/api/validate-yaml", _Handler.validate_yaml),
    _route("GET", _API, _Handler.info),
    _route("GET", _API + "/revision/(?P<revision>[^/]+)", _Handler.info),
    _route("GET", _API + "/tree/(?P<revision>[^/]+)(?:/(?P<folder>.+))?", _Handler.tree),
    _route("POST", _API + "/preupload/(?P<revision>[^/]+)", _Handler.preupload),
    _route("POST", _API + "/commit/(?P<revision>[^/]+)", _Handler.commit),
    _route("POST", r"/(?P<kind>datasets/)?(?P<name>[^/]+/[^/]+)\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    _route("PUT", "/storage/(?P<oid>[0-9a-f]{64})", _Handler.store),
    _route("PUT", r"/storage/(?P<oid>[0-9a-f]{64})/(?P<number>\d+)", _Handler.store_part),
    _route("POST", "/storage/(?P<oid>[0-9a-f]{64})/complete", _Handler.complete),
    _route("GET|HEAD", "/content/(?P<oid>[0-9a-f]{64})", _Handler.content),
    _route(
        "GET|HEAD",
        "/(?P<kind>datasets/)?(?P<name>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)",
        _Handler.resolve,
    ),
]


@contextmanager
def serving():
    hub = HubServer()
    try:
        yield hub
    finally:
        hub.close()
