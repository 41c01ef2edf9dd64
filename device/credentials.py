"""What a board shows its broker: password, certificate, and whom it trusts. Read at the start, without a connection."""

from pathlib import Path
from typing import TYPE_CHECKING

from device.config import BrokerConfig
from device.contract.errors import ConfigError

if TYPE_CHECKING:
    import ssl


def check_credentials(config: BrokerConfig, base: Path) -> None:
    """ConfigError when a file that the configuration names is missing or wrong: a mistake to report at the start."""
    read_password(config, base)
    if config.ca_file is not None:
        tls_context(config, base)


def tls_context(config: BrokerConfig, base: Path) -> "ssl.SSLContext":
    """The broker must be one of `ca_file`'s, and have the name that we call it by; ConfigError as above."""
    import ssl  # here: a board that talks to a broker beside it needs none

    path, what = base / str(config.ca_file), "the broker's CA certificates cannot be read ({}); see broker.ca_file"
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_verify_locations(path)
        if config.cert_file is not None:
            path = base / config.cert_file
            what = "this board's certificate or key cannot be used ({}); see broker.cert_file and key_file"
            context.load_cert_chain(path, base / config.key_file if config.key_file else None, _no_passphrase)
    except (OSError, ValueError) as error:  # an SSLError is an OSError
        raise ConfigError(f"{path}: {what.format(error)}") from error
    return context


def read_password(config: BrokerConfig, base: Path) -> str | None:
    """The password's file content without its line end; ConfigError when it cannot be read."""
    if config.password_file is None:
        return None
    path = base / config.password_file
    try:
        return path.read_text(encoding="utf-8").rstrip("\r\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: the broker password cannot be read ({error}); see broker.password_file") from error


def _no_passphrase() -> str:
    raise ValueError("the key has a passphrase, which an agent that starts alone cannot give")
