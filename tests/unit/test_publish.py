"""Uploads to the hub, against a server of our own: what is there afterwards, who may see it, and what is refused."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny
from hub_server import TOKEN, Hub, running_hub
from huggingface_hub import constants

from jaxdistill import cli
from jaxdistill.errors import RunError, UserError
from jaxdistill.publish import Upload, check, files_of, push

# Of huggingface_hub's own, where it uploads without hf_xet
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """The hub that huggingface_hub speaks to, as HF_ENDPOINT and HF_TOKEN would set it."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no token"))
    with running_hub() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        yield server


@pytest.fixture
def upload(tmp_path: Path) -> Upload:
    folder = tmp_path / "files"
    (folder / "data").mkdir(parents=True)
    (folder / ".cache").mkdir()
    (folder / "README.md").write_text("---\ntags: [x]\n---\n")
    (folder / "data" / "a.jsonl").write_text("{}\n")
    (folder / "w.safetensors").write_bytes(bytes(1000))
    for name in (".hidden", ".cache/x", "b.jsonl.partial"):
        (folder / name).write_text("not for others")
    return Upload(repo="me/mine", kind="dataset", files=files_of(folder))


def test_what_is_uploaded_is_listed_private_and_whole(hub: Hub, upload: Upload, capsys: pytest.CaptureFixture[str]):
    push(upload, public=False, dry_run=False)
    said = capsys.readouterr().err
    assert "uploading to dataset me/mine (private):" in said
    assert "1,021  bytes in 3 files" in said
    assert f"uploaded: {hub.url}" in said
    files = hub.files["dataset", "me/mine"]
    assert files == {name: path.read_bytes() for name, path in upload.files.items()}
    assert files.keys() == {"README.md", "data/a.jsonl", "w.safetensors"}
    assert hub.private["dataset", "me/mine"]
    push(upload, public=False, dry_run=False)  # again: the repository is there
    push(Upload(repo="me/open", kind="model", files=upload.files), public=True, dry_run=False)
    assert not hub.private["model", "me/open"]


def test_a_dry_run_lists_and_sends_nothing(hub: Hub, upload: Upload, capsys: pytest.CaptureFixture[str]):
    push(upload, public=True, dry_run=True)
    assert "would upload to dataset me/mine (everyone may see it):" in capsys.readouterr().err
    assert not hub.files


def test_what_everyone_would_see_is_not_uploaded_unasked(hub: Hub, upload: Upload):
    hub.files["dataset", "me/mine"], hub.private["dataset", "me/mine"] = {}, False
    with pytest.raises(UserError, match="everyone may see it; say --public"):
        push(upload, public=False, dry_run=False)
    assert not hub.files["dataset", "me/mine"]


def test_a_refused_token_a_missing_one_and_a_hub_that_is_gone(
    hub: Hub, upload: Upload, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("HF_TOKEN", "hf_another")
    with pytest.raises(UserError, match="refuses to let this token write") as refused:
        push(upload, public=False, dry_run=False)
    assert "hf_another" not in str(refused.value)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(UserError, match="there is no token"):
        check("me/mine", dry_run=False)
    check("me/mine", dry_run=True)
    with pytest.raises(UserError, match="expected OWNER/NAME"):
        check("mine", dry_run=True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(RunError, match="cannot be reached"):
        push(upload, public=False, dry_run=False)


def test_an_export_is_pushed_with_its_card(hub: Hub, tmp_path: Path):
    hf, c = tiny.hf_config("qwen3", vocab_size=512), tiny.config("qwen3", vocab_size=512)
    tiny.write_folder(tmp_path / "model", hf, tiny.values(c), c, with_tokenizer=True)
    out = tmp_path / "out"
    words = ["--model", str(tmp_path / "model"), "--workdir", str(out), "--no-verify", "--push-to-hub", "me/tiny"]
    cli.main(["export", *words])
    assert hub.files["model", "me/tiny"] == {name: path.read_bytes() for name, path in files_of(out).items()}
    assert "not verified" in hub.files["model", "me/tiny"]["README.md"].decode()
    assert hub.private["model", "me/tiny"]
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]
