//! The application, as a child process: signals are passed on to it, and what it leaves behind is reaped.

use std::collections::HashSet;
use std::ffi::OsString;
use std::io;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Command, ExitStatus};
use std::time::Duration;

use tokio::signal::unix::{Signal, SignalKind, signal};

use super::open_files::{self, allow_as};

/// What is passed on. (SIGKILL and SIGSTOP can't be.)
const PASSED_ON: [libc::c_int; 6] =
    [libc::SIGTERM, libc::SIGINT, libc::SIGHUP, libc::SIGQUIT, libc::SIGUSR1, libc::SIGUSR2];

/// So often it is looked whether somebody has ended.
const LOOK_INTERVAL: Duration = Duration::from_millis(500);

/// Signals from outside, from before the child is there: none is lost, and none ends this process.
pub struct Signals {
    passed_on: Vec<(libc::c_int, Signal)>,
    child: Signal,
}

impl Signals {
    /// Listens from now on.
    ///
    /// # Errors
    /// As the operating system answers.
    pub fn listen() -> io::Result<Self> {
        let listen = |number: &libc::c_int| Ok((*number, signal(SignalKind::from_raw(*number))?));
        let passed_on = PASSED_ON.iter().map(listen).collect::<io::Result<Vec<_>>>()?;
        Ok(Self { passed_on, child: signal(SignalKind::child())? })
    }

    /// The next signal that is to be passed on.
    async fn next(&mut self) -> libc::c_int {
        let waits = self.passed_on.iter_mut().map(|(number, signal)| {
            Box::pin(async move {
                signal.recv().await;
                *number
            })
        });
        futures_util::future::select_all(waits).await.0
    }

    /// Waits for a signal that asks to end, while there is no child yet.
    pub async fn asked_to_end(&mut self) -> libc::c_int {
        loop {
            let number = self.next().await;
            if [libc::SIGTERM, libc::SIGINT, libc::SIGQUIT].contains(&number) {
                return number;
            }
        }
    }
}

/// A running child.
#[derive(Debug)]
pub struct Child {
    process_id: libc::pid_t,
    /// As process 1 we inherit every process whose parent has ended, and nobody else would reap it.
    reaps_all: bool,
}

impl Child {
    /// Starts `command` with its arguments; it has our environment, directory and standard streams, and may open as many `files`
    /// as we might before we allowed ourselves more.
    ///
    /// # Errors
    /// As the operating system answers.
    pub fn start(command: &[OsString], files: open_files::Before) -> io::Result<Self> {
        let (program, arguments) = command.split_first().ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
        let mut command = Command::new(program);
        if let Some(before) = files {
            let allow_as_before = move || {
                allow_as(&before);
                Ok(())
            };
            // SAFETY: makes one system call.
            unsafe { command.pre_exec(allow_as_before) };
        }
        let child = command.args(arguments).spawn()?;
        let process_id = libc::pid_t::try_from(child.id()).map_err(io::Error::other)?;
        Ok(Self { process_id, reaps_all: std::process::id() == 1 })
    }

    /// Waits until it has ended, and passes signals on to it meanwhile.
    ///
    /// # Errors
    /// As the operating system answers.
    pub async fn wait(&self, signals: &mut Signals) -> io::Result<ExitStatus> {
        // A terminal sends Ctrl-C to all of its foreground processes, the child among them.
        let has_terminal = io::IsTerminal::is_terminal(&io::stdin());
        let mut looks = tokio::time::interval(LOOK_INTERVAL);
        let mut ended_before = HashSet::new();
        loop {
            if let Some(status) = self.reap()? {
                return Ok(status);
            }
            let mut child = std::mem::replace(&mut signals.child, signal(SignalKind::child())?);
            tokio::select! {
                // It may have ended between the look and the listening: then this asks again soon.
                _ = looks.tick() => ended_before = self.reap_orphans(&ended_before),
                _ = child.recv() => {}
                number = signals.next() => {
                    if !(has_terminal && number == libc::SIGINT) {
                        self.send(number);
                    }
                }
            }
        }
    }

    /// Sends a signal.
    pub fn send(&self, number: libc::c_int) {
        // SAFETY: the child has not been waited for, so the number is still its own. That it has ended is no failure.
        unsafe { libc::kill(self.process_id, number) };
    }

    /// The child's status, if it has ended.
    fn reap(&self) -> io::Result<Option<ExitStatus>> {
        loop {
            let mut status = 0;
            // SAFETY: `status` outlives the call.
            match unsafe { libc::waitpid(self.process_id, &raw mut status, libc::WNOHANG) } {
                0 => return Ok(None),
                -1 => {
                    let error = io::Error::last_os_error();
                    if error.kind() != io::ErrorKind::Interrupted {
                        return Err(error);
                    }
                }
                _ => return Ok(Some(ExitStatus::from_raw(status))),
            }
        }
    }

    /// As process 1: takes the status of those that had ended at the look before, too; gives those that have ended now. Who has just
    /// ended may be a child that somebody in this program waits for, such as a `credential_process`, and must find.
    fn reap_orphans(&self, ended_before: &HashSet<libc::pid_t>) -> HashSet<libc::pid_t> {
        if !self.reaps_all || !has_ended_children() {
            return HashSet::new();
        }
        let ended = ended_children();
        for &orphan in ended.intersection(ended_before).filter(|&&orphan| orphan != self.process_id) {
            // SAFETY: a status is not asked for.
            unsafe { libc::waitpid(orphan, std::ptr::null_mut(), libc::WNOHANG) };
        }
        ended
    }
}

/// Whether any child has ended, whose status then stays where it is.
fn has_ended_children() -> bool {
    // SAFETY: a plain structure of integers, for which all zeros is a value.
    let mut found: libc::siginfo_t = unsafe { std::mem::zeroed() };
    // SAFETY: `found` outlives the call, which fills it in if it answers 0; where nobody has ended it stays zero.
    unsafe {
        libc::waitid(libc::P_ALL, 0, &raw mut found, libc::WEXITED | libc::WNOHANG | libc::WNOWAIT) == 0
            && found.si_pid() != 0
    }
}

/// Processes whose parent this one is, and that have ended (Linux, `proc_pid_stat(5)`: state Z). None where `/proc` is not there.
fn ended_children() -> HashSet<libc::pid_t> {
    let Ok(processes) = std::fs::read_dir("/proc") else { return HashSet::new() };
    let own_id = std::process::id().to_string();
    let is_ended = |process_id: &libc::pid_t| {
        // The name, in parentheses, may hold anything.
        let stat = std::fs::read_to_string(format!("/proc/{process_id}/stat")).unwrap_or_default();
        let mut fields = stat.rsplit_once(')').map_or("", |(_, after)| after).split_whitespace();
        fields.next() == Some("Z") && fields.next() == Some(own_id.as_str())
    };
    let ids = processes.filter_map(|process| process.ok()?.file_name().to_str()?.parse().ok());
    ids.filter(is_ended).collect()
}

/// The exit code that says how a child ended: its own, or 128 and the number of the signal, as shells have it.
#[must_use]
pub fn exit_code(status: ExitStatus) -> u8 {
    let code = status.code().or_else(|| status.signal().map(|number| 128 + number)).unwrap_or(1);
    u8::try_from(code).unwrap_or(1)
}
