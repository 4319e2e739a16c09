#!/usr/bin/env python3
"""Fails one system call of the daemon after another, and checks that the application loses nothing.

  python3 tests/io_errors.py target/release/waltrail --points 8 --jobs 4
  python3 tests/io_errors.py EXE --modes lose-pwrite --nth 57      # one point alone

A library that is preloaded into the daemon alone counts its pwrite, fsync, fdatasync and ftruncate
calls on app.db and app.db-wal, and fails the n-th one of a kind, once:

  eio-CALL, enospc-CALL   the call does nothing and fails with this error.
  lose-pwrite             from the n-th pwrite on, writes to that file are lost; its next fsync or
                          fdatasync fails with EIO and ends that. Linux reports a failed writeback
                          this way.

Clean runs count the calls; `--points` of them are sampled for each mode. The application updates
numbered rows meanwhile. Afterwards the database must be intact, hold the last committed value of
each row (while the daemon runs, and after both were stopped cleanly), and equal a restore after
`sync`. With an even n the application never checkpoints, with an odd one it does so automatically.
Needs gcc. The exit code is 0 if no point failed.
"""
import argparse, collections, concurrent.futures, mmap, os, random, shutil, sqlite3, struct
import subprocess, sys, tempfile, time

from harm import PROCESSES, Daemon, in_work_directory, waltrail

ROWS = 4000
OUTCOMES = ["ok", "damaged", "lost", "app-error", "daemon", "restore-differs", "left-behind",
            "not-reached"]
GRAVEST_FIRST = OUTCOMES[1:]
CALLS = ["pwrite", "fsync", "fdatasync", "ftruncate"]
ERRORS = ["none", "eio", "enospc", "lose"]
MODES = ["eio-pwrite", "eio-fsync", "eio-fdatasync", "eio-ftruncate", "enospc-pwrite",
         "enospc-ftruncate", "lose-pwrite"]

# One page shared with the harness; the fields are those of `Shared` below.
SHIM = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>
struct shared { unsigned long error, call, nth, calls[4], fired, is_wal, losing; };
static struct shared *s;
__attribute__((constructor)) static void map_shared(void) {
    const char *path = getenv("IO_ERRORS_SHARED");
    int fd = path ? open(path, O_RDWR) : -1;
    if (fd < 0) return;
    s = mmap(0, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (s == MAP_FAILED) s = 0;
    close(fd);
}
/* 1 for the main file, 2 for the WAL, 0 for any other. */
static int file_of(int fd) {
    char link[64], path[4096];
    if (!s) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, path, sizeof path - 1);
    if (n < 11) return 0;
    path[n] = 0;
    if (!strcmp(path + n - 7, "/app.db")) return 1;
    return strcmp(path + n - 11, "/app.db-wal") ? 0 : 2;
}
/* What to do with a call: 0 the real one, 1 pretend that it was done, -1 fail with errno. */
static int decide(int call, int fd) {
    int saved = errno, file = file_of(fd);
    errno = saved;
    if (!file) return 0;
    unsigned long n = __atomic_add_fetch(&s->calls[call], 1, __ATOMIC_SEQ_CST);
    int is_chosen = s->error && (unsigned long)call == s->call && n == s->nth;
    if (is_chosen) { s->fired = 1; s->is_wal = file == 2; }
    if (s->error == 3) {
        if (is_chosen) s->losing = file;
        if (s->losing != (unsigned long)file || call == 3) return 0;
        if (call == 0) return 1;
        s->losing = 0;
        errno = EIO;
        return -1;
    }
    if (!is_chosen) return 0;
    errno = s->error == 1 ? EIO : ENOSPC;
    return -1;
}
#define REAL(type, name, ...) ((type)dlsym(RTLD_NEXT, name))(__VA_ARGS__)
typedef ssize_t (*write_call)(int, const void *, size_t, off64_t);
typedef int (*sync_call)(int);
typedef int (*truncate_call)(int, off64_t);
ssize_t pwrite64(int fd, const void *bytes, size_t n, off64_t at) {
    int decided = decide(0, fd);
    return decided > 0 ? (ssize_t)n : decided ? -1 : REAL(write_call, "pwrite64", fd, bytes, n, at);
}
ssize_t pwrite(int fd, const void *bytes, size_t n, off_t at) { return pwrite64(fd, bytes, n, at); }
int fsync(int fd) { return decide(1, fd) ? -1 : REAL(sync_call, "fsync", fd); }
int fdatasync(int fd) { return decide(2, fd) ? -1 : REAL(sync_call, "fdatasync", fd); }
int ftruncate64(int fd, off64_t n) {
    return decide(3, fd) ? -1 : REAL(truncate_call, "ftruncate64", fd, n);
}
int ftruncate(int fd, off_t n) { return ftruncate64(fd, n); }
"""

# Updates numbered rows and notes each commit. A commit that fails may have happened or not.
APPLICATION = r"""
import os, select, sqlite3, sys, time
path, autocheckpoint, rows, parent = sys.argv[1], sys.argv[3], int(sys.argv[4]), os.getppid()
notes = os.open(sys.argv[2], os.O_WRONLY | os.O_APPEND)
database = sqlite3.connect(path, isolation_level=None, timeout=20)
database.execute("PRAGMA synchronous=NORMAL")
database.execute("PRAGMA wal_autocheckpoint=" + autocheckpoint)
n = 0
def note(*words): os.write(notes, (" ".join(str(it) for it in words) + "\n").encode())
def work(seconds):
    global n
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        n += 1
        row = 1 + n * 7919 % rows
        try:
            database.execute("UPDATE item SET v = ? WHERE id = ?", (n, row))
            note("commit", row, n)
        except sqlite3.Error as error:
            note("error", row, n, getattr(error, "sqlite_errorname", ""), error)
            time.sleep(0.05)
        time.sleep(0.001)
work(2.2); time.sleep(1.3); work(0.6); time.sleep(1.3); work(0.2)
note("done")
while not select.select([0], [], [], 2)[0] and os.getppid() == parent: pass
database.close()
"""


class Shared:
    """The page that the preloaded library reads and writes."""

    def __init__(self, path, mode, nth):
        self.path = path
        error, _, call = mode.partition("-")
        chosen = [ERRORS.index(error), CALLS.index(call) if call else 0, nth]
        with open(path, "w+b") as file:
            file.write(struct.pack("=10Q", *chosen, *[0] * 7).ljust(4096, b"\0"))
            file.flush()
            self.map = mmap.mmap(file.fileno(), 4096)

    def read(self):
        """The counts of the calls, whether the error was injected, and whether into the WAL."""
        fields = struct.unpack_from("=10Q", self.map)
        return dict(zip(CALLS, fields[3:7])), bool(fields[7]), bool(fields[8])


def rows_of(path):
    """The verdict of SQLite and the value of each row."""
    database = sqlite3.connect(path, timeout=20)
    try:
        verdict = database.execute("PRAGMA integrity_check(3)").fetchone()[0].replace("\n", " ")
        return verdict[:160], dict(database.execute("SELECT id, v FROM item"))
    except sqlite3.Error as error:
        return str(error), {}
    finally:
        database.close()


class Point:
    """One run of the daemon with one failing call."""

    def __init__(self, program, library, mode, nth, directory):
        self.program, self.library, self.mode, self.nth = program, library, mode, nth
        self.directory, self.database = directory, f"{directory}/app.db"
        self.replica, self.notes_path = f"{directory}/replica", f"{directory}/notes"
        self.findings, self.notes, self.daemon, self.application = [], [], None, None

    def find(self, outcome, text):
        self.findings.append((outcome, " ".join(text.split())))

    def make_database(self):
        database = sqlite3.connect(self.database, isolation_level=None)
        database.execute("PRAGMA journal_mode=WAL")
        database.execute("CREATE TABLE item(id INTEGER PRIMARY KEY, v INTEGER, pad BLOB)")
        database.execute("BEGIN")
        database.executemany("INSERT INTO item VALUES(?, 0, zeroblob(400))",
                             ((row,) for row in range(1, ROWS + 1)))
        database.execute("COMMIT")
        database.close()

    def run(self):
        os.makedirs(self.directory, exist_ok=True)
        open(self.notes_path, "w").close()
        self.make_database()
        self.shared = Shared(f"{self.directory}/shared", self.mode, self.nth)
        config = f"{self.directory}/waltrail.toml"
        with open(config, "w") as file:
            file.write(f'[[database]]\npath = "{self.database}"\nreplica = "{self.replica}"\n'
                       'checkpoint-threshold = "256KiB"\nsync-interval = "200ms"\n')
        environment = {"LD_PRELOAD": self.library, "IO_ERRORS_SHARED": self.shared.path}
        self.daemon = Daemon(self.program, self.directory, config, environment)
        try:
            self.daemon.start()
            self.sync("at the start")
            self.work()
            self.check("while the daemon runs", self.database)
            self.sync("at the end")
            self.restore()
            _, is_fired, _ = self.shared.read()
            self.application.stdin.close()
            self.application.wait(30)
            self.daemon.ask_to_stop()
            code = self.daemon.wait()
            if code:
                self.notes.append(f"the stop ends with {code}")
            if code is None or code not in (0, 1, 15):
                self.find("daemon", f"the stop ends with {code}")
            self.check_stopped(is_fired)
        finally:
            self.daemon.end()
            if self.application:
                PROCESSES.end(self.application)
        if "panicked" in self.daemon.log():
            self.find("daemon", "the log holds a panic")
        self.calls, self.is_fired, self.is_wal = self.shared.read()
        if self.mode != "none" and not self.is_fired:
            self.find("not-reached", f"{self.calls}")
        return self

    def sync(self, when):
        if self.daemon.process.poll() is not None:
            self.find("daemon", f"{when}: ended by itself with {self.daemon.wait()}")
            self.daemon.start()
        # The daemon tries again after pauses of up to some seconds.
        problem = self.daemon.sync(self.database, 15)
        if problem:
            self.find("restore-differs", f"{when}: {problem}")

    def work(self):
        arguments = [sys.executable, "-I", "-S", "-c", APPLICATION, self.database, self.notes_path,
                     "1000" if self.nth % 2 else "0", str(ROWS)]
        with open(f"{self.directory}/application.log", "ab") as log:
            self.application = PROCESSES.start(arguments, stdin=subprocess.PIPE, stdout=log,
                                               stderr=log)
        def is_done():
            return self.application.poll() is not None or "done\n" in open(self.notes_path).read()
        if not PROCESSES.wait_until(is_done, 90):
            self.find("app-error", "the application hangs")
        self.expected = {row: {0} for row in range(1, ROWS + 1)}
        errors = collections.Counter()
        for line in open(self.notes_path).read().splitlines():
            kind, *words = line.split(" ", 4)
            if kind == "commit":
                self.expected[int(words[0])] = {int(words[1])}
            elif kind == "error":
                self.expected[int(words[0])].add(int(words[1]))
                errors[" ".join(words[2:])] += 1
        for text, count in errors.items():
            self.find("app-error", f"{text} ({count} times)")

    def check(self, when, path):
        verdict, rows = rows_of(path)
        if verdict != "ok":
            self.find("damaged", f"{when}: {verdict}")
            return verdict, rows
        wrong = [row for row, values in self.expected.items() if rows.get(row) not in values]
        if wrong:
            row = wrong[0]
            self.find("lost", f"{when}: {len(wrong)} rows, first {row}: {rows.get(row)} instead "
                      f"of {max(self.expected[row])}")
        return verdict, rows

    def restore(self):
        restored = f"{self.directory}/restored.db"
        code, output = waltrail(self.program, "restore", self.replica, "--output", restored)
        if code != 0:
            return self.find("restore-differs", f"restore: exit code {code}: {output[:160]}")
        if rows_of(restored) != rows_of(self.database):
            self.find("restore-differs", f"restored: {rows_of(restored)[0]}, other rows")
        code, output = waltrail(self.program, "verify", self.replica)
        if code not in (0, 1):
            self.find("restore-differs", f"verify: exit code {code}: {output[:160]}")

    def check_stopped(self, is_fired_before):
        alone, beside = f"{self.directory}/alone.db", f"{self.directory}/beside.db"
        wal = self.database + "-wal"
        length = os.path.getsize(wal) if os.path.exists(wal) else 0
        shutil.copyfile(self.database, alone)
        shutil.copyfile(self.database, beside)
        if length:
            shutil.copyfile(wal, beside + "-wal")
        found = self.check("after the stop", beside)
        # A call that fails at the stop itself leaves the WAL, as it must.
        if is_fired_before or not self.shared.read()[1]:
            if length:
                self.find("left-behind", f"-wal of {length} bytes")
            if rows_of(alone) != found:
                self.find("left-behind", f"app.db alone: {rows_of(alone)[0]}, other rows")


def build(work):
    """Compiles the library that is preloaded into the daemon."""
    source, library = f"{work}/io_errors.c", f"{work}/io_errors.so"
    with open(source, "w") as file:
        file.write(SHIM)
    subprocess.run(["gcc", "-O1", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    return library


def play(arguments, work):
    """All points; whether none failed."""
    library, begun = build(work), time.monotonic()
    counts = collections.defaultdict(collections.Counter)
    tally, failed, played = collections.Counter(), 0, 0

    def one(mode, nth):
        directory = tempfile.mkdtemp(prefix=f"{mode}-{nth}-", dir=work)
        return Point(arguments.program, library, mode, nth, directory).run()

    def report(point):
        found = {outcome for outcome, _ in point.findings}
        outcome = next((it for it in GRAVEST_FIRST if it in found), "ok")
        file = "" if not point.is_fired else "app.db-wal" if point.is_wal else "app.db"
        counts[f"{point.mode} {file}".strip()][outcome] += 1
        tally.update(point.notes)
        is_failed = outcome not in ("ok", "not-reached")
        if is_failed or arguments.verbose:
            texts = "; ".join(f"{kind}: {text}" for kind, text in point.findings)
            print(f"{outcome:15} {point.mode} {point.nth} {file}: {texts[:600]}\n"
                  f"    python3 tests/io_errors.py {arguments.program} --modes {point.mode} "
                  f"--nth {point.nth}", flush=True)
            if arguments.keep:
                print(f"    files: {point.directory}", flush=True)
        if not (is_failed and arguments.keep):
            shutil.rmtree(point.directory, ignore_errors=True)
        return is_failed

    pool = concurrent.futures.ThreadPoolExecutor(arguments.jobs)
    try:
        if arguments.nth:
            points = [(mode, arguments.nth) for mode in arguments.modes.split(",")]
        else:
            clean = list(pool.map(lambda nth: one("none", nth), [2, 1]))
            failed += sum(report(point) for point in clean)
            played += len(clean)
            limits = {call: max(it.calls[call] for it in clean) for call in CALLS}
            print(f"calls of clean runs: {limits}", flush=True)
            dice, points = random.Random(arguments.seed), []
            for mode in arguments.modes.split(","):
                limit = limits[mode.split("-")[1]]
                chosen = dice.sample(range(1, limit + 1), min(arguments.points, limit))
                points += [(mode, nth) for nth in chosen]
        for future in concurrent.futures.as_completed([pool.submit(one, *it) for it in points]):
            failed += report(future.result())
            played += 1
    except BaseException:
        PROCESSES.end_all()
        raise
    finally:
        pool.shutdown(cancel_futures=True)
    print(f"\n| mode, file | {' | '.join(OUTCOMES)} |\n| --- |" + " --- |" * len(OUTCOMES))
    for name in sorted(counts):
        print(f"| {name} | {' | '.join(str(counts[name][it] or '') for it in OUTCOMES)} |")
    for note, count in tally.most_common():
        print(f"note, {count} times: {note}")
    print(f"seed {arguments.seed}: {played} runs, {failed} failed, "
          f"{time.monotonic() - begun:.0f} s")
    return failed == 0


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program", nargs="?", default="target/release/waltrail")
    parser.add_argument("--points", type=int, default=8, help="sampled calls for each mode (8)")
    parser.add_argument("--modes", default=",".join(MODES), help=f"default: {','.join(MODES)}")
    parser.add_argument("--nth", type=int, help="only this call")
    parser.add_argument("--seed", type=int, default=int(time.time()) % 1_000_000)
    parser.add_argument("--jobs", type=int, default=4, help="runs at the same time (4)")
    parser.add_argument("--keep", action="store_true", help="keep the files of failing runs")
    parser.add_argument("--verbose", action="store_true", help="a line for each run")
    arguments = parser.parse_args()
    arguments.program = os.path.abspath(arguments.program)
    unknown = set(arguments.modes.split(",")) - set(MODES)
    if unknown or not os.access(arguments.program, os.X_OK):
        parser.error(f"no such mode or program: {', '.join(unknown) or arguments.program}")
    return in_work_directory(arguments.keep, lambda work: play(arguments, work))


if __name__ == "__main__":
    sys.exit(main())
