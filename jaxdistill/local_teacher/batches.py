"""The teacher's files and batches: what was uploaded, and answers that come all at once, some of them too late."""

import dataclasses
import email
import email.policy
import itertools
import json
import random
import time
from collections.abc import Callable
from typing import Any

from jaxdistill.local_teacher.answers import BadRequest

ENDPOINTS = ("/v1/chat/completions", "/v1/responses")
LARGEST = 50_000  # lines of a batch
LARGEST_BYTES = 200_000_000  # of its file

# Answers one line of a batch: endpoint, body -> status and content.
Answering = Callable[[str, dict[str, Any]], tuple[int, dict[str, Any]]]


@dataclasses.dataclass
class Batch:
    """One batch; its answers are made when they are first asked for after `ready`."""

    name: str
    endpoint: str
    file: str
    metadata: dict[str, str]
    created: float
    ready: float
    output: str | None = None
    errors: str | None = None
    counts: tuple[int, int, int] = (0, 0, 0)  # all, answered, failed
    expired: bool = False


class Batches:
    """All files and batches of a server, in memory."""

    def __init__(self, answering: Answering, duration_s: float, expired: float, seed: int):
        self._answering, self._duration_s, self._expired = answering, duration_s, expired
        self._rng = random.Random(f"{seed}/batches")
        self.files: dict[str, bytes] = {}
        self.batches: dict[str, Batch] = {}
        self._numbers = itertools.count(1)

    def upload(self, content_type: str, body: bytes) -> dict[str, Any]:
        """POST /v1/files: a multipart form with `purpose` and `file`."""
        form = email.message_from_bytes(
            b"Content-Type: " + content_type.encode() + b"\r\n\r\n" + body, policy=email.policy.HTTP
        )
        parts = {part.get_param("name", header="content-disposition"): part for part in form.iter_parts()}
        if not {"purpose", "file"} <= parts.keys():
            raise BadRequest("The form has no purpose and file; expected both.", "file")
        content = parts["file"].get_payload(decode=True)
        assert isinstance(content, bytes)
        if len(content) > LARGEST_BYTES:
            raise BadRequest(f"The file is larger than {LARGEST_BYTES} bytes.", "file")
        return self._describe(self._keep(content))

    def _keep(self, content: bytes) -> str:
        name = f"file-{next(self._numbers)}"
        self.files[name] = content
        return name

    def _describe(self, name: str) -> dict[str, Any]:
        return {"id": name, "object": "file", "bytes": len(self.files[name]), "purpose": "batch"}

    def create(self, body: dict[str, Any]) -> dict[str, Any]:
        """POST /v1/batches."""
        if body.get("input_file_id") not in self.files:
            raise BadRequest("There is no such input file.", "input_file_id")
        if body.get("endpoint") not in ENDPOINTS:
            raise BadRequest(f"endpoint is {body.get('endpoint')!r:.80}; expected one of {ENDPOINTS}.", "endpoint")
        if len(self.files[body["input_file_id"]].splitlines()) > LARGEST:
            raise BadRequest(f"A batch holds at most {LARGEST} requests.", "input_file_id")
        now = time.time()
        name = f"batch_{next(self._numbers)}"
        metadata = body.get("metadata") or {}
        self.batches[name] = Batch(name, body["endpoint"], body["input_file_id"], metadata, now, now + self._duration_s)
        return self.show(name)

    def show(self, name: str) -> dict[str, Any]:
        """GET /v1/batches/{id}."""
        if name not in self.batches:
            raise BadRequest(f"There is no batch {name!r:.80}.", status=404)
        batch = self.batches[name]
        if time.time() >= batch.ready and batch.counts[0] == 0:
            self._answer(batch)
        done = "expired" if batch.expired else "completed"
        total, answered, failed = batch.counts
        return {
            "id": name,
            "object": "batch",
            "endpoint": batch.endpoint,
            "status": done if total else "in_progress",
            "input_file_id": batch.file,
            "output_file_id": batch.output,
            "error_file_id": batch.errors,
            "created_at": int(batch.created),
            "metadata": batch.metadata,
            "request_counts": {"total": total, "completed": answered, "failed": failed},
        }

    def listing(self, after: str | None, limit: int) -> dict[str, Any]:
        """GET /v1/batches: the newest first, a page at a time."""
        names = list(reversed(self.batches))
        start = names.index(after) + 1 if after in self.batches else 0
        page = names[start : start + limit]
        more = start + limit < len(names)
        return {"object": "list", "data": [self.show(name) for name in page], "has_more": more}

    def _answer(self, batch: Batch) -> None:
        """Answers every line that does not come too late; like OpenAI, in no particular order."""
        lines = [json.loads(line) for line in self.files[batch.file].splitlines() if line.strip()]
        self._rng.shuffle(lines)
        output, errors = [], []
        for number, line in enumerate(lines, start=1):
            row: dict[str, Any] = {"id": f"{batch.name}-{number}", "custom_id": line["custom_id"]}
            if self._rng.random() < self._expired:
                batch.expired = True
                late = {"code": "batch_expired", "message": "This request could not be executed in time."}
                errors.append({**row, "response": None, "error": late})
                continue
            if line.get("url") == batch.endpoint:
                status, content = self._answering(batch.endpoint, line["body"])
            else:
                words = f"The line is for {line.get('url')!r:.80}, the batch for {batch.endpoint}."
                status, content = 400, {"error": {"message": words, "type": "invalid_request_error", "code": None}}
            row["response"] = {"status_code": status, "request_id": row["id"], "body": content}
            (output if status == 200 else errors).append({**row, "error": None})
        batch.output = self._keep(_lines(output)) if output else None
        batch.errors = self._keep(_lines(errors)) if errors else None
        batch.counts = (len(lines), len(output), len(errors))


def _lines(rows: list[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)
