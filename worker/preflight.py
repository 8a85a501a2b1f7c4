"""As a worker starts: that it can be reached, and that its contracts belong together."""

import asyncio
import logging
import socket

from contracts.client import AddressesError, Chain, ContractsError
from worker.config import split_address
from worker.errors import ConfigError

log = logging.getLogger("plumb.worker.preflight")


def listen(address: str, key: str) -> socket.socket:
    """Bound to host:port. key: its name in the configuration. Raises ConfigError."""
    host, port = split_address(address, key)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host.strip("[]"), port), family=family)
    except OSError as error:
        raise ConfigError(f"{key}: {address} cannot be listened on: is this worker running already? {error}") from error


async def check_chain(chain: Chain, account: str, poll_seconds: float) -> None:
    """Once the chain answers. Raises ConfigError."""
    while True:
        try:
            await asyncio.to_thread(chain.check_addresses)
            if not (await asyncio.to_thread(chain.workers.worker, account)).url:
                log.warning("%s is not registered on this chain: see `plumb worker register`", account)
            return
        except AddressesError as error:
            raise ConfigError(f"chain.addresses.{error}") from error
        except ContractsError as error:
            log.warning("chain: %s", error)
            await asyncio.sleep(poll_seconds)
