//! `waltrail restore`

use std::fmt;
use std::io::{self, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::Args;

use super::exit_code::Failure;
use super::interrupt::unless_interrupted;
use super::moment::{parse_moment, parse_txid};
use super::tell::tell;
use super::{ConfigArgument, open_patiently};
use crate::clock::{Clock, SystemClock, format_time};
use crate::config::default_state_dir;
use crate::replicate::handover::{Handover, Restored};
use crate::replicate::snapshots::SnapshotNote;
use crate::restore::RestoreError;
use crate::restore::execute::execute;
use crate::restore::history::History;
use crate::restore::install::Incoming;
use crate::restore::plan::{Plan, Target, plan};
use crate::retain::marks::find_mark;
use crate::store::metered::Metered;

/// Arguments of `restore`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  waltrail restore s3://my-bucket/app --output app.db
  waltrail restore s3://my-bucket/app --output app.db --at '10 minutes ago'
  waltrail restore s3://my-bucket/app --output app.db --txid 1234 --dry-run
  waltrail restore --config /etc/waltrail.toml /data/app.db --if-missing --if-replica-exists
  waltrail restore s3://my-bucket/app --output - | gzip > app.db.gz

Times: 2026-03-01T14:00:00Z, 2026-03-01T16:00:00+02:00, '2026-03-01 14:00' (UTC unless it has an offset), '10 minutes ago',
'2 days ago'. The last transaction that is not later is chosen.
What is restored is checked against its recorded fingerprint before the file gets its name.")]
pub struct RestoreArguments {
    /// A replica URL, or the path of a database of the configuration [default: the only one there, or the environment's]
    source: Option<String>,
    /// Where to write the database; - for standard output [default: the database's path, if that was given]
    #[arg(long, short, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Restore the state at this time
    #[arg(long, value_name = "TIME", conflicts_with = "txid")]
    at: Option<String>,
    /// Restore the state after this transaction: 1234, 0x4d2 or, as in object names, 00000000000004d2
    #[arg(long, value_parser = parse_txid)]
    txid: Option<u64>,
    /// Follow the line that ends in this epoch, not the newest one
    #[arg(long)]
    epoch: Option<u32>,
    /// Restore the state that a mark names
    #[arg(long, value_name = "NAME", conflicts_with_all = ["at", "txid", "epoch"])]
    mark: Option<String>,
    /// Show what would be done, and do nothing; needs no --output
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
    unless_interrupted(restore(arguments), "interrupted; nothing was changed").await
}

async fn restore(arguments: RestoreArguments) -> Result<(), Failure> {
    let clock = SystemClock::new();
    let source = arguments.config.resolve(arguments.source.as_deref())?;
    let known_path = source.database.as_ref().map(|database| database.path.clone());
    let output = arguments.output.clone().or(known_path).map(Output::of);
    let asked = match (&arguments.at, arguments.txid) {
        (Some(at), _) => Target::Time(parse_moment(at, clock.now_ms()).map_err(Failure::usage)?),
        (None, Some(txid)) => Target::Txid(txid),
        (None, None) => Target::Latest,
    };
    // A plan needs no target; all else does.
    let output = match output {
        None if arguments.dry_run => None,
        None => return Err(Failure::usage("where to? Name a file with --output".into())),
        Some(output) => Some(output.check(&arguments)?),
    };
    let is_there = match &output {
        Some(Output::File(path)) => is_there(path)?,
        Some(Output::Stdout) | None => false,
    };
    if let Some(output) = &output
        && arguments.if_missing
        && is_there
    {
        tell(format_args!("{output} is there; nothing to do"));
        return Ok(());
    }
    let (store, meter) = Metered::new(open_patiently(&source.replica).await);
    let store: crate::store::SharedStore = Arc::new(store);
    let begun = clock.monotonic();
    let (target, epoch) = match &arguments.mark {
        Some(name) => {
            let mark = find_mark(&store, name).await?;
            (Target::Txid(mark.txid), Some(mark.epoch))
        }
        None => (asked, arguments.epoch),
    };
    let planned = match History::load(&store).await {
        Ok(history) => {
            let planned = plan(&store, &history, target, epoch).await;
            planned.map(|plan| (history, plan))
        }
        Err(error) => Err(error),
    };
    let (history, plan) = match planned {
        Err(error @ (RestoreError::NoReplica { .. } | RestoreError::NothingYet { .. }))
            if arguments.if_replica_exists =>
        {
            tell(format_args!("{error}; nothing to do"));
            return Ok(());
        }
        other => other?,
    };
    tell(&plan);
    if let Target::Time(asked_ms) = target {
        tell(format_args!("asked      {}", format_time(asked_ms)));
    }
    tell(format_args!("time       {}", format_time(plan.time_ms)));
    for note in &plan.notes {
        tell(format_args!("note: {note}"));
    }
    let output = match output {
        Some(output) if !arguments.dry_run => output,
        planned => {
            if let (Some(output), true, false) = (planned, is_there, arguments.force) {
                tell(format_args!("note: {output} is there: without --force, the restore is refused"));
            }
            return Ok(());
        }
    };
    let notes = match &output {
        Output::Stdout => restore_to_stdout(&store, &plan).await?,
        Output::File(path) => {
            let configured = source.database.filter(|_| arguments.output.is_none()).map(|database| database.state_dir);
            let state_dir = configured.unwrap_or_else(|| default_state_dir(path));
            restore_to_file(&store, &history, &plan, path, &state_dir, arguments.force).await?
        }
    };
    for note in notes {
        tell(format_args!("note: {note}"));
    }
    let (seconds, traffic) = ((clock.monotonic() - begun).as_secs_f64(), meter.traffic());
    tell(format_args!(
        "restored   {output} in {seconds:.2} s; {} requests, {} bytes read; fingerprint checked",
        traffic.requests, traffic.received_bytes
    ));
    Ok(())
}

/// Where the database goes.
enum Output {
    Stdout,
    File(PathBuf),
}

impl Output {
    fn of(path: PathBuf) -> Self {
        if path == Path::new("-") { Self::Stdout } else { Self::File(path) }
    }

    /// Refuses what makes no sense for standard output.
    fn check(self, arguments: &RestoreArguments) -> Result<Self, Failure> {
        match self {
            Self::Stdout if arguments.force || arguments.if_missing => {
                Err(Failure::usage("--force and --if-missing are about a file, not standard output".into()))
            }
            Self::Stdout if io::stdout().is_terminal() && !arguments.dry_run => {
                Err(Failure::usage("standard output is a terminal, and a database is no text; redirect it".into()))
            }
            output => Ok(output),
        }
    }
}

impl fmt::Display for Output {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Stdout => out.write_str("standard output"),
            Self::File(path) => path.display().fmt(out),
        }
    }
}

/// That it can't be known is not the same as that it is missing. And a directory is no database: not what --if-missing means
/// to leave alone, nor anything to replace.
fn is_there(path: &Path) -> Result<bool, RestoreError> {
    let failed = |source| RestoreError::Io { path: path.to_owned(), doing: "restore to", source };
    match path.metadata() {
        Ok(found) if found.is_dir() => Err(failed(io::ErrorKind::IsADirectory.into())),
        Ok(_) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(failed(error)),
    }
}

/// Restores beside `output` and puts the file in its place; gives what the user should know.
///
/// # Errors
/// See [`RestoreError`]; what was there is still there then.
pub(super) async fn restore_to_file(
    store: &crate::store::SharedStore,
    history: &History,
    plan: &Plan,
    output: &Path,
    state_dir: &Path,
    force: bool,
) -> Result<Vec<String>, Failure> {
    let incoming = Incoming::create(output, force)?;
    let done = execute(store, plan, incoming.handle()?, incoming.path()).await?;
    // What the old database's state says must not outlive it.
    let handover = Handover::begin(state_dir);
    let mut notes = incoming.install(force)?;
    let writer = history.epochs.get(&plan.position.epoch).map(|epoch| epoch.record.writer.clone());
    let restored = Restored {
        replica: history.replica.clone(),
        writer: writer.unwrap_or_default(),
        position: plan.position,
        time_ms: plan.time_ms,
        page_size: plan.page_size,
        size_pages: plan.size_pages,
        fingerprint: plan.fingerprint,
        snapshot: SnapshotNote {
            begun_ms: plan.snapshot.key.time_ms,
            extents_len_bytes: done.extents_len_bytes,
            log_len_bytes: plan.segments_len_bytes(),
        },
    };
    let left = match handover {
        Ok(handover) => handover.complete(&restored, done.page_hashes, output).map_err(|error| error.to_string()),
        Err(error) => Err(error.to_string()),
    };
    notes.push(match left {
        Ok(()) => format!("{} is what the next `waltrail replicate` of it goes on from", state_dir.display()),
        Err(error) => format!("the next `waltrail replicate` of it takes it as it is then ({error})"),
    });
    Ok(notes)
}

/// Through a file without a name: pages come newest first, and nothing may be written before all of it is checked.
async fn restore_to_stdout(store: &crate::store::SharedStore, plan: &Plan) -> Result<Vec<String>, Failure> {
    let failed = |error: io::Error| Failure::other(format!("can't write to standard output: {error}"));
    let made = tempfile::tempfile().and_then(|file| Ok((file.try_clone()?, file)));
    let (handle, mut file) = made.map_err(|source| RestoreError::Io {
        path: std::env::temp_dir(),
        doing: "make a temporary file in (TMPDIR names another place)",
        source,
    })?;
    execute(store, plan, handle, Path::new("the temporary file in TMPDIR")).await?;
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
