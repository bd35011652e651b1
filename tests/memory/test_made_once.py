"""One of a kind for each device, however many threads ask for it at once."""

import threading
import time

from rewriter.memory.made_once import made_once


def test_threads_that_ask_at_once_get_the_same_one_and_others_their_own():
    made, found, ready = [], [], threading.Barrier(4)

    @made_once
    def slow(device: str) -> object:
        made.append(device)
        time.sleep(0.02)
        return object()

    def ask(device: str) -> None:
        ready.wait()
        found.append((device, slow(device)))

    threads = [threading.Thread(target=ask, args=(device,)) for device in ("a", "a", "a", "b")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(made) == ["a", "b"] and len(set(found)) == 2
