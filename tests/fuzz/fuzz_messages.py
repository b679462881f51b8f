"""Fuzz the decoder: mutated messages give sections and decoders, or one clear error; never a crash, a hang or a flood.

    python -m tests.fuzz.fuzz_messages --count 1000000 --seed 0 --processes 2
    python -m tests.fuzz.fuzz_messages --only 123456          # one message again, with its traceback

Message i of a seed is the same everywhere, whatever the number of processes.
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from estimators.fidelity import decoder_of
from mdl.errors import MessageError, PluginError
from mdl.message import decode_message
from tests.fuzz.corpus import corpus as real_messages
from tests.fuzz.mutations import KINDS, STRATEGIES, Corpus

SECONDS = 1.0  # of processor time a message
MEMORY = 512 << 20  # bytes beyond what the program has before the first message
MOST_FAILURES = 10
UNKNOWN_KINDS_TRIED = 0.02  # looking up a plug-in that does not exist takes ten times as long as all else
OUTCOMES = ("decoded", "refused by the stream", "refused by a decoder", "unknown kind", "failed")
DECODED, REFUSED, REFUSED_BY_DECODER, UNKNOWN, FAILED = range(len(OUTCOMES))


class Hang(BaseException):
    """More processor time than a message may take."""


@dataclass
class Counts:
    """Messages by strategy and outcome."""

    table: list[list[int]] = field(default_factory=lambda: [[0] * len(OUTCOMES) for _ in STRATEGIES])

    @property
    def messages(self) -> int:
        return sum(map(sum, self.table))

    def add(self, other: Counts) -> None:
        self.table = [[a + b for a, b in zip(x, y, strict=True)] for x, y in zip(self.table, other.table, strict=True)]

    def lines(self) -> Iterator[str]:
        yield " " * 18 + "".join(f"{name:>22}" for name in OUTCOMES)
        for (strategy, _), row in zip(STRATEGIES, self.table, strict=True):
            yield f"{strategy.__name__:18}" + "".join(f"{n:22,}" for n in row)


def message(corpus: Corpus, seed: int, index: int) -> tuple[int, bytes]:
    """Strategy and bytes of message `index`."""
    rng = random.Random(f"{seed}/{index}")
    choice = rng.choices(range(len(STRATEGIES)), [weight for _, weight in STRATEGIES])[0]
    return choice, STRATEGIES[choice][0](corpus, rng)


def receive(data: bytes) -> int:
    """What a receiver does with bytes: sections, then a decoder for each. Returns the outcome."""
    try:
        sections = decode_message(data)
    except MessageError:
        return REFUSED
    outcome = DECODED
    for section in sections:
        known = section.kind in KINDS
        if section.kind == "special" or (not known and random.Random(data).random() > UNKNOWN_KINDS_TRIED):
            continue
        try:
            decoder_of(section)
        except MessageError:
            outcome = REFUSED_BY_DECODER
        except PluginError:
            if known:
                raise
            outcome = UNKNOWN
    return outcome


def _alarm(*_: Any) -> None:
    raise Hang(f"more than {SECONDS} s of processor time")


@contextmanager
def limits(memory: int | None) -> Iterator[None]:
    """An alarm at hand, and at most so many bytes of memory beyond what is in use now (where the system says)."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    in_use = Path("/proc/self/statm")
    if memory is not None and in_use.exists():
        limit = int(in_use.read_text().split()[0]) * resource.getpagesize() + memory
        resource.setrlimit(resource.RLIMIT_AS, (limit, before[1]))
    handler = signal.signal(signal.SIGPROF, _alarm)
    try:
        yield
    finally:
        signal.signal(signal.SIGPROF, handler)
        resource.setrlimit(resource.RLIMIT_AS, before)


def attempt(data: bytes) -> tuple[int, str]:
    """The outcome, and for a failure what it was."""
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        return receive(data), ""
    except BaseException as error:  # a panic of the coder's is no Exception either
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        return FAILED, f"{type(error).__name__}: {error}"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def run(seed: int, indices: range, report: Callable[[int, str], None], tick: Callable[[int, Counts], None]) -> Counts:
    """Fuzz some messages; `report` gets failures, `tick` the index at hand and the counts."""
    corpus, counts = Corpus.of(real_messages()), Counts()
    for sections in corpus.sections:  # everything that is imported on first use
        for section in sections:
            if section.kind != "special":
                decoder_of(section)
    for index in indices:
        tick(index, counts)
        strategy, data = message(corpus, seed, index)
        outcome, what = attempt(data)
        counts.table[strategy][outcome] += 1
        if outcome == FAILED:
            report(index, f"seed {seed}, message {index} ({STRATEGIES[strategy][0].__name__}): {what}\n  {data.hex()}")
    return counts


def _worker(seed: int, indices: range, place: int, progress: Any, results: Any) -> None:
    """One process; `progress` holds two integers a worker, the index at hand and the number of messages done."""

    def tick(index: int, counts: Counts) -> None:
        progress[2 * place] = index
        progress[2 * place + 1] += 1

    with limits(MEMORY):
        counts = run(seed, indices, lambda index, text: results.put(text), tick)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    results.put((counts, peak))


def fuzz(seed: int, count: int, processes: int) -> int:
    """Run workers, print progress and the counts. Returns the number of failures."""
    context = multiprocessing.get_context("spawn")
    progress, results = context.Array("q", 2 * processes, lock=False), context.Queue()
    workers = [
        context.Process(target=_worker, args=(seed, range(place, count, processes), place, progress, results))
        for place in range(processes)
    ]
    for worker in workers:
        worker.start()
    total, failures, peak, started, pending = Counts(), 0, 0, time.monotonic(), set(range(processes))
    while pending:
        _show(sum(progress[1::2]), count, time.monotonic() - started, failures)
        time.sleep(0.5)
        ended = {place for place in pending if not workers[place].is_alive()}
        while not results.empty():
            found = results.get()
            if isinstance(found, str):
                failures += 1
                print(f"\n{found}", flush=True)
                continue
            total.add(found[0])
            peak = max(peak, found[1])
        for place in ended:
            pending.discard(place)
            if workers[place].exitcode != 0:
                failures += 1
                print(f"\nworker died with {workers[place].exitcode} at seed {seed}, message {progress[2 * place]}")
        if failures >= MOST_FAILURES:
            for worker in workers:
                worker.terminate()
            break
    print()
    print("\n".join(total.lines()))
    seconds = time.monotonic() - started
    print(
        f"{total.messages:,} mutated messages in {seconds:.0f} s on {processes} processes (seed {seed}), peak memory "
        f"{peak / 1024:.0f} MiB a process: {failures} crashes, hangs or over-allocations"
    )
    return failures


def _show(done: int, count: int, seconds: float, failures: int) -> None:
    line = f"{done:,} of {count:,} messages, {done / max(seconds, 1e-9):.0f} a second, {failures} failures"
    if sys.stderr.isatty():
        print(f"\r{line}   ", end="", file=sys.stderr, flush=True)
    elif int(seconds) % 60 == 0:
        print(line, file=sys.stderr, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--count", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--only", type=int, help="decode message number ONLY of the seed again, without limits")
    options = parser.parse_args()
    if options.only is not None:
        strategy, data = message(Corpus.of(real_messages()), options.seed, options.only)
        print(STRATEGIES[strategy][0].__name__, data.hex())
        print(OUTCOMES[receive(data)])
        return 0
    return 1 if fuzz(options.seed, options.count, options.processes) else 0


if __name__ == "__main__":
    sys.exit(main())
