//! The log of a daemon. A thread of its own writes it to standard error: a reader of the log that
//! stops reading must not stop the threads that hold a read transaction.
//!
//! Between them is a bounded queue. When it is full, lines are dropped; their number is logged as
//! soon as the reader has caught up.

use std::backtrace::{Backtrace, BacktraceStatus};
use std::io::{self, Write};
use std::sync::mpsc;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use tracing_appender::non_blocking::{ErrorCounter, NonBlocking, NonBlockingBuilder, WorkerGuard};

use super::tell::tell;

/// Limit of lines that wait for the reader: about a megabyte of memory.
const LINES_LIMIT: usize = 4096;
/// Limit of the time that the exit waits for the reader. The guard of the thread waits for 1.1 s at
/// most, and may then complain on an output that blocks.
const EXIT_TIMEOUT: Duration = Duration::from_millis(1200);

/// The log of this process, if it is a daemon's.
static LOG: OnceLock<DaemonLog> = OnceLock::new();

/// Reports dropped lines, given their number.
type Report = Box<dyn FnMut(usize) + Send>;

/// A log that a thread writes.
struct DaemonLog {
    lines: NonBlocking,
    /// Taken at the exit.
    guard: Mutex<Option<WorkerGuard>>,
}

impl DaemonLog {
    fn new(writer: impl Write + Send + 'static, lines_limit: usize, report: Report) -> Self {
        let counter = Arc::new(OnceLock::new());
        let writer = LogWriter { writer, counter: counter.clone(), failed: 0, reported: 0, report };
        let builder = NonBlockingBuilder::default().lossy(true).buffered_lines_limit(lines_limit);
        let (lines, guard) = builder.thread_name("log").finish(writer);
        counter.set(lines.error_counter()).ok();
        Self { lines, guard: Mutex::new(Some(guard)) }
    }

    /// Waits until all lines are written, at most [`EXIT_TIMEOUT`]. Later lines are not written.
    fn finish(&self) {
        let guard = self.guard.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some(guard) = guard else { return };
        let (written, is_written) = mpsc::channel();
        // Dropping the guard may block on standard output: not this thread.
        std::thread::spawn(move || {
            drop(guard);
            written.send(()).ok();
        });
        is_written.recv_timeout(EXIT_TIMEOUT).ok();
    }
}

/// Writes lines on the log's thread, and reports those that were dropped before.
struct LogWriter<W> {
    writer: W,
    /// Lines that found the queue full.
    counter: Arc<OnceLock<ErrorCounter>>,
    /// Lines that could not be written.
    failed: usize,
    reported: usize,
    report: Report,
}

impl<W> LogWriter<W> {
    /// Reports lost lines that are not reported yet, if there are at least `least`.
    fn report_lost(&mut self, least: usize) {
        let dropped = self.counter.get().map_or(0, ErrorCounter::dropped_lines);
        let lost = dropped.saturating_add(self.failed);
        if lost - self.reported >= least {
            (self.report)(lost - self.reported);
            self.reported = lost;
        }
    }
}

impl<W: Write> Write for LogWriter<W> {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        match self.writer.write_all(line) {
            // A reader that is slow for ever lets the queue never become empty.
            Ok(()) => self.report_lost(LINES_LIMIT),
            Err(_) => self.failed = self.failed.saturating_add(1),
        }
        Ok(line.len())
    }

    /// Called when the queue is empty: what was dropped came behind everything that was written.
    fn flush(&mut self) -> io::Result<()> {
        self.report_lost(1);
        self.writer.flush()
    }
}

/// Flushes the log when it is dropped, also while a panic unwinds.
pub struct FlushAtExit;

impl Drop for FlushAtExit {
    fn drop(&mut self) {
        finish();
    }
}

/// Starts the log of this process on standard error, and gives the writer for it. Messages of
/// panics and everything that [`tell`] writes go there from now on.
pub fn start(report: Report) -> NonBlocking {
    let log = LOG.get_or_init(|| DaemonLog::new(io::stderr(), LINES_LIMIT, report));
    std::panic::set_hook(Box::new(|panic| {
        let backtrace = Backtrace::capture();
        let thread = std::thread::current();
        let name = thread.name().unwrap_or("unnamed");
        match backtrace.status() {
            BacktraceStatus::Captured => tell(format_args!("thread '{name}' {panic}\n{backtrace}")),
            _ => tell(format_args!("thread '{name}' {panic}")),
        }
    }));
    log.lines.clone()
}

/// Returns the writer of this process's log, `None` if it is no daemon.
pub fn writer() -> Option<NonBlocking> {
    LOG.get().map(|log| log.lines.clone())
}

/// Waits until everything that was logged is written, unless nothing reads it. Before the exit.
pub fn finish() {
    if let Some(log) = LOG.get() {
        log.finish();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Writes when it may, into a channel.
    struct GatedWriter {
        gate: Arc<Mutex<()>>,
        written: mpsc::Sender<String>,
    }

    impl Write for GatedWriter {
        fn write(&mut self, line: &[u8]) -> io::Result<usize> {
            let _open = self.gate.lock().unwrap();
            self.written.send(String::from_utf8_lossy(line).into_owned()).unwrap();
            Ok(line.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn lines_dropped_while_reader_is_stopped_are_reported_once() {
        const LINES: usize = 20;
        let gate = Arc::new(Mutex::new(()));
        let (written, lines) = mpsc::channel();
        let (reported, reports) = mpsc::channel();
        let writer = GatedWriter { gate: gate.clone(), written };
        let log = DaemonLog::new(writer, 4, Box::new(move |count| reported.send(count).unwrap()));
        let stopped = gate.lock().unwrap();
        for n in 0..LINES {
            log.lines.clone().write_all(n.to_string().as_bytes()).unwrap();
        }
        drop(stopped);
        let dropped = reports.recv_timeout(Duration::from_secs(10)).expect("a report");
        log.lines.clone().write_all(b"after").unwrap();
        log.finish();
        let lines: Vec<String> = lines.try_iter().collect();
        // The queue, and perhaps the line that the thread had taken from it.
        assert!((4..=5).contains(&(lines.len() - 1)), "{lines:?}");
        assert_eq!((dropped, lines.last().unwrap().as_str()), (LINES - (lines.len() - 1), "after"));
        assert!(reports.try_recv().is_err(), "reported twice");
    }

    #[test]
    fn finish_while_reader_is_stopped_ends() {
        let gate = Arc::new(Mutex::new(()));
        let (written, _lines) = mpsc::channel();
        let log = DaemonLog::new(GatedWriter { gate: gate.clone(), written }, 4, Box::new(|_| ()));
        let _stopped = gate.lock().unwrap();
        for _ in 0..20 {
            log.lines.clone().write_all(b"line").unwrap();
        }
        let (ended, has_ended) = mpsc::channel();
        std::thread::spawn(move || {
            log.finish();
            ended.send(()).ok();
        });
        assert!(has_ended.recv_timeout(EXIT_TIMEOUT * 5).is_ok());
    }
}
