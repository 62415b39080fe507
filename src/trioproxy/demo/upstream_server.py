"""The simulated upstream as a server of its own: `python -m trioproxy.demo.upstream_server`.

For trying the proxy, and anything else that talks to OpenAI's API, without a key. Knows no proxy.
"""

from __future__ import annotations

import signal

import click
import trio

from trioproxy.demo.upstream import UpstreamOptions, create_upstream, serve_upstream

DEFAULTS = UpstreamOptions()


@click.command()
@click.option("--bind", default="127.0.0.1:9000", show_default=True, metavar="HOST:PORT", help="Where to listen.")
@click.option(
    "--latency",
    default=DEFAULTS.time_to_first_token,
    show_default=True,
    metavar="SECONDS",
    help="Time to the first token.",
)
@click.option("--tokens", default=DEFAULTS.tokens, show_default=True, metavar="N", help="An answer's length.")
@click.option(
    "--tokens-per-second", default=DEFAULTS.tokens_per_second, show_default=True, metavar="N", help="Each one's speed."
)
@click.option("--slots", type=int, metavar="N", help="More requests than this at once get a 429.  [default: no limit]")
@click.option("--error-rate", default=DEFAULTS.error_rate, show_default=True, metavar="SHARE", help="Answered 500.")
def main(
    bind: str, latency: float, tokens: int, tokens_per_second: float, slots: int | None, error_rate: float
) -> None:
    """Answer like OpenAI's API, without a model, a key or the network, until Ctrl-C."""
    try:
        options = UpstreamOptions(
            time_to_first_token=latency,
            tokens=tokens,
            tokens_per_second=tokens_per_second,
            slots=slots,
            error_rate=error_rate,
        )
    except ValueError as impossible:
        raise click.UsageError(str(impossible)) from impossible
    try:
        trio.run(_run, bind, options)
    except* OSError as group:
        error: BaseException = group
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        raise click.ClickException(f"cannot listen on {bind}: {error}") from None


async def _run(bind: str, options: UpstreamOptions) -> None:
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async with trio.open_nursery() as nursery:
            base_url = await nursery.start(serve_upstream, create_upstream(options), bind)
            click.echo(f"A simulated upstream is at {base_url}, and any key will do. Ctrl-C ends it.")
            await anext(signals)
            nursery.cancel_scope.cancel()


if __name__ == "__main__":
    main()
