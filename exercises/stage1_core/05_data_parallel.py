"""Lesson 05, Data parallel: its exercises, how answers are judged, which mistakes people make."""

from __future__ import annotations

import copy
import functools
import itertools
import random
import re
from collections import Counter
from collections.abc import Iterator

import torch

from course_lib.teaching.checking.exercise_file import Case, Choice, Exercise, Question
from course_lib.teaching.recording.balancing import last_end, spread
from course_lib.teaching.recording.waves import interleave

# ---- questions ----------------------------------------------------------------------------------

same_cores = Question(
    "05.a",
    "One engine with all cores of this machine, or two replicas with half of them each: the same model, the same "
    "prompts. How does the tokens per second of the pair compare?",
    [
        Choice(
            "about twice as many",
            "It would be, if each replica brought cores and a memory of its own. Here the pair has the very "
            "cores that the one engine had, and keeps twice the weights moving through the same memory.",
        ),
        Choice(
            "about the same",
            "The arithmetic is the same and so are the cores. What the pair saves (Python and the small steps that "
            "use one core only now overlap) it pays for by fetching the weights once per replica.",
            right=True,
        ),
        Choice(
            "less than half",
            "Weights are fetched twice as often, but by two processes at the same time; and where one engine "
            "leaves cores idle, in Python and in small operations, the pair does not.",
        ),
    ],
)

waiting = Question(
    "05.b",
    "Eight replicas with two seats each are kept 80 % busy. One answer in eight is long. Under round robin four in "
    "ten requests must wait for a seat. How many if each goes to the replica with the fewest requests?",
    [
        Choice(
            "as many",
            "Both rules give each replica about as many requests over a day. But at a given moment round robin sends "
            "some to a replica full of long answers while another one is empty.",
        ),
        Choice(
            "about a quarter",
            "Guess lower. A request waits only if no replica at all has a free seat, and with eight of them at 80 % "
            "there are three free seats on average.",
        ),
        Choice(
            "less than one in ten",
            "A request waits only if no replica at all has a free seat. At 80 % there are three free on average; the "
            "rule only has to find one, and the counts say where.",
            right=True,
        ),
    ],
)

idle_passes = Question(
    "05.c",
    "One request for 6 tokens goes to replica 0 of two that share experts. After every 16 passes they agree, in an "
    "all-reduce of one bit, whether anybody has work left. How many forward passes does replica 1 run, which has no "
    "request?",
    [
        Choice(
            "none",
            "Then replica 0 would wait in its first layer for the outputs of experts 2 and 3, and for ever: those are "
            "on replica 1 only.",
        ),
        Choice(
            "6",
            "It must be there for the 6 passes that make the tokens. But how would it know that there is no seventh? "
            "They ask each other only every 16 passes, since asking costs time.",
        ),
        Choice(
            "16",
            "It cannot know that replica 0 is done until both agree, and that is after 16 passes. The last 10 are empty "
            "on both.",
            right=True,
        ),
    ],
)

# ---- 05.1 cut the prompts -----------------------------------------------------------------------

cut = Exercise(
    "05.1",
    "A share for each rank",
    target=None,
    stars=1,
    minutes=6,
    importance="core",
    spec="Cut a list of prompts into one contiguous share per rank; nobody may have none.",
    hints=(
        "short, longer = divmod(len(prompts), size): the length that every share has at least, and how many shares "
        "have one more.",
        "The first `longer` ranks get one more. So rank r begins at r * short + min(r, longer), and ends where rank "
        "r + 1 begins.",
        "starts = [r * short + min(r, longer) for r in range(size + 1)]; then prompts[starts[r]:starts[r + 1]] or "
        '["Placeholder"] for each r.',
    ),
)


@cut.cases
def _(rng: random.Random) -> Iterator[Case]:
    def prompts(count):
        return [f"prompt {i}" for i in range(count)]

    yield Case("7 prompts, 3 ranks", prompts(7), 3)
    yield Case("8 prompts, 4 ranks", prompts(8), 4)
    yield Case("5 prompts, 4 ranks", prompts(5), 4)
    yield Case("2 prompts, 4 ranks", prompts(2), 4)
    yield Case("no prompts, 2 ranks", [], 2)
    yield Case("one rank", prompts(3), 1)
    yield Case("400 prompts, 7 ranks", prompts(400), 7)
    yield Case("at random", prompts(rng.randint(9, 60)), rng.randint(2, 9))


@cut.expected
def _(prompts, size):
    """Deal out how many each gets, one at a time; then take them from the front."""
    counts = Counter(i % size for i in range(len(prompts)))
    rest = iter(prompts)
    shares = [list(itertools.islice(rest, counts[rank])) for rank in range(size)]
    return [share if share else ["Placeholder"] for share in shares]


def _filled(shares):
    return [list(share) or ["Placeholder"] for share in shares]


@cut.symptom(
    "share-is-text",
    'A share is a list, also where it holds the placeholder alone: ["Placeholder"], not "Placeholder".',
)
def _(failure):
    return any(isinstance(share, str) for share in failure.got)


@cut.mistake("strided", "You deal the prompts out in turn. Cut the list: rank 0 gets the first ones, in order.")
def _(prompts, size):
    return _filled(prompts[rank::size] for rank in range(size))


@cut.mistake(
    "rest-lost",
    "Some prompts are in nobody's share. When the division leaves a remainder, that many shares are longer by one.",
)
def _(prompts, size):
    short = len(prompts) // size
    return _filled(prompts[rank * short : (rank + 1) * short] for rank in range(size))


@cut.mistake(
    "rest-to-the-last",
    "The last rank gets the whole remainder, up to size - 1 prompts more than the others, and everybody waits for it. "
    "Give one more to each of the first ranks.",
)
def _(prompts, size):
    short = len(prompts) // size
    return _filled(prompts[rank * short : None if rank == size - 1 else (rank + 1) * short] for rank in range(size))


@cut.mistake(
    "rounded-up",
    "You round the length of a share up, and the last ranks get what is left: with 7 prompts on 3 ranks that is 3, 3 and "
    "1. Lengths must differ by at most one: 3, 2, 2.",
)
def _(prompts, size):
    long = -(-len(prompts) // size)
    return _filled(prompts[rank * long : (rank + 1) * long] for rank in range(size))


@cut.symptom("longer-later", "The lengths are right, but the longer shares come first: 3, 2, 2 and not 2, 2, 3 or 2, 3, 2.")
def _(failure):
    got, expected = ([[one for one in share if one != "Placeholder"] for share in shares]
                     for shares in (failure.got, failure.expected))  # fmt: skip
    return got != expected and sum(got, []) == sum(expected, []) and sorted(map(len, got)) == sorted(map(len, expected))


@cut.wrong("longer-later")
def _(prompts, size):
    short, longer = divmod(len(prompts), size)
    starts = [rank * short + max(0, rank - (size - longer)) for rank in range(size + 1)]
    return _filled(prompts[a:b] for a, b in itertools.pairwise(starts))


@cut.wrong("longer-later")
def _(prompts, size):
    starts = [rank * len(prompts) // size for rank in range(size + 1)]
    return [prompts[a:b] for a, b in itertools.pairwise(starts)]


@cut.mistake(
    "placeholder-for-all", "Every share ends with a placeholder. Only a share that would be empty needs one."
)
def _(prompts, size):
    short, longer = divmod(len(prompts), size)
    starts = [rank * short + min(rank, longer) for rank in range(size + 1)]
    return [prompts[a:b] + ["Placeholder"] for a, b in itertools.pairwise(starts)]


@cut.mistake(
    "no-placeholder",
    'A rank without a prompt has an empty share. It would never run a pass: give it ["Placeholder"].',
)
def _(prompts, size):
    short, longer = divmod(len(prompts), size)
    starts = [rank * short + min(rank, longer) for rank in range(size + 1)]
    return [prompts[a:b] for a, b in itertools.pairwise(starts)]


@cut.wrong("share-is-text")
def _(prompts, size):
    short, longer = divmod(len(prompts), size)
    starts = [rank * short + min(rank, longer) for rank in range(size + 1)]
    return [prompts[a:b] or "Placeholder" for a, b in itertools.pairwise(starts)]


@cut.symptom(
    "number-of-shares",
    "There must be as many shares as ranks, also when prompts run out or the division leaves a remainder.",
)
def _(failure):
    return len(failure.got) != failure.args[1]


@cut.wrong("number-of-shares")
def _(prompts, size):
    step = max(1, len(prompts) // size)
    return [prompts[i : i + step] for i in range(0, len(prompts), step)]


@cut.wrong("number-of-shares")
def _(prompts, size):
    short, longer = divmod(len(prompts), size)
    starts = [rank * short + min(rank, longer) for rank in range(size + 1)]
    return [prompts[a:b] for a, b in itertools.pairwise(starts) if a < b]


@cut.accepts
def _(prompts, size):
    """Rank by rank, taking from the front of what is left."""
    shares, rest = [], list(prompts)
    for ranks_left in range(size, 0, -1):
        take = -(-len(rest) // ranks_left)
        shares.append(rest[:take] if take else ["Placeholder"])
        rest = rest[take:]
    return shares


@cut.look
def _(answer):
    shares = answer([f"prompt {i}" for i in range(400)], 3)
    print(f"400 prompts on 3 ranks: {', '.join(str(len(share)) for share in shares)}; "
          f"2 prompts on 3 ranks: {answer(['a', 'b'], 3)}")  # fmt: skip


# ---- 05.2 the least loaded ----------------------------------------------------------------------

choose = Exercise(
    "05.2",
    "The replica with the fewest",
    target="course_lib.engine.balancer:Balancer.assign",
    stars=2,
    minutes=8,
    importance="core",
    spec="Choose the replica with the fewest requests in flight; among equals, in turn.",
    hints=(
        "Two questions: what is the smallest load, and which of the replicas with that load comes first if you count "
        "from `turn` and start again at 0 after the last?",
        "How far is replica r from the one whose turn it is? (r - turn) % size. Dead replicas are no keys of `loads`, "
        "but they still count in `size`.",
        "min(loads, key=lambda r: (loads[r], (r - turn) % size))",
    ),
)


@choose.cases
def _(rng: random.Random) -> Iterator[Case]:
    yield Case("2 has fewest, 1's turn", {0: 3, 1: 2, 2: 0, 3: 2}, 1, 4)
    yield Case("1 and 2 are equal, 2's turn", {0: 2, 1: 1, 2: 1}, 2, 3)
    yield Case("1 and 2 are equal, 0's turn", {0: 2, 1: 1, 2: 1}, 0, 3)
    yield Case("all idle, 1's turn", {0: 0, 1: 0, 2: 0}, 1, 3)
    yield Case("0 and 1 are equal, 2's turn", {0: 1, 1: 1, 2: 4}, 2, 3)
    yield Case("replica 1 is dead, and it is its turn", {0: 1, 2: 1}, 1, 3)
    yield Case("replica 1 of four is dead, and it is its turn", {0: 1, 2: 1, 3: 1}, 1, 4)
    yield Case("only one is left", {3: 9}, 1, 4)
    yield Case("0 and 2 are dead", {1: 2, 3: 2}, 2, 4)
    for _ in range(8):
        size = rng.randint(2, 6)
        alive = sorted(rng.sample(range(size), rng.randint(1, size)))
        yield Case("at random", {r: rng.randint(0, 2) for r in alive}, rng.randrange(size), size)


@choose.expected
def _(loads, turn, size):
    """Walk around once, from whose turn it is."""
    least = sorted(loads.values())[0]
    for step in range(size):
        replica = turn + step if turn + step < size else turn + step - size
        if loads.get(replica) == least:
            return replica
    raise LookupError


@choose.mistake("load-not-replica", "That is the smallest load. Return the number of the replica that has it.")
def _(loads, turn, size):
    return min(loads.values())


@choose.mistake(
    "most-loaded", "You choose the replica with the most requests. `max` should be `min`: the fewest requests are wanted."
)
def _(loads, turn, size):
    return max(loads, key=lambda r: (loads[r], -((r - turn) % size)))


@choose.symptom(
    "dead-replica",
    "You choose a replica that is dead. Only those that are keys of `loads` are there: look for the smallest among them, "
    "not in range(size).",
)
def _(failure):
    bad_key = isinstance(failure.error, KeyError | IndexError)
    return bad_key or (isinstance(failure.got, int) and failure.got not in failure.args[0])


@choose.symptom(
    "round-robin",
    "You take whoever is next, whatever its load: that is round robin. The turn decides only among replicas that are "
    "equally loaded.",
)
def _(failure):
    loads, turn, size = failure.args
    next_one = min(loads, key=lambda r: (r - turn) % size)
    return failure.got == next_one and loads[next_one] > min(loads.values())


@choose.wrong("round-robin")
def _(loads, turn, size):
    return min(loads, key=lambda r: (r - turn) % size)


@choose.wrong("round-robin")
def _(loads, turn, size):
    while turn not in loads:  # for ever, if there is none after it
        turn += 1
    return turn


@choose.symptom(
    "counts-it-itself",
    "You count the request in `loads` yourself. The balancer does that with what you return: only look.",
)
def _(failure):
    return "loads" in failure.changed


@choose.wrong("counts-it-itself")
def _(loads, turn, size):
    best = min(loads, key=loads.get)
    loads[best] += 1
    return best


@choose.mistake(
    "first-of-equals",
    "Of equals you always take the one with the lowest number, so a burst to idle replicas begins at replica 0 each "
    "time. Count from `turn`: the distance of r is (r - turn) % size.",
)
def _(loads, turn, size):
    return min(loads, key=loads.get)


@choose.mistake("last-of-equals", "Of equals you take the one with the highest number. Count from `turn`.")
def _(loads, turn, size):
    return min(loads, key=lambda r: (loads[r], -r))


@choose.mistake(
    "no-way-round",
    "You take the equal that is nearest to `turn` in either direction. Turns go one way: after the last replica comes 0, "
    "and the one before `turn` is the last in line. (r - turn) % size is how long r must wait.",
)
def _(loads, turn, size):
    return min(loads, key=lambda r: (loads[r], abs(r - turn)))


@choose.mistake(
    "turn-or-the-first",
    "If the replica whose turn it is is not among the equals, you take the first of them. Go on counting from `turn`: next "
    "in line is the one that comes soonest after it.",
)
def _(loads, turn, size):
    return turn if loads.get(turn) == min(loads.values()) else min(loads, key=loads.get)


@choose.mistake(
    "after-the-turn",
    "You begin with the replica after `turn`. `turn` is the replica whose turn it is: it comes first among equals.",
)
def _(loads, turn, size):
    return min(loads, key=lambda r: (loads[r], (r - turn - 1) % size))


@choose.mistake(
    "size-of-the-living",
    "You count round the living, len(loads), but replicas keep their numbers when one dies: count round `size`.",
)
def _(loads, turn, size):
    return min(loads, key=lambda r: (loads[r], (r - turn) % len(loads)))


@choose.symptom(
    "another-equal",
    "That replica has as few requests as any, but another one that has as few comes first: count from `turn` upwards, "
    "and from 0 again after size - 1.",
)
def _(failure):
    loads = failure.args[0]
    return loads[failure.got] == min(loads.values())


@choose.wrong("another-equal")
def _(loads, turn, size):
    return min(loads, key=lambda r: (loads[r], (turn - r) % size))


@choose.wrong("dead-replica")
def _(loads, turn, size):
    return min(range(size), key=lambda r: (loads.get(r, 0), (r - turn) % size))


@choose.wrong("dead-replica")
def _(loads, turn, size):
    return min(range(size), key=lambda r: (loads[r], (r - turn) % size))


@choose.accepts
def _(loads, turn, size):
    least = min(loads.values())
    equals = sorted(replica for replica, load in loads.items() if load == least)
    return next((replica for replica in equals if replica >= turn), equals[0])


@choose.accepts
def _(loads, turn, size):
    order = [*range(turn, size), *range(turn)]
    return sorted((replica for replica in order if replica in loads), key=lambda replica: loads[replica])[0]


@choose.adapt
def _(answer, original):
    def assign(balancer):
        if balancer._policy != "least_loaded" or not balancer.loads:
            return original(balancer)
        chosen = answer(dict(balancer.loads), balancer._turn, balancer._size)
        balancer._turn = (chosen + 1) % balancer._size
        balancer.loads[chosen] += 1
        balancer.num_assigned[chosen] += 1
        return chosen

    return assign


@choose.look
def _(answer):
    from course_lib.teaching import patched
    from course_lib.teaching.recording.balancing import STREAMS

    jobs = STREAMS["long, short, long, short …"]
    with patched(choose, answer):
        end = last_end(spread(jobs, "least_loaded"))
    print(f"Long, short, long, short …, by your rule: {end} steps; by turns: {last_end(spread(jobs, 'round_robin'))}.")


# ---- 05.3 nothing twice, nothing lost -----------------------------------------------------------

front = Exercise(
    "05.3",
    "What the front must remember",
    target=None,
    stars=3,
    minutes=18,
    importance="core",
    spec="Keep of every unfinished request what another replica needs to go on when its own dies.",
    hints=(
        "For each unfinished request keep three things: who has it, all its tokens so far (prompt and what was told), and "
        "how many it may still write.",
        "`news` is the one place where tokens are told: add them to what you keep, take them off what is left, forget "
        "the request if that was its end. `died` then only has to look at who had what.",
        "news: entry = self.requests.get(name); if entry is None or entry.replica != replica: return []. died: for each "
        "entry of that replica, entry.replica = assign(); append (name, entry.replica, list(entry.tokens), entry.left).",
    ),
)


class _Front:
    """The solution with its joints exposed."""

    from_prompt = keeps_max = keeps_finished = moves_all = forgets_replica = one_replica = tells_strangers = False
    one_each = moved_last = drops_on_death = counts_prompt = any_replica = silent_when_finished = False
    callers_prompt = own_list = never_aborts = asks_for_all = False

    def __init__(self):
        self.requests = {}

    def send(self, name, replica, prompt, max_tokens):
        self.requests[name] = {
            "replica": replica, "prompt": list(prompt), "tokens": prompt if self.callers_prompt else list(prompt),
            "left": max_tokens, "most": max_tokens,
        }  # fmt: skip

    def abort(self, name):
        if not self.never_aborts:
            self.requests.pop(name, None)

    def news(self, name, replica, tokens, finished):
        entry = self.requests.get(name)
        if entry is None or (entry["replica"] != replica and not self.any_replica):
            return list(tokens) if self.tells_strangers else []
        entry["tokens"] += tokens
        entry["left"] -= 1 if self.one_each else len(tokens)
        if finished and not self.keeps_finished:
            del self.requests[name]
        return [] if finished and self.silent_when_finished else list(tokens)

    def died(self, replica, assign):
        moving, everywhere = [], None
        for name, entry in list(self.requests.items()):
            if entry["replica"] != replica and not self.moves_all:
                _ = assign() if self.asks_for_all else None
                continue
            if self.drops_on_death:
                continue
            to = everywhere if everywhere is not None and self.one_replica else assign()
            everywhere = to
            if not self.forgets_replica:
                entry["replica"] = to
            tokens = entry["prompt"] if self.from_prompt else entry["tokens"]
            left = entry["most"] if self.keeps_max else entry["left"]
            if self.counts_prompt:
                left = entry["most"] - len(entry["tokens"])
            moving.append((name, to, tokens if self.own_list else list(tokens), left))
            if self.moved_last:
                self.requests[name] = self.requests.pop(name)
        return moving


def _fronts(**joints):
    class Front(_Front):
        def __init__(self):
            super().__init__()
            vars(self).update(joints)

    return Front


def _story(rng: random.Random, num_requests: int, num_replicas: int, deaths: int, aborts: int = 0) -> list[tuple]:
    """What a front lives through: ("send", …), ("news", …), ("abort", name), ("died", replica, living in order)."""
    known, events = _Front(), []
    alive, names = list(range(num_replicas)), [chr(ord("a") + i) for i in range(num_requests)]
    ghosts: dict[str, int] = {}  # aborted, and its replica does not know yet
    turn = itertools.count()
    for name in names:
        event = (name, alive[next(turn) % len(alive)], [rng.randint(1, 9) for _ in range(rng.randint(1, 4))],
                 rng.randint(3, 7))  # fmt: skip
        known.send(*event)
        events.append(("send", *event))
    steps = 0
    while known.requests:
        steps += 1
        if deaths and steps > 2 and rng.random() < 0.25:
            deaths -= 1
            dead = rng.choice(alive)
            alive.remove(dead)
            ghosts = {name: replica for name, replica in ghosts.items() if replica != dead}
            order = [alive[(steps + i) % len(alive)] for i in range(num_requests)]
            known.died(dead, iter(order).__next__)
            events.append(("died", dead, order))
        if aborts and rng.random() < 0.3 and len(known.requests) > 1:
            aborts -= 1
            name = rng.choice(list(known.requests))
            ghosts[name] = known.requests[name]["replica"]
            known.abort(name)
            events.append(("abort", name))
        for name in rng.sample(names, 2 if num_requests > 1 else 1):
            entry = known.requests.get(name)
            if entry is not None:
                tokens = [rng.randint(10, 99) for _ in range(min(entry["left"], rng.choice((1, 1, 2))))]
                finished = len(tokens) == entry["left"] or rng.random() < 0.05
                event = (name, entry["replica"], tokens, finished)
                known.news(*event)
                events.append(("news", *event))
            elif name in ghosts:
                events.append(("news", name, ghosts.pop(name), [rng.randint(10, 99)], False))
    return events


_DIED_ONCE = [
    ("send", "a", 0, [5, 6], 4), ("send", "b", 1, [7], 3), ("news", "a", 0, [10], False), ("news", "b", 1, [20], False),
    ("news", "a", 0, [11], False), ("died", 0, [1, 1]), ("news", "a", 1, [12], False), ("news", "b", 1, [21], False),
    ("news", "a", 1, [13], True), ("news", "b", 1, [22], True),
]  # fmt: skip


@front.cases
def _(rng: random.Random) -> Iterator[Case]:
    def story(label, events):
        return Case(label, events, retold=["events"])

    yield story("nobody dies", [event for event in _DIED_ONCE if event[0] != "died" and event[1:3] != ("a", 1)])
    yield story("replica 0 dies with one of two requests", _DIED_ONCE)
    yield story("replica 0 dies after its request has ended",
               [("send", "a", 0, [5], 2), ("send", "b", 0, [6, 7], 5), ("news", "a", 0, [10], False),
                ("news", "b", 0, [20], False), ("news", "a", 0, [11], True), ("died", 0, [1, 2]),
                ("news", "b", 1, [21, 22], False), ("died", 1, [2, 2]), ("news", "b", 2, [23, 24], True)])  # fmt: skip
    yield story("three requests move to two replicas",
               [("send", "a", 0, [1], 3), ("send", "b", 0, [2], 3), ("send", "c", 0, [3], 3),
                ("news", "b", 0, [20], False), ("died", 0, [1, 2, 1])])  # fmt: skip
    yield story("two requests move, one stays",
               [("send", "a", 0, [1], 3), ("send", "b", 1, [2], 3), ("send", "c", 0, [3], 3),
                ("died", 0, [1, 2])])  # fmt: skip
    yield story("a reader leaves, and then replica 0 dies",
               [("send", "a", 0, [1], 3), ("send", "b", 1, [2], 3), ("abort", "a"), ("died", 0, [1, 1])])  # fmt: skip
    yield story("news of a request that was aborted",
               [("send", "a", 0, [1], 3), ("send", "b", 1, [2], 3), ("abort", "a"), ("news", "a", 0, [10], False),
                ("send", "a", 1, [4], 2), ("news", "a", 0, [11], True), ("news", "a", 1, [30], False)])  # fmt: skip
    yield story("a reader leaves whose answer has just ended",
               [("send", "a", 0, [1], 1), ("news", "a", 0, [10], True), ("abort", "a"), ("abort", "b")])  # fmt: skip
    for deaths in (1, 2, 2):
        yield story(f"{deaths} of four replicas die", _story(rng, 6, 4, deaths, aborts=1))


def _live(answer, events):
    """Each event as a call, and what a front says to it; with what it has changed that is not its own."""
    keeper, said, lent = answer(), [], []
    for event in events:
        kind, *values = copy.deepcopy(event)
        try:
            if kind == "died":
                moves = keeper.died(values[0], iter(values[1]).__next__)
                reply = _moves(moves)
                lent += [("a list that `died` had returned", one[2], list(one[2])) for one in moves or ()]
            else:
                reply = _plain(getattr(keeper, kind)(*values))
                lent += [("the caller's prompt", values[2], list(values[2]))] if kind == "send" else []
        except Exception as error:
            error.add_note(f"The call: {_call(event)}")
            raise
        grown = [f"; and {what} {was} is now {now}" for what, now, was in lent if now != was]
        said.append(_call(event) + (f" -> {reply}" if kind in ("news", "died") else "") + "".join(grown[:1]))
    return said


def _call(event):
    kind, *values = event
    if kind == "died":
        places = ", ".join(map(str, values[1]))
        return f"died({values[0]}, assign: {places})"
    return f"{kind}({', '.join(map(repr, values))})"


def _plain(reply):
    return list(reply) if isinstance(reply, list | tuple) else reply


def _moves(reply):
    return reply if reply is None else [(name, to, list(tokens), left) for name, to, tokens, left in reply]


@front.run
def _(answer, events):
    return _live(answer, events)


@front.expected
def _(events):
    """From the whole history at each moment, keeping nothing."""
    said = []
    for now, (kind, *values) in enumerate(events):
        if kind == "news":
            name, replica, tokens, _ = values
            said.append(f"{_call(events[now])} -> {tokens if _holder(events[:now], name) == replica else []}")
        elif kind == "died":
            dead, order = values
            places = iter(order)
            moves = []
            for name in _sent(events[:now]):
                if _holder(events[:now], name) == dead:
                    prompt, most, told = _text(events[:now], name)
                    moves.append((name, next(places), prompt + told, most - len(told)))
            said.append(f"{_call(events[now])} -> {moves}")
        else:
            said.append(_call(events[now]))
    return said


def _sent(events):
    """Names in the order in which they were last sent."""
    return list(dict.fromkeys(event[1] for event in reversed(events) if event[0] == "send"))[::-1]


def _holder(events, name):
    """The replica that has the request, or None."""
    holder = None
    for now, (kind, *values) in enumerate(events):
        if kind == "send" and values[0] == name:
            holder = values[1]
        elif kind == "abort" and values[0] == name:
            holder = None
        elif kind == "news" and values[0] == name and values[1] == holder and values[3]:
            holder = None
        elif kind == "died" and holder == values[0]:
            moved = [other for other in _sent(events[:now]) if _holder(events[:now], other) == values[0]]
            holder = values[1][moved.index(name)]
    return holder


def _text(events, name):
    """Prompt, most tokens, and what was told of the request that now has this name."""
    start = max(now for now, event in enumerate(events) if event[:2] == ("send", name))
    told = []
    for now in range(start, len(events)):
        kind, *values = events[now]
        if kind == "news" and values[0] == name and _holder(events[:now], name) == values[1]:
            told += values[2]
    return list(events[start][3]), events[start][4], told


@front.symptom(
    "unknown-request",
    "`news` may come of a request that you do not know any more: it was aborted, and its replica had not heard of it yet. "
    "There is nobody to tell: return [].",
)
def _(failure):
    return isinstance(failure.error, KeyError) and _during(failure, "news")


def _during(failure, kind):
    return any(note.startswith(f"The call: {kind}(") for note in failure.error.__notes__)


@front.symptom(
    "abort-of-the-unknown",
    "A reader may leave at the moment when the answer has ended and you have forgotten the request. `abort` of a name that "
    "you do not know does nothing.",
)
def _(failure):
    return isinstance(failure.error, KeyError) and _during(failure, "abort")


@front.wrong("abort-of-the-unknown")
class _(_Front):
    def abort(self, name):
        del self.requests[name]


@front.symptom(
    "callers-prompt",
    "What you keep is the caller's own list, and it grows with the news: the prompt is changed for whoever sent it. Keep a "
    "copy, list(prompt).",
)
def _(failure):
    return "the caller's prompt" in _first_difference(failure)[0]


@front.symptom(
    "own-list-handed-out",
    "`died` hands out the list that you go on adding to, so what it has returned changes later. Return a copy, list(…).",
)
def _(failure):
    return "`died` had returned" in _first_difference(failure)[0]


front.wrong("callers-prompt")(_fronts(callers_prompt=True))
front.wrong("callers-prompt")(_fronts(callers_prompt=True, own_list=True))
front.wrong("own-list-handed-out")(_fronts(own_list=True))


@front.symptom(
    "nothing-told", "`news` must return the tokens that the reader is to be told, a list, and `died` a list of tuples."
)
def _(failure):
    return any(" -> None" in line for line in failure.got)


@front.symptom(
    "shape-of-moves", "`died` returns a list of tuples of four: (name, new replica, tokens to start from, how many are left)."
)
def _(failure):
    return "unpack" in str(failure.error) or "not iterable" in str(failure.error)


@front.wrong("shape-of-moves")
class _(_Front):
    def died(self, replica, assign):
        return {name: (to, tokens, left) for name, to, tokens, left in super().died(replica, assign)}


@front.symptom(
    "asks-too-often",
    "You call assign() more often than there are requests to move. Ask once for each request of the dead replica; those "
    "of the living stay where they are.",
)
def _(failure):
    return isinstance(failure.error, StopIteration)


@front.wrong("asks-too-often")
class _(_Front):
    def died(self, replica, assign):
        for entry in self.requests.values():
            entry["next"] = assign()
        return super().died(replica, assign)


front.wrong("asks-too-often")(_fronts(asks_for_all=True))


def _front_mistake(name, message, **joints):
    front.mistake(name, message)(_fronts(**joints))


_front_mistake(
    "from-the-prompt",
    "After a death you send the prompt alone. The new replica would write the answer from its beginning, and the reader "
    "would be told the first tokens twice. Send prompt and what was told: it goes on after that.",
    from_prompt=True,
)
_front_mistake(
    "all-from-the-start",
    "After a death you send the prompt, with all of its tokens still to write: the reader is told the beginning twice. "
    "Keep what `news` brought: it belongs to the tokens to start from, and is no longer left to write.",
    from_prompt=True,
    keeps_max=True,
)
_front_mistake(
    "too-many-left",
    "You send all that was told, and the original max_tokens with it. The answer would become longer by what the dead "
    "replica had written: take the told tokens off.",
    keeps_max=True,
)
_front_mistake(
    "one-token-a-time",
    "You take one token off what is left for each news. News may bring several: take off len(tokens).",
    one_each=True,
)
_front_mistake(
    "moved-to-the-end",
    "A request that has moved is the last in your order from then on. The order is that in which they first came.",
    moved_last=True,
)
_front_mistake(
    "prompt-counted",
    "In what is left to write you take off the prompt too. max_tokens limits the answer alone.",
    counts_prompt=True,
)
_front_mistake(
    "finished-moves",
    "You move requests that had ended. Forget a request with its last news, or its answer goes on after its end.",
    keeps_finished=True,
)
_front_mistake(
    "moves-all",
    "You move the requests of all replicas. Only those of the dead one have lost their place; the others would then be "
    "served twice.",
    moves_all=True,
)
_front_mistake(
    "old-replica-kept",
    "You send a request to another replica and do not write down which. Its news then come from a stranger, and its next "
    "replica's death would lose it.",
    forgets_replica=True,
)
_front_mistake(
    "old-replica-kept-but-heard",
    "You do not write down where a request has moved. When its second replica dies as well, nobody moves it again.",
    forgets_replica=True,
    any_replica=True,
)
_front_mistake(
    "all-to-one",
    "You ask assign() once and send everything there: one replica gets the whole load of the dead one. Ask for each "
    "request.",
    one_replica=True,
)
_front_mistake(
    "lost", "The dead replica's requests go nowhere, and their readers wait for ever.", drops_on_death=True
)
_front_mistake(
    "any-replica",
    "You believe news from any replica. A name may be used again after an abort, and the old replica's last words on it "
    "come late: only the replica that has the request now counts.",
    any_replica=True,
)
_front_mistake(
    "tells-strangers",
    "You tell tokens of a request that was aborted, or of an older one of that name. Tell only what comes from the "
    "replica that has the request now.",
    tells_strangers=True,
)
_front_mistake(
    "abort-forgets-nothing",
    "You go on keeping a request whose reader has left, and move it when its replica dies. Forget it in `abort`.",
    never_aborts=True,
)
_front_mistake(
    "end-not-told",
    "The tokens that come with a request's end are not told. Forget the request, and return them all the same.",
    silent_when_finished=True,
)


def _first_difference(failure):
    return next((got, right) for got, right in zip(failure.got, failure.expected, strict=True) if got != right)


@front.symptom(
    "left-wrong",
    "You start from the right tokens, and the number left to write is wrong: max_tokens less all that was told, len(tokens) "
    "of them with each news.",
)
def _(failure):
    got, right = (re.sub(r", -?\d+\)", ")", line) for line in _first_difference(failure))
    return got == right and got.startswith("died")


@front.symptom(
    "not-moved-again",
    "A request that had moved is not moved again when its second replica dies. Write down which replica has it now.",
)
def _(failure):
    got, right = _first_difference(failure)
    deaths = [line for line in failure.expected[: failure.expected.index(right)] if line.startswith("died")]
    return right.startswith("died") and len(got) < len(right) and bool(deaths)


class _OffByAll(_Front):
    any_replica = True

    def news(self, name, replica, tokens, finished):
        told = super().news(name, replica, tokens, finished)
        if name in self.requests:
            self.requests[name]["left"] += len(tokens) - 1
        return told


front.wrong("left-wrong")(_OffByAll)


@front.wrong("not-moved-again")
class _(_OffByAll):
    forgets_replica = True

    def died(self, replica, assign):
        return super().died(replica, assign)


@front.wrong("unknown-request")
class _:
    def __init__(self):
        self.requests = {}

    def send(self, name, replica, prompt, max_tokens):
        self.requests[name] = [replica, list(prompt), max_tokens]

    def abort(self, name):
        del self.requests[name]

    def news(self, name, replica, tokens, finished):
        entry = self.requests[name]
        entry[1] += tokens
        entry[2] -= len(tokens)
        if finished:
            del self.requests[name]
        return tokens

    def died(self, replica, assign):
        moved = []
        for name, entry in self.requests.items():
            if entry[0] == replica:
                entry[0] = assign()
                moved.append((name, entry[0], list(entry[1]), entry[2]))
        return moved


@front.wrong("nothing-told")
class _(_Front):
    def news(self, name, replica, tokens, finished):
        super().news(name, replica, tokens, finished)


@front.accepts
class _:
    """With the answer apart from the prompt, and the requests by replica."""

    def __init__(self):
        self.of_replica, self.serial = {}, itertools.count()

    def send(self, name, replica, prompt, max_tokens):
        self.of_replica.setdefault(replica, {})[name] = (next(self.serial), prompt, [], max_tokens)

    def abort(self, name):
        for held in self.of_replica.values():
            held.pop(name, None)

    def news(self, name, replica, tokens, finished):
        held = self.of_replica.get(replica, {})
        if name not in held:
            return []
        held[name][2].extend(tokens)
        if finished:
            held.pop(name)
        return tokens

    def died(self, replica, assign):
        moved = []
        for name, entry in sorted(self.of_replica.pop(replica, {}).items(), key=lambda item: item[1][0]):
            to = assign()
            self.of_replica.setdefault(to, {})[name] = entry
            _, prompt, told, most = entry
            moved.append((name, to, prompt + told, most - len(told)))
        return moved


front.accepts(_fronts())


def _next_token(tokens: list[int]) -> int:
    """A model: what comes next follows from all that is there."""
    return (sum((i + 1) * token for i, token in enumerate(tokens)) * 31 + 7) % 997


@front.look
def _(answer):
    """Whole random runs: replicas that write, and die."""
    told = lost = twice = deaths = 0
    for seed in range(100):
        rng, keeper = random.Random(seed), answer()
        prompts = {name: [rng.randint(1, 9) for _ in range(3)] for name in "abcdefgh"}
        work, heard = {i: {} for i in range(4)}, {name: [] for name in prompts}
        for i, (name, prompt) in enumerate(prompts.items()):
            work[i % 4][name] = [list(prompt), 8]
            keeper.send(name, i % 4, list(prompt), 8)
        while any(work.values()):
            if len(work) > 1 and rng.random() < 0.06:
                dead = rng.choice(list(work))
                del work[dead]
                deaths += 1
                for name, to, tokens, left in keeper.died(dead, lambda: rng.choice(list(work))):
                    work[to][name] = [list(tokens), left]
            replica = rng.choice([i for i in work if work[i]] or list(work))
            for name, job in list(work[replica].items()):
                job[0].append(_next_token(job[0]))
                job[1] -= 1
                heard[name] += keeper.news(name, replica, [job[0][-1]], job[1] == 0)
                if job[1] == 0:
                    del work[replica][name]
        for name, prompt in prompts.items():
            right = list(prompt)
            for _ in range(8):
                right.append(_next_token(right))
            told += len(heard[name])
            lost += len(heard[name]) < 8
            twice += len(heard[name]) == 8 and heard[name] != right[3:]
    print(f"100 random runs, {deaths} replicas killed: {told:,} tokens told of 6,400, "
          f"{lost} answers incomplete, {twice} wrong.")  # fmt: skip


# ---- 05.4 what this rank's experts add ----------------------------------------------------------

experts = Exercise(
    "05.4",
    "What this rank's experts add",
    target="course_lib.layers.moe:MoE.contribution",
    stars=2,
    minutes=14,
    importance="core",
    spec="Route every token among all experts, compute with those that are here, and leave the rest to others.",
    hints=(
        "Routing is about all E experts, whoever holds them: choose with torch.topk over the whole row of logits. Only "
        "then ask which of the chosen ones are here.",
        "The weights are a softmax over the chosen logits alone, [T, top_k]. For the expert number e = held[i], the rows "
        "that chose it are (chosen == e).nonzero(): a token and a place among its top_k.",
        "best, chosen = logits.topk(top_k, -1); weights = best.softmax(-1); for i, e in enumerate(held): rows, places = "
        "(chosen == e).nonzero(as_tuple=True); out[rows] += weights[rows, places, None] * experts[i](tokens[rows])",
    ),
)


class _Expert:
    """hidden [n, N] -> [n, N]; counts its calls, and the rows given to it."""

    def __init__(self, matrix: torch.Tensor) -> None:
        self.matrix, self.calls, self.rows = matrix, 0, 0

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        self.rows += len(x) if x.dim() > 1 else 1
        return torch.tanh(x @ self.matrix)


@experts.cases
def _(rng: random.Random) -> Iterator[Case]:
    generator = torch.Generator().manual_seed(rng.randint(0, 10**6))

    def make(label, num_tokens, num_experts, held, top_k, width=4):
        def normal(*shape):
            return torch.randn(*shape, generator=generator)

        logits = torch.stack([torch.randperm(num_experts, generator=generator).float() for _ in range(num_tokens)]) \
            if num_tokens else torch.zeros(0, num_experts)  # fmt: skip
        # Clear of ties, and of different size in each row.
        logits = logits * 0.7 + 0.1 * torch.arange(num_tokens)[:, None]
        return Case(label, normal(num_tokens, width), logits, normal(len(held), width, width), held, top_k)

    yield make("6 tokens, 4 experts, this rank holds 0 and 1", 6, 4, range(0, 2), 2)
    yield make("6 tokens, 4 experts, this rank holds 2 and 3", 6, 4, range(2, 4), 2)
    yield make("one token, one of 8 experts here", 1, 8, range(5, 6), 3)
    yield make("top-1 of 4", 9, 4, range(1, 4), 1)
    yield make("all experts here", 7, 5, range(5), 2)
    yield make("no tokens at all", 0, 4, range(2, 4), 2)
    yield make("40 tokens, 16 experts, top-4", 40, 16, range(8, 12), 4, 6)


@experts.run
def _(answer, tokens, logits, matrices, held, top_k):
    return answer(tokens, logits, [_Expert(matrix) for matrix in matrices], held, top_k)


@experts.expected
def _(tokens, logits, matrices, held, top_k):
    """Token by token."""
    out = torch.zeros_like(tokens)
    for row, scores in enumerate(logits.tolist()):
        best = sorted(range(len(scores)), key=lambda expert: -scores[expert])[:top_k]
        total = sum(torch.tensor(scores[expert]).exp() for expert in best)
        for expert in best:
            if expert in held:
                weight = torch.tensor(scores[expert]).exp() / total
                out[row] += weight * torch.tanh(tokens[row] @ matrices[held.index(expert)])
    return out


def _contribution(tokens, logits, experts, held, top_k, *, scores="chosen", among="all", index="local", top=None, adds=True,
                  start="zeros", weigh="outputs"):
    """The solution with its joints exposed."""
    width = logits.shape[1]
    if among == "held":
        keep = torch.full((width,), float("-inf"))
        keep[list(held)] = 0
        best, chosen = (logits + keep).topk(min(top_k, len(held)), dim=-1)
    else:
        best, chosen = logits.topk(top or top_k, dim=-1)
    if scores == "all":
        weights = logits.softmax(-1).gather(1, chosen)
    elif scores == "held":
        here = (chosen >= held.start) & (chosen < held.stop)
        weights = best.masked_fill(~here, float("-inf")).softmax(-1).nan_to_num()
    elif scores == "ones":
        weights = torch.ones_like(best)
    elif scores == "mean":
        weights = torch.full_like(best, 1 / max(1, best.shape[1]))
    elif scores == "raw":
        weights = best
    elif scores == "tokens":
        weights = best.softmax(0)
    else:
        weights = best.softmax(-1)
    out = tokens.clone() if start == "tokens" else torch.zeros_like(tokens)
    for i, expert in enumerate(held):
        rows, places = (chosen == (i if index == "global" else expert)).nonzero(as_tuple=True)
        if len(rows):
            weight = weights[rows, places, None]
            part = experts[i](weight * tokens[rows]) if weigh == "inputs" else weight * experts[i](tokens[rows])
            out[rows] = out[rows] + part if adds else part
    return out


def _experts_mistake(name, message, **joints):
    experts.mistake(name, message)(functools.partial(_contribution, **joints))


@experts.symptom(
    "global-index",
    "`experts` has this rank's experts only: expert e is experts[e - held.start]. Indexing with e itself goes past the end "
    "as soon as the rank does not hold the first ones.",
)
def _(failure):
    return isinstance(failure.error, IndexError) and failure.args[3].start > 0


_experts_mistake(
    "not-renormalised",
    "Your weights are probabilities among all experts, so those of the chosen ones do not add up to 1. Take the softmax "
    "over the chosen logits alone (or divide by the sum of the chosen probabilities).",
    scores="all",
)
_experts_mistake(
    "chosen-among-own",
    "You choose the best of the experts that are here. Every rank would then find top_k of its own, and a token would go "
    "through top_k experts on each rank. Choose among all, then keep those that are here.",
    among="held",
)
_experts_mistake(
    "weights-among-own",
    "You choose among all experts, and then share the weight 1 among the chosen ones that are here. The ranks' sums would "
    "add up to more than 1: take the softmax over all chosen ones, before you look who holds them.",
    scores="held",
)
_experts_mistake("unweighted", "You add the experts' outputs as they are. Each is multiplied with its weight.", scores="ones")
_experts_mistake("mean", "You give all chosen experts the same weight. It is the softmax of their logits.", scores="mean")
_experts_mistake("logits-as-weights", "You multiply with the logits. The weights are their softmax.", scores="raw")
_experts_mistake("softmax-over-tokens", "Your softmax runs over the tokens, dim 0. A token's weights are a row: dim -1.",
                 scores="tokens")  # fmt: skip
_experts_mistake(
    "local-numbers",
    "You compare the chosen numbers with 0, 1, … of this rank. The router numbers all experts of the layer: the i-th here "
    "is held[i].",
    index="global",
)
_experts_mistake("overwrites", "Where two experts here serve the same token, the second replaces what the first has added: += and "
                 "not =.", adds=False)  # fmt: skip
_experts_mistake("starts-from-the-tokens", "You add to a copy of the tokens. Only what the experts here add is wanted, "
                 "or each rank would add the tokens once more: start from zeros.", start="tokens")  # fmt: skip
_experts_mistake("weighs-the-inputs", "You multiply the tokens with the weights before the expert, which is not linear. "
                 "Multiply its output.", weigh="inputs")  # fmt: skip
_experts_mistake("best-only", "Each token goes through its best expert alone. It has top_k of them.", top=1)


@experts.mistake(
    "all-experts", "Every token goes through every expert here. It goes through those of its top_k that are here."
)
def _(tokens, logits, experts, held, top_k):
    weights = logits.softmax(-1)
    return sum((weights[:, e, None] * experts[i](tokens) for i, e in enumerate(held)), torch.zeros_like(tokens))


@experts.wrong("global-index")
def _(tokens, logits, experts, held, top_k):
    best, chosen = logits.topk(top_k, -1)
    weights, out = best.softmax(-1), torch.zeros_like(tokens)
    for row in range(len(tokens)):
        for place in range(top_k):
            if chosen[row, place] in held:
                out[row] += weights[row, place] * experts[chosen[row, place]](tokens[row])
    return out


@experts.budget(
    "An expert here is called once for each token. Its weights are then read from memory each time: collect all tokens of "
    "an expert and call it once.",
    most=1,
    unit="calls of the same expert",
)
def _(answer):
    *_, case = experts.cases_function(random.Random(0))
    tokens, logits, matrices, held, top_k = case.args
    here = [_Expert(matrix) for matrix in matrices]
    answer(tokens, logits, here, held, top_k)
    return max(one.calls for one in here)


@experts.budget(
    "An expert is given rows that did not choose it, to be multiplied with 0: every token then goes through every expert, "
    "and the mixture costs as much as all of its weights. Give each expert only the rows that chose it.",
    most=2000,
    unit="rows that went through experts, of 1,000 tokens, top-2 of 64 experts",
)
def _(answer):
    generator = torch.Generator().manual_seed(0)
    here = [_Expert(torch.eye(4)) for _ in range(64)]
    answer(torch.randn(1000, 4, generator=generator), torch.randn(1000, 64, generator=generator), here, range(64), 2)
    return sum(one.rows for one in here)


@experts.wasteful
def _(tokens, logits, experts, held, top_k):
    best, chosen = logits.topk(top_k, -1)
    weights, out = best.softmax(-1), torch.zeros_like(tokens)
    for row in range(len(tokens)):
        for weight, expert in zip(weights[row], chosen[row].tolist()):
            if expert in held:
                out[row] += weight * experts[expert - held.start](tokens[row])
    return out


@experts.accepts
def _(tokens, logits, experts, held, top_k):
    """A dense matrix of weights with zeros, and only the rows that are not."""
    probabilities = logits.softmax(-1)
    chosen = probabilities.topk(top_k, -1).indices
    dense = torch.zeros_like(probabilities).scatter(1, chosen, probabilities.gather(1, chosen))
    dense = dense / dense.sum(-1, keepdim=True)
    out = torch.zeros_like(tokens)
    for expert, run in zip(held, experts):
        rows = dense[:, expert] > 0
        if rows.any():
            out[rows] = out[rows] + dense[rows, expert, None] * run(tokens[rows])
    return out


@experts.wasteful
def _(tokens, logits, experts, held, top_k):
    """Every held expert on every token, weighted with zeros where it was not chosen."""
    kth = logits.topk(top_k, -1).values[:, -1:]
    weights = logits.masked_fill(logits < kth, float("-inf")).softmax(-1)
    out = torch.zeros_like(tokens)
    for expert, run in zip(held, experts):
        out += weights[:, expert : expert + 1] * run(tokens)
    return out


@experts.adapt
def _(answer, original):
    def contribution(moe, tokens):
        if not moe.renormalize:
            return original(moe, tokens)
        here = moe.experts.share.experts
        calls = [functools.partial(moe.experts._expert, i) for i in range(len(here))]
        return answer(tokens, moe.router(tokens), calls, here, moe.top_k).to(tokens.dtype)

    return contribution


@experts.look
def _(answer):
    case = next(iter(experts.cases_function(random.Random(0))))
    tokens, logits, _, _, top_k = case.args
    matrices = torch.randn(4, 4, 4, generator=torch.Generator().manual_seed(0))
    whole = answer(tokens, logits, [_Expert(matrix) for matrix in matrices], range(4), top_k)
    parts = [
        answer(tokens, logits, [_Expert(matrix) for matrix in matrices[list(held)]], held, top_k)
        for held in (range(0, 2), range(2, 4))
    ]
    chosen = logits.topk(top_k, -1).indices
    print(f"6 tokens, top-2 of 4: {int((chosen < 2).sum())} assignments on rank 0, {int((chosen >= 2).sum())} on rank 1.")
    print(f"The two contributions add up to the whole layer's output: {torch.allclose(sum(parts), whole, atol=1e-5)}.")


# ---- 05.5 waves ---------------------------------------------------------------------------------

waves = Exercise(
    "05.5",
    "A member of the wave",
    target="course_lib.engine.coordinator:WaveMember",
    stars=4,
    minutes=25,
    importance="core",
    spec="Keep one rank in step with the others: awake together, asleep together, and never alone.",
    hints=(
        "Three numbers are all a member has: is it running, how many waves has it seen end, how many passes has it run. "
        "Write down for each of the four events what changes; compare `wave` of a message with your own.",
        "on_request: whatever the number says, somebody must serve it, so run. It is alone if it was asleep and the "
        "message is of a wave that is over: then nobody has woken the others for this one. on_start: only a call to the "
        "present wave counts.",
        "alone = not self.running and wave < self.wave; self.running = True; return alone. on_start: if wave == self.wave: "
        "self.running = True. after_pass: count; return self.passes % self.agree_every == 0. agreed: if not anybody: "
        "running = False, wave += 1, passes = 0.",
    ),
)


class _Member:
    """The solution with its joints exposed."""

    late_calls = deaf_calls = sleeps_on = takes_wave = always_asks = asks_awake = same_wave = False
    inverted = no_next_wave = stays_awake = next_each_time = False
    never_alone = alone_waits = tells_unfinished = counts_once = at_least = False
    early = 0
    always_agree = False

    def __init__(self, agree_every=16):
        self.running, self.wave, self.passes, self.agree_every = False, 0, 0, agree_every

    def on_request(self, wave):
        alone = not self.running and wave < self.wave
        if self.asks_awake:
            alone = wave < self.wave
        if self.always_asks:
            alone = not self.running
        if self.same_wave:
            alone = not self.running and wave == self.wave
        if self.takes_wave:
            self.wave = wave
        if not self.sleeps_on and not (alone and self.alone_waits):
            self.running = True
        return alone and not self.never_alone

    def on_start(self, wave):
        if self.deaf_calls:
            return
        if self.late_calls or wave == self.wave:
            self.running = True

    def after_pass(self):
        self.passes += 1
        if self.counts_once or self.at_least:
            return self.passes == self.agree_every or (self.at_least and self.passes > self.agree_every)
        return self.always_agree or (self.passes + self.early) % self.agree_every == 0

    def agreed(self, anybody_unfinished):
        if bool(anybody_unfinished) != self.inverted:
            self.wave += self.next_each_time
            return self.tells_unfinished
        self.running = self.stays_awake
        self.wave += not self.no_next_wave
        self.passes = 0
        return not self.tells_unfinished


def _members(**joints):
    class Member(_Member):
        def __init__(self, agree_every=16):
            super().__init__(agree_every)
            vars(self).update(joints)

    return Member


def _script(rng: random.Random, every: int, length: int) -> list[tuple]:
    """What may happen to a member, in an order that can occur."""
    member, events = _Member(every), []
    while len(events) < length:
        if member.running and rng.random() < 0.7:
            events.append(("after_pass",))
            if member.after_pass():
                events.append(("agreed", rng.random() < 0.5))
                member.agreed(events[-1][1])
            continue
        kind = rng.choice(("on_request", "on_start"))
        wave = rng.choice((member.wave, max(0, member.wave - 1)))
        events.append((kind, wave))
        getattr(member, kind)(wave)
    return events


@waves.cases
def _(rng: random.Random) -> Iterator[Case]:
    def story(label, every, events):
        return Case(label, every, events, retold=["events"])

    yield story("a request, four passes, the end", 4,
               [("on_request", 0), *[("after_pass",)] * 4, ("agreed", False)])  # fmt: skip
    yield story("somebody else has a request", 2,
               [("on_start", 0), ("after_pass",), ("after_pass",), ("agreed", True), ("after_pass",), ("after_pass",),
                ("agreed", False)])  # fmt: skip
    yield story("the call comes after the request", 1,
               [("on_request", 0), ("on_start", 0), ("after_pass",), ("agreed", False), ("on_request", 1)])  # fmt: skip
    yield story("a call that comes late, when its wave is over", 1,
               [("on_request", 0), ("after_pass",), ("agreed", False), ("on_start", 0), ("on_start", 1)])  # fmt: skip
    yield story("a request of a wave that is over finds a sleeper", 1,
               [("on_start", 0), ("after_pass",), ("agreed", False), ("on_request", 0), ("on_request", 0)])  # fmt: skip
    yield story("a request of an old wave, while awake", 1,
               [("on_start", 0), ("after_pass",), ("agreed", False), ("on_start", 1), ("on_request", 0)])  # fmt: skip
    for every in (2, 3):
        yield story("at random", every, _script(rng, every, 25))
    yield Case("200 random interleavings of 2 to 4 ranks", 0, [], retold=["agree_every", "events"])


@waves.run
def _(answer, every, events):
    if every == 0:
        for seed in range(200):
            outcome = interleave(answer, seed)
            if outcome.problem is not None:
                return f"run {seed}: {outcome.problem}"
        return "every request served, all ranks asleep, passes equal"
    member, told = answer(every), []
    for kind, *values in events:
        call = f"{kind}({', '.join(map(str, values))})"
        try:
            reply = getattr(member, kind)(*values)
        except Exception as error:
            error.add_note(f"The call: {call}")
            raise
        said = "" if kind == "on_start" else f" -> {reply}"
        told.append(f"{call}{said}; running {member.running}, wave {member.wave}")
    return told


@waves.expected
def _(agree_every, events):
    """From the whole history at each moment."""
    if agree_every == 0:
        return "every request served, all ranks asleep, passes equal"
    told = []
    for now, (kind, *values) in enumerate(events):
        before, after = _state(events[:now]), _state(events[: now + 1])
        if kind == "on_request":
            reply = f" -> {not before[0] and values[0] != before[1]}"
        elif kind == "after_pass":
            count = sum(event[0] == "after_pass" for event in events[_since_end(events[:now]) : now + 1])
            reply = f" -> {count % agree_every == 0}"
        else:
            reply = "" if kind == "on_start" else f" -> {not values[0]}"
        told.append(f"{kind}({', '.join(map(str, values))}){reply}; running {after[0]}, wave {after[1]}")
    return told


def _since_end(events):
    return max((now + 1 for now, event in enumerate(events) if event == ("agreed", False)), default=0)


def _state(events):
    """(running, wave) after these events."""
    wave = events.count(("agreed", False))
    woken = [e for e in events[_since_end(events) :] if e[0] == "on_request" or e == ("on_start", wave)]
    return bool(woken), wave


@waves.symptom("no-answer", "on_request, after_pass and agreed must return True or False.")
def _(failure):
    return isinstance(failure.got, list) and any(" -> None" in line for line in failure.got)


def _wave_mistake(name, message, **joints):
    waves.mistake(name, message)(_members(**joints))


_wave_mistake(
    "heeds-late-calls",
    "Your member wakes at any call. One that comes late, when its wave is over, would start a pass in which nobody else "
    "takes part: wake only if the call's wave is your own.",
    late_calls=True,
)
_wave_mistake("deaf", "Your member never wakes at a call, so a rank without a request of its own sleeps on while the others "
              "wait for it.", deaf_calls=True)  # fmt: skip
_wave_mistake(
    "never-alone",
    "A request of a wave that is over finds your member asleep, and it says nothing. The front believed it awake and has "
    "called nobody: return True, so that the others are called.",
    never_alone=True,
)
_wave_mistake(
    "asks-while-awake",
    "Your member asks for the others although it is awake. Then they are too, or have been called: ask only if the request "
    "finds you asleep.",
    asks_awake=True,
)
_wave_mistake(
    "asks-when-called",
    "Your member asks for the others whenever it was asleep. If the request is of the present wave, the front that sent it "
    "is calling them already: ask only if its wave is over.",
    always_asks=True,
)
_wave_mistake(
    "asks-the-wrong-way-round",
    "Your member asks for the others when a request of the present wave wakes it, for which they have been called, and not "
    "when the request's wave is over: compare with wave < self.wave.",
    same_wave=True,
)
_wave_mistake("request-does-not-wake", "A request must set running to True, whatever its wave: somebody has to serve it.",
              sleeps_on=True)  # fmt: skip
_wave_mistake(
    "takes-the-message's-wave",
    "You take the wave's number from the request. A late message would set you back: the number grows only when a wave "
    "ends, by one.",
    takes_wave=True,
)
_wave_mistake("inverted", "You end the wave when somebody has requests left. It ends when nobody has.", inverted=True)
_wave_mistake("number-stays", "The wave ends and its number stays the same, so a late message cannot be told from a new "
              "one: add 1.", no_next_wave=True)  # fmt: skip
_wave_mistake("stays-awake", "The wave has ended, and your member is still running: set running to False.", stays_awake=True)
_wave_mistake("number-grows-always", "The number of the wave grows at each agreement. It grows only when the wave ends.",
              next_each_time=True)  # fmt: skip
_wave_mistake(
    "alone-waits",
    "Your member asks for the others and sleeps on. The call that follows goes to the others only: whoever asks must begin "
    "by itself.",
    alone_waits=True,
)
_wave_mistake("tells-unfinished", "`agreed` returns whether the wave has *ended*: the opposite of whether anybody has requests "
              "left.", tells_unfinished=True)  # fmt: skip
_wave_mistake("agrees-once", "You agree once in a wave. If somebody has requests left then, all must agree again after another "
              "agree_every passes: % instead of ==.", counts_once=True)  # fmt: skip
_wave_mistake("agrees-ever-after", "After the first agreement you agree after every pass. The next one is due after another "
              "agree_every passes: % instead of >=.", at_least=True)  # fmt: skip
_wave_mistake("one-pass-early", "You agree one pass early: count this pass first, then ask whether the count is a multiple of "
              "agree_every.", early=1)  # fmt: skip
_wave_mistake("agrees-every-pass", "You agree after every pass. An agreement is a meeting of all ranks and costs time: only "
              "every agree_every passes.", always_agree=True)  # fmt: skip


@waves.symptom(
    "agreement-due",
    "After some pass your answer is wrong about the agreement: it is due after every agree_every passes of a wave, also when "
    "the wave has gone on after one, and only then.",
)
def _(failure):
    return _first_difference(failure)[0].startswith("after_pass")


@waves.symptom(
    "request-unserved",
    "After a request your member is not running. Whatever the request's wave, somebody has to serve it.",
)
def _(failure):
    got, right = _first_difference(failure)
    return got.startswith("on_request") and "running False" in got


@waves.wrong("agreement-due")
class _(_Member):
    def after_pass(self):
        self.count = vars(self).get("count", 0) + 1  # never starts anew, and agrees once
        return self.count == self.agree_every


@waves.wrong("request-unserved")
class _(_Member):
    def on_request(self, wave):
        self.running = self.running or wave == self.wave
        return False


@waves.symptom(
    "hangs",
    "Your member does what was asked for in each single case, and yet some order of events hangs or loses a request. Look at "
    "what you keep between two waves.",
)
def _(failure):
    return failure.args[0] == 0


@waves.wrong("hangs")
class _(_Member):
    """Counts waves in too few bits."""

    def on_start(self, wave):
        self.running = self.running or (wave == self.wave and wave < 7)


@waves.wrong("no-answer")
class _(_Member):
    def agreed(self, anybody_unfinished):
        super().agreed(anybody_unfinished)


@waves.accepts
class _:
    """With the passes left until the next agreement, and the waves as a list of their lengths."""

    def __init__(self, agree_every=16):
        self.every, self.until, self.ended, self.running = agree_every, agree_every, [], False

    @property
    def wave(self):
        return len(self.ended)

    def on_request(self, wave):
        was, self.running = self.running, True
        return wave != self.wave and not was

    def on_start(self, wave):
        self.running |= wave == self.wave

    def after_pass(self):
        self.until -= 1
        if self.until:
            return False
        self.until = self.every
        return True

    def agreed(self, anybody_unfinished):
        if not anybody_unfinished:
            self.ended.append(True)
            self.running = False
        return not anybody_unfinished


@waves.accepts
class _(_Member):
    def agreed(self, anybody_unfinished):
        """Without starting the count anew: a wave ends at a multiple anyway."""
        self.running = anybody_unfinished
        self.wave += not anybody_unfinished
        return not anybody_unfinished


@waves.look
def _(answer):
    runs = [interleave(answer, seed) for seed in range(500)]
    requests, num_waves = sum(run.num_requests for run in runs), sum(run.num_waves for run in runs)
    print(f"500 random interleavings: {requests:,} requests in {num_waves:,} waves, all of them served,")
    print("and in every wave all ranks ran the same number of passes.")
