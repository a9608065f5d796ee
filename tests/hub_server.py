"""A stand-in for the Hugging Face hub: a real HTTP server that keeps what `huggingface_hub` uploads to it."""

import base64
import contextlib
import hashlib
import json
from collections.abc import Iterator

import web_server
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

TOKEN = "hf_of_the_test"


class Hub:
    """Repositories by kind and name, with their files and whether they are private."""

    def __init__(self) -> None:
        self.files: dict[tuple[str, str], dict[str, bytes]] = {}
        self.private: dict[tuple[str, str], bool] = {}
        self.blobs: dict[str, bytes] = {}
        self.url = ""

    def app(self) -> Starlette:
        repo = "/api/{kind}/{owner}/{name}"
        routes = [
            Route("/api/repos/create", self.create, methods=["POST"]),
            Route("/api/validate-yaml", self.validate, methods=["POST"]),
            Route(repo, self.info),
            Route(f"{repo}/revision/main", self.info),
            Route(f"{repo}/preupload/main", self.preupload, methods=["POST"]),
            Route(f"{repo}/commit/main", self.commit, methods=["POST"]),
            Route("/{owner}/{name}.git/info/lfs/objects/batch", self.batch, methods=["POST"]),
            Route("/datasets/{owner}/{name}.git/info/lfs/objects/batch", self.batch, methods=["POST"]),
            Route("/blobs/{oid}", self.put, methods=["PUT"]),
        ]
        return Starlette(routes=routes)

    def _refused(self, request: Request) -> Response | None:
        if request.headers.get("authorization") == f"Bearer {TOKEN}":
            return None
        return JSONResponse({"error": "Invalid credentials"}, 401)

    def _key(self, request: Request) -> tuple[str, str]:
        found = request.path_params
        return found["kind"].removesuffix("s"), f"{found['owner']}/{found['name']}"

    async def create(self, request: Request) -> Response:
        if refused := self._refused(request):
            return refused
        body = await request.json()
        key = body.get("type") or "model", f"{body['organization']}/{body['name']}"
        there = key in self.files
        if not there:
            self.files[key], self.private[key] = {}, body.get("visibility") == "private" or body.get("private") is True
        place = f"{self.url}/{'datasets/' if key[0] == 'dataset' else ''}{key[1]}"
        return JSONResponse({"url": place, "name": key[1]}, 409 if there else 200)

    async def validate(self, request: Request) -> Response:
        assert (await request.json())["content"].startswith("---\n")
        return JSONResponse({"errors": [], "warnings": []})

    async def info(self, request: Request) -> Response:
        if refused := self._refused(request):
            return refused
        key = self._key(request)
        return JSONResponse({"id": key[1], "private": self.private[key], "sha": "0" * 40, "siblings": [], "tags": []})

    async def preupload(self, request: Request) -> Response:
        if refused := self._refused(request):
            return refused
        files = (await request.json())["files"]
        modes = {file["path"]: "lfs" if file["path"].endswith(".safetensors") else "regular" for file in files}
        return JSONResponse({"files": [{"path": p, "uploadMode": m, "shouldIgnore": False} for p, m in modes.items()]})

    async def batch(self, request: Request) -> Response:
        if refused := self._refused(request):
            return refused
        wanted = (await request.json())["objects"]
        found = [{**one, "actions": {"upload": {"href": f"{self.url}/blobs/{one['oid']}"}}} for one in wanted]
        return JSONResponse({"transfer": "basic", "objects": found})

    async def put(self, request: Request) -> Response:
        assert "authorization" not in request.headers  # as a store of signed addresses, which is not the hub
        data = await request.body()
        assert hashlib.sha256(data).hexdigest() == request.path_params["oid"]
        self.blobs[request.path_params["oid"]] = data
        return Response()

    async def commit(self, request: Request) -> Response:
        if refused := self._refused(request):
            return refused
        files = self.files[self._key(request)]
        for line in (await request.body()).splitlines():
            row = json.loads(line)
            if row["key"] == "file":
                files[row["value"]["path"]] = base64.b64decode(row["value"]["content"])
            elif row["key"] == "lfsFile":
                files[row["value"]["path"]] = self.blobs[row["value"]["oid"]]
        place = f"{self.url}/{self._key(request)[1]}/commit/{'1' * 40}"
        return JSONResponse({"commitUrl": place, "commitOid": "1" * 40, "success": True})


@contextlib.contextmanager
def running_hub() -> Iterator[Hub]:
    """A hub at its `url`, gone at the end."""
    hub = Hub()
    with web_server.running(hub.app()) as hub.url:
        yield hub
