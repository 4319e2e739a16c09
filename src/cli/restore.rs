//! `waltrail restore`

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::Args;
use tokio::signal::unix::{SignalKind, signal};

use super::exit_code::Failure;
use super::moment::{parse_moment, parse_txid};
use super::{ConfigArgument, open_patiently};
use crate::clock::{Clock, SystemClock, format_time};
use crate::restore::RestoreError;
use crate::restore::execute::execute;
use crate::restore::history::History;
use crate::restore::install::Incoming;
use crate::restore::plan::{Plan, Target, plan};
use crate::store::metered::Metered;

/// Arguments of `restore`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  waltrail restore s3://my-bucket/app --output app.db
  waltrail restore s3://my-bucket/app --output app.db --at '10 minutes ago'
  waltrail restore s3://my-bucket/app --output app.db --txid 1234 --dry-run
  waltrail restore --config /etc/waltrail.toml /data/app.db --if-missing --if-replica-exists
  waltrail restore s3://my-bucket/app --output - | sqlite3 -readonly …

Times: 2026-03-01T14:00:00Z, '2026-03-01 14:00' (UTC), '10 minutes ago'. The last transaction that is not later is chosen.
What is restored is checked against its recorded fingerprint before the file gets its name.")]
pub struct RestoreArguments {
    /// A replica URL, or the path of a database of the configuration
    source: String,
    /// Where to write the database; - for standard output [default: the database's path, if that was given]
    #[arg(long, short, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Restore the state at this time
    #[arg(long, value_name = "TIME", conflicts_with = "txid")]
    at: Option<String>,
    /// Restore the state after this transaction
    #[arg(long, value_parser = parse_txid)]
    txid: Option<u64>,
    /// Follow the line that ends in this epoch, not the newest one
    #[arg(long)]
    epoch: Option<u32>,
    /// Show what would be done and read nothing more
    #[arg(long)]
    dry_run: bool,
    /// Replace the target if it is there
    #[arg(long)]
    force: bool,
    /// Do nothing, successfully, if the target is there
    #[arg(long, conflicts_with = "force")]
    if_missing: bool,
    /// Do nothing, successfully, if there is no backup yet
    #[arg(long)]
    if_replica_exists: bool,
    #[command(flatten)]
    config: ConfigArgument,
}

/// Restores, unless interrupted: then the file that was being written is removed on the way out.
///
/// # Errors
/// See [`RestoreError`].
pub async fn run(arguments: RestoreArguments) -> Result<(), Failure> {
    let failed = |error: io::Error| Failure::other(format!("can't listen for signals: {error}"));
    let mut terminate = signal(SignalKind::terminate()).map_err(failed)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(failed)?;
    tokio::select! {
        done = restore(arguments) => done,
        _ = terminate.recv() => Err(Failure::other("interrupted; nothing was changed".into())),
        _ = interrupt.recv() => Err(Failure::other("interrupted; nothing was changed".into())),
    }
}

async fn restore(arguments: RestoreArguments) -> Result<(), Failure> {
    let clock = SystemClock::new();
    let source = arguments.config.resolve(&arguments.source)?;
    let output = arguments.output.clone().or(source.database);
    let output = output.ok_or_else(|| Failure::usage("where to? Name a file with --output".into()))?;
    let target = match (&arguments.at, arguments.txid) {
        (Some(at), _) => Target::Time(parse_moment(at, clock.now_ms()).map_err(Failure::usage)?),
        (None, Some(txid)) => Target::Txid(txid),
        (None, None) => Target::Latest,
    };
    let is_stdout = output == Path::new("-");
    if arguments.if_missing && !is_stdout && output.exists() {
        eprintln!("{} is there; nothing to do", output.display());
        return Ok(());
    }
    let (store, meter) = Metered::new(open_patiently(&source.replica).await);
    let store: crate::store::SharedStore = Arc::new(store);
    let begun = clock.monotonic();
    let planned = match History::load(&store).await {
        Ok(history) => plan(&store, &history, target, arguments.epoch).await,
        Err(error) => Err(error),
    };
    let plan = match planned {
        Err(error @ (RestoreError::NoReplica { .. } | RestoreError::NothingYet { .. }))
            if arguments.if_replica_exists =>
        {
            eprintln!("{error}; nothing to do");
            return Ok(());
        }
        other => other?,
    };
    eprintln!("{plan}");
    eprintln!("time       {}", format_time(plan.time_ms));
    for note in &plan.notes {
        eprintln!("note: {note}");
    }
    if arguments.dry_run {
        return Ok(());
    }
    let notes = if is_stdout {
        restore_to_stdout(&store, &plan).await?
    } else {
        restore_to_file(&store, &plan, &output, arguments.force).await?
    };
    for note in notes {
        eprintln!("note: {note}");
    }
    let (seconds, traffic) = ((clock.monotonic() - begun).as_secs_f64(), meter.traffic());
    eprintln!(
        "restored   {} in {seconds:.2} s; {} requests, {} bytes read; fingerprint checked",
        output.display(),
        traffic.requests,
        traffic.received_bytes
    );
    Ok(())
}

async fn restore_to_file(
    store: &crate::store::SharedStore,
    plan: &Plan,
    output: &Path,
    force: bool,
) -> Result<Vec<String>, Failure> {
    let incoming = Incoming::create(output, force)?;
    execute(store, plan, incoming.handle()?, incoming.path()).await?;
    Ok(incoming.install(force)?)
}

/// Through a file without a name: pages come newest first, and nothing may be written before all of it is checked.
async fn restore_to_stdout(store: &crate::store::SharedStore, plan: &Plan) -> Result<Vec<String>, Failure> {
    let failed = |error: io::Error| Failure::other(format!("can't write to standard output: {error}"));
    let mut file = tempfile::tempfile().map_err(failed)?;
    execute(store, plan, file.try_clone().map_err(failed)?, Path::new("a temporary file")).await?;
    let copy = move || {
        io::Seek::rewind(&mut file)?;
        let mut out = io::stdout().lock();
        io::copy(&mut file, &mut out)?;
        out.flush()
    };
    let copied = tokio::task::spawn_blocking(copy).await;
    copied.map_err(|error| Failure::other(error.to_string()))?.map_err(failed)?;
    Ok(Vec::new())
}
