"""Files to the Hugging Face hub: private unless it is said otherwise, and never without a list of what goes there."""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from jaxdistill.errors import RunError, UserError
from jaxdistill.progress import say


@dataclasses.dataclass(frozen=True, kw_only=True)
class Upload:
    """Files for one repository."""

    repo: str  # OWNER/NAME
    kind: Literal["model", "dataset"]
    files: Mapping[str, Path]  # by their paths in the repository


def check(repo: str, dry_run: bool) -> None:
    """Refuses what could not be uploaded in the end, before anything is made for it.

    Raises:
      UserError: the name is none, or there is no token.
    """
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        raise UserError(f"push_to_hub is {repo!r}; expected OWNER/NAME, as the hub names a repository")
    if not dry_run:
        from huggingface_hub import get_token

        if get_token() is None:
            raise UserError("there is no token for the hub; set HF_TOKEN or run `hf auth login`, or ask for --dry-run")


def files_of(folder: Path) -> dict[str, Path]:
    """All files of a folder, but hidden and unfinished ones."""
    found = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.suffix != ".partial")
    names = {path.relative_to(folder).as_posix(): path for path in found}
    return {name: path for name, path in names.items() if not any(part.startswith(".") for part in name.split("/"))}


def push(upload: Upload, public: bool, dry_run: bool) -> None:
    """Says what is uploaded and where to, and uploads it as one commit.

    The token is the one that `huggingface_hub` finds, in HF_TOKEN or of `hf auth login`; it is never read here.

    Raises:
      UserError: the repository can be seen by everyone and that was not asked for, or the hub refuses the token.
      RunError: the hub cannot be reached or fails.
    """
    import httpx2
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

    sizes = {name: path.stat().st_size for name, path in upload.files.items()}
    seen = "everyone may see it" if public else "private"
    say(f"{'would upload' if dry_run else 'uploading'} to {upload.kind} {upload.repo} ({seen}):")
    for name, size in sizes.items():
        say(f"  {size:>15,}  {name}")
    say(f"  {sum(sizes.values()):>15,}  bytes in {len(sizes)} files")
    if dry_run:
        return
    api = HfApi(library_name="jaxdistill")
    place: dict[str, Any] = {"repo_id": upload.repo, "repo_type": upload.kind}
    try:
        api.create_repo(**place, private=not public, exist_ok=True)
        if not public and not api.repo_info(**place).private:
            raise UserError(
                f"{upload.kind} {upload.repo} is there, and everyone may see it; say --public, or take another name"
            )
        operations: list[Any] = [
            CommitOperationAdd(path_in_repo=name, path_or_fileobj=path) for name, path in upload.files.items()
        ]
        found = api.create_commit(**place, operations=operations, commit_message="Upload by jaxdistill")
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else None
        if status in (401, 403):
            raise UserError(
                f"the hub refuses to let this token write to {upload.kind} {upload.repo}: {error}"
            ) from None
        raise RunError(f"the hub fails: {error}; run the same command again") from None
    except (LocalTokenNotFoundError, OfflineModeIsEnabled) as error:
        raise UserError(f"nothing was uploaded: {error}") from None
    except RuntimeError as error:  # of the upload of one file
        raise RunError(f"{error} {error.__cause__ or ''}; run the same command again: what is there is kept") from None
    except httpx2.TransportError as error:
        raise RunError(f"the hub cannot be reached: {error}; run the same command again") from None
    say(f"uploaded: {found.commit_url}")
