"""`warmfront serve`: its options, and what it says; the server is in coordinator/serve/."""

import ipaddress
import os
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from warmfront.coordinator.cli.options import chat_template_option, engine_options, sampling_options, split_options
from warmfront.coordinator.cli.prompt import read_template
from warmfront.coordinator.cli.terminal import Bars, say
from warmfront.coordinator.extras import require
from warmfront.shared.config import EngineConfig
from warmfront.shared.machine.process import hold_interrupts

__all__ = ["serve"]

_PACKAGES = {"starlette": "", "uvicorn": "", "pydantic": "", "llguidance": "", "prometheus-client": "prometheus_client"}

# Of a request that says nothing, as in OpenAI's API, unless --temperature does.
_TEMPERATURE = 1.0


@click.command()
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; 0.0.0.0 is all.")
@click.option("--port", type=click.IntRange(0, 65535), default=8080, show_default=True, help="0: any that is free.")
@click.option(
    "--api-key",
    "api_keys",
    multiple=True,
    envvar="WARMFRONT_API_KEY",
    help="A key that clients need, or a file with a key a line; may be repeated. [env: WARMFRONT_API_KEY]",
)
@click.option("--cors", "origins", multiple=True, help="A web page's origin that may ask, or *; may be repeated.")
@click.option("--name", help="The model's name for clients.  [default: what -m says, without folders]")
@click.option("--parallel", type=click.IntRange(1, 64), default=1, show_default=True, help="Answers side by side.")
@click.option("--queue", type=click.IntRange(1), default=64, show_default=True, help="Requests that may wait.")
@click.option("-n", "--max-new-tokens", type=click.IntRange(1), help="Tokens of an answer, at most.")
@click.option("--timeout", type=click.FloatRange(1), default=600, show_default=True, help="Seconds of an answer.")
@click.option(
    "--client-timeout",
    type=click.FloatRange(1),
    default=30,
    show_default=True,
    help="Seconds that a client may take to send, or not take what it is sent.",
)
@click.option("--max-body", type=click.IntRange(1), default=8, show_default=True, help="Megabytes of a request.")
@click.option(
    "--drain", type=click.FloatRange(0), default=30, show_default=True, help="Seconds for answers at the end."
)
@chat_template_option
@engine_options
@sampling_options
def serve(**options: Any) -> None:
    """Serve a model over HTTP.

    OpenAI's API, a page at /, and metrics.
    """
    _serve(**options)


def _serve(
    *,
    host: str,
    port: int,
    api_keys: Sequence[str],
    origins: Sequence[str],
    name: str | None,
    parallel: int,
    queue: int,
    max_new_tokens: int | None,
    timeout: float,
    client_timeout: float,
    max_body: int,
    drain: float,
    chat_template: Path | None,
    **options: Any,
) -> None:
    """Raises UsageError for options that do not go together, else what `Engine.load` raises."""
    for package, module in _PACKAGES.items():
        require(package, "warmfront serve", module)
    model, overrides, sampling, stop = split_options(options)
    overrides["parallel"] = parallel
    EngineConfig(**overrides)
    template = read_template(chat_template)
    if click.get_current_context().get_parameter_source("temperature") is ParameterSource.DEFAULT:
        sampling = replace(sampling, temperature=_TEMPERATURE)

    with hold_interrupts():
        from warmfront.coordinator.cli.chat import use_template
        from warmfront.coordinator.engine.engine import Engine
        from warmfront.coordinator.serve.app import make_app
        from warmfront.coordinator.serve.run import bound, keys_of, serve
        from warmfront.coordinator.serve.service import Limits, Service

    keys = keys_of(api_keys)
    limits = Limits(
        body_bytes=max_body << 20, max_tokens=max_new_tokens, answer_s=timeout, client_s=client_timeout, queue=queue
    )
    service = Service(name or os.path.basename(model.rstrip("/")) or model, limits, sampling, stop)
    listener = bound(host, port)
    local = _is_loopback(listener.getsockname()[0])
    app = make_app(service, keys=keys, origins=origins, local=local)

    def prepare(engine: Engine) -> None:
        bars.close()
        use_template(engine, template)

    def ready() -> None:
        shown = f"[{host}]" if ":" in host else host
        say(f"serving {service.model} at http://{shown}:{listener.getsockname()[1]}")
        if not local and not keys:
            say("anyone who reaches this address can use it: pass --api-key, or leave --host out")

    with Bars() as bars:
        load = partial(Engine.load, model, **overrides, say=say, progress=bars.show)
        serve_until = partial(serve, service, app, listener, drain_s=drain, say=say)
        serve_until(load=load, prepare=prepare, ready=ready)


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback
