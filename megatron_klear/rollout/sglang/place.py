"""Where among the machines of a launch servers are, and what that makes their names and URLs."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetPlace:
    """Where among the machines of a launch a fleet is.

    Attributes:
        first_number: of its servers among all, for names of logs.
        address: of this machine, as the first rank reaches it.
        companions: processes beside this one with any of which the servers end.
    """

    first_number: int = 0
    address: str = "127.0.0.1"
    companions: tuple[int, ...] = ()

    def name(self, index: int) -> str:
        """Of server number `index` here, for messages."""
        return f"SGLang server {self.first_number + index}" + (f" on {self.address}" if self.first_number else "")

    def log_name(self, index: int) -> str:
        """Of the log of server number `index` here."""
        return f"engine_{self.first_number + index}.log"

    def url(self, host: str, port: int) -> str:
        """Where a server answers that listens on `host`, which may be all addresses."""
        reached = self.address if host in ("0.0.0.0", "::") else host
        return f"http://{f'[{reached}]' if ':' in reached else reached}:{port}"
