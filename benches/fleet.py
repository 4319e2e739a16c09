#!/usr/bin/env python3
"""A fleet: how long until all its databases are followed, what it costs while nobody writes, and how far behind it is while a tenth write.

  cargo build --release
  python3 benches/fleet.py [--databases 1000] [--replica s3://bucket/prefix?endpoint=…] [--seconds 20]

Without --replica it goes to a directory. The program is taken from WALTRAIL (or target/release/waltrail). Prints one JSON object;
ends with exit code 1 when a restored database is not as its application left it.
"""
import argparse, json, os, random, re, shutil, signal, sqlite3, subprocess, sys, tempfile, threading, time, urllib.request

HERE = os.path.dirname(os.path.abspath(__file__))
EXE = os.environ.get("WALTRAIL", os.path.join(HERE, "..", "target", "release", "waltrail"))
ADDRESS = "127.0.0.1:9187"
parser = argparse.ArgumentParser()
parser.add_argument("--databases", type=int, default=1000)
parser.add_argument("--seconds", type=float, default=20)
parser.add_argument("--replica")
A = parser.parse_args()


def get(path):
    return urllib.request.urlopen(f"http://{ADDRESS}{path}", timeout=30).read().decode()


def values(name):
    return [float(value) for value in re.findall(rf"^{name}{{.*}} (\S+)$", get("/metrics"), re.M)]


def usage(process):
    status = open(f"/proc/{process.pid}/status").read()
    rss = int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1000
    threads = os.listdir(f"/proc/{process.pid}/task")
    cpu_ns = sum(int(open(f"/proc/{process.pid}/task/{thread}/schedstat").read().split()[0]) for thread in threads)
    return dict(cpu_ns=cpu_ns, rss_mb=round(rss, 1), threads=len(threads), descriptors=len(os.listdir(f"/proc/{process.pid}/fd")))


def content(path):
    database = sqlite3.connect(path, timeout=30)
    try:
        return database.execute("PRAGMA integrity_check").fetchall(), database.execute("SELECT * FROM item ORDER BY id").fetchall()
    finally:
        database.close()


def write(paths, until, pause, worst_ms):
    databases = [sqlite3.connect(path, isolation_level=None, timeout=30) for path in paths]
    while time.time() < until:
        for database in databases:
            begun = time.perf_counter()
            database.execute("INSERT INTO item(body) VALUES(hex(randomblob(100)))")
            worst_ms.append((time.perf_counter() - begun) * 1e3)
        time.sleep(pause)


def main(work):
    directory = f"{work}/tenants"
    os.mkdir(directory)
    names = [f"{directory}/t{number:05}.db" for number in range(A.databases)]
    first = sqlite3.connect(names[0])
    first.executescript("PRAGMA journal_mode=WAL; CREATE TABLE item(id INTEGER PRIMARY KEY, body TEXT);")
    first.executemany("INSERT INTO item(body) VALUES(?)", [("x" * 200,)] * 100)
    first.commit()
    first.close()
    for name in names[1:]:
        shutil.copy(names[0], name)
    with open(f"{work}/waltrail.toml", "w") as out:
        out.write(f'[http]\nlisten = "{ADDRESS}"\n[log]\nlevel = "warn"\n'
                  f'[[database]]\npath = "{directory}/*.db"\nreplica = "{A.replica or work + "/replica"}"\n')
    process = subprocess.Popen([EXE, "replicate", "--config", f"{work}/waltrail.toml"])
    try:
        result = dict(databases=A.databases)
        begun = time.time()
        while True:
            time.sleep(0.2)
            try:
                done = sum(values("waltrail_snapshots_total"))
            except OSError:
                done = 0
            if done == A.databases:
                break
            assert process.poll() is None and time.time() - begun < 600
        result["first_snapshots_s"] = round(time.time() - begun, 1)
        time.sleep(15)
        before = usage(process)
        time.sleep(A.seconds)
        after = usage(process)
        cpu_ms = (after.pop("cpu_ns") - before["cpu_ns"]) / 1e6
        result["idle"] = dict(after, cpu_ms_per_s=round(cpu_ms / A.seconds, 2))

        writing = random.Random(1).sample(names, max(1, A.databases // 10))
        before, worst_ms, lags = usage(process), [], []
        until = time.time() + A.seconds
        threads = [threading.Thread(target=write, args=(writing[number::4], until, 0.2, worst_ms)) for number in range(4)]
        for thread in threads:
            thread.start()
        while time.time() < until:
            time.sleep(0.5)
            lags.append(max(values("waltrail_lag_seconds")))
        for thread in threads:
            thread.join()
        after = usage(process)
        cpu_ms = (after.pop("cpu_ns") - before["cpu_ns"]) / 1e6
        worst_ms.sort()
        result["writing"] = dict(after, databases=len(writing), transactions=len(worst_ms), cpu_ms_per_s=round(cpu_ms / A.seconds, 1),
                                 writer_p99_ms=round(worst_ms[int(len(worst_ms) * 0.99)], 2), largest_lag_s=round(max(lags), 2))
        process.send_signal(signal.SIGTERM)
        result["exit_code"] = process.wait(timeout=60)
        begun = time.time()
        subprocess.run([EXE, "restore", "--config", f"{work}/waltrail.toml", "--all", "--output-dir", f"{work}/restored", "--quiet"], check=True,
                       stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        result["restore_all_s"] = round(time.time() - begun, 1)
        result["wrong"] = sum(content(name) != content(f"{work}/restored/{os.path.basename(name)}") for name in names)
        print(json.dumps(result))
        return result["wrong"] == 0 and result["exit_code"] == 0
    finally:
        process.kill()
        process.wait()


with tempfile.TemporaryDirectory(prefix="fleet-") as work:
    sys.exit(0 if main(work) else 1)
