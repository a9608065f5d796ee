"""`jaxdistill serve`: a model behind OpenAI's API, until SIGTERM or Ctrl-C; what was asked before is still answered."""

import dataclasses
import os
import resource
import signal
import socket
import sys
from pathlib import Path

import jax
import uvicorn

from jaxdistill.checkpoint import base_of, fingerprint
from jaxdistill.data import chat
from jaxdistill.errors import RunError, UserError
from jaxdistill.sample.engine import Engine, EngineConfig
from jaxdistill.sample.request import Request, SamplingConfig
from jaxdistill.sample.run import load_engine
from jaxdistill.serve import connection
from jaxdistill.serve.app import Server
from jaxdistill.serve.gate import Limits
from jaxdistill.serve.worker import Worker
from jaxdistill.sharding import MeshConfig

# Longer than clients keep an idle connection (httpx 5 s, aiohttp 15 s): a server that closes it first does so, now and
# then, just when the next call is on its way, and that call is lost.
_KEEP_ALIVE_S = 75


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """What is served, where, and to whom."""

    model: Path  # Hugging Face folder, or a phase folder of a training run
    name: str = ""  # what clients call the model; the folder's name by default
    host: str = "127.0.0.1"  # address to listen on; 0.0.0.0 lets other machines in
    port: int = 8000  # 0 takes a free one
    api_key_env: str = ""  # environment variable with the key that clients must send; empty lets everybody in
    positions: int | None = None  # longest prompt and output together, tokens; by default all the model was made for
    drain_s: int = 600  # seconds that calls have to finish after SIGTERM
    limits: Limits = Limits()
    engine: EngineConfig = EngineConfig()
    mesh: MeshConfig = MeshConfig()

    def __post_init__(self):
        if not 0 <= self.port < 2**16:
            raise UserError(f"port is {self.port}; expected 0 to {2**16 - 1}")
        if self.drain_s < 0:
            raise UserError(f"drain_s is {self.drain_s}; expected 0 or more")
        if self.positions is not None and self.positions < 2:
            raise UserError(f"positions is {self.positions}; expected 2 or more")


def main(config: ServeConfig) -> None:
    """Serves; prints the base URL once it listens.

    Raises:
      UserError: there is no key in the variable that was named, or the address cannot be had.
      RunError: the engine failed.
    """
    key = os.environ.get(config.api_key_env, "") if config.api_key_env else ""
    if config.api_key_env and not key:
        raise UserError(f"no key: set the environment variable {config.api_key_env} to what clients are to send")
    tokenizer = chat.load_tokenizer(base_of(config.model))
    with listen(config.host, config.port) as listener:
        mesh = config.mesh.build()
        with jax.set_mesh(mesh):
            engine = load_engine(config.model, tokenizer, config.positions, config.engine)
            warm_up(engine)
        worker = Worker(engine, mesh, room=engine.shape.slots + config.limits.queue)
        name = config.name or config.model.resolve().name
        server = Server(worker, tokenizer, name, fingerprint(config.model), config.limits, key)
        host, port = listener.getsockname()[:2]
        print(f"http://{f'[{host}]' if ':' in host else host}:{port}/v1", flush=True)
        if not key and not config.host.startswith(("127.", "localhost", "::1")):
            print("warning: anybody who reaches this address is let in; see --api-key-env", file=sys.stderr)
        serve(server, listener, config.drain_s)


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens, before anything else takes time.

    Raises:
      UserError: the address is taken, or not this machine's.
    """
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise UserError(
            f"cannot listen on {host}, port {port} ({error.strerror}); give another --host or --port"
        ) from None


def warm_up(engine: Engine) -> None:
    """Compiles what a call with OpenAI's defaults needs; the other programs are compiled when first asked for."""
    sampling = SamplingConfig(temperature=1.0, max_new_tokens=min(2, engine.positions - 1))
    list(engine.generate([Request("warm-up", (0,), sampling)]))


def serve(server: Server, listener: socket.socket, drain_s: int) -> None:
    """Serves until a signal; then takes no more connections and finishes what is under way.

    Raises:
      RunError: the engine failed.
    """
    config = uvicorn.Config(
        server.app,
        http=connection.limited(server.limits.headers_s),
        log_level="warning",
        access_log=False,
        lifespan="on",
        ws="none",
        timeout_keep_alive=_KEEP_ALIVE_S,
        timeout_graceful_shutdown=drain_s,
    )
    http = uvicorn.Server(config)

    def stop() -> None:
        http.should_exit = True

    server.worker.failed = stop
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # a file a connection; 1,024 is a usual limit
    # uvicorn raises the signal that ended it once more, for whoever had a handler before: here nobody needs to know
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        http.run(sockets=[listener])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if error := server.worker.error:
        raise RunError(f"the engine failed: {type(error).__name__}: {error}") from error
