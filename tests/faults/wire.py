"""A TCP proxy on the loopback that harms what it carries, in a thread of its own."""

import asyncio
import threading
from contextlib import contextmanager

from wires import Proxy


class Wire(Proxy):
    """To be called from other threads. delay: seconds, rate: bytes a second, each way; spoil: flip one bit."""

    delay, rate, spoil = 0.0, None, False

    async def _harm(self, data):
        await asyncio.sleep(self.delay + (len(data) / self.rate if self.rate else 0))
        if self.spoil:
            self.spoil = False
            data = bytes([*data[:-1], data[-1] ^ 1])
        return data

    def call(self, what):
        """In the proxy's thread."""
        done = threading.Event()
        self.loop.call_soon_threadsafe(lambda: (what(), done.set()))
        assert done.wait(10)


@contextmanager
def wire(port):
    ready, made = threading.Event(), []

    async def go():
        async with Wire(port) as proxy:
            proxy.loop, proxy.over = asyncio.get_running_loop(), asyncio.Event()
            made.append(proxy)
            ready.set()
            await proxy.over.wait()
            proxy.clear.set()
            proxy.cut()
            rest = asyncio.all_tasks() - {asyncio.current_task()}
            for each in rest:
                each.cancel()
            await asyncio.gather(*rest, return_exceptions=True)

    thread = threading.Thread(target=asyncio.run, args=(go(),))
    thread.start()
    assert ready.wait(10)
    try:
        yield made[0]
    finally:
        made[0].call(made[0].over.set)
        thread.join()
