"""Fuzz the command line: `python -m fuzz.commands --count 20000`. Random command lines over odd files and surroundings.

Most run in this process; one in `--process-every` runs as a process of its own, with pipes, closed streams or a
terminal. Each must end by itself, without a traceback, with an exit code that is true:

    70, or any other that is not documented      never
    1 (damaged, or `diff`: different)            only where a damaged cache, or `diff`, was named
    0 of `verify`                                only for a sound cache
    2 (nothing was changed)                      every file that was there is as it was
    commands that only look                      likewise, whatever they end with

A failure prints the command line, its surroundings, and the seed that leads to it.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import pty
import re
import select
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import click
import numpy as np
from click.testing import CliRunner
from kvmmap_cli.main import kvmmap as group

import kvmmap

PROGRAM = Path(sys.executable).with_name("kvmmap")
SECONDS_EACH = 120
MOST_DESCRIPTORS = 20
"""That libraries may keep open."""
RESET_EVERY = 40
"""Command lines over the same files; then they are made anew."""

LOOKING = {"inspect", "verify", "diff", "tokens", "report"}
CODES = {0, 1, 2, 130}
SOUND, DAMAGED, NONE, MADE = "sound", "damaged", "none", "made by a command"

ODD_NAMES = (
    "run_$1_$2",
    "漢字 ไทย",
    "a b",
    "-x",
    "%s",
    "é",
    "n" * 240,
    "a\nb",
    "\udcff\udcfe",
    "[1]",
    "*",
    "#1?",
    "'\"",
)
NUMBERS = (
    *("0", "1", "2", "3", "7", "64", "300", "-1", "1e400", "nan", "inf", "-inf", "0.5", "9" * 20, "9" * 5000, "٣", "²"),
    *("", " ", "1,2", "0-1", "1-0", "0-99999999999", "5M", "1.5GiB", "30d", "1w", "9" * 400 + "T", "0x10", "1_0", "+1"),
)
TEXTS = (
    *("", "x", "漢", "\udcff", "{}", '{"a": 1}', "[" * 5000, "null", "\x1b[2J", "a\nb", "%(x)s", "{0}", "zstd", "f32"),
    *("bf16", "int8", "name", "size", "time", "bash", "zsh", "fish", "0:0", "tokens:0", "99999999:0", "x" * 3000),
)
SENSIBLE = {
    "layers": ("0", "1", "0-1"),
    "wanted": ("0", "1", "0-1"),
    "max_bytes": ("1M", "300K", "0"),
    "older_than": ("1d", "2w"),
    "metadata": ('{"a": 1}', "{}"),
    "zero": ("0:0", "tokens:0"),
    "timeout": ("0", "0.01"),
    "model": ("some/model", "漢"),
    "dtype": ("float32", "f32"),
}
OTHERS = ("", "memory://x", "ftp://h/x.zarr", "http:///x", "://", "folder/../a.kvm", "/dev/null")
PATTERNS = (".", "folder", "*", "*.kvm", "[a-b].kvm", "**", "~", "~/a.kvm", "./a.kvm", "?.kvm")
ENDINGS = ("", ".kvm", ".zarr", ".safetensors", ".html", ".png", ".svg", ".txt", ".kvmm", "/", ".PNG")
SURROUNDINGS: dict[str, tuple[str, ...]] = {
    "COLUMNS": ("", "0", "1", "5", "8", "10", "23", "80", "400", "-3", "x", "9" * 12),
    "LINES": ("", "0", "1", "24", "x"),
    "TERM": ("", "dumb", "xterm", "xterm-256color", "vt100", "unknown", "linux"),
    "NO_COLOR": ("", "1"),
    "FORCE_COLOR": ("", "0", "1", "3"),
    "COLORTERM": ("truecolor", "24bit", "x"),
    "LANG": ("C", "C.UTF-8", "en_US.UTF-8", "ja_JP.eucJP", "x", ""),
    "LC_ALL": ("C", "POSIX", "C.UTF-8", "x", ""),
    "SHELL": ("", "/bin/bash", "/bin/zsh", "/usr/bin/fish", "/bin/tcsh", "bash\n"),
    "HOME": ("", "/nonexistent", ".", "/dev/null"),
    "XDG_DATA_HOME": ("", ".", "/dev/null"),
    "TMPDIR": ("/nonexistent", "."),
    "TZ": ("", "UTC", "Asia/Tokyo", "x", ":"),
    "KVMMAP_TRACEBACK": ("",),
}
STORES: dict[str, tuple[str, ...]] = {
    "AWS_ENDPOINT_URL": ("127.0.0.1:1", "", "://", "ftp://x", "http://", "x y", "http://127.0.0.1:1/ü"),
    "AWS_REGION": ("", "x", "é", "us-east-1"),
    "AWS_ACCESS_KEY_ID": ("", "a\tb", "k"),
    "AWS_SECRET_ACCESS_KEY": ("", "s"),
    "AWS_PROFILE": ("", "none", "../x"),
}
OF_PROCESSES: dict[str, tuple[str, ...]] = {
    "PYTHONIOENCODING": ("ascii", "latin-1", "utf-8", "utf-16", ":replace", "cp1252", "ascii:strict"),
    "PYTHONUTF8": ("0", "1"),
}


class Folder:
    """The files that command lines are about, and what each is."""

    def __init__(self, path: str) -> None:
        self.template = os.path.join(path, "template")
        self.path = os.path.join(path, "here")
        self.kinds: dict[str, str] = {}
        os.mkdir(self.template)
        self._make()
        self.reset()

    def reset(self) -> None:
        """Put every file as it was in the beginning."""
        shutil.rmtree(self.path, ignore_errors=True)
        shutil.copytree(self.template, self.path, symlinks=True, copy_function=_copy)
        os.mkfifo(os.path.join(self.path, "pipe.kvm"))
        os.link(os.path.join(self.path, "a.kvm"), os.path.join(self.path, "hard.kvm"))
        os.chdir(self.path)
        self.fresh = self.state()

    def kind(self, name: str) -> str:
        """Return what a name stands for now."""
        if "://" in name:
            return MADE
        with contextlib.suppress(OSError, ValueError):
            if name in self.fresh and _identity(name) == self.fresh[name]:
                return self.kinds.get(name, NONE)
            os.lstat(name)
            return MADE
        return NONE

    def state(self) -> dict[str, tuple[int, int, int]]:
        """Return what tells whether a file has been changed."""
        found = {}
        for name in os.listdir(self.path):
            found[name] = _identity(os.path.join(self.path, name))
        return found

    def _make(self) -> None:
        def place(name: str) -> str:
            return os.path.join(self.template, name)

        rng = np.random.default_rng(1)
        for name, layers, count in (("a.kvm", 2, 300), ("b.kvm", 1, 5), ("empty.kvm", 1, 0), ("g.zarr", 1, 270)):
            with kvmmap.create(place(name), num_layers=layers, capacity=320, num_kv_heads=2, head_dim=8) as cache:
                x = rng.standard_normal((layers, count, 2, 8), dtype=np.float32)
                cache.extend(x, -x, np.arange(count))
            self.kinds[name] = SOUND
        for name in ODD_NAMES:
            shutil.copy(place("b.kvm"), place(f"{name}.kvm"))
            self.kinds[f"{name}.kvm"] = SOUND
        whole = bytearray(Path(place("a.kvm")).read_bytes())
        with kvmmap.open(place("a.kvm"), record_use=False) as cache:
            at = whole.find(cache.layers[1].key_codes[100].tobytes())
        whole[at] ^= 1
        Path(place("damaged.kvm")).write_bytes(whole)
        Path(place("damaged-head.kvm")).write_bytes(bytes(whole[:100]) + bytes(40) + bytes(whole[140:]))
        self.kinds |= {"damaged.kvm": DAMAGED, "damaged-head.kvm": DAMAGED}
        Path(place("text.kvm")).write_text("no cache")
        Path(place("zero.kvm")).touch()
        Path(place("notes.txt")).write_text("mine")
        Path(place("config.json")).write_text('{"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 16}')
        Path(place("odd.json")).write_text("[" * 3000)
        kvmmap.export_tensors(place("a.kvm"), place("t.safetensors"), dtype="bfloat16")
        Path(place("bad.safetensors")).write_bytes(b"\x10\0\0\0\0\0\0\0{}")
        os.mkdir(place("folder"))
        os.mkdir(place("none.zarr"))
        os.symlink("a.kvm", place("link.kvm"))
        os.symlink("loop.kvm", place("loop.kvm"))
        os.symlink("gone.kvm", place("dangling.kvm"))
        os.symlink("/dev/null", place("null.html"))
        self.kinds |= {"link.kvm": SOUND, "hard.kvm": SOUND}


def _identity(path: str) -> tuple[int, int, int]:
    status = os.lstat(path)
    if stat.S_ISDIR(status.st_mode):  # a lock comes and goes in a group
        return status.st_ino, 0, 0
    return status.st_ino, status.st_size, status.st_mtime_ns


def _copy(source: str, target: str) -> str:
    """Copy a file with its times, and leave its holes."""
    return shutil.copy2(source, target)


class Lines:
    """Makes random command lines of the commands' own parameters."""

    def __init__(self, random: Random) -> None:
        self.random = random
        context = click.Context(group)
        self.commands = {name: group.get_command(context, name) for name in group.list_commands(context)}
        self.files = sorted(os.listdir("."), key=os.fsencode)

    def one(self, *, stores: bool) -> list[str]:
        """Return the arguments of one command line."""
        random = self.random
        if random.random() < 0.02:
            return [random.choice(("", "-", "--help", "--version", "nonesuch", "\udcff", "-x", "--", *TEXTS))]
        name = random.choice(sorted(self.commands))
        command = self.commands[name]
        assert command is not None
        arguments: list[str] = []
        for parameter in command.params:
            if isinstance(parameter, click.Option):
                if random.random() < (0.02 if parameter.name == "plot" else 0.07) and parameter.name != "watch":
                    arguments += self._option(parameter)
            elif random.random() < 0.97:
                count = random.choice((1, 1, 1, 2, 3)) if parameter.nargs == -1 else 1
                arguments += [self._argument(name, parameter, stores) for _ in range(count)]
        if random.random() < 0.05:
            random.shuffle(arguments)
        if random.random() < 0.3:
            arguments.insert(random.randrange(len(arguments) + 1), "--yes")
        if random.random() < 0.1:
            arguments.insert(random.randrange(len(arguments) + 1), "--json")
        if name == "create" and random.random() < 0.7:
            arguments += ["--like", random.choice(("a.kvm", "empty.kvm", "g.zarr"))]
        if name == "gc" and random.random() < 0.7:
            arguments += [random.choice(("--max-bytes=300K", "--older-than=1d", "--max-bytes=0")), "--yes"]
        if name == "bench":  # takes seconds: only what it refuses
            arguments.append("--seconds=0")
        return [name, *arguments]

    def _option(self, option: click.Option) -> list[str]:
        name = self.random.choice(option.opts)
        if option.is_flag:
            return [name]
        if option.name in ("config", "tokenizer", "output", "plot", "like", "folder"):
            value = self._place(stores=False)
        elif isinstance(option.type, click.Choice) and self.random.random() < 0.8:
            value = self.random.choice(list(option.type.choices))
        elif self.random.random() < 0.6:
            value = self.random.choice(SENSIBLE.get(str(option.name), ("1", "5", "300")))
        else:
            value = self.random.choice(self.random.choice((NUMBERS, NUMBERS, TEXTS)))
        # Reading or writing a pipe that nobody has at its other end waits, as it should.
        if value.rstrip("/") == "pipe.kvm" and option.name != "like":
            value = "notes.txt"
        return [f"{name}={value}"] if name.startswith("--") and self.random.random() < 0.5 else [name, value]

    def _argument(self, name: str, argument: click.Parameter, stores: bool) -> str:
        if argument.name in ("length", "capacity"):
            return self.random.choice(NUMBERS if self.random.random() < 0.4 else ("0", "5", "300", "400"))
        if argument.name == "shell":
            return self.random.choice(TEXTS if self.random.random() < 0.5 else ("bash", "zsh", "fish"))
        if argument.name in ("target", "new_path") or (argument.name == "path" and name == "create"):
            if self.random.random() < 0.6:
                return self.random.choice(("new.kvm", "new.zarr", "other.kvm", "x.safetensors", "漢.kvm"))
        elif argument.name == "folder" and self.random.random() < 0.7:
            return self.random.choice((".", "folder", "./"))
        elif argument.name == "source" and name == "import" and self.random.random() < 0.5:
            return self.random.choice(("t.safetensors", "bad.safetensors", "g.zarr"))
        return self._place(stores)

    def _place(self, stores: bool) -> str:
        random = self.random
        draw = random.random()
        if draw < 0.3:
            return random.choice(("a.kvm", "b.kvm", "g.zarr", "damaged.kvm", "link.kvm"))
        if draw < 0.65:
            return random.choice(self.files)
        if draw < 0.75:
            return random.choice(("new", "x", *ODD_NAMES)) + random.choice(ENDINGS)
        if draw < 0.85:
            return random.choice(PATTERNS)
        if draw < 0.93:
            return f"file://{random.choice(('', 'localhost'))}{os.getcwd()}/{random.choice(self.files)}"
        if stores:
            return random.choice(("s3://b/c.zarr", "s3://", "s3://b/%zz#?.zarr", "s3://b/x.kvm", "gs://b/c.zarr"))
        return random.choice(OTHERS)


class Surroundings:
    """Draws environments."""

    def __init__(self, random: Random) -> None:
        self.random = random

    def one(self, *, process: bool, stores: bool) -> dict[str, str]:
        """Return environment variables that differ from this process's."""
        found = {}
        choices = SURROUNDINGS | (STORES if stores else {}) | (OF_PROCESSES if process else {})
        for name, values in choices.items():
            if self.random.random() < 0.15:
                found[name] = self.random.choice(values)
        if stores:
            found.setdefault("AWS_ENDPOINT_URL", self.random.choice(STORES["AWS_ENDPOINT_URL"]))
        return found


class LyingError(AssertionError):
    """A command line ended as none may."""


def check(folder: Folder, arguments: list[str], code: int, output: str, errors: str, before: Any) -> None:
    """Refuse an ending that is not true.

    Raises:
        LyingError: says why.
    """
    if "Traceback (most recent call last)" in output + errors:
        raise LyingError("a traceback")
    if code not in CODES:
        raise LyingError(f"exit code {code}")
    command = arguments[0] if arguments else ""
    named = [_name(text) for text in arguments[1:]]
    if code == 1 and command != "diff" and not _may_be_damaged(folder, named):
        raise LyingError("exit code 1, and no damaged cache was named")
    if command == "verify" and code == 0 and not {"--help", "-h"} & set(arguments):
        kinds = {folder.kind(name) for name in named}
        if kinds & {DAMAGED, NONE} and not kinds & {SOUND, MADE}:
            raise LyingError(f"verify says sound of {kinds}")
    if command == "verify" and len(arguments) == 2 and folder.kind(arguments[1]) == DAMAGED and code != 1:
        raise LyingError("verify does not say damaged")
    if code == 2 and errors and not errors.startswith(("kvmmap: ", "Usage: ", "\x1b")) and "[y/N]" not in errors:
        raise LyingError("errors that do not begin with the program's name")
    if (code == 2 or command in LOOKING) and command not in ("gc", "resize", "compact", "completion"):
        now = folder.state()
        changed = [name for name, state in before.items() if now.get(name) != state and not _is_output(name, arguments)]
        if changed:
            raise LyingError(f"changed {changed}")


def _name(text: str) -> str:
    """Return the last part of a path or of an option's value."""
    text = text.partition("=")[2] or text if text.startswith("--") else text
    if "://" in text and not text.startswith("file://"):
        return text
    return os.path.basename(text.rstrip("/"))


def _may_be_damaged(folder: Folder, named: list[str]) -> bool:
    wide = any(set(name) & set("*?[~.") and name not in folder.kinds for name in named)
    return wide or not named or any(folder.kind(name) in (DAMAGED, MADE) or name == "" for name in named)


def _is_output(name: str, arguments: list[str]) -> bool:
    """True for what a report or a picture was written to: --overwrite was given."""
    pages = {f"{os.path.splitext(_name(text))[0]}.html" for text in arguments}  # where a page goes by default
    return "--overwrite" in arguments and (name in pages or any(_name(text) == name for text in arguments))


def in_process(arguments: list[str], env: dict[str, str]) -> tuple[int, str, str]:
    """Run a command line here."""
    result = CliRunner().invoke(group, arguments, env=env, prog_name="kvmmap")
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def as_process(random: Random, arguments: list[str], env: dict[str, str]) -> tuple[int, str, str]:
    """Run a command line as a process of its own, within a terminal or with pipes or closed streams."""
    environment = os.environ | env
    if random.random() < 0.4:
        return _in_terminal(arguments, environment)
    closed = "".join(random.choice(("", "", f" {number}{sign}&-")) for number, sign in ((0, "<"), (1, ">"), (2, ">")))
    line = f"exec {shlex.quote(str(PROGRAM))} {' '.join(map(shlex.quote, arguments))}{closed}"
    done = subprocess.run(
        ["sh", "-c", line],
        capture_output=True,
        env=environment,
        timeout=SECONDS_EACH * 3,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    encoding = "utf-16" if env.get("PYTHONIOENCODING") == "utf-16" else "utf-8"
    return done.returncode, done.stdout.decode(encoding, "replace"), done.stderr.decode(encoding, "replace")


def _in_terminal(arguments: list[str], env: dict[str, str]) -> tuple[int, str, str]:
    pid, fd = pty.fork()
    if pid == 0:
        with contextlib.suppress(BaseException):
            os.execve(PROGRAM, [str(PROGRAM), *arguments], env)
        os._exit(99)
    drawn = b""
    with contextlib.suppress(OSError):
        os.write(fd, b"n\n\x04")  # whatever is asked: no
        end = time.monotonic() + SECONDS_EACH * 3
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        while poll.poll(max(0, int((end - time.monotonic()) * 1000))) and (data := os.read(fd, 1 << 16)):
            drawn += data
    os.close(fd)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return code, drawn.decode("utf-8", "replace"), ""


@contextlib.contextmanager
def _limited() -> Iterator[None]:
    """Let a command line that does not end fail."""

    def stop(signum: int, frame: object) -> None:
        raise LyingError(f"does not end within {SECONDS_EACH} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS_EACH)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def fuzz(
    count: int, seed: int, process_every: int, told: Callable[[str], None], *, first: int = 0, go_on: bool = False
) -> Counter[int]:
    """Run `count` command lines; return how often each exit code came, -1 for those that failed.

    Args:
        told: called with a line now and then, and with failures where `go_on` is set.
        first: the number of the first one.
        go_on: after a failure, too.

    Raises:
        LyingError: names the command line.
    """
    codes: Counter[int] = Counter()
    descriptors = len(os.listdir("/proc/self/fd")) if sys.platform == "linux" else 0
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as place:
        here = os.getcwd()
        try:
            folder = Folder(place)
            last = time.monotonic()
            for number in range(first, first + count):
                random = Random(f"{seed} {number}")
                if number % RESET_EVERY == 0:
                    folder.reset()
                try:
                    codes[_one(folder, random, number, seed, process_every)] += 1
                except LyingError as error:
                    if not go_on:
                        raise
                    codes[-1] += 1
                    told(f"{error}\n")
                if time.monotonic() - last > 60:
                    last = time.monotonic()
                    told(f"{number + 1 - first:,} command lines (seed {seed})")
            if sys.platform == "linux" and len(os.listdir("/proc/self/fd")) > descriptors + MOST_DESCRIPTORS:
                raise LyingError(f"{len(os.listdir('/proc/self/fd')) - descriptors} descriptors are left open")
        finally:
            os.chdir(here)
            for made in Path(place).rglob("*"):
                if made.is_dir() and not made.is_symlink():
                    made.chmod(0o700)
    return codes


def _one(folder: Folder, random: Random, number: int, seed: int, process_every: int) -> int:
    process = random.randrange(process_every) == 0
    stores = random.random() < 0.003
    arguments = Lines(random).one(stores=stores)
    env = {"HOME": folder.path} | Surroundings(random).one(process=process, stores=stores)
    if process:  # what a system can't pass on
        arguments = [re.sub("\0", "", text)[:3000] for text in arguments]
    before, errors = folder.state(), ""
    try:
        with _limited() if not process else contextlib.nullcontext():
            code, output, errors = as_process(random, arguments, env) if process else in_process(arguments, env)
        check(folder, arguments, code, output, errors, before)
    except BaseException as error:
        line = " ".join(shlex.quote(text[:200]) for text in arguments)
        how = "as a process" if process else "in process"
        where = f"--seed {seed} --first {number - number % RESET_EVERY} --count {number % RESET_EVERY + 1}"
        raise LyingError(f"{error!r}\nkvmmap {line!r}\nwith {env!r}, {how}; again with {where}\n{errors}") from error
    return code


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m fuzz.commands", description=__doc__)
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--first", type=int, default=0, help="number of the first command line")
    parser.add_argument("--go-on", action="store_true", help="go on after a failure")
    parser.add_argument("--process-every", type=int, default=100, help="one in so many runs as a process of its own")
    arguments = parser.parse_args()
    seed = int.from_bytes(os.urandom(3), "little") if arguments.seed is None else arguments.seed
    start = time.monotonic()
    try:
        codes = fuzz(
            arguments.count,
            seed,
            arguments.process_every,
            lambda line: print(line, flush=True),
            first=arguments.first,
            go_on=arguments.go_on,
        )
    except LyingError as error:
        print(error, file=sys.stderr)
        return 1
    ended = ", ".join(f"{number:,} with {code}" for code, number in sorted(codes.items()))
    print(f"{arguments.count:,} command lines in {time.monotonic() - start:.0f} s (seed {seed}): {ended}")
    return 1 if codes[-1] else 0


if __name__ == "__main__":
    sys.exit(main())
