"""Traces of chat services, and a library simulated over them: which share of prompts' tokens a policy saves.

Nothing is stored: a prompt is a list of chunks, each a name and a number of tokens, and segments are simulated as the
library makes them. One that continues at a segment's end makes it longer; one that departs from the middle makes a
child; a segment with children stays. Times are in seconds of the trace. The choice of what goes is `kvmmap`'s own code.
"""

from __future__ import annotations

import bisect
import heapq
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from random import Random

from kvmmap.library import policy

Chunk = tuple[str, int]
"""A name, and tokens."""

POSITION_BYTES = 12_244
"""Of SmolLM2-135M as int8."""

SECONDS_A_POSITION = 1e-3


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt that comes in; what is generated for it becomes part of it."""

    time: float
    chunks: tuple[Chunk, ...]
    answer: Chunk


def chat(seed: int, requests: int, *, users: int = 300, again: float = 0.08) -> list[Request]:
    """Users who come and go, with conversations of several turns on a few system prompts; answers are made again."""
    random = Random(seed)
    heap = [(random.expovariate(1 / 600), user) for user in range(users)]
    heapq.heapify(heap)
    systems = [(f"system {number}", random.randrange(200, 2000)) for number in range(8)]
    talks: dict[int, list[Chunk]] = {}
    found: list[Request] = []
    while len(found) < requests:
        time, user = heapq.heappop(heap)
        talk = talks.get(user)
        if talk is None or random.random() < 0.25:
            system = systems[min(int(random.paretovariate(1.0)) - 1, len(systems) - 1)]
            talk = talks[user] = [system]
        elif len(talk) > 2 and random.random() < again:
            talk.pop()  # the last answer is made again
            talk.pop()
        number = len(found)
        talk.append((f"turn {number}", min(4000, int(random.lognormvariate(4.0, 1.2)) + 1)))
        answer = (f"answer {number}", min(2000, int(random.lognormvariate(5.3, 0.8)) + 1))
        found.append(Request(time, tuple(talk), answer))
        talk.append(answer)
        # The next turn in a minute or so; or the user leaves, and comes back hours later.
        pause = random.lognormvariate(4.0, 1.0) if random.random() < 0.8 else random.expovariate(1 / 20_000)
        heapq.heappush(heap, (time + pause, user))
    return found


def documents(seed: int, requests: int, *, number: int = 400, exponent: float = 1.0) -> list[Request]:
    """Questions on documents, which are asked about by Zipf's law; each is asked once."""
    random = Random(seed)
    sizes = [int(random.lognormvariate(8.5, 0.9)) + 100 for _ in range(number)]
    weights = [1 / (rank + 1) ** exponent for rank in range(number)]
    found, time = [], 0.0
    for index in range(requests):
        time += random.expovariate(1 / 5)
        which = random.choices(range(number), weights)[0]
        chunks = (("system", 300), (f"document {which}", sizes[which]), (f"question {index}", random.randrange(10, 80)))
        found.append(Request(time, chunks, (f"answer {index}", random.randrange(20, 400))))
    return found


def agents(seed: int, requests: int) -> list[Request]:
    """Programs that work in steps: one long prompt of tools, short steps in quick succession, tries that branch."""
    random = Random(seed)
    tools = [(f"tools {number}", random.randrange(3000, 9000)) for number in range(4)]
    running: list[list[Chunk]] = []
    found, time = [], 0.0
    while len(found) < requests:
        time += random.expovariate(1 / 2)
        if len(running) < 12 or random.random() < 0.05:
            running.append([random.choice(tools), (f"task {len(found)}", random.randrange(50, 2000))])
        run = random.choice(running)
        if random.random() < 0.1 and len(run) > 4:
            run = [*run[: random.randrange(3, len(run))]]
            running.append(run)
        number = len(found)
        run.append((f"result {number}", min(3000, int(random.lognormvariate(5.0, 1.2)) + 1)))
        answer = (f"step {number}", random.randrange(30, 300))
        found.append(Request(time, tuple(run), answer))
        run.append(answer)
        if len(run) > 40 or random.random() < 0.03:
            running.remove(run)
    return found


TRACES: dict[str, Callable[[int, int], list[Request]]] = {"chat": chat, "documents": documents, "agents": agents}


@dataclass(eq=False, slots=True)
class Node:
    """A segment, with what the policy looks at."""

    id: int
    parent: Node | None
    chunks: list[Chunk]
    created: float
    used: float
    branches: int = 0
    positions: int = 0
    children: dict[tuple[int, str], Node] = field(default_factory=dict)
    """By the number of own chunks that come before, and the first chunk's name."""
    next_use: float = math.inf
    broken: None = None

    @property
    def bytes(self) -> int:
        return self.positions * POSITION_BYTES

    @property
    def seconds(self) -> float:
        return self.positions * SECONDS_A_POSITION


Choose = Callable[[Sequence[Node]], Node]


def lru(leaves: Sequence[Node]) -> Node:
    """The longest unused leaf goes."""
    return leaves[0]


def kvmmaps(leaves: Sequence[Node]) -> Node:
    """What kvmmap's policy chooses."""
    return policy.next_to_go(leaves)  # type: ignore[type-var, arg-type, return-value]


def clairvoyant(leaves: Sequence[Node]) -> Node:
    """The leaf whose next use is the farthest away goes: what no policy can know."""
    return max(leaves, key=lambda leaf: (leaf.next_use, leaf.positions))


class Simulation:
    """A library within a budget.

    Args:
        budget: tokens.
        choose: the policy; it gets the leaves, the longest unused first.
    """

    def __init__(self, budget: int, choose: Choose) -> None:
        self.budget, self._choose = budget, choose
        self._root = Node(0, None, [], 0.0, 0.0)
        self._leaves: list[tuple[float, int, Node]] = []
        self._count = 0
        self.size = self.reused = self.asked = 0

    def run(self, requests: Sequence[Request]) -> float:
        """Return the share of prompts' tokens that were reused."""
        following = _next_uses(requests) if self._choose is clairvoyant else None
        for number, request in enumerate(requests):
            self._serve(request, following[number] if following else {})
        return self.reused / self.asked

    def _serve(self, request: Request, following: dict[str, float]) -> None:
        prompt = [*request.chunks]
        path, node, own, at = [], self._root, 0, 0
        while True:
            while own < len(node.chunks) and at < len(prompt) and node.chunks[own] == prompt[at]:
                own, at = own + 1, at + 1
            child = node.children.get((own, prompt[at][0])) if at < len(prompt) else None
            if child is None:
                break
            path.append(node)
            node, own = child, 0
        path.append(node)
        self.reused += sum(size for _, size in prompt[:at])
        self.asked += sum(size for _, size in prompt)
        rest = [*prompt[at:], request.answer]
        for one in path[1:]:
            self._touch(one, request.time)
        if node is self._root or own < len(node.chunks):
            self._count += 1
            child = Node(self._count, node, [], request.time, request.time)
            if node is not self._root and not node.children:
                self._leaves.remove((node.used, node.id, node))
            node.children[own, rest[0][0]] = child
            node.branches += 1
            node = child
            self._insert(node)
            path.append(node)
        added = sum(size for _, size in rest)
        node.chunks += rest
        node.positions += added
        self.size += added
        for one in path[1:]:
            one.next_use = min((following.get(name, math.inf) for name, _ in one.chunks), default=math.inf)
        self._make_room(node)

    def _touch(self, node: Node, time: float) -> None:
        if not node.children:
            self._leaves.remove((node.used, node.id, node))
        node.used = time
        if not node.children:
            self._insert(node)

    def _insert(self, node: Node) -> None:
        bisect.insort(self._leaves, (node.used, node.id, node), key=lambda entry: entry[:2])

    def _make_room(self, keep: Node) -> None:
        while self.size > self.budget:
            leaves = [node for _, _, node in self._leaves if node is not keep]
            if not leaves:
                return
            node = self._choose(leaves)
            self._leaves.remove((node.used, node.id, node))
            self.size -= node.positions
            parent = node.parent
            assert parent is not None
            parent.children = {key: child for key, child in parent.children.items() if child is not node}
            if parent is not self._root and not parent.children:
                self._insert(parent)


def _next_uses(requests: Sequence[Request]) -> list[dict[str, float]]:
    """Return for each request when its chunks come in a prompt next."""
    coming: dict[str, float] = {}
    found: list[dict[str, float]] = []
    for request in reversed(requests):
        names = [name for name, _ in (*request.chunks, request.answer)]
        found.append({name: coming[name] for name in names if name in coming})
        for name, _ in request.chunks:
            coming[name] = request.time
    return found[::-1]


def rates(requests: Sequence[Request], budget: int) -> Iterator[tuple[str, float]]:
    """Yield the share of tokens that each policy saves."""
    for name, choose in (("LRU", lru), ("kvmmap", kvmmaps), ("clairvoyant", clairvoyant)):
        yield name, Simulation(budget, choose).run(requests)
