#!/usr/bin/env python3
"""Harms the files of a database that waltrail follows: the application must lose nothing.

  python3 tests/harm.py target/release/waltrail --rounds 150 --jobs 4
  python3 tests/harm.py --control --rounds 150             # no daemon: the harness itself must pass
  python3 tests/harm.py EXE --only main-mv,shm/killed      # cells by the parts of their names
  python3 tests/harm.py --cells                            # all cells, and why some are left out

A cell is TARGET/ACTION/DAEMON/APPLICATION, for example main-mv/replaced/polling/stopped. Each round
takes one cell, with delays from its seed, and runs it twice at the same time: with the daemon, and
as a control without one. Only harm that SQLite survives without waltrail counts: the class of a
cell says what the control allows.

  safe       no process has the database open at the event. Everything is checked.
  lone       the application has it open, in one connection, and survives the event as long as no
             other process opens the database. Everything is checked.
  loses      the control loses the commits of the WAL that was deleted, and nothing else. The daemon
             may lose no more: the database is an intact older state, and holds all that follows.
  unsafe     SQLite's rules are broken. Content is not checked.

The exit code is 0 if no round failed. A failing round is printed with the command that repeats it;
what it found may be a race: then `--rounds 20 --repeat` plays the same delays again and again.
"""
import argparse, collections, concurrent.futures, hashlib, os, random, re, select, shutil, signal
import sqlite3, subprocess, sys, tempfile, threading, time

TARGETS = ["shm", "wal", "both", "main-mv", "main-cp", "state"]
ACTIONS = ["removed", "replaced", "back"]
DAEMONS = ["polling", "checkpointing", "idle", "starting", "stopping"]
APPLICATIONS = ["running", "stopped", "killed"]
OUTCOMES = ["ok", "damaged", "lost", "app-error", "left-behind", "restore-differs", "daemon",
            "control-broken"]
GRAVEST_FIRST = ["damaged", "lost", "app-error", "daemon", "restore-differs", "left-behind"]
# Exit codes that docs/OPERATIONS.md lists for `replicate`.
DOCUMENTED_CODES = {0, 1, 10, 11, 12, 13, 14, 15, 16}
LEFT_OUT = [
    ("main-cp/removed", "a copy does not remove the database: see main-mv/removed"),
    ("shm, wal and both/back: the application starts meanwhile",
     "the old file would take the place of a new one: damage without waltrail, too"),
    ("main-mv and main-cp/replaced, main-mv/removed, killed: -wal and -shm stay",
     "SQLite applies the old WAL to the new database; here all three are removed, as SQLite asks"),
]


def safety(target, action, application):
    """The class of a cell, whatever the daemon does; None if it is left out."""
    if target == "main-cp" and action == "removed":
        return None
    if target == "state":
        return "safe"
    if application == "running":
        # SQLite does not delete the WAL of a file that was renamed, and applies it to the new one.
        if target == "main-mv" and action == "replaced":
            return "unsafe"
        if target in ("shm", "main-mv") or target == "wal" and action == "back":
            return "lone"
        return "unsafe"
    if application == "killed" and target in ("wal", "both") and action != "back":
        return "loses"
    return "safe"


CELLS = [(target, action, daemon, application)
         for target in TARGETS for action in ACTIONS for daemon in DAEMONS
         for application in APPLICATIONS if safety(target, action, application)]


# --- The database and its content ----------------------------------------------------------------

SCHEMA = """
CREATE TABLE IF NOT EXISTS item(
    id INTEGER PRIMARY KEY, n INTEGER, run INTEGER, sum TEXT, body TEXT);
CREATE INDEX IF NOT EXISTS item_sum ON item(sum);
CREATE TABLE IF NOT EXISTS mark(lineage TEXT, rows INTEGER, n INTEGER, run INTEGER);
"""
FRESH_ROWS = 200


def body(lineage, run, n):
    """What transaction `n` of a lineage writes. A run is one life of the application."""
    unit = hashlib.sha256(f"{lineage} {run} {n}".encode()).hexdigest()
    return unit * (3 + n % 18)


def item(lineage, rows, run, n):
    """The row of transaction `n`: each writes one row, and the rows take turns."""
    text = body(lineage, run, n)
    return n % rows, n, run, hashlib.sha256(text.encode()).hexdigest(), text


def make_database(path, lineage, rows, page_size):
    """A database in WAL mode as the first `rows` transactions of a lineage leave it, closed."""
    database = sqlite3.connect(path, isolation_level=None)
    database.execute(f"PRAGMA page_size={page_size}")
    database.execute("PRAGMA journal_mode=WAL")
    database.execute("PRAGMA synchronous=OFF")
    database.executescript("BEGIN;" + SCHEMA)
    items = [item(lineage, rows, 0, n) for n in range(1, rows + 1)]
    database.executemany("INSERT OR REPLACE INTO item VALUES(?, ?, ?, ?, ?)", items)
    database.execute("INSERT INTO mark VALUES(?, ?, ?, 0)", (lineage, rows, rows))
    database.execute("COMMIT")
    database.close()


def content(path, beside=()):
    """The verdict of SQLite, the mark and the rows. Reads a copy, so nothing beside it changes."""
    with tempfile.TemporaryDirectory(prefix="content-", dir=os.path.dirname(path)) as directory:
        copy = f"{directory}/copy.db"
        shutil.copyfile(path, copy)
        for suffix in beside:
            if os.path.exists(path + suffix):
                shutil.copyfile(path + suffix, copy + suffix)
        database = sqlite3.connect(copy)
        try:
            verdict = database.execute("PRAGMA integrity_check(3)").fetchone()[0]
            mark = database.execute("SELECT lineage, rows, n, run FROM mark").fetchall()
            rows = database.execute("SELECT id, n, run, sum, body FROM item ORDER BY id").fetchall()
        except sqlite3.Error as error:
            return f"{error}", None, None
        finally:
            database.close()
        return verdict.replace("\n", " ")[:160], mark, rows


class Oracle:
    """What the database must hold, from the file in which the application notes each commit."""

    def __init__(self, path, rows):
        self.path, self.rows = path, dict(rows, fresh=FRESH_ROWS)
        self.findings, self.errors = [], collections.Counter()

    def read(self, may_lose):
        """Replays the file. Findings are commits that were acknowledged and not found again."""
        lineage, last, run, pending = "old", self.rows["old"], 0, None
        history = {}
        for line in open(self.path, errors="replace").read().splitlines():
            kind, *words = line.split(" ")
            if kind == "error":
                self.errors[" ".join(words)] += 1
            elif kind == "event":
                pending = (words[0], int(words[1]))
            elif kind == "commit" and words[0] == lineage:
                last, run = int(words[1]), int(words[2])
                history[last] = run
            elif kind == "found":
                found, n = words[0], int(words[1])
                if pending or found != lineage:
                    if (found, n) != pending:
                        self.findings.append(f"found {found} {n}, expected {pending or lineage}")
                    lineage, last, history, pending = found, n, {}, None
                    continue
                # A commit can be complete when the application is killed before it notes it.
                if not (last <= n <= last + 1 or may_lose and n <= last):
                    self.findings.append(f"{last} was committed, {n} is found")
                if n == last + 1:
                    history[n] = run
                history = {key: value for key, value in history.items() if key <= n}
                last = n
        self.lineage, self.last, self.history = lineage, last, history
        return self

    def difference(self, mark, rows):
        """How this content differs from what was committed; None if it does not."""
        if len(mark) != 1:
            return f"{len(mark)} marks"
        lineage, _, n, _ = mark[0]
        if (lineage, n) != (self.lineage, self.last):
            return f"holds {lineage} {n}, committed was {self.lineage} {self.last}"
        count, expected = self.rows[lineage], []
        for row in range(count):
            newest = n - (n - row) % count
            if newest > 0:
                expected.append(item(lineage, count, self.history.get(newest, 0), newest))
        if rows == sorted(expected):
            return None
        wrong = [(e[:3], g[:3]) for e, g in zip(sorted(expected), rows) if e != g]
        return (f"{len(rows)} rows of {len(expected)}, {len(wrong)} wrong, first (id, n, run): "
                + " instead of ".join(str(it) for it in reversed(wrong[0] if wrong else ("", ""))))


# --- The application -----------------------------------------------------------------------------

def application(path, oracle, run, autocheckpoint, synchronous):
    """Commits numbered transactions and notes each in the oracle; commands come on stdin."""
    notes = os.open(oracle, os.O_WRONLY | os.O_APPEND)
    run, kept = int(run), []
    errors = 0

    def note(*words):
        # write(2) without fsync: the harness kills processes, not the machine.
        os.write(notes, (" ".join(str(word) for word in words) + "\n").encode())

    def connect():
        database = sqlite3.connect(path, isolation_level=None, timeout=5)
        database.execute("PRAGMA journal_mode=WAL")
        database.execute(f"PRAGMA synchronous={synchronous}")
        database.execute(f"PRAGMA wal_autocheckpoint={autocheckpoint}")
        if not database.execute("SELECT 1 FROM sqlite_master WHERE name='mark'").fetchone():
            database.executescript("BEGIN IMMEDIATE;" + SCHEMA)
            database.execute("INSERT INTO mark VALUES('fresh', ?, 0, ?)", (FRESH_ROWS, run))
            database.execute("COMMIT")
        return database

    def find(database):
        lineage, rows, n, last_run = database.execute("SELECT * FROM mark").fetchone()
        note("found", lineage, n, last_run)
        return lineage, rows, n

    def commit(database, lineage, rows, n):
        row = item(lineage, rows, run, n)
        database.execute("BEGIN IMMEDIATE")
        database.execute("INSERT OR REPLACE INTO item VALUES(?, ?, ?, ?, ?)", row)
        database.execute("UPDATE mark SET n = ?, run = ?", (n, run))
        database.execute("COMMIT")
        note("commit", lineage, n, run, row[3][:16])

    pauses = {"fast": 0.003, "slow": 0.08, "quiet": 3600}
    database, mode, waiting, parent = None, "quiet", b"", os.getppid()
    while True:
        try:
            if database is None:
                database = connect()
                lineage, rows, n = find(database)
                note("ready", run)
            pause = pauses[mode]
            if select.select([0], [], [], min(pause, 2))[0]:
                read = os.read(0, 4096)
                waiting += read or b"stop 0\n"
                while b"\n" in waiting:
                    line, waiting = waiting.split(b"\n", 1)
                    command, number, *more = line.decode().split(" ")
                    if command == "stop":
                        for each in [database, *kept]:
                            each.close()
                        return 0
                    if command == "checkpoint":
                        database.execute(f"PRAGMA wal_checkpoint({more[0]})").fetchone()
                    elif command == "burst":
                        for _ in range(int(more[0])):
                            commit(database, lineage, rows, n + 1)
                            n += 1
                    elif command == "pool":
                        # As pools do: another connection, while the first one stays open.
                        kept.append(database)
                        database = connect()
                        lineage, rows, n = find(database)
                    else:
                        mode = command
                    note("done", number)
            elif os.getppid() != parent:
                return 4
            elif mode != "quiet":
                commit(database, lineage, rows, n + 1)
                n += 1
        except sqlite3.Error as error:
            name = getattr(error, "sqlite_errorname", "") or type(error).__name__
            note("error", name, error)
            errors += 1
            if errors >= 20:
                return 3
            time.sleep(0.1)
            if database is not None:
                try:
                    if database.in_transaction:
                        database.execute("ROLLBACK")
                    database.close()
                except sqlite3.Error as second:
                    note("error", "close", second)
                database = None


# --- Processes -----------------------------------------------------------------------------------

class Stopped(Exception):
    """The harness was interrupted."""


class Processes:
    """All processes of this harness, so that none outlives it."""

    def __init__(self):
        self.lock, self.alive, self.is_stopping = threading.Lock(), set(), threading.Event()

    def start(self, arguments, **options):
        with self.lock:
            if self.is_stopping.is_set():
                raise Stopped
            process = subprocess.Popen(arguments, **options)
            self.alive.add(process)
            return process

    def end(self, process):
        """Kills a process that is still running, and forgets it."""
        if process.poll() is None:
            process.kill()
        process.wait()
        with self.lock:
            self.alive.discard(process)

    def end_all(self):
        self.is_stopping.set()
        with self.lock:
            for process in self.alive:
                if process.poll() is None:
                    process.kill()

    def pause(self, seconds):
        if self.is_stopping.wait(seconds):
            raise Stopped

    def wait_until(self, is_true, timeout):
        """Whether the condition came true within `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while not is_true():
            if time.monotonic() > deadline:
                return False
            self.pause(0.02)
        return True


PROCESSES = Processes()


def waltrail(program, *arguments, timeout=60):
    """Runs a command to its end; exit code and output."""
    process = PROCESSES.start([program, *arguments], stdin=subprocess.DEVNULL,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        output, _ = process.communicate(timeout=timeout)
        return process.returncode, output.strip()
    except subprocess.TimeoutExpired:
        return None, f"no end after {timeout} s"
    finally:
        PROCESSES.end(process)


class Daemon:
    """One database's daemon: started, stopped, started again."""

    def __init__(self, program, directory, config, environment=None):
        self.program, self.log_path, self.config = program, f"{directory}/daemon.log", config
        self.environment = dict(os.environ, **(environment or {}))
        self.process, self.codes = None, []

    def start(self):
        with open(self.log_path, "ab") as log:
            arguments = [self.program, "replicate", "--config", self.config]
            self.process = PROCESSES.start(arguments, stdin=subprocess.DEVNULL, stdout=log,
                                           stderr=log, env=self.environment)

    def ask_to_stop(self):
        self.process.send_signal(signal.SIGTERM)

    def wait(self, timeout=20):
        """The exit code; None if the daemon had to be killed."""
        try:
            code = self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            code = None
        self.end()
        self.codes.append(code)
        return code

    def end(self):
        if self.process:
            PROCESSES.end(self.process)
            self.process = None

    def has_open(self, path):
        directory = f"/proc/{self.process.pid}/fd"
        try:
            return any(os.readlink(f"{directory}/{fd}").startswith(path)
                       for fd in os.listdir(directory))
        except OSError:
            return True

    def log(self):
        try:
            return re.sub(r"\x1b\[[0-9;]*m", "", open(self.log_path, errors="replace").read())
        except FileNotFoundError:
            return ""

    def sync(self, path, timeout=8):
        """None when everything is confirmed; otherwise what the last attempt says."""
        deadline = time.monotonic() + timeout
        while True:
            code, output = waltrail(self.program, "sync", path, "--timeout", "10s")
            if code == 0:
                return None
            if time.monotonic() > deadline or self.process.poll() is not None:
                return f"sync: exit code {code}: {output[:160]}"
            PROCESSES.pause(0.2)


# --- One round -----------------------------------------------------------------------------------

class Plan:
    """The delays and choices of a round. The control has the same ones."""

    def __init__(self, cell, seed):
        dice = random.Random(f"{'/'.join(cell)} {seed}")
        target, _, daemon, application_ = cell
        self.page_size = dice.choice([1024, 4096])
        self.rows = {"old": dice.randint(150, 450), "new": dice.randint(100, 600)}
        self.autocheckpoint = dice.choice([1000, 1000, 200, 0])
        self.synchronous = dice.choice(["NORMAL", "FULL"])
        self.warm_up = dice.uniform(0.3, 0.9)
        # Bursts and checkpoints until the WAL is restarted, instead of a steady flow.
        self.has_bursts = dice.random() < 0.5 and daemon not in ("checkpointing", "idle")
        self.after_bursts = dice.choice([0, 0.05, 0.2, 0.5])
        self.quiet_before = dice.uniform(0, 1.4) if dice.random() < 0.7 else None
        self.mode = "fast" if daemon == "checkpointing" else dice.choice(["fast", "slow"])
        self.after_stop = dice.choice([dice.uniform(0.02, 0.3), dice.uniform(0.3, 2)])
        self.after_kill = dice.uniform(0, 0.25)
        self.daemon_delay = dice.uniform(0, 0.35)
        self.away = dice.uniform(0, 0.3) if application_ == "killed" else dice.uniform(0, 1)
        self.before_start = (dice.uniform(0, 0.2) if application_ == "killed"
                             else dice.choice([dice.uniform(0, 0.2), dice.uniform(0.2, 1.5)]))
        self.work_after = [dice.uniform(0.2, 0.7), dice.uniform(0.1, 0.5)]
        self.checkpoint = dice.choice([None, "PASSIVE", "FULL", "RESTART", "TRUNCATE"])
        self.quiet_after = dice.choice([dice.uniform(0, 0.3), dice.uniform(0.3, 1.5)])
        can_repeat = application_ != "running" and target in ("shm", "wal", "both", "state")
        self.cycles = dice.choice([1, 2, 3, 4]) if can_repeat and daemon != "idle" else 1
        self.first_daemon = dice.choice([None, signal.SIGTERM, signal.SIGKILL])
        self.starts_again = dice.random() < 0.6
        self.stops_before_idle = dice.random() < 0.5
        self.replacement = dice.choice(["empty", "copy", "noise"])
        self.end = dice.choice(["app-first", "app-first", "daemon-first", "no-sync"])


class Round:
    """One cell, with the daemon (`program`) or without it."""

    def __init__(self, program, cell, seed, directory):
        self.program, self.cell, self.directory = program, cell, directory
        self.target, self.action, self.state, self.application = cell
        self.safety = safety(self.target, self.action, self.application)
        self.plan = Plan(cell, seed)
        self.home = f"{directory}/data"
        self.database, self.new = f"{self.home}/app.db", f"{directory}/new.db"
        self.oracle_path, self.replica = f"{directory}/oracle", f"{directory}/replica"
        self.findings, self.notes = [], []
        self.process, self.daemon, self.runs, self.commands = None, None, 0, 0
        self.is_replaced = False

    # The application.

    def start_application(self):
        self.runs += 1
        autocheckpoint = 0 if self.safety == "loses" else self.plan.autocheckpoint
        arguments = [sys.executable, "-I", "-S", os.path.abspath(__file__), "--application",
                     self.database, self.oracle_path, str(self.runs), str(autocheckpoint),
                     self.plan.synchronous]
        with open(f"{self.directory}/application.log", "ab") as log:
            self.process = PROCESSES.start(arguments, stdin=subprocess.PIPE, stdout=log, stderr=log)
        self.wait_for_note(f"ready {self.runs}")

    def wait_for_note(self, line):
        def is_there():
            if self.process.poll() is not None:
                return True
            return f"\n{line}\n" in "\n" + open(self.oracle_path, errors="replace").read()
        if not PROCESSES.wait_until(is_there, 30):
            self.find("app-error", f"the application hangs before {line!r}")

    def tell(self, command, *more):
        """Gives the application a command and waits until it is done."""
        self.commands += 1
        try:
            line = " ".join([command, str(self.commands), *more]) + "\n"
            self.process.stdin.write(line.encode())
            self.process.stdin.flush()
        except OSError:
            return
        self.wait_for_note(f"done {self.commands}")

    def stop_application(self):
        try:
            self.process.stdin.write(b"stop 0\n")
            self.process.stdin.close()
        except OSError:
            pass
        try:
            code = self.process.wait(30)
        except subprocess.TimeoutExpired:
            code = None
        PROCESSES.end(self.process)
        if code:
            self.find("app-error", f"the application ended with {code}")
        elif code is None:
            self.find("app-error", "the application does not end")

    def kill_application(self):
        PROCESSES.end(self.process)

    # The event.

    def note_event(self, lineage, last):
        with open(self.oracle_path, "ab", buffering=0) as notes:
            notes.write(f"event {lineage} {last}\n".encode())

    def harm(self):
        """Does to the files what the cell says."""
        suffixes = {"shm": ["-shm"], "wal": ["-wal"], "both": ["-wal", "-shm"]}
        if self.target in suffixes:
            return self.harm_files([self.database + it for it in suffixes[self.target]])
        if self.target == "state":
            return self.harm_state(f"{self.home}/.app.db-waltrail")
        if self.action == "back":
            away = f"{self.directory}/away.db"
            if self.target == "main-cp":
                shutil.copyfile(self.database, away)
                PROCESSES.pause(self.plan.away)
                return shutil.copyfile(away, self.database)
            os.rename(self.database, away)
            PROCESSES.pause(self.plan.away)
            return os.rename(away, self.database)
        if self.application == "killed":
            self.harm_files([self.database + "-wal", self.database + "-shm"], "removed")
        self.is_replaced = self.action == "replaced"
        if self.action == "removed":
            self.note_event("fresh", 0)
            os.remove(self.database)
        else:
            self.note_event("new", self.plan.rows["new"])
            shutil.copyfile(self.new, f"{self.directory}/put.db")
            if self.target == "main-mv":
                os.rename(f"{self.directory}/put.db", self.database)
            else:
                shutil.copyfile(f"{self.directory}/put.db", self.database)

    def harm_files(self, paths, action=None):
        action = action or self.action
        there = [it for it in paths if os.path.exists(it)]
        for path in there:
            away = f"{self.directory}/{os.path.basename(path)}.away"
            if action == "replaced" and path.endswith("-wal"):
                # Another WAL would be applied by SQLite itself; an empty one is none.
                open(away, "wb").close()
                os.rename(away, path)
            elif action == "replaced":
                with open(away, "wb") as file:
                    old = open(path, "rb").read()
                    file.write({"empty": b"", "copy": old, "noise": os.urandom(len(old))}
                               [self.plan.replacement])
                os.rename(away, path)
            elif action == "removed":
                # The daemon may remove the same file in the same moment.
                try:
                    os.remove(path)
                except FileNotFoundError:
                    pass
            else:
                try:
                    os.rename(path, away)
                except FileNotFoundError:
                    pass
        if action == "back" and there:
            PROCESSES.pause(self.plan.away)
            for path in there:
                away = f"{self.directory}/{os.path.basename(path)}.away"
                if os.path.exists(away):
                    os.rename(away, path)

    def harm_state(self, path):
        if not os.path.isdir(path):
            return self.notes.append("no state directory") if self.program else None
        away, copy = f"{self.directory}/state.away", f"{self.home}/.state.copy"
        for each in (away, copy):
            shutil.rmtree(each, ignore_errors=True)
        if self.action == "removed":
            return shutil.rmtree(path, ignore_errors=True)
        if self.action == "replaced":
            # -a keeps sockets; a file that goes meanwhile is no reason to fail.
            waltrail("cp", "-a", path, copy)
        os.rename(path, away)
        if self.action == "replaced":
            os.rename(copy, path)
        else:
            PROCESSES.pause(self.plan.away)
            if os.path.isdir(path):
                shutil.rmtree(path, ignore_errors=True)
            os.rename(away, path)

    def check_untouched(self):
        """Before an application has opened it, the new database is as it was put there."""
        if self.is_replaced and (self.application != "running" or self.target == "main-mv"):
            if open(self.database, "rb").read() != open(self.new, "rb").read():
                self.find("damaged", "the daemon wrote to the new database before the application "
                          "opened it" if self.program else "the new database was written to")
            self.is_replaced = False

    # The daemon.

    def write_config(self):
        path = f"{self.directory}/waltrail.toml"
        where = f"{self.home}/*.db" if self.state == "idle" else self.database
        with open(path, "w") as file:
            # With 0 each database becomes idle: at once if there was no commit since the daemon's
            # start, otherwise 10 to 20 seconds after the last one.
            file.write(f'open-databases = {0 if self.state == "idle" else 16}\n'
                       f'[[database]]\npath = "{where}"\n'
                       f'replica = "{self.replica}"\ncheckpoint-threshold = "256KiB"\n'
                       'sync-interval = "200ms"\n')
        if self.state == "idle":
            for number in (1, 2):
                make_database(f"{self.home}/other-{number}.db", "other", 5, 4096)
            self.replica += "/app.db"
        return path

    def supervise(self):
        """Starts a daemon that ended by itself again, as a service manager does."""
        if self.daemon and self.daemon.process and self.daemon.process.poll() is not None:
            code = self.daemon.wait()
            self.notes.append(f"the daemon ended by itself with {code}")
            self.daemon.start()

    def begin_daemon(self):
        """Brings the daemon to where the application can start."""
        self.daemon = Daemon(self.program, self.directory, self.write_config())
        if self.state == "starting" and not self.plan.first_daemon:
            return
        self.daemon.start()
        # `sync` opens an idle database: wait_for_idle waits instead.
        problem = self.state != "idle" and self.daemon.sync(self.database)
        if problem:
            self.find("daemon", f"at the start: {problem}")
        if self.state == "starting":
            self.daemon.process.send_signal(self.plan.first_daemon)
            self.daemon.wait()

    def wait_for_idle(self):
        """Starts the daemon of an idle round, and waits until it has released the database."""
        def is_idle():
            snapshots = f"{self.replica}/snap"
            is_shipped = os.path.isdir(snapshots) and os.listdir(snapshots)
            return is_shipped and not self.daemon.has_open(self.database)
        if self.program and self.state == "idle":
            self.begin_daemon()
            if not PROCESSES.wait_until(is_idle, 24):
                self.notes.append("not idle")

    # The round.

    def find(self, outcome, text):
        self.findings.append((outcome, " ".join(text.split())))

    def run(self):
        plan = self.plan
        os.makedirs(self.home)
        open(self.oracle_path, "w").close()
        make_database(self.database, "old", plan.rows["old"], plan.page_size)
        make_database(self.new, "new", plan.rows["new"], plan.page_size)
        try:
            if self.program and self.state != "idle":
                self.begin_daemon()
            self.start_application()
            for cycle in range(plan.cycles):
                self.cycle(cycle)
            self.finish()
            self.check()
        except FileNotFoundError as error:
            if self.safety != "unsafe":
                self.find("lost", f"a file is missing: {error}")
        finally:
            if self.daemon:
                self.daemon.end()
            if self.process:
                PROCESSES.end(self.process)
        return self

    def bursts(self):
        """Commits and checkpoints in turns: the WAL is restarted over a complete main file."""
        for count, pause in ((6, 0), (6, 0.1), (21, 0)):
            self.tell("burst", str(count))
            PROCESSES.pause(pause)
            if not pause:
                self.tell("checkpoint", "PASSIVE")

    def cycle(self, cycle):
        """Work, the application's transition, the event, the application's next start, work."""
        plan, is_first = self.plan, cycle == 0
        if plan.has_bursts:
            self.bursts()
            PROCESSES.pause(plan.after_bursts)
        else:
            self.tell(plan.mode)
            PROCESSES.pause(plan.warm_up)
        is_quiet = plan.quiet_before is not None and not plan.has_bursts
        if self.state == "idle" or self.state == "polling" and is_quiet:
            self.tell("quiet")
            if self.state == "polling":
                PROCESSES.pause(plan.quiet_before)
        is_stopped = self.state == "idle" and self.application == "stopped"
        if is_stopped and plan.stops_before_idle:
            self.stop_application()
        self.wait_for_idle()
        if self.application == "stopped":
            if not (is_stopped and plan.stops_before_idle):
                self.stop_application()
            PROCESSES.pause(plan.after_stop)
        elif self.application == "killed":
            self.kill_application()
            PROCESSES.pause(plan.after_kill)
        if self.daemon and is_first and self.state == "starting":
            self.daemon.start()
        elif self.daemon and is_first and self.state == "stopping":
            self.daemon.ask_to_stop()
        if is_first and self.state in ("starting", "stopping"):
            PROCESSES.pause(plan.daemon_delay)
        self.harm()
        PROCESSES.pause(plan.before_start)
        if self.application == "running":
            if self.safety == "unsafe" and self.target != "main-mv":
                self.tell("pool")
            self.tell("fast")
            PROCESSES.pause(plan.work_after[0])
            if self.target == "main-mv" and self.action != "back":
                self.stop_application()
                self.check_untouched()
                self.start_application()
        else:
            self.check_untouched()
            self.start_application()
        if self.daemon and is_first and self.state == "stopping":
            # Not before the application: a service manager waits for the old process, too.
            self.daemon.wait()
            if plan.starts_again:
                self.daemon.start()
        self.tell("fast")
        PROCESSES.pause(plan.work_after[0])
        if plan.checkpoint:
            self.tell("checkpoint", plan.checkpoint)
        PROCESSES.pause(plan.work_after[1])

    def finish(self):
        """Quiet, then a clean stop of both. What the replica holds is restored before."""
        plan = self.plan
        self.tell("quiet")
        PROCESSES.pause(plan.quiet_after)
        self.supervise()
        has_daemon = self.daemon and self.daemon.process
        if plan.end != "daemon-first":
            self.stop_application()
        if has_daemon:
            if plan.end != "no-sync":
                problem = self.daemon.sync(self.database)
                if problem and self.safety == "lone" and plan.end == "daemon-first":
                    # The application still uses a removed file. The daemon keeps out, and says so.
                    self.notes.append("sync is refused while the application uses a removed file")
                else:
                    if problem:
                        self.find("restore-differs", problem)
                    self.restore()
            if self.daemon.process.poll() is None:
                self.daemon.ask_to_stop()
            code = self.daemon.wait()
            if plan.end == "no-sync":
                self.restore()
            if code:
                self.notes.append(f"the stop ends with {code}")
        if plan.end == "daemon-first":
            self.stop_application()

    def restore(self):
        """Restores and verifies. The application is quiet, so the content is that of the end."""
        if self.safety == "unsafe":
            return
        self.restored = f"{self.directory}/restored.db"
        code, output = waltrail(self.program, "restore", self.replica, "--output", self.restored)
        if code != 0:
            self.find("restore-differs", f"restore: exit code {code}: {output[-160:]}")
            self.restored = None
        code, output = waltrail(self.program, "verify", self.replica)
        if code == 1:
            findings = [it for it in output.splitlines() if it.startswith("degraded")]
            self.notes.append("verify: " + " ".join((findings or [output])[0].split())[:120])
        elif code != 0:
            self.find("restore-differs", f"verify: exit code {code}: {output[-160:]}")

    restored = None

    def check(self):
        """Everything is stopped: compares the files with the oracle."""
        oracle = Oracle(self.oracle_path, self.plan.rows).read(self.safety == "loses")
        self.oracle = oracle
        if self.daemon:
            for code in self.daemon.codes:
                if code not in DOCUMENTED_CODES and not (
                        self.state == "starting" and code == -signal.SIGKILL):
                    self.find("daemon", f"exit code {code}")
            panics = [it for it in self.daemon.log().splitlines() if "panicked" in it]
            if panics:
                self.find("daemon", panics[0][:160])
        if self.safety == "unsafe":
            return
        for text in oracle.findings:
            self.find("lost", text)
        verdict, mark, rows = content(self.database, ["-wal"])
        if verdict != "ok":
            self.find("damaged", f"integrity: {verdict}")
        elif oracle.difference(mark, rows):
            self.find("lost", oracle.difference(mark, rows))
        wal = self.database + "-wal"
        length = os.path.getsize(wal) if os.path.exists(wal) else 0
        if length:
            self.find("left-behind", f"-wal of {length} bytes")
        if (verdict, mark, rows) != (alone := content(self.database)) and verdict == "ok":
            self.find("left-behind", f"app.db alone: {alone[0]}, {alone[1]} instead of {mark}")
        if self.restored and verdict == "ok":
            found = content(self.restored)
            if found != (verdict, mark, rows):
                self.find("restore-differs", f"restored: {found[0]}, {found[1]}; "
                          f"{len(found[2] or [])} rows; the database: {mark}, {len(rows)} rows")


def run_pair(program, cell, seed, directory):
    """A round and its control at the same time. Outcome, findings and notes."""
    control = Round(None, cell, seed, f"{directory}/control")
    if not program:
        control.run()
        errors = [("app-error", text) for text in control.oracle.errors]
        findings = control.findings + (errors if control.safety != "unsafe" else [])
        if control.safety == "unsafe":
            return "control-broken", [], [f"{len(errors)} kinds of errors"]
        return worst(findings), findings, []
    harmed = Round(program, cell, seed, f"{directory}/harmed")
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        for future in [pool.submit(control.run), pool.submit(harmed.run)]:
            future.result()
    findings, notes = harmed.findings, harmed.notes
    if control.safety == "unsafe":
        findings = [it for it in findings if it[0] in ("daemon", "damaged")]
        return worst(findings) if findings else "control-broken", findings, notes
    problems = control.findings + [("app-error", text) for text in control.oracle.errors]
    if problems:
        findings = [it for it in findings if it[0] == "daemon"]
        notes = notes + [f"control: {outcome}: {text}" for outcome, text in problems[:2]]
        return worst(findings) if findings else "control-broken", findings, notes
    findings += [("app-error", f"{text} ({count} times)")
                 for text, count in harmed.oracle.errors.items()]
    return worst(findings), findings, notes


def worst(findings):
    """The gravest outcome."""
    found = {outcome for outcome, _ in findings}
    return next((it for it in GRAVEST_FIRST if it in found), "ok")


# --- The matrix ----------------------------------------------------------------------------------

def is_chosen(cell, only):
    return not only or any(set(words.split("/")) <= set(cell) for words in only.split(","))


def print_cells():
    print("| target | action | running | stopped | killed |\n| --- | --- | --- | --- | --- |")
    for target in TARGETS:
        for action in ACTIONS:
            classes = [safety(target, action, it) or "left out" for it in APPLICATIONS]
            print(f"| {target} | {action} | {' | '.join(classes)} |")
    print("\n| left out | why |\n| --- | --- |")
    for what, why in LEFT_OUT:
        print(f"| {what} | {why} |")
    print(f"\n{len(CELLS)} cells: each with the daemon {', '.join(DAEMONS)}")


def print_table(counts):
    """Cell classes and outcomes; columns without a count are shown, too."""
    print(f"\n| target/action/application (class) | {' | '.join(OUTCOMES)} |")
    print("| --- |" + " --- |" * len(OUTCOMES))
    total = collections.Counter()
    for name in sorted(counts):
        total.update(counts[name])
        print(f"| {name} | {' | '.join(str(counts[name][it] or '') for it in OUTCOMES)} |")
    print(f"| total | {' | '.join(str(total[it]) for it in OUTCOMES)} |", flush=True)


def play(arguments, work):
    """All rounds; whether none failed."""
    chosen = [it for it in CELLS if is_chosen(it, arguments.only)]
    if not chosen:
        sys.exit("no cell has such a name: see --cells")
    random.Random(arguments.seed).shuffle(chosen)
    rounds = arguments.rounds or len(chosen)
    counts = collections.defaultdict(collections.Counter)
    by_daemon = collections.defaultdict(collections.Counter)
    tally = collections.Counter()
    failed, begun = 0, time.monotonic()
    program = None if arguments.control else arguments.program

    def one(index):
        cell, seed = chosen[index % len(chosen)], arguments.seed + (0 if arguments.repeat else index)
        directory = tempfile.mkdtemp(prefix=f"round-{index}-", dir=work)
        started = time.monotonic()
        result = run_pair(program, cell, seed, directory)
        return index, cell, seed, directory, time.monotonic() - started, result

    pool = concurrent.futures.ThreadPoolExecutor(arguments.jobs)
    try:
        pending = {pool.submit(one, index) for index in range(rounds)}
        for future in concurrent.futures.as_completed(pending):
            index, cell, seed, directory, seconds, (outcome, findings, notes) = future.result()
            target, action, daemon, application_ = cell
            class_ = safety(target, action, application_)
            counts[f"{target}/{action}/{application_} ({class_})"][outcome] += 1
            by_daemon[daemon][outcome] += 1
            tally.update(re.sub(r"\d{3,}", "N", note)[:100] for note in notes)
            name, command = "/".join(cell), "--control" if not program else program
            if findings or outcome == "control-broken" and class_ != "unsafe" or arguments.verbose:
                failed += bool(findings)
                texts = "; ".join(f"{kind}: {text}" for kind, text in findings) or "; ".join(notes)
                print(f"{outcome:15} {name} seed {seed}, {seconds:.1f} s: {texts[:600]}\n"
                      f"    python3 tests/harm.py {command} --only {name} --seed {seed} "
                      "--rounds 1" + (f"    files: {directory}" if arguments.keep else ""),
                      flush=True)
            if not (arguments.keep and findings):
                shutil.rmtree(directory, ignore_errors=True)
    except BaseException:
        PROCESSES.end_all()
        raise
    finally:
        pool.shutdown(cancel_futures=True)
    print_table(counts)
    print_table(by_daemon)
    for note, count in tally.most_common():
        print(f"note, {count} times: {note}")
    print(f"seed {arguments.seed}: {rounds} rounds of {len(chosen)} cells, {failed} failed, "
          f"{time.monotonic() - begun:.0f} s")
    return failed == 0


def interrupt(*_):
    raise KeyboardInterrupt


def in_work_directory(keep, action):
    """Runs `action` with a temporary directory. Ends all processes, also on Ctrl-C and SIGTERM."""
    # A shell that starts a background job has SIGINT ignored: both are set.
    signal.signal(signal.SIGTERM, interrupt)
    signal.signal(signal.SIGINT, interrupt)
    work = tempfile.mkdtemp(prefix="harm-")
    try:
        return 0 if action(work) else 1
    except KeyboardInterrupt:
        return 130
    finally:
        PROCESSES.end_all()
        if not keep:
            shutil.rmtree(work, ignore_errors=True)


def main():
    if sys.argv[1:2] == ["--application"]:
        return application(*sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program", nargs="?", default="target/release/waltrail")
    parser.add_argument("--rounds", type=int, help="default: one for each chosen cell")
    parser.add_argument("--seed", type=int, default=int(time.time()) % 1_000_000)
    parser.add_argument("--repeat", action="store_true",
                        help="all rounds with the same seed: a race may need several")
    parser.add_argument("--jobs", type=int, default=4, help="rounds at the same time (4)")
    parser.add_argument("--only", help="cells with all parts of one of these names: a/b,c")
    parser.add_argument("--keep", action="store_true", help="keep the files of failing rounds")
    parser.add_argument("--verbose", action="store_true", help="a line for each round")
    parser.add_argument("--control", action="store_true", help="without the daemon")
    parser.add_argument("--cells", action="store_true", help="print the cells and exit")
    arguments = parser.parse_args()
    if arguments.cells:
        return print_cells()
    if not arguments.control:
        arguments.program = os.path.abspath(arguments.program)
        if not os.access(arguments.program, os.X_OK):
            parser.error(f"no such program: {arguments.program}")
    return in_work_directory(arguments.keep, lambda work: play(arguments, work))


if __name__ == "__main__":
    sys.exit(main())
