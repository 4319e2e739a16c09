//! What others are told: status, health, metrics, systemd, heartbeats.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::process::Stdio;
use std::time::Duration;

use crate::support::s3::S3Server;
use crate::support::scene::Scene;
use crate::support::{count_up, create_database, run, stderr, wait_for, waltrail};

/// Nobody listens there.
const NOBODY: &str = "s3://nobody/app?endpoint=http://127.0.0.1:1&region=us-east-1";

/// Where the daemon says that it serves.
pub fn address(scene: &Scene) -> String {
    wait_for("the address", || {
        let log = std::fs::read_to_string(scene.path("daemon.log")).ok()?;
        let line = log.lines().find(|line| line.contains("serving /healthz"))?.to_owned();
        Some(line.split("address=").nth(1)?.split_whitespace().next()?.to_owned())
    })
}

/// Status and body.
pub fn get(address: &str, path: &str) -> (u16, String) {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    write!(stream, "GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    (head.split(' ').nth(1).unwrap().parse().unwrap(), body.to_owned())
}

fn metric(text: &str, name: &str) -> f64 {
    let line = text.lines().find(|line| line.starts_with(&format!("{name}{{"))).unwrap_or_else(|| panic!("{name}"));
    line.rsplit(' ').next().unwrap().parse().unwrap()
}

#[test]
fn a_healthy_daemon_says_so() {
    let scene = Scene::new();
    let application = create_database(&scene.database(), 50, "");
    let database = scene.database().display().to_string();
    let daemon = scene.start_with(&[&database, &scene.replica(), "--listen", "127.0.0.1:0"]);
    let address = address(&scene);
    wait_for("readiness", || (get(&address, "/readyz").0 == 200).then_some(()));
    wait_for("the snapshot", || (!scene.objects("snap").is_empty()).then_some(()));
    for _ in 0..7 {
        count_up(&application);
    }
    assert!(run(["sync", &database]).status.success());
    assert_eq!(get(&address, "/healthz"), (200, "ok\n".into()));
    assert_eq!(get(&address, "/other").0, 404);
    let health = run(["health", &address]);
    assert!(health.status.success() && stderr(&health).contains("ok"), "{}", stderr(&health));
    let (code, metrics) = get(&address, "/metrics");
    assert_eq!(code, 200);
    assert_eq!(metric(&metrics, "waltrail_following"), 1.0);
    assert_eq!(metric(&metrics, "waltrail_transactions_total"), 7.0);
    assert_eq!(metric(&metrics, "waltrail_confirmed_transaction"), 8.0);
    assert_eq!(metric(&metrics, "waltrail_lag_seconds"), 0.0);
    assert_eq!(metric(&metrics, "waltrail_waiting_bytes"), 0.0);
    assert_eq!(metric(&metrics, "waltrail_snapshots_total"), 1.0);
    assert!(metric(&metrics, "waltrail_snapshot_timestamp_seconds") > 1e9);

    let status = run(["status", &database]);
    let table = String::from_utf8(status.stdout.clone()).unwrap();
    assert!(status.status.success(), "{}", stderr(&status));
    assert!(table.starts_with("DATABASE") && table.contains("following") && table.contains("8 ("), "{table}");
    let status = run(["status", &database, "--format", "json"]);
    let json: serde_json::Value = serde_json::from_slice(&status.stdout).unwrap();
    assert_eq!((&json["phase"], &json["trouble"]), (&"following".into(), &serde_json::Value::Null));
    assert_eq!(json["confirmed"]["position"]["txid"], 8);

    assert_eq!(daemon.terminate(), Some(0), "{}", scene.log());
    let health = run(["health", &address]);
    assert_eq!(health.status.code(), Some(1));
    assert!(stderr(&health).contains("no daemon answers"), "{}", stderr(&health));
    let gone = run(["status", &database]);
    assert_eq!(gone.status.code(), Some(1));
    assert!(stderr(&gone).contains("no daemon follows"), "{}", stderr(&gone));
}

#[test]
fn storage_that_is_away_is_unhealthy() {
    let scene = Scene::new();
    let _application = create_database(&scene.database(), 50, "");
    let config = scene.path("waltrail.toml");
    let text = format!(
        "[http]\nlisten = \"127.0.0.1:0\"\nhealthy-lag = \"1s\"\n[[database]]\npath = \"{}\"\nreplica = \"{NOBODY}\"\n",
        scene.database().display()
    );
    std::fs::write(&config, text).unwrap();
    let config = config.to_str().unwrap();
    let daemon = scene.start_with(&["--config", config]);
    let address = address(&scene);
    // The database is taken up a moment after the address is there.
    wait_for("it not to be ready", || (get(&address, "/readyz").0 == 503).then_some(()));
    let told = wait_for("trouble", || Some(get(&address, "/healthz")).filter(|(code, _)| *code == 503)).1;
    assert!(told.contains("has not been followed for") && told.contains("app.db"), "{told}");
    let told =
        wait_for("the reason", || Some(get(&address, "/healthz").1).filter(|told| told.contains("s3://nobody/app")));
    assert!(told.lines().count() == 1, "{told}");
    let metrics = get(&address, "/metrics").1;
    assert_eq!((metric(&metrics, "waltrail_following"), metric(&metrics, "waltrail_failing")), (0.0, 1.0), "{metrics}");
    let status = run(["status", "--config", config, "--max-lag", "1s"]);
    assert_eq!(status.status.code(), Some(1), "{}", stderr(&status));
    let sync = run(["sync", "--config", config, "--timeout", "1s"]);
    assert_eq!(sync.status.code(), Some(15), "{}", stderr(&sync));
    drop(daemon);
}

/// Asks a daemon's control socket for a sync, as the command does, without waiting for the answer.
fn ask_for_sync(scene: &Scene) -> UnixStream {
    let state_dir = scene.path(".app.db-waltrail");
    let metadata = std::fs::metadata(&state_dir).unwrap();
    let question = serde_json::json!({ "directory": [metadata.dev(), metadata.ino()], "request": "sync" });
    let mut stream = UnixStream::connect(state_dir.join("control")).unwrap();
    writeln!(stream, "{question}").unwrap();
    stream
}

/// While storage is away a sync is not answered: those who ask again and again, and leave when they have waited long enough, must not
/// keep others from asking. Nor must those who stay keep anybody from asking how it is.
#[test]
fn who_has_left_keeps_no_place_at_the_control_socket() {
    let scene = Scene::new();
    scene.expect_error("the replica's directory is not there");
    let application = create_database(&scene.database(), 50, "");
    let database = scene.database().display().to_string();
    let daemon = scene.start();
    wait_for("the snapshot", || (!scene.objects("snap").is_empty()).then_some(()));
    assert!(run(["sync", &database]).status.success());
    std::fs::rename(scene.path("replica"), scene.path("unmounted")).unwrap();
    count_up(&application);
    let answers = || String::from_utf8_lossy(&run(["status", &database]).stdout).contains("following");
    let held_open = || std::fs::read_dir(format!("/proc/{}/fd", daemon.id())).unwrap().count();
    let before = held_open();
    for _ in 0..300 {
        drop(ask_for_sync(&scene));
    }
    wait_for("status to be told", || answers().then_some(()));
    wait_for("their descriptors to be closed", || (held_open() < before + 20).then_some(()));

    let mut staying: Vec<UnixStream> = (0..256).map(|_| ask_for_sync(&scene)).collect();
    wait_for("no more to be taken", || {
        // Of those before, one whose asker was not seen to have left yet may have been in the way.
        staying.push(ask_for_sync(&scene));
        stderr(&run(["sync", &database, "--timeout", "1s"])).contains("others wait for an answer already").then_some(())
    });
    assert!(answers(), "{}", scene.log());
    drop(staying);
    wait_for("their descriptors to be closed", || (held_open() < before + 20).then_some(()));
    std::fs::rename(scene.path("unmounted"), scene.path("replica")).unwrap();
    assert!(run(["sync", &database, "--timeout", "60s"]).status.success(), "{}", scene.log());
    assert_eq!(daemon.terminate(), Some(0), "{}", scene.log());
}

/// Nothing is captured before an epoch is claimed, so the lag stays 0: this metric alone tells.
#[test]
fn the_alert_fires_when_storage_refuses_at_the_start() {
    let scene = Scene::new();
    scene.expect_error("the store refuses");
    let server = S3Server::start();
    let _application = create_database(&scene.database(), 50, "");
    let database = scene.database().display().to_string();
    server.refuse(403);
    let daemon = scene.start_with(&[&database, &server.url("app"), "--listen", "127.0.0.1:0"]);
    let address = address(&scene);
    let fires = |line: &str| line.starts_with("waltrail_failing{") && line.ends_with(" 1");
    let metrics =
        wait_for("the alert", || Some(get(&address, "/metrics").1).filter(|metrics| metrics.lines().any(fires)));
    assert_eq!((metric(&metrics, "waltrail_following"), metric(&metrics, "waltrail_lag_seconds")), (0.0, 0.0));
    // The log is written by a thread of its own, which a kill ends, too.
    wait_for("the ERROR", || scene.log().contains("the store refuses").then_some(()));
    drop(daemon);
}

#[test]
fn an_address_that_is_taken_is_an_error_at_once() {
    let scene = Scene::new();
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let done = run(["replicate", scene.database().to_str().unwrap(), &scene.replica(), "--listen", &address]);
    assert_eq!(done.status.code(), Some(1));
    assert!(stderr(&done).contains(&format!("can't listen at {address}")), "{}", stderr(&done));
}

#[test]
fn systemd_is_told() {
    let scene = Scene::new();
    let _application = create_database(&scene.database(), 50, "");
    let socket = UnixDatagram::bind(scene.path("notify")).unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    let mut child = waltrail()
        .args(["replicate", scene.database().to_str().unwrap(), &scene.replica()])
        .env("NOTIFY_SOCKET", scene.path("notify"))
        .env("WATCHDOG_USEC", "400000")
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut told = String::new();
    let (mut buffer, mut watchdogs) = ([0; 4096], 0);
    while watchdogs < 3 || !told.contains("READY=1") {
        let len = socket.recv(&mut buffer).unwrap();
        let text = String::from_utf8_lossy(&buffer[..len]).into_owned();
        watchdogs += usize::from(text.contains("WATCHDOG=1"));
        told.push_str(&text);
    }
    assert!(told.contains("STATUS=1 of 1 databases followed; all is confirmed"), "{told}");
    // SAFETY: sends a signal to a child that has not been waited for.
    assert_eq!(unsafe { libc::kill(child.id() as libc::pid_t, libc::SIGTERM) }, 0);
    assert!(child.wait().unwrap().success());
    let mut rest = String::new();
    socket.set_nonblocking(true).unwrap();
    while let Ok(len) = socket.recv(&mut buffer) {
        rest.push_str(&String::from_utf8_lossy(&buffer[..len]));
    }
    assert!(rest.contains("STOPPING=1"), "{rest}");
}

#[test]
fn a_heartbeat_arrives_while_all_is_well() {
    let scene = Scene::new();
    let _application = create_database(&scene.database(), 50, "");
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let config = scene.path("waltrail.toml");
    let text = format!(
        "[[database]]\npath = \"{}\"\nreplica = \"{}\"\nheartbeat-url = \"http://{address}/ping/secret-name\"\n",
        scene.database().display(),
        scene.replica()
    );
    std::fs::write(&config, text).unwrap();
    let daemon = scene.start_with(&["--config", config.to_str().unwrap(), "--log-level", "trace"]);
    let (mut stream, _) = listener.accept().unwrap();
    assert!(!scene.objects("snap").is_empty(), "not before there is something to restore");
    let mut request = [0; 1024];
    let len = stream.read(&mut request).unwrap();
    let request = String::from_utf8_lossy(&request[..len]);
    assert!(request.starts_with("GET /ping/secret-name HTTP/1.1"), "{request}");
    stream.write_all(b"HTTP/1.1 500 no\r\nContent-Length: 0\r\n\r\n").unwrap();
    wait_for("the complaint", || scene.log().contains("the heartbeat was refused").then_some(()));
    assert!(!scene.log().contains("secret-name"), "{}", scene.log());
    assert_eq!(daemon.terminate(), Some(0), "{}", scene.log());
}

#[test]
fn the_daemon_drills_by_itself() {
    let scene = Scene::new();
    scene.expect_error("the replica could not be verified");
    let application = create_database(&scene.database(), 50, "");
    count_up(&application);
    let config = scene.path("waltrail.toml");
    let text = format!(
        "[http]\nlisten = \"127.0.0.1:0\"\n[[database]]\npath = \"{}\"\nreplica = \"{}\"\nverify-interval = \"300ms\"\n",
        scene.database().display(),
        scene.replica()
    );
    std::fs::write(&config, text).unwrap();
    let daemon = scene.start_with(&["--config", config.to_str().unwrap()]);
    let address = address(&scene);
    let metrics = || get(&address, "/metrics").1;
    wait_for("a drill", || metrics().contains("waltrail_verified_timestamp_seconds{").then_some(()));
    assert_eq!((metric(&metrics(), "waltrail_verify_failed"), get(&address, "/healthz").0), (0.0, 200));
    let snapshot = scene.objects("snap").remove(0);
    let whole = std::fs::read(&snapshot).unwrap();
    let mut damaged = whole.clone();
    damaged[whole.len() / 3] ^= 1;
    std::fs::write(&snapshot, damaged).unwrap();
    wait_for("the failure", || (metric(&metrics(), "waltrail_verify_failed") == 1.0).then_some(()));
    let (code, told) = get(&address, "/healthz");
    assert!(code == 503 && told.contains("could not be verified") && told.contains("snap/"), "{told}");
    std::fs::write(&snapshot, whole).unwrap();
    wait_for("the next drill", || (get(&address, "/healthz").0 == 200).then_some(()));
    assert_eq!(daemon.terminate(), Some(0), "{}", scene.log());
}

#[test]
fn a_watched_status_shows_what_appears_later() {
    let scene = Scene::new();
    let tenants = scene.path("tenants");
    std::fs::create_dir(&tenants).unwrap();
    let config = scene.path("waltrail.toml");
    let text = format!("[[database]]\npath = \"{}/*.db\"\nreplica = \"{}\"\n", tenants.display(), scene.replica());
    std::fs::write(&config, text).unwrap();
    let mut watching = waltrail()
        .args(["status", "--watch", "--config", config.to_str().unwrap()])
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(watching.stdout.take().unwrap()).lines();
    assert!(lines.next().unwrap().unwrap().starts_with("DATABASE"), "nothing is there yet");
    drop(create_database(&tenants.join("acme.db"), 5, ""));
    // A few lines a second.
    let is_shown = lines.take(60).any(|line| line.unwrap().contains("acme.db"));
    watching.kill().unwrap();
    watching.wait().unwrap();
    assert!(is_shown);
}

/// That is how container files leave a variable out.
#[test]
fn an_address_that_is_set_to_nothing_is_not_set() {
    let scene = Scene::new();
    drop(create_database(&scene.database(), 10, ""));
    let with_variable =
        |value: &str, arguments: &[&str]| waltrail().args(arguments).env("WALTRAIL_LISTEN", value).output().unwrap();
    let (database, replica) = (scene.database().display().to_string(), scene.replica());
    let replicate = ["run", &database, &replica, "--", "true"];
    let done = with_variable("", &replicate);
    assert!(done.status.success(), "{}", stderr(&done));
    assert!(!stderr(&done).contains("serving /healthz"), "{}", stderr(&done));
    let done = with_variable("127.0.0.1:0", &replicate);
    assert!(stderr(&done).contains("serving /healthz"), "{}", stderr(&done));
    for (value, says) in [("", "which address?"), ("everywhere", "WALTRAIL_LISTEN: 'everywhere' is not an address")] {
        let asked = with_variable(value, &["health"]);
        assert_eq!(asked.status.code(), Some(10), "{}", stderr(&asked));
        assert!(stderr(&asked).contains(says), "{}", stderr(&asked));
    }
}

/// The image's variable is there for those who say nothing of it; and reading the same again is no change.
#[test]
fn the_address_of_the_file_comes_before_the_variables() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let taken = taken.local_addr().unwrap().to_string();
    let free = "127.0.0.1:0";
    for (in_file, in_variable, arguments) in [
        (Some(free), taken.as_str(), vec![]),
        (None, free, vec![]),
        (Some(taken.as_str()), &taken, vec!["--listen", free]),
    ] {
        let scene = Scene::new();
        drop(create_database(&scene.database(), 10, ""));
        let config = scene.path("waltrail.toml");
        let http = in_file.map_or(String::new(), |address| format!("[http]\nlisten = \"{address}\"\n"));
        let (database, replica) = (scene.database().display().to_string(), scene.replica());
        std::fs::write(&config, format!("{http}[[database]]\npath = \"{database}\"\nreplica = \"{replica}\"\n"))
            .unwrap();
        let mut daemon = waltrail()
            .args(["replicate", "--config", config.to_str().unwrap()])
            .args(arguments)
            .env("WALTRAIL_LISTEN", in_variable)
            .stderr(std::fs::File::create(scene.path("daemon.log")).unwrap())
            .spawn()
            .unwrap();
        let address = address(&scene);
        assert_ne!(address, taken);
        wait_for("readiness", || (get(&address, "/readyz").0 == 200).then_some(()));
        // SAFETY: sends a signal to a child that has not been waited for.
        let signal = |number| unsafe { libc::kill(daemon.id() as libc::pid_t, number) };
        assert_eq!(signal(libc::SIGHUP), 0);
        wait_for("the configuration", || scene.log().contains("the configuration was read again").then_some(()));
        assert!(!scene.log().contains("takes a restart"), "{}", scene.log());
        assert_eq!(signal(libc::SIGTERM), 0);
        assert!(daemon.wait().unwrap().success(), "{}", scene.log());
    }
}
