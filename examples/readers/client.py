"""Ask the server of server.py, from several threads at once, and check every answer.

python examples/readers/client.py http://127.0.0.1:8000 --until 3000
"""

import argparse
import json
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import numpy as np


def ask(url: str, layer: int, queries: np.ndarray) -> dict:
    """Send one request; while the server starts, try again."""
    body = json.dumps({"layer": layer, "queries": queries.tolist()}).encode()
    for _ in range(200):
        try:
            with urllib.request.urlopen(urllib.request.Request(url, body), timeout=30) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            raise SystemExit(error.read().decode()) from error
        except urllib.error.URLError:
            time.sleep(0.1)
    raise SystemExit(f"no server at {url}")


def follow(url: str, layer: int, until: int) -> tuple[int, set[int]]:
    """Ask repeatedly until the cache has `until` positions; return the number of answers and the processes."""
    rng = np.random.default_rng(layer)
    answers, processes = 0, set()
    while True:
        answer = ask(url, layer, rng.standard_normal((8, 64), dtype=np.float32))
        # Every stored value is 1, so a weighted mean of them is, whatever the weights.
        assert answer["positions"] == 0 or np.allclose(answer["output"], 1, atol=1e-5), answer
        answers += 1
        processes.add(answer["process"])
        if answer["positions"] >= until:
            return answers, processes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("url")
    parser.add_argument("--until", type=int, default=3000)
    args = parser.parse_args()
    with ThreadPoolExecutor(4) as threads:
        results = list(threads.map(lambda layer: follow(args.url, layer, args.until), range(4)))
    processes = set().union(*(who for _, who in results))
    print(f"{sum(count for count, _ in results)} answers, all of them right, from {len(processes)} processes")


if __name__ == "__main__":
    main()
