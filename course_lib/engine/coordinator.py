"""Lock step without idling: when must replicas that share experts step, and when may all of them sleep?

Every forward pass of such a model needs every replica, so one that has nothing to do runs an empty pass as long as
any other has requests. The time between two sleeps is a *wave*, numbered from 0:

- A request for sleeping replicas starts the wave: the one that is given it begins, the coordinator wakes the others.
- While it runs, all count their passes, and every `AGREE_EVERY` passes they agree (one all-reduce) whether anybody
  has requests left. If not, all end the wave after the same pass, and the first one reports it.
- The coordinator learns of that end late. Until then it takes the replicas for awake, and a request that it sends
  then finds a sleeping one, alone: that request carries the number of a wave that is over, by which the replica knows
  that nobody has woken the others, and asks for it. And a call to wake up that comes late, when its wave is over, is
  known by its number too, and ignored: following it would start a pass that the others do not take part in.

No processes here, only the two sides' states: tests run them against every interleaving that a generator finds.

Invariants: in a wave all replicas execute equally many passes; the coordinator never is ahead of a replica.

vLLM: `DPEngineCoreProc` in `vllm/v1/engine/core.py` (`dp_sync_interval`), `vllm/v1/engine/coordinator.py`.
"""

from __future__ import annotations

AGREE_EVERY = 16  # forward passes: an all-reduce between processes costs a few per cent of a short one


class WaveMember:
    """The state of one replica: asleep, or `passes` forward passes into wave number `wave`."""

    def __init__(self, agree_every: int = AGREE_EVERY) -> None:
        self.running = False
        self.wave = 0
        self.passes = 0
        self._agree_every = agree_every

    def on_request(self, wave: int) -> bool:
        """A request has come that was sent in `wave`. Returns whether the coordinator must wake the others."""
        assert wave <= self.wave, f"a request of wave {wave} for a replica in wave {self.wave}"
        alone = not self.running and wave < self.wave
        self.running = True
        return alone

    def on_start(self, wave: int) -> None:
        """The coordinator calls to wave number `wave`."""
        assert wave <= self.wave, f"called to wave {wave} in wave {self.wave}"
        if wave == self.wave:
            self.running = True

    def after_pass(self) -> bool:
        """Count one forward pass. Returns whether all must now agree if anybody has requests left."""
        self.passes += 1
        return self.passes % self._agree_every == 0

    def agreed(self, anybody_unfinished: bool) -> bool:
        """Take in what all have agreed upon. Returns whether that was the end of the wave."""
        if anybody_unfinished:
            return False
        self.running = False
        self.wave += 1
        self.passes = 0
        return True


class WaveCoordinator:
    """The state of the front that sends the requests, as far as it has heard."""

    def __init__(self) -> None:
        self.running = False
        self.wave = 0

    def on_request(self) -> tuple[int, bool]:
        """A request is about to be sent. Returns its wave, and whether all others must be called to that wave."""
        wakes, self.running = not self.running, True
        return self.wave, wakes

    def on_complete(self, wave: int) -> None:
        """The first replica reports the end of `wave`."""
        if wave >= self.wave:  # a replica that was found asleep may have told us more already
            self.wave, self.running = wave + 1, False

    def on_alone(self, wave: int) -> bool:
        """A replica was found asleep and has begun `wave`. Returns whether all others must be called to it."""
        if wave < self.wave or (wave == self.wave and self.running):  # they were, on behalf of another request
            return False
        self.wave, self.running = wave, True
        return True
