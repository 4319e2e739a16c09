#!/usr/bin/env python3
"""A real migration tool beside the daemon: Prisma sees no drift, and a migration can be undone by a mark.

  cargo build --release
  python3 tests/prisma.py

Needs Node.js and npm, which fetches Prisma; its schema engine comes as WebAssembly, with a driver adapter. The program is taken from
WALTRAIL (or target/release/waltrail). Ends with exit code 1 when something is not as it should be.
"""
import os, shutil, signal, sqlite3, subprocess, sys, tempfile, time

HERE = os.path.dirname(os.path.abspath(__file__))
WALTRAIL = os.path.abspath(os.environ.get("WALTRAIL", os.path.join(HERE, "..", "target", "release", "waltrail")))
VERSION = "6.19.0"
PACKAGES = ["prisma", "@prisma/client", "@prisma/adapter-libsql"]
CONFIG = """
import { defineConfig } from "prisma/config";
import { PrismaLibSQL } from "@prisma/adapter-libsql";
export default defineConfig({
  experimental: { adapter: true },
  engine: "js",
  schema: "prisma/schema.prisma",
  migrations: { path: "prisma/migrations" },
  adapter: async () => new PrismaLibSQL({ url: "file:./prisma/app.db" }),
});
"""
SCHEMA = """
generator client {
  provider   = "prisma-client"
  output     = "../generated"
  engineType = "client"
}
datasource db {
  provider = "sqlite"
  url      = "file:./app.db"
}
model User {
  id    Int    @id @default(autoincrement())
  email String @unique
  MORE
}
"""
FIRST = """
CREATE TABLE "User" ("id" INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT, "email" TEXT NOT NULL);
CREATE UNIQUE INDEX "User_email_key" ON "User"("email");
"""
SECOND = """ALTER TABLE "User" ADD COLUMN "visits" INTEGER NOT NULL DEFAULT 0;"""


def write(name, text):
    os.makedirs(os.path.dirname(os.path.abspath(name)), exist_ok=True)
    with open(name, "w") as file:
        file.write(text)


def call(*command):
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL)
    return done.returncode, done.stdout + done.stderr


def expect(what, command, says):
    code, told = call(*command)
    if code != 0 or says not in told:
        sys.exit(f"{what}: exit code {code}, and not '{says}':\n{told}")
    print(f"{what}: {says}")


def prisma(*arguments):
    return ("node_modules/.bin/prisma", *arguments)


def sees_no_drift(when):
    # `db push` compares the database with the schema, table by table, and would change what differs.
    expect(f"{when}, db push", prisma("db", "push", "--skip-generate"), "The database is already in sync with the Prisma schema")
    expect(f"{when}, migrate status", prisma("migrate", "status"), "Database schema is up to date")


def write_rows(count):
    database = sqlite3.connect("prisma/app.db", isolation_level=None, timeout=30)
    for number in range(count):
        database.execute("INSERT INTO User(email) VALUES (?)", (f"{number}-{time.time_ns()}",))
    database.close()


def rows(path):
    database = sqlite3.connect(path)
    try:
        return database.execute("SELECT id, email FROM User ORDER BY id").fetchall(), database.execute("SELECT * FROM User").description
    finally:
        database.close()


def main():
    expect("npm", ("npm", "install", "--ignore-scripts", "--no-audit", "--no-fund", *(f"{name}@{VERSION}" for name in PACKAGES)), "added")
    write("prisma.config.ts", CONFIG)
    write("prisma/schema.prisma", SCHEMA.replace("MORE", ""))
    write("prisma/migrations/migration_lock.toml", 'provider = "sqlite"\n')
    write("prisma/migrations/20260101000000_first/migration.sql", FIRST)
    expect("first migration", prisma("migrate", "deploy"), "All migrations have been successfully applied")
    sees_no_drift("before")
    daemon = subprocess.Popen((WALTRAIL, "replicate", "prisma/app.db", "replica"), stderr=subprocess.DEVNULL)
    try:
        while not os.path.exists("prisma/.app.db-waltrail/control") and daemon.poll() is None:
            time.sleep(0.05)
        expect("replicated", (WALTRAIL, "sync", "prisma/app.db"), "confirmed")
        write_rows(100)
        sees_no_drift("while it is replicated")
        expect("mark", (WALTRAIL, "mark", "before-visits", "prisma/app.db"), "marked")
        before = rows("prisma/app.db")[0]
        write("prisma/schema.prisma", SCHEMA.replace("MORE", "visits Int @default(0)"))
        write("prisma/migrations/20260102000000_visits/migration.sql", SECOND)
        expect("second migration", prisma("migrate", "deploy"), "All migrations have been successfully applied")
        write_rows(100)
        sees_no_drift("after a migration")
    finally:
        daemon.send_signal(signal.SIGTERM)
        code = daemon.wait(30)
    if code != 0:
        sys.exit(f"the daemon ended with {code}")
    sees_no_drift("after a stop")
    expect("back", (WALTRAIL, "restore", "replica", "--mark", "before-visits", "--output", "back.db"), "restored")
    back, columns = rows("back.db")
    if back != before or len(columns) != 2:
        sys.exit(f"not the state before the migration: {len(back)} rows, columns {columns}")
    print(f"restored by the mark: {len(back)} rows as they were, without the new column")


if __name__ == "__main__":
    work = tempfile.mkdtemp(prefix="waltrail-prisma-")
    os.chdir(work)
    os.environ.update(CHECKPOINT_DISABLE="1", PRISMA_HIDE_UPDATE_MESSAGE="1")
    try:
        main()
    finally:
        os.chdir("/")
        shutil.rmtree(work)
