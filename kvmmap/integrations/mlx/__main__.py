"""python -m kvmmap.integrations.mlx DIRECTORY [--disk-bytes N] [--codec C] [--salt S] OPTIONS OF mlx_lm.server"""

from __future__ import annotations

import argparse
import sys

import mlx_lm.server

from ...errors import KvmmapError
from .server import serving


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m kvmmap.integrations.mlx",
        description="Run mlx_lm.server with prompts that are kept on the disk. Other options are mlx_lm.server's.",
        allow_abbrev=False,
    )
    parser.add_argument("directory", help="a kvmmap library; made if it is not there")
    parser.add_argument("--disk-bytes", type=int, help="bytes to keep there at most")
    parser.add_argument("--codec", default="native", help='"native", or a preset of kvmmap')
    parser.add_argument("--salt", help="a tenant's secret")
    own, rest = parser.parse_known_args()
    sys.argv = ["mlx_lm.server", *rest]
    try:
        with serving(own.directory, disk_bytes=own.disk_bytes, codec=own.codec, salt=own.salt):
            mlx_lm.server.main()
    except KvmmapError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
