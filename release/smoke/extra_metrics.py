"""kvmmap[metrics]: a library's counters through OpenTelemetry's API."""

import base

import kvmmap

base.make_and_reopen()
with kvmmap.Library("library") as library:
    library.instrument()
    assert library.metrics()["sessions"] == 0
