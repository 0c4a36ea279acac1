"""Kaggle as one account sees it: the few calls that a run needs, each with a time-out, retries, and readable errors."""

import contextlib
import functools
import io
import json
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests
import tenacity

from ..errors import KaggleError
from .setup_cell import mask

CALL_SECONDS = 60
TRANSFER_SECONDS = 3600  # of one file's download, or of a data set's upload
ATTEMPTS = 8
DOWNLOAD_ATTEMPTS = 3
MAX_FILES = 500  # a run leaves a handful
_HF_TOKEN = re.compile(r"\bhf_\w{20,}")  # a session's own, which a traceback may hold
_LIMIT = re.compile(r"quota|session count|session limit|concurrent|maximum.*sessions", re.IGNORECASE)


class LimitReached(KaggleError):
    """The account's limit: sessions at a time, or the week's quota of hours. Time helps."""


class QuotaReached(LimitReached):
    """The week's hours are used up: there is no hurry to ask again."""


class Refused(KaggleError):
    """The service understood the call and said no; ``status`` is its HTTP status."""

    def __init__(self, status: int, reason: str):
        super().__init__(f"Kaggle answered {status}: {reason}")
        self.status = status


class Unreachable(KaggleError):
    """No usable answer after the last try: whether the service did what was asked is not known."""


class _Transient(Exception):
    """Worth another try: the network, 429, or a fault of the server."""

    def __init__(self, reason: str, wait: float | None = None):
        super().__init__(reason)
        self.wait = wait


@dataclass(frozen=True)
class Quota:
    """GPU hours of the week."""

    left: float
    total: float

    def __str__(self) -> str:
        return f"{self.left:.1f} of {self.total:.1f} GPU hours left this week"


@dataclass(frozen=True)
class Pushed:
    """``missing``: sources that the service does not know or does not show; it starts the session without them."""

    url: str
    version: int | None
    missing: list[str]


class Service:
    """The authenticated client. Raises KaggleError where there are no credentials."""

    def __init__(self, *, first_wait: float = 1.0, longest_wait: float = 60.0, call_seconds: float = CALL_SECONDS):
        """first_wait, longest_wait: seconds between tries, doubled each time. call_seconds: limit of one try."""
        self._wait = tenacity.wait_exponential_jitter(multiplier=first_wait, max=longest_wait, jitter=first_wait)
        self._longest_wait, self._call_seconds = longest_wait, call_seconds
        # What the client may send to sign in; the service's answer may repeat it.
        self._secrets = [os.environ[name] for name in ("KAGGLE_KEY", "KAGGLE_API_TOKEN") if os.environ.get(name)]
        self._api = self._call("sign in", self._sign_in)
        self.owner: str = self._api.config_values["username"]
        keys = (self._api.config_values.get(name) for name in ("key", "token"))
        self._secrets += [secret for secret in keys if secret]

    def push(self, folder: Path, session_seconds: int) -> Pushed:
        """One try, since a second push would start a second session: ask ``source`` first, whatever went wrong before.

        Raises LimitReached, Refused, or KaggleError.
        """
        answer = self._call("push", lambda: self._api.kernels_push(str(folder), timeout=str(session_seconds)), tries=1)
        if answer.error:
            if _LIMIT.search(answer.error):
                kind = QuotaReached if "quota" in answer.error.lower() else LimitReached
                raise kind(self._clean(answer.error))
            raise Refused(200, self._clean(answer.error))
        kinds = ("dataset", "model", "kernel", "competition")
        missing = [self._clean(s) for kind in kinds for s in getattr(answer, f"invalid_{kind}_sources") or []]
        return Pushed(answer.url, answer.version_number, missing)

    def source(self, slug: str) -> tuple[str, int | None] | None:
        """Text and version of the account's kernel, or None where there is none."""
        from kagglesdk.kernels.types.kernels_api_service import ApiGetKernelRequest

        answer = self._ask_kernel("look for the kernel", "get_kernel", ApiGetKernelRequest(), slug)
        return answer and (answer.blob.source or "", answer.metadata.current_version_number)

    def status(self, slug: str) -> tuple[str, str] | None:
        """(QUEUED, RUNNING, COMPLETE, ERROR, CANCEL_*, failure message), or None where there is no such kernel."""
        from kagglesdk.kernels.types.kernels_api_service import ApiGetKernelSessionStatusRequest

        answer = self._ask_kernel("status", "get_kernel_session_status", ApiGetKernelSessionStatusRequest(), slug)
        return answer and (answer.status.name, self._clean(answer.failure_message or ""))

    def output(self, slug: str, folder: Path) -> tuple[str, list[str]]:
        """Download the output files of the latest version into ``folder``.

        Returns the log, and what was not taken and why: a name that would leave the folder, a file that is not there.
        Raises Refused where there is no output at all.
        """
        for attempt in range(DOWNLOAD_ATTEMPTS):  # addresses are signed for a while: a refused file gets another one
            if attempt:
                time.sleep(self._longest_wait / 4)
            log, hostile, absent = self._download_output(slug, folder)
            if not absent:
                break
        refused = [f"{name[:200]!r}: the name would leave the run's folder" for name in hostile]
        return self._clean(log), refused + [f"{name}: {reason}" for name, reason in absent.items()]

    def _download_output(self, slug: str, folder: Path) -> tuple[str, list[str], dict[str, str]]:
        """The log, names that are not taken, and files that were refused, with the reason. A file is fetched once."""
        log, hostile, absent = "", [], {}
        for page in self._output_pages(slug):
            log = log or page.log or ""
            for file in page.files or []:
                name = file.file_name or ""
                target = safe_path(folder, name)
                if target is None:
                    hostile.append(name)
                elif not target.exists():
                    try:
                        fetch = functools.partial(_download, file.url, target)
                        self._call(f"download {name}", fetch, seconds=TRANSFER_SECONDS)
                    except Refused as refusal:
                        absent[name] = str(refusal)
        return log, hostile, absent

    def quota(self) -> Quota | None:
        """None where the service does not say."""
        gpu = self._call("quota", self._api.quota_view).gpu_quota
        if gpu is None or gpu.total_time_allowed is None:
            return None
        total, used = (t.total_seconds() / 3600 if t else 0.0 for t in (gpu.total_time_allowed, gpu.time_used))
        return Quota(max(0.0, total - used), total)

    def dataset_status(self, slug: str) -> str | None:
        """``ready`` when it can be mounted; None where there is none."""
        try:
            return self._call("data set", lambda: self._api.dataset_status(f"{self.owner}/{slug}"))
        except Refused as refusal:
            if refusal.status in (403, 404):
                return None
            raise

    def dataset_files(self, slug: str) -> set[str]:
        """Names of the files in the account's data set."""
        names: set[str] = set()
        token = None
        while True:
            page = functools.partial(self._api.dataset_list_files, f"{self.owner}/{slug}", token, 200)
            answer = self._call("data set", page)
            found = {file.name for file in answer.files or []}
            if not found - names:  # the last page, or one that says nothing new
                return names
            names |= found
            token = answer.next_page_token
            if not token:
                return names

    def create_dataset(self, folder: Path) -> None:
        """Upload a folder as a private data set. The client goes on without a file that it could not upload.

        It remembers unfinished uploads by path, in one place for all projects: hence the absolute one.
        """
        answer = self._call(
            "upload",
            lambda: self._api.dataset_create_new(str(folder.resolve()), quiet=True),
            seconds=TRANSFER_SECONDS,
            tries=3,
        )
        if answer.error and "already in use" not in answer.error:
            raise Refused(200, self._clean(answer.error))

    def _sign_in(self):
        """The package signs in when it is imported, says on stdout if it cannot, and goes on without credentials."""
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            from kaggle import api

            if not api.config_values.get("username"):
                with contextlib.suppress(SystemExit):
                    api.authenticate()
        if not api.config_values.get("username"):
            raise KaggleError(
                "no Kaggle credentials, or none that Kaggle takes: run `kaggle auth login`, or put a token of "
                "kaggle.com/settings into ~/.kaggle/access_token or KAGGLE_API_TOKEN"
            )
        return api

    def _ask_kernel(self, what: str, method: str, request: Any, slug: str):
        request.user_name, request.kernel_slug = self.owner, slug

        def ask():
            with self._api.build_kaggle_client() as client:
                return getattr(client.kernels.kernels_api_client, method)(request)

        try:
            return self._call(what, ask)
        except Refused as refusal:
            if refusal.status in (403, 404):  # a kernel that does not exist is "forbidden"
                return None
            raise

    def _output_pages(self, slug: str) -> Iterator[Any]:
        from kagglesdk.kernels.types.kernels_api_service import ApiListKernelSessionOutputRequest

        token, seen, count = "", set(), 0
        while token not in seen:
            seen.add(token)
            request = ApiListKernelSessionOutputRequest()
            request.page_size, request.page_token = 100, token
            page = self._ask_kernel("list the output", "list_kernel_session_output", request, slug)
            if page is None:
                raise Refused(404, f"{self.owner}/{slug} has no output, or is not there")
            yield page
            token, count = page.next_page_token, count + len(page.files or [])
            if not token:
                return
            if count > MAX_FILES:
                raise KaggleError(f"{self.owner}/{slug} has more than {MAX_FILES} output files; a run leaves a handful")

    def _call(self, what: str, call: Callable[[], Any], *, seconds: float | None = None, tries: int = ATTEMPTS) -> Any:
        """Its answer; after the last try KaggleError with the reason."""

        def wait(state: tenacity.RetryCallState) -> float:
            asked = state.outcome.exception().wait
            return min(asked, self._longest_wait) if asked is not None else self._wait(state)

        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(_Transient),
            stop=tenacity.stop_after_attempt(tries), wait=wait, reraise=True,
        )  # fmt: skip
        try:
            return retrying(self._try, call, seconds or self._call_seconds)
        except _Transient as error:
            raise Unreachable(
                f"{what}: {self._clean(str(error))} (tries: {tries}). Repeat the command later."
            ) from None
        except Refused as error:
            error.args = (self._clean(str(error)),)
            raise error from None

    def _try(self, call: Callable[[], Any], seconds: float) -> Any:
        try:
            return _within(seconds, call)
        except requests.HTTPError as error:
            status, reason = _reason(error.response, self._clean)
            if status == 429 or status >= 500:
                raise _Transient(f"{status}: {reason}", _retry_after(error.response)) from None
            raise Refused(status, reason) from None
        except (requests.RequestException, json.JSONDecodeError, OSError) as error:
            raise _Transient(f"{type(error).__name__}: {error}") from None
        except ValueError as error:  # the client will not even send it
            raise Refused(400, str(error)) from None

    def _clean(self, text: str) -> str:
        """Without what was sent to sign in, and without any session's token."""
        return _HF_TOKEN.sub("***", mask(text, self._secrets))


def safe_path(folder: Path, name: str) -> Path | None:
    """Where an output file goes; None for a name that would leave the folder, on any operating system."""
    parts = re.split(r"[\\/]", name)
    if "\0" in name or any(p in ("", ".", "..") or ":" in p for p in parts) or len(name) > 200:
        return None
    return folder.joinpath(*parts)


def _within(seconds: float, call: Callable[[], Any]) -> Any:
    """The call's answer; the package's calls know no time-out, so one that hangs is left behind in a thread."""
    future: Future = Future()

    def run():
        try:
            future.set_result(call())
        except BaseException as error:  # handed to the caller as it is
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    try:
        return future.result(seconds)
    except TimeoutError:
        if future.done():
            raise
        raise requests.Timeout(f"no answer within {seconds:.0f} s") from None


def _download(url: str, target: Path) -> None:
    """Into a temporary file first: what has the right name is whole."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.part")
    with requests.get(url, stream=True, timeout=CALL_SECONDS) as answer:
        if not answer.ok:
            _ = answer.content  # the reason, which cannot be read once the connection is closed
        answer.raise_for_status()
        with temporary.open("wb") as file:
            for chunk in answer.iter_content(1 << 20):
                file.write(chunk)
        announced = answer.headers.get("Content-Length")
    if announced and "Content-Encoding" not in answer.headers and temporary.stat().st_size != int(announced):
        raise requests.ConnectionError(f"{temporary.stat().st_size} of {announced} bytes came")
    temporary.replace(target)


def _reason(response: requests.Response, clean: Callable[[str], str]) -> tuple[int, str]:
    """Status, and the message inside an error body, however deep it is nested; else the beginning of the body.

    The body is cleaned first: a secret that is cut in two is not known again.
    """

    def search(content: object) -> str | None:
        if isinstance(content, dict):
            for key in ("message", "error", "errorMessage", "details"):
                value = content.get(key)
                found = value if isinstance(value, str) else search(value)
                if found:
                    return search_text(found) or found
        if isinstance(content, list):
            return next(filter(None, map(search, content)), None)
        return None

    def search_text(text: str) -> str | None:
        try:
            return search(json.loads(text))
        except json.JSONDecodeError:
            return None

    status = response.status_code
    if status < 400:  # the package raises for a body that holds an error's code, too
        status = response.json()["code"]
    text = clean(response.text)
    beginning = " ".join(re.sub(r"<[^>]*>", " ", text).split())[:300]
    return status, search_text(text) or beginning or response.reason or "no reason"


def _retry_after(response: requests.Response) -> float | None:
    seconds = response.headers.get("Retry-After", "")
    return float(seconds) if seconds.isdigit() else None
