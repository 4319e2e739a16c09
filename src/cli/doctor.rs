//! `waltrail doctor`: what could go wrong, before it does.

use std::fmt::Display;
use std::fs::File;
use std::io::{self, Write};
use std::path::Path;

use clap::Args;

use super::exit_code::Failure;
use super::interrupt::unless_interrupted;
use super::tell::shown;
use super::{ConfigArgument, Source, for_each_replica, open_patiently};
use crate::clock::SystemClock;
use crate::run::place::loss_here;
use crate::sqlite::header::{DatabaseHeader, HEADER_LEN};
use crate::store::probe::{Finding, Weight, probe};

/// Arguments of `doctor`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  waltrail doctor s3://my-bucket/app
  waltrail doctor --config /etc/waltrail.toml /data/app.db

Puts a few small objects (and one of 5 MiB) under doctor/ in the replica's place, and removes them. A replica's directory that is not
there yet is made, as the first start would, and stays. Exit code 1 when something is bad.")]
pub struct DoctorArguments {
    /// A replica URL, or the path of a database that is configured or followed [default: the only configured one]
    source: Option<String>,
    #[command(flatten)]
    config: ConfigArgument,
}

/// Looks at the database's place and at the store.
///
/// # Errors
/// When something is bad, or the store can't be reached.
pub async fn run(arguments: DoctorArguments) -> Result<(), Failure> {
    unless_interrupted(examine(arguments), "interrupted; objects under doctor/ may have been left").await
}

async fn examine(arguments: DoctorArguments) -> Result<(), Failure> {
    let sources = arguments.config.resolve_replicas(arguments.source.as_deref()).await?;
    let names_replica = sources.len() > 1;
    for_each_replica(sources, async |source| {
        if names_replica {
            show(format_args!("in {}", source.replica))?;
        }
        examine_one(source).await
    })
    .await
}

/// Writes a line to standard output. Whoever has read enough still gets the exit code.
fn show(line: impl Display) -> Result<(), Failure> {
    shown(writeln!(io::stdout(), "{line}"))
}

async fn examine_one(source: &Source) -> Result<(), Failure> {
    let mut findings = Vec::new();
    if let Some(database) = &source.database {
        findings.push(place(&database.path));
        findings.push(file(&database.path));
        findings.push(state_dir(&database.state_dir));
        findings.push(busy_timeout());
    }
    for finding in &findings {
        show(finding)?;
    }
    let found = probe_store(source).await?;
    for finding in &found {
        show(finding)?;
    }
    findings.extend(found);
    match findings.iter().filter(|finding| finding.weight == Weight::Bad).count() {
        0 => Ok(()),
        count => Err(Failure::other(format!("{count} of {} findings are bad", findings.len()))),
    }
}

async fn probe_store(source: &Source) -> Result<Vec<Finding>, Failure> {
    let store = open_patiently(&source.replica).await;
    Ok(probe(&store, &SystemClock::new()).await?)
}

/// Whether it goes with its container.
fn place(database: &Path) -> Finding {
    match loss_here(database) {
        Some(why) => Finding::new("place", Weight::Bad, why),
        None => Finding::new("place", Weight::Good, format!("{} does not go with a container", database.display())),
    }
}

/// By its header alone: SQLite is not asked, so that nothing beside the file is made or changed.
fn file(database: &Path) -> Finding {
    const WHAT: &str = "database";
    let mut header = [0; HEADER_LEN];
    let read = File::open(database).and_then(|mut file| io::Read::read_exact(&mut file, &mut header));
    match read {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            Finding::new(WHAT, Weight::Note, "it is not there yet: it is waited for")
        }
        Err(error) => Finding::new(WHAT, Weight::Bad, format!("it can't be read: {error}")),
        Ok(()) if let Err(error) = File::options().append(true).open(database) => Finding::new(
            WHAT,
            Weight::Bad,
            format!("it can't be written, which SQLite needs even to follow it: {error}"),
        ),
        Ok(()) => match DatabaseHeader::parse(&header) {
            Err(error) => Finding::new(WHAT, Weight::Bad, error.to_string()),
            Ok(header) if header.is_wal => {
                Finding::new(WHAT, Weight::Good, format!("in WAL mode, pages of {} bytes", header.page_size))
            }
            Ok(_) => Finding::new(WHAT, Weight::Note, "not in WAL mode: it is switched to it at the start"),
        },
    }
}

/// No other process can see it: it is a setting of each connection.
fn busy_timeout() -> Finding {
    let advice = "give each connection of the application a busy timeout (PRAGMA busy_timeout=5000): while a \
                  checkpoint holds the write lock, for some milliseconds, a connection without one gets SQLITE_BUSY";
    Finding::new("busy timeout", Weight::Note, advice)
}

fn state_dir(directory: &Path) -> Finding {
    const WHAT: &str = "state directory";
    let nearest = directory.ancestors().find(|path| path.is_dir()).unwrap_or(Path::new("/"));
    match tempfile::tempfile_in(nearest) {
        Ok(_) => Finding::new(WHAT, Weight::Good, format!("{} can be written", directory.display())),
        Err(error) => Finding::new(WHAT, Weight::Bad, format!("{} can't be written: {error}", nearest.display())),
    }
}
