"""The network: a server and its sites, over one connection that each site opens.

`messages` is what they say, `transfer` how models travel, `hub` the server's side, `link` the site's, and
`backend` what a plan sees of it. Which certificates are good and what a site allows is decided elsewhere.
Needs the extra `deploy`.
"""

from coterie.core.errors import ConfigError

try:
    import grpc as _grpc  # noqa: F401
    import zstandard as _zstandard  # noqa: F401
except ImportError as _error:
    raise ConfigError(f"the network needs {_error.name}", "pip install 'coterie[deploy]'") from None

from coterie.backends.network.backend import NetworkBackend, Record
from coterie.backends.network.hub import Hub, Identity
from coterie.backends.network.link import Handler, Link, Refused
from coterie.backends.network.messages import BadMessage, Message, RunOpened, parse
from coterie.backends.network.server import Server

__all__ = [
    "BadMessage", "Handler", "Hub", "Identity", "Link", "Message", "NetworkBackend", "Record", "Refused",
    "RunOpened", "Server", "parse",
]  # fmt: skip
