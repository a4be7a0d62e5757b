"""The daemon as a process: its event loop, signals and control socket, from ready to the last line."""

from __future__ import annotations

import asyncio
import gc
import logging
import signal
from functools import partial

from tierblk.config import Config
from tierblk.control import ControlServer, group_id, report_end
from tierblk.daemon import Daemon
from tierblk.errors import CacheError
from tierblk.ready import Ready
from tierblk.scrape import MetricsServer

log = logging.getLogger(__name__)

_COLLECT_EACH = 10_000
"""Objects more than are dropped, after which the collector looks at the young ones."""


def settle_collector() -> None:
    """What is there when serving begins stays, so the collector need not walk it again; and a miss makes and
    drops hundreds of objects without cycles, so it need not look that often. A tenth of a miss's CPU."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(_COLLECT_EACH, 20, 20)


async def _serve(config: Config, ready: Ready) -> None:
    gid = group_id(config.daemon.group)  # before anything is made
    daemon = Daemon(config)
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGINT, daemon.request_stop)
    loop.add_signal_handler(signal.SIGTERM, partial(daemon.request_stop, hand_over=True))
    control: ControlServer | None = None
    metrics: MetricsServer | None = None
    try:
        await daemon.start()
        control = ControlServer(daemon, daemon.run_dir, gid)
        await control.start()
        if (address := config.daemon.metrics) is not None:
            metrics = MetricsServer(control.scraper, address, daemon.warnings)
            await metrics.start()
        settle_collector()
        ready.serves(control.socket_path)
        await daemon.wait()
    except BaseException:
        # Only a stop that somebody asked for takes devices away. Those that were taken over have their users,
        # who had better wait for a daemon that can serve them than get errors.
        daemon.request_stop(hand_over=True)
        raise
    finally:
        if metrics is not None:
            await metrics.close()
        await _end(daemon, control)


async def _end(daemon: Daemon, control: ControlServer | None) -> None:
    if control is not None:
        control.withdraw()
        await daemon.end_calls()  # else the socket's end would wait for who waits for the network
        await control.close()
    try:
        await daemon.stop()
    except CacheError as error:
        # All is down, and the next start sorts it out. It is no reason for a keeper or a service manager to
        # start again what somebody stopped, so it shall not be the exit code.
        log.error("the cache did not end clean: %s", error)
        report_end(daemon.run_dir, error)


def main(config: Config, ready: Ready) -> int:
    """Serves the config's cache directory until SIGTERM (devices wait for the next daemon), SIGINT or a
    request (devices are taken away); returns the exit code: 0, also when the cache could not end clean.

    ready: is told when it serves. Raises TierblkError when it cannot; devices that it had taken
    over wait on."""
    asyncio.run(_serve(config, ready))
    return 0
