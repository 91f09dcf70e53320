"""The Hugging Face hub on loopback: the part of its HTTP interface that huggingface_hub uses for files and commits."""

import base64
import hashlib
import itertools
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

import pytest

TOKEN = "hf_test"
LFS_SUFFIXES = (".safetensors", ".bin", ".pth")
Answer = tuple[int, dict[str, str], bytes]

_commits = itertools.count(1)


@dataclass
class Repository:
    """One repository: the files of each commit, and the commit of each branch."""

    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, files: dict[str, bytes], branch: str = "main", commit: str | None = None) -> str:
        """Set the files of a branch, and return the commit."""
        commit = commit or f"{next(_commits):040x}"
        self.commits[commit] = dict(files)
        self.branches[branch] = commit
        return commit

    def files(self, branch: str = "main") -> dict[str, bytes]:
        """Return the files of a branch, none if there is no such branch."""
        return self.commits.get(self.branches.get(branch, ""), {})


@dataclass
class FakeHub:
    """A hub in this process.

    Attributes:
      url: its endpoint.
      repositories: keyed by owner and name.
      requests: method and path of each request so far.
      fault: returns the answer to send instead, for a request that is to fail.
      sent: bytes to send in place of a file's content, under the headers of the real content.
    """

    url: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    fault: Callable[[str, str], Answer | None] = lambda method, path: None
    sent: Callable[[str, bytes], bytes] = lambda path, content: content
    objects: dict[str, bytes] = field(default_factory=dict)

    def add(self, name: str, files: dict[str, bytes], **options: Any) -> Repository:
        """Add a repository with one commit."""
        repository = self.repositories.setdefault(name, Repository())
        repository.commit(files, **options)
        return repository

    def downloads(self, name: str) -> int:
        """Return how often a file's content has been requested."""
        return sum(line.startswith("GET ") and line.endswith(f"/{name}") for line in self.requests)

    def answer(self, method: str, path: str, body: bytes, token: str | None) -> Answer:
        """Answer a request."""
        self.requests.append(f"{method} {path}")
        fault = self.fault(method, path)
        if fault is not None:
            return fault
        parts = path.strip("/").split("/")
        if method == "PUT" and parts[0] == "lfs":
            self.objects[parts[1]] = body
            return 200, {}, b""
        if method != "POST" and parts[0] == "api":
            return self._about("/".join(parts[2:4]), token)
        if method != "POST":
            return self._file(method, "/".join(parts[:2]), parts[3], "/".join(parts[4:]), token)
        if path == "/api/validate-yaml":
            return _json({"errors": [], "warnings": []})
        if token != TOKEN:
            return _refusal(401, "RepoNotFound" if "models" in parts else "", "Invalid username or password.")
        items = [json.loads(line) for line in body.splitlines()]
        if path == "/api/repos/create":
            return self._create(items[0])
        if path.endswith(".git/info/lfs/objects/batch"):
            return _json({"transfer": "basic", "objects": [self._upload(item) for item in items[0]["objects"]]})
        name, action, revision = "/".join(parts[2:4]), parts[4], unquote(parts[5])
        repository = self.repositories[name]
        if action == "branch":
            if revision in repository.branches:
                return _refusal(409, "", "Reference already exists")
            repository.branches[revision] = repository.branches["main"]
            return _json({})
        if action == "preupload":
            modes = [
                {"path": file["path"], "uploadMode": "lfs" if file["path"].endswith(LFS_SUFFIXES) else "regular"}
                for file in items[0]["files"]
            ]
            return _json({"files": [mode | {"shouldIgnore": False} for mode in modes]})
        return self._commit(name, revision, items)

    def _about(self, name: str, token: str | None) -> Answer:
        repository = self.repositories.get(name)
        if repository is None or (repository.private and token != TOKEN):
            return _refusal(404 if token else 401, "RepoNotFound", "Repository not found")
        return _json({"id": name, "sha": repository.branches["main"], "private": repository.private, "tags": []})

    def _file(self, method: str, name: str, revision: str, path: str, token: str | None) -> Answer:
        repository, revision = self.repositories.get(name), unquote(revision)
        if repository is None or (repository.private and token != TOKEN):
            return _refusal(404 if token else 401, "RepoNotFound", "Repository not found")
        commit = repository.branches.get(revision, revision)
        if commit not in repository.commits:
            return _refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        content = repository.commits[commit].get(path)
        if content is None:
            status, headers, text = _refusal(404, "EntryNotFound", "Entry not found")
            return status, headers | {"X-Repo-Commit": commit}, text
        is_lfs = path.endswith(LFS_SUFFIXES)
        git = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        digest = hashlib.sha256(content).hexdigest() if is_lfs else git
        headers = {"X-Repo-Commit": commit, "ETag": f'"{digest}"', "Content-Length": str(len(content))}
        if is_lfs:
            headers |= {"X-Linked-ETag": f'"{digest}"', "X-Linked-Size": str(len(content))}
        return 200, headers, self.sent(path, content) if method == "GET" else b""

    def _create(self, options: dict[str, Any]) -> Answer:
        name = f"{options['organization']}/{options['name']}"
        if name in self.repositories:
            status, headers, _ = _refusal(409, "", "You already created this model repo")
            return status, headers, json.dumps({"url": f"{self.url}/{name}"}).encode()
        self.repositories[name] = Repository(private=options.get("visibility") == "private")
        self.repositories[name].commit({".gitattributes": b"*.safetensors filter=lfs\n"})
        return _json({"url": f"{self.url}/{name}"})

    def _upload(self, item: dict[str, Any]) -> dict[str, Any]:
        if item["oid"] in self.objects:
            return item
        return item | {"actions": {"upload": {"href": f"{self.url}/lfs/{item['oid']}"}}}

    def _commit(self, name: str, branch: str, lines: list[dict[str, Any]]) -> Answer:
        repository = self.repositories[name]
        files = dict(repository.files(branch))
        for line in lines:
            key, value = line["key"], line["value"]
            if key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                files[value["path"]] = self.objects[value["oid"]]
            elif key == "deletedFile":
                del files[value["path"]]
        commit = repository.commit(files, branch)
        return _json({"commitUrl": f"{self.url}/{name}/commit/{commit}", "commitOid": commit})


def _json(content: Any) -> Answer:
    return 200, {"Content-Type": "application/json"}, json.dumps(content).encode()


def _refusal(status: int, code: str, message: str) -> Answer:
    headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
    return status, headers, json.dumps({"error": message}).encode()


def refusal(status: int, code: str = "", message: str = "no") -> Callable[[str, str], Answer]:
    """Return a fault that refuses every request with this status, code and message."""
    return lambda method, path: _refusal(status, code, message)


def serve(hub: FakeHub) -> ThreadingHTTPServer:
    """Serve a hub in the background on its own port."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_any(self) -> None:
            body = self._body()
            token = self.headers.get("Authorization", "").removeprefix("Bearer ") or None
            status, headers, content = hub.answer(self.command, self.path.partition("?")[0], body, token)
            self.send_response_only(status)
            for name, value in ({"Content-Length": str(len(content))} | headers).items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)
                if len(content) != int(headers.get("Content-Length", len(content))):
                    self.close_connection = True  # as when a download breaks off

        do_GET = do_HEAD = do_POST = do_PUT = handle_any  # noqa: N815

        def _body(self) -> bytes:
            if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length", 0)))
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return body

        def log_message(self, format: str, *args: Any) -> None:
            """Print nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    return server


def use_endpoint(monkeypatch: pytest.MonkeyPatch, url: str, cache: str) -> None:
    """Make huggingface_hub, which has read its environment already, use the endpoint `url` and the folder `cache`."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", cache)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True, raising=False)  # the protocol for very large files
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def fake_hub(tmp_path, monkeypatch) -> Iterator[FakeHub]:
    """An empty hub, and an empty cache."""
    pytest.importorskip("huggingface_hub")
    hub = FakeHub()
    server = serve(hub)
    use_endpoint(monkeypatch, hub.url, str(tmp_path / "hub-cache"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no-token"))
    yield hub
    server.shutdown()
    server.server_close()
