"""A small Hub for the tests: the calls with which the real client creates repositories, uploads and downloads."""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_" + "T" * 10 + "estOnly"
_PREFIXES = {"model": "", "dataset": "datasets/", "space": "spaces/"}


class HubServer:
    """Repositories in memory: `files[(type, id)][name]` is a file's content.

    Attributes:
        requests: `(method, path)` of all calls; `log` holds whatever a server would write down.
        settings: what each repository was created with.
    """

    def __init__(self):
        self.files: dict[tuple[str, str], dict[str, bytes]] = {}
        self.settings: dict[tuple[str, str], dict] = {}
        self.commits: list[tuple[tuple[str, str], list[str]]] = []
        self.objects: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.refuse: str | None = None  # a part of a path; calls with it are answered with an error
        server = self

        class Handler(_Handler):
            hub = server

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        self.thread = threading.Thread(target=self.http.serve_forever, daemon=True)

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.http.shutdown()
        self.http.server_close()

    def sha(self, repository) -> str:
        content = sorted((name, hashlib.sha1(data).hexdigest()) for name, data in self.files[repository].items())
        return hashlib.sha1(repr((repository, content)).encode()).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        self._handle("GET")

    def do_HEAD(self):
        self._handle("HEAD")

    def do_POST(self):
        self._handle("POST")

    def do_PUT(self):
        self._handle("PUT")

    def _handle(self, method):
        path = unquote(urlsplit(self.path).path)
        body = self._body()
        self.hub.requests.append((method, path))
        if self.hub.refuse and self.hub.refuse in path:
            return self._json({"error": "The server is tired"}, 403)
        writes = method in ("POST", "PUT") and not path.startswith("/lfs/") and "validate-yaml" not in path
        if writes and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._json({"error": "Invalid username or password."}, 401)
        for pattern, function in _ROUTES:
            match = re.fullmatch(pattern, path)
            if match and function.__name__.startswith(method.lower()):
                return function(self, body, *match.groups())
        return self._json({"error": f"no such call: {method} {path}"}, 404)

    def _body(self) -> bytes:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            data = b""
            while size := int(self.rfile.readline(), 16):
                data += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return data
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _send(self, status, data, headers):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _json(self, value, status=200, **headers):
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json", **headers})

    def _missing(self, code):
        self._json({"error": code}, 404, **{"X-Error-Code": code, "X-Error-Message": code})

    # ---- accounts and repositories ----

    def get_whoami(self, body):
        self._json({"name": "tester", "type": "user", "auth": {"type": "access_token"}})

    def post_create(self, body):
        wanted = json.loads(body)
        kind = wanted.get("type") or "model"
        name = f"{wanted.get('organization') or 'tester'}/{wanted['name']}"
        known = (kind, name) in self.hub.files
        self.hub.files.setdefault((kind, name), {})
        self.hub.settings.setdefault((kind, name), wanted)
        self._json({"url": f"{self.hub.url}/{_PREFIXES[kind]}{name}"}, 409 if known else 200)

    def post_validate(self, body):
        assert json.loads(body)["content"]
        self._json({"errors": [], "warnings": []})

    # ---- upload ----

    def post_preupload(self, body, kind, name):
        files = [
            {"path": f["path"], "shouldIgnore": False,
             "uploadMode": "lfs" if f["path"].endswith((".safetensors", ".parquet", ".png")) else "regular"}
            for f in json.loads(body)["files"]
        ]  # fmt: skip
        self._json({"files": files}) if (kind, name) in self.hub.files else self._missing("RepoNotFound")

    def post_batch(self, body, prefix, name):
        objects = []
        for wanted in json.loads(body)["objects"]:
            entry = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.hub.objects:
                entry["actions"] = {
                    "upload": {"href": f"{self.hub.url}/lfs/{wanted['oid']}"},
                    "verify": {"href": f"{self.hub.url}/verify"},
                }
            objects.append(entry)
        self._json({"transfer": "basic", "objects": objects})

    def put_object(self, body, oid):
        assert hashlib.sha256(body).hexdigest() == oid
        self.hub.objects[oid] = body
        self._json({})

    def post_verify(self, body):
        wanted = json.loads(body)
        self._json({}, 200 if len(self.hub.objects[wanted["oid"]]) == wanted["size"] else 404)

    def post_commit(self, body, kind, name, revision):
        repository, names = (kind, name), []
        for line in body.decode().splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                self.hub.files[repository][value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                self.hub.files[repository][value["path"]] = self.hub.objects[value["oid"]]
            names += [value["path"]] if "path" in value else []
        self.hub.commits.append((repository, names))
        sha = self.hub.sha(repository)
        self._json({"commitUrl": f"{self.hub.url}/{_PREFIXES[kind]}{name}/commit/{sha}", "commitOid": sha})

    # ---- download ----

    def get_info(self, body, kind, name, revision=None):
        repository = (kind, name)
        if repository not in self.hub.files:
            return self._missing("RepoNotFound")
        siblings = [{"rfilename": file} for file in sorted(self.hub.files[repository])]
        return self._json(
            {"id": name, "sha": self.hub.sha(repository), "private": False, "tags": [], "siblings": siblings,
             "lastModified": "2026-01-01T00:00:00.000Z", "downloads": 0, "likes": 0}
        )  # fmt: skip

    def get_refs(self, body, kind, name):
        branch = {"name": "main", "ref": "refs/heads/main", "targetCommit": self.hub.sha((kind, name))}
        self._json({"branches": [branch], "tags": [], "converts": []})

    def get_tree(self, body, kind, name, revision, folder=None):
        files = self.hub.files.get((kind, name))
        if files is None:
            return self._missing("RepoNotFound")
        start = f"{folder.strip('/')}/" if folder else ""
        recursive = "recursive=True" in self.path or "recursive=true" in self.path
        entries = {}
        for path, data in sorted(files.items()):
            if path.startswith(start):
                parts = path.removeprefix(start).split("/")
                for depth in range(1, len(parts) if recursive else min(2, len(parts))):
                    inner = start + "/".join(parts[:depth])
                    entries[inner] = {"type": "directory", "path": inner, "size": 0, "oid": "0" * 40}
                if recursive or len(parts) == 1:
                    entries[path] = _file_entry(path, data)
        return self._json(list(entries.values())) if entries or not folder else self._missing("EntryNotFound")

    def post_paths(self, body, kind, name, revision):
        wanted = parse_qs(body.decode())["paths"] if body[:1] != b"{" else json.loads(body)["paths"]
        found = []
        for path in wanted:
            files = self.hub.files[kind, name]
            if path in files:
                found.append(_file_entry(path, files[path]))
            elif any(file.startswith(f"{path}/") for file in files):
                found.append({"type": "directory", "path": path, "size": 0, "oid": "0" * 40})
        self._json(found)

    def get_file(self, body, prefix, name, revision, file):
        kind = {value: key for key, value in _PREFIXES.items()}[prefix or ""]
        files = self.hub.files.get((kind, name))
        if files is None or file not in files:
            return self._missing("RepoNotFound" if files is None else "EntryNotFound")
        etag = f'"{hashlib.sha256(files[file]).hexdigest()}"'
        return self._send(200, files[file], {"ETag": etag, "X-Repo-Commit": self.hub.sha((kind, name))})

    def head_file(self, *arguments):
        self.get_file(*arguments)


def _file_entry(path: str, data: bytes) -> dict:
    return {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}


_KIND, _ID = r"(model|dataset|space)s", r"([\w.-]+/[\w.-]+)"
_ROUTES = [
    (r"/api/whoami-v2", _Handler.get_whoami),
    (r"/api/repos/create", _Handler.post_create),
    (r"/api/validate-yaml", _Handler.post_validate),
    (rf"/api/{_KIND}/{_ID}/preupload/[^/]+", _Handler.post_preupload),
    (rf"/(datasets/|spaces/)?{_ID}\.git/info/lfs/objects/batch", _Handler.post_batch),
    (r"/lfs/(\w+)", _Handler.put_object),
    (r"/verify", _Handler.post_verify),
    (rf"/api/{_KIND}/{_ID}/commit/([^/]+)", _Handler.post_commit),
    (rf"/api/{_KIND}/{_ID}", _Handler.get_info),
    (rf"/api/{_KIND}/{_ID}/revision/([^/]+)", _Handler.get_info),
    (rf"/api/{_KIND}/{_ID}/refs", _Handler.get_refs),
    (rf"/api/{_KIND}/{_ID}/tree/([^/]+)(/.*)?", _Handler.get_tree),
    (rf"/api/{_KIND}/{_ID}/paths-info/([^/]+)", _Handler.post_paths),
    (rf"/(datasets/|spaces/)?{_ID}/resolve/([^/]+)/(.+)", _Handler.get_file),
    (rf"/(datasets/|spaces/)?{_ID}/resolve/([^/]+)/(.+)", _Handler.head_file),
]
