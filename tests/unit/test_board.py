"""The board: whoever waits for the next snapshot gets it, and nobody waits for one that is there."""

from __future__ import annotations

import threading
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from services.switching.events import Board, Snapshot

FOR_EVER = 60.0


@pytest.fixture
def board() -> Board:
    return Board()


def waiting(board: Board, pool: ThreadPoolExecutor, count: int) -> list[Future[Snapshot]]:
    """Threads in `wait_newer` for the snapshot after the current one."""
    begun = threading.Barrier(count + 1)
    version = board.current.version

    def wait() -> Snapshot:
        begun.wait(FOR_EVER)
        return board.wait_newer(version, FOR_EVER)

    futures = [pool.submit(wait) for _ in range(count)]
    begun.wait(FOR_EVER)
    return futures


def test_a_new_snapshot_reaches_all_who_wait(board: Board):
    with ThreadPoolExecutor() as pool:
        for _ in range(20):
            futures = waiting(board, pool, 4)
            published = board.publish()
            assert all(future.result(FOR_EVER) is published for future in futures)


def test_closing_ends_every_wait(board: Board):
    with ThreadPoolExecutor() as pool:
        futures = waiting(board, pool, 4)
        board.close()
        assert all(future.result(FOR_EVER) is board.current for future in futures)
    assert board.wait_newer(board.current.version, FOR_EVER) is board.current


def test_a_newer_snapshot_is_returned_at_once(board: Board):
    before = board.current.version
    board.touch()
    assert board.wait_newer(before, FOR_EVER).version == before + 1


def test_without_a_newer_snapshot_the_wait_ends_after_its_time(board: Board):
    assert board.wait_newer(board.current.version, 0.01) is board.current
