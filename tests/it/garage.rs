//! The whole life of a replica on Garage, a store of its own kind: it answers conditional puts as it likes. Needs its program:
//! `WALTRAIL_GARAGE=/path/to/garage cargo test garage -- --ignored --nocapture`.

use std::net::TcpListener;
use std::process::{Child, Command, Stdio};

use crate::support::clock::Clock;
use crate::support::scene::Scene;
use crate::support::{content, count_up, create_database, insert, stderr, wait_for, waltrail};
use crate::two_writers::two_daemons;

const KEY_ID: &str = "GK0123456789abcdef01234567";
const SECRET: &str = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";

/// One node with one bucket, on the loopback. Ends when it is dropped.
struct Garage {
    _directory: tempfile::TempDir,
    server: Child,
    address: String,
}

fn free_address() -> String {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string()
}

impl Garage {
    fn start() -> Self {
        let program = std::env::var("WALTRAIL_GARAGE").expect("WALTRAIL_GARAGE names Garage's program");
        let directory = tempfile::tempdir().unwrap();
        let (address, rpc) = (free_address(), free_address());
        let root = directory.path().display();
        let text = format!(
            "metadata_dir = \"{root}/meta\"\ndata_dir = \"{root}/data\"\ndb_engine = \"sqlite\"\nreplication_factor = 1\n\
             rpc_bind_addr = \"{rpc}\"\nrpc_public_addr = \"{rpc}\"\nrpc_secret = \"{SECRET}\"\n\
             [s3_api]\ns3_region = \"garage\"\napi_bind_addr = \"{address}\"\n"
        );
        let config = directory.path().join("garage.toml");
        std::fs::write(&config, text).unwrap();
        let log = std::fs::File::create(directory.path().join("garage.log")).unwrap();
        let server = Command::new(program)
            .arg("-c")
            .arg(&config)
            .args(["server", "--single-node", "--default-bucket"])
            .env("GARAGE_DEFAULT_ACCESS_KEY", KEY_ID)
            .env("GARAGE_DEFAULT_SECRET_KEY", SECRET)
            .env("GARAGE_DEFAULT_BUCKET", "backups")
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap();
        Self { _directory: directory, server, address }
    }

    /// What a configuration says of a replica there.
    fn replica(&self, prefix: &str) -> String {
        format!(
            "[database.replica]\nurl = \"s3://backups/{prefix}\"\nendpoint = \"http://{}\"\nregion = \"garage\"\npath-style = true\n\
             access-key-id = \"{KEY_ID}\"\nsecret-access-key = \"{SECRET}\"\n",
            self.address
        )
    }
}

impl Drop for Garage {
    fn drop(&mut self) {
        self.server.kill().ok();
        self.server.wait().ok();
    }
}

#[test]
#[ignore = "needs Garage: WALTRAIL_GARAGE=/path/to/garage"]
fn a_life_on_garage() {
    let (garage, scene) = (Garage::start(), Scene::new());
    let application = create_database(&scene.database(), 200, "");
    let (config, database) =
        (scene.path("waltrail.toml").display().to_string(), scene.database().display().to_string());
    let text = format!(
        "[[database]]\npath = \"{database}\"\nsync-interval = \"20ms\"\nmerge = [\"1s\", \"1h\"]\n{}",
        garage.replica("app")
    );
    std::fs::write(&config, text).unwrap();
    let ask = |arguments: &[&str]| {
        let done = waltrail().arg(arguments[0]).args(["--config", &config]).args(&arguments[1..]).output().unwrap();
        (done.status.code(), String::from_utf8_lossy(&done.stdout).into_owned() + &stderr(&done))
    };
    let does = |arguments: &[&str]| {
        let (code, said) = ask(arguments);
        assert_eq!(
            code,
            Some(0),
            "{arguments:?}: {said}\n{}",
            std::fs::read_to_string(scene.path("daemon.log")).unwrap_or_default()
        );
        said
    };
    let output = scene.path("out.db").display().to_string();
    let restored = |target: &[&str]| {
        does(&[&["restore", "--force", "--output", &output, &database], target].concat());
        content(&scene.path("out.db"))
    };
    let found = wait_for("Garage", || Some(ask(&["doctor", &database])).filter(|(code, _)| *code == Some(0)));
    println!("{}", found.1);
    for says in [
        "conditional put",
        "ranges             a part",
        "multipart upload   an object of two parts",
        "what is deleted is gone",
    ] {
        assert!(found.1.contains(says), "{says}\n{}", found.1);
    }
    let daemon = scene.start_with(&["--config", &config]);
    wait_for("a sync", || (ask(&["sync"]).0 == Some(0)).then_some(()));
    count_up(&application);
    does(&["mark", "before", &database]);
    let before = content(&scene.database());
    // Larger than a part, and nothing that compresses.
    application
        .execute_batch(
            "CREATE TABLE large(body BLOB);
             WITH RECURSIVE c(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM c WHERE i < 400)
             INSERT INTO large SELECT randomblob(100000) FROM c",
        )
        .unwrap();
    does(&["sync"]);
    for _ in 0..5 {
        insert(&application, 10);
        count_up(&application);
        does(&["sync"]);
        std::thread::sleep(std::time::Duration::from_millis(300));
    }
    does(&["snapshot"]);
    let after = content(&scene.database());
    assert!(restored(&[]) == after && restored(&["--mark", "before"]) == before);
    println!("{}", does(&["verify", &database]));
    // Two hours later: what the larger segments hold, and what neither the last state nor the mark needs, goes.
    let clock = Clock::new();
    clock.set(7200, 0);
    let pruned = waltrail()
        .args(["prune", "--config", &config, &database, "--retention", "1s"])
        .env("LD_PRELOAD", clock.library())
        .env("AHEAD_FILE", clock.file())
        .output()
        .unwrap();
    let told = String::from_utf8_lossy(&pruned.stdout).into_owned() + &stderr(&pruned);
    assert!(pruned.status.success() && told.contains("deleted    ") && !told.contains("deleted    0"), "{told}");
    println!("{told}");
    assert!(restored(&[]) == after && restored(&["--mark", "before"]) == before);
    assert_eq!(daemon.terminate(), Some(0), "{}", scene.log());
    println!("{}", scene.log().lines().filter(|line| line.contains("conditional")).collect::<Vec<_>>().join("\n"));
}

#[test]
#[ignore = "needs Garage: WALTRAIL_GARAGE=/path/to/garage"]
fn two_daemons_on_garage() {
    let garage = Garage::start();
    let replica = garage.replica("app");
    let scene = Scene::new();
    let config = scene.path("waltrail.toml").display().to_string();
    std::fs::write(&config, format!("[[database]]\npath = \"{}\"\n{replica}", scene.database().display())).unwrap();
    wait_for("Garage", || {
        waltrail().args(["doctor", "--config", &config]).output().unwrap().status.success().then_some(())
    });
    for round in 0..3 {
        two_daemons(&garage.replica(&format!("app{round}")), true);
    }
}
