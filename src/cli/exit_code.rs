//! The one place that turns errors into text, a hint and an exit code.

use std::fmt;
use std::io;
use std::process::ExitCode;

use super::tell::tell;
use crate::config::ConfigError;
use crate::config::replica_url::ReplicaUrlError;
use crate::daemon::StartError;
use crate::format::FormatError;
use crate::format::key::SNAPSHOTS_PREFIX;
use crate::replicate::ReplicateError;
use crate::replicate::claim::ClaimError;
use crate::replicate::control::ControlError;
use crate::replicate::ship::ShipError;
use crate::replicate::state::StateDirectoryError;
use crate::restore::RestoreError;
use crate::retain::RetainError;
use crate::store::{StoreError, StoreErrorKind};
use crate::verify::VerifyError;
use crate::verify::report::Verdict;

/// Failed, for a reason without a code of its own.
pub const FAILED: u8 = 1;
/// `verify`: everything that should be restorable is, but somebody should look.
pub const VERIFY_DEGRADED: u8 = 1;
/// `verify`: something that should be restorable is not.
pub const VERIFY_FAILED: u8 = 2;
/// Wrong arguments or configuration.
pub const USAGE: u8 = 10;
/// Storage is not to be reached or refuses.
pub const STORAGE: u8 = 11;
/// There is no such backup or point in time.
pub const NOT_THERE: u8 = 12;
/// An object is damaged or of an unknown format.
pub const DAMAGED: u8 = 13;
/// The target of a restore can't be written.
pub const TARGET: u8 = 14;
/// Stopped with transactions not confirmed.
pub const NOT_CONFIRMED: u8 = 15;
/// Another writer took over.
pub const REPLACED: u8 = 16;

const NO_BACKUP_HINT: &str = "check the bucket and the prefix; `replicate` makes a backup";

/// What a command failed with.
#[derive(Debug)]
pub struct Failure {
    message: String,
    hint: Option<String>,
    code: u8,
}

impl Failure {
    fn new(code: u8, message: impl ToString, hint: Option<&str>) -> Self {
        Self { message: message.to_string(), hint: hint.map(str::to_owned), code }
    }

    /// Wrong arguments.
    #[must_use]
    pub fn usage(message: String) -> Self {
        Self::new(USAGE, message, Some("`waltrail help COMMAND` has examples"))
    }

    /// A failure without a code of its own.
    #[must_use]
    pub fn other(message: String) -> Self {
        Self::new(FAILED, message, None)
    }

    /// There is no such backup.
    #[must_use]
    pub fn not_there(message: String) -> Self {
        Self::new(NOT_THERE, message, Some(NO_BACKUP_HINT))
    }

    /// The store keeps what it was told to delete.
    #[must_use]
    pub fn not_deleted(message: String) -> Self {
        let hint =
            "nothing is harmed, and storage grows: check what the key may delete, and whether the bucket has a lock";
        Self::new(STORAGE, message, Some(hint))
    }

    /// What happened, in a sentence.
    #[must_use]
    pub fn message(&self) -> &str {
        &self.message
    }

    /// The exit code.
    #[must_use]
    pub fn code(&self) -> u8 {
        self.code
    }

    /// Writes it to standard error; gives the exit code.
    #[must_use]
    pub fn report(&self) -> ExitCode {
        tell(format_args!("error: {}", self.message));
        if let Some(hint) = &self.hint {
            tell(format_args!("hint: {hint}"));
        }
        ExitCode::from(self.code)
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(&self.message)
    }
}

/// The exit code of `verify` for one replica.
#[must_use]
pub fn code_of(verdict: Verdict) -> u8 {
    match verdict {
        Verdict::Ok => 0,
        Verdict::Degraded => VERIFY_DEGRADED,
        Verdict::Failed => VERIFY_FAILED,
    }
}

/// The exit code of `verify` for several replicas: what can't be restored weighs most, then what could not be looked at.
#[must_use]
pub fn gravest(codes: impl IntoIterator<Item = u8>) -> u8 {
    let weight = |code: &u8| match *code {
        0 => 0,
        VERIFY_DEGRADED => 1,
        VERIFY_FAILED => 4,
        STORAGE => 3,
        _ => 2,
    };
    codes.into_iter().max_by_key(weight).unwrap_or(0)
}

impl From<VerifyError> for Failure {
    fn from(error: VerifyError) -> Self {
        match error {
            VerifyError::Restore(RestoreError::Io { .. }) => Self::new(
                TARGET,
                error,
                Some("--scratch names another directory; a restored database needs its size there"),
            ),
            VerifyError::Restore(error) => error.into(),
            VerifyError::Live { .. } => Self::new(USAGE, error, Some("--against takes the path of the live database")),
        }
    }
}

impl From<ConfigError> for Failure {
    fn from(error: ConfigError) -> Self {
        Self::new(USAGE, error, Some("config/waltrail.toml shows every key there is"))
    }
}

impl From<ReplicaUrlError> for Failure {
    fn from(error: ReplicaUrlError) -> Self {
        Self::new(USAGE, error, None)
    }
}

/// What can be done about an error of a directory: there are no keys, no endpoint and no region.
fn hint_of_directory(kind: StoreErrorKind) -> &'static str {
    match kind {
        StoreErrorKind::Denied => {
            "check the permissions of the directory and what is in it, and as which user this runs"
        }
        StoreErrorKind::NoSuchBucket => "check the directory's path, and whether its disk is mounted",
        StoreErrorKind::Unavailable => "check the disk, and whether it is full; the same command can be tried again",
        _ => "check the directory's path, and its disk",
    }
}

impl From<StoreError> for Failure {
    fn from(error: StoreError) -> Self {
        let is_of_directory = error.location.starts_with("file://");
        let (code, hint) = match error.kind {
            StoreErrorKind::NotFound | StoreErrorKind::WrongSize | StoreErrorKind::AlreadyExists => {
                (DAMAGED, "the object changed or went while it was used; try again")
            }
            kind if is_of_directory => (STORAGE, hint_of_directory(kind)),
            StoreErrorKind::Denied => (
                STORAGE,
                "check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or the profile), and what the key may do in the bucket",
            ),
            StoreErrorKind::NoSuchBucket => (STORAGE, "check the bucket's name, the endpoint and the region"),
            StoreErrorKind::Unavailable => {
                (STORAGE, "check the endpoint and the network; the same command can be tried again")
            }
            StoreErrorKind::Other | StoreErrorKind::NotSupported => {
                (STORAGE, "check the endpoint, the region and path-style")
            }
        };
        Self::new(code, error, Some(hint))
    }
}

impl From<RestoreError> for Failure {
    fn from(error: RestoreError) -> Self {
        let (code, hint) = match error {
            RestoreError::Store(error) => return error.into(),
            RestoreError::NoReplica { .. } => (NOT_THERE, NO_BACKUP_HINT),
            RestoreError::NothingYet { .. } => (NOT_THERE, "the backup is complete when its first snapshot is stored"),
            RestoreError::NoSuchEpoch { .. } | RestoreError::OutOfRange { .. } => {
                (NOT_THERE, "`waltrail log REPLICA` shows what there is")
            }
            RestoreError::NewerFormat { .. } => (DAMAGED, "it was written by a newer waltrail; use that version"),
            RestoreError::Damaged { ref object, .. } if object == SNAPSHOTS_PREFIX => {
                (DAMAGED, "nothing was written; if the bucket keeps versions, bring back the deleted ones below snap/")
            }
            RestoreError::Damaged { .. } | RestoreError::FingerprintMismatch { .. } => {
                (DAMAGED, "nothing was written; an earlier point may not need the object: try --at or --txid")
            }
            RestoreError::Gap { .. } => (DAMAGED, "restore to the newest one before the gap with --txid"),
            RestoreError::TargetExists(_) => {
                (TARGET, "--force replaces it, --if-missing leaves it and exits 0, --output names another place")
            }
            RestoreError::TargetInUse(_) => (TARGET, "stop what uses it, or restore beside it with --output"),
            RestoreError::Internal(_) => return Self::new(FAILED, error, None),
            RestoreError::Io { .. } => (TARGET, "nothing was changed; check space and permissions there"),
        };
        Self::new(code, error, Some(hint))
    }
}

impl From<RetainError> for Failure {
    fn from(error: RetainError) -> Self {
        let (code, hint) = match error {
            RetainError::Restore(error) => return error.into(),
            RetainError::UnreadableMark { .. } => {
                (DAMAGED, Some("nothing is deleted as long as it is there; `waltrail unmark` takes it away"))
            }
            RetainError::MarkExists { .. } => {
                (FAILED, Some("take another name, or take that one away with `waltrail unmark`"))
            }
            RetainError::NoSuchMark { .. } => (NOT_THERE, Some("`waltrail marks` shows those that there are")),
            RetainError::BadName(_) => (USAGE, None),
            RetainError::NotDeleted { .. } => {
                (STORAGE, Some("check what the key may delete, and whether the bucket has a lock"))
            }
        };
        Self::new(code, error, hint)
    }
}

/// Whether the state directory is another user's: only the daemon's own may ask it.
#[must_use]
pub fn is_of_another_user(error: &ControlError) -> bool {
    matches!(error, ControlError::Broken { source, .. } if source.kind() == io::ErrorKind::PermissionDenied)
}

impl From<ControlError> for Failure {
    fn from(error: ControlError) -> Self {
        let (code, hint) = match &error {
            ControlError::NoDaemon { .. } => (
                FAILED,
                Some(
                    "a daemon may be running without its socket: if its state directory was removed \
                     or replaced, it makes the socket anew within a minute; check with \
                     `pgrep -a waltrail`, and start `waltrail replicate` only if none is running; if \
                     it keeps its state elsewhere, name that with --state-dir or --config",
                ),
            ),
            ControlError::TimedOut { .. } => {
                (NOT_CONFIRMED, Some("its log says what holds it up; --timeout waits longer"))
            }
            _ if is_of_another_user(&error) => (FAILED, Some("run it as the daemon's user")),
            ControlError::Failed { .. } | ControlError::Broken { .. } => (FAILED, None),
        };
        Self::new(code, error, hint)
    }
}

impl From<FormatError> for Failure {
    fn from(error: FormatError) -> Self {
        Self::new(DAMAGED, error, None)
    }
}

impl From<StartError> for Failure {
    fn from(error: StartError) -> Self {
        Self::other(error.to_string())
    }
}

impl From<ReplicateError> for Failure {
    fn from(error: ReplicateError) -> Self {
        let (code, hint) = match &error {
            ReplicateError::StateDirectory(StateDirectoryError::Locked(_)) => {
                (FAILED, Some("one waltrail a database; stop the other one first"))
            }
            ReplicateError::StateDirectory(_) => {
                (FAILED, Some("the user needs write access to the database's directory, or state-dir elsewhere"))
            }
            ReplicateError::Ship { source: ShipError::Replaced { .. } | ShipError::Foreign { .. }, .. } => (
                REPLACED,
                Some("two daemons replicate to one place; let only one run, and start this one again to take over"),
            ),
            ReplicateError::Ship { source: ShipError::Claim(ClaimError::Format { .. }), .. } => {
                (DAMAGED, Some("was the replica written by a newer waltrail?"))
            }
            ReplicateError::NotConfirmed { .. } => (NOT_CONFIRMED, None),
            _ => (FAILED, None),
        };
        Self::new(code, error, hint)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_of_a_directory_gets_a_hint_that_fits() {
        let hint_of = |kind, location: &str| {
            let (location, key, message) = (location.to_owned(), "epochs/00000001".into(), "refused".into());
            Failure::from(StoreError { kind, operation: "get", location, key, message }).hint.unwrap()
        };
        for kind in [StoreErrorKind::Denied, StoreErrorKind::NoSuchBucket, StoreErrorKind::Unavailable] {
            let hint = hint_of(kind, "file:///backup/app");
            assert!(!["AWS", "endpoint", "bucket"].iter().any(|word| hint.contains(word)), "{hint}");
        }
        assert!(hint_of(StoreErrorKind::Denied, "file:///backup/app").contains("permissions"));
        assert!(hint_of(StoreErrorKind::Denied, "s3://bucket/app").contains("AWS_ACCESS_KEY_ID"));
    }

    #[test]
    fn who_may_not_ask_a_daemon_is_told_who_may() {
        let refused = |kind: io::ErrorKind| ControlError::Broken { database: "/app.db".into(), source: kind.into() };
        let hint = Failure::from(refused(io::ErrorKind::PermissionDenied)).hint;
        assert_eq!(hint.as_deref(), Some("run it as the daemon's user"));
        assert_eq!(Failure::from(refused(io::ErrorKind::UnexpectedEof)).hint, None);
    }
}
