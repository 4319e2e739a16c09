#!/usr/bin/env python3
"""How cost grows with the work, a line of JSON for each point.

  cargo build --release
  python3 benches/curves.py [--curve size,changed,idle] [--sizes 100,1000,2500] [--databases 1,100,1000,5000]

`size`: a restore against the database's size in MB. `changed`: what a snapshot uploads against the part of the rows that changed since
the last one. `idle`: memory and CPU against the number of databases nobody writes to. All with a replica in a directory, so no
network is in it. History: `cargo test --release --test it what_a_restore_costs_by_history -- --ignored --nocapture`. The program is
taken from WALTRAIL (or target/release/waltrail).
"""
import argparse, json, os, resource, shutil, sqlite3, subprocess, tempfile, time

import peer

PROGRAM = peer.Waltrail.program


def grow(path, size_mb):
    """A database of such a size: rows of a web application, copied with new hashes until there are enough."""
    peer.create(path, 20_000)
    database = sqlite3.connect(path, isolation_level=None)
    database.execute("PRAGMA synchronous=OFF")
    while (size := os.path.getsize(path) / 1e6) < size_mb:
        (rows,) = database.execute("SELECT COUNT(*) FROM item").fetchone()
        wanted = max(1000, int(rows * min(1, (size_mb - size) / size)))
        database.execute("INSERT INTO item(owner, at, title, body, hash) SELECT owner, at, title, substr(body, abs(random()) % 200), "
                         "lower(hex(randomblob(16))) FROM item LIMIT ?", (wanted,))
        database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    database.close()


class Daemon:
    def __init__(self, work, databases):
        with open(f"{work}/tool.conf", "w") as conf:
            conf.write('[log]\nlevel = "warn"\n')
            for number, database in enumerate(databases):
                conf.write(f'[[database]]\npath = "{database}"\nreplica = "file://{work}/replica/{number}"\n')
        self.process = subprocess.Popen([PROGRAM, "replicate", "--config", f"{work}/tool.conf"])

    def status(self, name):
        (line,) = (line for line in open(f"/proc/{self.process.pid}/status") if line.startswith(name))
        return round(int(line.split()[1]) / 1024, 1)

    def cpu_s(self):
        tasks = os.listdir(f"/proc/{self.process.pid}/task")
        return sum(int(open(f"/proc/{self.process.pid}/task/{task}/schedstat").read().split()[0]) for task in tasks) / 1e9

    def stop(self):
        self.process.terminate()
        self.process.wait(60)


def snapshot(database):
    subprocess.run([PROGRAM, "snapshot", database], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def snapshots_mb(work):
    files = (os.path.join(place, name) for place, _, names in os.walk(f"{work}/replica/0/snap") for name in names)
    return sum(os.path.getsize(file) for file in files) / 1e6


def until(done, limit_s=300):
    begun = time.time()
    while not done():
        if time.time() - begun > limit_s:
            raise SystemExit("it does not come to an end")
        time.sleep(0.1)


def size(work, options):
    for size_mb in options.sizes:
        database = f"{work}/app.db"
        grow(database, size_mb)
        daemon = Daemon(work, [database])
        until(lambda: snapshots_mb(work) > 0)
        snapshot(database)
        first_peak_mb = daemon.status("VmHWM")
        daemon.stop()
        before, begun = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        command = ["/usr/bin/time", "-f", "%M", PROGRAM, "restore", f"file://{work}/replica/0", "--quiet", "--output", f"{work}/restored.db"]
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=True)
        after, wall_s = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter() - begun
        cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        yield dict(database_mb=round(os.path.getsize(database) / 1e6), stored_mb=round(snapshots_mb(work)), first_snapshot_peak_mb=first_peak_mb,
                   restore_wall_s=round(wall_s, 2), cpu_s=round(cpu_s, 2), peak_mb=round(int(done.stderr.split()[-1]) / 1024, 1))
        for name in os.listdir(work):
            path = f"{work}/{name}"
            shutil.rmtree(path) if os.path.isdir(path) else os.remove(path)


def changed(work, options):
    database = f"{work}/app.db"
    grow(database, 100)
    daemon = Daemon(work, [database])
    until(lambda: snapshots_mb(work) > 0)
    snapshot(database)
    application = sqlite3.connect(database, isolation_level=None, timeout=30)
    (rows,) = application.execute("SELECT MAX(id) FROM item").fetchone()
    for percent in (1, 10, 100):
        before = snapshots_mb(work)
        application.execute("UPDATE item SET title = title || 'x' WHERE id <= ?", (rows * percent // 100,))
        snapshot(database)
        yield dict(database_mb=round(os.path.getsize(database) / 1e6), changed_percent=percent, snapshot_mb=round(snapshots_mb(work) - before, 2))
    daemon.stop()


def idle(work, options):
    peer.create(f"{work}/0.db", 10)
    for count in options.databases:
        databases = [f"{work}/{number}.db" for number in range(count)]
        for path in databases[1:]:
            shutil.copy(databases[0], path)
        daemon = Daemon(work, databases)
        until(lambda: sum(os.path.isdir(f"{work}/replica/{number}/snap") for number in range(count)) == count)
        time.sleep(15 + count / 100)
        cpu_s = daemon.cpu_s()
        time.sleep(20)
        yield dict(databases=count, rss_mb=daemon.status("VmRSS"), own_mb=daemon.status("RssAnon"), peak_mb=daemon.status("VmHWM"),
                   cpu_ms_a_second=round((daemon.cpu_s() - cpu_s) / 20 * 1000, 2), threads=len(os.listdir(f"/proc/{daemon.process.pid}/task")))
        daemon.stop()
        shutil.rmtree(f"{work}/replica")
        for path in databases:
            shutil.rmtree(f"{work}/.{os.path.basename(path)}-waltrail", ignore_errors=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    numbers = lambda text: [int(number) for number in text.split(",")]
    parser.add_argument("--curve", default="size,changed,idle")
    parser.add_argument("--sizes", type=numbers, default=[100, 1000, 2500])
    parser.add_argument("--databases", type=numbers, default=[1, 100, 1000, 5000])
    options = parser.parse_args()
    for curve in options.curve.split(","):
        work = tempfile.mkdtemp(prefix="curves-")
        try:
            for point in dict(size=size, changed=changed, idle=idle)[curve](work, options):
                print(json.dumps(dict(curve=curve, **point)), flush=True)
        finally:
            shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    main()
