"""What threads tell an event loop: all of it, in order, with few wake-ups."""

import asyncio
import threading

import pytest

from edgellm.inbox import Inbox


def told_by_a_thread(inbox, items):
    thread = threading.Thread(target=lambda: [inbox.put(item) for item in items])
    thread.start()
    return thread


def test_everything_comes_in_order_from_a_thread_that_does_not_wait():
    async def read():
        inbox = Inbox(pause=0.0001)
        thread = told_by_a_thread(inbox, range(20_000))
        found = [await asyncio.wait_for(inbox.get(), 10) for _ in range(20_000)]
        thread.join()
        return found, inbox.is_empty

    assert asyncio.run(read()) == (list(range(20_000)), True)


def test_the_first_item_wakes_at_once_and_those_in_the_pause_together():
    async def read():
        inbox, sizes = Inbox(pause=0.2), []
        for items in ("a", "bcd"):
            inbox.put(items[0])
            for item in items[1:]:
                inbox.put(item)
            found = await asyncio.wait_for(inbox.get(), 10)
            while not inbox.is_empty:
                found += await inbox.get()
            sizes.append(found)
        return sizes

    assert asyncio.run(read()) == ["a", "bcd"]


def test_only_an_urgent_item_wakes_without_a_pause():
    async def read():
        inbox = Inbox(pause=None)
        waiting = asyncio.ensure_future(inbox.get())
        await asyncio.sleep(0)
        inbox.put("a")
        await asyncio.sleep(0.05)
        was_asleep = not waiting.done()
        inbox.put("b", urgent=True)
        return was_asleep, await asyncio.wait_for(waiting, 10), await inbox.get()

    assert asyncio.run(read()) == (True, "a", "b")


def test_a_wait_that_is_cancelled_loses_nothing():
    async def read():
        inbox = Inbox()
        waiting = asyncio.ensure_future(inbox.get())
        await asyncio.sleep(0)
        waiting.cancel()
        inbox.put("a")
        return await asyncio.wait_for(inbox.get(), 10)

    assert asyncio.run(read()) == "a"


def test_nothing_goes_on_when_the_task_has_gone():
    async def left():
        inbox = Inbox(pause=0.001)
        inbox.put("a")
        await asyncio.sleep(0.05)
        return inbox._is_awake, inbox.is_empty

    assert asyncio.run(left()) == (False, False)


def test_who_tells_hears_that_the_loop_is_closed():
    async def made():
        inbox = Inbox()
        inbox.put("a")
        return inbox

    inbox = asyncio.run(made())
    for _ in range(2):
        with pytest.raises(RuntimeError, match="closed"):
            inbox.put("b")
