"""Why two ends cannot talk when one encrypts and the other does not: gRPC itself only says "unavailable"."""

from __future__ import annotations

import socket
import ssl

PATIENCE = 2.0  # seconds
_NO_TLS = {"WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "PACKET_LENGTH_TOO_LONG"}


def mismatch(address: str, *, encrypted: bool) -> str:
    """What is wrong between a server and who comes to it, encrypted or not; "" when it is something else."""
    host, _, port = address.rpartition(":")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # it is only asked whether it is TLS
    context.set_alpn_protocols(["h2"])
    try:
        with socket.create_connection((host.strip("[]"), int(port)), PATIENCE) as raw:
            context.wrap_socket(raw).close()
        speaks = True
    except ssl.SSLEOFError:
        return ""
    except ssl.SSLError as error:
        speaks = error.reason not in _NO_TLS
    except OSError:
        return ""
    if encrypted and not speaks:
        return f"server {address} does not encrypt, as with --insecure; nothing is sent to it"
    if speaks and not encrypted:
        return f"server {address} asks for certificates; --insecure cannot connect to it"
    return ""
