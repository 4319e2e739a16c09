#!/usr/bin/env python3
"""Kills the daemon, the application, or both, at random moments, under load, and compares what a restore gives with what was written.

  WALTRAIL=target/release/waltrail python3 benches/chaos.py --replica s3://bucket/chaos --kills 100 [--seed 1]

Credentials and endpoint come from the environment. Each transaction's content follows from its number, so the right content of
every state is known without having noted it. Ends with exit code 1 at the first difference, and says how to repeat it.
"""
import argparse, hashlib, os, random, shutil, signal, sqlite3, subprocess, sys, tempfile, time

ROWS = 500


def body(number):
    """What transaction `number` writes."""
    return hashlib.sha256(str(number).encode()).hexdigest() * (1 + number % 40)


def expected(last):
    """The rows after transaction `last`: of each id the newest that wrote it."""
    return {row: body(newest) for row in range(ROWS) if (newest := last - (last - row) % ROWS) > 0}


def write(path):
    """An application: numbered transactions, until it is killed."""
    database = sqlite3.connect(path, isolation_level=None, timeout=10)
    database.execute("PRAGMA synchronous=NORMAL")
    (number,) = database.execute("SELECT n FROM mark").fetchone()
    while True:
        number += 1
        database.execute("BEGIN IMMEDIATE")
        database.execute("INSERT OR REPLACE INTO item VALUES(?, ?)", (number % ROWS, body(number)))
        database.execute("UPDATE mark SET n = ?", (number,))
        database.execute("COMMIT")
        if number % 400 == 0:
            database.execute("PRAGMA wal_checkpoint(%s)" % random.choice(["PASSIVE", "FULL", "RESTART", "TRUNCATE"]))
        time.sleep(0.002)


def check(path, at_least):
    """The number of the restored state; an exception when anything in it is not as it was written."""
    database = sqlite3.connect(path)
    (verdict,) = database.execute("PRAGMA integrity_check").fetchone()
    (number,) = database.execute("SELECT n FROM mark").fetchone()
    rows = dict(database.execute("SELECT id, body FROM item"))
    database.close()
    if verdict != "ok" or rows != expected(number):
        raise AssertionError(f"the state {number} is restored wrong: {verdict}")
    if number < at_least:
        raise AssertionError(f"{at_least} was confirmed, and {number} is restored")
    return number


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replica", help="where to replicate to")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--write", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.write:
        return write(arguments.write)
    if not arguments.replica:
        parser.error("--replica says where")
    program, work = os.environ.get("WALTRAIL", "waltrail"), tempfile.mkdtemp(prefix="chaos-")
    database, restored, random_ = f"{work}/app.db", f"{work}/restored.db", random.Random(arguments.seed)
    setup = sqlite3.connect(database)
    setup.executescript("PRAGMA journal_mode=WAL; CREATE TABLE item(id INTEGER PRIMARY KEY, body TEXT); CREATE TABLE mark(n); INSERT INTO mark VALUES(0);")
    setup.close()
    log = open(f"{work}/daemon.log", "ab")
    confirmed, counts, begun = 0, {"daemon": 0, "application": 0, "both": 0}, time.time()

    def start_writer():
        return subprocess.Popen([sys.executable, __file__, "--write", database])

    def start_daemon():
        return subprocess.Popen([program, "replicate", database, arguments.replica], stderr=log)

    def restore():
        command = [program, "restore", arguments.replica, "--force", "--quiet", "--output", restored]
        return subprocess.run(command, capture_output=True, text=True)

    def sync():
        """Whether everything that was committed before is confirmed. A daemon that has just started may not listen yet."""
        for _ in range(100):
            done = subprocess.run([program, "sync", database, "--timeout", "120s"], capture_output=True, text=True)
            if "no daemon" not in done.stderr:
                break
            time.sleep(0.1)
        return done.returncode == 0

    writer, daemon = start_writer(), start_daemon()
    try:
        # Something to restore has to be there first.
        sync()
        for kill in range(arguments.kills):
            time.sleep(random_.uniform(0.05, 2.0))
            if random_.random() < 0.3:
                known = sqlite3.connect(database, timeout=10)
                (number,) = known.execute("SELECT n FROM mark").fetchone()
                known.close()
                confirmed = number if sync() else confirmed
            victim = random_.choice(list(counts))
            counts[victim] += 1
            if victim != "application":
                daemon.send_signal(signal.SIGKILL)
                daemon.wait()
            if victim != "daemon":
                writer.send_signal(signal.SIGKILL)
                writer.wait()
            done = restore()
            if done.returncode != 0:
                raise AssertionError(f"restore: exit code {done.returncode}: {done.stderr}")
            confirmed = check(restored, confirmed)
            writer = writer if writer.poll() is None else start_writer()
            daemon = daemon if daemon.poll() is None else start_daemon()
        writer.kill()
        writer.wait()
        is_synced = sync()
        daemon.terminate()
        code = daemon.wait()
        done = restore()
        known = sqlite3.connect(database)
        (number,) = known.execute("SELECT n FROM mark").fetchone()
        if not is_synced or code != 0 or done.returncode != 0 or check(restored, confirmed) != number:
            raise AssertionError(f"at the end: synced {is_synced}, stop {code}, restore {done.returncode}, of {number}: {done.stderr}")
        print(f"seed {arguments.seed}: {arguments.kills} kills {counts}, {number} transactions, {time.time() - begun:.0f} s: every restore right")
        shutil.rmtree(work)
    except AssertionError as error:
        print(f"seed {arguments.seed}: {error}\nwhat is there is kept in {work}", file=sys.stderr)
        return 1
    finally:
        for process in (writer, daemon):
            process.kill()
            process.wait()


if __name__ == "__main__":
    sys.exit(main())
