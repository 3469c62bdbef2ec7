"""What the machine can do without the protocol: the same durable steps alone, and a bare gRPC stream.

python benchmarks/network/floor.py steps SITES BYTES FOLDER         bytes a second
python benchmarks/network/floor.py stream SITES BYTES HOME SITE     bytes a second; folders of the keys
python benchmarks/network/floor.py sink HOME                        the other end; says its port
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import torch

from coterie import security
from coterie.backends.network import operators
from coterie.backends.network.server import options
from coterie.backends.network.transfer import CHUNK
from coterie.core import exact
from coterie.storage.files import sync_folder

METHOD = "/floor/Put"


def steps(sites: int, size: int, folder: Path) -> float:
    """Each update out of memory: SHA-256, a durable file of that name, and an exact addition.

    One after the other, and by as many threads as there are cores; the better of the two counts.
    """
    updates = [bytearray(size // 4 * 4) for _ in range(min(sites, 8))]  # more would not fit every memory
    leaves = [torch.frombuffer(update, dtype=torch.float32) for update in updates]
    for number, leaf in enumerate(leaves):
        leaf.fill_(number + 1)

    def kept(number: int) -> int:
        data = memoryview(updates[number % len(updates)])
        digest = hashlib.sha256(data).hexdigest()
        arriving = folder / f"new-{number}"
        with arriving.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        arriving.replace(folder / f"{digest}-{number}")
        sync_folder(folder)
        return number

    torch.set_num_threads(1)
    best = 0.0
    for threads in sorted({1, len(os.sched_getaffinity(0))}):
        acc, began = None, time.perf_counter()
        with ThreadPoolExecutor(threads) as pool:
            keeping = map if threads == 1 else pool.map
            for number in keeping(kept, range(sites)):
                acc = exact.add(acc, {"delta": leaves[number % len(leaves)]}, 1.0)
        best = max(best, sites * size / (time.perf_counter() - began))
        for path in folder.iterdir():
            path.unlink()
    return best


async def sink(home: Path) -> None:
    """Take frames and forget them."""
    mine = security.credentials(home)

    async def put(_: Any, context: Any) -> None:
        while await context.read() is not grpc.aio.EOF:
            pass
        await context.write(b"here")

    server = grpc.aio.server(options=options(120, server=True))
    methods = {"Put": grpc.stream_stream_rpc_method_handler(put)}
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("floor", methods)])
    ours = grpc.ssl_server_credentials([(mine.key, mine.certificate)], mine.ca, require_client_auth=True)
    port = server.add_secure_port("127.0.0.1:0", ours)
    await server.start()
    print(port, flush=True)
    await asyncio.to_thread(sys.stdin.buffer.read)
    await server.stop(None)


async def stream(sites: int, size: int, home: Path, site: Path) -> float:
    """One connection for each site; all of them send at once."""
    command = [sys.executable, __file__, "sink", str(home)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        port = int(process.stdout.readline())
        data = os.urandom(CHUNK)
        theirs = operators.credentials(security.credentials(site))
        channels = [grpc.aio.secure_channel(f"127.0.0.1:{port}", theirs, options(120)) for _ in range(sites)]
        async with asyncio.timeout(60):
            await asyncio.gather(*(channel.channel_ready() for channel in channels))

        async def frames() -> AsyncIterator[bytes]:
            for start in range(0, size, CHUNK):
                yield data[: size - start]

        async def send(channel: grpc.aio.Channel) -> None:
            async for _ in channel.stream_stream(METHOD)(frames()):
                pass

        began = time.perf_counter()
        await asyncio.gather(*map(send, channels))
        seconds = time.perf_counter() - began
        await asyncio.gather(*(channel.close() for channel in channels))
        return sites * size / seconds
    finally:
        process.stdin.close()
        process.wait(30)


if __name__ == "__main__":
    what, *rest = sys.argv[1:]
    if what == "sink":
        asyncio.run(sink(Path(rest[0])))
    else:
        sites, size, folders = int(rest[0]), int(rest[1]), map(Path, rest[2:])
        rate = steps(sites, size, *folders) if what == "steps" else asyncio.run(stream(sites, size, *folders))
        print(rate)
