//! What a restore tells while it runs and when it is done: to a person at a terminal, to a log, or to a program.

use std::io::{self, IsTerminal, Write};
use std::sync::Arc;
use std::time::Duration;

use clap::ValueEnum;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde::Serialize;
use tokio::task::JoinSet;

use super::exit_code::Failure;
use super::tell::{shown, tell};
use crate::clock::format_time;
use crate::restore::plan::Plan;
use crate::restore::progress::Progress;

/// Without a terminal, a line this often.
const LINE_INTERVAL: Duration = Duration::from_secs(5);
const BAR_INTERVAL: Duration = Duration::from_millis(100);

/// How a restore tells.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum RestoreOutput {
    /// For people, on standard error.
    Text,
    /// One JSON object an event, on standard output.
    Json,
}

/// What happens, for programs.
#[derive(Debug, Serialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
enum Event<'a> {
    Planned {
        replica: &'a str,
        epoch: u32,
        txid: u64,
        time_ms: u64,
        asked_ms: Option<u64>,
        database_bytes: u64,
        snapshot: String,
        segments: usize,
        fingerprint: String,
    },
    Note {
        text: &'a str,
    },
    Progress {
        phase: &'a str,
        done_bytes: u64,
        total_bytes: u64,
    },
    Restored {
        output: &'a str,
        epoch: u32,
        txid: u64,
        time_ms: u64,
        fingerprint: String,
        database_bytes: u64,
        reused_bytes: u64,
        received_bytes: u64,
        requests: u64,
        seconds: f64,
    },
}

/// What a restore cost.
#[derive(Debug, Clone, Copy)]
pub struct Cost {
    /// Bytes that were on the local disk already.
    pub reused_bytes: u64,
    /// Bytes that were received.
    pub received_bytes: u64,
    /// Requests.
    pub requests: u64,
    /// Time.
    pub seconds: f64,
}

/// Tells of one restore.
#[derive(Debug, Clone, Copy)]
pub struct Reporter {
    output: RestoreOutput,
    is_quiet: bool,
}

impl Reporter {
    /// A quiet one tells errors, and of success one line.
    #[must_use]
    pub fn new(output: RestoreOutput, is_quiet: bool) -> Self {
        Self { output, is_quiet }
    }

    fn event(self, event: &Event<'_>) -> Result<(), Failure> {
        match serde_json::to_string(event) {
            // That nobody reads any more is no failure; the restore goes on.
            Ok(line) => shown(writeln!(io::stdout(), "{line}")),
            Err(error) => Err(Failure::other(error.to_string())),
        }
    }

    /// What will be restored.
    ///
    /// # Errors
    /// When standard output can't be written.
    pub fn planned(self, plan: &Plan, asked_ms: Option<u64>) -> Result<(), Failure> {
        if self.is_quiet {
            return Ok(());
        }
        if self.output == RestoreOutput::Json {
            return self.event(&Event::Planned {
                replica: &plan.location,
                epoch: plan.position.epoch,
                txid: plan.position.txid,
                time_ms: plan.time_ms,
                asked_ms,
                database_bytes: plan.database_len_bytes(),
                snapshot: plan.snapshot.key.to_string(),
                segments: plan.segments.len(),
                fingerprint: format!("{:016x}", plan.fingerprint),
            });
        }
        tell(plan);
        if let Some(asked_ms) = asked_ms {
            tell(format_args!("asked      {}", format_time(asked_ms)));
        }
        tell(format_args!("time       {}", format_time(plan.time_ms)));
        Ok(())
    }

    /// What the user should know.
    ///
    /// # Errors
    /// When standard output can't be written.
    pub fn note(self, text: &str) -> Result<(), Failure> {
        match self.output {
            _ if self.is_quiet => Ok(()),
            RestoreOutput::Json => self.event(&Event::Note { text }),
            RestoreOutput::Text => {
                tell(format_args!("note: {text}"));
                Ok(())
            }
        }
    }

    /// Tells how far it is, for as long as what is returned is kept.
    #[must_use]
    pub fn watch(self, progress: &Arc<Progress>, total_bytes: u64) -> JoinSet<()> {
        let mut watching = JoinSet::new();
        let progress = progress.clone();
        if self.is_quiet {
            return watching;
        }
        if self.output == RestoreOutput::Json {
            watching.spawn(async move { self.write_events(&progress, total_bytes).await });
        } else if io::stderr().is_terminal() {
            watching.spawn(async move { draw(&progress, total_bytes).await });
        } else {
            watching.spawn(async move { write_lines(&progress, total_bytes).await });
        }
        watching
    }

    async fn write_events(self, progress: &Progress, total_bytes: u64) {
        loop {
            tokio::time::sleep(Duration::from_secs(1)).await;
            let (phase, done_bytes) = (progress.phase().word(), progress.done_bytes());
            if self.event(&Event::Progress { phase, done_bytes, total_bytes }).is_err() {
                // The next event that matters says so.
                return;
            }
        }
    }

    /// That it is done.
    ///
    /// # Errors
    /// When standard output can't be written.
    pub fn restored(self, plan: &Plan, output: &str, cost: Cost) -> Result<(), Failure> {
        let Cost { reused_bytes, received_bytes, requests, seconds } = cost;
        if self.output == RestoreOutput::Json {
            return self.event(&Event::Restored {
                output,
                epoch: plan.position.epoch,
                txid: plan.position.txid,
                time_ms: plan.time_ms,
                fingerprint: format!("{:016x}", plan.fingerprint),
                database_bytes: plan.database_len_bytes(),
                reused_bytes,
                received_bytes,
                requests,
                seconds,
            });
        }
        let reused = match reused_bytes {
            0 => String::new(),
            _ => format!(" {reused_bytes} bytes were here already;"),
        };
        tell(format_args!(
            "restored   {output} in {seconds:.2} s; {requests} requests, {received_bytes} bytes read;{reused} fingerprint checked"
        ));
        Ok(())
    }
}

async fn draw(progress: &Progress, total_bytes: u64) {
    let bar = ProgressBar::with_draw_target(Some(total_bytes), ProgressDrawTarget::stderr());
    let template = "{msg:<10} [{bar:30}] {bytes} of {total_bytes}, {bytes_per_sec}, {eta} left";
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style.progress_chars("=> "));
    }
    // Dropped with the task, whatever ends it: then the line is cleared.
    let bar = Cleared(bar);
    loop {
        bar.0.set_message(progress.phase().word());
        bar.0.set_position(progress.done_bytes());
        tokio::time::sleep(BAR_INTERVAL).await;
    }
}

struct Cleared(ProgressBar);

impl Drop for Cleared {
    fn drop(&mut self) {
        self.0.finish_and_clear();
    }
}

async fn write_lines(progress: &Progress, total_bytes: u64) {
    let mut before_bytes = 0;
    loop {
        tokio::time::sleep(LINE_INTERVAL).await;
        let done_bytes = progress.done_bytes();
        let rate = (done_bytes - before_bytes) / LINE_INTERVAL.as_secs();
        before_bytes = done_bytes;
        let left = match (total_bytes - done_bytes.min(total_bytes)).checked_div(rate) {
            Some(seconds) => format!("{seconds} s left"),
            None => "waiting".to_owned(),
        };
        tell(format_args!(
            "{:<10} {done_bytes} of {total_bytes} bytes, {rate} bytes/s, {left}",
            progress.phase().word()
        ));
    }
}
