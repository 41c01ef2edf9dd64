"""Which broker the boards speak to: one given by URL, or one of our own, as `fieldvit monitor` starts it."""

from dataclasses import dataclass
from pathlib import Path

from host.errors import RecipeError
from host.monitor.broker import KINDS, BrokerAddress, parse_broker_url


@dataclass(frozen=True, slots=True, kw_only=True)
class BrokerChoice:
    """A broker's URL and the file with its password; what another process can be given, unlike an open TLS context."""

    url: str
    password_file: Path | None = None

    @classmethod
    def parse(cls, text: str, password_file: Path | None) -> "BrokerChoice | None":
        """Read HOST:PORT or a URL; None for a kind of broker that is to be started here.

        Raises:
            MonitorError: it is neither.
            RecipeError: there is a password for a broker that asks for none.
        """
        if text in KINDS:
            if password_file is not None:
                raise RecipeError(f"--broker-password-file {password_file}: is for a broker given by URL; name it")
            return None
        choice = cls(url=text if "://" in text else f"mqtt://{text}", password_file=password_file)
        choice.address()
        return choice

    def address(self) -> BrokerAddress:
        """Where it listens, and who we are there."""
        return parse_broker_url(self.url, password_file=self.password_file)
