"""Write a cache token by token, as a model that generates would, beside any number of readers.

    python examples/readers/writer.py chat.kvm --tokens 3000

Keys are random, and every value is 1, so that attention over them must give 1.
"""

import argparse
import time

import numpy as np

import kvmmap

SHAPE = {"num_layers": 4, "num_kv_heads": 2, "head_dim": 64}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("path")
    parser.add_argument("--tokens", type=int, default=3000)
    parser.add_argument("--pause", type=float, default=0.001, help="seconds between two tokens")
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    # Another writer may just be about to close: wait for it, and not forever.
    with kvmmap.create(args.path, capacity=args.tokens, **SHAPE, overwrite=True, timeout=10) as cache:
        while cache.seq_len < args.tokens:
            shape = (SHAPE["num_layers"], SHAPE["num_kv_heads"], SHAPE["head_dim"])
            keys = rng.standard_normal(shape, dtype=np.float32)
            cache.push_step(keys, np.ones(shape, np.float32), token_id=cache.seq_len)  # readers see it from here on
            if rng.random() < 0.02:
                cache.truncate(max(0, cache.seq_len - 10))  # a draft that was not accepted
            if cache.seq_len % 256 == 0:
                cache.flush()  # what the power may take with it is at most this much
            time.sleep(args.pause)
        print(f"{cache.seq_len} positions written")


if __name__ == "__main__":
    main()
