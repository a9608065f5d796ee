"""Files at URLs: read by ranges from a real web server, looked at anew only when they changed, and what is refused."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
import tiny
import web_server
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import Route

from jaxdistill import manifest, parquet, records, sources
from jaxdistill.curate.mix import MixConfig
from jaxdistill.curate.mix import main as mix
from jaxdistill.data import chat, prepared
from jaxdistill.errors import UserError
from jaxdistill.records import Example, Problem


class Web:
    """A folder behind HTTP, and the bytes of each file that were asked for."""

    def __init__(self, folder: Path):
        self.folder, self.url = folder, ""
        self.served: list[tuple[str, str]] = []  # file and range of each GET
        self.versions = True  # whether the server says ETag and time of a file

    async def serve(self, request: Request) -> Response:
        name = request.path_params["name"]
        if not (self.folder / name).is_file():
            return Response(status_code=404)
        if request.method == "GET":
            self.served.append((name, request.headers.get("range", "all")))
        response = FileResponse(self.folder / name, stat_result=(self.folder / name).stat())
        if not self.versions:
            del response.headers["etag"], response.headers["last-modified"]
        return response

    def path(self, name: str) -> Path:
        return Path(f"{self.url}/{name}")


@pytest.fixture
def web(tmp_path: Path) -> Iterator[Web]:
    found = Web(tmp_path / "web")
    found.folder.mkdir()
    app = Starlette(routes=[Route("/{name}", found.serve)])
    with web_server.running(app) as found.url:
        yield found


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory):
    hf, c = tiny.hf_config("qwen2", vocab_size=264), tiny.config("qwen2", vocab_size=264)
    folder = tmp_path_factory.mktemp("model") / "hf"
    return chat.load_tokenizer(tiny.write_folder(folder, hf, tiny.values(c), c, with_tokenizer=True))


def read(path: Path, tokenizer: object, cache: Path) -> prepared.Prepared:
    return prepared.prepare(path, tokenizer, cache, show_progress=False)


def test_a_url_is_named_as_it_was_written_and_a_path_is_none():
    for url in ("gs://b/x.jsonl", "s3://b/a/x.jsonl", "memory://x", "hf://datasets/a/b@main/x.parquet", "file:///a/x"):
        assert sources.is_remote(Path(url))
        assert sources.name(Path(url)) == url
    signed = Path("https://host/x.parquet?a=b.c/d&e=f")
    assert (sources.unsigned(signed).stem, sources.unsigned(signed).suffix) == ("x", ".parquet")
    assert not any(sources.is_remote(Path(path)) for path in ("x.jsonl", "/a/b:c/x", "/gs:/x", "C:/x"))


def test_a_file_on_the_web_gives_the_tokens_of_one_on_disk_in_every_format(
    tmp_path: Path, web: Web, tokenizer: object, monkeypatch: pytest.MonkeyPatch
):
    lines = tiny.write_examples(web.folder / "x.jsonl", 40)
    parquet.write(web.folder / "x.parquet", records.read_jsonl(lines, Example), Example)
    tiny.write_array_records(web.folder / "x.array_record", lines.read_bytes().splitlines())
    expected = read(lines, tokenizer, tmp_path / "here")
    for name in ("x.parquet", "x.array_record"):
        found = read(web.path(name), tokenizer, tmp_path / "there")
        assert found.documents.digest == expected.documents.digest
        assert found.sha256 == manifest.file_hash(web.folder / name)
    monkeypatch.setattr(prepared, "PART_BYTES", lines.stat().st_size // 3)
    web.served.clear()
    found = read(web.path("x.jsonl"), tokenizer, tmp_path / "there")
    assert (found.sha256, len(list(found.folder.glob("*.safetensors")))) == (expected.sha256, 3)
    assert [d.id for d in found.documents] == [d.id for d in expected.documents]
    starts = {int(range_.removeprefix("bytes=").split("-")[0]) for _, range_ in web.served}
    stretches = [stretch for stretch, _ in prepared.plan(web.path("x.jsonl"), tokenizer, tmp_path / "there")[0]]
    assert {stretch.start for stretch in stretches} <= starts, "each process asks for its own range"


def test_a_remote_file_is_read_again_only_if_it_changed(tmp_path: Path, web: Web, tokenizer: object):
    tiny.write_examples(web.folder / "x.jsonl", 9)
    url, cache = web.path("x.jsonl"), tmp_path / "cache"
    first = read(url, tokenizer, cache)
    assert web.served
    web.served.clear()
    assert read(url, tokenizer, cache).documents.digest == first.documents.digest
    assert not web.served
    tiny.write_examples(web.folder / "x.jsonl", 12)
    assert len(read(url, tokenizer, cache).documents) == 12
    web.versions = False  # nothing tells it from another file of its size: it is read, and its tokens are there
    for _ in range(2):
        web.served.clear()
        assert len(read(url, tokenizer, cache).documents) == 12
        assert len(web.served) == 1


def test_rows_are_read_and_inputs_named_by_url(tmp_path: Path):
    url = Path("memory://rows/problems.jsonl")
    problem = Problem(id="p", problem="2 + 2?", answer="4")
    content = (records.to_json(problem) + "\n").encode()
    memory = fsspec.filesystem("memory")
    memory.pipe("/rows/problems.jsonl", content)
    assert list(records.read_jsonl(url, Problem)) == [problem]
    manifest.write_manifest(tmp_path, "curate", [url], {})
    inputs = json.loads((tmp_path / "manifest.json").read_text())["inputs"]
    assert inputs == {"memory://rows/problems.jsonl": f"sha256:{hashlib.sha256(content).hexdigest()}"}
    memory.pipe("/rows/problems.jsonl", content + b"[]\n")
    with pytest.raises(UserError, match=r"memory://rows/problems\.jsonl:2: found a JSON list"):
        list(records.read_jsonl(url, Problem))


def test_what_cannot_be_read_is_said_once(tmp_path: Path, web: Web, tokenizer: object):
    with pytest.raises(UserError, match=r"http://127.*/none.jsonl: no such file \(404, .*\); expected"):
        read(web.path("none.jsonl"), tokenizer, tmp_path)
    with pytest.raises(UserError, match=r"nowhere://a/x.jsonl: Protocol not known: nowhere; expected a URL"):
        read(Path("nowhere://a/x.jsonl"), tokenizer, tmp_path)
    with pytest.raises(UserError, match=r"http://127.0.0.1:1/x.jsonl: no such file \(Cannot connect"):
        read(Path("http://127.0.0.1:1/x.jsonl"), tokenizer, tmp_path)
    with pytest.raises(UserError, match=r"memory://x.jsonl: its rows cannot be copied"):
        mix(MixConfig(examples=(Path("memory://x.jsonl"),), workdir=tmp_path))
