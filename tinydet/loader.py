"""Batches in a seeded order, prepared in background threads: the same bits for any number of threads, and after a resume.

Threads, not processes: Pillow and most of NumPy let go of Python's lock while they work, nothing is copied between processes, and
the function that prepares need not be pickled (examples/bench_loader.py has the figures).
"""
import collections
import itertools
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from tinydet import checks


class prefetch:
    """make(first), make(first + 1), ... make(last - 1), in this order, made ahead in background threads: an iterator.

    All that make draws at random must come from its argument: then the number of workers changes no bit of what comes out. It
    must run no parallel Numba op: the simplest of Numba's thread pools stands no two callers.
    last: None never ends. workers: threads; 0 makes each in the calling thread when it is asked for. ahead: how many, at most,
    are being made or wait at any time (default 2 * workers); memory is that of ahead + 1 results, the caller's one included.
    An exception in make(i) is raised in place of result i, and ends the iterator. Threads start at once and end with the last
    result, an exception (KeyboardInterrupt too), close(), the end of a `with` block, or when nobody holds the iterator any
    more; what is being made then is finished, and what waits is dropped. Any number of iterators may run side by side; one
    belongs to one thread, and to the process that made it (RuntimeError in a fork).
    """

    def __init__(self, make, first=0, last=None, workers=0, ahead=None):
        checks.whole("loader.prefetch", 0, first=first, workers=workers, **({} if last is None else {"last": last}))
        checks.whole("loader.prefetch", 1, **({} if ahead is None else {"ahead": ahead}))
        self._make, self._process, self._pool = make, os.getpid(), None
        self._steps = itertools.count(first) if last is None else iter(range(first, last))
        self._made = collections.deque()                            # futures, in order
        if workers:
            self._pool = ThreadPoolExecutor(workers, thread_name_prefix="tinydet-prefetch")
            for step in itertools.islice(self._steps, ahead or 2 * workers):
                self._made.append(self._pool.submit(make, step))

    def __iter__(self):
        return self

    def __next__(self):
        if self._process != os.getpid() and self._pool:
            raise RuntimeError(f"loader.prefetch: an iterator must stay in the process that made it ({self._process}), "
                               f"got {os.getpid()}")
        try:
            if not self._pool:
                return self._make(next(self._steps))
            if not self._made:
                raise StopIteration
            result = self._made[0].result()
            self._made.popleft()
            for step in itertools.islice(self._steps, 1):
                self._made.append(self._pool.submit(self._make, step))
            if not self._made:
                self.close()
            return result
        except BaseException:
            self.close()
            raise

    def close(self, wait=True):
        """End the iterator and its threads; wait: return when they have ended. May be called again."""
        self._steps = iter(())
        self._made.clear()
        if self._pool and self._process == os.getpid():             # a fork has no threads of its own to end
            self._pool.shutdown(wait=wait, cancel_futures=True)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def __del__(self):
        if hasattr(self, "_made"):
            self.close(wait=False)                                  # whichever thread collects garbage must not wait for itself


class Loader:
    """Batches of prepared examples, a step at a time: `for batch in loader.steps(first, last)`.

    Every epoch is a permutation of all examples, from (seed, epoch). The epochs follow each other as one endless row, of which
    step i takes places i * batch .. (i + 1) * batch - 1: each example occurs once an epoch, no tail is dropped, and a batch may
    end one epoch and begin the next (CHOICE). Hence step i is the same whichever step came first, and one may resume anywhere.

    prepare(example, rng): one sample, any object; rng is np.random.default_rng([seed, step, position in the batch, 2]), so a sample
    depends on nothing else (SeedSequence fills up with zeros: without the 2, position 0 would draw what [seed, step] draws).
    It runs in several threads at once and must not change what they share (example.image() is made for that).
    collate: makes the batch from the list of samples, in the background too. workers, ahead: as in prefetch.
    Raises ValueError naming step and example if one cannot be read or prepared; RuntimeError for other exceptions in prepare.
    """

    def __init__(self, examples, batch, prepare, seed=0, workers=0, ahead=None, collate=list):
        checks.whole("loader.Loader", 1, batch=batch, **({} if ahead is None else {"ahead": ahead}))
        checks.whole("loader.Loader", 0, seed=seed, workers=workers)
        if not len(examples):
            raise ValueError("loader.Loader: examples must hold at least one, got none")
        self.examples, self.batch, self.prepare, self.seed = examples, batch, prepare, seed
        self.workers, self.ahead, self.collate = workers, ahead, collate

    def steps(self, first=0, last=None):
        """The batches of steps first .. last - 1 (None: no end) as a prefetch."""
        return prefetch(self.make, first, last, self.workers, self.ahead)

    def __iter__(self):
        return self.steps()

    def indices(self, step):
        """(batch,) int64: which examples step holds."""
        epoch, place = np.divmod(np.arange(step * self.batch, (step + 1) * self.batch), len(self.examples))
        return np.concatenate([self._order(e)[place[epoch == e]] for e in range(epoch[0], epoch[-1] + 1)])

    def _order(self, epoch):
        return np.random.default_rng([self.seed, epoch, 0, 1]).permutation(len(self.examples))

    def make(self, step):
        """The batch of one step, made here and now."""
        return self.collate([self._sample(step, position, index) for position, index in enumerate(self.indices(step))])

    def _sample(self, step, position, index):
        example = self.examples[index]
        try:
            return self.prepare(example, np.random.default_rng([self.seed, step, position, 2]))
        except Exception as error:
            kind = ValueError if isinstance(error, (ValueError, OSError)) else RuntimeError
            raise kind(f"loader.Loader: example {getattr(example, 'name', index)} of step {step} must be readable and prepared, got "
                       f"{type(error).__name__}: {error}") from error
